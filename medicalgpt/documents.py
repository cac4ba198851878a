"""Plain texts → rows of tokens, for pretraining."""

from collections.abc import Sequence

from medicalgpt.errors import ModelError
from medicalgpt.plain_tokenizer import PlainTokenizer, adds_bos
from medicalgpt.records import Text
from medicalgpt.tokenization import ENCODE_BATCH, IGNORE_INDEX, tokens

import numpy as np
from transformers import PreTrainedTokenizerBase


def encode_texts(records: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of each document, with BOS where the tokenizer adds one, and EOS at the end.

    Raises:
        ModelError: the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so no document could ever end"
        )
    plain = PlainTokenizer(tokenizer)
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    documents = []
    for begin in range(0, len(records), ENCODE_BATCH):
        texts = [record.text for record in records[begin : begin + ENCODE_BATCH]]
        documents += [[*bos, *ids, tokenizer.eos_token_id] for ids in plain.encode(texts, prefixed=True)]
    return documents


def pack_documents(documents: Sequence[Sequence[int]], block_size: int) -> list[dict]:
    """Return rows of `block_size` tokens (the last one shorter) that hold every token of every document once.

    A last row of one token, which could not be trained, is left out.

    A document that does not end with its row goes on in the next; `lengths` are the documents' parts in a
    row. The first token of a part has nothing before it that could predict it, so it carries no label.
    """
    rows, ids, lengths = [], [], []
    for document in documents:
        position = 0
        while position < len(document):
            part = document[position : position + block_size - len(ids)]
            ids, lengths, position = ids + list(part), [*lengths, len(part)], position + len(part)
            if len(ids) == block_size:
                rows.append(packed_row(ids, lengths))
                ids, lengths = [], []
    if ids:
        rows.append(packed_row(ids, lengths))
    return [row for row in rows if (row["labels"] != IGNORE_INDEX).any()]


def packed_row(ids: list[int], lengths: list[int]) -> dict:
    """Return the example of one row."""
    labels = tokens(ids)
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE_INDEX
    return {"input_ids": tokens(ids), "labels": labels, "lengths": lengths}
