"""Records as the stages encode them: their lengths in tokens, what a limit cuts, and how they look."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from medicalgpt.chat_template import resolve_template
from medicalgpt.documents import encode_texts
from medicalgpt.model_files import load_tokenizer, resolve_model_dir
from medicalgpt.records import Chat, Pair, Record, Text
from medicalgpt.row_log import RowLog
from medicalgpt.run_record import recorded_template, recorded_tool_format
from medicalgpt.tokenization import IGNORE_INDEX, ChatEncoder, ChatFormat, Tokens, last_answer_only

from transformers import PreTrainedTokenizerBase

NO_LIMIT = 1 << 30
LEGEND = {
    True: "\033[32mtrained\033[0m, \033[2mmasked\033[0m, \033[1;33mcontrol token\033[0m, "
    "\033[1;35mtrained control token\033[0m",
    False: "⟦trained⟧ masked ‹control token› ⟦‹trained control token›⟧",
}


class RowEncoder:
    """Encodes records of every kind.

    Args:
        directory: of a model or a tokenizer.
        template_name: of the chat format; None: the model's own.
        max_length: the limit of a row, in tokens; None: no limit.

    Raises:
        ConfigError: no such directory or template. ModelError: no tokenizer in it.
    """

    def __init__(self, directory: str, template_name: str | None, force: bool, max_length: int | None):
        self.directory: Path = resolve_model_dir(directory, "--tokenizer")
        self.tokenizer = load_tokenizer(self.directory)
        self.template_name, self.force = template_name, force
        self.max_length = max_length
        self.chat: ChatEncoder | None = None

    def chat_encoder(self) -> ChatEncoder:
        """Return the encoder of conversations, whose format is decided when the first one comes."""
        if self.chat is None:
            template = resolve_template(
                self.tokenizer,
                self.template_name,
                recorded=recorded_template(self.directory),
                force=self.force,
            )
            chat_format = ChatFormat.of(template, self.tokenizer, recorded_tool_format(self.directory))
            self.chat = ChatEncoder(self.tokenizer, chat_format, max_length=self.max_length or NO_LIMIT)
        return self.chat

    def lengths(self, records: Sequence[Record], log: RowLog) -> list[int]:
        """Return the tokens of every record, uncut; the log counts what the limit would do to it.

        Of a pair: its prompt and the longer answer.
        """
        if isinstance(records[0], Text):
            lengths = [len(ids) for ids in encode_texts(records, self.tokenizer)]
            for record, length in zip(records, lengths, strict=True):
                if length > (self.max_length or NO_LIMIT):
                    log.add("document_split_into_blocks", record.origin)
            return lengths
        return [self.measure(record, sides, log) for record, sides in self.encode(records)]

    def encode(self, records: Sequence[Record]) -> list[tuple[Record, list[list[Tokens]]]]:
        """Return (record, the turns of its conversation, or of both of a pair)."""
        encoder, sides = self.chat_encoder(), [conversations(record) for record in records]
        flat = [side for both in sides for side in both]
        tools = [record.tools for record, both in zip(records, sides, strict=True) for _ in both]
        turns = iter(encoder.encode_turns(flat, tools))
        return [(record, [next(turns) for _ in both]) for record, both in zip(records, sides, strict=True)]

    def measure(self, record: Record, sides: list[list[Tokens]], log: RowLog) -> int:
        """Return a record's length, and let the log count what the limit does to it."""
        encoder = self.chat_encoder()
        length = max(sum(len(turn.ids) for turn in turns) for turns in sides)
        if isinstance(record, Pair):
            encoder.fit_pair(record, conversations(record), sides, log)
        elif record.messages[-1].role == "assistant":
            encoder.fit(record, sides[0], log)
        elif length > encoder.max_length:
            log.add("question_too_long", record.origin)
        return length

    def show(self, record: Record, *, colour: bool) -> str:
        """Return a record as it is trained on, cut to the limit, with what is trained told apart."""
        if isinstance(record, Text):
            ids = encode_texts([record], self.tokenizer)[0][: self.max_length]
            return self.paint(ids, ids, colour)
        encoder, log = self.chat_encoder(), RowLog()
        [(_, sides)] = self.encode([record])
        if isinstance(record, Pair):
            example = encoder.fit_pair(record, conversations(record), sides, log)
            if example is None:
                return f"({', '.join(log.lines())})"
            prompt = example["prompt_ids"].tolist()
            return "\n".join(
                f"{name}: "
                + self.paint(
                    prompt + example[f"{name}_ids"].tolist(),
                    [IGNORE_INDEX] * len(prompt) + example[f"{name}_labels"].tolist(),
                    colour,
                )
                for name in ("chosen", "rejected")
            )
        if record.messages[-1].role != "assistant":
            whole = last_answer_only(sides[0])
            return self.paint(whole.ids, [IGNORE_INDEX] * len(whole.ids), colour)
        fitted = encoder.fit(record, sides[0], log)
        if fitted is None:
            return f"({', '.join(log.lines())})"
        return self.paint(fitted.ids, fitted.labels, colour)

    @staticmethod
    def legend(*, colour: bool) -> str:
        """Return what the marks of `show` mean."""
        return LEGEND[colour]

    def paint(self, ids: Sequence[int], labels: Sequence[int], colour: bool) -> str:
        """Return ids as text, with trained, masked and control tokens told apart."""
        added = self.tokenizer.get_added_vocab().items()
        control = {i for token, i in added if token.strip()} | set(self.tokenizer.all_special_ids)
        kinds = [(label != IGNORE_INDEX, token in control) for token, label in zip(ids, labels, strict=True)]
        groups = decoded_groups(self.tokenizer, ids, kinds)
        if colour:
            codes = {(True, False): "32", (False, False): "2", (False, True): "1;33", (True, True): "1;35"}
            return "".join(f"\033[{codes[kind]}m{text}\033[0m" for kind, text in groups)
        shown = ""
        for trained, several in itertools.groupby(groups, key=lambda group: group[0][0]):
            text = "".join(f"‹{text}›" if kind[1] else text for kind, text in several)
            shown += f"⟦{text}⟧" if trained else text
        return shown


def conversations(record: Record) -> list[tuple]:
    """Return the messages of a conversation, or of both sides of a pair."""
    if isinstance(record, Pair):
        return [(*record.prompt, record.chosen), (*record.prompt, record.rejected)]
    assert isinstance(record, Chat)
    return [record.messages]


def decoded_groups(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], kinds: Sequence[tuple[bool, bool]]
) -> list[tuple[tuple[bool, bool], str]]:
    """Return (kind, text) of every stretch of ids of one kind; control tokens stand alone.

    What a token reads as depends on what stands before it (SentencePiece drops a leading space), so a
    stretch is what the text grows by.
    """
    groups, before, end = [], "", 0
    for index, kind in enumerate(kinds):
        end = index + 1
        if end < len(ids) and kinds[end] == kind and not kind[1]:
            continue
        text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        groups.append((kind, text[len(before) :]))
        before = text
    return groups
