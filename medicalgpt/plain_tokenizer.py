"""Text → ids in which no control token can occur, whatever the text says."""

import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


class PlainTokenizer:
    """Encodes text that must not contain control tokens, whatever it says.

    Args:
        tokenizer: a fast tokenizer; its added tokens (special or not) are the control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.control_ids: dict[str, int] = dict(tokenizer.get_added_vocab())
        # An unknown character is the unknown token, and forges nothing.
        self.forbidden = frozenset(self.control_ids.values()) - {tokenizer.unk_token_id}
        names = sorted(map(re.escape, self.control_ids), key=len, reverse=True)
        self.control_pattern = re.compile(f"({'|'.join(names)})") if names else re.compile("(?!)")
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.at_start = Tokenizer.from_str(json.dumps(spec))
        self.inside = Tokenizer.from_str(json.dumps(without_dummy_prefix(spec)))

    def encode(self, texts: Sequence[str], *, at_start: bool = False) -> list[list[int]]:
        """Return the ids of each text.

        Args:
            at_start: the texts begin a sequence (SentencePiece puts a space before such a text).
        """
        backend = self.at_start if at_start else self.inside
        return [
            ids if self.forbidden.isdisjoint(ids) else self.encode_apart(text, at_start=at_start)
            for text, ids in zip(texts, (e.ids for e in backend.encode_batch_fast(list(texts))), strict=True)
        ]

    def encode_apart(self, text: str, *, at_start: bool) -> list[int]:
        """Encode a text that would give a control token although none is known: cut inside every marker."""
        ids, begin = [], 0
        cuts = [match.start() + 1 for match in self.control_pattern.finditer(text)]
        for cut in [*cuts, len(text)]:
            backend = self.at_start if at_start and begin == 0 else self.inside
            ids += [i for i in backend.encode(text[begin:cut]).ids if i not in self.forbidden]
            begin = cut
        return ids


def without_dummy_prefix(spec: dict) -> dict:
    """Return a tokenizer specification that puts no space before a text which continues a sequence."""
    spec = json.loads(json.dumps(spec))
    parts = spec.get("pre_tokenizer") or {}
    for part in parts.get("pretokenizers", [parts]):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return spec


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True when the tokenizer itself begins a text with BOS."""
    ids = tokenizer("a").input_ids
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
