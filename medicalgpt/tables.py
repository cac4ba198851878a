"""Files of rows → (row, `file:line`): JSON, JSON lines, csv, tsv, xlsx and parquet, in bounded memory.

A line that is no row comes as a `BrokenRow` and reading goes on. Standard library only; openpyxl and pyarrow
are imported where such a file is read.
"""

import contextlib
import csv
import datetime
import decimal
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medicalgpt.data_files import read_array
from medicalgpt.encodings import PIECE, recognise_encoding
from medicalgpt.errors import DataError
from medicalgpt.json_array import MAX_ROW_BYTES
from medicalgpt.json_values import decode_json, json_type
from medicalgpt.row_log import RowLog

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
TEXT_TYPES = ("string", "large_string", "string_view")  # of Arrow
MAX_CELL = 1 << 24  # characters
MAX_RAW = 10_000  # characters that are kept of what is no row


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """What stands where a row is due."""

    raw: object
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """A file of rows; `form` is lines, array, csv, xlsx or parquet. Only the first of `sheets` is read."""

    path: Path
    form: str
    encoding: str | None = None
    delimiter: str = ","
    sheets: tuple[str, ...] = ()

    @property
    def is_table(self) -> bool:
        """Whether all rows have the same columns."""
        return self.form in ("csv", "xlsx", "parquet")

    def describe(self) -> str:
        """Return what was found out about the file, for the line on stderr."""
        parts = [f"encoding {self.encoding}" if self.encoding else f"a {self.form} file"]
        if self.form == "csv" and self.delimiter != ",":
            parts.append(f"cells parted by {self.delimiter!r}")
        return ", ".join(parts)


Row = tuple[dict | BrokenRow, str]


def describe_source(path: Path, encoding: str | None = None) -> Source:
    """Return how a file is to be read.

    Raises:
        DataError: a suffix that is not known, or a file that is not what its name says.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: is a {suffix or 'nameless'} file; expected {', '.join(SUFFIXES)}")
    if suffix == ".xlsx":
        return Source(path, "xlsx", sheets=filled_sheets(path))
    if suffix == ".parquet":
        return Source(path, "parquet")
    encoding = recognise_encoding(path, encoding)
    with open(path, encoding=encoding, newline="") as file:
        head = file.readline(PIECE)
        while head.isspace():
            head = file.readline(PIECE)
    if suffix in (".csv", ".tsv"):
        return Source(path, "csv", encoding, "\t" if suffix == ".tsv" else delimiter_of(head))
    is_lines = suffix == ".jsonl" or begins_with_row(head)
    return Source(path, "lines" if is_lines else "array", encoding)


def begins_with_row(line: str) -> bool:
    """Return whether the first line of a .json file is a row: it is then a file of lines."""
    if not line.endswith("\n") and len(line) >= PIECE:
        return line.lstrip().startswith("{")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def delimiter_of(header: str) -> str:
    """Return what parts the columns: the comma, unless the header only falls apart at another character."""
    columns = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in ",;\t|"}
    return "," if columns[","] > 1 else max(columns, key=columns.get)


def read_source(source: Source) -> Iterator[Row]:
    """Yield (row or BrokenRow, `file:line`) of every row of the file."""
    readers = {
        "lines": read_json_lines,
        "array": read_json_array,
        "csv": read_csv,
        "xlsx": read_xlsx,
        "parquet": read_parquet,
    }
    return readers[source.form](source)


# ---- JSON --------------------------------------------------------------------------------------------------


def read_json_lines(source: Source) -> Iterator[Row]:
    """Yield the objects of a file that has one on each line."""
    with open(source.path, encoding=source.encoding, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            origin = f"{source.path}:{number}"
            if len(line) > MAX_ROW_BYTES or len(line.encode()) > MAX_ROW_BYTES:
                yield (
                    BrokenRow(line[:MAX_RAW], f"a row of more than {MAX_ROW_BYTES >> 20} MiB; split it"),
                    origin,
                )
                continue
            try:
                value = decode_json(line.strip(), origin)
            except DataError as error:
                yield BrokenRow(line.strip()[:MAX_RAW], str(error).removeprefix(f"{origin}: ")), origin
                continue
            if not isinstance(value, dict):
                what = f"a row is {json_type(value)}"
                value = BrokenRow(value, f"{what}; name the file .json if it is one array")
            yield value, origin


def read_json_array(source: Source) -> Iterator[Row]:
    """Yield the objects of one JSON array; behind a place that is no JSON nothing can be read."""
    with tempfile.TemporaryDirectory(prefix="medicalgpt-") as directory:
        path = source.path
        if source.encoding not in ("utf-8", "utf-8-sig"):
            path = Path(directory) / "utf8.json"
            transcode(source, path)
        log = BrokenRowLog()
        for row, origin in read_array(path, log):
            yield from log.drain(path, source.path)
            yield row, f"{source.path}:{origin.rpartition(':')[2]}"
        yield from log.drain(path, source.path)


class BrokenRowLog(RowLog):
    """Keeps what is refused until it is asked for."""

    def __init__(self):
        super().__init__()
        self.refused: list[tuple[str, str]] = []

    def refuse(self, error: DataError, raw: str = "") -> None:
        """Keep a refusal."""
        self.refused.append((str(error), raw[:MAX_RAW]))

    def drain(self, path: Path, shown: Path) -> Iterator[Row]:
        """Yield what was refused since, under the name of the file that was given."""
        for message, raw in self.refused:
            line, _, what = message.removeprefix(f"{path}:").partition(": ")
            yield BrokenRow(raw or None, what), f"{shown}:{line}"
        self.refused.clear()


def transcode(source: Source, path: Path) -> None:
    """Write the file as UTF-8, a piece at a time."""
    with (
        open(source.path, encoding=source.encoding, newline="") as old,
        open(path, "w", encoding="utf-8", newline="") as new,
    ):
        while piece := old.read(PIECE):
            new.write(piece)


# ---- csv and tsv -------------------------------------------------------------------------------------------


class LineTap:
    """Gives the lines of a file to a csv reader and remembers the beginning of what the row took."""

    def __init__(self, file: Iterator[str]):
        self.file = file
        self.taken = ""

    def __iter__(self) -> "LineTap":
        return self

    def __next__(self) -> str:
        line = next(self.file)
        if len(self.taken) < MAX_RAW:
            self.taken += line[:MAX_RAW]
        return line


def read_csv(source: Source) -> Iterator[Row]:
    """Yield the rows of a csv or tsv file, all cells as text.

    Raises:
        DataError: the header cannot be used.
    """
    csv.field_size_limit(MAX_CELL)
    with open(source.path, encoding=source.encoding, newline="") as file:
        rows = read_cells(source, LineTap(file))
        header, origin = next(rows, ([], ""))  # a file of blank lines has no rows
        if isinstance(header, BrokenRow):
            raise DataError(f"{origin}: the header: {header.reason}")
        header = check_header(header, origin)
        for cells, origin in rows:
            yield cells if isinstance(cells, BrokenRow) else table_row(header, cells), origin


def read_cells(source: Source, tap: LineTap) -> Iterator[tuple[list[str] | BrokenRow, str]]:
    """Yield the cells of each row that has any, with the line where the row begins."""
    reader = csv.reader(tap, delimiter=source.delimiter, strict=True)
    while True:
        tap.taken = ""
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = csv_fault(str(error), begin, reader.line_num)
            yield BrokenRow(tap.taken[:MAX_RAW], reason), f"{source.path}:{begin}"
            continue
        if any(cell.strip() for cell in cells):
            yield cells, f"{source.path}:{begin}"


def csv_fault(message: str, begin: int, end: int) -> str:
    """Return what is wrong with a csv row, which lines it took, and the mend."""
    if "end of data" in message:
        what = "a quote that opens in this row is never closed"
    elif "field limit" in message:
        what = f"a cell has more than {MAX_CELL} characters; probably a quote is not closed"
    elif "expected after" in message:
        what = 'text follows a closing quote; write a quote inside a cell as ""'
    else:
        what = message
    return (
        what if end == begin else f"{what} (lines {begin} to {end} were taken for one row, and are not read)"
    )


def check_header(cells: Sequence[object], origin: str) -> list[str]:
    """Return the names of the columns; a column may have none.

    Raises:
        DataError: a name stands twice.
    """
    names = [str(cell).strip() for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{origin}: the header has {', '.join(twice)} twice; rename a column")
    return names


def table_row(header: list[str], cells: list[str]) -> dict | BrokenRow:
    """Return the cells by the names of their columns; what has no name gets a number."""
    if len(cells) != len(header):
        return BrokenRow(cells, f"has {len(cells)} cells where the header has {len(header)}")
    named = enumerate(zip(header, cells, strict=True), 1)
    return {name or f"column_{number}": cell for number, (name, cell) in named if name or cell.strip()}


# ---- workbooks and parquet ---------------------------------------------------------------------------------


@contextlib.contextmanager
def open_workbook(path: Path) -> Iterator:
    """Open a workbook for reading.

    Raises:
        DataError: the file is none.
    """
    import openpyxl  # noqa: PLC0415  (slow to import; only a workbook needs it)

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl lets errors of zipfile, xml and its own through
        raise DataError(f"{path}: is no .xlsx workbook: {error}") from None
    try:
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # some programs write wrong ones
        yield book
    finally:
        book.close()


def filled_sheets(path: Path) -> tuple[str, ...]:
    """Return the names of the sheets on which something stands; of the first where nothing does."""
    with open_workbook(path) as book:
        names = tuple(
            sheet.title
            for sheet in book.worksheets
            if any(cell is not None for cells in sheet.iter_rows(values_only=True) for cell in cells)
        )
        return names or (book.worksheets[0].title,)


def read_xlsx(source: Source) -> Iterator[Row]:
    """Yield the rows of a workbook's first filled sheet, all cells as text, as a csv of it would have them.

    Raises:
        DataError: the header cannot be used.
    """
    with open_workbook(source.path) as book:
        sheet = book[source.sheets[0]]
        header: list[str] = []
        for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
            origin = f"{source.path}:{number}"
            texts = [cell_text(cell) for cell in cells]
            while texts and not texts[-1].strip() and len(texts) > len(header):
                texts.pop()
            if not any(text.strip() for text in texts):
                continue
            if not header:
                header = check_header(texts, origin)
            else:
                yield table_row(header, texts + [""] * (len(header) - len(texts))), origin


def cell_text(value: object) -> str:
    """Return the text of a workbook's cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def read_parquet(source: Source) -> Iterator[Row]:
    """Yield the rows of a parquet file, a batch of a row group at a time; the number is that of the row.

    Raises:
        DataError: the file is no parquet file.
    """
    import pyarrow  # noqa: PLC0415  (slow to import; only a parquet file needs it)
    import pyarrow.parquet  # noqa: PLC0415

    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            texts = {field.name for field in file.schema_arrow if str(field.type) in TEXT_TYPES}
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield check_cells(row, texts), f"{source.path}:{number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.path}: is no parquet file that can be read: {error}") from None


def check_cells(row: dict, texts: set[str]) -> dict | BrokenRow:
    """Return a parquet row as JSON can hold it: an absent text is empty, another absent value no field."""
    row = {
        name: "" if value is None else value
        for name, value in row.items()
        if value is not None or name in texts
    }
    try:
        row = {name: None if value != value else value for name, value in row.items()}  # NaN: no value
        return json.loads(json.dumps(row, default=json_value, allow_nan=False))
    except (TypeError, ValueError) as error:
        return BrokenRow(repr(row)[:MAX_RAW], f"holds what JSON cannot: {error}")


def json_value(value: object) -> str:
    """Return a date, a time or a decimal number as text."""
    if isinstance(value, datetime.date | datetime.time | decimal.Decimal):
        return str(value)
    raise TypeError(f"a value of type {json_type(value)}")
