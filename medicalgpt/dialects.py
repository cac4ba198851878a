"""A row of any dialect → the toolkit's row, recognised by its fields. Standard library only.

    dpo       chosen and rejected, or response_chosen and response_rejected
    sharegpt  turns in conversations, conversation, messages, dialog or dialogue (openai: of role and content)
    alpaca    instruction and output
    qa        a question's column and an answer's
    text      text

become {"conversations"}, {"question", "response_chosen", "response_rejected"} (or {"conversations", "chosen",
"rejected"}) and {"text"}; every other field is kept where its name is free. See `medicalgpt.turns` for turns.
"""

from dataclasses import dataclass

from medicalgpt.errors import DataError
from medicalgpt.html_text import html_to_text
from medicalgpt.row_fields import (
    ANSWER_FIELDS,
    QUESTION_FIELDS,
    SYSTEM_FIELDS,
    TURN_FIELDS,
    Reading,
    UnknownFieldsError,
    field_among,
    find_column,
    join_system,
    lead_in,
    question_names,
    read_instruction,
    read_prompt_text,
    refuse_second_question,
    text_of,
)
from medicalgpt.turns import is_dialogue, is_empty_answer, is_packed, is_tagged, read_turns

CHOSEN_FIELDS = ("chosen", "response_chosen")
REJECTED_FIELDS = ("rejected", "response_rejected")
OUTPUT_FIELDS = ("output", "response")
# An extra field of one of these names would change what a row means.
OWN = ("history", "tools", "instruction", "output")
TAKEN = {*TURN_FIELDS, *CHOSEN_FIELDS, *REJECTED_FIELDS, *SYSTEM_FIELDS, *OWN}
DIALECTS = ("alpaca", "qa", "sharegpt", "openai", "dpo", "text")


@dataclass(frozen=True)
class Converted:
    """The toolkit's row; `kind` is chat, pair or text, `note` what was taken for what."""

    kind: str
    row: dict
    dialect: str
    note: str
    lost: tuple[str, ...] = ()  # fields whose names were not free


def recognise_row(row: dict, origin: str) -> str:
    """Return the dialect of a row.

    Raises:
        UnknownFieldsError: its fields are none, or more than one.
    """
    fields = {key.strip().lower() for key, value in row.items() if value is not None}
    if fields & set(CHOSEN_FIELDS) and fields & set(REJECTED_FIELDS):
        return "dpo"
    turns = field_among(row, TURN_FIELDS, "turns", origin)
    if turns:
        first = row[turns][0] if isinstance(row[turns], list) and row[turns] else None
        return "openai" if isinstance(first, dict) and {"role", "content"} <= set(first) else "sharegpt"
    if "instruction" in fields and fields & {"output", "response"}:
        return "dpo" if is_comparison(row.get("output")) else "alpaca"
    question = field_among(row, question_names(row), "question", origin)
    answer = field_among(row, ANSWER_FIELDS, "answer", origin)
    if question and answer:
        return "qa"
    if is_tagged(row.get("text")) or is_dialogue(row.get("data")):
        return "sharegpt"
    if "text" in fields:
        return "text"
    raise UnknownFieldsError(
        f"{origin}: the row has {', '.join(row) or 'no fields'}, which is no known form; name its columns "
        "with --question_column and --answer_column, or its form with --data_type"
    )


# ---- dialects ----------------------------------------------------------------------------------------------


def read_qa(row: dict, reading: Reading, origin: str) -> tuple[dict, set[str], str]:
    """Question and answer columns, perhaps system and history → (chat row, fields used, note)."""
    question = find_column(row, reading.question_column, question_names(row), "question", origin)
    answer = find_column(row, reading.answer_column, ANSWER_FIELDS, "answer", origin)
    used = {question, answer}
    if not reading.question_column:
        refuse_second_question(row, question, origin)
    turns = lead_in(row, reading, used, origin) + read_prompt_text(text_of(row, question, origin), origin)
    if not text_of(row, answer, origin).strip():
        raise DataError(f"{origin}: {answer}: is empty; write the answer or remove the row")
    turns.append({"from": "gpt", "value": row[answer]})
    return {"conversations": turns}, used, f"columns {question} -> question, {answer} -> answer"


def read_alpaca(row: dict, reading: Reading, origin: str) -> tuple[dict, set[str], str]:
    """Alpaca fields (Dolly: instruction, context, response) → (chat row, fields used, note)."""
    output = field_among(row, OUTPUT_FIELDS, "answer", origin)
    if output is None:
        raise UnknownFieldsError(f"{origin}: output: missing; the row has {', '.join(row)}")
    used: set[str] = set()
    turns = lead_in(row, reading, used, origin)
    turns += read_prompt_text(read_instruction(row, used, origin), origin)
    used.add(output)
    answer = {"from": "gpt", "value": text_of(row, output, origin)}
    if not is_empty_answer(answer):
        turns.append(answer)
    return {"conversations": turns}, used, f"fields {', '.join(name for name in row if name in used)}"


def read_chat(row: dict, reading: Reading, origin: str) -> tuple[dict, set[str], str]:
    """A list of turns, or one text of them → (chat row, fields used, note)."""
    name = field_among(row, TURN_FIELDS, "turns", origin)
    if name is None:
        name = field_among(row, ("data",) if is_dialogue(row.get("data")) else ("text",), "turns", origin)
    if name is None:
        raise UnknownFieldsError(f"{origin}: conversations: missing; the row has {', '.join(row)}")
    used = {name}
    turns = lead_in(row, reading, used, origin)
    turns = join_system(turns, read_turns(row[name], name, origin), origin)
    first = row[name][0] if isinstance(row[name], list) and row[name] else "one text"
    keys = ", ".join(list(first)[:2]) if isinstance(first, dict) else "pairs"
    return {"conversations": turns}, used, f"{name} of {first if first == 'one text' else keys}"


def read_document(row: dict, reading: Reading, origin: str) -> tuple[dict, set[str], str]:
    """{"text": …} → (text row, fields used, note)."""
    name = field_among(row, ("text",), "text", origin)
    if name is None:
        raise UnknownFieldsError(f"{origin}: text: missing; the row has {', '.join(row)}")
    return {"text": text_of(row, name, origin)}, {name}, f"column {name}"


# ---- pairs -------------------------------------------------------------------------------------------------


def read_pair(row: dict, reading: Reading, origin: str) -> tuple[dict, set[str], str]:
    """A prompt, a better and a worse answer in any of the older forms → (pair row, fields used, note)."""
    if is_comparison(row.get("output")):
        row = {**row, "chosen": row["output"][0], "rejected": row["output"][1]}
    chosen = field_among(row, CHOSEN_FIELDS, "better answer", origin)
    rejected = field_among(row, REJECTED_FIELDS, "worse answer", origin)
    if chosen is None or rejected is None:
        raise UnknownFieldsError(f"{origin}: chosen and rejected: missing; the row has {', '.join(row)}")
    used = {chosen, rejected} | ({"output"} if is_comparison(row.get("output")) else set())
    prompt = read_pair_prompt(row, reading, used, origin)
    asked = any(turn["from"] == "human" for turn in prompt)
    answers = [read_answer_turns(row[name], name, asked, origin) for name in (chosen, rejected)]
    prompt, *answers = split_answers(prompt, *answers, origin)
    return pair_form(prompt, *answers), used, f"answers {chosen}, {rejected}"


def is_comparison(output: object) -> bool:
    """Return whether an output is [better, worse], as LLaMA-Factory wrote pairs before it had two fields."""
    return isinstance(output, list) and len(output) == 2 and all(isinstance(text, str) for text in output)


def read_pair_prompt(row: dict, reading: Reading, used: set[str], origin: str) -> list[dict]:
    """Return the turns before the answers, as far as fields of their own hold them."""
    turns = lead_in(row, reading, used, origin)
    asked = any(key.strip().lower() in QUESTION_FIELDS for key in row)
    whole = isinstance(row.get("chosen"), list) and asked  # UltraFeedback: messages repeat the better side
    names = (*(() if whole else TURN_FIELDS), *QUESTION_FIELDS, "instruction")
    name = field_among(row, names, "prompt", origin)
    if name is None:
        return turns
    used.add(name)
    if name.lower() == "instruction":
        return [*turns, {"from": "human", "value": read_instruction(row, used, origin)}]
    if name.lower() != "prompt" and name.lower() not in TURN_FIELDS:
        refuse_second_question(row, name, origin)
    if isinstance(row[name], str) and name.lower() not in TURN_FIELDS:
        return turns + read_prompt_text(row[name], origin)
    return join_system(turns, read_turns(row[name], name, origin), origin)


def read_answer_turns(value: object, name: str, has_prompt: bool, origin: str) -> list[dict]:
    """Return the turns of an answer: mostly one; a whole conversation where the prompt is part of it."""
    if isinstance(value, str) and (has_prompt or not is_packed(value)):
        return [{"from": "gpt", "value": value}]
    return read_turns([value] if isinstance(value, dict) else value, name, origin)


def split_answers(
    prompt: list[dict], chosen: list[dict], rejected: list[dict], origin: str
) -> tuple[list[dict], dict, dict]:
    """Return (prompt, better answer, worse answer); what both answers begin with is the prompt.

    Raises:
        DataError: there is no prompt, two prompts differ, or an answer has more than one turn.
    """
    shortest = min(len(chosen), len(rejected)) - 1
    same = [index for index in range(max(shortest, 0)) if chosen[: index + 1] == rejected[: index + 1]]
    shared = chosen[: len(same)]
    if len(chosen) != len(shared) + 1 or len(rejected) != len(shared) + 1:
        raise DataError(f"{origin}: chosen and rejected: differ in more than their last turn; split the row")
    if shared and [turn["from"] for turn in prompt] == ["system"]:
        shared = join_system(prompt, shared, origin)
    elif prompt and shared:
        longer, shorter = sorted((prompt, shared), key=len, reverse=True)
        if longer[-len(shorter) :] != shorter:
            raise DataError(f"{origin}: chosen: begins with another prompt than the row's own; remove one")
        shared = longer
    if not (prompt or shared):
        raise DataError(f"{origin}: prompt: missing; a pair needs a question")
    return shared or prompt, chosen[-1], rejected[-1]


def pair_form(prompt: list[dict], chosen: dict, rejected: dict) -> dict:
    """Return the pair as question and history or, where that cannot hold it, as conversations."""
    system = prompt[0]["value"] if prompt[0]["from"] == "system" else None
    turns = prompt[1:] if system is not None else prompt
    roles = [turn["from"] for turn in [*turns, chosen, rejected]]
    alternate = roles == ["human", "gpt"] * (len(turns) // 2) + ["human", "gpt", "gpt"]
    plain_turns = all(set(turn) == {"from", "value"} for turn in [*prompt, chosen, rejected])
    if not (alternate and plain_turns) or system == "":
        chosen, rejected = (
            turn["value"] if turn["from"] == "gpt" and len(turn) == 2 else turn for turn in (chosen, rejected)
        )
        return {"conversations": prompt, "chosen": chosen, "rejected": rejected}
    values = [turn["value"] for turn in turns]
    history = [[values[index], values[index + 1]] for index in range(0, len(values) - 1, 2)]
    return {
        **({"system": system} if system else {}),
        **({"history": history} if history else {}),
        "question": values[-1],
        "response_chosen": chosen["value"],
        "response_rejected": rejected["value"],
    }


# ---- rows --------------------------------------------------------------------------------------------------

READERS = {
    "qa": (read_qa, "chat"),
    "alpaca": (read_alpaca, "chat"),
    "sharegpt": (read_chat, "chat"),
    "openai": (read_chat, "chat"),
    "dpo": (read_pair, "pair"),
    "text": (read_document, "text"),
}


def convert_row(row: dict, origin: str, reading: Reading) -> Converted:
    """Return the toolkit's row; it is not yet validated.

    Raises:
        UnknownFieldsError: its fields do not say what it is.
        DataError: it cannot be converted.
    """
    dialect = reading.dialect or recognise_row(row, origin)
    reader, kind = READERS[dialect]
    result, used, note = reader(row, reading, origin)
    if reading.strip_html:
        result = strip_tags(result)
    tools = read_offer(row, used, origin)
    others = {key: value for key, value in row.items() if key not in used}
    free = {key: value for key, value in others.items() if key not in result and key.lower() not in TAKEN}
    lost = tuple(key for key, value in others.items() if key not in free and value is not None)
    return Converted(kind, {**result, **tools, **free}, dialect, note, lost)


def read_offer(row: dict, used: set[str], origin: str) -> dict:
    """Return the tools that a row offers; OpenAI's older name is functions."""
    name = field_among(row, ("tools", "functions"), "tools", origin)
    if name is None or (name.lower() == "functions" and not isinstance(row[name], list)):
        return {}
    used.add(name)
    return {"tools": row[name]}


def strip_tags(value: object, name: str = "") -> object:
    """Return a row whose texts have no HTML; calls and what tools gave back stay as they are."""
    if isinstance(value, dict):
        if value.get("from") in ("function_call", "observation"):
            return value
        return {key: strip_tags(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [strip_tags(part, name) for part in value]
    return html_to_text(value) if isinstance(value, str) and name != "from" else value
