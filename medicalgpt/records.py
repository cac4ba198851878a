"""Raw data files → records: the one owner of field names, and the one reader of every stage.

    text   {"text": …} lines, or .txt files
    chat   {"conversations": [{"from": "system|human|gpt", "value": …}]}
           or {"messages": [{"role": "system|user|assistant", "content": …}]}
           or {"instruction"[, "input"], "output"[, "system", "history"]} (Alpaca)
    pair   {"question", "response_chosen", "response_rejected"[, "system", "history"]}
           or {"conversations": [… ending with human], "chosen", "rejected"}
           or {"instruction"[, "input"], "chosen", "rejected"[, "system", "history"]} (Alpaca)
           and may say by how much the better answer is better, "margin" (a number, for reward models)
    tools  a chat or pair row may offer "tools"; then turns may be function_call and observation (ShareGPT),
           or hold tool_calls and be answered by role tool (OpenAI)

A wrong row is refused as `file:line: field: what; mend`. Standard library only, so that tools answer at once.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medicalgpt.call_rows import name_calls, parse_openai_calls, parse_sharegpt_calls, parse_tools
from medicalgpt.content import INVISIBLE_FOUND, check_content, check_fields, has_invisible, is_blank
from medicalgpt.data_files import read_rows, read_text_lines
from medicalgpt.errors import DataError
from medicalgpt.json_values import field_names, json_type
from medicalgpt.row_log import RowLog
from template import Message

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "observation",
}
OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "observation"}


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
    """A conversation: an optional system message, then questions and answers in turn, ending with an answer.

    Between a question and its answer there may be calls and what tools gave back.
    """

    messages: tuple[Message, ...]
    origin: str
    tools: tuple[dict, ...] = ()

    @property
    def key(self) -> str:
        """The first question: conversations that share it stay on one side of a split."""
        return next(message.content for message in self.messages if message.role == "user")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt that ends with a question, a better and a worse answer.

    Attributes:
        margin: by how much the better answer's score must exceed the other's (a reward model's unit).
    """

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    origin: str
    tools: tuple[dict, ...] = ()
    margin: float = 0.0

    @property
    def key(self) -> str:
        """The prompt's text."""
        return "\n".join(message.content for message in self.prompt if message.role != "system")


Record = Text | Chat | Pair


# ---- rows → records ----------------------------------------------------------------------------------------


def require_text(row: dict, name: str, origin: str, *, where: str = "", may_be_empty: bool = False) -> str:
    """Return a text field.

    Raises:
        DataError: the field is missing, not a string, or blank where text is needed.
    """
    label = f"{where}.{name}" if where else name
    if name not in row:
        raise DataError(f"{origin}: {label}: missing; the row has {field_names(row)}")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{origin}: {label}: is {json_type(value)}; expected a string")
    if "\0" in value:
        raise DataError(f"{origin}: {label}: holds a NUL character; remove it")
    if not may_be_empty and is_blank(value):
        raise DataError(f"{origin}: {label}: is empty; write the text or remove the row")
    return value


def parse_messages(row: dict, origin: str) -> list[Message]:
    """Return the messages of a ShareGPT or OpenAI row, roles renamed to those of `Message`.

    A `system` field of the row (as LLaMA-Factory has it) is the system message.
    """
    name = "messages" if "messages" in row else "conversations"
    if name not in row:
        raise DataError(
            f"{origin}: conversations: missing; the row has {field_names(row)}; "
            "expected conversations or messages"
        )
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{origin}: {name}: is {'an empty list' if turns == [] else json_type(turns)}; "
            "expected a list of turns"
        )
    messages = [
        parse_message(turn, f"{name}[{index}]", origin, is_openai=name == "messages")
        for index, turn in enumerate(turns)
    ]
    if row.get("system") is not None:
        if messages[0].role == "system":
            raise DataError(f"{origin}: system: stands beside a system turn in {name}; remove one of them")
        messages.insert(0, Message("system", require_text(row, "system", origin, may_be_empty=True)))
    check_order(messages, name, origin, OPENAI_ROLES if name == "messages" else SHAREGPT_ROLES)
    return name_calls(messages)


def parse_message(turn: object, where: str, origin: str, *, is_openai: bool) -> Message:
    """Return one turn as a message."""
    role_key, text_key, roles = (
        ("role", "content", OPENAI_ROLES) if is_openai else ("from", "value", SHAREGPT_ROLES)
    )
    if not isinstance(turn, dict):
        raise DataError(f"{origin}: {where}: is {json_type(turn)}; expected an object")
    role = require_text(turn, role_key, origin, where=where)
    if role not in roles:
        raise DataError(
            f"{origin}: {where}.{role_key}: is {role[:40]!r}; expected {', '.join(roles)} "
            "(convert_dataset.py knows other words for them)"
        )
    if is_openai and role == "assistant" and turn.get("tool_calls"):
        content = turn.get("content")
        if content is not None:
            content = require_text(turn, "content", origin, where=where, may_be_empty=True)
        return Message(
            role, content or "", parse_openai_calls(turn["tool_calls"], f"{where}.tool_calls", origin)
        )
    may_be_empty = roles[role] in ("system", "observation")
    content = require_text(turn, text_key, origin, where=where, may_be_empty=may_be_empty)
    if role == "function_call":
        thought, mark, body = content.rpartition("</think>")
        return Message("assistant", thought + mark, parse_sharegpt_calls(body, f"{where}.{text_key}", origin))
    if roles[role] == "observation":
        return Message("observation", content, call_id=str(turn.get("tool_call_id") or ""))
    return Message(roles[role], content)


def check_order(messages: list[Message], name: str, origin: str, roles: dict[str, str]) -> None:
    """Refuse anything but a system message or none, then user and assistant in turn; results follow calls.

    Args:
        roles: {name in the row: role}, for what is said.
    """
    names = {role: word for word, role in reversed(roles.items())}
    offset = 1 if messages[0].role == "system" else 0
    due = ("user",)
    for index, message in enumerate(messages[offset:], offset):
        if message.role not in due:
            raise DataError(
                f"{origin}: {name}[{index}]: has role {names[message.role]} where "
                f"{' or '.join(map(names.get, due))} is due; {names['user']} and {names['assistant']} must "
                f"alternate, a system turn only comes first, {names['observation']} follows a call"
            )
        if message.role == "assistant":
            due = ("observation",) if message.calls else ("user",)
        else:
            due = ("assistant",) if message.role == "user" else ("assistant", "observation")
    if len(messages) == offset:
        raise DataError(f"{origin}: {name}: has no question; add a {names['user']} turn")


def check_calls(messages: list[Message], origin: str) -> None:
    """Check the text of calls, in which the row's JSON text may hide characters behind escapes."""
    for message in messages:
        for call in message.calls:
            check_content(call.name + call.arguments, "a call", origin)


def parse_text(row: dict, origin: str, log: RowLog) -> Text:
    """{"text": …} → Text."""
    text = Text(require_text(row, "text", origin), origin)
    check_fields(row, "text", origin, log)
    return text


def parse_chat(row: dict, origin: str, log: RowLog) -> Chat | None:
    """A ShareGPT, OpenAI or Alpaca row → Chat. A last question without answer is dropped and counted."""
    is_alpaca = "instruction" in row and not {"conversations", "messages"} & row.keys()
    messages = parse_alpaca(row, origin) if is_alpaca else parse_messages(row, origin)
    check_fields(row, "chat", origin, log)
    check_calls(messages, origin)
    if not any(message.role == "assistant" for message in messages):
        log.add("row_without_answer_dropped", origin)
        return None
    if messages[-1].role == "user":
        log.add("unanswered_question_dropped", origin)
        messages.pop()
    if messages[-1].role == "observation":
        log.add("unanswered_observation_dropped", origin)
        while messages[-1].role == "observation":
            messages.pop()
    return Chat(tuple(messages), origin, parse_tools(row, origin))


def parse_alpaca(row: dict, origin: str) -> list[Message]:
    """An Alpaca row → messages. The input stands on the line below the instruction."""
    answer = Message("assistant", require_text(row, "output", origin))
    return [*parse_history(row, origin), parse_instruction(row, origin), answer]


def parse_instruction(row: dict, origin: str) -> Message:
    """Return the question of an Alpaca row."""
    question = require_text(row, "instruction", origin)
    if row.get("input") not in (None, ""):
        question += "\n" + require_text(row, "input", origin, may_be_empty=True)
    return Message("user", question)


def parse_pair(row: dict, origin: str, log: RowLog) -> Pair | None:
    """A preference row in any form → Pair. Two equal answers teach nothing: dropped and counted."""
    if "conversations" in row or "messages" in row:
        prompt = parse_messages(row, origin)
        if prompt[-1].role == "assistant":
            raise DataError(
                f"{origin}: {'messages' if 'messages' in row else 'conversations'}: ends with an answer; "
                "a pair's prompt ends with a question"
            )
        chosen, rejected = "chosen", "rejected"
    elif "instruction" in row and "question" not in row:
        prompt = [*parse_history(row, origin), parse_instruction(row, origin)]
        chosen, rejected = "chosen", "rejected"
    else:
        prompt = parse_history(row, origin)
        prompt.append(Message("user", require_text(row, "question", origin)))
        chosen, rejected = "response_chosen", "response_rejected"
    answers = parse_answer(row, chosen, origin), parse_answer(row, rejected, origin)
    check_fields(row, "pair", origin, log)
    check_calls([*prompt, *answers], origin)
    if answers[0] == answers[1]:
        log.add("identical_answers_dropped", origin)
        return None
    return Pair(tuple(prompt), *answers, origin, parse_tools(row, origin), parse_margin(row, origin))


def parse_margin(row: dict, origin: str) -> float:
    """Return the optional margin of a pair."""
    margin = 0.0 if row.get("margin") is None else row["margin"]
    if json_type(margin) != "a number" or not math.isfinite(margin):
        raise DataError(f"{origin}: margin: is {json_type(margin)}; expected a finite number")
    return float(margin)


def parse_answer(row: dict, name: str, origin: str) -> Message:
    """Return an answer of a pair: text, or a turn of an assistant (which may be a call)."""
    if not isinstance(row.get(name), dict):
        return Message("assistant", require_text(row, name, origin))
    message = parse_message(row[name], name, origin, is_openai="role" in row[name])
    if message.role != "assistant":
        raise DataError(f"{origin}: {name}: has role {message.role}; an answer is the assistant's")
    return message


def parse_history(row: dict, origin: str) -> list[Message]:
    """Return the optional `system` and `history` ([[question, answer], …]) of a row as messages."""
    messages = []
    if row.get("system") not in (None, ""):
        messages.append(Message("system", require_text(row, "system", origin)))
    history = [] if row.get("history") is None else row["history"]
    if not isinstance(history, list):
        raise DataError(f"{origin}: history: is {json_type(history)}; expected [[question, answer], …]")
    for index, turn in enumerate(history):
        if not (
            isinstance(turn, list)
            and len(turn) == 2
            and all(isinstance(t, str) and not is_blank(t) for t in turn)
        ):
            raise DataError(f"{origin}: history[{index}]: expected [question, answer], two non-empty strings")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    return messages


def parse_prompt(row: dict, origin: str) -> tuple[list[Message], tuple[dict, ...]]:
    """Return (messages that end with what is to be answered, tools) of a row to answer.

    {"prompt"[, "system"]}, a conversation in either form (its last answer is left out), or a pair's prompt.
    """
    if "conversations" in row or "messages" in row:
        messages = parse_messages(row, origin)
        while messages[-1].role == "assistant":
            messages.pop()
    elif "question" in row:
        messages = [*parse_history(row, origin), Message("user", require_text(row, "question", origin))]
    else:
        messages = [Message("user", require_text(row, "prompt", origin))]
        if row.get("system") is not None:
            system = require_text(row, "system", origin, may_be_empty=True)
            messages.insert(0, Message("system", system))
    return messages, parse_tools(row, origin)


Parser = Callable[[dict, str, RowLog], Record | None]


def read_records(
    files: list[Path], parse: Parser, log: RowLog, *, txt_documents: str = "file"
) -> list[Record]:
    """Return the records of all files, in file and line order; see `iterate_records`.

    Raises:
        DataError: a row that cannot be used, or no row that can.
    """
    records = list(iterate_records(files, parse, log, txt_documents=txt_documents))
    if not records:
        raise no_usable_row(files, log)
    return records


def no_usable_row(files: list[Path], log: RowLog) -> DataError:
    """Return the refusal of files whose rows were all dropped."""
    reasons = "; ".join(log.lines())
    return DataError(f"{files[0]}:1: no usable row in {', '.join(map(str, files))}: {reasons}")


def iterate_records(
    files: list[Path], parse: Parser, log: RowLog, *, txt_documents: str = "file"
) -> Iterator[Record]:
    """Yield the records of all files, in file and line order.

    Args:
        files: .jsonl, .json and (for texts) .txt files.
        parse: parse_text, parse_chat or parse_pair.
        log: takes what happened to rows, and what is refused.
        txt_documents: how a .txt file is split: one document per `file`, `blank`-line separated part, or
            `line`.
    """
    for path in files:
        if path.suffix == ".txt":
            yield from split_txt(path, txt_documents, log)
            continue
        for row, origin in read_rows(path, log):
            try:
                record = parse(row, origin, log)
            except DataError as error:
                log.refuse(error, json.dumps(row, ensure_ascii=False))
                continue
            if record is not None:
                yield record


def split_txt(path: Path, txt_documents: str, log: RowLog) -> Iterator[Text]:
    """Yield the documents of a .txt file; a line that cannot be used goes to the log."""
    part: list[str] = []
    begin = 1
    for line, number in read_text_lines(path, log):
        try:
            if has_invisible(check_content(line, "text", f"{path}:{number}")):
                log.add(INVISIBLE_FOUND, f"{path}:{number}")
        except DataError as error:
            log.refuse(error, line)
            continue
        if txt_documents == "file":
            part.append(line)
        elif line.strip():
            begin = begin if part else number
            part.append(line)
        if part and (txt_documents == "line" or (txt_documents == "blank" and not line.strip())):
            yield Text("\n".join(part), f"{path}:{begin}")
            part = []
    text = "\n".join(part).strip("\n")
    if text.strip():
        yield Text(text, f"{path}:{begin}")
