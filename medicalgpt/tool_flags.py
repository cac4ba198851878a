"""The command line of a tool: one flag per dataclass field, refusals in one line. Standard library only.

    args = parse_tool_arguments(ConvertArguments, argv, __doc__)

A field's metadata gives `help` and, where only some values are allowed, `choices`.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import TypeVar

from medicalgpt.errors import ConfigError

Arguments = TypeVar("Arguments")
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the docstring and shows every default that is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        """Return the help of a flag; None is said in words, if at all."""
        return action.help if action.default is None else super()._get_help_string(action)


class ToolParser(argparse.ArgumentParser):
    """argparse that refuses in one line."""

    def error(self, message: str) -> None:
        """Raise instead of printing a page of usage."""
        raise ConfigError(f"{message}; --help lists the flags")


def read_truth(text: str) -> bool:
    """Return the value of a flag that is on or off."""
    if text.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; expected True or False")
    return TRUTHS[text.lower()]


def value_type(annotation: object) -> type:
    """Return the type of a field's values: str of `str | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (annotation,) = (member for member in typing.get_args(annotation) if member is not types.NoneType)
    return annotation


def add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: type) -> None:
    """Add the flag of one field; a field without default must be given."""
    settings = {"help": field.metadata.get("help", ""), "type": kind}
    if kind is bool:
        settings |= {"type": read_truth, "nargs": "?", "const": True, "metavar": "True|False"}
    elif "choices" in field.metadata:
        settings["choices"] = field.metadata["choices"]
    else:
        settings["metavar"] = kind.__name__.upper()
    if field.default is dataclasses.MISSING:
        settings |= {"required": True, "default": argparse.SUPPRESS}
    else:
        settings["default"] = field.default
    parser.add_argument(f"--{field.name}", **settings)


def parse_tool_arguments(dataclass_type: type[Arguments], argv: Sequence[str], description: str) -> Arguments:
    """Return an instance of the dataclass with what the command line says.

    Args:
        dataclass_type: fields of type str, int, float or bool, each perhaps `| None`.
        argv: the words after the script's name.
        description: stands above the flags in --help; a script's docstring.

    Raises:
        ConfigError: an unknown flag (the nearest name is given), a wrong or missing value.
    """
    parser = ToolParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(dataclass_type)
    for field in dataclasses.fields(dataclass_type):
        add_flag(parser, field, value_type(hints[field.name]))
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in flags:
            near = difflib.get_close_matches(name, flags, n=1)
            mend = f"did you mean {near[0]}?" if near else "--help lists the flags"
            raise ConfigError(f"unknown argument {name!r}; {mend}")
    return dataclass_type(**vars(parser.parse_args(argv)))
