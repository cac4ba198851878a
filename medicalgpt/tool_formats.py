"""How tools are offered, called, and answered, in five forms; and calls found again in a model's text.

    default   Action / Action Input lines, for models that know no form of their own
    qwen      <tool_call> with a JSON object, as in Qwen2.5 and Qwen3 (qwen3_5: as functions and parameters)
    glm4      the tool's name in place of the answer's first line, then its arguments
    llama3    a bare JSON object with name and parameters
    mistral   [TOOL_CALLS] with a JSON list

Standard library only.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from template import Message, Segment, Template, ToolCall

Segments = list[Segment]


@dataclass(frozen=True)
class ToolFormat:
    """One way to use tools.

    Attributes:
        place: where the offer stands: behind the "system" prompt or "before_system", in a system turn of its
            own ("own_system"), inside the "first_user" message, or "before_last_user".
        offer: tools → what the model is told of them.
        calls: (message, its text, template) → the answer's segments, trained.
        result: observation → its segments.
        parse: text → the calls in it.
        environment: what a system prompt says besides when tools are offered.
    """

    place: str
    offer: Callable[[Sequence[dict]], Segments]
    calls: Callable[[Message, str, Template], Segments]
    result: Callable[[Message], Segments]
    parse: Callable[[str], list[ToolCall]]
    environment: str = ""


def said(text: str, *, marker: bool = False) -> Segment:
    """Return a stretch that the model must write."""
    return Segment(text, marker, True)


def given(text: str, *, marker: bool = False) -> Segment:
    """Return a stretch that the model is given."""
    return Segment(text, marker, False)


def dump(value: object, indent: int | None = None) -> str:
    """Return JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def arguments_of(call: ToolCall) -> str:
    """Return a call's arguments as chat templates write them."""
    return dump(json.loads(call.arguments))


def function_of(tool: dict) -> dict:
    """Return a tool's function, wrapped as OpenAI's or not."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def as_call(value: object, key: str = "arguments") -> ToolCall | None:
    """Return the call that a JSON object is, or None."""
    if not (isinstance(value, dict) and isinstance(value.get("name"), str) and key in value):
        return None
    arguments = value[key]
    if not isinstance(arguments, str):
        arguments = dump(arguments)
    return ToolCall(value["name"], arguments, str(value.get("id", "")))


def load_json(text: str) -> object:
    """Return the value of JSON text, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def calls_in(value: object, key: str = "arguments") -> list[ToolCall]:
    """Return the calls of a JSON object or list; [] when anything in it is no call."""
    calls = [as_call(item, key) for item in (value if isinstance(value, list) else [value])]
    return [] if None in calls else calls


# ---- default: Action lines ---------------------------------------------------------------------------------


def default_offer(tools: Sequence[dict]) -> Segments:
    """Describe the tools in words."""
    lines = [dump(function_of(tool)) for tool in tools]
    return [
        given("You can use these tools:\n", marker=True),
        given("\n".join(lines)),
        given(
            "\nTo use one, answer with nothing but these two lines, once for each call:\n"
            "Action: the tool's name\nAction Input: its arguments as one JSON object",
            marker=True,
        ),
    ]


def default_calls(message: Message, content: str, template: Template) -> Segments:
    """Write calls as Action lines."""
    text = [content] if content else []
    text += [f"Action: {call.name}\nAction Input: {arguments_of(call)}" for call in message.calls]
    return [said(template.answer.replace("{content}", "\n".join(text)))]


def default_parse(text: str) -> list[ToolCall]:
    """Find Action lines."""
    found = re.findall(r"^Action:[ \t]*(\S[^\n]*?)[ \t]*\nAction Input:[ \t]*(.+)$", text, re.MULTILINE)
    return [ToolCall(name, arguments) for name, arguments in found if isinstance(load_json(arguments), dict)]


# ---- qwen --------------------------------------------------------------------------------------------------


def qwen_offer(tools: Sequence[dict]) -> Segments:
    """Qwen2.5 and Qwen3: tools as JSON lines."""
    segments = [
        given(
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided "
            "with function signatures within <tools></tools> XML tags:\n<tools>",
            marker=True,
        )
    ]
    segments += [given("\n" + dump(tool)) for tool in tools]
    end = (
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call>"
    )
    return [*segments, given(end, marker=True)]


def tagged_calls(
    message: Message, content: str, template: Template, body: Callable[[ToolCall], str], gap: str
) -> Segments:
    """Write an answer and calls between <tool_call> marks."""
    before, _, after = template.answer.partition("{content}")
    segments = [said(before + content)] if before + content else []
    for index, call in enumerate(message.calls):
        lead = "\n" if index else gap if content else ""
        segments += [
            said(f"{lead}<tool_call>\n", marker=True),
            said(body(call)),
            said("\n</tool_call>", marker=True),
        ]
    return segments + ([said(after)] if after else [])


def qwen_calls(message: Message, content: str, template: Template) -> Segments:
    """Qwen2.5 and Qwen3: a JSON object per call."""
    return tagged_calls(message, content, template, qwen_body, "\n")


def qwen_body(call: ToolCall) -> str:
    """Return one call of Qwen2.5 and Qwen3."""
    return f'{{"name": "{call.name}", "arguments": {arguments_of(call)}}}'


def tagged_result(message: Message) -> Segments:
    """Qwen: a result between <tool_response> marks."""
    return [
        given("<tool_response>\n", marker=True),
        given(message.content),
        given("\n</tool_response>", marker=True),
    ]


def qwen_parse(text: str) -> list[ToolCall]:
    """Find <tool_call> marks with JSON."""
    bodies = re.findall(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", text, re.DOTALL)
    return [call for body in bodies for call in calls_in(load_json(body))]


def qwen3_5_offer(tools: Sequence[dict]) -> Segments:
    """Qwen3.5: calls as functions and parameters."""
    end = (
        "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
        "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
        "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple "
        "lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the "
        "specified format: an inner <function=...></function> block must be nested within <tool_call></tool_call> "
        "XML tags\n- Required parameters MUST be specified\n- You may provide optional reasoning for your function "
        "call in natural language BEFORE the function call, but NOT after\n- If there is no function call available, "
        "answer the question like normal with your current knowledge and do not tell the user about function calls\n"
        "</IMPORTANT>"
    )
    begin = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
    lines = [given("\n" + dump(tool)) for tool in tools]
    return [given(begin, marker=True), *lines, given(end, marker=True)]


def qwen3_5_calls(message: Message, content: str, template: Template) -> Segments:
    """Qwen3.5: a function with its parameters per call."""
    return tagged_calls(message, content, template, qwen3_5_body, "\n\n")


def qwen3_5_body(call: ToolCall) -> str:
    """Return one call of Qwen3.5."""
    lines = [f"<function={call.name}>"]
    for name, value in json.loads(call.arguments).items():
        text = (
            value if isinstance(value, str) else dump(value) if isinstance(value, dict | list) else str(value)
        )
        lines.append(f"<parameter={name}>\n{text}\n</parameter>")
    return "\n".join([*lines, "</function>"])


def qwen3_5_parse(text: str) -> list[ToolCall]:
    """Find <function=…> with its parameters; a value that is JSON (a number, a list, …) is read as such."""
    calls = []
    for name, body in re.findall(r"<function=([^>\n]+)>(.*?)</function>", text, re.DOTALL):
        values = {}
        for key, value in re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL):
            parsed = load_json(value)
            values[key] = value if parsed is None else parsed
        calls.append(ToolCall(name, dump(values)))
    return calls


# ---- glm4 --------------------------------------------------------------------------------------------------

GLM4_INTRODUCTION = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供"
    "适当的答复和支持。\n\n"
)


def glm4_offer(tools: Sequence[dict]) -> Segments:
    """GLM-4: a heading per tool, behind the model's introduction."""
    return [given(GLM4_INTRODUCTION, marker=True), *glm4_list(tools)]


def glm4_0414_offer(tools: Sequence[dict]) -> Segments:
    """GLM-4-0414: a heading per tool."""
    first, *rest = glm4_list(tools)
    return [first._replace(text=first.text + "\n"), *rest]


def glm4_list(tools: Sequence[dict]) -> Segments:
    """Return the headings of both."""
    segments = [given("# 可用工具", marker=True)]
    for tool in tools:
        function = function_of(tool)
        segments.append(given(f"\n## {function['name']}\n\n{dump(function, indent=4)}"))
        segments.append(given("\n在调用上述函数时，请使用 Json 格式表示调用的参数。", marker=True))
    return segments


def glm4_calls(message: Message, content: str, template: Template) -> Segments:
    """GLM-4: the tool's name takes the place of the line break before an answer."""
    return glm4_written(message, content, template, "\n")


def glm4_0414_calls(message: Message, content: str, template: Template) -> Segments:
    """GLM-4-0414: with a blank behind the name."""
    return glm4_written(message, content, template, " \n")


def glm4_written(message: Message, content: str, template: Template, gap: str) -> Segments:
    """Write calls; several follow one another behind their own headers, as separate messages do."""
    segments = [said(template.answer.replace("{content}", content))] if content else []
    for call in message.calls:
        if segments:
            segments.append(said(template.header, marker=True))
        segments.append(said(f"{call.name}{gap}{arguments_of(call)}"))
    return segments


def glm4_parse(text: str) -> list[ToolCall]:
    """Find a name on a line of its own, and JSON behind it."""
    calls = []
    for part in text.split("<|assistant|>"):
        name, _, arguments = part.partition("\n")
        if re.fullmatch(r"[A-Za-z_][\w.\-]*\s*", name) and isinstance(load_json(arguments), dict):
            calls.append(ToolCall(name.strip(), arguments.strip()))
    return calls


def plain_result(message: Message) -> Segments:
    """Return a result as it is."""
    return [given(message.content)]


# ---- llama3 ------------------------------------------------------------------------------------------------


def llama3_offer(tools: Sequence[dict]) -> Segments:
    """Llama 3.1 to 3.3: in the first question."""
    begin = (
        "Given the following functions, please respond with a JSON for a function call with its proper arguments "
        'that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
        "dictionary of argument name and its value}.Do not use variables.\n\n"
    )
    return [given(begin, marker=True), *(given(dump(tool, indent=4) + "\n\n") for tool in tools)]


def llama3_calls(message: Message, content: str, template: Template) -> Segments:
    """Llama 3.1 to 3.3: one bare JSON object; several, which the official format refuses, as a list."""
    written = [f'{{"name": "{call.name}", "parameters": {arguments_of(call)}}}' for call in message.calls]
    text = written[0] if len(written) == 1 else f"[{', '.join(written)}]"
    return [said(template.answer.replace("{content}", text))]


def llama3_result(message: Message) -> Segments:
    """Llama 3.1 to 3.3: a result as a JSON string."""
    return [given(dump(message.content))]


def llama3_parse(text: str) -> list[ToolCall]:
    """Read the whole text as JSON."""
    return calls_in(load_json(text.strip().removeprefix("<|python_tag|>")), "parameters")


# ---- mistral -----------------------------------------------------------------------------------------------


def nine_letters(call_id: str) -> str:
    """Return an id as Mistral wants it, nine letters and digits: as given, or one made from it."""
    if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def mistral_offer(gap: str, tools: Sequence[dict]) -> Segments:
    """Mistral: before the last question."""
    functions = [
        {key: value for key, value in function_of(tool).items() if key != "return"} for tool in tools
    ]
    listed = ", ".join(f'{{"type": "function", "function": {mistral_object(item)}}}' for item in functions)
    return [
        given(f"[AVAILABLE_TOOLS]{gap}[", marker=True),
        given(listed),
        given("][/AVAILABLE_TOOLS]", marker=True),
    ]


def mistral_object(function: dict) -> str:
    """Return a function as Mistral's templates write it: strings are put in quotes and not escaped."""
    items = (
        f'"{key}": ' + (f'"{value}"' if isinstance(value, str) else dump(value))
        for key, value in function.items()
    )
    return "{" + ", ".join(items) + "}"


def mistral_calls(gap: str, message: Message, content: str, template: Template) -> Segments:
    """Mistral: a JSON list. The official format has no text beside calls."""
    items = (
        f'{{"name": {dump(call.name)}, "arguments": {arguments_of(call)}, "id": "{nine_letters(call.id)}"}}'
        for call in message.calls
    )
    return [said("[TOOL_CALLS]", marker=True), said(f"{gap}[{', '.join(items)}]")]


def mistral_result(gap: str, message: Message) -> Segments:
    """Mistral: a result with the id of its call."""
    return [
        given("[TOOL_RESULTS]", marker=True),
        given(f'{gap}{{"content": {message.content}, "call_id": "{nine_letters(message.call_id)}"}}'),
        given("[/TOOL_RESULTS]", marker=True),
    ]


def mistral_parse(text: str) -> list[ToolCall]:
    """Read the list behind [TOOL_CALLS]."""
    _, mark, listed = text.partition("[TOOL_CALLS]")
    return calls_in(load_json(listed)) if mark else []


def default_result(message: Message) -> Segments:
    """Return a result under its name."""
    return [given("Observation: ", marker=True), given(message.content)]


def mistral_format(gap: str) -> ToolFormat:
    """Return Mistral's format; `gap` stands behind its marks (none in Nemo and Large)."""
    parts = (partial(part, gap) for part in (mistral_offer, mistral_calls, mistral_result))
    return ToolFormat("before_last_user", *parts, mistral_parse)


TOOL_FORMATS = {
    "default": ToolFormat("system", default_offer, default_calls, default_result, default_parse),
    "qwen": ToolFormat("system", qwen_offer, qwen_calls, tagged_result, qwen_parse),
    "qwen3_5": ToolFormat("before_system", qwen3_5_offer, qwen3_5_calls, tagged_result, qwen3_5_parse),
    "glm4": ToolFormat("own_system", glm4_offer, glm4_calls, plain_result, glm4_parse),
    "glm4_0414": ToolFormat("own_system", glm4_0414_offer, glm4_0414_calls, plain_result, glm4_parse),
    "llama3": ToolFormat(
        "first_user", llama3_offer, llama3_calls, llama3_result, llama3_parse, "Environment: ipython\n"
    ),
    "mistral": mistral_format(" "),
    "mistral_nemo": mistral_format(""),
}
CHOICES = ("default", "qwen", "glm4", "llama3", "mistral")  # --tool_format


def get_tool_format(name: str) -> ToolFormat:
    """Return a tool format by name."""
    return TOOL_FORMATS[name]


def parse_tool_call(text: str, tool_format: str | None = None) -> list[ToolCall]:
    """Return the calls in a model's answer, [] when it makes none.

    Args:
        text: the answer, with its marks.
        tool_format: the form it is in; None: the first form that finds a call.
    """
    formats = [tool_format] if tool_format else ["qwen", "qwen3_5", "mistral", "llama3", "glm4", "default"]
    return next((calls for name in formats if (calls := TOOL_FORMATS[name].parse(text))), [])
