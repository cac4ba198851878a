"""Which chat format a model gets, and the proof that it is the one the model knows."""

from dataclasses import replace

from medicalgpt.errors import ConfigError, ModelError
from medicalgpt.tokenization import ChatFormat
from template import TEMPLATES, Template, get_template, jinja, render_text

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Conversations on which a model's own chat template and ours must agree.
PROBES = (
    [("user", "a b"), ("assistant", "c d")],
    [("user", "Question?"), ("assistant", "Answer."), ("user", "And then?"), ("assistant", "More.")],
    [("system", "Be brief."), ("user", "Question?"), ("assistant", "Answer."), ("user", "And then?")],
    [("user", "只有一个问题")],
)


def agrees(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Return whether the tokenizer's own chat template renders every probe it accepts as ours does."""
    try:
        chat_format = ChatFormat.of(template, tokenizer)
    except ModelError:
        return False
    compared = 0
    for probe in PROBES:
        messages = [{"role": role, "content": content} for role, content in probe]
        try:
            own = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=probe[-1][0] == "user"
            )
        except (TemplateError, ValueError):
            continue  # a format that refuses system prompts
        compared += 1
        if own != render_text(template, probe, bos=chat_format.bos, eos=chat_format.eos):
            return False
    return compared > 0


def as_the_model_has_it(tokenizer: PreTrainedTokenizerBase, template: Template) -> Template | None:
    """Return the template with the model's own default system prompt, or None if formats differ."""
    variants = [replace(template, default_system=system) for system in template.system_variants]
    return next((variant for variant in (template, *variants) if agrees(tokenizer, variant)), None)


def matching_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """Return the template that the tokenizer's own chat template is, or None."""
    found = (as_the_model_has_it(tokenizer, template) for template in TEMPLATES.values())
    return next((template for template in found if template), None)


def resolve_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, *, recorded: str | None, force: bool = False
) -> Template:
    """Return the template to use.

    Args:
        name: --template_name.
        recorded: the template that the model was trained with, from its run.json.
        force: take `name` whatever the model says.

    Raises:
        ConfigError: no such template; none is given and the model's own is none of ours; or the name
            contradicts what the model was trained with.
    """
    choices = ", ".join(TEMPLATES)
    if name is not None and name not in TEMPLATES:
        raise ConfigError(f"--template_name {name} is not known; choose from {choices}")
    if name is not None and force:
        return get_template(name)
    if name is not None and recorded not in (None, name):
        raise ConfigError(
            f"--template_name {name}: the model was trained with {recorded}; leave the flag out, or use "
            "--force_template True to override"
        )
    wanted = TEMPLATES.get(name or recorded or "")
    if tokenizer.chat_template is None:
        if wanted is None:
            raise ConfigError(
                f"{tokenizer.name_or_path} has no chat template; give --template_name, one of {choices}"
            )
        return wanted
    found = as_the_model_has_it(tokenizer, wanted) if wanted else matching_template(tokenizer)
    if found is None and recorded is not None:
        return wanted  # what it was trained with counts, whatever template its tokenizer carries
    if found is None and wanted is None:
        raise ConfigError(
            f"{tokenizer.name_or_path} has a chat template that is none of these; give --template_name, one "
            f"of {choices}, with --force_template True"
        )
    if found is None:
        own = matching_template(tokenizer)
        raise ConfigError(
            f"--template_name {wanted.name}: the model's own chat template is "
            f"{own.name if own else 'another one'}; give that name or --force_template True to override"
        )
    return found


def export_template(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> None:
    """Give the tokenizer the chat template that was trained; one of its own that renders the same stays."""
    if tokenizer.chat_template is None or not agrees(tokenizer, chat_format.template):
        tokenizer.chat_template = jinja(chat_format.template, bos=chat_format.bos, eos=chat_format.eos)
