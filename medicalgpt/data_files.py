"""Data files → rows, each with its `file:line`; whatever is no data is named for what it is.

Files are read in a stream. What cannot be used goes to `RowLog.refuse`, which ends a stage and which a tool
may survive: reading goes on behind it where that is possible. Standard library only.
"""

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from medicalgpt.errors import ConfigError, DataError
from medicalgpt.file_faults import HEAD_BYTES, file_fault, line_fault
from medicalgpt.json_array import MAX_ROW_BYTES, ArrayReader
from medicalgpt.json_values import MANY_LINES, decode_json, json_type, without_surrogates
from medicalgpt.row_log import RowLog

REJECTS = ".rejects.jsonl"  # rows that a tool could not use: no data of any stage


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


# ---- lines -------------------------------------------------------------------------------------------------


def read_text_lines(path: Path, log: RowLog, *, max_bytes: int = -1) -> Iterator[tuple[str, int]]:
    """Yield (line without its end, its number) of a UTF-8 file (a byte-order mark is accepted).

    Empty and blank files, files that are something else, lines that are not UTF-8 or hold a NUL are refused.

    Args:
        max_bytes: of a line; reading stops at a longer one. -1: any length.
    """
    if not is_text_file(path, log):
        return
    with open(path, "rb") as file:
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


def is_text_file(path: Path, log: RowLog) -> bool:
    """Return whether a file may be UTF-8 text, by its first bytes; what is odd about it is counted."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    fault = file_fault(head, path.suffix) if head else "empty; remove it or fill it"
    if fault:
        log.refuse(DataError(f"{path}:1: the file is {fault}"))
        return False
    if head.startswith(codecs.BOM_UTF8):
        log.add("byte_order_mark", f"{path}:1")
    if b"\r\n" in head:
        log.add("windows_line_ends", f"{path}:1")
    return True


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
    if not is_text_file(path, log):
        return
    values, empty = ArrayReader(path).values(), True
    while True:
        try:
            value, text, origin = next(values)
        except StopIteration:
            break
        except DataError as error:
            log.refuse(DataError(f"{error} (nothing behind it was read)"))
            return
        empty = False
        log.bytes_read += len(text)
        try:
            row = require_object(without_surrogates(value, text, origin), origin)
        except DataError as error:
            log.refuse(error, text)
            continue
        yield row, origin
    if empty:
        log.refuse(DataError(f"{path}:1: the file holds no row; remove it or fill it"))
