"""Data files → rows, each with its `file:line`; whatever is no data is named for what it is.

Files are read in a stream. What cannot be used goes to `RowLog.refuse`, which ends a stage and which a tool
may survive: reading goes on behind it where that is possible. Standard library only.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from medicalgpt.errors import ConfigError, DataError
from medicalgpt.file_faults import HEAD_BYTES, file_fault, line_fault
from medicalgpt.row_log import RowLog

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
REJECTS = ".rejects.jsonl"  # rows that a tool could not use: no data of any stage
MANY_LINES = "a JSON value that runs over several lines"
MAX_ROW_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20


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
                f"{path}: {flag} takes {', '.join(suffixes)} files, not {root.suffix or 'no suffix'}; "
                "convert_dataset.py makes rows of tables"
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
        and not file.name.endswith(REJECTS)
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


def json_type(value: object) -> str:
    """Return what a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ---- lines -------------------------------------------------------------------------------------------------


def read_text_lines(path: Path, log: RowLog, *, max_bytes: int = -1) -> Iterator[tuple[str, int]]:
    """Yield (line without its end, its number) of a UTF-8 file (a byte-order mark is accepted).

    Empty and blank files, files that are something else, lines that are not UTF-8 or hold a NUL are refused.

    Args:
        max_bytes: of a line; reading stops at a longer one. -1: any length.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        fault = file_fault(head, path.suffix)
        if not head or fault:
            fault = f"the file is {fault}" if fault else "the file is empty; remove it or fill it"
            log.refuse(DataError(f"{path}:1: {fault}"))
            return
        file.seek(0)
        note_line_ends(head, path, log)
        blank, wide = True, False
        for number, raw in enumerate(iter(lambda: file.readline(max_bytes), b""), 1):
            log.bytes_read += len(raw)
            if len(raw) == max_bytes:
                log.refuse(DataError(f"{path}:{number}: a line of more than {max_bytes >> 20} MiB; split it"))
                return
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                what, is_chinese = line_fault(raw, error)
                log.refuse(DataError(f"{path}:{number}: {what}"))
                blank = False
                if is_chinese and not wide:
                    return
                continue
            wide = wide or not line.isascii()
            if number == 1:
                line = line.removeprefix("\ufeff")
            blank = blank and not line.strip()
            if "\0" in line:
                log.refuse(DataError(f"{path}:{number}: a NUL character; remove it"), line)
                continue
            yield line.removesuffix("\n").removesuffix("\r"), number
        if blank:
            log.refuse(DataError(f"{path}:1: the file is blank; remove it or fill it"))


def note_line_ends(head: bytes, path: Path, log: RowLog) -> None:
    """Count what is odd about a file as a whole, and changes nothing."""
    if head.startswith(codecs.BOM_UTF8):
        log.add("byte_order_mark", f"{path}:1")
    if b"\r\n" in head:
        log.add("windows_line_ends", f"{path}:1")


# ---- JSON --------------------------------------------------------------------------------------------------


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
        raise DataError(f"{origin}: {json_fault(text, error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: {reason(error)}; mend it") from None
    return without_surrogates(value, text, origin)


def json_fault(text: str, error: json.JSONDecodeError) -> str:
    """Return what a line is that is not one JSON value, and the mend."""
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


# ---- rows --------------------------------------------------------------------------------------------------


def read_rows(path: Path, log: RowLog | None = None) -> Iterator[tuple[dict, str]]:
    """Yield (row, `file:line`) of a .jsonl file or a .json array; blank lines are skipped and counted.

    Args:
        log: takes what is refused (the first refusal is raised when it is None).

    Raises:
        DataError: a line that is no row, or a file without any.
    """
    log = log or RowLog()
    return read_array(path, log) if path.suffix == ".json" else read_lines(path, log)


def read_lines(path: Path, log: RowLog) -> Iterator[tuple[dict, str]]:
    """Yield (row, `file:line`) of every line that is not blank."""
    is_first = True
    for line, number in read_text_lines(path, log, max_bytes=MAX_ROW_BYTES):
        text, origin = line.strip(), f"{path}:{number}"
        if not text:
            log.add("blank_lines", origin)
            continue
        if is_first and text.startswith("["):
            log.refuse(DataError(f"{origin}: a JSON array in a {path.suffix} file; name it .json"), text)
            return
        if is_first and text == "{":
            log.refuse(DataError(f"{origin}: {MANY_LINES}; validate_jsonl.py --fix joins them"), text)
            return
        is_first = False
        try:
            row = require_object(decode_json(text, origin), origin)
        except DataError as error:
            log.refuse(error, text)
            continue
        yield row, origin


def require_object(value: object, origin: str) -> dict:
    """Return the value if it is an object."""
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row is {json_type(value)}; expected a JSON object")
    return value


def read_array(path: Path, log: RowLog) -> Iterator[tuple[dict, str]]:
    """Yield (row, `file:line`) of a JSON array, with the line where each row begins.

    Where the array itself is broken, nothing behind that place can be read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    fault = file_fault(head, path.suffix)
    if not head or fault:
        log.refuse(DataError(f"{path}:1: the file is {fault or 'empty; remove it or fill it'}"))
        return
    note_line_ends(head, path, log)
    empty = True
    try:
        for value, text, origin in ArrayReader(path).values():
            empty = False
            log.bytes_read += len(text)
            try:
                row = require_object(without_surrogates(value, text, origin), origin)
            except DataError as error:
                log.refuse(error, text)
                continue
            yield row, origin
    except DataError as error:
        log.refuse(DataError(f"{error} (nothing behind it was read)"))
        return
    if empty:
        log.refuse(DataError(f"{path}:1: the file holds no row; remove it or fill it"))


class ArrayReader:
    """A window that slides over the text of a JSON array.

    Attributes:
        text: what is in memory. position: the next character. line: its line.
        ended: nothing follows behind `text`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.chunks = self.read_chunks()
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def read_chunks(self) -> Iterator[str]:
        """Yield the file's text piece by piece.

        Raises:
            DataError: a byte that is not UTF-8, with its line.
        """
        line, pending = 1, b""
        with open(self.path, "rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            while True:
                chunk = file.read(CHUNK_BYTES)
                raw = pending + chunk
                try:
                    text, used = codecs.utf_8_decode(raw, "strict", not chunk)
                except UnicodeDecodeError as error:
                    begin, end = raw.rfind(b"\n", 0, error.start) + 1, raw.find(b"\n", error.start)
                    bad = raw[begin : end if end >= 0 else None]
                    at = error.start - begin
                    what, _ = line_fault(bad, UnicodeDecodeError("utf-8", bad, at, at + 1, error.reason))
                    number = line + raw.count(b"\n", 0, error.start)
                    raise DataError(f"{self.path}:{number}: {what}") from None
                if "\0" in text:
                    number = line + text.count("\n", 0, text.index("\0"))
                    raise DataError(f"{self.path}:{number}: a NUL character; remove it")
                line, pending = line + text.count("\n"), raw[used:]
                if not chunk:
                    return
                yield text

    def read_more(self) -> None:
        """Forget what is behind the position, and read on."""
        self.text = self.text[self.position :]
        self.position = 0
        chunk = next(self.chunks, None)
        self.ended = chunk is None
        self.text += chunk or ""

    def move(self, end: int) -> None:
        """Go on to a place in the text."""
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def peek(self) -> str:
        """Return the next character that is no white space, or an empty string at the end."""
        while True:
            self.move(BLANKS.match(self.text, self.position).end())
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def fault(self, what: str) -> DataError:
        """Return a refusal of what stands at the position."""
        return DataError(f"{self.path}:{self.line}: {what}")

    def values(self) -> Iterator[tuple[object, str, str]]:
        """Yield (value, its text, `file:line`).

        Raises:
            DataError: what is wrong with the array.
        """
        first = self.peek()
        if not first:
            raise DataError(f"{self.path}:1: the file is blank; remove it or fill it")
        if first != "[":
            raise self.fault("a .json file must hold one array of objects; name it .jsonl if it is lines")
        self.move(self.position + 1)
        while self.peek() != "]":
            origin = f"{self.path}:{self.line}"
            value, end = self.decode(origin)
            yield value, self.text[self.position : end], origin
            self.move(end)
            if self.peek() == ",":
                self.move(self.position + 1)
                if self.peek() == "]":
                    raise self.fault("a comma before the end of the array; remove it")
            elif self.peek() != "]":
                raise self.fault("expected ',' or ']' after a row; the file may be cut off")
        self.move(self.position + 1)
        if self.peek():
            raise self.fault("text after the end of the array; remove it, or name the file .jsonl")

    def decode(self, origin: str) -> tuple[object, int]:
        """Return (the value at the position, where it ends), reading on until it is whole."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self.text) - 12 or error.msg.startswith("Unterminated string")
                if self.ended or not near_end:
                    line = self.line + self.text.count("\n", self.position, error.pos)
                    cut = "the file is cut off" if near_end else "broken JSON"
                    raise DataError(
                        f"{self.path}:{line}: {cut}: {decoder_says(error)} this place; mend it"
                    ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{origin}: {reason(error)}; mend it") from None
            else:
                if end < len(self.text) or self.ended:
                    return value, end
            if len(self.text) - self.position > MAX_ROW_BYTES:
                raise DataError(f"{origin}: a row of more than {MAX_ROW_BYTES >> 20} MiB; split it")
            self.read_more()
