"""Data files → rows, each with its `file:line`; whatever is no data is named for what it is.

Standard library only, so that tools answer at once.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from medicalgpt.errors import ConfigError, DataError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


NOT_TEXT = {
    b"\x1f\x8b": "gzip data; unpack it first",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"PK\x03\x04": "a zip archive (or an .xlsx); unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the data; run git lfs pull",
    b"<!DOCTYPE html": "an HTML page, not data; download the file itself",
    b"<html": "an HTML page, not data; download the file itself",
}


def find_files(path: str, suffixes: tuple[str, ...], flag: str) -> list[Path]:
    """Return the data files under a directory (or the one file), sorted.

    Raises:
        ConfigError: the path does not exist.
        DataError: no file with an allowed suffix.
    """
    root = Path(path)
    if root.is_file():
        if root.suffix not in suffixes:
            raise DataError(
                f"{path}: {flag} takes {', '.join(suffixes)} files, not {root.suffix or 'no suffix'}"
            )
        return [root]
    if not root.is_dir():
        raise ConfigError(
            f"{flag} {path} does not exist; expected a directory with {', '.join(suffixes)} files"
        )
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix in suffixes
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not files:
        raise DataError(f"{flag} {path} holds no {', '.join(suffixes)} file")
    return files


def fingerprint_files(files: Iterable[Path]) -> dict[str, str]:
    """Return {path: sha256} of every file."""
    prints = {}
    for path in files:
        with open(path, "rb") as file:
            prints[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return prints


def read_text_file(path: Path) -> str:
    """Return a whole file as strict UTF-8 text (a byte-order mark is accepted).

    Raises:
        DataError: the file is empty, not text, or not UTF-8; names the line of the first bad byte.
    """
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{path}:1: the file is empty; remove it or fill it")
    head = data[:64].lstrip()
    for magic, what in NOT_TEXT.items():
        if head.lower().startswith(magic.lower()):
            raise DataError(f"{path}:1: the file is {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{path}:1: the file is blank; remove it or fill it")
    if "\0" in text:
        raise DataError(
            f"{path}:{text.count(chr(10), 0, text.index(chr(0))) + 1}: a NUL character; remove it"
        )
    return text


def reject_constant(name: str) -> float:
    """Refuse NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not JSON")


def reject_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """Build an object and refuse a key that stands twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return row


BLANKS = re.compile(r"\s*")
DECODER = json.JSONDecoder(parse_constant=reject_constant, object_pairs_hook=reject_duplicates)


def decode_json(text: str, origin: str) -> object:
    """Return the JSON value of one line.

    Raises:
        DataError: the line is not exactly one JSON value, or holds a lone surrogate.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}: not one JSON object: {error.msg} at column {error.colno}; mend it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: {reason(error)}; mend it") from None
    return without_surrogates(value, text, origin)


def reason(error: ValueError | RecursionError) -> str:
    """Return why a value that is well-formed JSON cannot be taken."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def without_surrogates(value: object, text: str, origin: str) -> object:
    """Return the value if none of its strings holds half of a surrogate pair."""
    if "\\u" in text and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{origin}: half of a surrogate pair; write the character as UTF-8")
    return value


def read_rows(path: Path) -> Iterator[tuple[dict, str]]:
    """Yield (row, `file:line`) of a .jsonl file or a .json array; blank lines are skipped.

    Raises:
        DataError: a line that is no row, or a file without any.
    """
    text = read_text_file(path)
    empty = True
    for value, origin in read_array(text, path) if path.suffix == ".json" else read_lines(text, path):
        yield require_object(value, origin)
        empty = False
    if empty:
        raise DataError(f"{path}:1: the file holds no row; remove it or fill it")


def read_lines(text: str, path: Path) -> Iterator[tuple[object, str]]:
    """Yield (value, `file:line`) of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield decode_json(line.strip(), f"{path}:{number}"), f"{path}:{number}"


def read_array(text: str, path: Path) -> Iterator[tuple[object, str]]:
    """Yield (value, `file:line`) of a JSON array, with the line where each value begins."""
    position, line = skip_blanks(text, 0, 1)
    if text[position] != "[":
        raise DataError(
            f"{path}:{line}: a .json file must hold one array of objects; name it .jsonl if it is lines"
        )
    position, line = skip_blanks(text, position + 1, line)
    while text[position : position + 1] != "]":
        origin = f"{path}:{line}"
        try:
            value, end = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: {error.msg} at column {error.colno}; mend it") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: {reason(error)}; mend it") from None
        yield without_surrogates(value, text[position:end], origin), origin
        line += text.count("\n", position, end)
        position, line = skip_blanks(text, end, line)
        if text[position : position + 1] == ",":
            position, line = skip_blanks(text, position + 1, line)
            if text[position : position + 1] == "]":
                raise DataError(f"{path}:{line}: a comma before the end of the array; remove it")
        elif text[position : position + 1] != "]":
            raise DataError(f"{path}:{line}: expected ',' or ']' after a row; the file may be cut off")
    if text[position + 1 :].strip():
        raise DataError(f"{path}:{line}: text after the end of the array; remove it, or name the file .jsonl")


def skip_blanks(text: str, position: int, line: int) -> tuple[int, int]:
    """Return (position, line) of the next character that is no white space."""
    end = BLANKS.match(text, position).end()
    return end, line + text.count("\n", position, end)


def require_object(value: object, origin: str) -> tuple[dict, str]:
    """Return (value, origin) if the value is an object."""
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be a JSON object, not {type(value).__name__}")
    return value, origin
