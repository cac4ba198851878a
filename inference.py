"""Talk to a model: a streaming chat, or answers to a file of prompts.

Reads   --base_model (a merged model, or any other), optionally --lora_model on top; --data_file with lines
        {"prompt": …}
Writes  the terminal, or --output_file: the input's fields plus response, finish_reason, num_prompt_tokens,
        num_response_tokens, in input order

    python inference.py --base_model ./final-medgpt-dpo --interactive
    python inference.py --base_model ./final-medgpt-dpo --data_file q.jsonl --output_file a.jsonl

The chat format is the one the model was trained in; one that contradicts it is refused.
"""

import json
import logging
import os
import readline  # noqa: F401  (line editing and history of input())
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt.arguments import cpu_has_fast_bfloat16
from medicalgpt.chat_template import resolve_template
from medicalgpt.checkpoint import PARTIAL
from medicalgpt.data_files import read_rows
from medicalgpt.errors import ConfigError, DataError, run_script
from medicalgpt.flags import parse_arguments, require, require_positive, require_tool_format
from medicalgpt.generation import Answer, Generator, generation_settings
from medicalgpt.model_files import load_config, load_tokenizer, resolve_model_dir
from medicalgpt.modeling import (
    DTYPES,
    config_as_trained,
    context_length,
    load_adapter,
    load_model,
    quantization_config,
)
from medicalgpt.records import Message, require_text
from medicalgpt.run_record import check_base, recorded_template, recorded_tool_format
from medicalgpt.tokenization import ChatEncoder, ChatFormat
from medicalgpt.tool_formats import CHOICES

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

logger = logging.getLogger("medicalgpt")

DEFAULT_CONTEXT = 4096  # tokens, for models that set no limit
WINDOW = 8  # batches that are sorted by length together


@dataclass
class InferenceArguments:
    """What to talk to, how, and about what."""

    base_model: str = field(metadata={"help": "model directory, or a model's name on the hub"})
    lora_model: str | None = field(default=None, metadata={"help": "adapter directory to load on top"})
    tokenizer_path: str | None = field(default=None, metadata={"help": "tokenizer; default: the model's"})
    template_name: str | None = field(
        default=None,
        metadata={"help": "chat format (see template.py); default: the one the model was trained in"},
    )
    tool_format: str | None = field(
        default=None,
        metadata={"help": f"how tools are called: {', '.join(CHOICES)}; default: as the model was trained"},
    )
    force_template: bool = field(
        default=False, metadata={"help": "use --template_name whatever the model says"}
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "system prompt; default: the template's"}
    )
    interactive: bool = field(
        default=False, metadata={"help": "chat; what happens anyway without --data_file"}
    )
    data_file: str | None = field(default=None, metadata={"help": 'lines {"prompt": "…"[, "system": "…"]}'})
    output_file: str | None = field(
        default=None, metadata={"help": "where the answers go, one JSON line each"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace --output_file"})
    batch_size: int = field(default=8, metadata={"help": "prompts answered at a time"})
    max_length: int | None = field(default=None, metadata={"help": "context of prompt and answer, in tokens"})
    max_new_tokens: int = field(default=512, metadata={"help": "limit of an answer, in tokens"})
    do_sample: bool | None = field(default=None, metadata={"help": "False: greedy"})
    temperature: float | None = field(default=None, metadata={"help": "0: greedy"})
    top_p: float | None = field(default=None, metadata={"help": "share of probability that is sampled from"})
    top_k: int | None = field(default=None, metadata={"help": "number of tokens that are sampled from"})
    repetition_penalty: float | None = field(default=None, metadata={"help": "above 1: says things once"})
    seed: int = field(default=42, metadata={"help": "of the sampling"})
    torch_dtype: str = field(default="auto", metadata={"help": "auto, bfloat16, float16 or float32"})
    load_in_4bit: bool = field(default=False, metadata={"help": "nf4 weights"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads are kept"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})

    def __post_init__(self):
        require_tool_format(self.tool_format)
        require_positive(self, "batch_size", "max_length", "max_new_tokens", "top_k")
        require(
            self.torch_dtype in ("auto", *DTYPES),
            f"--torch_dtype {self.torch_dtype} is not allowed; expected auto, {', '.join(DTYPES)}",
        )
        require(
            self.temperature is None or self.temperature >= 0,
            f"--temperature {self.temperature} is not allowed; expected 0 (greedy) or more",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"--top_p {self.top_p} is not allowed; expected more than 0, at most 1",
        )
        require(
            self.repetition_penalty is None or self.repetition_penalty > 0,
            f"--repetition_penalty {self.repetition_penalty} is not allowed; expected more than 0 (1: none)",
        )
        require(not (self.interactive and self.data_file), "--interactive and --data_file exclude each other")
        require(
            (self.data_file is None) == (self.output_file is None),
            "--data_file and --output_file belong together; give both, or neither for a chat",
        )


# ---- the model ---------------------------------------------------------------------------------------------


def compute_dtype(name: str) -> torch.dtype:
    """Return the type to compute in; auto: bfloat16 where the hardware has it."""
    if name != "auto":
        return DTYPES[name]
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if torch.cuda.is_available()
        else cpu_has_fast_bfloat16()
    )
    return torch.bfloat16 if fast else torch.float16 if torch.cuda.is_available() else torch.float32


def load(args: InferenceArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ChatFormat, int]:
    """Return model, tokenizer, chat format and context length."""
    base_dir = resolve_model_dir(
        args.base_model, "--base_model", args.cache_dir, remote_code=args.trust_remote_code
    )
    lora_dir = resolve_model_dir(args.lora_model, "--lora_model", args.cache_dir) if args.lora_model else None
    tokenizer_dir = resolve_model_dir(
        args.tokenizer_path or str(base_dir), "--tokenizer_path", args.cache_dir
    )
    config = load_config(base_dir, trust_remote_code=args.trust_remote_code)
    if lora_dir:
        config = config_as_trained(config, lora_dir)
    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=args.trust_remote_code)
    if lora_dir and not check_base(lora_dir, base_dir):
        logger.warning(
            "warning: %s has no run.json, so only its shapes are checked against the base", lora_dir
        )
    recorded = (recorded_template(lora_dir) if lora_dir else None) or recorded_template(base_dir)
    template = resolve_template(tokenizer, args.template_name, recorded=recorded, force=args.force_template)
    dtype = compute_dtype(args.torch_dtype)
    model = load_model(
        base_dir,
        dtype,
        config=config,
        trust_remote_code=args.trust_remote_code,
        quantization=quantization_config(4 if args.load_in_4bit else None, dtype),
    )
    if lora_dir:
        generation_config = model.generation_config
        model = load_adapter(model, lora_dir)
        model.generation_config = generation_config
    if torch.cuda.is_available() and not args.load_in_4bit:
        model = model.cuda()
    limits = [limit for limit in (args.max_length, context_length(config)) if limit]
    context = min(limits, default=DEFAULT_CONTEXT)
    tool_format = args.tool_format or recorded_tool_format(lora_dir or base_dir)
    return model, tokenizer, ChatFormat.of(template, tokenizer, tool_format), context


# ---- chat --------------------------------------------------------------------------------------------------


class AnswerInterrupt:
    """Ctrl-C ends an answer while one is being written, and the program otherwise."""

    def __init__(self):
        self.answering = False
        self.asked = False
        signal.signal(signal.SIGINT, self.receive)

    def receive(self, *_) -> None:
        """Note the signal, or end the program."""
        if not self.answering:
            raise KeyboardInterrupt
        self.asked = True


def questions() -> Iterator[str]:
    """Yield the lines that a person types or a pipe brings, until its end. Ctrl-C drops a line."""
    while True:
        try:
            line = input("\nQuestion: ") if sys.stdin.isatty() else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            write_now("\n" if sys.stdin.isatty() else "")
            return
        except KeyboardInterrupt:
            write_now("\n")
            continue
        if line.strip():
            yield line


def write_now(text: str) -> None:
    """Write a piece of an answer without waiting for the line's end."""
    sys.stdout.write(text)
    sys.stdout.flush()


def chat(generator: Generator, encoder: ChatEncoder, system_prompt: str | None) -> None:
    """Answer question after question, with history; what outgrows the context loses its oldest turns."""
    system = [Message("system", system_prompt)] if system_prompt is not None else []
    history: list[Message] = []
    interrupt = AnswerInterrupt()
    if sys.stdin.isatty():
        logger.info("Type a question. Ctrl-C ends an answer, Ctrl-D the program.")
    for question in questions():
        history.append(Message("user", question))
        ids, dropped = encoder.encode_prompt([*system, *history])
        if ids is None:
            logger.warning(
                "warning: the question is longer than the context leaves room for; ask a shorter one"
            )
            history.pop()
            continue
        if dropped:
            logger.info("(the oldest %d questions no longer fit and are forgotten)", dropped)
            history = history[2 * dropped :]
        interrupt.answering, interrupt.asked = True, False
        (answer,) = generator.answer([ids], write=write_now, interrupted=lambda: interrupt.asked)
        interrupt.answering = False
        write_now("\n")
        if answer.finish_reason != "stop":
            logger.info(
                "(%s)",
                {"length": "cut at --max_new_tokens", "interrupted": "interrupted"}[answer.finish_reason],
            )
        history.append(Message("assistant", answer.text))


# ---- a file of prompts -------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[tuple[dict, list[Message]]]:
    """Return (row, messages) of every line of --data_file.

    Raises:
        ConfigError: no such file. DataError: a row without prompt.
    """
    if not Path(path).is_file():
        raise ConfigError(f'--data_file {path} does not exist; expected a file of {{"prompt": …}} lines')
    prompts = []
    for row, origin in read_rows(Path(path)):
        messages = [Message("user", require_text(row, "prompt", origin))]
        if row.get("system") is not None:
            messages.insert(0, Message("system", require_text(row, "system", origin, may_be_empty=True)))
        prompts.append((row, messages))
    if not prompts:
        raise DataError(f"--data_file {path} holds no prompt")
    return prompts


def answer_file(
    args: InferenceArguments,
    prompts: list[tuple[dict, list[Message]]],
    generator: Generator,
    encoder: ChatEncoder,
) -> None:
    """Answer all prompts, window by window: sorted by length inside a window, written in input order."""
    system = [Message("system", args.system_prompt)] if args.system_prompt is not None else []
    size = WINDOW * args.batch_size
    unfinished = Path(args.output_file + PARTIAL)
    with (
        open(unfinished, "w", encoding="utf-8") as file,
        tqdm(total=len(prompts), unit="prompt", file=sys.stderr, desc="answering") as bar,
    ):
        for begin in range(0, len(prompts), size):
            window = prompts[begin : begin + size]
            encoded = [
                encoder.encode_prompt(messages if messages[0].role == "system" else [*system, *messages])[0]
                for _, messages in window
            ]
            answers: list[Answer | None] = [None] * len(window)
            order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: len(encoded[i]))
            for start in range(0, len(order), args.batch_size):
                chosen = order[start : start + args.batch_size]
                for i, answer in zip(chosen, generator.answer([encoded[i] for i in chosen]), strict=True):
                    answers[i] = answer
                bar.update(len(chosen))
            for (row, _), answer in zip(window, answers, strict=True):
                file.write(
                    json.dumps(row | answer_fields(answer, encoder.max_length), ensure_ascii=False) + "\n"
                )
            file.flush()
            bar.update(len(window) - len(order))  # prompts that do not fit
    os.replace(unfinished, args.output_file)


def answer_fields(answer: Answer | None, limit: int) -> dict:
    """Return what an answer adds to its row."""
    if answer is None:
        return {
            "response": None,
            "finish_reason": "error",
            "error": f"the prompt is longer than {limit} tokens",
        }
    return {
        "response": answer.text,
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_response_tokens": answer.num_response_tokens,
    }


def check_output(args: InferenceArguments) -> None:
    """Refuse an output file that cannot be written, before a model is loaded."""
    output = Path(args.output_file)
    require(not output.is_dir(), f"--output_file {output} is a directory; expected a file's name")
    require(output.parent.is_dir(), f"--output_file {output}: the directory {output.parent} does not exist")
    require(
        os.access(output.parent, os.W_OK), f"--output_file {output}: {output.parent} cannot be written to"
    )
    require(
        output.resolve() != Path(args.data_file).resolve(),
        f"--output_file {output} is --data_file itself; use another name",
    )
    require(
        not output.exists() or args.overwrite,
        f"--output_file {output} exists; use another name or --overwrite True",
    )


def main(argv: list[str]) -> None:
    """Chat, or answer a file."""
    # 1. Flags and prompts
    (args,) = parse_arguments(argv, (InferenceArguments,), __doc__, {})
    if args.output_file:
        check_output(args)
    prompts = read_prompts(args.data_file) if args.data_file else None

    # 2. Model
    model, tokenizer, chat_format, context = load(args)
    room = context - args.max_new_tokens
    require(
        room >= 8,
        f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in a context of {context} "
        "tokens; lower it",
    )
    flags = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    generator = Generator(
        model,
        tokenizer,
        chat_format,
        generation_settings(model, {name: getattr(args, name) for name in flags}),
    )
    encoder = ChatEncoder(tokenizer, chat_format, max_length=room)
    set_seed(args.seed)
    logger.info(
        "model=%s template=%s %s",
        args.base_model,
        chat_format.template.name,
        " ".join(f"{name}={value}" for name, value in sorted(generator.settings.items())),
    )

    # 3. Talk
    if prompts is None:
        chat(generator, encoder, args.system_prompt)
    else:
        answer_file(args, prompts, generator, encoder)
        logger.info("complete: %s (%d answers)", args.output_file, len(prompts))


if __name__ == "__main__":
    run_script(main)
