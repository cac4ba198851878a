"""Attention confined to documents in a flat row, on every backend, as a function that transformers calls.

Many documents share a row without padding. Each sees itself only; an answer of a pair also sees the shared
prompt. On CUDA in half precision this is one variable-length flash kernel, elsewhere scaled dot product
attention per document. Sliding windows, soft caps and attention sinks of a model are honoured.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

FLAT_ATTENTION = "medicalgpt_flat"


@dataclass(frozen=True)
class Span:
    """A document's tokens [start, end) in the row; they also see the tokens [prefix_start, prefix_end)."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def num_keys(self) -> int:
        """How many tokens its last token sees."""
        return self.prefix_end - self.prefix_start + self.end - self.start


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a flat row: spans in order, together covering the row."""

    spans: tuple[Span, ...]

    @cached_property
    def placed(self) -> dict[torch.device, tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        """What `on` has already brought to a device; every layer of a model asks for the same."""
        return {}

    def on(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return what a variable-length kernel needs, on a device.

        Returns:
            Rows of key and value as the spans see them, (K,), or None when every span sees itself only;
            cumulative lengths of queries and of keys, (S + 1,) int32 each.
        """
        if device not in self.placed:
            index = None
            if any(span.prefix_end for span in self.spans):
                seen = [[*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)] for s in self.spans]
                index = torch.tensor([place for places in seen for place in places], device=device)
            queries = torch.tensor([0, *(s.end - s.start for s in self.spans)]).cumsum(0)
            keys = torch.tensor([0, *(s.num_keys for s in self.spans)]).cumsum(0)
            self.placed[device] = index, queries.int().to(device), keys.int().to(device)
        return self.placed[device]

    @cached_property
    def max_lengths(self) -> tuple[int, int]:
        """The longest query and key span, in tokens."""
        return max(s.end - s.start for s in self.spans), max(s.num_keys for s in self.spans)


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attend within the spans of `layout`; the signature is the one of transformers' attention functions.

    Args:
        query: (1, H, T, D). key, value: (1, H_kv, T, D).
        layout: the spans of the row.
        sliding_window: tokens a query sees, itself included.
        softcap, s_aux: Gemma 2's cap of the scores, GPT-OSS's sink per head.

    Returns:
        (1, T, H, D), None.
    """
    if layout is None:
        raise ValueError("flat attention needs the layout of its row")
    plain_scores = softcap is None and s_aux is None
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave float32 under autocast
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if plain_scores and not dropout and flash_kernel_takes(query):
        return flash_spans(query, key, value, layout, scaling, sliding_window), None
    outputs = []
    for span in layout.spans:
        q, k, v = query[:, :, span.start : span.end], keys_of(key, span), keys_of(value, span)
        if plain_scores:
            mask = span_mask(span, sliding_window, query.device)
            outputs.append(
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=mask,
                    is_causal=mask is None and q.shape[2] > 1,
                    scale=scaling,
                    dropout_p=dropout,
                    enable_gqa=k.shape[1] != q.shape[1],
                )
            )
        else:
            outputs.append(eager_span(q, k, v, span, scaling, dropout, sliding_window, softcap, s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def keys_of(states: torch.Tensor, span: Span) -> torch.Tensor:
    """Return the keys or values that a span sees, (1, H_kv, K, D)."""
    own = states[:, :, span.start : span.end]
    if not span.prefix_end:
        return own
    return torch.cat([states[:, :, span.prefix_start : span.prefix_end], own], dim=2)


def span_mask(span: Span, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return who sees whom in a span, (Q, K) bool, or None where plain causal attention says it."""
    queries, keys = span.end - span.start, span.num_keys
    windowed = sliding_window is not None and sliding_window < keys
    if queries == keys and not windowed:
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask.triu(keys - queries - sliding_window + 1) if windowed else mask


def eager_span(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    span: Span,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one span with capped scores or sinks, (1, H, Q, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)  # (1, H, Q, K)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = span_mask(span, sliding_window, q.device)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout) @ v


@cache
def flash_kernel_runs_on(device: torch.device) -> bool:
    """Return whether a GPU has the flash kernel: compute capability 8.0 or more."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def flash_kernel_takes(query: torch.Tensor) -> bool:
    """Return whether the flash kernel can compute with these states: half precision, heads of up to 256."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[-1] <= 256 and flash_kernel_runs_on(query.device)


def flash_spans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """All spans in one variable-length flash kernel, (1, T, H, D)."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, H, D)
    index, cu_q, cu_k = layout.on(q.device)
    if index is not None:
        k, v = k[index], v[index]
    left = -1 if sliding_window is None else sliding_window - 1
    return varlen_attn(
        q,
        k,
        v,
        cu_q,
        cu_k,
        *layout.max_lengths,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=k.shape[1] != q.shape[1],
    )[None]


def no_mask(*_, **__) -> None:
    """The layout says who sees whom, so no mask is built."""


AttentionInterface.register(FLAT_ATTENTION, flat_attention)
AttentionMaskInterface.register(FLAT_ATTENTION, no_mask)
