"""Talk to a model: a streaming chat, or answers to a file of prompts.

Reads   --base_model (a merged model, or any other), optionally --lora_model on top and --compare; --data_file
        with lines {"prompt": …}, conversations, or plain text
Writes  the terminal, or --output_file: the input's fields plus response, finish_reason, num_prompt_tokens,
        num_response_tokens, in input order

    python inference.py --base_model ./final-medgpt-dpo --interactive
    python inference.py --base_model ./final-medgpt-dpo --data_file q.jsonl --output_file a.jsonl
    torchrun --nproc_per_node 2 inference.py --base_model … --data_file q.jsonl --output_file a.jsonl

The chat format is the one the model was trained in; one that contradicts it is refused.
"""

import logging
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from medicalgpt.answer_file import (
    FileAnswerer,
    OutputFile,
    Prompt,
    Ranks,
    Speaker,
    read_prompts,
)
from medicalgpt.arguments import cpu_has_fast_bfloat16
from medicalgpt.chat_session import LEAST_PROMPT, Ended, Refused, Session, check_params
from medicalgpt.chat_template import resolve_template, warn_of_plain_roles
from medicalgpt.checkpoint import fingerprint, sha256
from medicalgpt.errors import run_script
from medicalgpt.flags import parse_arguments, require, require_positive, require_tool_format
from medicalgpt.generation import Generator, generation_settings
from medicalgpt.model_files import load_config, load_tokenizer, resolve_model_dir
from medicalgpt.modeling import (
    DTYPES,
    config_as_trained,
    context_length,
    load_adapter,
    load_model,
    quantization_config,
)
from medicalgpt.run_record import check_base, recorded_template, recorded_tool_format, versions
from medicalgpt.terminal import AnswerInterrupt, Screen, is_rich, lines
from medicalgpt.tokenization import ChatEncoder, ChatFormat
from medicalgpt.tool_formats import CHOICES

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("medicalgpt")

DEFAULT_CONTEXT = 4096  # tokens, for models that set no limit
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
# What the answers do not depend on.
NEUTRAL_FLAGS = {
    "output_file",
    "overwrite",
    "data_file",
    "cache_dir",
    "interactive",
    "base_model",
    "lora_model",
    "compare",
}


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
    data_file: str | None = field(
        default=None,
        metadata={"help": '.jsonl or .json of {"prompt": "…"} or conversations, or .txt, a prompt a line'},
    )
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
    num_return_sequences: int = field(default=1, metadata={"help": "answers per prompt of --data_file"})
    compare: str | None = field(
        default=None, metadata={"help": "model or adapter directory that answers every question as well"}
    )
    seed: int = field(default=42, metadata={"help": "of the sampling"})
    torch_dtype: str = field(default="auto", metadata={"help": "auto, bfloat16, float16 or float32"})
    load_in_4bit: bool = field(default=False, metadata={"help": "nf4 weights"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads are kept"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})

    def __post_init__(self):
        require_tool_format(self.tool_format)
        require_positive(self, "batch_size", "max_length", "num_return_sequences")
        check_params({name: getattr(self, name) for name in SAMPLING})
        require(
            self.torch_dtype in ("auto", *DTYPES),
            f"--torch_dtype {self.torch_dtype} is not allowed; expected auto, {', '.join(DTYPES)}",
        )
        greedy = self.do_sample is False or self.temperature == 0
        require(
            self.num_return_sequences == 1 or (self.data_file and not greedy),
            f"--num_return_sequences {self.num_return_sequences} needs --data_file and sampling; greedy "
            "answers are all the same",
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


def is_adapter(path: str | None) -> bool:
    """True when a directory holds an adapter."""
    return path is not None and (Path(path) / "adapter_config.json").is_file()


@dataclass(frozen=True)
class Place:
    """Where a model stands.

    Attributes:
        lora_dir: the adapter on top, or None.
    """

    base_dir: Path
    lora_dir: Path | None

    @property
    def fingerprints(self) -> str:
        """What tells this model from any other."""
        return f"{fingerprint(self.base_dir)}+{fingerprint(self.lora_dir) if self.lora_dir else 'none'}"


def find(args: InferenceArguments, base: str, lora: str | None) -> Place:
    """Return where a model and its adapter stand, checked against each other."""
    base_dir = resolve_model_dir(base, "--base_model", args.cache_dir, remote_code=args.trust_remote_code)
    lora_dir = resolve_model_dir(lora, "--lora_model", args.cache_dir) if lora else None
    if lora_dir and not check_base(lora_dir, base_dir):
        logger.warning(
            "warning: %s has no run.json, so only its shapes are checked against the base", lora_dir
        )
    return Place(base_dir, lora_dir)


def places(args: InferenceArguments) -> list[Place]:
    """Return the models that answer: one, or two with --compare."""
    found = [find(args, args.base_model, args.lora_model)]
    if args.compare:
        adapter = is_adapter(args.compare)
        found.append(
            find(args, args.base_model if adapter else args.compare, args.compare if adapter else None)
        )
    return found


def load(
    args: InferenceArguments, place: Place
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ChatFormat, int]:
    """Return model, tokenizer, chat format and context length."""
    base_dir, lora_dir = place.base_dir, place.lora_dir
    tokenizer_dir = resolve_model_dir(
        args.tokenizer_path or str(base_dir), "--tokenizer_path", args.cache_dir
    )
    config = load_config(base_dir, trust_remote_code=args.trust_remote_code)
    if lora_dir:
        config = config_as_trained(config, lora_dir)
    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=args.trust_remote_code)
    recorded = (recorded_template(lora_dir) if lora_dir else None) or recorded_template(base_dir)
    template = resolve_template(tokenizer, args.template_name, recorded=recorded, force=args.force_template)
    tool_format = args.tool_format or recorded_tool_format(lora_dir or base_dir)
    chat_format = ChatFormat.of(template, tokenizer, tool_format)
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
    return model, tokenizer, chat_format, min(limits, default=DEFAULT_CONTEXT)


def speaker(args: InferenceArguments, place: Place, suffix: str) -> Speaker:
    """Load a model and make it answer."""
    model, tokenizer, chat_format, context = load(args, place)
    room = context - args.max_new_tokens
    require(
        room >= LEAST_PROMPT,
        f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in a context of {context} "
        "tokens; lower it",
    )
    settings = generation_settings(model, {name: getattr(args, name) for name in SAMPLING})
    logger.info(
        "model=%s template=%s %s",
        place.lora_dir or place.base_dir,
        chat_format.template.name,
        " ".join(f"{name}={value}" for name, value in sorted(settings.items())),
    )
    warn_of_plain_roles(tokenizer, chat_format)
    generator = Generator(model, tokenizer, chat_format, settings)
    return Speaker(generator, ChatEncoder(tokenizer, chat_format, max_length=room), suffix)


# ---- chat --------------------------------------------------------------------------------------------------


def chat(args: InferenceArguments, speakers: list[Speaker], names: list[str]) -> None:
    """Answer question after question, with history; carry out commands between them."""
    interrupt = AnswerInterrupt()
    talks = []
    for one in speakers:
        opens = one.generator.template.prompt_thought == "open"
        screen = Screen(dims=is_rich() and "NO_COLOR" not in os.environ, opens=opens)
        session = Session(
            one.generator,
            one.encoder,
            write=screen.write,
            notice=logger.info,
            interrupted=interrupt.is_asked,
            system=args.system_prompt,
        )
        talks.append((session, screen))
    if sys.stdin.isatty():
        logger.info("Type a question, or /help. Ctrl-C ends an answer, Ctrl-D the program.")
    for line in lines():
        interrupt.answering, interrupt.asked = True, False
        try:
            for (session, screen), name in zip(talks, names, strict=True):
                if len(talks) > 1:
                    screen.out(f"[{name}]\n")
                say(session, screen, line)
        except Ended:
            return
        finally:
            interrupt.answering = False


def say(session: Session, screen: Screen, line: str) -> None:
    """Put a line to one model."""
    screen.begin()
    try:
        if line.startswith("/") and not line.startswith("//"):
            session.command(line)
        else:
            session.ask(line.removeprefix("/") if line.startswith("//") else line)
    except Refused as error:
        logger.warning("warning: %s", error)
    finally:
        screen.end()


# ---- a file of prompts -------------------------------------------------------------------------------------


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


def output_of(args: InferenceArguments, models: list[Place]) -> OutputFile:
    """Return the output file with what its answers depend on."""
    flags = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in NEUTRAL_FLAGS}
    identity = {"input": sha256(Path(args.data_file))} | {f"--{k}": v for k, v in flags.items()}
    identity |= {f"model {number}": place.fingerprints for number, place in enumerate(models, 1)}
    return OutputFile(Path(args.output_file), identity | versions())


def join_ranks() -> Ranks:
    """Return this process's place among those that torchrun started."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo")
    return Ranks(torch.distributed.get_rank(), world_size)


def answer_file(args: InferenceArguments, prompts: list[Prompt], models: list[Place]) -> None:
    """Answer all prompts, from where an earlier run was stopped."""
    ranks = join_ranks()
    output = output_of(args, models)
    done = [output.begin(args.overwrite) if ranks.rank == 0 else 0]
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(done)
    if done[0]:
        logger.info("continuing behind %d answers", done[0])
    speakers = [speaker(args, place, "_compare" * number) for number, place in enumerate(models)]
    answerer = FileAnswerer(speakers, args.batch_size, args.num_return_sequences, args.seed, ranks)
    answerer.answer_file(prompts, output if ranks.rank == 0 else None, done[0])
    if ranks.rank == 0:
        output.finish()
        logger.info("complete: %s (%d answers)", args.output_file, len(prompts))
    if ranks.world_size > 1:
        torch.distributed.destroy_process_group()


def main(argv: list[str]) -> None:
    """Chat, or answer a file."""
    # 1. Flags and prompts
    (args,) = parse_arguments(argv, (InferenceArguments,), __doc__, {})
    if args.output_file:
        check_output(args)
    prompts = read_prompts(Path(args.data_file), args.system_prompt) if args.data_file else None
    models = places(args)

    # 2. Talk
    if prompts is not None:
        answer_file(args, prompts, models)
        return
    torch.manual_seed(args.seed)
    speakers = [speaker(args, place, "") for place in models]
    chat(args, speakers, [args.lora_model or args.base_model, args.compare][: len(speakers)])


if __name__ == "__main__":
    run_script(main)
