"""Reads a damaged data file as far as its meaning is certain. Standard library only.

A file in another Unicode or Chinese encoding is decoded, if the whole of it can be; values that share a line
are parted; a value that runs over several lines, as editors indent it, is joined; a key that stands twice
with the same value stands once.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from medicalgpt.data_files import (
    BLANKS,
    json_fault,
    reason,
    reject_constant,
    require_object,
    without_surrogates,
)
from medicalgpt.encodings import decoding_fault
from medicalgpt.errors import DataError
from medicalgpt.file_faults import HEAD_BYTES, SAVE, file_fault, line_fault, wide_encoding

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
    """Yield (line, number); bytes that cannot be decoded become lone surrogates, which no row may hold."""
    with open(path, encoding=encoding, errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield line.rstrip("\r\n"), number


def drop_repeated(pairs: list[tuple[str, object]]) -> dict:
    """Build an object in which a key may stand twice with one value.

    Raises:
        ValueError: it stands twice with two values.
    """
    row: dict = {}
    for key, value in pairs:
        if key in row and row[key] != value:
            raise ValueError(f"the key {key!r} stands twice, with two values")
        row[key] = value
    return row


DECODER = json.JSONDecoder(parse_constant=reject_constant, object_pairs_hook=drop_repeated)


def salvage_rows(path: Path, encoding: str) -> Iterator[Found]:
    """Yield every row that is certain, and every piece that is none with the reason."""
    with open(path, "rb") as file:
        fault = file_fault(file.read(HEAD_BYTES), path.suffix)
    if fault and not fault.endswith(SAVE):
        yield None, "", f"{path}:1", DataError(f"{path}:1: the file is {fault}")
        return
    lines = joined_lines(lenient_lines(path, encoding))
    for text, number in lines:
        yield from salvage(text.strip(), f"{path}:{number}")


def joined_lines(lines: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Join what an editor indented: from a line `{` to the next line `}`. Brackets of an array go."""
    part: list[str] = []
    begin, indent = 1, ""
    for line, number in lines:
        text = line.strip()
        if part:
            part.append(text)
            if line.rstrip(", ") == indent + "}":
                yield " ".join(part), begin
                part = []
        elif text == "{":
            part, begin, indent = [text], number, line[: line.index("{")]
        elif text not in ("", "[", "]"):
            yield text, number
    if part:
        yield " ".join(part), begin


def salvage(text: str, origin: str) -> Iterator[Found]:
    """Yield the rows of one line: one after the other, in an array or not, with commas between or not."""
    if any("\udc80" <= char <= "\udcff" for char in text):
        raw = text.encode("utf-8", "surrogateescape")
        error = DataError(f"{origin}: bytes that are not UTF-8; mend the line")
        yield None, raw.decode("utf-8", "replace"), origin, error
        return
    position = 0
    if text.startswith("[") or text.endswith("}]"):
        text = text.removeprefix("[").removesuffix("]")
    while position < len(text):
        try:
            value, end = DECODER.raw_decode(text, position)
            row = require_object(without_surrogates(value, text[position:end], origin), origin)
            yield row, text[position:end], origin, None
        except json.JSONDecodeError as error:
            rest = text[position:]
            fault = json_fault(rest, json.JSONDecodeError(error.msg, rest, error.pos - position))
            yield None, rest, origin, DataError(f"{origin}: {fault}")
            return
        except DataError as error:
            yield None, text[position:end], origin, error
        except (ValueError, RecursionError) as error:
            yield None, text[position:], origin, DataError(f"{origin}: {reason(error)}; mend it")
            return
        position = BLANKS.match(text, end).end()
        if text[position : position + 1] == ",":
            position = BLANKS.match(text, position + 1).end()
