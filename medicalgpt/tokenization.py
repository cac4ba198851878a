"""Records → token ids and labels: segments, label masks, truncation, `-100`.

One walk over a rendered conversation gives ids and labels. Text between control tokens is encoded with a
tokenizer that knows no control tokens at all, so no message can forge one; a prompt and its answer are
encoded apart, as generation sees them. Elsewhere the ids are those of the whole rendered text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from medicalgpt.errors import ModelError
from medicalgpt.plain_tokenizer import PlainTokenizer, adds_bos
from medicalgpt.records import Chat, Message, Pair
from medicalgpt.rendering import Renderer, Turn
from medicalgpt.row_log import RowLog
from medicalgpt.runs import Run, RunSplitter
from template import Template

import numpy as np
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
ENCODE_BATCH = 1000  # rows per tokenizer call


def tokens(ids: Sequence[int]) -> np.ndarray:
    """Return ids as a compact array (T,)."""
    return np.asarray(ids, dtype=np.int32)


@dataclass(frozen=True)
class ChatFormat:
    """A template with the tokenizer's own tokens filled in.

    Attributes:
        tool_format: how tools are offered and called; None: the template's own way.
        adds_bos: the tokenizer itself begins a text with BOS.
    """

    template: Template
    bos: str
    eos: str
    tool_format: str | None = None
    adds_bos: bool = False

    @classmethod
    def of(
        cls, template: Template, tokenizer: PreTrainedTokenizerBase, tool_format: str | None = None
    ) -> "ChatFormat":
        """Bind a template to a tokenizer.

        Raises:
            ModelError: the stop of the template is not one token of this tokenizer.
        """
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        chat_format = cls(template, bos, eos, tool_format, adds_bos(tokenizer))
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

    @property
    def renderer(self) -> Renderer:
        """What turns conversations into segments."""
        return Renderer(self.template, self.bos, self.eos, self.tool_format)

    def render(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[Turn]:
        """Render a conversation; see `Renderer.render`."""
        return self.renderer.render(messages, tools)

    @property
    def leading_bos(self) -> str | None:
        """The token that the tokenizer itself puts before a text of this format, or None."""
        return self.bos if self.template.bos_as_tokenizer and self.adds_bos else None

    def protects_roles(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """True when control tokens mark who speaks, so that no message can pretend to be another's."""
        added = tokenizer.get_added_vocab()
        forms = (self.template.user, self.template.header + self.template.answer)
        return any(token in self.renderer.expand(forms[0]) for token in added) and (
            any(token in self.renderer.expand(forms[1]) for token in added)
            or any(token in self.renderer.expand(forms[0].rpartition("{content}")[2]) for token in added)
        )

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
        answer: where the turn's last answer with its stop begins and ends, in tokens; None while it has none.
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
            continues = self.answer and self.answer[1] == len(self.ids)
            self.answer = self.answer[0] if continues else len(self.ids), len(self.ids) + len(ids)
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

    def set_room(self, max_length: int) -> None:
        """Change the limit of a prompt, in tokens."""
        self.max_length = self.max_source_length = max_length

    def encode_turns(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Sequence[dict]] | None = None
    ) -> list[list[Tokens]]:
        """Return ids and labels of every turn of every conversation, uncut.

        Args:
            tools: what the model may call, per conversation; None: nothing.
        """
        tools = tools or [()] * len(conversations)
        runs = [self.split(messages, offered) for messages, offered in zip(conversations, tools, strict=True)]
        every = [run for turns in runs for turn in turns for run in turn if isinstance(run.value, str)]
        ids = {}
        for prefixed in (True, False):
            texts = list(dict.fromkeys(run.value for run in every if run.prefixed is prefixed))
            encoded = self.plain.encode(texts, prefixed=prefixed)
            ids |= zip(((text, prefixed) for text in texts), encoded, strict=True)
        return [self.join_runs(turns, ids) for turns in runs]

    def split(self, messages: Sequence[Message], tools: Sequence[dict]) -> list[list[Run]]:
        """Return the runs of every turn; BOS comes first where the tokenizer would add it."""
        splitter = RunSplitter(self.plain)
        turns = [splitter.split(turn) for turn in self.format.render(messages, tools)]
        if self.format.leading_bos:
            turns[0].insert(0, Run(self.plain.control_ids[self.format.leading_bos], False))
        return turns

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
                        [run.value] if isinstance(run.value, int) else ids[run.value, run.prefixed],
                        run.trained,
                    )
            pending = result.hidden_stop
            joined.append(result)
        return joined

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict] = ()
    ) -> tuple[list[int] | None, int]:
        """Encode a conversation that ends with a question, up to where the answer begins.

        Returns:
            The ids, without the oldest turns where all would not fit (None where the last question alone
            does not), and how many turns went.
        """
        _, turns, dropped = self.drop_oldest(messages, self.encode_turns([messages], [tools])[0], tools)
        ids = [i for turn in turns for i in turn.ids]
        return (ids if len(ids) <= self.max_length else None), dropped

    # ---- what fits -----------------------------------------------------------------------------------------

    def encode_chats(self, records: Sequence[Chat], log: RowLog) -> list[dict]:
        """Return {input_ids, labels, lengths} of every conversation that fits; the log counts the rest."""
        examples = []
        for begin in range(0, len(records), ENCODE_BATCH):
            batch = records[begin : begin + ENCODE_BATCH]
            for record, turns in zip(batch, self.encode_batch(batch), strict=True):
                fitted = self.fit(record, turns, log)
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

    def encode_batch(self, records: Sequence[Chat]) -> list[list[Tokens]]:
        """Return the turns of every conversation."""
        return self.encode_turns([r.messages for r in records], [r.tools for r in records])

    def fit(self, record: Chat, turns: list[Tokens], log: RowLog) -> Tokens | None:
        """Make a conversation fit: whole oldest turns go first, then the tail of the last answer.

        Returns None, and counts the row, when the last question leaves no room for an answer.
        """
        origin = record.origin
        if self.format.template.system is None and record.messages[0].role == "system":
            log.add("system_prompt_dropped", origin)
        _, turns, dropped = self.drop_oldest(record.messages, turns, record.tools)
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
        self, messages: Sequence[Message], turns: list[Tokens], tools: Sequence[dict] = ()
    ) -> tuple[list[Message], list[Tokens], int]:
        """Drop as few of the oldest turns as make the conversation fit; the last turn always stays."""
        messages, total = list(messages), len(turns)
        while len(turns) > 1 and not self.fits(turns):
            drop = next((k for k in range(1, len(turns) - 1) if self.fits(turns[k:])), len(turns) - 1)
            messages = without_turns(messages, drop)
            # Encoded anew: what stood before the first turn now stands before another.
            turns = self.encode_turns([messages], [tools])[0]
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
            sides = [(*r.prompt, answer) for r in batch for answer in (r.chosen, r.rejected)]
            turns = self.encode_turns(sides, [r.tools for r in batch for _ in range(2)])
            for index, record in enumerate(batch):
                both = slice(2 * index, 2 * index + 2)
                example = self.fit_pair(record, sides[both], turns[both], log)
                if example is not None:
                    examples.append(example)
        return examples

    def fit_pair(
        self, record: Pair, sides: Sequence[Sequence[Message]], turns: Sequence[list[Tokens]], log: RowLog
    ) -> dict | None:
        """Make both answers of a pair fit behind the same prompt."""
        origin, tools = record.origin, record.tools
        (chosen_messages, chosen, a), (rejected_messages, rejected, b) = (
            self.drop_oldest(*side, tools) for side in zip(sides, turns, strict=True)
        )
        if a != b:  # the longer answer decides how much history both keep
            shorter = min((chosen_messages, rejected_messages), key=len)
            chosen, rejected = self.encode_turns(
                [(*shorter[:-1], side[-1]) for side in sides], [tools, tools]
            )
        if max(a, b):
            log.add("oldest_turns_dropped", origin)
        flat = [last_answer_only(side) for side in (chosen, rejected)]
        prompt = common_prefix(*(side.ids[: side.answer_start] for side in flat))
        room = min(self.max_length - prompt, self.max_target_length)
        if prompt > self.max_source_length or room < 1:
            log.add("question_too_long", origin)
            return None
        example = {"prompt_ids": tokens(flat[0].ids[:prompt]), "margin": record.margin}
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


def without_turns(messages: Sequence[Message], drop: int) -> list[Message]:
    """Return a conversation without its first `drop` questions and what followed them."""
    system = [message for message in messages[:1] if message.role == "system"]
    begins = [index for index, message in enumerate(messages) if message.role == "user"]
    return system + list(messages[begins[drop] :])


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
