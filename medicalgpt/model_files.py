"""Model directories: where a model is, and whether its files are what their names say."""

import json
import re
from pathlib import Path

from medicalgpt.checkpoint import nearest_path
from medicalgpt.errors import ConfigError, ModelError, first_line

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]


def resolve_model_dir(
    name: str, flag: str, cache_dir: str | None = None, *, remote_code: bool = False
) -> Path:
    """Return the local directory of a model: the one named, or a download of a hub name.

    A name that looks like a path is never sent to a hub.

    Raises:
        ConfigError: no such directory, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"{flag} {name} is a file; expected a model directory")
    if not HUB_NAME.fullmatch(name) or name.startswith(".") or Path(name.split("/")[0]).is_dir():
        raise ConfigError(f"{flag} {name} does not exist{nearest_path(path)}")
    try:
        return Path(
            snapshot_download(
                name, cache_dir=cache_dir, allow_patterns=[*HUB_FILES, *(["*.py"] if remote_code else [])]
            )
        )
    except Exception as error:
        raise ConfigError(
            f"{flag} {name} is no directory here and cannot be had from the hub "
            f"({first_line(error)[:120]}); give a local directory, set HF_ENDPOINT to a mirror, or run "
            "hf auth login for a gated model"
        ) from None


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the model's configuration.

    Raises:
        ModelError: the directory holds no model, or one that needs code of its own.
    """
    if not (directory / "config.json").is_file():
        what = (
            "an adapter; merge it first, or give its base here and it as --peft_path (chat: --lora_model)"
            if (directory / "adapter_config.json").is_file()
            else "no config.json, so no model"
        )
        raise ModelError(f"{directory} holds {what}")
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in raw and not trust_remote_code and raw.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise ModelError(
                f"{directory}: the model brings code of its own; read it, then use --trust_remote_code True"
            )
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory}/config.json: {first_line(error)}") from None


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with EOS as padding token where it has none.

    Raises:
        ModelError: there is none, or it does not load.
    """
    if not any(directory.glob("*token*")):
        raise ModelError(f"{directory} holds no tokenizer (tokenizer.json); give the directory that does")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{directory}: the tokenizer does not load: {first_line(error)[:200]}") from None
    if not len(tokenizer):
        raise ModelError(f"{directory} holds no tokenizer; give one with --tokenizer_name_or_path")
    if not tokenizer.is_fast:
        raise ModelError(
            f"{directory}: {type(tokenizer).__name__} has no fast form (tokenizer.json), which is needed to "
            "keep text and control tokens apart; use a version of the model that has it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def weights_are_readable(directory: Path) -> None:
    """Refuse a directory whose safetensors files are missing, cut off or not what their names say.

    Raises:
        ModelError: names the file and what it is.
    """
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index}: names {name!r}, which leaves the model's directory")
        files = [directory / name for name in names]
    if not files:
        raise ModelError(
            f"{directory} holds no .safetensors weights; pickled weights (.bin) are not read, convert them"
        )
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing; the download is not complete")
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Compare a file's length with what its header announces."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        head = handle.read(128)
        if head.startswith(b"version https://git-lfs"):
            raise ModelError(f"{file} is a Git LFS pointer, not weights; run git lfs pull")
        if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise ModelError(f"{file} is an HTML page, not weights; download it again")
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > size:
            raise ModelError(f"{file} is cut off or not safetensors: {size} bytes; download it again")
        handle.seek(8)
        try:
            header = json.loads(handle.read(length))
        except ValueError:
            raise ModelError(f"{file} has a damaged header; download it again") from None
    announced = (
        8
        + length
        + max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
    )
    if announced != size:
        raise ModelError(f"{file} has {size} bytes where its header announces {announced}; download it again")


def adapter_settings(directory: Path) -> dict:
    """Return an adapter's configuration.

    Raises:
        ModelError: the directory holds no adapter, or a damaged one.
    """
    file = directory / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"{directory} holds no adapter (adapter_config.json){nearest_path(directory)}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ModelError(f"{file} is damaged; use another checkpoint of that run") from None
