"""Segments → runs: what is one control token, and what is text to be encoded together."""

from typing import NamedTuple

from medicalgpt.plain_tokenizer import PlainTokenizer
from medicalgpt.rendering import Turn
from template import Segment


class Run(NamedTuple):
    """A stretch of one turn: a control token's id, or text to be encoded.

    `prefixed`: the tokenizer puts its space before this text (SentencePiece at the start of a sequence, and
    in older tokenizers behind every control token).
    """

    value: int | str
    trained: bool
    hidden: bool = False
    prefixed: bool = False


class RunSplitter:
    """Splits the segments of one conversation into runs, turn by turn.

    Marker and message text that stand side by side in a prompt stay together, as in the whole rendered text;
    control tokens and the borders of what is trained divide.
    """

    def __init__(self, plain: PlainTokenizer):
        self.plain = plain
        self.runs: list[Run] = []
        self.text, self.trained = "", False
        self.prefixed = True  # the sequence begins
        self.eaten = False  # the control token before takes the white space behind it

    def split(self, turn: Turn) -> list[Run]:
        """Return the runs of the next turn."""
        self.runs = []
        for segment in turn:
            for part in segment_parts(segment, self.plain):
                if segment.is_marker and part in self.plain.control_ids:
                    self.end_text(before=part)
                    self.runs.append(Run(self.plain.control_ids[part], segment.trained, segment.hidden))
                    if not segment.hidden:
                        self.prefixed = self.plain.prefixes_inside
                        self.eaten = part in self.plain.eats_right
                    continue
                if segment.trained != self.trained:
                    self.end_text()
                self.text, self.trained = self.text + part, segment.trained
        self.end_text()
        return self.runs

    def end_text(self, before: str | None = None) -> None:
        """End the text so far; `before` is the control token that follows it."""
        text = self.text.lstrip() if self.eaten else self.text
        if before in self.plain.eats_left:
            text = text.rstrip()
        if text:
            self.runs.append(Run(text, self.trained, prefixed=self.prefixed))
            self.prefixed = self.eaten = False
        self.text = ""


def segment_parts(segment: Segment, plain: PlainTokenizer) -> list[str]:
    """Return a segment's text, a marker's split at control tokens."""
    parts = plain.control_pattern.split(segment.text) if segment.is_marker else [segment.text]
    return [part for part in parts if part]
