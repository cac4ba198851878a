"""Sampled answers: batches of like length, a KV cache, and a random stream per prompt.

Every answer is drawn with random numbers of its own, so that it depends neither on the batch it was drawn in
nor on the number of ranks (but for the rounding of padded attention).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from medicalgpt.engine import FlatLM
from medicalgpt.probe import own_attention

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class Draw:
    """A sampled answer.

    Attributes:
        ids: its tokens, the stop token included where there is one.
        ended: whether the model ended it.
    """

    ids: list[int]
    ended: bool

    @property
    def said(self) -> list[int]:
        """The answer without its stop token."""
        return self.ids[: -1 if self.ended else None]


class Sampler:
    """Draws answers from a language model.

    Args:
        stop_ids: tokens that end an answer.
        temperature: divides the logits; 0: the likeliest token every time.
        batch_size: prompts that are answered together.
    """

    def __init__(
        self,
        model: FlatLM,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
    ):
        self.model = model
        self.stop_ids = torch.tensor(list(stop_ids), device=model.lm.device)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Draw]:
        """Return an answer per prompt.

        Args:
            prompts: ids up to where the answer begins.
            seeds: of the random numbers of each answer.
        """
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        draws: dict[int, Draw] = {}
        was_training, bare_lm = self.model.training, self.model.bare_lm
        used = bare_lm.config._attn_implementation
        self.model.eval()
        bare_lm.set_attn_implementation(own_attention(bare_lm))
        try:
            with self.model.autocast(self.stop_ids.device):
                for begin in range(0, len(order), self.batch_size):
                    places = order[begin : begin + self.batch_size]
                    found = self.answer([prompts[i] for i in places], [seeds[i] for i in places])
                    draws |= zip(places, found, strict=True)
        finally:
            bare_lm.set_attn_implementation(used)
            self.model.train(was_training)
        return [draws[i] for i in range(len(prompts))]

    def answer(self, prompts: list[list[int]], seeds: list[int]) -> list[Draw]:
        """Answer one batch; a prompt that comes again is read once, rows leave as they end."""
        device, width = self.stop_ids.device, max(map(len, prompts))
        distinct = [prompt for prompt, _ in itertools.groupby(prompts)]
        copies = [i for i, (_, same) in enumerate(itertools.groupby(prompts)) for _ in same]
        pads = [width - len(prompt) for prompt in distinct]
        ids = torch.tensor(
            [[0] * p + prompt for p, prompt in zip(pads, distinct, strict=True)], device=device
        )
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pads], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.bare_lm.config)
        hidden = self.read(ids, mask, positions, cache)
        keep = torch.tensor(copies, device=device)  # rows of what was read last that go on
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        answers: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        rows = list(range(len(prompts)))  # the prompts that are still being answered
        for step in range(self.max_new_tokens):
            if len(keep) != len(hidden):
                cache.batch_select_indices(keep)
                hidden, mask, positions = hidden[keep], mask[keep], positions[keep]
            if step:
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                hidden = self.read(ids, mask, positions, cache)
            uniform = torch.stack([torch.rand((), generator=generators[row]) for row in rows])
            tokens = self.choose(self.model.project(hidden).float(), uniform.to(device))
            stopped = torch.isin(tokens, self.stop_ids).tolist()
            for row, token, stop in zip(rows, tokens.tolist(), stopped, strict=True):
                answers[row].append(token)
                ended[row] = stop
            if all(stopped):
                break
            keep = torch.tensor([i for i, stop in enumerate(stopped) if not stop], device=device)
            rows = [rows[i] for i in keep.tolist()]
            ids, positions = tokens[keep, None], positions[:, -1:] + 1
        return [Draw(answer, end) for answer, end in zip(answers, ended, strict=True)]

    def read(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Read tokens (B, T) into the cache and return the hidden state of each row's last one, (B, H).

        Args:
            mask: of everything in the cache and these tokens. positions: of these tokens, (B, T).
        """
        output = self.model.bare_lm.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        # (B, 1, H) as a slice of (B, T, H) would make the product with a frozen head copy it B times
        return output.last_hidden_state[:, -1].contiguous()

    def choose(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Draw one token per row: the first whose cumulative probability exceeds the row's number, (B,).

        Args:
            logits: (B, V) fp32. uniform: numbers in [0, 1), (B,).
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = (logits / self.temperature).softmax(-1).double().cumsum(-1)  # (B, V)
        wanted = uniform.double() * cumulative[:, -1]
        return torch.searchsorted(cumulative, wanted[:, None], right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )
