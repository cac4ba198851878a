"""Reads a damaged data file as far as its meaning is certain. Standard library only.

A file in another Unicode or Chinese encoding is decoded, if the whole of it can be; values that share a line
are parted; a value that runs over several lines, as editors indent it, is joined; a key that stands twice
with the same value stands once.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from medicalgpt.data_files import require_object
from medicalgpt.encodings import decoding_fault
from medicalgpt.errors import DataError
from medicalgpt.file_faults import HEAD_BYTES, SAVE, file_fault, line_fault, wide_encoding
from medicalgpt.json_array import CHUNK_BYTES, ArrayReader
from medicalgpt.json_values import (
    BLANKS,
    json_fault,
    read_float,
    reason,
    reject_constant,
    without_surrogates,
)

UNREADABLE = "\udcff"  # stands for bytes that cannot be decoded; no decoded text holds it
codecs.register_error("medicalgpt.unreadable", lambda error: (UNREADABLE, error.end))
MAX_JOINED = 10_000  # lines of one row
Found = tuple[dict | None, str, str, DataError | None]  # row, its text, file:line, why there is no row


def detect_encoding(path: Path) -> str:
    """Return the encoding in which a file is whole; utf-8 where only single bytes of it are broken."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    wide = wide_encoding(head)
    if wide:
        return wide.lower()
    if decoding_fault(path, "utf-8") is None or not reads_as_chinese(path):
        return "utf-8-sig"
    return "utf-8-sig" if decoding_fault(path, "gb18030") else "gb18030"


def reads_as_chinese(path: Path) -> bool:
    """True when the first line that is not UTF-8 is in a Chinese encoding."""
    with open(path, "rb") as file:
        for raw in file:
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                return line_fault(raw, error)[1]
    return False


def lenient_lines(path: Path, encoding: str) -> Iterator[tuple[str, int]]:
    """Yield (line, number) without its byte-order mark; a line with UNREADABLE in it could not be decoded."""
    with open(path, encoding=encoding, errors="medicalgpt.unreadable", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield line.rstrip("\r\n").removeprefix("\ufeff"), number


def drop_repeated(pairs: list[tuple[str, object]]) -> dict:
    """Build an object in which a key may stand twice with one value.

    Raises:
        ValueError: it stands twice with two values.
    """
    row: dict = {}
    for key, value in pairs:
        if key in row and json.dumps(row[key]) != json.dumps(value):
            raise ValueError(f"the key {key[:40]!r} stands twice, with two values")
        row[key] = value
    return row


LENIENT = json.JSONDecoder(
    parse_constant=reject_constant, parse_float=read_float, object_pairs_hook=drop_repeated
)


def salvage_rows(path: Path, encoding: str) -> Iterator[Found]:
    """Yield every row that is certain, and every piece that is none with the reason."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    fault = file_fault(head, path.suffix)
    if not head.strip() or (fault and not fault.endswith(SAVE)):
        fault = fault or "empty; remove it or fill it"
        yield None, "", f"{path}:1", DataError(f"{path}:1: the file is {fault}")
    elif is_whole_array(path, encoding):
        for value, text, origin in ArrayReader(path, decoded_chunks(path, encoding), LENIENT).values():
            yield row_of(value, text, origin)
    else:
        for text, number in joined_lines(lenient_lines(path, encoding)):
            yield from salvage(text.strip(), f"{path}:{number}")


def decoded_chunks(path: Path, encoding: str) -> Iterator[str]:
    """Yield a file's text piece by piece, strictly decoded."""
    with open(path, encoding=encoding, newline="") as file:
        while text := file.read(CHUNK_BYTES):
            yield text


def is_whole_array(path: Path, encoding: str) -> bool:
    """True when a file is one JSON array from its first character to its last."""
    try:
        if next(decoded_chunks(path, encoding), "").lstrip()[:1] != "[":
            return False
        for _ in ArrayReader(path, decoded_chunks(path, encoding), LENIENT).values():
            pass
    except (DataError, UnicodeDecodeError):
        return False
    return True


def row_of(value: object, text: str, origin: str) -> Found:
    """Return a value as a row, or why it is none."""
    try:
        return require_object(without_surrogates(value, text, origin), origin), text, origin, None
    except DataError as error:
        return None, text, origin, error


def joined_lines(lines: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Join what an editor indented: from a line `{` to the next line `}` under it. Brackets of an array go.

    Where another object begins under the `{` first, nothing is joined.
    """
    part: list[tuple[str, int]] = []
    indent = ""
    for line, number in lines:
        text = line.strip()
        if part and (line.startswith(indent + "{") or len(part) == MAX_JOINED):
            yield from part
            part = []
        if part:
            part.append((text, number))
            if line.rstrip(", ") == indent + "}":
                yield " ".join(piece for piece, _ in part), part[0][1]
                part = []
        elif text == "{":
            part, indent = [(text, number)], line[: line.index("{")]
        elif text not in ("", "[", "]"):
            yield text, number
    yield from part


def salvage(line: str, origin: str) -> Iterator[Found]:
    """Yield the rows of one line: one after the other, in an array or not, with commas between or not."""
    if UNREADABLE in line:
        error = DataError(f"{origin}: holds bytes that cannot be decoded; mend the line")
        yield None, line.replace(UNREADABLE, "\ufffd"), origin, error
        return
    text = line
    if text.startswith("[") or (text.endswith("}]") and not is_cut_object(text)):
        text = text.removeprefix("[").removesuffix("]")
    position = 0
    while position < len(text):
        try:
            value, end = LENIENT.raw_decode(text, position)
        except json.JSONDecodeError as error:
            rest = text[position:] if position else line
            fault = json_fault(rest, json.JSONDecodeError(error.msg, rest, error.pos - position))
            yield None, rest, origin, DataError(f"{origin}: {fault}")
            return
        except (ValueError, RecursionError) as error:
            yield None, text[position:], origin, DataError(f"{origin}: {reason(error)}; mend it")
            return
        yield row_of(value, text[position:end], origin)
        position = BLANKS.match(text, end).end()
        if text[position : position + 1] == ",":
            position = BLANKS.match(text, position + 1).end()


def is_cut_object(text: str) -> bool:
    """True when a text's last bracket is its object's own, as in `{"a": [{…}]`, whose brace is missing."""
    try:
        LENIENT.raw_decode(text)
    except (ValueError, RecursionError):
        return True
    return False
