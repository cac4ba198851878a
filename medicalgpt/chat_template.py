"""Which chat format a model gets, and the proof that it is the one the model knows."""

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


def matching_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """Return the template that the tokenizer's own chat template is, or None."""
    return next((template for template in TEMPLATES.values() if agrees(tokenizer, template)), None)


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
    own = tokenizer.chat_template is not None
    if name is None:
        found = TEMPLATES.get(recorded) if recorded else matching_template(tokenizer) if own else None
        if found is None:
            what = "a chat template that is none of these" if own else "no chat template"
            raise ConfigError(f"{tokenizer.name_or_path} has {what}; give --template_name, one of {choices}")
        return found
    template = get_template(name)
    if force:
        return template
    if recorded not in (None, name):
        raise ConfigError(
            f"--template_name {name}: the model was trained with {recorded}; leave the flag out, or use "
            "--force_template True to override"
        )
    if own and not agrees(tokenizer, template):
        match = matching_template(tokenizer)
        raise ConfigError(
            f"--template_name {name}: the model's own chat template is "
            f"{match.name if match else 'another one'}; use {match.name if match else 'that'}, or "
            "--force_template True to override"
        )
    return template


def export_template(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> None:
    """Give the tokenizer the chat template that was trained; one of its own that renders the same stays."""
    if tokenizer.chat_template is None or not agrees(tokenizer, chat_format.template):
        tokenizer.chat_template = jinja(chat_format.template, bos=chat_format.bos, eos=chat_format.eos)
