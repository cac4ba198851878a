"""Chat templates as data: which text surrounds a system prompt, a question and an answer; what is trained.

    render(template, messages, bos, eos) → segments (text, marker or content, trained or not), turn by turn
    jinja(template, bos, eos)            → the same format as a chat template that any tool renders

This is the only place that knows role markers, separators, stop strings and default system prompts. Standard
library only. `{content}` in a piece stands for the message; `{bos}` and `{eos}` for the tokenizer's own
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Segment(NamedTuple):
    """A stretch of text with one origin.

    A `hidden` stop is not part of the text: the model must predict it where the next segment begins
    (chatglm3, baichuan2, whose conversations carry no stop token between turns).
    """

    text: str
    is_marker: bool
    trained: bool
    hidden: bool = False


Turn = list[Segment]


@dataclass(frozen=True)
class Template:
    """One chat format.

    Attributes:
        source: where the format is defined.
        user: a question, with what stands around it.
        header: what stands before an answer and is part of the prompt.
        answer: the answer as the model must write it.
        stop: ends an answer; trained, and generation stops on it.
        after: what stands between an answer's stop and the next turn; not trained.
        prefix: begins the conversation.
        system: a system prompt with what stands around it; goes where `system_in` says.
        default_system: the system prompt of a conversation that has none (None: nothing at all).
        system_variants: default system prompts of other models with this format.
        system_in: "own" turn, or inside the "first_user" or "last_user" message.
        strip: roles whose content loses surrounding white space, as in the official format.
        stop_between: False when the text carries no stop token between turns (it is trained as a hidden
            stop).
        thought: what stands around the thought of the last answer, which may be empty.
        stop_strings: further strings that end an answer at generation.
        bos_as_tokenizer: {bos} is there only where the tokenizer itself begins a text with it.
    """

    name: str
    source: str
    user: str
    header: str
    stop: str
    answer: str = "{content}"
    after: str = ""
    prefix: str = ""
    system: str = "{content}"
    default_system: str | None = None
    system_variants: tuple[str, ...] = ()
    system_in: str = "own"
    strip: frozenset[str] = frozenset()
    stop_between: bool = True
    thought: tuple[str, str] = ()
    stop_strings: tuple[str, ...] = ()
    bos_as_tokenizer: bool = False

    def stops(self, eos: str) -> tuple[str, ...]:
        """Return every string that ends an answer."""
        return (self.stop.replace("{eos}", eos), *self.stop_strings)


CHATML = {
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "header": "<|im_start|>assistant\n",
    "stop": "<|im_end|>",
    "after": "\n",
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
}
EVERY_ROLE = frozenset({"system", "user", "assistant"})

TEMPLATES = {
    template.name: template
    for template in [
        Template(
            name="base",
            source="no markers at all: a base model continues the question, its EOS ends the answer",
            prefix="{bos}",
            user="{content}",
            header="",
            stop="{eos}",
            bos_as_tokenizer=True,
        ),
        Template(
            name="vicuna",
            source="lm-sys/FastChat fastchat/conversation.py vicuna_v1.1",
            prefix="{bos}",
            system="{content} ",
            default_system="A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions.",
            user="USER: {content} ",
            header="ASSISTANT:",
            answer=" {content}",
            stop="{eos}",
            bos_as_tokenizer=True,
        ),
        Template(
            name="alpaca",
            source="tatsu-lab/stanford_alpaca train.py PROMPT_DICT prompt_no_input",
            prefix="{bos}",
            system="{content}\n\n",
            default_system="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            user="### Instruction:\n{content}\n\n",
            header="### Response:",
            stop="{eos}",
            after="\n\n",
            stop_strings=("### Instruction:",),
            bos_as_tokenizer=True,
        ),
        Template(name="chatml", source="OpenAI ChatML, without a default system prompt", **CHATML),
        Template(
            name="smollm",
            source="HuggingFaceTB/SmolLM2-135M-Instruct tokenizer_config.json",
            default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            **CHATML,
        ),
        Template(
            name="qwen",
            source="Qwen/Qwen2.5-0.5B-Instruct tokenizer_config.json",
            default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            system_variants=("You are a helpful assistant.",),  # the base models, Qwen2
            stop_strings=("<|endoftext|>",),
            **CHATML,
        ),
        Template(
            name="qwen3",
            source="Qwen/Qwen3-0.6B tokenizer_config.json, text without thoughts",
            thought=("<think>", "</think>\n\n"),
            stop_strings=("<|endoftext|>",),
            **CHATML,
        ),
        Template(
            name="llama2",
            source="meta-llama/Llama-2-7b-chat-hf tokenizer_config.json",
            system="<<SYS>>\n{content}\n<</SYS>>\n\n",
            system_in="first_user",
            user="{bos}[INST] {content} [/INST]",
            header="",
            answer=" {content} ",
            stop="{eos}",
            strip=EVERY_ROLE,
        ),
        Template(
            name="llama3",
            source="meta-llama/Meta-Llama-3-8B-Instruct tokenizer_config.json",
            prefix="{bos}",
            system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
            header="<|start_header_id|>assistant<|end_header_id|>\n\n",
            stop="<|eot_id|>",
            strip=EVERY_ROLE,
            stop_strings=("<|end_of_text|>",),
        ),
        Template(
            name="baichuan2",
            source="baichuan-inc/Baichuan2 fine-tune/fine-tune.py and generation_utils.py build_chat_input",
            user="<reserved_106>{content}",
            header="<reserved_107>",
            stop="{eos}",
            stop_between=False,
        ),
        Template(
            name="chatglm3",
            source="THUDM/chatglm3-6b tokenization_chatglm.py build_single_message",
            prefix="[gMASK]sop",
            system="<|system|>\n {content}",
            user="<|user|>\n {content}",
            header="<|assistant|>",
            answer="\n {content}",
            stop="{eos}",
            stop_between=False,
            stop_strings=("<|user|>", "<|observation|>"),
        ),
        Template(
            name="mistral",
            source="mistralai/Mistral-7B-Instruct-v0.3 tokenizer_config.json",
            prefix="{bos}",
            system="{content}\n\n",
            system_in="last_user",
            user="[INST] {content}[/INST]",
            header="",
            answer=" {content}",
            stop="{eos}",
            strip=frozenset({"assistant"}),
        ),
    ]
}


def get_template(name: str) -> Template:
    """Return a template by name.

    Raises:
        KeyError: with the names to choose from.
    """
    if name not in TEMPLATES:
        raise KeyError(f"unknown template {name!r}; choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# ---- rendering ---------------------------------------------------------------------------------------------


def split_system(
    template: Template, messages: Sequence[tuple[str, str]]
) -> tuple[str | None, list[tuple[str, str]]]:
    """Return (system prompt or None, the other messages); the default system prompt is filled in."""
    if messages and messages[0][0] == "system":
        return messages[0][1], list(messages[1:])
    return template.default_system, list(messages)


def pieces(form: str, content: list[Segment], fill: dict[str, str]) -> list[Segment]:
    """Return the segments of a form with `content` in the place of `{content}`."""
    before, _, after = form.partition("{content}")
    around = [Segment(expand(text, fill), True, False) for text in (before, after)]
    return [segment for segment in (around[0], *content, around[1]) if segment.text]


def expand(text: str, fill: dict[str, str]) -> str:
    """Put the tokenizer's own tokens in the places of {bos} and {eos}."""
    return text.replace("{bos}", fill["bos"]).replace("{eos}", fill["eos"])


def stripped(template: Template, role: str, content: str) -> str:
    """Return a message's content as the official format has it."""
    return content.strip() if role in template.strip else content


def render(template: Template, messages: Sequence[tuple[str, str]], *, bos: str, eos: str) -> list[Turn]:
    """Render a conversation into turns of segments.

    Args:
        messages: (role, content) with role system (first only), user, assistant in turn. Ends with an answer
            for training, or with a question for a prompt, which then ends with the answer's header.
        bos, eos: the tokenizer's own tokens, as text ("" where it has none).

    Returns:
        One turn per question; the first also holds what precedes it. Joined texts of the segments that are
        not hidden equal the official rendering, followed by the last answer's stop token where the official
        one has none.
    """
    fill = {"bos": bos, "eos": eos}
    system, rest = split_system(template, messages)
    users = [index for index, (role, _) in enumerate(rest) if role == "user"]
    place = {"first_user": users[0], "last_user": users[-1]}.get(template.system_in) if users else None
    opening = pieces(expand(template.prefix, fill), [], fill)
    system_part = (
        []
        if system is None
        else pieces(template.system, [Segment(stripped(template, "system", system), False, False)], fill)
    )
    if place is None:
        opening += system_part
    turns: list[Turn] = []
    for index, (role, content) in enumerate(rest):
        last = index == len(rest) - 1
        if role == "user":
            inside = system_part if index == place else []
            turns.append(render_question(template, content, inside, fill))
            if last:
                turns[-1] += pieces(template.header, [], fill)
        else:
            turns[-1] += render_answer(template, content, last, fill)
    turns[0][:0] = opening
    return turns


def render_question(
    template: Template, content: str, system: list[Segment], fill: dict[str, str]
) -> list[Segment]:
    """Return the segments of a user message, with the system prompt inside it where the format wants that."""
    if "user" in template.strip:
        content = content.rstrip() if system else content.strip()
    return pieces(template.user, [*system, Segment(content, False, False)], fill)


def render_answer(template: Template, content: str, last: bool, fill: dict[str, str]) -> list[Segment]:
    """Return header, answer, stop and what follows; answer and stop are trained."""
    thought, content = split_thought(template, stripped(template, "assistant", content), last)
    segments = pieces(template.header, [], fill)
    if thought is not None:
        before, after = template.thought
        segments += [Segment(before, True, True), Segment(thought, False, True), Segment(after, True, True)]
    segments.append(Segment(template.answer.replace("{content}", content), False, True))
    segments.append(
        Segment(expand(template.stop, fill), True, True, hidden=not (template.stop_between or last))
    )
    if template.stop_between or last:
        segments += pieces(template.after, [], fill)
    return [segment for segment in segments if segment.text]


def split_thought(template: Template, content: str, last: bool) -> tuple[str | None, str]:
    """Return (thought with its line breaks, or None; answer) for formats with thoughts.

    As in the models' own templates: history loses its thoughts, the last answer has its own or an empty one.
    """
    if not template.thought:
        return None, content
    reasoning, mark, answer = content.rpartition("</think>")
    answer = answer.lstrip("\n") if mark or last else answer
    if not last:
        return None, answer
    reasoning = reasoning.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n")
    return f"\n{reasoning}\n", answer


def render_text(template: Template, messages: Sequence[tuple[str, str]], *, bos: str, eos: str) -> str:
    """Return the rendered conversation as one string."""
    turns = render(template, messages, bos=bos, eos=eos)
    return "".join(s.text for turn in turns for s in turn if not s.hidden)


# ---- export ------------------------------------------------------------------------------------------------


def jinja(template: Template, *, bos: str, eos: str) -> str:
    """Return a Jinja chat template that renders the same text as `render`."""
    fill = {"bos": bos, "eos": eos}
    text = "message['content'] | trim" if "assistant" in template.strip else "message['content']"
    default = "none" if template.default_system is None else quote(template.default_system, fill)
    system = "(system | trim)" if "system" in template.strip else "system"
    stop_first = "true" if template.stop_between else "loop.last"
    lines = [
        "{%- if messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
        f"{{%- else -%}}{{%- set system = {default} -%}}{{%- set turns = messages -%}}{{%- endif -%}}",
        f"{{{{- {quote(template.prefix, fill)} -}}}}",
        f"{{%- set system = '' if system is none else {around(template.system, system, fill)} -%}}",
        "{%- set ns = namespace(last_user=-1) -%}",
        "{%- for message in turns -%}{%- if message['role'] == 'user' -%}",
        "{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}",
        *(["{{- system -}}"] if template.system_in == "own" else []),
        "{%- for message in turns -%}{%- if message['role'] == 'user' -%}",
        f"{{{{- {around(template.user, question_expression(template), fill)} -}}}}",
        "{%- else -%}",
        f"{{%- set text = {text} -%}}",
        *thought_lines(template),
        f"{{{{- {quote(template.header, fill)} + {around(template.answer, 'text', fill)} -}}}}",
        f"{{%- if {stop_first} -%}}{{{{- {quote(template.stop + template.after, fill)} -}}}}{{%- endif -%}}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {quote(template.header, fill)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines)


def quote(text: str, fill: dict[str, str]) -> str:
    """Return a Jinja string literal."""
    escaped = expand(text, fill).replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def around(form: str, value: str, fill: dict[str, str]) -> str:
    """Return the Jinja expression of a form with `value` in the place of {content}."""
    before, _, after = form.partition("{content}")
    return f"{quote(before, fill)} + {value} + {quote(after, fill)}"


def question_expression(template: Template) -> str:
    """Return the Jinja expression of a user message's content."""
    value = "message['content']"
    trim = " | trim" if "user" in template.strip else ""
    if template.system_in == "own":
        return f"({value}{trim})"
    place = "loop.first" if template.system_in == "first_user" else "loop.index0 == ns.last_user"
    return f"(((system if {place} else '') + {value}){trim})"


def thought_lines(template: Template) -> list[str]:
    """Return the Jinja lines that treat thoughts as `split_thought` does."""
    if not template.thought:
        return []
    return [
        "{%- set thought = '' -%}{%- if '</think>' in text -%}",
        "{%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].strip('\\n') -%}",
        "{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}",
        "{%- if loop.last -%}",
        "{%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text.lstrip('\\n') -%}{%- endif -%}",
    ]
