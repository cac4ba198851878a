"""The chat formats against the models' own templates, written-down goldens, and their Jinja export against themselves."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from medicalgpt.jinja_export import jinja
from medicalgpt.rendering import render, render_text
from template import TEMPLATES, Message

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

SMOLLM = (  # tokenizer_config.json of HuggingFaceTB/SmolLM2-135M-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BODIES = [
    [("user", "hi")],
    [("user", "hi"), ("assistant", "yo")],
    [("user", " lead\n"), ("assistant", "  trail\n\n"), ("user", "\n\nq2"), ("assistant", "")],
    [
        ("user", "你好😀"),
        ("assistant", "def f():\n    return {1: 2}"),
        ("user", "b"),
        ("assistant", "c"),
        ("user", "d"),
    ],
    [("user", "it's {content} {bos} \\n {{ x }}"), ("assistant", "'{eos}'")],
    [(("user", "assistant")[i % 2], f"turn {i}") for i in range(10)],
]
THINKING = [
    ("user", "a"),
    ("assistant", "<think>\nhm\n</think>\n\nb"),
    ("user", "c"),
    ("assistant", "<think>\no\n</think>\n\nd"),
]
SYSTEMS = [[], [("system", "")], [("system", "Be kind.")], [("system", " 说中文 \n")]]
PROBES = [[Message(*item) for item in system + body] for system in SYSTEMS for body in [*BODIES, THINKING]]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "templates.json").read_text(encoding="utf-8"))


def official(
    source: str,
    probe: list[Message],
    bos: str = "<B>",
    eos: str = "<E>",
    *,
    prompt: bool | None = None,
    **options,
) -> str | None:
    """Render with a model's own chat template; None where it refuses."""
    talk = [{"role": message.role, "content": message.content} for message in probe]
    try:
        texts, _ = render_jinja_template(
            [talk],
            chat_template=source,
            add_generation_prompt=probe[-1].role == "user" if prompt is None else prompt,
            bos_token=bos,
            eos_token=eos,
            **options,
        )
    except TemplateError:
        return None
    return texts[0]


def without_last_stop(template, text: str, probe: list[Message], eos: str) -> str:
    """Return ours as official formats have it that carry no stop token."""
    if template.stop_between or probe[-1].role == "user":
        return text
    return text.removesuffix(template.stops(eos)[0])


def shown(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


# template, trl's copy of the official one, which of the template's variants it is (None: the template itself)
OFFICIAL = [
    ("qwen", "qwen2_5", None), ("chatml", "qwen3_instruct_2507", None), ("qwen3", "qwen3", None),
    ("qwen3_nothink", "qwen3", None), ("qwen3_nothink", "qwen3_instruct_2507", 0), ("qwen3_5", "qwen3_5_think", None),
    ("qwen3_5_nothink", "qwen3_5_nothink", None), ("llama3", "llama3", None), ("llama3", "llama3_1", 0),
    ("cohere", "cohere", None), ("gemma", "gemma3", None), ("gemma", "gemma", None), ("phi3", "phi3", None),
    ("phi3", "phi3_5", 0),
]  # fmt: skip


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name, source, variant", OFFICIAL)
def test_the_format_is_the_models_own(name, source, variant, probe):
    template = TEMPLATES[name]
    template = template if variant is None else replace(template, **template.variants[variant])
    if template.prompt_thought == "empty" and any("<think>" in message.content for message in probe):
        pytest.skip("a format without thoughts drops those of the data: docs/templates.md")
    own = official(shown(source), probe, **template.options)
    if own is None:
        assert (name, probe[0].role) == ("gemma", "system")  # gemma 1 and 2 refuse system prompts
        return
    assert render_text(template, probe, bos="<B>", eos="<E>") == own


@pytest.mark.parametrize("probe", PROBES)
def test_smollm_is_the_demo_models_own_format(probe):
    assert render_text(TEMPLATES["smollm"], probe, bos="", eos="") == official(SMOLLM, probe, "", "")


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_exported_jinja_template_renders_the_same_text(name, probe):
    exported = jinja(TEMPLATES[name], bos="<B>", eos="<E>")
    assert official(exported, probe) == render_text(TEMPLATES[name], probe, bos="<B>", eos="<E>")


TALK = [
    ("system", "S"),
    ("user", "Q1"),
    ("assistant", "A1"),
    ("user", "Q2"),
    ("assistant", "A2"),
    ("user", "Q3"),
]


def test_every_template_is_written_down_and_names_its_source():
    assert list(GOLDEN) == list(TEMPLATES)
    assert all(template.source for template in TEMPLATES.values())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_format_is_the_one_written_down(name):
    """`prompt` holds a system prompt, two turns and the header of a third answer; `row` one question and answer."""
    prompt = render_text(TEMPLATES[name], [Message(*item) for item in TALK], bos="<B>", eos="<E>")
    row = render_text(TEMPLATES[name], [Message(*item) for item in TALK[1:3]], bos="<B>", eos="<E>")
    assert {"prompt": prompt, "row": row} == GOLDEN[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_and_their_stops_are_trained(name):
    template = TEMPLATES[name]
    talk = [
        Message("user", "Q1"),
        Message("assistant", "A1"),
        Message("user", "Q2"),
        Message("assistant", "A2"),
    ]
    turns = render(template, talk, bos="<B>", eos="<E>")
    trained = [segment.text.strip() for turn in turns for segment in turn if segment.trained]
    stop = template.stops("<E>")[0]
    thought = {"": ["<think>", "</think>"], "open": ["</think>"], "empty": []}[template.prompt_thought]
    first = [] if template.last_header else ["A1", stop]
    assert trained == [*first, *(thought if template.thought else []), "A2", stop]
