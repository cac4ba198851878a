"""Mends data files without guessing, and lists what it cannot mend. Standard library only.

What is certain: encodings, line ends, values that share a line or run over several (`text_repair`); names of
fields and roles that another dialect uses (`dialects`); zero-width characters; a last question without
answer. Everything else stays out of the result and stands, with its reason, in the rejects.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from medicalgpt.content import INVISIBLE, check_content
from medicalgpt.data_files import REJECTS
from medicalgpt.dialects import convert_row
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.kinds import UNKNOWN, Kind, commonest_kind
from medicalgpt.row_fields import Reading
from medicalgpt.row_log import RowLog
from medicalgpt.row_writer import RowWriter
from medicalgpt.text_repair import UNREADABLE, detect_encoding, lenient_lines, salvage_rows


class DroppedRowError(DataError):
    """A row that teaches nothing."""


@dataclass(frozen=True)
class Mended:
    """A piece of a file: what is written of it, or why nothing is.

    Attributes:
        line: the line to write; None for a reject. dropped: nothing is wrong, but the stages drop the row.
    """

    line: str | None
    origin: str
    reason: str = ""
    row: dict | str = ""
    dropped: bool = False


def fix_files(places: dict[Path, Path], target: Path, kinds: dict[Path, Kind], log: RowLog) -> int:
    """Write mended copies of files.

    Args:
        places: {file: where its mended copy goes}.
        target: beside which the rejects go.
        kinds: of the files' rows.
        log: counts what was mended.

    Returns:
        How many pieces could not be mended. They stand in `target`.rejects.jsonl, with the rows that the
        stages drop.

    Raises:
        DataError: nothing is left to write.
    """
    with ExitStack() as stack:
        rejects = RowWriter(target.with_name(target.name + REJECTS))
        writers = {path: RowWriter(place) for path, place in places.items()}
        for writer in (rejects, *writers.values()):
            stack.callback(writer.discard)
        first, num_rows, num_refused = "", 0, 0
        for path, writer in writers.items():
            writer.path.parent.mkdir(parents=True, exist_ok=True)
            for mended in mend_file(path, kinds[path], log):
                if mended.line is not None:
                    writer.write_text(mended.line)
                    num_rows += bool(mended.line.strip())
                    continue
                rejects.write({"origin": mended.origin, "reason": mended.reason, "row": mended.row})
                first = first or mended.reason
                num_refused += not mended.dropped
        if not num_rows:
            raise DataError(
                f"{first or f'{next(iter(places))}:1: no row'}; nothing can be mended, nothing was written"
            )
        for writer in (rejects, *writers.values()):
            writer.publish()
    where = f" rejects in {rejects.path}" if rejects.num_rows else ""
    mended_rows = "".join(f" {reason}={count}" for reason, count in sorted(log.counts.items()))
    sys.stdout.write(f"--fix: rows_written={num_rows} rows_rejected={rejects.num_rows}{where}{mended_rows}\n")
    return num_refused


def fix_places(files: list[Path], source: Path, target: Path) -> dict[Path, Path]:
    """Return {file: where its mended copy goes}.

    Args:
        source, target: --file and --fix, both a file or both a directory.

    Raises:
        ConfigError: the target cannot be.
    """
    places = {path: target_of(path, source, target) for path in files}
    if len(set(places.values())) < len(places):
        raise ConfigError(
            f"--fix {target}: a .json and a .jsonl file of one name would become one; rename one of them"
        )
    return places


def target_of(path: Path, source: Path, target: Path) -> Path:
    """Return where the mended copy of a file goes.

    Raises:
        ConfigError: the target has a suffix that its rows do not fit, or is the source.
    """
    suffix = ".txt" if path.suffix == ".txt" else ".jsonl"
    place = target / path.relative_to(source).with_suffix(suffix) if source.is_dir() else target
    if place.suffix != suffix:
        raise ConfigError(f"--fix {target} would hold {suffix} rows; give a name that ends in {suffix}")
    if place.resolve() == path.resolve():
        raise ConfigError(f"--fix {target} is the input itself; give another path")
    return place


# ---- one file ----------------------------------------------------------------------------------------------


def mend_file(path: Path, kind: Kind, log: RowLog) -> Iterator[Mended]:
    """Yield every piece of a file."""
    encoding = detect_encoding(path)
    if encoding != "utf-8-sig":
        log.add(f"decoded_from_{encoding}", f"{path}:1")
    if path.suffix == ".txt":
        yield from mend_text_file(path, encoding, log)
        return
    if kind is UNKNOWN:
        kind = commonest_kind(row for row, *_ in salvage_rows(path, encoding) if row) or UNKNOWN
    for row, raw, origin, error in salvage_rows(path, encoding):
        if row is None:
            yield Mended(None, origin, str(error), raw)
            continue
        try:
            yield Mended(json.dumps(mend_row(row, origin, kind, log), ensure_ascii=False), origin)
        except DroppedRowError as refusal:
            yield Mended(None, origin, str(refusal), row, dropped=True)
        except DataError as refusal:
            yield Mended(None, origin, str(refusal), row)
        except RecursionError:
            yield Mended(None, origin, f"{origin}: nested too deeply; mend it", raw)


def mend_text_file(path: Path, encoding: str, log: RowLog) -> Iterator[Mended]:
    """Yield the lines of a text file, decoded, without zero-width characters."""
    for line, number in lenient_lines(path, encoding):
        origin, text = f"{path}:{number}", line.translate(INVISIBLE)
        if text != line:
            log.add("zero_width_characters_removed", origin)
        try:
            if UNREADABLE in text:
                raise DataError(f"{origin}: text: holds bytes that cannot be decoded; mend the line")
            yield Mended(check_content(text, "text", origin), origin)
        except DataError as refusal:
            yield Mended(None, origin, str(refusal), text.replace(UNREADABLE, "\ufffd"))


def mend_row(row: dict, origin: str, kind: Kind, log: RowLog) -> dict:
    """Return a row that the stages accept.

    Raises:
        DataError: it cannot be mended without guessing.
    """
    visible = without_invisible(row)
    if visible != row:
        log.add("zero_width_characters_removed", origin)
        row = visible
    dropped = RowLog()
    try:
        record = kind.parse(row, origin, dropped)
    except DataError as refusal:
        row = translate(row, origin, kind, refusal)
        record = kind.parse(row, origin, dropped)
        log.add("names_of_another_dialect_renamed", origin)
    if record is None:
        for reason in dropped.counts:
            log.add(reason, origin)
        raise DroppedRowError(f"{origin}: {', '.join(dropped.counts)}; the stages drop this row")
    for reason in dropped.counts:
        log.add(reason, origin)
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name and kind.name == "chat":
        num_turns = len(record.messages) - (row.get("system") is not None)
        row = {**row, name: row[name][:num_turns]}
    return row


def translate(row: dict, origin: str, kind: Kind, refusal: DataError) -> dict:
    """Return a row of another dialect in the toolkit's own words.

    Raises:
        DataError: it is of no dialect, or would become another kind of row; says what was wrong at first.
    """
    try:
        converted = convert_row(row, origin, Reading())
    except DataError:
        raise refusal from None
    if converted.kind != kind.name or converted.lost:
        raise refusal
    return converted.row


def without_invisible(value: object) -> object:
    """Return a JSON value whose texts hold no zero-width characters."""
    if isinstance(value, str):
        return value if value.isascii() else value.translate(INVISIBLE)
    if isinstance(value, list):
        return [without_invisible(item) for item in value]
    if isinstance(value, dict):
        return {key: without_invisible(item) for key, item in value.items()}
    return value
