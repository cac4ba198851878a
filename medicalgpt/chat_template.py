"""Which chat format a model gets, and the proof that it is the one the model knows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medicalgpt.errors import ConfigError, ModelError
from medicalgpt.jinja_export import jinja
from medicalgpt.template_probe import Difference, Render, Unreadable, compare, read_template
from medicalgpt.tokenization import ChatFormat
from medicalgpt.tool_formats import TOOL_FORMATS
from template import TEMPLATES, Message, Template, get_template

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("medicalgpt")

PROBE_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
OWN = "own"  # the name of a format that is read off a model's own chat template


@dataclass(frozen=True)
class OwnRender:
    """A tokenizer's own chat template as a function of messages."""

    tokenizer: PreTrainedTokenizerBase
    options: dict

    def __call__(self, messages: Sequence[Message], is_prompt: bool) -> str:
        """Render.

        Raises:
            ValueError: the template refuses these messages.
        """
        talk = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                talk, tokenize=False, add_generation_prompt=is_prompt, **self.options
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(str(error)) from error


def render_of(tokenizer: PreTrainedTokenizerBase, template: Template | None = None) -> Render:
    """Return the tokenizer's own rendering, in the mode of a template (thinking or not)."""
    return OwnRender(tokenizer, template.options if template else {})


def difference(tokenizer: PreTrainedTokenizerBase, template: Template) -> Difference | ModelError | None:
    """Return where the tokenizer's own chat template and ours part, or None where they agree."""
    try:
        chat_format = ChatFormat.of(template, tokenizer)
    except ModelError as error:
        return error
    bos, eos = chat_format.bos, chat_format.eos
    compared, found = compare(render_of(tokenizer, template), template, bos=bos, eos=eos)
    return found if compared else ModelError("the model's own chat template refuses every conversation")


def as_the_model_has_it(tokenizer: PreTrainedTokenizerBase, template: Template) -> Template | None:
    """Return the template as the model's own chat template has it, or None if formats differ."""
    variants = (template, *(replace(template, **values) for values in template.variants))
    alike = [variant for variant in variants if difference(tokenizer, variant) is None]
    return next((variant for variant in alike if offers_alike(tokenizer, variant)), (*alike, None)[0])


def offers_alike(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Return whether the tokenizer's own chat template offers tools as this template does."""
    question = [Message("user", "a")]
    chat_format = ChatFormat.of(template, tokenizer)
    try:
        own = OwnRender(tokenizer, template.options | {"tools": [PROBE_TOOL]})(question, True)
    except ValueError:
        return False
    turns = chat_format.render(question, [PROBE_TOOL])
    return own == "".join(segment.text for turn in turns for segment in turn)


def read_own_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the format of the tokenizer's own chat template.

    Raises:
        ConfigError: it cannot be read off, with the reason.
    """
    try:
        template = read_template(
            render_of(tokenizer),
            sorted(tokenizer.get_added_vocab()),
            bos=tokenizer.bos_token or "",
            eos=tokenizer.eos_token or "",
        )
        ways = (replace(template, tool_format=name) for name in TOOL_FORMATS)
        return next((way for way in ways if offers_alike(tokenizer, way)), template)
    except Unreadable as error:
        raise ConfigError(
            f"{tokenizer.name_or_path}: its own chat template cannot be turned into segments: {error}; give "
            f"--template_name, one of {', '.join(TEMPLATES)}, with --force_template True"
        ) from None


def matching_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """Return the template that the tokenizer's own chat template is, or None.

    Of several that agree, the mode that the model is in unasked (thinking or not) is taken, and the format
    that also offers tools as the model does.
    """
    found = [own for template in TEMPLATES.values() if (own := as_the_model_has_it(tokenizer, template))]
    usual = [own for own in found if difference(tokenizer, replace(own, options={})) is None] or found
    return next((template for template in usual if offers_alike(tokenizer, template)), (*usual, None)[0])


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
    if name not in (None, OWN) and name not in TEMPLATES:
        raise ConfigError(f"--template_name {name} is not known; choose from {choices}")
    if name is not None and force and name != OWN:
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
    if wanted is None:
        return matching_template(tokenizer) or read_own_template(tokenizer)
    found = as_the_model_has_it(tokenizer, wanted)
    if found is None and recorded is not None:
        return wanted  # what it was trained with counts, whatever template its tokenizer carries
    if found is None:
        own = matching_template(tokenizer)
        raise ConfigError(
            f"--template_name {wanted.name}: the model's own chat template is "
            f"{own.name if own else 'another one'} ({difference(tokenizer, wanted)}); leave the flag out, or "
            "use --force_template True to override"
        )
    return found


def known_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> Template | None:
    """Return the template that a run recorded, or None where it recorded none."""
    return read_own_template(tokenizer) if name == OWN else TEMPLATES.get(name)


def warn_of_plain_roles(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> None:
    """Say so where the format's markers are plain text, which any message may contain."""
    if not chat_format.protects_roles(tokenizer):
        logger.info(
            "template %s marks who speaks with plain text: a message can pretend to be another's",
            chat_format.template.name,
        )


def export_template(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> None:
    """Give the tokenizer the chat template that was trained; one of its own that renders the same stays."""
    template = chat_format.template
    if tokenizer.chat_template is None or (
        template.name != OWN and difference(tokenizer, template) is not None
    ):
        tokenizer.chat_template = jinja(template, bos=chat_format.bos, eos=chat_format.eos)
