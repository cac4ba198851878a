"""What happens to rows, by reason. Standard library only."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from medicalgpt.errors import DataError


@dataclass
class RowLog:
    """Counts what happened to rows, by reason, with the first places of each.

    Attributes:
        bytes_read: of the files so far.

    A stage stops at the first row that cannot be used; a tool that goes on overrides `refuse`.
    """

    counts: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    bytes_read: int = 0

    def add(self, reason: str, origin: str) -> None:
        """Count one row under `reason`."""
        self.counts[reason] += 1
        if len(self.places[reason]) < 5:
            self.places[reason].append(origin)

    def refuse(self, error: DataError, raw: str = "") -> None:
        """Meet what cannot be used.

        Args:
            error: what is wrong, with its `file:line`.
            raw: the text of the line, as far as it could be read.

        Raises:
            DataError: always, here.
        """
        raise error

    def lines(self) -> list[str]:
        """Return one line per reason: `answer_cut=3 (a.jsonl:17, …)`."""
        return [
            f"{reason}={count} ({', '.join(self.places[reason])}{', …' if count > 5 else ''})"
            for reason, count in sorted(self.counts.items())
        ]
