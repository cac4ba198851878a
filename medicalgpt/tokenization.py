"""Records → token ids and labels: segments, label masks, truncation, `-100`.

One walk over a rendered conversation gives ids and labels. Text between control tokens is encoded with a
tokenizer that knows no control tokens at all, so no message can forge one; a prompt and its answer are
encoded apart, as generation sees them. Elsewhere the ids are those of the whole rendered text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from medicalgpt.errors import ModelError
from medicalgpt.plain_tokenizer import PlainTokenizer, adds_bos
from medicalgpt.records import Chat, Message, Pair, RowLog
from template import Segment, Template, Turn, render

import numpy as np
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
ENCODE_BATCH = 1000  # rows per tokenizer call


def tokens(ids: Sequence[int]) -> np.ndarray:
    """Return ids as a compact array (T,)."""
    return np.asarray(ids, dtype=np.int32)


@dataclass(frozen=True)
class ChatFormat:
    """A template with the tokenizer's own tokens filled in."""

    template: Template
    bos: str
    eos: str

    @classmethod
    def of(cls, template: Template, tokenizer: PreTrainedTokenizerBase) -> "ChatFormat":
        """Bind a template to a tokenizer.

        Raises:
            ModelError: the stop of the template is not one token of this tokenizer.
        """
        bos = tokenizer.bos_token or ""
        if template.bos_as_tokenizer and not adds_bos(tokenizer):
            bos = ""
        chat_format = cls(template, bos, tokenizer.eos_token or "")
        stop = chat_format.stops[0]
        if len(tokenizer(stop, add_special_tokens=False).input_ids) != 1:
            raise ModelError(
                f"{tokenizer.name_or_path}: the stop {stop!r} of template {template.name} is not one token "
                "of this tokenizer; use a template that fits the model"
            )
        return chat_format

    @property
    def stops(self) -> tuple[str, ...]:
        """Every string that ends an answer; the trained one first."""
        return self.template.stops(self.eos)

    def render(self, messages: Iterable[Message]) -> list[Turn]:
        """Render a conversation; see `template.render`."""
        return render(self.template, list(messages), bos=self.bos, eos=self.eos)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids that end an answer at generation."""
        ids = [
            tokenizer.convert_tokens_to_ids(stop)
            for stop in (*self.stops, self.eos)
            if stop in tokenizer.get_vocab()
        ]
        return list(dict.fromkeys(ids))


@dataclass
class Tokens:
    """Ids and labels of one turn, growing; labels are IGNORE_INDEX where nothing is trained.

    Attributes:
        answer: where the turn's answer with its stop begins and ends, in tokens; None while it has none.
        hidden_stop: a stop that is the label of the next token, whichever turn that belongs to.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answer: tuple[int, int] | None = None
    hidden_stop: int | None = None

    def add(self, ids: list[int], trained: bool) -> None:
        """Append ids. A pending hidden stop becomes the label of the first of them."""
        labels = list(ids) if trained else [IGNORE_INDEX] * len(ids)
        if self.hidden_stop is not None and ids:
            labels[0], self.hidden_stop = self.hidden_stop, None
        if trained:
            start = self.answer[0] if self.answer else len(self.ids)
            self.answer = start, len(self.ids) + len(ids)
        self.ids += ids
        self.labels += labels

    @property
    def answer_start(self) -> int:
        """Where the answer begins; the end of a turn without one."""
        return self.answer[0] if self.answer else len(self.ids)

    @property
    def tail(self) -> int:
        """How many tokens stand behind the answer and its stop."""
        return len(self.ids) - self.answer[1] if self.answer else 0

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.ids[length:], self.labels[length:]


class Run(NamedTuple):
    """A stretch of one turn: a control token's id, or text to be encoded."""

    value: int | str
    trained: bool
    hidden: bool
    at_start: bool


def split_runs(turns: list[Turn], plain: PlainTokenizer) -> list[list[Run]]:
    """Split every turn into runs at control tokens and at the borders of what is trained.

    Marker and message text that stand side by side in a prompt stay together, as in the whole rendered text.
    """
    result, first = [], True
    for turn in turns:
        runs: list[Run] = []
        text, trained = "", False
        for segment in turn:
            for part in segment_parts(segment, plain):
                is_control = segment.is_marker and part in plain.control_ids
                if text and (is_control or segment.trained != trained):
                    runs.append(Run(text, trained, False, first))
                    text, first = "", False
                if is_control:
                    runs.append(Run(plain.control_ids[part], segment.trained, segment.hidden, first))
                    first = False
                else:
                    text, trained = text + part, segment.trained
        if text:
            runs.append(Run(text, trained, False, first))
            first = False
        result.append(runs)
    return result


def segment_parts(segment: Segment, plain: PlainTokenizer) -> list[str]:
    """Return a segment's text, a marker's split at control tokens."""
    parts = plain.control_pattern.split(segment.text) if segment.is_marker else [segment.text]
    return [part for part in parts if part]


class ChatEncoder:
    """Encodes conversations in one chat format.

    Args:
        max_length: the limit of a conversation, in tokens.
        max_source_length: cap of the prompt before the last answer, in tokens; None: no cap of its own.
        max_target_length: cap of an answer with its stop, in tokens; None: no cap of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        *,
        max_length: int,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
    ):
        self.plain = PlainTokenizer(tokenizer)
        self.format = chat_format
        self.max_length = max_length
        self.max_source_length = max_source_length or max_length
        self.max_target_length = max_target_length or max_length

    def encode_turns(self, conversations: Sequence[Sequence[Message]]) -> list[list[Tokens]]:
        """Return ids and labels of every turn of every conversation, uncut."""
        runs = [split_runs(self.format.render(messages), self.plain) for messages in conversations]
        every = [run for turns in runs for turn in turns for run in turn if isinstance(run.value, str)]
        ids = {}
        for at_start in (True, False):
            texts = list(dict.fromkeys(run.value for run in every if run.at_start is at_start))
            ids |= zip(
                ((text, at_start) for text in texts), self.plain.encode(texts, at_start=at_start), strict=True
            )
        return [self.join_runs(turns, ids) for turns in runs]

    @staticmethod
    def join_runs(turns: list[list[Run]], ids: dict[tuple[str, bool], list[int]]) -> list[Tokens]:
        """Join the ids of a conversation's runs, turn by turn; a hidden stop reaches into the next turn."""
        joined, pending = [], None
        for turn in turns:
            result = Tokens(hidden_stop=pending)
            for run in turn:
                if run.hidden:
                    result.hidden_stop = run.value
                else:
                    result.add(
                        [run.value] if isinstance(run.value, int) else ids[run.value, run.at_start],
                        run.trained,
                    )
            pending = result.hidden_stop
            joined.append(result)
        return joined

    def encode_prompt(self, messages: Sequence[Message]) -> tuple[list[int] | None, int]:
        """Encode a conversation that ends with a question, up to where the answer begins.

        Returns:
            The ids, without the oldest turns where all would not fit (None where the last question alone
            does not), and how many turns went.
        """
        _, turns, dropped = self.drop_oldest(messages, self.encode_turns([messages])[0])
        ids = [i for turn in turns for i in turn.ids]
        return (ids if len(ids) <= self.max_length else None), dropped

    # ---- what fits -----------------------------------------------------------------------------------------

    def encode_chats(self, records: Sequence[Chat], log: RowLog) -> list[dict]:
        """Return {input_ids, labels, lengths} of every conversation that fits; the log counts the rest."""
        examples = []
        for begin in range(0, len(records), ENCODE_BATCH):
            batch = records[begin : begin + ENCODE_BATCH]
            for record, turns in zip(batch, self.encode_turns([r.messages for r in batch]), strict=True):
                fitted = self.fit(record.messages, turns, record.origin, log)
                if fitted is None:
                    continue
                examples.append(
                    {
                        "input_ids": tokens(fitted.ids),
                        "labels": tokens(fitted.labels),
                        "lengths": [len(fitted.ids)],
                    }
                )
        return examples

    def fit(
        self, messages: Sequence[Message], turns: list[Tokens], origin: str, log: RowLog
    ) -> Tokens | None:
        """Make a conversation fit: whole oldest turns go first, then the tail of the last answer.

        Returns None, and counts the row, when the last question leaves no room for an answer.
        """
        messages, turns, dropped = self.drop_oldest(messages, turns)
        if dropped:
            log.add("oldest_turns_dropped", origin)
        last = turns[-1]
        answer = last.answer_start
        before = sum(len(turn.ids) for turn in turns[:-1])
        room = min(self.max_length - before - answer, self.max_target_length)
        if before + answer > self.max_source_length or room < 1:
            log.add("question_too_long", origin)
            return None
        if any([cap_answer(turn, self.max_target_length) for turn in turns[:-1]]):
            log.add("earlier_answer_capped", origin)
        if len(last.ids) - last.tail - answer > room:
            log.add("answer_cut", origin)
            last.cut(answer + room)
        elif before + len(last.ids) > self.max_length:
            last.cut(len(last.ids) - last.tail)
        return Tokens([i for turn in turns for i in turn.ids], [i for turn in turns for i in turn.labels])

    def drop_oldest(
        self, messages: Sequence[Message], turns: list[Tokens]
    ) -> tuple[list[Message], list[Tokens], int]:
        """Drop as few of the oldest turns as make the conversation fit; the last turn always stays."""
        messages = list(messages)
        system = messages[:1] if messages[0].role == "system" else []
        total = len(turns)
        while len(turns) > 1 and not self.fits(turns):
            drop = next((k for k in range(1, len(turns) - 1) if self.fits(turns[k:])), len(turns) - 1)
            messages = system + messages[len(system) + 2 * drop :]
            # Encoded anew: what stood before the first turn now stands before another.
            turns = self.encode_turns([messages])[0]
        return messages, turns, total - len(turns)

    def fits(self, turns: list[Tokens]) -> bool:
        """True when the turns are within the limit and their prompt within its cap."""
        total = sum(len(turn.ids) for turn in turns)
        answer = len(turns[-1].ids) - turns[-1].answer_start
        return total - turns[-1].tail <= self.max_length and total - answer <= self.max_source_length

    # ---- pairs ---------------------------------------------------------------------------------------------

    def encode_pairs(self, records: Sequence[Pair], log: RowLog) -> list[dict]:
        """Return one example per pair that fits: prompt_ids, and ids and labels of both answers."""
        examples = []
        for begin in range(0, len(records), ENCODE_BATCH):
            batch = records[begin : begin + ENCODE_BATCH]
            sides = [
                (*r.prompt, Message("assistant", answer)) for r in batch for answer in (r.chosen, r.rejected)
            ]
            turns = self.encode_turns(sides)
            for index, record in enumerate(batch):
                example = self.fit_pair(
                    sides[2 * index : 2 * index + 2], turns[2 * index : 2 * index + 2], record.origin, log
                )
                if example is not None:
                    examples.append(example)
        return examples

    def fit_pair(
        self, sides: Sequence[Sequence[Message]], turns: Sequence[list[Tokens]], origin: str, log: RowLog
    ) -> dict | None:
        """Make both answers of a pair fit behind the same prompt."""
        (chosen_messages, chosen, a), (rejected_messages, rejected, b) = (
            self.drop_oldest(*side) for side in zip(sides, turns, strict=True)
        )
        if a != b:  # the longer answer decides how much history both keep
            shorter = min((chosen_messages, rejected_messages), key=len)
            chosen, rejected = self.encode_turns([(*shorter[:-1], side[-1]) for side in sides])
        if max(a, b):
            log.add("oldest_turns_dropped", origin)
        flat = [last_answer_only(side) for side in (chosen, rejected)]
        prompt = common_prefix(*(side.ids[: side.answer_start] for side in flat))
        room = min(self.max_length - prompt, self.max_target_length)
        if prompt > self.max_source_length or room < 1:
            log.add("question_too_long", origin)
            return None
        example = {"prompt_ids": tokens(flat[0].ids[:prompt])}
        cut = False
        for name, side in zip(("chosen", "rejected"), flat, strict=True):
            end = len(side.ids) - side.tail
            cut |= end - prompt > room
            end = min(end, prompt + room)
            example[f"{name}_ids"] = tokens(side.ids[prompt:end])
            example[f"{name}_labels"] = tokens(side.labels[prompt:end])
        if cut:
            log.add("answer_cut", origin)
        return example


def cap_answer(turn: Tokens, max_target_length: int) -> bool:
    """Train only the first `max_target_length` tokens of an earlier answer, which stays whole as context."""
    start = turn.answer_start + max_target_length
    beyond = [label for label in turn.labels[start:] if label != IGNORE_INDEX]
    turn.labels[start:] = [IGNORE_INDEX] * len(turn.labels[start:])
    return bool(beyond)


def last_answer_only(turns: list[Tokens]) -> Tokens:
    """Return a conversation as one turn in which nothing before the last answer is trained."""
    last, ids = turns[-1], [i for turn in turns for i in turn.ids]
    before = len(ids) - len(last.ids)
    start, end = before + last.answer_start, len(ids) - last.tail
    return Tokens(ids, [IGNORE_INDEX] * start + last.labels[last.answer_start :], (start, end))


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return how many ids two prompts share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
