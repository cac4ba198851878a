"""Raw data files → records: the one owner of field names, and the one reader of every stage.

    text   {"text": …} lines, or .txt files
    chat   {"conversations": [{"from": "system|human|gpt", "value": …}]}
           or {"messages": [{"role": "system|user|assistant", "content": …}]}
    pair   {"question", "response_chosen", "response_rejected"[, "system", "history"]}
           or {"conversations": [… ending with human], "chosen", "rejected"}

A wrong row is refused as `file:line: field: what; mend`. Standard library only, so that tools answer at once.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medicalgpt.data_files import read_rows, read_text_file
from medicalgpt.errors import DataError

SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


class Message(NamedTuple):
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Text:
    """One document."""

    text: str
    origin: str  # file:line

    @property
    def key(self) -> str:
        """What decides the side of a train/validation split."""
        return self.text


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: an optional system message, then user and assistant in turn, ending with an answer."""

    messages: tuple[Message, ...]
    origin: str

    @property
    def key(self) -> str:
        """The first question: conversations that share it stay on one side of a split."""
        return next(message.content for message in self.messages if message.role == "user")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt that ends with a question, a better and a worse answer."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: str

    @property
    def key(self) -> str:
        """The prompt's text."""
        return "\n".join(message.content for message in self.prompt if message.role != "system")


Record = Text | Chat | Pair


@dataclass
class RowLog:
    """Counts what happened to rows, by reason, with the first places of each."""

    counts: Counter = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, origin: str) -> None:
        """Count one row under `reason`."""
        self.counts[reason] += 1
        if len(self.places[reason]) < 5:
            self.places[reason].append(origin)

    def lines(self) -> list[str]:
        """Return one line per reason: `answer_cut=3 (a.jsonl:17, …)`."""
        return [
            f"{reason}={count} ({', '.join(self.places[reason])}{', …' if count > 5 else ''})"
            for reason, count in sorted(self.counts.items())
        ]


# ---- rows → records ----------------------------------------------------------------------------------------


def require_text(row: dict, name: str, origin: str, *, where: str = "", may_be_empty: bool = False) -> str:
    """Return a text field.

    Raises:
        DataError: the field is missing, not a string, or blank where text is needed.
    """
    label = f"{where}.{name}" if where else name
    if name not in row:
        raise DataError(
            f"{origin}: {label}: missing; the row has {', '.join(sorted(map(str, row))) or 'no fields'}"
        )
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{origin}: {label}: is {type(value).__name__}; expected a string")
    if not may_be_empty and not value.strip():
        raise DataError(f"{origin}: {label}: is empty; write the text or remove the row")
    return value


def parse_messages(row: dict, origin: str) -> list[Message]:
    """Return the messages of a ShareGPT or OpenAI row, roles renamed to system, user, assistant."""
    name, role_key, text_key, roles = (
        ("messages", "role", "content", OPENAI_ROLES)
        if "messages" in row
        else ("conversations", "from", "value", SHAREGPT_ROLES)
    )
    if name not in row:
        raise DataError(
            f"{origin}: conversations: missing; the row has {', '.join(sorted(map(str, row)))}; "
            "expected conversations or messages"
        )
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{origin}: {name}: is {'an empty list' if turns == [] else type(turns).__name__}; "
            "expected a list of turns"
        )
    messages = []
    for index, turn in enumerate(turns):
        where = f"{name}[{index}]"
        if not isinstance(turn, dict):
            raise DataError(f"{origin}: {where}: is {type(turn).__name__}; expected an object")
        role = require_text(turn, role_key, origin, where=where)
        if role not in roles:
            raise DataError(f"{origin}: {where}.{role_key}: is {role!r}; expected {', '.join(roles)}")
        content = require_text(turn, text_key, origin, where=where, may_be_empty=role == "system")
        messages.append(Message(roles[role], content))
    check_order(messages, name, origin)
    return messages


def check_order(messages: list[Message], name: str, origin: str) -> None:
    """Refuse anything but an optional system message, then user and assistant in turn."""
    offset = 1 if messages[0].role == "system" else 0
    for index, message in enumerate(messages[offset:]):
        expected = "user" if index % 2 == 0 else "assistant"
        if message.role != expected:
            raise DataError(
                f"{origin}: {name}[{index + offset}]: has role {message.role} where {expected} is due; user "
                "and assistant must alternate, a system turn only comes first"
            )
    if len(messages) == offset:
        raise DataError(f"{origin}: {name}: has no question; add a user turn")


def parse_text(row: dict, origin: str, log: RowLog) -> Text:
    """{"text": …} → Text."""
    return Text(require_text(row, "text", origin), origin)


def parse_chat(row: dict, origin: str, log: RowLog) -> Chat | None:
    """A ShareGPT or OpenAI row → Chat. A last question without answer is dropped and counted."""
    messages = parse_messages(row, origin)
    if not any(message.role == "assistant" for message in messages):
        log.add("row_without_answer_dropped", origin)
        return None
    if messages[-1].role == "user":
        log.add("unanswered_question_dropped", origin)
        messages.pop()
    return Chat(tuple(messages), origin)


def parse_pair(row: dict, origin: str, log: RowLog) -> Pair | None:
    """A preference row in either form → Pair. Two equal answers teach nothing: dropped and counted."""
    if "conversations" in row or "messages" in row:
        prompt = parse_messages(row, origin)
        if prompt[-1].role != "user":
            raise DataError(
                f"{origin}: {'messages' if 'messages' in row else 'conversations'}: ends with an answer; "
                "a pair's prompt ends with a question"
            )
        chosen, rejected = "chosen", "rejected"
    else:
        prompt = parse_history(row, origin)
        prompt.append(Message("user", require_text(row, "question", origin)))
        chosen, rejected = "response_chosen", "response_rejected"
    answers = require_text(row, chosen, origin), require_text(row, rejected, origin)
    if answers[0] == answers[1]:
        log.add("identical_answers_dropped", origin)
        return None
    return Pair(tuple(prompt), *answers, origin)


def parse_history(row: dict, origin: str) -> list[Message]:
    """Return the optional `system` and `history` ([[question, answer], …]) of a pair as messages."""
    messages = []
    if row.get("system") not in (None, ""):
        messages.append(Message("system", require_text(row, "system", origin)))
    history = [] if row.get("history") is None else row["history"]
    if not isinstance(history, list):
        raise DataError(f"{origin}: history: is {type(history).__name__}; expected [[question, answer], …]")
    for index, turn in enumerate(history):
        if not (
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) and t.strip() for t in turn)
        ):
            raise DataError(f"{origin}: history[{index}]: expected [question, answer], two non-empty strings")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    return messages


Parser = Callable[[dict, str, RowLog], Record | None]


def read_records(
    files: list[Path], parse: Parser, log: RowLog, *, txt_documents: str = "file"
) -> list[Record]:
    """Return the records of all files, in file and line order.

    Args:
        files: .jsonl, .json and (for texts) .txt files.
        parse: parse_text, parse_chat or parse_pair.
        log: takes what happened to rows.
        txt_documents: how a .txt file is split: one document per `file`, `blank`-line separated part, or
            `line`.

    Raises:
        DataError: a row that cannot be used.
    """
    records: list[Record] = []
    for path in files:
        if path.suffix == ".txt":
            records += split_txt(path, txt_documents)
            continue
        records += (
            record for row, origin in read_rows(path) if (record := parse(row, origin, log)) is not None
        )
    if not records:
        raise DataError(f"no usable row in {', '.join(map(str, files))}: {'; '.join(log.lines())}")
    return records


def split_txt(path: Path, txt_documents: str) -> list[Text]:
    """Return the documents of a .txt file."""
    text = read_text_file(path).replace("\r\n", "\n")
    if txt_documents == "file":
        return [Text(text.strip("\n"), f"{path}:1")]
    documents, part, begin = [], [], 1
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            begin = begin if part else number
            part.append(line)
        if part and (txt_documents == "line" or not line.strip()):
            documents.append(Text("\n".join(part), f"{path}:{begin}"))
            part = []
    return documents


# ---- training and validation never share a row -------------------------------------------------------------


def key_hash(record: Record) -> int:
    """Return a number that depends on the record's prompt only, the same on every machine."""
    return int.from_bytes(hashlib.sha256(record.key.encode()).digest()[:8], "big")


def hold_out(records: list[Record], percentage: float) -> tuple[list[Record], list[Record]]:
    """Split records into (training, validation): the prompts of the smallest hashes are held out.

    Args:
        percentage: share of the prompts that are held out, in percent; at least one, and never all.

    Raises:
        DataError: all rows share one prompt, so that none can be held out.
    """
    hashes = [key_hash(record) for record in records]
    prompts = sorted(set(hashes))
    num_held = max(1, min(math.ceil(percentage / 100 * len(prompts)), len(prompts) - 1))
    limit = prompts[num_held] if len(prompts) > 1 else prompts[0]
    train = [record for record, value in zip(records, hashes, strict=True) if value >= limit]
    held = [record for record, value in zip(records, hashes, strict=True) if value < limit]
    if not train or not held:
        raise DataError(
            f"{records[0].origin}: all {len(records)} rows share one prompt, so none can be held out; "
            "add rows or use --do_eval False"
        )
    return train, held


def without_shared(records: list[Record], train: list[Record]) -> list[Record]:
    """Return the validation records whose prompt does not occur in training."""
    seen = {key_hash(record) for record in train}
    return [record for record in records if key_hash(record) not in seen]
