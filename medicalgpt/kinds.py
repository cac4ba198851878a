"""Which kind of data a row is, and which reader takes it. Standard library only."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from medicalgpt.data_files import read_rows
from medicalgpt.errors import DataError
from medicalgpt.json_values import field_names
from medicalgpt.records import Chat, Parser, RowLog, parse_chat, parse_pair, parse_prompt, parse_text

RECOGNISE_ROWS = 100


@dataclass(frozen=True)
class Kind:
    """A kind of data.

    Attributes:
        parse: its reader. reads: who takes it.
    """

    name: str
    parse: Parser
    reads: str


def parse_question(row: dict, origin: str, log: RowLog) -> Chat:
    """A row to answer → a conversation that ends with a question."""
    messages, tools = parse_prompt(row, origin)
    return Chat(tuple(messages), origin, tools)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("text", parse_text, "pretraining.py"),
        Kind("chat", parse_chat, "supervised_finetuning.py"),
        Kind("pair", parse_pair, "dpo_training.py"),
        Kind("prompt", parse_question, "inference.py --data_file"),
    )
}
ALLOWED = (
    "text, or conversations, messages or instruction and output, or question, response_chosen and "
    "response_rejected, or conversations or instruction with chosen and rejected, or prompt"
)


def kind_name(fields: AbstractSet[str]) -> str | None:
    """Return the kind of a row by its field names, or None."""
    if fields & {"chosen", "rejected", "response_chosen", "response_rejected"}:
        return "pair"
    if fields & {"conversations", "messages"} or {"instruction", "output"} <= fields:
        return "chat"
    if "text" in fields:
        return "text"
    if "prompt" in fields or ("question" in fields and fields <= {"question", "system", "history", "id"}):
        return "prompt"
    return None


class SilentLog(RowLog):
    """Goes on behind everything."""

    def refuse(self, error: DataError, raw: str = "") -> None:
        """Meet what cannot be used."""


def commonest_kind(rows: Iterable[dict]) -> Kind | None:
    """Return the kind of most of the first rows; None where no row is of a known kind."""
    names = Counter(name for row in islice(rows, RECOGNISE_ROWS) if (name := kind_name(row.keys())))
    return KINDS[names.most_common(1)[0][0]] if names else None


def recognise(path: Path) -> Kind | None:
    """Return the kind of a file, as far as the stages can read it."""
    if path.suffix == ".txt":
        return KINDS["text"]
    return commonest_kind(row for row, _ in read_rows(path, SilentLog()))


def parse_unknown(row: dict, origin: str, log: RowLog) -> None:
    """Refuse a row of no known kind."""
    raise DataError(
        f"{origin}: no known kind of row, it has {field_names(row)}; expected {ALLOWED} (convert_dataset.py "
        "knows more)"
    )


UNKNOWN = Kind("unknown", parse_unknown, "nothing")
