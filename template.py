"""Chat templates as data: which text surrounds a system prompt, a question and an answer, and what ends one.

    TEMPLATES["qwen"]                        → Template, a few lines each
    medicalgpt.rendering.render(template, …) → segments (text, marker or content, trained or not)

This is the only place that knows role markers, separators, stop strings and default system prompts. Standard
library only. `{content}` in a piece stands for the message, `{bos}` and `{eos}` for the tokenizer's own
tokens, `{round}` for the number of the question, `{environment}` for what a format says when tools are offered. What each was checked against: docs/templates.md.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class ToolCall(NamedTuple):
    """A call that an assistant makes; `arguments` is JSON text, `id` is what its result refers to."""

    name: str
    arguments: str
    id: str = ""


class Message(NamedTuple):
    """One message; `role` is system, user, assistant or observation (what a tool gave back).

    An assistant's message may hold `calls`; an observation may name the call it answers in `call_id`.
    """

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""


class Segment(NamedTuple):
    """A stretch of text with one origin.

    A `hidden` stop is not part of the text: the model must predict it where the next segment begins
    (chatglm3, baichuan2, whose conversations carry no stop token between turns).
    """

    text: str
    is_marker: bool
    trained: bool
    hidden: bool = False


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
        end: what follows the last answer of a finished conversation; not trained.
        prefix: begins the conversation.
        system: a system prompt with what stands around it; goes where `system_in` says. None: the format has
            no place for one.
        default_system: the system prompt of a conversation that has none (None: nothing at all).
        no_system: what stands in the place of prefix and system prompt where there is none, if it is neither
            nothing nor a default system prompt.
        system_in: "own" turn, or inside the "first_user" or "last_user" message.
        empty_system: False when an empty system prompt counts as none.
        strip: roles whose content loses surrounding white space, as in the official format;
            "user_with_system": the two as one text.
        stop_between: False when the text carries no stop token between turns (a hidden stop is trained).
        lone: (user, header) of a conversation of one question, where they differ.
        last_header: the header of the last answer, where it differs; only that answer is trained.
        past_header: the header of answers to earlier questions, where it differs.
        first_round: what {round} counts from.
        thought: what stands around the thought of an answer to the last question; history has no thoughts.
        prompt_thought: what of the thought the prompt holds: "" nothing, "open" its beginning, "empty" an
            empty one (the answer then has none).
        observation: what a tool gave back, with what stands around it; None: it comes as a user message.
        tool_format: how tools are offered and called, see medicalgpt/tools.py.
        call_stop: what ends a call, where it is not what ends an answer.
        stop_strings: further strings that end an answer at generation.
        bos_as_tokenizer: BOS is no part of the text; it comes first where the tokenizer itself adds it.
        variants: other models' values of some attributes; a model gets what its own chat template has.
        options: what the model's own chat template takes to render this format.
    """

    name: str
    source: str
    user: str
    header: str
    stop: str
    answer: str = "{content}"
    after: str = ""
    end: str = ""
    prefix: str = ""
    system: str | None = "{content}"
    default_system: str | None = None
    no_system: str | None = None
    system_in: str = "own"
    empty_system: bool = True
    strip: frozenset[str] = frozenset()
    stop_between: bool = True
    lone: tuple[str, str] | None = None
    last_header: str | None = None
    past_header: str | None = None
    first_round: int = 1
    thought: tuple[str, str] = ()
    prompt_thought: str = ""
    observation: str | None = None
    tool_format: str = "default"
    call_stop: str | None = None
    stop_strings: tuple[str, ...] = ()
    bos_as_tokenizer: bool = False
    variants: tuple[dict, ...] = ()
    options: dict = field(default_factory=dict)

    def stops(self, eos: str) -> tuple[str, ...]:
        """Return every string that ends an answer; the trained one first."""
        return (self.stop.replace("{eos}", eos), *self.stop_strings)


CHATML = {
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "header": "<|im_start|>assistant\n",
    "stop": "<|im_end|>",
    "after": "\n",
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
}
QWEN = CHATML | {"stop_strings": ("<|endoftext|>",), "tool_format": "qwen"}
QWEN3 = QWEN | {"thought": ("<think>\n", "\n</think>\n\n")}
EVERY_ROLE = frozenset({"system", "user", "assistant"})
QWEN3_5 = QWEN3 | {"strip": EVERY_ROLE, "tool_format": "qwen3_5"}
HUMAN = {"user": "Human: {content}\n\n", "header": "Assistant: ", "stop": "{eos}", "bos_as_tokenizer": True}
CURIOUS = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)
LLAMA2 = {
    "system": "<<SYS>>\n{content}\n<</SYS>>\n\n",
    "system_in": "first_user",
    "user": "{bos}[INST] {content} [/INST]",
    "header": "",
    "answer": " {content} ",
    "stop": "{eos}",
    "strip": frozenset({"system", "user_with_system", "assistant"}),
}
GLM = {
    "header": "<|assistant|>",
    "answer": "\n{content}",
    "stop_between": False,
    "tool_format": "glm4",
}

TEMPLATES = {
    template.name: template
    for template in [
        Template(
            name="base",
            source="no markers at all: a base model continues the question, its EOS ends the answer",
            user="{content}",
            header="",
            stop="{eos}",
            bos_as_tokenizer=True,
        ),
        Template(
            name="vicuna",
            source="lm-sys/FastChat fastchat/conversation.py vicuna_v1.1",
            system="{content} ",
            default_system=CURIOUS.format("user", "user"),
            user="USER: {content} ",
            header="ASSISTANT:",
            answer=" {content}",
            stop="{eos}",
            bos_as_tokenizer=True,
        ),
        Template(
            name="alpaca",
            source="tatsu-lab/stanford_alpaca train.py PROMPT_DICT prompt_no_input",
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
            variants=(
                {"default_system": "You are a helpful assistant."},  # the base models, Qwen1.5, Qwen2
                {
                    "default_system": "You are a helpful assistant.",
                    "user": "<|im_start|>user\n{content}<|im_end|>",
                    "after": "",
                    "tool_format": "default",
                },  # Qwen-7B-Chat
            ),
            **QWEN,
        ),
        Template(name="qwen3", source="Qwen/Qwen3-0.6B tokenizer_config.json", **QWEN3),
        Template(
            name="qwen3_nothink",
            source="Qwen/Qwen3-0.6B tokenizer_config.json with enable_thinking=False",
            prompt_thought="empty",
            variants=({"thought": (), "prompt_thought": "", "options": {}},),  # Qwen3-4B-Instruct-2507
            options={"enable_thinking": False},
            **QWEN3,
        ),
        Template(
            name="qwen3_5",
            source="Qwen/Qwen3.5-27B tokenizer_config.json, enable_thinking=True",
            prompt_thought="open",
            options={"enable_thinking": True},
            **QWEN3_5,
        ),
        Template(
            name="qwen3_5_nothink",
            source="Qwen/Qwen3.5-0.8B tokenizer_config.json, enable_thinking=False",
            prompt_thought="empty",
            options={"enable_thinking": False},
            **QWEN3_5,
        ),
        Template(name="llama2", source="meta-llama/Llama-2-7b-chat-hf tokenizer_config.json", **LLAMA2),
        Template(
            name="llama2-zh",
            source="ymcui/Chinese-LLaMA-Alpaca-2 scripts/inference/inference_hf.py TEMPLATE",
            default_system="You are a helpful assistant. 你是一个乐于助人的助手。",
            **LLAMA2,
        ),
        Template(
            name="llama3",
            source="meta-llama/Meta-Llama-3-8B-Instruct tokenizer_config.json",
            prefix="{bos}",
            system="<|start_header_id|>system<|end_header_id|>\n\n{environment}{content}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
            header="<|start_header_id|>assistant<|end_header_id|>\n\n",
            stop="<|eot_id|>",
            strip=EVERY_ROLE,
            observation="<|start_header_id|>ipython<|end_header_id|>\n\n{content}<|eot_id|>",
            tool_format="llama3",
            stop_strings=("<|end_of_text|>", "<|eom_id|>"),
            variants=(
                {  # Llama 3.1 to 3.3
                    "system": "<|start_header_id|>system<|end_header_id|>\n\n{environment}Cutting Knowledge Date: December "
                    "2023\nToday Date: 26 Jul 2024\n\n{content}<|eot_id|>",
                    "default_system": "",
                },
            ),
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
            observation="{content}",
            tool_format="mistral",
            variants=(
                {
                    "system_in": "first_user",
                    "user": " [INST] {content} [/INST]",
                    "strip": frozenset(),
                    "tool_format": "default",
                    "observation": None,
                },  # v0.1, v0.2
                {
                    "user": "[INST]{content}[/INST]",
                    "answer": "{content}",
                    "strip": frozenset(),
                    "tool_format": "mistral_nemo",
                },  # Nemo, Large
            ),
        ),
        Template(
            name="baichuan",
            source="baichuan-inc/Baichuan-13B-Chat modeling_baichuan.py _build_chat_input",
            user="<reserved_102>{content}",
            header="<reserved_103>",
            stop="{eos}",
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
            name="chatglm",
            source="THUDM/chatglm-6b modeling_chatglm.py chat and ptuning/main.py",
            lone=("{content}", "[gMASK]<sop>"),
            user="[Round {round}]\n问：{content}\n",
            header="答：",
            last_header="答：[gMASK]<sop>",
            first_round=0,
            stop="{eos}",
            after="\n",
            stop_between=False,
        ),
        Template(
            name="chatglm2",
            source="THUDM/chatglm2-6b tokenization_chatglm.py build_prompt",
            prefix="[gMASK]sop",
            user="[Round {round}]\n\n问：{content}\n\n",
            header="答：",
            stop="{eos}",
            after="\n\n",
            stop_between=False,
        ),
        Template(
            name="chatglm3",
            source="THUDM/chatglm3-6b tokenization_chatglm.py build_single_message",
            prefix="[gMASK]sop",
            system="<|system|>\n {content}",
            user="<|user|>\n {content}",
            observation="<|observation|>\n {content}",
            stop="{eos}",
            stop_strings=("<|user|>", "<|observation|>"),
            **(GLM | {"answer": "\n {content}"}),
        ),
        Template(
            name="glm4",
            source="THUDM/glm-4-9b-chat and GLM-4-9B-0414 tokenizer_config.json; stop: finetune_demo/finetune.py",
            prefix="[gMASK]<sop>",
            system="<|system|>\n{content}",
            user="<|user|>\n{content}",
            observation="<|observation|>\n{content}",
            stop="<|user|>",
            call_stop="<|observation|>",
            stop_strings=("<|observation|>", "<|endoftext|>"),
            variants=({"tool_format": "glm4_0414"},),
            **GLM,
        ),
        Template(
            name="yi",
            source="01-ai/Yi-6B-Chat tokenizer_config.json",
            stop_strings=("<|endoftext|>",),
            variants=({"system": "{content}"},),  # Yi-1.5
            **CHATML,
        ),
        Template(
            name="intern",
            source="internlm/internlm-chat-7b modeling_internlm.py build_inputs",
            user="<|User|>:{content}<eoh>\n",
            header="<|Bot|>:",
            stop="<eoa>",
            after="\n",
            system="<|System|>:{content}\n",
            bos_as_tokenizer=True,
        ),
        Template(
            name="intern2",
            source="internlm/internlm2-chat-7b and internlm3-8b-instruct tokenizer_config.json",
            prefix="{bos}",
            **CHATML,
        ),
        Template(
            name="deepseek",
            source="deepseek-ai/deepseek-llm-7b-chat and DeepSeek-V2-Chat tokenizer_config.json",
            prefix="{bos}",
            system="{content}\n\n",
            user="User: {content}\n\n",
            header="Assistant:",
            answer=" {content}",
            stop="{eos}",
        ),
        Template(
            name="deepseek3",
            source="deepseek-ai/DeepSeek-V3-0324 and DeepSeek-V2.5 tokenizer_config.json",
            prefix="{bos}",
            user="<｜User｜>{content}",
            header="<｜Assistant｜>",
            stop="{eos}",
        ),
        Template(
            name="deepseekcoder",
            source="deepseek-ai/deepseek-coder-6.7b-instruct tokenizer_config.json",
            prefix="{bos}",
            default_system="You are an AI programming assistant, utilizing the Deepseek Coder model, developed by "
            "Deepseek Company, and you only answer questions related to computer science. For politically sensitive "
            "questions, security and privacy issues, and other non-computer science questions, you will refuse to "
            "answer\n",
            user="### Instruction:\n{content}\n",
            header="### Response:\n",
            answer="{content}\n",
            stop="<|EOT|>",
            after="\n",
        ),
        Template(
            name="xverse",
            source="xverse/XVERSE-7B-Chat modeling_xverse.py _build_chat_input",
            system="{content}\n\n",
            **HUMAN,
        ),
        Template(
            name="orion",
            source="OrionStarAI/Orion-14B-Chat tokenizer_config.json",
            prefix="{bos}",
            system=None,
            user="Human: {content}\n\n",
            header="Assistant: {eos}",
            stop="{eos}",
        ),
        Template(
            name="cohere",
            source="CohereForAI/aya-23-8B tokenizer_config.json",
            prefix="{bos}",
            system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
            user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
            header="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            stop="<|END_OF_TURN_TOKEN|>",
            strip=frozenset({"user", "assistant"}),
        ),
        Template(
            name="ziya",
            source="IDEA-CCNL/Ziya-LLaMA-13B-v1 README usage",
            system="{content}\n",
            user="<human>:{content}\n",
            header="<bot>:",
            stop="{eos}",
            after="\n",
            strip=frozenset({"user"}),
            bos_as_tokenizer=True,
        ),
        Template(
            name="linly",
            source="CVI-SZU/Linly ChatFlow prompt",
            system="{content}\n",
            user="User: {content}\n",
            header="Bot: ",
            stop="{eos}",
            after="\n",
            bos_as_tokenizer=True,
        ),
        Template(
            name="belle",
            source="LianjiaTech/BELLE, in the form of FastChat and LLaMA-Factory",
            system="{content}\n\n",
            after="\n\n",
            **(HUMAN | {"header": "Belle: "}),
        ),
        Template(
            name="phoenix",
            source="FreedomIntelligence/LLMZoo; lm-sys/FastChat SeparatorStyle.PHOENIX",
            system="{content}\n\n",
            default_system=CURIOUS.format("human", "human"),
            user="Human: {bos}{content}{eos}",
            header="Assistant: {bos}",
            stop="{eos}",
        ),
        Template(
            name="aquila",
            source="lm-sys/FastChat fastchat/conversation.py aquila-chat",
            system="{content}###",
            default_system=CURIOUS.format("human", "human"),
            user="Human: {content}###",
            header="Assistant:",
            answer=" {content}",
            stop="{eos}",
            after="###",
            stop_between=False,
            stop_strings=("###",),
            bos_as_tokenizer=True,
        ),
        Template(
            name="starchat",
            source="HuggingFaceH4/starchat-beta dialogue_template.json",
            system="<|system|>\n{content}<|end|>\n",
            default_system="",
            user="<|user|>\n{content}<|end|>\n",
            header="<|assistant|>\n",
            stop="<|end|>",
            after="\n",
            stop_strings=("<|endoftext|>",),
        ),
        Template(
            name="gemma",
            source="google/gemma-3-1b-it tokenizer_config.json; gemma 1 and 2 have no system prompt",
            prefix="{bos}",
            system="{content}\n\n",
            system_in="first_user",
            user="<start_of_turn>user\n{content}<end_of_turn>\n",
            header="<start_of_turn>model\n",
            stop="<end_of_turn>",
            after="\n",
            strip=frozenset({"user", "assistant"}),
            stop_strings=("<eos>",),
        ),
        Template(
            name="phi3",
            source="microsoft/Phi-3-mini-4k-instruct tokenizer_config.json",
            system="<|system|>\n{content}<|end|>\n",
            user="<|user|>\n{content}<|end|>\n",
            header="<|assistant|>\n",
            stop="<|end|>",
            after="\n",
            end="{eos}",
            stop_strings=("<|endoftext|>",),
            variants=({"empty_system": False},),  # Phi-3.5
        ),
        Template(
            name="minicpm",
            source="openbmb/MiniCPM-2B-sft-bf16 tokenizer_config.json; stop: OpenBMB/MiniCPM finetune/finetune.py",
            user="<用户>{content}",
            header="<AI>",
            stop="{eos}",
            stop_between=False,
            strip=EVERY_ROLE,
            bos_as_tokenizer=True,
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
