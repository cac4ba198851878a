r"""Convert a data file of another project into this toolkit's format, or the toolkit's into another.

Reads   --in_file    .jsonl, .json, .csv, .tsv, .xlsx or .parquet: Alpaca, question-answer tables, ShareGPT,
                     OpenAI messages, preference pairs, texts; UTF-8, GBK, GB18030 or UTF-16
Writes  --out_file   .jsonl (or .json: one array), every row checked as the stages check it
        OUT_FILE.rejects.jsonl   {"origin", "reason", "row"} of every row that was not converted
Next    the --train_file_dir of a stage: the directory of --out_file

    python convert_dataset.py --in_file consultations.csv --out_file data/finetune/consultations.jsonl
    python convert_dataset.py --in_file faq.xlsx --out_file faq.jsonl --question_column Frage \\
        --answer_column Antwort --strip_html True
    python convert_dataset.py --in_file data/finetune/a.jsonl --out_file openai.jsonl --to openai

What the file is, is found out from its first rows and said in one line; each row is then recognised on its
own. Nothing is dropped in silence: the exit code is 3 when a row was rejected.
"""

import contextlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from medicalgpt.data_files import REJECTS
from medicalgpt.dialects import DIALECTS, convert_row
from medicalgpt.errors import ConfigError, DataError, run_script
from medicalgpt.kinds import KINDS, UNKNOWN, commonest_kind, kind_name
from medicalgpt.row_fields import Reading, UnknownFieldsError
from medicalgpt.row_log import RowLog
from medicalgpt.row_writer import RowWriter
from medicalgpt.tables import MAX_RAW, BrokenRow, Source, describe_source, read_source
from medicalgpt.tool_flags import parse_tool_arguments
from medicalgpt.write_back import validate_row, write_back

from tqdm import tqdm

logger = logging.getLogger("medicalgpt")

NUM_SAMPLED = 100  # rows
MAX_REASONS = 100


@dataclass
class ConvertArguments:
    """What is converted into what."""

    in_file: str = field(metadata={"help": "the file to convert: .jsonl .json .csv .tsv .xlsx .parquet"})
    out_file: str = field(metadata={"help": "the new file: .jsonl, or .json for one array"})
    data_type: str = field(
        default="auto",
        metadata={
            "choices": ("auto", *DIALECTS, "json2jsonl"),
            "help": "what the rows are; auto: each row is recognised by its fields; json2jsonl: rows stay as "
            "they are",
        },
    )
    to: str = field(
        default="toolkit",
        metadata={"choices": ("toolkit", "openai", "alpaca"), "help": "what the rows become"},
    )
    strip_html: bool = field(default=False, metadata={"help": "take HTML tags out of texts"})
    question_column: str | None = field(default=None, metadata={"help": "column of the questions"})
    answer_column: str | None = field(default=None, metadata={"help": "column of the answers"})
    system_column: str | None = field(default=None, metadata={"help": "column of system prompts"})
    encoding: str | None = field(
        default=None, metadata={"help": "of a text file; default: found by decoding all of it"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an existing --out_file"})


# ---- flags and paths ---------------------------------------------------------------------------------------


def check_paths(args: ConvertArguments) -> tuple[Path, Path, Path]:
    """Return (in_file, out_file, file of the rejects).

    Raises:
        ConfigError: one of them cannot be used.
    """
    in_file, out_file = Path(args.in_file), Path(args.out_file)
    rejects_file = out_file.with_name(out_file.name + REJECTS)
    if not in_file.is_file():
        raise ConfigError(
            f"--in_file {in_file} {'is no file' if in_file.exists() else 'does not exist'}; give a file"
        )
    if out_file.suffix not in (".jsonl", ".json"):
        raise ConfigError(f"--out_file {out_file} ends with {out_file.suffix!r}; expected .jsonl or .json")
    if not out_file.parent.is_dir():
        raise ConfigError(f"--out_file {out_file}: there is no directory {out_file.parent}; create it first")
    for path in (out_file, rejects_file):
        if path.exists() and path.samefile(in_file):
            raise ConfigError(f"--out_file {out_file} would replace --in_file {in_file}; write another file")
        if path.is_dir() or (path.exists() and not args.overwrite):
            raise ConfigError(f"--out_file: {path} exists; give another name, or --overwrite True")
    return in_file, out_file, rejects_file


def reading_of(args: ConvertArguments) -> Reading:
    """Return how rows are to be read.

    Raises:
        ConfigError: flags that do not go together.
    """
    columns = args.question_column or args.answer_column
    if columns and args.data_type not in ("auto", "qa"):
        raise ConfigError(
            f"--question_column and --answer_column are for qa, not --data_type {args.data_type}"
        )
    if args.data_type == "json2jsonl" and (args.to != "toolkit" or args.strip_html or args.system_column):
        raise ConfigError("--data_type json2jsonl keeps rows as they are; leave --to and the others out")
    dialect = "qa" if columns else args.data_type
    return Reading(
        None if dialect in ("auto", "json2jsonl") else dialect,
        args.question_column,
        args.answer_column,
        args.system_column,
        args.strip_html,
    )


def has_field(row: dict, name: str) -> bool:
    """Return whether a row has a field of this name, in any case."""
    return name.strip().lower() in (key.strip().lower() for key in row)


def first_kind(source: Source) -> str | None:
    """Return the kind of most of the first rows that are the toolkit's already."""
    rows = islice(read_source(source), NUM_SAMPLED)
    found = commonest_kind(row for row, _ in rows if isinstance(row, dict))
    return found.name if found else None


def detect_form(source: Source, reading: Reading) -> tuple[str, str | None]:
    """Return (what the first rows are, in one line; the kind of most of them, None where none converts).

    Raises:
        ConfigError: not one of them says by its fields what it is.
    """
    seen: Counter[tuple[str, str]] = Counter()
    kinds: Counter[str] = Counter()
    unknown, others = [], 0
    has_column = reading.system_column is None
    for row, origin in islice(read_source(source), NUM_SAMPLED):
        has_column = has_column or (isinstance(row, dict) and has_field(row, reading.system_column))
        try:
            converted = None if isinstance(row, BrokenRow) else convert_row(row, origin, reading)
        except UnknownFieldsError as error:
            unknown.append(str(error))
            continue
        except DataError:
            converted = None
        if converted is None:
            others += 1
        else:
            seen[converted.dialect, converted.note] += 1
            kinds[converted.kind] += 1
    if unknown and not seen and (source.is_table or not others):
        raise ConfigError(unknown[0])
    total = seen.total() + len(unknown) + others
    if total and not has_column:
        raise ConfigError(
            f"--system_column {reading.system_column}: none of the first {total} rows has such a column"
        )
    parts = [
        f"{dialect}: {note}" + (f" ({count} of {total} rows)" if count < total else "")
        for (dialect, note), count in seen.most_common(5)
    ]
    word = "taken as" if reading.dialect else "detected"
    form = f"{word} {'; '.join(parts or ['nothing'])}; {source.describe()}"
    return form, kinds.most_common(1)[0][0] if kinds else None


@dataclass
class Tally:
    """What became of the rows."""

    reasons: Counter = field(default_factory=Counter)
    lost_fields: Counter = field(default_factory=Counter)

    def reject(self, reason: str) -> None:
        """Count a reason, whatever numbers and values it names."""
        kind = re.sub(r"'[^']*'", "'…'", re.sub(r"\d+", "N", reason.partition("; ")[0]))
        self.reasons[kind if kind in self.reasons or len(self.reasons) < MAX_REASONS else "other"] += 1

    def lines(self) -> str:
        """Return the commonest reasons with their counts."""
        common = self.reasons.most_common(5)
        rest = self.reasons.total() - sum(count for _, count in common)
        return ", ".join(
            [f"{count} × {reason}" for reason, count in common] + ([f"{rest} × other"] if rest else [])
        )


# ---- conversion --------------------------------------------------------------------------------------------


def convert(
    row: dict, origin: str, reading: Reading, args: ConvertArguments, kind: str | None, tally: Tally
) -> dict:
    """Return the row as it is to be written.

    Args:
        kind: what the file's rows are; a stage reads no file of several kinds.

    Raises:
        DataError: it cannot be converted, or the stages would refuse what comes out.
    """
    if args.data_type == "json2jsonl":
        found = KINDS.get(kind_name(row.keys()) or "", UNKNOWN)
        require_kind(found.name, kind, origin)
        if found.parse(row, origin, log := RowLog()) is None:
            raise DataError(f"{origin}: {', '.join(log.counts)}; the stages drop this row")
        return row
    converted = convert_row(row, origin, reading)
    require_kind(converted.kind, kind, origin)
    validate_row(converted.kind, converted.row, origin)
    written = write_back(converted.kind, converted.row, origin, args.to)
    tally.lost_fields.update(converted.lost)
    return written


def require_kind(found: str, kind: str | None, origin: str) -> None:
    """Refuse a row of another kind than the file's."""
    if kind and found in ("text", "chat", "pair", "prompt") and found != kind:
        raise DataError(f"{origin}: is a {found} row among {kind} rows; convert it into a file of its own")


def convert_file(
    source: Source,
    reading: Reading,
    args: ConvertArguments,
    kind: str | None,
    rows: RowWriter,
    rejects: RowWriter,
) -> Tally:
    """Write every row of the file to `rows` or to `rejects`."""
    tally = Tally()
    for row, origin in progress(read_source(source)):
        try:
            if isinstance(row, BrokenRow):
                raise DataError(f"{origin}: {row.reason}")
            rows.write(convert(row, origin, reading, args, kind, tally))
        except (DataError, ValueError, RecursionError) as error:  # the latter two: of what JSON cannot hold
            reason = str(error).removeprefix(f"{origin}: ")
            tally.reject(reason)
            reject(rejects, origin, reason, row.raw if isinstance(row, BrokenRow) else row)
    return tally


def reject(rejects: RowWriter, origin: str, reason: str, raw: object) -> None:
    """Write a reject; a row that JSON cannot hold is written as Python shows it."""
    try:
        rejects.write({"origin": origin, "reason": reason, "row": raw})
    except (ValueError, RecursionError):
        rejects.write({"origin": origin, "reason": ascii(reason)[1:-1], "row": ascii(raw)[:MAX_RAW]})


def progress(rows: Iterator) -> Iterator:
    """Show a bar where someone watches."""
    return tqdm(rows, unit=" rows", disable=not sys.stderr.isatty(), mininterval=0.5)


def report_fields(tally: Tally) -> None:
    """Say which fields of rows found their names taken."""
    if tally.lost_fields:
        fields = ", ".join(f"{name} ({count} rows)" for name, count in tally.lost_fields.most_common())
        logger.warning("warning: not kept, because the new rows give these names a meaning: %s", fields)


def main(argv: list[str]) -> None:
    """Look at the file, convert it row by row, give the results their names."""
    # 1. Flags and paths
    args = parse_tool_arguments(ConvertArguments, argv, __doc__)
    reading = reading_of(args)
    in_file, out_file, rejects_file = check_paths(args)

    # 2. What is it?
    source = describe_source(in_file, args.encoding)
    if args.data_type == "json2jsonl":
        form, kind = "rows stay as they are", first_kind(source)
    else:
        form, kind = detect_form(source, reading)
    logger.info("%s", form)
    if len(source.sheets) > 1:
        others = ", ".join(source.sheets[1:])
        logger.warning("warning: sheet %s is read; %s are not, save each as a file", source.sheets[0], others)

    # 3. Convert, beside
    with contextlib.ExitStack() as stack:
        rows, rejects = RowWriter(out_file), RowWriter(rejects_file)
        stack.callback(rows.discard)
        stack.callback(rejects.discard)
        tally = convert_file(source, reading, args, kind, rows, rejects)

        # 4. Publish
        total = rows.num_rows + rejects.num_rows
        if not total:
            raise DataError(f"{in_file}:1: the file holds no row; nothing was written")
        if not rows.num_rows:
            rejects.publish()
            raise DataError(
                f"{in_file}: none of {total} rows could be converted: {tally.lines()}; they are in "
                f"{rejects_file}"
            )
        rejects.publish()
        rows.publish()
    report_fields(tally)
    logger.info("converted %s into %s: %d of %d rows", in_file, out_file, rows.num_rows, total)
    if rejects.num_rows:
        raise DataError(
            f"{in_file}: {rejects.num_rows} of {total} rows were rejected: {tally.lines()}; "
            f"they are in {rejects_file}, the others in {out_file}"
        )


if __name__ == "__main__":
    run_script(main)
