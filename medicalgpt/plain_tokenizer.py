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
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        added = [
            token for token in spec["added_tokens"] if token["special"] or token["content"].strip("▁ \n\t\r")
        ]
        self.text_tokens = [token for token in spec["added_tokens"] if token not in added]
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in added}
        self.eats_left = frozenset(token["content"] for token in added if token["lstrip"])
        self.eats_right = frozenset(token["content"] for token in added if token["rstrip"])
        # An unknown character is the unknown token, and forges nothing.
        self.forbidden = frozenset(self.control_ids.values()) - {tokenizer.unk_token_id}
        names = sorted(map(re.escape, self.control_ids), key=len, reverse=True)
        self.control_pattern = re.compile(f"({'|'.join(names)})") if names else re.compile("(?!)")
        # Runs of white space that are tokens of their own (gemma) forge nothing either.
        spec.update(added_tokens=self.text_tokens, post_processor=None, truncation=None, padding=None)
        bare, self.prefixes_inside = without_dummy_prefix(spec)
        self.prefixing = Tokenizer.from_str(json.dumps(spec))
        self.inside = Tokenizer.from_str(json.dumps(bare))

    def encode(self, texts: Sequence[str], *, prefixed: bool = False) -> list[list[int]]:
        """Return the ids of each text.

        Args:
            prefixed: the texts get the space that SentencePiece puts before a text.
        """
        backend = self.prefixing if prefixed else self.inside
        return [
            ids if self.forbidden.isdisjoint(ids) else self.encode_apart(text, prefixed=prefixed)
            for text, ids in zip(texts, (e.ids for e in backend.encode_batch_fast(list(texts))), strict=True)
        ]

    def encode_apart(self, text: str, *, prefixed: bool) -> list[int]:
        """Encode a text that would give a control token although none is known: cut inside every marker."""
        ids, begin = [], 0
        cuts = [match.start() + 1 for match in self.control_pattern.finditer(text)]
        for cut in [*cuts, len(text)]:
            backend = self.prefixing if prefixed and begin == 0 else self.inside
            ids += [i for i in backend.encode(text[begin:cut]).ids if i not in self.forbidden]
            begin = cut
        return ids


def without_dummy_prefix(spec: dict) -> tuple[dict, bool]:
    """Return a tokenizer specification that puts no space before a text, and whether `spec` always does."""
    spec, always = json.loads(json.dumps(spec)), False
    parts = spec.get("pre_tokenizer") or {}
    for part in parts.get("pretokenizers", [parts]):
        if part.get("type") == "Metaspace":
            always |= part.get("prepend_scheme") == "always"
            part["prepend_scheme"] = "never"
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        always = True
        kept = [step for step in steps if step.get("type") != "Prepend"]
        spec["normalizer"] = {"type": "Sequence", "normalizers": kept}
    return spec, always


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True when the tokenizer itself begins a text with BOS."""
    ids = tokenizer("a").input_ids
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
