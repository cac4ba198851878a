"""The chat formats against the models' own templates, and their Jinja export against themselves."""

from importlib.resources import files

from template import TEMPLATES, jinja, render, render_text

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
    [
        ("user", "a"),
        ("assistant", "<think>\nhm\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>\no\n</think>\n\nd"),
    ],
]
SYSTEMS = [[], [("system", "")], [("system", "Be kind.")], [("system", " 说中文 \n")]]
PROBES = [system + body for system in SYSTEMS for body in BODIES]
TOKENS = {
    "llama2": ("<s>", "</s>"),
    "mistral": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
}


def rendered(source: str, probe: list, bos: str, eos: str) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = lambda message: (_ for _ in ()).throw(TemplateError(message))
    messages = [{"role": role, "content": content} for role, content in probe]
    return environment.from_string(source).render(
        messages=messages, add_generation_prompt=probe[-1][0] == "user", bos_token=bos, eos_token=eos
    )


def official(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name, source", [("qwen", "qwen2_5"), ("qwen3", "qwen3"), ("llama3", "llama3")])
def test_the_format_is_the_models_own(name, source, probe):
    bos, eos = TOKENS.get(name, ("", "<|im_end|>"))
    ours = render_text(TEMPLATES[name], probe, bos=bos, eos=eos)
    assert ours == rendered(official(source), probe, bos, eos)


@pytest.mark.parametrize("probe", PROBES)
def test_smollm_is_the_demo_models_own_format(probe):
    assert render_text(TEMPLATES["smollm"], probe, bos="", eos="") == rendered(SMOLLM, probe, "", "")


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_exported_jinja_template_renders_the_same_text(name, probe):
    bos, eos = TOKENS.get(name, ("<B>", "<E>"))
    exported = jinja(TEMPLATES[name], bos=bos, eos=eos)
    assert rendered(exported, probe, bos, eos) == render_text(TEMPLATES[name], probe, bos=bos, eos=eos)


# Written by hand from each format's source; a system prompt, two turns and the header of a third answer.
GOLDEN = {
    "base": "SQ1A1<E>Q2A2<E>Q3",
    "vicuna": "<B>S USER: Q1 ASSISTANT: A1<E>USER: Q2 ASSISTANT: A2<E>USER: Q3 ASSISTANT:",
    "alpaca": "<B>S\n\n### Instruction:\nQ1\n\n### Response:A1<E>\n\n### Instruction:\nQ2\n\n### Response:A2<E>\n\n"
    "### Instruction:\nQ3\n\n### Response:",
    "llama2": "<B>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 <E><B>[INST] Q2 [/INST] A2 <E><B>[INST] Q3 [/INST]",
    "mistral": "<B>[INST] Q1[/INST] A1<E>[INST] Q2[/INST] A2<E>[INST] S\n\nQ3[/INST]",
    "baichuan2": "S<reserved_106>Q1<reserved_107>A1<reserved_106>Q2<reserved_107>A2<reserved_106>Q3<reserved_107>",
    "chatglm3": "[gMASK]sop<|system|>\n S<|user|>\n Q1<|assistant|>\n A1<|user|>\n Q2<|assistant|>\n A2<|user|>\n Q3"
    "<|assistant|>",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n<|im_start|>user\nQ3<|im_end|>\n"
    "<|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_format_is_the_one_written_down(name):
    talk = [
        ("system", "S"),
        ("user", "Q1"),
        ("assistant", "A1"),
        ("user", "Q2"),
        ("assistant", "A2"),
        ("user", "Q3"),
    ]
    expected = GOLDEN[name].replace("<B>", "") if name == "base" else GOLDEN[name]
    bos = "" if name == "base" else "<B>"
    assert render_text(TEMPLATES[name], talk, bos=bos, eos="<E>") == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_and_their_stops_are_trained(name):
    template = TEMPLATES[name]
    talk = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    turns = render(template, talk, bos="<B>", eos="<E>")
    trained = [segment.text.strip() for turn in turns for segment in turn if segment.trained]
    stop = template.stop.replace("{eos}", "<E>")
    thought = ["<think>", "", "</think>"] if template.thought else []
    assert trained == ["A1", stop, *thought, "A2", stop]
