"""Tool calls: offered, made and answered as the official templates write them; trained, and found again in text."""

import json
from dataclasses import replace

from medicalgpt.chat_template import resolve_template
from medicalgpt.errors import ConfigError, DataError
from medicalgpt.records import parse_chat, parse_pair
from medicalgpt.rendering import Renderer, render, render_text
from medicalgpt.row_log import RowLog
from medicalgpt.tool_formats import CHOICES, TOOL_FORMATS, parse_tool_call
from template import TEMPLATES, Message, ToolCall

import pytest
from test_template import shown
from transformers.utils.chat_template_utils import render_jinja_template

DOSE = {
    "type": "function",
    "function": {
        "name": "dose",
        "description": '按体重算剂量 "mg"',
        "parameters": {"type": "object", "properties": {"kg": {"type": "number"}}, "required": ["kg"]},
    },
}
VISIT = {
    "type": "function",
    "function": {
        "name": "book_visit",
        "description": "Book.",
        "parameters": {"type": "object", "properties": {}},
    },
}
TOOLS = [DOSE, VISIT]
FIRST = {"name": "dose", "arguments": {"kg": 12.5, "drug": "布洛芬", "list": [1, 2]}}
SECOND = {"name": "book_visit", "arguments": {}}


def call(function: dict, number: int) -> dict:
    return {"type": "function", "id": f"abcdef{number:03d}", "function": function}


def talk(*calls: dict, content: str = "", answer: str | None = None, system: str | None = None) -> list[dict]:
    calls = [call(function, number) for number, function in enumerate(calls)]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": "How much?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
    ]
    for number, one in enumerate(calls):
        messages.append({"role": "tool", "content": f'{{"mg": {number}}}', "tool_call_id": one["id"]})
    return messages + ([{"role": "assistant", "content": answer}] if answer else [])


def ours(name: str, messages: list[dict], variant: int | None = None) -> str:
    template = (
        TEMPLATES[name] if variant is None else replace(TEMPLATES[name], **TEMPLATES[name].variants[variant])
    )
    is_prompt = messages[-1]["role"] != "assistant"
    answered = [*messages, {"role": "assistant", "content": "x"}] if is_prompt else messages
    row = parse_chat({"messages": answered}, "f:1", RowLog())
    said = row.messages[: len(messages)]
    return render_text(template, said, bos="<B>", eos="<E>", tools=TOOLS)


def official(source: str, messages: list[dict], **options) -> str:
    texts, _ = render_jinja_template(
        [messages], tools=TOOLS, chat_template=shown(source), bos_token="<B>", eos_token="<E>",
        add_generation_prompt=messages[-1]["role"] != "assistant", **options,
    )  # fmt: skip
    return texts[0]


TALKS = [
    talk(FIRST), talk(FIRST, answer="12 mg."), talk(FIRST, system="Be brief."), talk(FIRST, SECOND),
    talk(SECOND, FIRST, answer="Done.", system="S"), talk(FIRST, content="Let me see.", answer="So."),
]  # fmt: skip


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("name, source", [("qwen", "qwen2_5"), ("qwen3", "qwen3"), ("qwen3_5", "qwen3_5_think"),
                                          ("qwen3_5_nothink", "qwen3_5_nothink")])  # fmt: skip
def test_tools_are_offered_called_and_answered_as_in_the_models_own_template(name, source, messages):
    assert ours(name, messages) == official(source, messages)


@pytest.mark.parametrize("messages", [TALKS[0], TALKS[1], TALKS[2]])
def test_llama3_uses_tools_as_its_own_template_does(messages):
    assert ours("llama3", messages, 0) == official("llama3_1", messages)


ROW = {
    "tools": json.dumps([DOSE["function"]], ensure_ascii=False),
    "conversations": [
        {"from": "human", "value": "How much?"},
        {"from": "function_call", "value": json.dumps(FIRST, ensure_ascii=False)},
        {"from": "observation", "value": "62 mg"},
        {"from": "gpt", "value": "62 mg."},
    ],
}


def test_sharegpt_and_openai_rows_are_the_same_conversation():
    sharegpt = parse_chat(ROW, "f:1", RowLog())
    openai = parse_chat(
        {
            "tools": [DOSE],
            "messages": [
                {"role": "user", "content": "How much?"},
                {"role": "assistant", "content": None, "tool_calls": [{"function": {
                    "name": "dose", "arguments": json.dumps(FIRST["arguments"])}}]},
                {"role": "tool", "content": "62 mg"},
                {"role": "assistant", "content": "62 mg."},
            ],
        },
        "f:1",
        RowLog(),
    )  # fmt: skip
    assert sharegpt == openai
    assert sharegpt.tools == (DOSE,)
    assert sharegpt.messages[2].call_id == sharegpt.messages[1].calls[0].id


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tool_format", CHOICES)
def test_calls_are_trained_and_observations_are_not(name, tool_format):
    row = parse_chat(ROW, "f:1", RowLog())
    template = TEMPLATES[name]
    turns = Renderer(template, "<B>", "<E>", tool_format).render(row.messages, row.tools)
    segments = [segment for turn in turns for segment in turn]
    trained = "".join(segment.text for segment in segments if segment.trained)
    whole = "".join(segment.text for segment in segments)
    assert "布洛芬" in whole and "62 mg" in whole and "How much?" in whole
    if template.last_header is None:
        assert "布洛芬" in trained
    assert trained.count("62 mg") == 1  # the answer, not the observation
    assert "How much?" not in trained and "按体重算剂量" not in trained


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_parse_tool_call_gives_back_what_was_rendered(tool_format):
    calls = (ToolCall("dose", json.dumps(FIRST["arguments"], ensure_ascii=False), "abcdef000"),
             ToolCall("book_visit", '{"day": "Monday"}', "abcdef001"))  # fmt: skip
    for made in (calls[:1], calls):
        message = Message("assistant", "", made)
        segments = TOOL_FORMATS[tool_format].calls(message, "", TEMPLATES["chatml"])
        text = "".join(segment.text for segment in segments)
        text = text.replace(TEMPLATES["chatml"].header, "<|assistant|>")
        for found in (parse_tool_call(text), parse_tool_call(text, tool_format)):
            assert [(c.name, json.loads(c.arguments)) for c in found] == [
                (c.name, json.loads(c.arguments)) for c in made
            ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Take 5 mg.",
        "{}",
        '{"name": "x"}',
        "Action: rest\nand drink",
        "<tool_call>no</tool_call>",
        "[1, 2]",
    ],
)
def test_an_answer_without_a_call_has_none(text):
    assert parse_tool_call(text) == []


def test_a_pairs_answers_may_be_calls():
    pair = parse_pair(
        {"tools": [DOSE], "conversations": ROW["conversations"][:1], "chosen": ROW["conversations"][1],
         "rejected": {"from": "gpt", "value": "I guess 5 mg."}}, "f:1", RowLog())  # fmt: skip
    assert pair.chosen.calls[0].name == "dose"
    assert pair.rejected == Message("assistant", "I guess 5 mg.")
    assert pair.tools == (DOSE,)


@pytest.mark.parametrize("change, message", [
    ({"tools": "[{"}, "f:1: tools: is no JSON"),
    ({"tools": [{"description": "x"}]}, r"f:1: tools\[0\]: has no name"),
    ({"conversations": [*ROW["conversations"][:1], {"from": "function_call", "value": "dose(5)"}]}, r"\[1\].value: is no JSON"),
    ({"conversations": [*ROW["conversations"][:1], {"from": "function_call", "value": '{"arguments": {}}'}]}, "has no name"),
    ({"conversations": [*ROW["conversations"][:1], {"from": "function_call", "value": '{"name": "x", "arguments": 3}'}]}, "arguments: is a number"),
    ({"conversations": [*ROW["conversations"][:1], *ROW["conversations"][2:]]}, "has role observation where gpt is due"),
    ({"conversations": [*ROW["conversations"][:2], ROW["conversations"][3]]}, "has role gpt where observation is due"),
])  # fmt: skip
def test_wrong_tool_rows_are_named(change, message):
    with pytest.raises(DataError, match=message):
        parse_chat(ROW | change, "f:1", RowLog())


def test_a_call_at_the_end_is_what_the_model_must_say():
    row = parse_chat(ROW | {"conversations": ROW["conversations"][:2]}, "f:1", RowLog())
    turns = render(TEMPLATES["qwen"], row.messages, bos="", eos="", tools=row.tools)
    trained = "".join(s.text for turn in turns for s in turn if s.trained)
    assert trained == (
        '<tool_call>\n{"name": "dose", "arguments": {"kg": 12.5, "drug": "布洛芬", "list": [1, 2]}}\n</tool_call><|im_end|>'
    )


@pytest.mark.parametrize("source, name, tool_format, prompt_thought", [
    ("qwen2_5", "qwen", "qwen", ""), ("qwen3", "qwen3", "qwen", ""), ("qwen3_instruct_2507", "qwen3_nothink", "qwen", ""),
    ("qwen3_5_think", "qwen3_5", "qwen3_5", "open"), ("qwen3_5_nothink", "qwen3_5_nothink", "qwen3_5", "empty"),
])  # fmt: skip
def test_a_models_own_template_is_recognised_with_its_mode_and_its_tools(
    tokenizer, source, name, tool_format, prompt_thought
):
    tokenizer.chat_template = shown(source)
    found = resolve_template(tokenizer, None, recorded=None)
    assert (found.name, found.tool_format, found.prompt_thought) == (name, tool_format, prompt_thought)


def test_a_format_that_has_no_name_here_is_read_off_and_proved(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}<S>{{ m.content | trim }}\n{% elif m.role == 'user' %}"
        "Patient> {{ m.content | trim }}\n{% else %}Doctor> {{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Doctor> {% endif %}"
    )
    found = resolve_template(tokenizer, None, recorded=None)
    assert (found.name, found.user, found.header, found.stop) == (
        "own",
        "Patient> {content}\n",
        "Doctor> ",
        "<|im_end|>",
    )
    assert found.system == "<S>{content}\n" and found.strip == {"system", "user"}


def test_a_format_that_cannot_be_read_off_is_refused_with_the_reason(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.content | length }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ConfigError, match="its own chat template cannot be turned into segments: "):
        resolve_template(tokenizer, None, recorded=None)


def test_a_call_of_glm4_is_trained_to_end_with_what_the_text_goes_on_with():
    """GLM-4 stops a call with <|observation|> and an answer with <|user|>."""
    row = parse_chat(ROW, "f:1", RowLog())
    (turn,) = render(TEMPLATES["glm4"], row.messages, bos="", eos="", tools=row.tools)
    stops = [segment.text for segment in turn if segment.trained and segment.is_marker]
    assert stops == ["<|observation|>", "<|user|>"]
