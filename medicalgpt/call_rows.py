"""Tools and calls as data files write them → ToolCall and tool specifications. Standard library only."""

import json
from collections.abc import Sequence

from medicalgpt.errors import DataError
from medicalgpt.json_values import DECODER, json_type, reason, without_surrogates
from template import Message, ToolCall


def decode(text: str, where: str, origin: str) -> object:
    """Return the value of a JSON text that stands in a field."""
    try:
        return without_surrogates(DECODER.decode(text), text, f"{origin}: {where}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: {where}: is no JSON ({reason(error)}); expected JSON text") from None


def parse_tools(row: dict, origin: str) -> tuple[dict, ...]:
    """Return the tools that a row offers, each as {"type": "function", "function": {…}}.

    Raises:
        DataError: `tools` is neither a list of functions with names, nor JSON text of one.
    """
    tools = row.get("tools")
    if tools in (None, "", []):
        return ()
    if isinstance(tools, str):
        tools = decode(tools, "tools", origin)
    if not isinstance(tools, list):
        raise DataError(f"{origin}: tools: is {json_type(tools)}; expected a list of functions")
    wrapped = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
            raise DataError(
                f"{origin}: tools[{index}]: has no name; expected {{name, description, parameters}}"
            )
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(wrapped)


def parse_sharegpt_calls(text: str, where: str, origin: str) -> tuple[ToolCall, ...]:
    """Return the calls of a function_call turn: {"name", "arguments"} or a list of them, as JSON text."""
    value = decode(text, where, origin)
    items = value if isinstance(value, list) else [value]
    if not items:
        raise DataError(f"{origin}: {where}: is an empty list; expected a call")
    return tuple(parse_call(item, where, origin) for item in items)


def parse_openai_calls(calls: object, where: str, origin: str) -> tuple[ToolCall, ...]:
    """Return the calls of `tool_calls`: [{"id", "function": {"name", "arguments"}}, …]."""
    if not isinstance(calls, list):
        raise DataError(f"{origin}: {where}: is {json_type(calls)}; expected a list of calls")
    parsed = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else call
        one = parse_call(function, f"{where}[{index}]", origin)
        parsed.append(one._replace(id=str(call.get("id") or "")))
    return tuple(parsed)


def parse_call(value: object, where: str, origin: str) -> ToolCall:
    """Return one call.

    Raises:
        DataError: it has no name, or its arguments are no JSON object.
    """
    if not (isinstance(value, dict) and isinstance(value.get("name"), str) and value["name"]):
        raise DataError(f'{origin}: {where}: has no name; expected {{"name": …, "arguments": {{…}}}}')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = decode(arguments, f"{where}.arguments", origin)
    if not isinstance(arguments, dict):
        raise DataError(f"{origin}: {where}.arguments: is {json_type(arguments)}; expected an object")
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def name_calls(messages: Sequence[Message]) -> list[Message]:
    """Give calls without an id one, and every result the id of the call it answers, in order."""
    named, open_calls = [], []
    for number, message in enumerate(messages):
        if message.calls:
            calls = tuple(
                call if call.id else call._replace(id=f"call{number:03d}{index:02d}")
                for index, call in enumerate(message.calls)
            )
            open_calls, message = [call.id for call in calls], message._replace(calls=calls)
        elif message.role == "observation":
            answered = message.call_id if message.call_id in open_calls else "".join(open_calls[:1])
            open_calls = [call for call in open_calls if call != answered]
            message = message._replace(call_id=answered)
        named.append(message)
    return named
