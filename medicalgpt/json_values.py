"""One JSON value: strict decoding, and the name of what is wrong with it. Standard library only."""

import json
import math
import re
from collections import Counter

from medicalgpt.errors import DataError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MANY_LINES = "a JSON value that runs over several lines"


def field_names(row: dict) -> str:
    """Return the names of a row's fields, short and on one line."""
    names = [name if name.isprintable() and len(name) <= 40 else f"{name[:40]!r}" for name in sorted(row)]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") or "no fields"


def json_type(value: object) -> str:
    """Return what a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def reject_constant(name: str) -> float:
    """Refuse NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not JSON")


def read_float(text: str) -> float:
    """Refuse a number that no float can hold, which would become Infinity."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def reject_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """Build an object and refuse a key that stands twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice")
    return row


BLANKS = re.compile(r"\s*")
DECODER = json.JSONDecoder(
    parse_constant=reject_constant, parse_float=read_float, object_pairs_hook=reject_duplicates
)


def decode_json(text: str, origin: str) -> object:
    """Return the JSON value of one line.

    Raises:
        DataError: the line is not exactly one JSON value, or holds a lone surrogate.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: {json_fault(text, error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: {reason(error)}; mend it") from None
    return without_surrogates(value, text, origin)


def json_fault(text: str, error: json.JSONDecodeError) -> str:
    """Return what a line is that is not one JSON value, and the mend."""
    if text.startswith("\ufeff"):
        return "a byte-order mark in front of the row; remove it, or validate_jsonl.py --fix does"
    if not text.startswith(("{", "[")):
        if re.fullmatch(r"[\]}],?|\"[^\"]*\"\s*:.*", text):
            return f"part of {MANY_LINES}; write one row on one line"
        return f"no JSON object ({text[:30]!r}); every line must be one, in braces"
    if error.msg == "Extra data":
        rest = text[error.pos :]
        if rest.startswith(("{", "[")):
            return f"two JSON values on one line (one ends before column {error.colno}); part them"
        return f"text behind the JSON object ({rest[:20]!r} at column {error.colno}); remove it"
    if len(text) < 3:
        return f"{MANY_LINES}; write one row on one line, or name an array .json"
    if error.msg.startswith("Unterminated string") or error.pos >= len(text):
        return (
            f"the JSON is cut off ({decoder_says(error)} column {error.colno}); write it whole or remove it"
        )
    return f"broken JSON: {decoder_says(error)} column {error.colno}; mend it"


def decoder_says(error: json.JSONDecodeError) -> str:
    """Return what the decoder met, ready for a place to follow."""
    return error.msg if error.msg.endswith(" at") else f"{error.msg} at"


def reason(error: ValueError | RecursionError) -> str:
    """Return why a value that is well-formed JSON cannot be taken."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number of more than 4,300 digits" if "Exceeds the limit" in str(error) else str(error)


def without_surrogates(value: object, text: str, origin: str) -> object:
    """Return the value if none of its strings holds half of a surrogate pair."""
    if "\\u" in text and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{origin}: half of a surrogate pair; write the character as UTF-8")
    return value
