"""The toolkit's rows → OpenAI messages or Alpaca rows; a row that a form cannot hold whole is refused.

Standard library only.
"""

from medicalgpt.call_rows import name_calls
from medicalgpt.dialects import convert_row
from medicalgpt.errors import DataError
from medicalgpt.records import Chat, Pair, RowLog, Text, parse_chat, parse_messages, parse_pair, parse_text
from medicalgpt.row_fields import Reading
from template import Message

OWN_FIELDS = {
    "chat": {"conversations"},
    "pair": {
        "conversations",
        "chosen",
        "rejected",
        "question",
        "response_chosen",
        "response_rejected",
        "system",
        "history",
    },
}
OPENAI_ROLES_OF = {"user": "user", "assistant": "assistant", "system": "system", "observation": "tool"}


def validate_row(kind: str, row: dict, origin: str) -> Chat | Pair | Text:
    """Return the record that the stages make of a row.

    Raises:
        DataError: they refuse the row, or drop it whole.
    """
    log = RowLog()
    record = {"chat": parse_chat, "pair": parse_pair, "text": parse_text}[kind](row, origin, log)
    if record is None:
        raise DataError(
            f"{origin}: {', '.join(log.counts)}: the row teaches nothing; add an answer or remove it"
        )
    return record


def write_back(kind: str, row: dict, origin: str, form: str) -> dict:
    """Return a valid row of the toolkit as `form`: toolkit, openai or alpaca.

    Raises:
        DataError: the form cannot hold the row: what is read back from it is another.
    """
    if form == "toolkit":
        return row
    if kind == "text":
        raise DataError(f"{origin}: text: is no conversation, which {form} rows are; leave --to out")
    written = openai_row(kind, row, origin) if form == "openai" else alpaca_row(kind, row, origin)
    others = {key: value for key, value in row.items() if key not in OWN_FIELDS[kind]}
    back = convert_row({**others, **written}, origin, Reading("dpo" if kind == "pair" else form)).row
    if whole_record(kind, back, origin) != whole_record(kind, row, origin):
        raise DataError(f"{origin}: the row reads back differently from {form} form; leave --to out")
    validate_row(kind, written, origin)
    clash = sorted(set(others) & set(written))
    if clash:
        raise DataError(f"{origin}: {', '.join(clash)}: the {form} row has a field of that name; rename it")
    return {**written, **others}


def whole_record(kind: str, row: dict, origin: str) -> object:
    """Return what a row says, a last question without answer included."""
    return parse_messages(row, origin) if kind == "chat" else validate_row(kind, row, origin)


# ---- OpenAI ------------------------------------------------------------------------------------------------


def openai_message(message: Message) -> dict:
    """Return a message with its calls and what it answers."""
    written: dict = {"role": OPENAI_ROLES_OF[message.role], "content": message.content}
    if message.calls:
        written["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    if message.role == "observation" and message.call_id:
        written["tool_call_id"] = message.call_id
    return written


def openai_row(kind: str, row: dict, origin: str) -> dict:
    """Return {"messages"}, for a pair with "chosen" and "rejected" as messages."""
    if kind == "chat":
        messages = parse_messages(row, origin)
        extras = [
            {key: value for key, value in turn.items() if key not in ("from", "value")}
            for turn in row["conversations"]
        ]
        turns = [openai_message(one) | extra for one, extra in zip(messages, extras, strict=True)]
        return {"messages": turns}
    pair = validate_row(kind, row, origin)
    return {
        "messages": [openai_message(message) for message in pair.prompt],
        "chosen": openai_message(name_calls([*pair.prompt, pair.chosen])[-1]),
        "rejected": openai_message(name_calls([*pair.prompt, pair.rejected])[-1]),
    }


# ---- Alpaca ------------------------------------------------------------------------------------------------


def alpaca_row(kind: str, row: dict, origin: str) -> dict:
    """Return {"instruction", "input", "output"[, "history", "system"]}; a pair has chosen and rejected.

    Raises:
        DataError: calls, and what tools gave back, have no place in an Alpaca row.
    """
    pair = validate_row(kind, row, origin) if kind == "pair" else None
    messages = list(pair.prompt) if pair else parse_messages(row, origin)
    answers = [pair.chosen, pair.rejected] if pair else []
    if row.get("tools") or any(m.calls or m.role == "observation" for m in [*messages, *answers]):
        raise DataError(
            f"{origin}: holds tools or calls, for which Alpaca rows have no place; use --to openai"
        )
    if any(set(turn) != {"from", "value"} for turn in row.get("conversations", ())):
        raise DataError(f"{origin}: turns have fields of their own, for which Alpaca rows have no place")
    system = messages.pop(0).content if messages[0].role == "system" else ""
    texts = [message.content for message in messages]
    output = texts.pop() if messages[-1].role == "assistant" else ""
    question = texts.pop()
    history = [[texts[index], texts[index + 1]] for index in range(0, len(texts), 2)]
    return {
        "instruction": question,
        "input": "",
        **(
            {"chosen": pair.chosen.content, "rejected": pair.rejected.content} if pair else {"output": output}
        ),
        **({"history": history} if history else {}),
        **({"system": system} if system else {}),
    }
