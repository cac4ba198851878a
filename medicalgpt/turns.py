"""The turns of a conversation in any dialect → the toolkit's: {"from": "human", "value": …}.

    {"from"|"role": "human|user", "value"|"content"|"text": …}, OpenAI tool_calls and role tool
    {"human": question, "assistant": answer}, [question, answer]
    one text: `<user>: … <bot>: …`, 用户：/助手：, Human:/Assistant:, 问：/答：

What is not known is refused, never guessed. Standard library only.
"""

import json
import re

from medicalgpt.call_rows import parse_openai_calls
from medicalgpt.errors import DataError
from medicalgpt.json_values import decode_json, json_type
from template import ToolCall

ROLES = {
    **dict.fromkeys(("human", "user", "用户", "问"), "human"),
    **dict.fromkeys(("gpt", "assistant", "bot", "助手", "答"), "gpt"),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("observation", "tool", "function", "tool_response"), "observation"),
}
ROLE_KEYS = ("from", "role")
TEXT_KEYS = ("value", "content", "text")
CALL_KEYS = ("tool_calls", "function_call")

TAGS = re.compile(r"<(user|human|bot|assistant|system)>\s*[:：]", re.IGNORECASE)
SPEAKERS = ("用户|助手|系统", "Human|Assistant|System", "User|Assistant|System", "问|答")
LINE_MARKS = [re.compile(rf"^[ \t]*(?:### ?)?({names})[ \t]*[:：]", re.MULTILINE) for names in SPEAKERS]
SPACED_MARKS = [re.compile(rf"(?:^|(?<=[\s。！？]))({names})[:：]") for names in SPEAKERS]


# ---- lists of turns ----------------------------------------------------------------------------------------


def read_turns(value: object, where: str, origin: str) -> list[dict]:
    """Return the turns of a conversation that is a list, JSON text of one, or one packed text.

    Raises:
        DataError: a turn, its role or its text is not known.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            turns = unpack_text(value, where, origin)
            return turns[:-1] if is_empty_answer(turns[-1]) else turns
        value = decode_json(value.strip(), f"{origin}: {where}")
    if not isinstance(value, list):
        raise DataError(f"{origin}: {where}: is {json_type(value)}; expected a list of turns")
    if value and all(isinstance(turn, str) for turn in value):
        return read_turns("\n".join(value), where, origin)
    check_result_order(value, where, origin)
    return [read for index, turn in enumerate(value) for read in read_turn(turn, f"{where}[{index}]", origin)]


def read_turn(turn: object, where: str, origin: str) -> list[dict]:
    """Return one turn, or the two of a [question, answer]."""
    if isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        return [{"from": role, "value": text} for role, text in zip(("human", "gpt"), turn, strict=True)]
    if not isinstance(turn, dict):
        raise DataError(f"{origin}: {where}: is {json_type(turn)}; expected an object with from and value")
    turn = {key: value for key, value in turn.items() if value is not None}
    role_key = only_key(turn, ROLE_KEYS, where, origin)
    if role_key is None:
        return read_round(turn, where, origin)
    role = read_role(turn[role_key], f"{where}.{role_key}", origin)
    call_key = only_key(turn, CALL_KEYS, where, origin)
    text_key = only_key(turn, TEXT_KEYS, where, origin)
    if call_key and turn[call_key]:
        role, text = "function_call", read_calls(turn, call_key, text_key, where, origin)
    elif text_key is None:
        raise DataError(f"{origin}: {where}: has no text; expected one of {', '.join(TEXT_KEYS)}")
    else:
        text = read_content(turn[text_key], role, f"{where}.{text_key}", origin)
    used = {role_key, text_key, *CALL_KEYS, "tool_call_id"}
    return [{"from": role, "value": text} | {key: turn[key] for key in turn if key not in used}]


def only_key(turn: dict, names: tuple[str, ...], where: str, origin: str) -> str | None:
    """Return the one of some keys that a turn has, or None."""
    found = [name for name in names if name in turn]
    if len(found) > 1:
        raise DataError(f"{origin}: {where}: has both {' and '.join(found)}; remove one")
    return found[0] if found else None


def read_role(value: object, where: str, origin: str) -> str:
    """Return the toolkit's name of a role."""
    role = ROLES.get(value.strip().lower()) if isinstance(value, str) else None
    if role is None:
        raise DataError(f"{origin}: {where}: is {value!r}; expected {', '.join(ROLES)}")
    return role


def read_round(turn: dict, where: str, origin: str) -> list[dict]:
    """Return the turns of {"human": question, "assistant": answer}: every key is a role."""
    roles = {key: ROLES.get(key.lower()) for key in turn}
    wanted = [role for role in ("system", "human", "gpt") if role in roles.values()]
    if not turn or len(wanted) < len(roles) or not all(isinstance(text, str) for text in turn.values()):
        raise DataError(
            f"{origin}: {where}: names no role; it has {', '.join(map(str, turn)) or 'nothing'}, expected "
            "from and value, or role and content"
        )
    return [
        {"from": role, "value": text} for role in wanted for key, text in turn.items() if roles[key] == role
    ]


def read_content(value: object, role: str, where: str, origin: str) -> str:
    """Return the text of a turn; OpenAI's list of text parts is joined, a call that is an object written."""
    if isinstance(value, str):
        return value
    if role == "function_call" and isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and value and all(is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)
    raise DataError(f"{origin}: {where}: is {json_type(value)}; expected a string")


def is_text_part(part: object) -> bool:
    """Return whether this is {"type": "text", "text": …}."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


# ---- calls -------------------------------------------------------------------------------------------------


def read_calls(turn: dict, call_key: str, text_key: str | None, where: str, origin: str) -> str:
    """Return the value of the function_call turn for an OpenAI message that holds calls.

    Raises:
        DataError: text stands beside the call, which a function_call turn cannot hold (a thought it can).
    """
    calls = turn[call_key] if call_key == "tool_calls" else [turn[call_key]]
    parsed = parse_openai_calls(calls, f"{where}.{call_key}", origin)
    thought = read_content(turn[text_key], "gpt", f"{where}.{text_key}", origin) if text_key else ""
    if thought.strip() and not thought.rstrip().endswith("</think>"):
        raise DataError(
            f"{origin}: {where}: has text beside its call, which ShareGPT turns cannot hold; remove the text "
            "(OpenAI rows with it can be trained on as they are)"
        )
    return (thought if thought.strip() else "") + calls_text(parsed)


def calls_text(calls: tuple[ToolCall, ...]) -> str:
    """Return calls as a function_call turn writes them: JSON of one, or of a list."""
    objects = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
    return json.dumps(objects[0] if len(objects) == 1 else objects, ensure_ascii=False)


def check_result_order(turns: list, where: str, origin: str) -> None:
    """Refuse results that refer to calls in another order than the calls have: ShareGPT turns hold no ids."""
    open_ids: list[str] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            continue
        calls = turn.get("tool_calls")
        if isinstance(calls, list):
            open_ids = [str(call.get("id") or "") for call in calls if isinstance(call, dict)]
        elif turn.get("tool_call_id") and open_ids:
            due = open_ids.pop(0)
            if due and turn["tool_call_id"] != due:
                raise DataError(
                    f"{origin}: {where}[{index}].tool_call_id: is {turn['tool_call_id']!r} where {due!r} is "
                    "due; put results in the order of their calls"
                )


# ---- one text ----------------------------------------------------------------------------------------------


def text_marks(text: str) -> list[re.Match]:
    """Return the role marks of a packed text, or nothing where it does not begin with one.

    Tags (`<user>:`) count anywhere; words (`问：`) at the beginning of a line, and in a text of one line
    after a space or the end of a sentence.
    """
    text = text.rstrip()
    one_line = "\n" not in text.strip()
    for pattern in (TAGS, *(SPACED_MARKS if one_line else LINE_MARKS)):
        marks = list(pattern.finditer(text))
        if marks and not text[: marks[0].start()].strip() and ROLES[marks[0][1].lower()] != "gpt":
            return marks
    return []


def is_tagged(text: object) -> bool:
    """Return whether a text is a conversation beyond doubt: `<user>: … <bot>: …`."""
    return isinstance(text, str) and TAGS.match(text.lstrip()) is not None and is_packed(text)


def is_dialogue(value: object) -> bool:
    """Return whether a list of texts is a conversation, as HuatuoGPT writes it: ["问：…", "答：…"]."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(text, str) for text in value)
        and is_packed("\n".join(value))
    )


def is_packed(text: str) -> bool:
    """Return whether a text is a conversation: it begins with a question's mark and has an answer's."""
    return any(ROLES[mark[1].lower()] == "gpt" for mark in text_marks(text))


def unpack_text(text: str, where: str, origin: str) -> list[dict]:
    """Return the turns of one text; the last may be an answer without text.

    Raises:
        DataError: the text does not begin with a mark.
    """
    marks = text_marks(text)
    if not marks:
        raise DataError(
            f"{origin}: {where}: is text without role marks; expected a list of turns, or text that begins "
            "with <user>:, Human:, 用户： or 问："
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"from": ROLES[mark[1].lower()], "value": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def is_empty_answer(turn: dict) -> bool:
    """Return whether a turn is the place for an answer."""
    return turn["from"] == "gpt" and not turn["value"].strip()
