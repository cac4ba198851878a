"""The model that a stage starts from: its directory, tokenizer and chat format; no weight is loaded yet."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from medicalgpt.arguments import StageFlags
from medicalgpt.chat_template import export_template, resolve_template, warn_of_plain_roles
from medicalgpt.checkpoint import fingerprint
from medicalgpt.model_files import adapter_settings, load_config, load_tokenizer, resolve_model_dir
from medicalgpt.run_record import check_base, config_fingerprint, recorded_template, recorded_tool_format
from medicalgpt.tokenization import ChatFormat

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Base:
    """The model that a stage starts from.

    Attributes:
        chat_format: None in a stage that reads plain texts.
    """

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat | None

    @property
    def template_name(self) -> str | None:
        """The name of the chat format."""
        return self.chat_format.template.name if self.chat_format else None

    def fingerprints(self, adapter: str | None) -> dict[str, str | None]:
        """Return what tells this base, its tokenizer and the adapter to go on with from any other."""
        backend = (
            self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else repr(self.tokenizer)
        )
        return {
            "path": str(self.directory),
            "fingerprint": fingerprint(self.directory),
            "config": config_fingerprint(self.directory),
            "tokenizer": hashlib.sha256(backend.encode()).hexdigest()[:16],
            "adapter": fingerprint(Path(adapter)) if adapter else None,
        }

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer, with the chat template that was trained."""
        if self.chat_format:
            export_template(self.tokenizer, self.chat_format)
        self.tokenizer.save_pretrained(directory)


def open_base(flags: StageFlags) -> Base:
    """Find the base and its tokenizer, and decide on the chat format. No weight is loaded yet.

    Raises:
        ConfigError: no such directory, or a template that contradicts the model. ModelError: no model in it.
    """
    model, remote_code = flags.model, flags.model.trust_remote_code
    directory = resolve_model_dir(
        model.model_name_or_path, "--model_name_or_path", model.cache_dir, remote_code=remote_code
    )
    load_config(directory, trust_remote_code=remote_code)
    tokenizer_name = model.tokenizer_name_or_path or str(directory)
    tokenizer = load_tokenizer(
        resolve_model_dir(tokenizer_name, "--tokenizer_name_or_path", model.cache_dir),
        trust_remote_code=remote_code,
    )
    if flags.adapter.peft_path:
        adapter_settings(Path(flags.adapter.peft_path))
        check_base(Path(flags.adapter.peft_path), directory)
    if flags.chat is None:
        return Base(directory, tokenizer, None)
    template = resolve_template(
        tokenizer,
        flags.chat.template_name,
        recorded=recorded_template(directory),
        force=flags.chat.force_template,
    )
    tool_format = flags.chat.tool_format or recorded_tool_format(directory)
    chat_format = ChatFormat.of(template, tokenizer, tool_format)
    warn_of_plain_roles(tokenizer, chat_format)
    return Base(directory, tokenizer, chat_format)
