"""What reinforcement learning answers: prompts as ids, and the answers that were drawn for them."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from medicalgpt.dataset import Data
from medicalgpt.errors import DataError
from medicalgpt.records import Chat
from medicalgpt.rollout import Draw
from medicalgpt.row_log import RowLog
from medicalgpt.tokenization import ChatEncoder, tokens

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("medicalgpt")


@dataclass(frozen=True)
class Question:
    """What is to be answered: a conversation that ends with a question, and its ids."""

    chat: Chat
    ids: list[int]


@dataclass(frozen=True)
class Rollout:
    """A prompt with an answer that was drawn for it.

    Attributes:
        text: the answer without its stop token.
    """

    prompt: Question
    draw: Draw
    text: str

    @property
    def num_tokens(self) -> int:
        """How long prompt and answer are."""
        return len(self.prompt.ids) + len(self.draw.ids)


def in_groups(rollouts: Sequence[Rollout], stop_id: int | None = None) -> list[dict]:
    """Return groups as a GroupCollator takes them: answers to one prompt that stand side by side share it.

    Args:
        stop_id: put behind every answer, in place of the token that ended it, if one did.
    """
    groups = []
    for _, same in itertools.groupby(rollouts, key=lambda rollout: id(rollout.prompt)):
        some = list(same)
        draws = [rollout.draw for rollout in some]
        answers = [tokens(d.ids if stop_id is None else [*d.said, stop_id]) for d in draws]
        groups.append({"prompt_ids": tokens(some[0].prompt.ids), "answers": [(ids, ids) for ids in answers]})
    return groups


def encode_questions(encoder: ChatEncoder, records: Sequence[Chat], log: RowLog) -> list[Question]:
    """Return the prompts that fit --max_source_length, the oldest turns left out where they must be."""
    encoder.set_room(encoder.max_source_length)
    prompts = []
    for record in records:
        ids, dropped = encoder.encode_prompt(record.messages, record.tools)
        if ids is None:
            log.add("question_too_long", record.origin)
            continue
        if dropped:
            log.add("oldest_turns_dropped", record.origin)
        prompts.append(Question(record, ids))
    return prompts


def report_questions(
    prompts: Sequence[Question], held_out: Sequence[Question], data: Data, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log what was read and the first prompt.

    Raises:
        DataError: no prompt is left.
    """
    for line in data.log.lines():
        logger.info("rows %s", line)
    if not prompts:
        raise DataError(
            f"no prompt is left of {len(data.train)} rows ({'; '.join(data.log.lines())}); raise "
            "--max_source_length"
        )
    lengths = [len(prompt.ids) for prompt in prompts]
    logger.info(
        "rows_read=%d prompts=%d held_out_prompts=%d mean_prompt_tokens=%.0f longest_prompt_tokens=%d",
        data.num_read,
        len(prompts),
        len(held_out),
        sum(lengths) / len(lengths),
        max(lengths),
    )
    logger.info("first prompt:\n%s", tokenizer.decode(prompts[0].ids)[:1500])
