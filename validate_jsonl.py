"""Checks data files exactly as the stages read them, counts what is in them, and mends what is certain.

    python validate_jsonl.py --file data/finetune
    python validate_jsonl.py --file a.jsonl --fix b.jsonl
    python validate_jsonl.py --file a.jsonl --tokenizer models/SmolLM2-135M-Instruct --max_length 512 --show 2
    python validate_jsonl.py --file train.jsonl --against heldout.jsonl

Reads .jsonl, .json arrays and .txt of every kind the stages know: text, conversations (ShareGPT, OpenAI,
Alpaca), pairs in both forms, prompts. The reader is the stages' own, so that what passes here is accepted
there, and what is refused here is refused there with the same line. Nothing is ever changed in place.
Writes: what --fix and --report name. Exit code: 0 good, 3 bad. Next: the stage that reads the file.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from medicalgpt.data_files import REJECTS, find_files
from medicalgpt.data_report import ProblemLog, Statistics
from medicalgpt.errors import ConfigError, DataError, run_script
from medicalgpt.kinds import KINDS, UNKNOWN, Kind, recognise
from medicalgpt.records import Record, iterate_records, no_usable_row
from medicalgpt.row_fixer import fix_files, fix_places
from medicalgpt.row_log import RowLog
from medicalgpt.tool_flags import parse_tool_arguments

from tqdm import tqdm

SUFFIXES = (".jsonl", ".json", ".txt")
BATCH_ROWS = 256


@dataclass
class ValidateArguments:
    """What is checked, and what is told of it."""

    file: str = field(metadata={"help": "a .jsonl, .json or .txt file, or a directory of them"})
    data_type: str = field(default="auto", metadata={"help": "kind of the rows", "choices": ("auto", *KINDS)})
    txt_documents: str = field(
        default="file",
        metadata={"help": "a .txt file's documents, as in PT", "choices": ("file", "blank", "line")},
    )
    fix: str | None = field(
        default=None, metadata={"help": "write what can be mended without guessing to this file or directory"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace what --fix and --report name"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "model directory: lengths in tokens as well"}
    )
    template_name: str | None = field(
        default=None, metadata={"help": "chat format; left out: the model's own"}
    )
    force_template: bool = field(
        default=False, metadata={"help": "use --template_name whatever the model says"}
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens: count the rows this would cut"})
    show: int = field(default=0, metadata={"help": "rows to print as they are trained on"})
    against: str | None = field(
        default=None, metadata={"help": "file or directory that should share no row with this"}
    )
    near_duplicates: float | None = field(
        default=None, metadata={"help": "share of common text, 0.7 to 1, from which rows count as the same"}
    )
    report: str | None = field(default=None, metadata={"help": "write everything to this .json file"})

    def __post_init__(self):
        """Check ranges and combinations."""
        if not self.tokenizer and (self.show or self.max_length or self.template_name):
            raise ConfigError("--show, --max_length and --template_name need --tokenizer, a model directory")
        for name in ("max_length", "show"):
            value = getattr(self, name)
            if value is not None and value < (name == "max_length"):
                raise ConfigError(f"--{name} {value} is not allowed; expected 1 or more")
        if self.near_duplicates is not None and not 0.7 <= self.near_duplicates <= 1:
            raise ConfigError(f"--near_duplicates {self.near_duplicates} is not allowed; expected 0.7 to 1")
        rejects = self.fix and self.fix.rstrip("/") + REJECTS
        for flag, name in (("--fix", self.fix), ("--fix", rejects), ("--report", self.report)):
            if name and Path(name).exists() and not self.overwrite:
                raise ConfigError(f"{flag} {name} exists already; give another name, or --overwrite True")
            if name and not Path(name).absolute().parent.is_dir():
                raise ConfigError(f"{flag}: there is no directory {Path(name).parent}; create it first")


@dataclass
class Findings:
    """What was found.

    Attributes:
        kinds: {file: kind}. log: problems, and what the stages do to odd rows.
        cuts, num_too_long: what --max_length does, and to how many rows. shown: encoded rows, as text.
    """

    kinds: dict[Path, Kind] = field(default_factory=dict)
    log: ProblemLog = field(default_factory=ProblemLog)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    cuts: RowLog = field(default_factory=RowLog)
    num_too_long: int = 0
    shown: list[str] = field(default_factory=list)


def main(argv: list[str]) -> None:
    """Check, report, and mend if asked."""
    # 1. What is to be read.
    args = parse_tool_arguments(ValidateArguments, argv, __doc__)
    files = find_files(args.file, SUFFIXES, "--file")
    places = fix_places(files, Path(args.file), Path(args.fix)) if args.fix else {}
    others = find_files(args.against, SUFFIXES, "--against") if args.against else []

    # 2. Every row, with the stages' reader.
    findings = examine(files, args)
    other = examine(others, args, tokens=False) if others else Findings()
    overlap = count_overlap(findings, other) if others else None

    # 3. What was found.
    lines = [*describe(findings), *([overlap] if overlap else [])]
    sys.stdout.write("\n".join(lines) + "\n")
    if args.report:
        write_report(Path(args.report), findings, overlap)

    # 4. What can be mended.
    unmended = None
    if args.fix:
        unmended = fix_files(places, Path(args.fix), findings.kinds, RowLog())
    refuse_bad(other if unmended == 0 else findings, unmended, args)


# ---- reading -----------------------------------------------------------------------------------------------


def examine(files: list[Path], args: ValidateArguments, *, tokens: bool = True) -> Findings:
    """Read every row of every file."""
    findings = Findings()
    encoder = None
    if tokens and args.tokenizer:
        # Imports transformers, and so torch: a check without tokens must not wait for them.
        from medicalgpt.encoded_rows import RowEncoder  # noqa: PLC0415

        encoder = RowEncoder(args.tokenizer, args.template_name, args.force_template, args.max_length)
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)
    for path in files:
        kind = (recognise(path) or UNKNOWN) if args.data_type == "auto" else KINDS[args.data_type]
        findings.kinds[path] = kind
        statistics = findings.statistics.setdefault(kind.name, Statistics(args.near_duplicates))
        txt_documents = "line" if args.data_type == "prompt" else args.txt_documents
        records = iterate_records([path], kind.parse, findings.log, txt_documents=txt_documents)
        for batch in batches(records):
            for record in batch:
                statistics.add(record)
            if encoder:
                lengths = encoder.lengths(batch, findings.cuts)
                statistics.lengths["tokens"].extend(lengths)
                findings.num_too_long += sum(length > (args.max_length or length) for length in lengths)
                if args.show and not findings.shown:
                    findings.shown.append(encoder.legend(colour=sys.stdout.isatty()))
                for record in batch[: max(0, args.show + 1 - len(findings.shown))]:
                    shown = encoder.show(record, colour=sys.stdout.isatty())
                    findings.shown.append(f"--- {record.origin}\n{shown}")
            bar.update(findings.log.bytes_read - bar.n)
    bar.close()
    if not findings.log.num_problems and not any(one.num_rows for one in findings.statistics.values()):
        findings.log.refuse(no_usable_row(files, findings.log))
    return findings


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield records in lists."""
    records = iter(records)
    while batch := list(islice(records, BATCH_ROWS)):
        yield batch


def count_overlap(findings: Findings, other: Findings) -> str:
    """Return what two sets of files share, by hashes of their rows and prompts."""
    findings.log.absorb(other.log)
    same, prompts, first = 0, 0, ""
    for name, statistics in findings.statistics.items():
        if name in other.statistics:
            rows = statistics.shared(other.statistics[name], "hashes")
            shared = statistics.shared(other.statistics[name], "prompts")
            same, prompts = same + len(rows), prompts + len(shared)
            first = first or (f" (first {shared[0]})" if shared else "")
    return f"overlap with {', '.join(map(str, other.kinds))}: rows={same} prompts={prompts}{first}"


# ---- telling -----------------------------------------------------------------------------------------------


def describe(findings: Findings) -> Iterator[str]:
    """Yield the lines of the report."""
    log = findings.log
    for path, kind in findings.kinds.items():
        yield f"{path}: {kind.name} (read by {kind.reads})"
    yield from mixed_directories(findings.kinds)
    yield from log.problem_lines()
    yield from (f"warning: {line}" for line in log.lines())
    for name, statistics in findings.statistics.items():
        if statistics.num_rows:
            yield f"{name}: rows={statistics.num_rows} with_tools={statistics.num_tools}"
            yield from (f"  {line}" for line in statistics.lines_of_report())
    if findings.num_too_long:
        yield f"--max_length: rows_too_long={findings.num_too_long}"
        yield from (f"  {line}" for line in findings.cuts.lines())
    yield from findings.shown


def mixed_directories(kinds: dict[Path, Kind]) -> Iterator[str]:
    """Yield a warning for every directory whose files no single stage reads."""
    for directory in sorted({path.parent for path in kinds}):
        names = sorted({kind.name for path, kind in kinds.items() if path.parent == directory})
        if len(names) > 1:
            yield f"warning: {directory} holds {' and '.join(names)} files; a stage reads one kind"


def write_report(path: Path, findings: Findings, overlap: str | None) -> None:
    """Write what was found as JSON."""
    report = {
        "files": {str(file): kind.name for file, kind in findings.kinds.items()},
        "problems": findings.log.problems,
        "problems_by_kind": dict(findings.log.kinds.most_common()),
        "warnings": dict(findings.log.counts),
        "statistics": {name: one.report() for name, one in findings.statistics.items()},
        "rows_too_long": findings.num_too_long,
        "cut_by_max_length": dict(findings.cuts.counts),
        "overlap": overlap,
    }
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def refuse_bad(findings: Findings, unmended: int | None, args: ValidateArguments) -> None:
    """End with exit code 3 where something stays bad.

    Raises:
        DataError: there are problems that were not mended.
    """
    log = findings.log
    if unmended:
        raise DataError(
            f"{unmended} rows cannot be mended without guessing; they stand with their reasons in the "
            f"rejects beside {args.fix}, mend them by hand"
        )
    if log.num_problems:
        more = f" (the first of {log.num_problems} problems)" if log.num_problems > 1 else ""
        raise DataError(f"{log.problems[0]}{more}")


if __name__ == "__main__":
    run_script(main)
