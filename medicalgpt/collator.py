"""Examples → one flat row: how documents share it, which positions predict which tokens.

A batch is a dict

    input_ids, position_ids  (1, T)   documents one after the other, positions restart
    layout                   Layout   who sees whom
    source_index             (N,)     positions whose hidden state predicts a trained token
    target_ids               (N,)     those tokens
    sequence_index           (N,)     which document or answer each belongs to
    last_index               (S,)     where every document or answer has its last token
    num_sequences            int      documents, or for pairs answers: chosen, rejected, chosen, …
    num_tokens               int      T without padding

An empty list of examples gives a batch without targets (a rank that got no rows), which trains nothing. For
models that cannot confine attention (`padded=True`) the same documents become padded rows (B, T) with an
`attention_mask` and no layout; indices then count in the flattened (B·T).
"""

from collections.abc import Sequence

from medicalgpt.attention import Layout, Span
from medicalgpt.tokenization import IGNORE_INDEX, tokens

import numpy as np
import torch

Example = dict


# What an empty batch is made of: a document without a trained token.
NOTHING: Example = {"input_ids": tokens([0, 0]), "labels": tokens([IGNORE_INDEX] * 2), "lengths": [2]}


class FlatCollator:
    """Collates language-modelling examples {input_ids, labels, lengths}."""

    def __init__(self, *, padded: bool = False):
        self.padded = padded

    def __call__(self, examples: Sequence[Example]) -> dict:
        """Return the batch of the module's docstring."""
        documents = []
        for example in examples or [NOTHING]:
            start = 0
            for length in example["lengths"]:
                part = slice(start, start + length)
                documents.append((example["input_ids"][part], example["labels"][part]))
                start += length
        return self.pad(documents) if self.padded else self.flatten(documents)

    @staticmethod
    def flatten(documents: list[tuple[np.ndarray, np.ndarray]]) -> dict:
        """Lay documents (ids, labels) one after the other."""
        spans, sources, targets, sequences, offset = [], [], [], [], 0
        for index, (ids, labels) in enumerate(documents):
            predicted = trained_positions(labels)
            sources.append(predicted - 1 + offset)
            targets.append(labels[predicted])
            sequences.append(np.full(len(predicted), index))
            spans.append(Span(offset, offset + len(ids)))
            offset += len(ids)
        return flat_batch(
            [ids for ids, _ in documents],
            [np.arange(len(ids)) for ids, _ in documents],
            spans,
            (sources, targets, sequences),
        )

    @staticmethod
    def pad(documents: list[tuple[np.ndarray, np.ndarray]]) -> dict:
        """Lay documents into padded rows of one document."""
        width = max(len(ids) for ids, _ in documents)
        input_ids = np.zeros((len(documents), width), dtype=np.int64)
        mask = np.zeros_like(input_ids)
        sources, targets, sequences = [], [], []
        for row, (ids, labels) in enumerate(documents):
            input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
            predicted = trained_positions(labels)
            sources.append(predicted - 1 + row * width)
            targets.append(labels[predicted])
            sequences.append(np.full(len(predicted), row))
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(mask),
            **index_tensors(sources, targets, sequences),
            "last_index": torch.from_numpy(np.arange(len(documents)) * width + mask.sum(1) - 1),
            "num_sequences": len(documents),
            "num_tokens": int(mask.sum()),
        }


class GroupCollator:
    """Collates groups {prompt_ids, answers: [(ids, labels), …]}.

    A group is the prompt and its answers in one row: the prompt stands once, every answer sees it and not the
    others.
    """

    def __init__(self, *, padded: bool = False):
        self.padded = padded

    def __call__(self, examples: Sequence[Example]) -> dict:
        """Return the module docstring's batch; a sequence is an answer."""
        if not examples:
            nothing = FlatCollator(padded=self.padded)([])
            return nothing | {"num_sequences": 0, "last_index": nothing["last_index"][:0]}
        return self.pad(examples) if self.padded else self.flatten(examples)

    @staticmethod
    def flatten(examples: Sequence[Example]) -> dict:
        """Share each prompt between its answers."""
        rows, positions, spans, sources, targets, sequences, offset = [], [], [], [], [], [], 0
        for example in examples:
            prompt, begin = example["prompt_ids"], offset
            rows.append(prompt)
            positions.append(np.arange(len(prompt)))
            offset += len(prompt)
            for side, (ids, labels) in enumerate(example["answers"]):
                start = offset
                predicted = np.flatnonzero(labels != IGNORE_INDEX)
                source = start + predicted - 1
                # the prompt's last token predicts an answer's first
                source[predicted == 0] = begin + len(prompt) - 1
                sources.append(source)
                targets.append(labels[predicted])
                sequences.append(np.full(len(predicted), len(sequences)))
                rows.append(ids)
                positions.append(len(prompt) + np.arange(len(ids)))
                offset += len(ids)
                shared = Span(start, offset, begin, begin + len(prompt))
                spans.append(Span(begin, offset) if side == 0 else shared)
        return flat_batch(rows, positions, spans, (sources, targets, sequences))

    @staticmethod
    def pad(examples: Sequence[Example]) -> dict:
        """Repeat the prompt before each answer, in padded rows."""
        documents = []
        for example in examples:
            prompt = example["prompt_ids"]
            ignored = np.full(len(prompt), IGNORE_INDEX)
            for ids, labels in example["answers"]:
                documents.append((np.concatenate([prompt, ids]), np.concatenate([ignored, labels])))
        return FlatCollator.pad(documents)


class PairCollator(GroupCollator):
    """Collates pairs {prompt_ids, chosen_ids, chosen_labels, rejected_ids, rejected_labels[, margin]}."""

    def __call__(self, examples: Sequence[Example]) -> dict:
        """Return the module docstring's batch; sequence 2i is pair i's chosen answer, 2i + 1 its rejected.

        It also has `margins` (P,), the pairs' own margins.
        """
        groups = [
            {
                "prompt_ids": example["prompt_ids"],
                "answers": [
                    (example[f"{side}_ids"], example[f"{side}_labels"]) for side in ("chosen", "rejected")
                ],
            }
            for example in examples
        ]
        margins = torch.tensor([example.get("margin", 0.0) for example in examples])
        return super().__call__(groups) | {"margins": margins}


def trained_positions(labels: np.ndarray) -> np.ndarray:
    """Return the positions of a document that are trained and have a predecessor in it, (n,)."""
    return 1 + np.flatnonzero(labels[1:] != IGNORE_INDEX)


def flat_batch(
    rows: list[np.ndarray],
    positions: list[np.ndarray],
    spans: list[Span],
    indices: tuple[list, list, list],
) -> dict:
    """Return the batch of a flat row."""
    input_ids = torch.from_numpy(np.concatenate(rows).astype(np.int64))[None]
    return {
        "input_ids": input_ids,
        "position_ids": torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
        "layout": Layout(tuple(spans)),
        **index_tensors(*indices),
        "last_index": torch.tensor([span.end - 1 for span in spans]),
        "num_sequences": len(spans),
        "num_tokens": input_ids.shape[1],
    }


def index_tensors(sources: list, targets: list, sequences: list) -> dict:
    """Return source_index, target_ids and sequence_index, (N,) int64 each."""
    names = ("source_index", "target_ids", "sequence_index")
    return {
        name: torch.from_numpy(np.concatenate(parts).astype(np.int64))
        for name, parts in zip(names, (sources, targets, sequences), strict=True)
    }


def on_device(batch: dict, device: torch.device) -> dict:
    """Return a batch with its tensors on a device."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def example_length(example: Example) -> int:
    """Return how many tokens an example puts into a row."""
    return sum(len(value) for name, value in example.items() if name.endswith("_ids"))
