"""The fields of a row of any dialect: which of them holds what. Standard library only."""

from collections.abc import Iterable
from dataclasses import dataclass

from medicalgpt.errors import DataError
from medicalgpt.json_values import json_type
from medicalgpt.turns import is_empty_answer, is_packed, read_turns, unpack_text

TURN_FIELDS = ("conversations", "conversation", "messages", "dialog", "dialogue")
QUESTION_FIELDS = ("ask", "question", "query", "q", "prompt", "问题", "提问")
ANSWER_FIELDS = ("answer", "response", "output", "a", "回答", "答案", "回复")
SYSTEM_FIELDS = ("system", "system_prompt")
INPUT_FIELDS = ("input", "context")


class UnknownFieldsError(DataError):
    """The fields of a row do not say what it is."""


@dataclass(frozen=True)
class Reading:
    """How rows are to be read; None is found out from each row."""

    dialect: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    system_column: str | None = None
    strip_html: bool = False


def field_among(row: dict, names: Iterable[str], purpose: str, origin: str) -> str | None:
    """Return the row's own name of the one field among `names`, in any case, or None.

    Raises:
        UnknownFieldsError: more than one could be meant.
    """
    found = [key for key in row if key.strip().lower() in names and row[key] is not None]
    if len(found) > 1:
        raise UnknownFieldsError(
            f"{origin}: {' and '.join(found)} may each hold the {purpose}; the row has {', '.join(row)}; say "
            "which with --question_column and --answer_column, or rename one"
        )
    return found[0] if found else None


def text_of(row: dict, name: str, origin: str) -> str:
    """Return a field that must be text."""
    if not isinstance(row[name], str):
        raise DataError(f"{origin}: {name}: is {json_type(row[name])}; expected a string")
    return row[name]


def system_turn(row: dict, names: Iterable[str], used: set[str], origin: str) -> list[dict]:
    """Return the system turn that a field of the row holds, or nothing where it is absent or empty."""
    name = field_among(row, names, "system prompt", origin)
    if name is None:
        return []
    used.add(name)
    system = text_of(row, name, origin)
    return [{"from": "system", "value": system}] if system.strip() else []


def lead_in(row: dict, reading: Reading, used: set[str], origin: str) -> list[dict]:
    """Return the turns of the fields system and history, which come before a row's question."""
    names = (reading.system_column.strip().lower(),) if reading.system_column else SYSTEM_FIELDS
    system, history = system_turn(row, names, used, origin), []
    name = field_among(row, ("history",), "history", origin)
    if name and (not isinstance(row[name], str) or is_packed(row[name]) or not row[name].strip()):
        used.add(name)
        blank = isinstance(row[name], str) and not row[name].strip()
        history = [] if blank or row[name] == [] else read_turns(row[name], name, origin)
    return join_system(system, history, origin)


def join_system(system: list[dict], turns: list[dict], origin: str) -> list[dict]:
    """Put the row's system prompt before its turns, which may already begin with it."""
    if not system or turns[:1] == system:
        return turns
    if turns and turns[0]["from"] == "system":
        raise DataError(f"{origin}: system: differs from the system turn of the conversation; remove one")
    return system + turns


def question_names(row: dict) -> tuple[str, ...]:
    """Return the names a question's column may have: `input` is one beside a plain `output` only."""
    plain = not any(key.strip().lower() in (*QUESTION_FIELDS, "instruction") for key in row)
    return ("input",) if plain else QUESTION_FIELDS


def find_column(row: dict, chosen: str | None, names: tuple[str, ...], purpose: str, origin: str) -> str:
    """Return the column that a flag names or, without the flag, the one whose name says it.

    Raises:
        UnknownFieldsError: there is none.
    """
    name = field_among(row, (chosen.strip().lower(),) if chosen else names, purpose, origin)
    if name is None:
        raise UnknownFieldsError(
            f"{origin}: no {purpose} column{f' {chosen!r}' if chosen else ''}; the row has "
            f"{', '.join(row)}; name it with --{purpose}_column"
        )
    return name


def read_prompt_text(text: str, origin: str) -> list[dict]:
    """Return a question as a turn; a text that ends with the mark of an answer is a whole conversation."""
    if is_packed(text):
        *turns, last = unpack_text(text, "prompt", origin)
        if is_empty_answer(last):
            return turns
    return [{"from": "human", "value": text}]


def read_instruction(row: dict, used: set[str], origin: str) -> str:
    """Return the question of an Alpaca row: the instruction and below it the input, where there is one."""
    name = field_among(row, ("instruction",), "instruction", origin)
    if name is None:
        raise UnknownFieldsError(f"{origin}: instruction: missing; the row has {', '.join(row)}")
    parts = [text_of(row, name, origin)]
    used.add(name)
    extra = field_among(row, INPUT_FIELDS, "input", origin)
    if extra:
        parts.append(text_of(row, extra, origin))
        used.add(extra)
    return "\n".join(part for part in parts if part.strip())


def refuse_second_question(row: dict, question: str, origin: str) -> None:
    """Refuse a row of which another field may be part of the question."""
    for name in row:
        is_other = name != question and name.strip().lower() in ("input", "instruction")
        if is_other and isinstance(row[name], str) and row[name].strip():
            raise DataError(
                f"{origin}: {name}: stands beside {question}, and what is asked may be either or both; "
                "name it with --question_column, or join them"
            )
