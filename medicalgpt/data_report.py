"""What a validator gathers: problems, and statistics of good rows in bounded memory."""

import hashlib
import importlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medicalgpt.errors import DataError
from medicalgpt.holdout import key_hash
from medicalgpt.records import Chat, Pair, Record, Text
from medicalgpt.row_log import RowLog
from template import Message

if TYPE_CHECKING:
    from medicalgpt.near_duplicates import NearDuplicates

MAX_PROBLEMS = 20
LINE_BITS = 40  # of a row's place: its file above, its line below
ORIGIN = re.compile(r"^(.*?:\d+): ")


def problem_kind(message: str) -> str:
    """Return what problems of one kind have in common: no place, no value, no mend."""
    what = ORIGIN.sub("", message).partition(";")[0]
    what = re.sub(r"\[\d+\]", "[]", what)
    what = re.sub(r"'[^']*'|\"[^\"]*\"", "…", what)
    return re.sub(r"\s*\([^)]*\)|(?<= )(0x[0-9a-f]+|\d+)", "", what)


def record_text(record: Record) -> str:
    """Return all text of a record."""
    if isinstance(record, Text):
        return record.text
    return "\n".join(message.content for message in record_messages(record))


@dataclass
class ProblemLog(RowLog):
    """Collects what a stage would stop at.

    Attributes:
        problems: the first ones, whole. kinds: how many of each.
    """

    problems: list[str] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)

    def refuse(self, error: DataError, raw: str = "") -> None:
        """Note a problem and go on."""
        self.kinds[problem_kind(str(error))] += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(str(error))

    @property
    def num_problems(self) -> int:
        """How many there are."""
        return self.kinds.total()

    def absorb(self, other: "ProblemLog") -> None:
        """Take over what another log holds."""
        self.problems = (self.problems + other.problems)[:MAX_PROBLEMS]
        self.kinds += other.kinds
        for reason, count in other.counts.items():
            self.counts[reason] += count
            self.places[reason] += other.places[reason]

    def problem_lines(self) -> Iterator[str]:
        """Yield the first problems, then how many there are of each kind."""
        yield from self.problems
        if self.num_problems > len(self.problems):
            yield f"… {self.num_problems - len(self.problems)} more; all {self.num_problems} by kind:"
            yield from (f"{count:9,}  {kind}" for kind, count in self.kinds.most_common())


def record_messages(record: Record) -> Sequence[Message]:
    """Return the messages of a record, a pair's answers last; none for a text."""
    if isinstance(record, Chat):
        return record.messages
    return (*record.prompt, record.chosen, record.rejected) if isinstance(record, Pair) else ()


def record_hash(record: Record) -> int:
    """Return 64 bits that two records share when they hold the same text."""
    if isinstance(record, Text):
        content = record.text
    else:
        parts = [(m.role, m.content, *(call[:2] for call in m.calls)) for m in record_messages(record)]
        content = repr((parts, record.tools))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


class Statistics:
    """What is counted about the good rows of one kind.

    Attributes:
        lengths: per measure (characters of prompt, answer, …), one number per row.
        hashes, prompts: of rows, and of what decides the train/validation split.

    Args:
        near_duplicates: similarity from which two rows are nearly the same; None: not looked for.
    """

    def __init__(self, near_duplicates: float | None = None):
        self.lengths: dict[str, array] = defaultdict(lambda: array("I"))
        self.hashes, self.prompts, self.lines = array("Q"), array("Q"), array("Q")
        self.files: list[str] = []
        self.num_tools = 0
        self.near: NearDuplicates | None = None
        if near_duplicates is not None:
            near = importlib.import_module("medicalgpt.near_duplicates")  # by option: it needs numpy
            self.near = near.NearDuplicates(near_duplicates)

    def add(self, record: Record) -> None:
        """Count one record."""
        path, _, line = record.origin.rpartition(":")
        if not self.files or self.files[-1] != path:
            self.files.append(path)
        self.lines.append((len(self.files) - 1) << LINE_BITS | int(line))
        self.hashes.append(record_hash(record))
        self.prompts.append(key_hash(record))
        for name, length in measures(record):
            self.lengths[name].append(length)
        self.num_tools += not isinstance(record, Text) and bool(record.tools)
        if self.near:
            self.near.add(record_text(record), record.origin)

    @property
    def num_rows(self) -> int:
        """Good rows."""
        return len(self.hashes)

    def place(self, index: int) -> str:
        """Return `file:line` of a row."""
        return f"{self.files[self.lines[index] >> LINE_BITS]}:{self.lines[index] & (1 << LINE_BITS) - 1}"

    def duplicates(self) -> tuple[int, list[tuple[str, str]]]:
        """Return (how many rows repeat an earlier one, the first of them as (row, what it repeats))."""
        import numpy as np  # noqa: PLC0415  (what needs no array should not wait for it)

        hashes = np.frombuffer(self.hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")  # equal hashes stay in the order of the rows
        ordered = hashes[order]
        repeats = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        firsts = order[np.searchsorted(ordered, ordered[repeats])]
        found = sorted(zip(order[repeats].tolist(), firsts.tolist(), strict=True))[:5]
        return len(repeats), [(self.place(again), self.place(first)) for again, first in found]

    def shared(self, other: "Statistics", name: str) -> list[str]:
        """Return where the rows stand whose `hashes` or `prompts` occur in the other."""
        theirs = set(getattr(other, name))
        return [self.place(index) for index, value in enumerate(getattr(self, name)) if value in theirs]

    def report(self) -> dict:
        """Return everything as JSON values."""
        if not self.num_rows:
            return {"rows": 0}
        num_repeated, repeated = self.duplicates()
        report = {
            "rows": self.num_rows,
            "with_tools": self.num_tools,
            **{name: spread(values) for name, values in self.lengths.items()},
            "exact_duplicates": num_repeated,
            "first_exact_duplicates": repeated,
        }
        if self.near:
            report |= {"near_duplicates": self.near.num_found, "first_near_duplicates": self.near.found}
        return report

    def lines_of_report(self) -> Iterator[str]:
        """Yield the report as lines."""
        for name, value in self.report().items():
            if isinstance(value, dict):
                yield f"{name:20}" + " ".join(f"{key}={number:<8,}" for key, number in value.items()).rstrip()
            elif name.startswith("first_"):
                places = ", ".join(f"{again} = {first}" for again, first, *_ in value)
                if places:
                    yield f"{'':20}{places}"
            elif name.endswith("duplicates"):
                yield f"{name:20}{value:,}"


def spread(values: array) -> dict[str, int]:
    """Return {min, median, p95, max, total} of numbers."""
    import numpy as np  # noqa: PLC0415  (as above)

    numbers = np.frombuffer(values, dtype=np.uint32)
    low, middle, high, top = np.percentile(numbers, [0, 50, 95, 100], method="lower").tolist()
    total = int(numbers.sum(dtype=np.uint64))
    return {"min": low, "median": middle, "p95": high, "max": top, "total": total}


def measures(record: Record) -> list[tuple[str, int]]:
    """Return (name, value) of what is measured of a record; lengths in characters."""
    if isinstance(record, Text):
        return [("characters", len(record.text))]
    if isinstance(record, Pair):
        return [
            ("questions", sum(m.role == "user" for m in record.prompt)),
            ("prompt_characters", sum(len(m.content) for m in record.prompt)),
            ("chosen_characters", len(record.chosen.content)),
            ("rejected_characters", len(record.rejected.content)),
        ]
    answers = sum(len(m.content) for m in record.messages if m.role == "assistant")
    return [
        ("questions", sum(m.role == "user" for m in record.messages)),
        ("prompt_characters", sum(len(m.content) for m in record.messages) - answers),
        ("answer_characters", answers),
    ]
