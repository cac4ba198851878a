"""A trained reward model at work: prompts and answers in, scores out.

A score file has a line per answer,

    {"question", "answer"[, "system", "history"]} or a conversation that ends with an answer

and `--output_file` repeats each line with its "score"; null where the question alone is too long.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medicalgpt.chat_template import resolve_template
from medicalgpt.checkpoint import PARTIAL, fsync
from medicalgpt.collator import FlatCollator, example_length, on_device
from medicalgpt.data_files import read_rows
from medicalgpt.engine import FlatScorer
from medicalgpt.errors import DataError, ModelError
from medicalgpt.flags import require, require_positive
from medicalgpt.json_values import field_names
from medicalgpt.model_files import adapter_settings, load_config, load_tokenizer, resolve_model_dir
from medicalgpt.modeling import config_as_trained, has_score_head, load_adapter, load_base
from medicalgpt.probe import choose_rows
from medicalgpt.records import Message, Pair, parse_chat, parse_prompt, require_text
from medicalgpt.row_log import RowLog
from medicalgpt.run_record import check_base, recorded_template, recorded_tool_format
from medicalgpt.tokenization import ChatEncoder, ChatFormat

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("medicalgpt")

ANSWER_FIELDS = ("answer", "response", "output")
PROBE = (Message("system", "a"), Message("user", "b"), Message("assistant", "c"))


def separate_pad_token(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> None:
    """Give the tokenizer a padding token that ends no answer.

    transformers reads a score at the last token that is not padding. Were the stop token the padding token,
    it would read the score before the stop, where no score was trained.

    Raises:
        ModelError: the tokenizer has no control token left for it.
    """
    ends = {tokenizer.eos_token_id, *chat_format.stop_ids(tokenizer)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    text = "".join(segment.text for turn in chat_format.render(PROBE) for segment in turn)
    special = {token: i for token, i in tokenizer.get_added_vocab().items() if token.strip()}
    if tokenizer.unk_token is not None:
        special[tokenizer.unk_token] = tokenizer.unk_token_id
    free = [token for token, i in special.items() if i not in ends and token not in text]
    if not free:
        raise ModelError(
            f"{tokenizer.name_or_path}: its padding token {tokenizer.pad_token!r} also ends answers, and no "
            "other control token is free; add one to the tokenizer and the model"
        )
    tokenizer.pad_token = min(free, key=lambda token: ("pad" not in token.lower(), special[token]))


class Judge:
    """A reward model with its own tokenizer and chat format.

    Args:
        max_length: limit of prompt and answer, in tokens; the oldest turns go first.
    """

    def __init__(
        self,
        model: FlatScorer,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        max_length: int,
    ):
        self.model = model.eval()
        self.encoder = ChatEncoder(tokenizer, chat_format, max_length=max_length)

    def encode(self, answers: Sequence[Pair]) -> list[dict | None]:
        """Return each prompt with its chosen answer as ids, the very ids of training.

        None where the question leaves no room for an answer.
        """
        sides = [(*answer.prompt, answer.chosen) for answer in answers]
        turns = self.encoder.encode_turns(sides, [answer.tools for answer in answers])
        examples = []
        for answer, side, turn in zip(answers, sides, turns, strict=True):
            pair = self.encoder.fit_pair(answer, [side, side], [turn, turn], RowLog())
            if pair is not None:
                ids = np.concatenate([pair["prompt_ids"], pair["chosen_ids"]])
                pair = {"input_ids": ids, "labels": ids, "lengths": [len(ids)]}
            examples.append(pair)
        return examples

    @torch.no_grad()
    def score(
        self, answers: Sequence[Pair], batch_size: int, *, progress: bool = False
    ) -> list[float | None]:
        """Return the score of every chosen answer, None where its question is too long.

        Args:
            batch_size: answers per step; those of like length go together.
        """
        examples = self.encode(answers)
        order = sorted(
            (i for i, example in enumerate(examples) if example is not None),
            key=lambda i: example_length(examples[i]),
        )
        scores: list[float | None] = [None] * len(examples)
        collate = FlatCollator(padded=self.model.padded)
        for begin in tqdm(range(0, len(order), batch_size), "scoring", disable=not progress):
            places = order[begin : begin + batch_size]
            batch = on_device(collate([examples[i] for i in places]), self.model.lm.device)
            for place, score in zip(places, self.model(**batch).tolist(), strict=True):
                scores[place] = score
        return scores


# ---- loading -----------------------------------------------------------------------------------------------


@dataclass
class JudgeArguments:
    """Which reward model scores what."""

    model_name_or_path: str = field(
        metadata={"help": "merged reward model, or the base of the adapter in --peft_path"}
    )
    score_file: str = field(metadata={"help": ".jsonl or .json file of questions with answers to score"})
    output_file: str | None = field(
        default=None, metadata={"help": "scored lines; default: the file's name with .scored.jsonl"}
    )
    peft_path: str | None = field(default=None, metadata={"help": "adapter of a reward model"})
    template_name: str | None = field(
        default=None, metadata={"help": "chat format; default: the one that the model was trained with"}
    )
    force_template: bool = field(
        default=False, metadata={"help": "use --template_name whatever the model says"}
    )
    model_max_length: int = field(default=2048, metadata={"help": "limit of prompt and answer, in tokens"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "answers per step"})
    cache_dir: str | None = field(default=None, metadata={"help": "where downloads are kept"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})

    def __post_init__(self):
        require_positive(self, "per_device_eval_batch_size")
        require(
            self.model_max_length >= 8,
            f"--model_max_length {self.model_max_length} is not allowed; expected 8 or more",
        )


def load_judge(
    directory: Path,
    adapter: Path | None,
    *,
    template_name: str | None = None,
    force_template: bool = False,
    max_length: int = 2048,
    trust_remote_code: bool = False,
) -> Judge:
    """Load a merged reward model, or a base with the adapter of one.

    Raises:
        ModelError: there is no score head, or the adapter belongs to another base.
    """
    check_is_reward_model(directory, adapter, trust_remote_code=trust_remote_code)
    config = load_config(directory, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    source = adapter or directory
    template = resolve_template(
        tokenizer, template_name, recorded=recorded_template(source), force=force_template
    )
    chat_format = ChatFormat.of(template, tokenizer, recorded_tool_format(source))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if adapter is not None:
        config = config_as_trained(config, adapter)
    lm = load_base(directory, config, dtype, trust_remote_code=trust_remote_code, scores=True)
    if adapter is not None:
        lm = load_adapter(lm, adapter)
    model = FlatScorer(lm).to("cuda" if torch.cuda.is_available() else "cpu")
    choose_rows(model)
    return Judge(model, tokenizer, chat_format, max_length)


def check_is_reward_model(directory: Path, adapter: Path | None, *, trust_remote_code: bool = False) -> None:
    """Refuse what has no score head, before weights are loaded.

    Raises:
        ModelError: says what it is instead.
    """
    config = load_config(directory, trust_remote_code=trust_remote_code)
    if adapter is None:
        if not has_score_head(config):
            raise ModelError(
                f"{directory} is {(config.architectures or ['a model'])[0]}, which has no score head; give a "
                "merged reward model, or a reward model's adapter as --peft_path"
            )
        return
    task = adapter_settings(adapter).get("task_type")
    if task != "SEQ_CLS":
        raise ModelError(
            f"{adapter} is an adapter of task {task}, which has no score head; expected one of "
            "reward_modeling.py (SEQ_CLS)"
        )
    check_base(adapter, directory)


# ---- a file of answers -------------------------------------------------------------------------------------


def score_file(args: JudgeArguments) -> None:
    """Score the answers of a file; see the module's docstring.

    Raises:
        ConfigError: a wrong flag or path. DataError: a row without answer. ModelError: no reward model.
    """
    source = Path(args.score_file)
    require(source.is_file(), f"--score_file {source} does not exist; expected a .jsonl or .json file")
    output = Path(args.output_file or source.with_suffix(".scored.jsonl"))
    require(output.resolve() != source.resolve(), f"--output_file {output} is the --score_file itself")
    rows = [(row, parse_answered(row, origin)) for row, origin in read_rows(source)]
    directory = resolve_model_dir(args.model_name_or_path, "--model_name_or_path", args.cache_dir)
    judge = load_judge(
        directory,
        Path(args.peft_path) if args.peft_path else None,
        template_name=args.template_name,
        force_template=args.force_template,
        max_length=args.model_max_length,
        trust_remote_code=args.trust_remote_code,
    )
    scores = judge.score([answer for _, answer in rows], args.per_device_eval_batch_size, progress=True)
    scored = (row | {"score": score} for (row, _), score in zip(rows, scores, strict=True))
    temporary = output.with_name(output.name + PARTIAL)
    temporary.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored), encoding="utf-8"
    )
    fsync(temporary)
    os.replace(temporary, output)
    known = [score for score in scores if score is not None]
    logger.info(
        "scored=%d too_long=%d mean=%.4g std=%.4g: %s",
        len(known),
        len(scores) - len(known),
        np.mean(known) if known else float("nan"),
        np.std(known) if known else float("nan"),
        output,
    )


def parse_answered(row: dict, origin: str) -> Pair:
    """A question with an answer, or a conversation that ends with one → a Pair of that answer twice."""
    if "conversations" in row or "messages" in row:
        chat = parse_chat(row, origin, RowLog())
        if chat is None or chat.messages[-1].role != "assistant":
            raise DataError(
                f"{origin}: the conversation does not end with an answer, so there is nothing to score"
            )
        *prompt, answer = chat.messages
        return Pair(tuple(prompt), answer, answer, origin, chat.tools)
    names = [name for name in ANSWER_FIELDS if name in row]
    if len(names) != 1:
        raise DataError(
            f"{origin}: has {field_names(row)}; expected question and one of {', '.join(ANSWER_FIELDS)}, or "
            "conversations that end with an answer"
        )
    prompt, tools = parse_prompt(row, origin)
    answer = Message("assistant", require_text(row, names[0], origin))
    return Pair(tuple(prompt), answer, answer, origin, tools)
