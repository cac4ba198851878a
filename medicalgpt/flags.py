"""The command line: whole flag names only, renamed and removed ones answered, refusals in one line."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from medicalgpt.errors import ConfigError, require_packages
from medicalgpt.tool_formats import CHOICES

require_packages("torch", "transformers", "peft", "bitsandbytes", "datasets")

from transformers import HfArgumentParser  # noqa: E402  (after the check above)


def require(condition: bool, message: str) -> None:
    """Refuse a flag's value."""
    if not condition:
        raise ConfigError(message)


def require_tool_format(name: str | None) -> None:
    """Refuse a --tool_format that is none."""
    require(
        name is None or name in CHOICES,
        f"--tool_format {name} is not known; choose from {', '.join(CHOICES)}",
    )


def require_positive(arguments: Any, *names: str) -> None:
    """Refuse values below 1 (None is no value)."""
    for name in names:
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name} {value} is not allowed; expected 1 or more")


RENAMED_FLAGS = {
    "--warmup_ratio": "--warmup_steps",  # a float below 1 is a share of the steps
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--gradient_checkpointing": "--gradient_checkpointing",
    "--activation_checkpointing": "--gradient_checkpointing",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
}


GONE_FLAGS = {
    "--logging_dir": "leave it out, TensorBoard's files are always in logs/ of --output_dir",
    "--group_by_length": "leave it out, rows need no padding, so their lengths do not matter",
    "--save_safetensors": "leave it out, weights are always saved as safetensors",
    "--preprocessing_only": "leave it out, data is checked before a model is loaded anyway",
}


class FlagParser(HfArgumentParser):
    """argparse that refuses in one line and knows no abbreviations."""

    def error(self, message: str) -> None:
        """Raise instead of printing a page of usage."""
        raise ConfigError(f"{message}; --help lists the flags")


def translate_flags(argv: Sequence[str]) -> list[str]:
    """Give flags that the libraries removed their new names, and refuse those without one.

    Raises:
        ConfigError: the flag is gone; says what takes its place.
    """
    translated = []
    for index, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        name = "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag
        if name in GONE_FLAGS:
            raise ConfigError(f"{flag} no longer exists: {GONE_FLAGS[name]}")
        new = RENAMED_FLAGS.get(name, flag)
        translated.append(new + equals + value)
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if new == "--gradient_checkpointing" and not equals and following.startswith("--"):
            translated.append("True")  # the bare flag
    return translated


def parse_arguments(
    argv: Sequence[str], types: Sequence[type], description: str, defaults: dict[str, Any]
) -> tuple:
    """Return one instance per argument dataclass.

    Args:
        types: dataclasses, one field per flag.
        defaults: the script's own defaults, over those of the dataclasses.

    Raises:
        ConfigError: an unknown flag (the nearest name is given), a wrong value, a forbidden combination.
    """
    parser = FlagParser(
        types,
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(**defaults)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args=translate_flags(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        name = next((arg for arg in unknown if arg.startswith("-")), unknown[0]).partition("=")[0]
        near = difflib.get_close_matches(name, flags, n=1)
        raise ConfigError(
            f"unknown argument {name!r}"
            + (f"; did you mean {near[0]}?" if near else "; --help lists the flags")
        )
    return tuple(parsed)
