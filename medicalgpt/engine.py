"""The model as a stage trains it: a flat batch in, log-probabilities of tokens or scores of answers out.

The vocabulary projection is computed for trained positions only, in chunks, so that logits of shape (T, V)
never exist.
"""

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_BYTES = 64 * 2**20  # of fp32 logits that exist at one time


class LinearLogps(torch.autograd.Function):
    """log softmax(h Wᵀ)[target] per row, chunk by chunk, for a projection W that is not trained.

    d logp_t / d h_t = W[target_t] − softmax(h_t Wᵀ) W is all that backward needs, (N, H); it is computed in
    forward while a chunk's logits exist, so no logits are kept and none are computed twice. The entropies of
    the distributions come with it where `entropies`, (N,) fp32, is there to take them.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        entropies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden (N, H), weight (V, H), targets (N,) → (N,) fp32, in nats."""
        hidden = hidden.to(weight.dtype)
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(targets), chunk):
            rows = slice(begin, begin + chunk)
            log_softmax = (hidden[rows] @ weight.t()).float().log_softmax(-1)  # (n, V)
            target = targets[rows, None]
            logps[rows] = log_softmax.gather(1, target)[:, 0]
            if entropies is not None:
                entropies[rows] = torch.special.entr(log_softmax.exp()).sum(-1)
            if gradient is not None:
                minus_p = log_softmax.exp_().neg_()
                minus_p.scatter_add_(1, target, torch.ones_like(target, dtype=minus_p.dtype))
                gradient[rows] = minus_p.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        """Scale each row's gradient; upstream (N,)."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None, None


def projected_logps(
    project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log softmax(project(h))[target] and the entropies of one chunk, (n,) fp32 each."""
    log_softmax = project(hidden).float().log_softmax(-1)
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropies


class FlatModel(nn.Module):
    """A decoder, with or without adapters, that reads flat batches.

    Args:
        lm: the model.
        autocast_dtype: computes in this type under autocast, in training, probes and evaluation alike.
        neftune_alpha: noise on the embeddings of training batches, scaled per document (NEFTune,
            arXiv:2310.05914).

    Attributes:
        padded: the model cannot keep documents of one row apart; its batches are padded rows of one document.
    """

    accepts_loss_kwargs = True  # Trainer: the loss is already normalised over the accumulated batch

    def __init__(
        self,
        lm: PreTrainedModel | PeftModel,
        *,
        autocast_dtype: torch.dtype | None = None,
        neftune_alpha: float | None = None,
    ):
        super().__init__()
        self.autocast_dtype = autocast_dtype
        self.lm = lm
        self.neftune_alpha = neftune_alpha
        self.padded = False

    @property
    def config(self):
        """The language model's configuration."""
        return self.lm.config

    @property
    def has_adapters(self) -> bool:
        """Whether the model is a frozen base under adapters, which can be switched off."""
        return isinstance(self.lm, PeftModel)

    @property
    def bare_lm(self) -> PreTrainedModel:
        """The language model itself; adapters live inside its layers."""
        return self.lm.get_base_model() if self.has_adapters else self.lm

    def train(self, mode: bool = True) -> "FlatModel":
        """Switch training mode; 4-bit layers stay in it.

        bitsandbytes 0.50 repacks a 4-bit layer's weights in evaluation mode on CPUs with AVX512-BF16, after
        which the backward pass and a merge read garbage. These layers do the same in both modes otherwise.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.training = True
        return self

    def hidden_states(self, input_ids: torch.Tensor, **batch) -> torch.Tensor:
        """Return the last hidden state of every position, (B·T, H).

        Args:
            input_ids: (B, T).
            batch: position_ids and layout, or attention_mask; what else a batch carries is not the model's
                business.
        """
        inputs = {name: batch[name] for name in ("position_ids", "layout", "attention_mask") if name in batch}
        if self.neftune_alpha and self.training:
            inputs["inputs_embeds"] = self.noisy_embeddings(input_ids, batch)
        else:
            inputs["input_ids"] = input_ids
        return self.bare_lm.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context that the model computes in."""
        dtype = self.autocast_dtype
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    def noisy_embeddings(self, input_ids: torch.Tensor, batch: dict) -> torch.Tensor:
        """Return embeddings with uniform noise of magnitude α / √(L·H), L a document's tokens, (B, T, H)."""
        embeddings = self.bare_lm.get_input_embeddings()(input_ids)
        if "layout" in batch:
            lengths = torch.cat([torch.full((s.end - s.start,), s.num_keys) for s in batch["layout"].spans])[
                None
            ]
        else:
            lengths = batch["attention_mask"].sum(-1, keepdim=True).expand_as(input_ids)
        magnitude = self.neftune_alpha / (lengths.to(embeddings.device).float() * embeddings.shape[-1]).sqrt()
        noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1) * magnitude[..., None]
        return embeddings + noise.to(embeddings.dtype)


class FlatLM(FlatModel):
    """A causal language model that maps a flat batch to the log-probabilities of its trained tokens."""

    def forward(self, source_index: torch.Tensor, target_ids: torch.Tensor, **batch) -> torch.Tensor:
        """Return log p(target | what precedes it) of every trained token, (N,) fp32, in nats.

        Args:
            source_index, target_ids: (N,); see `collator`.
        """
        with self.autocast(source_index.device):
            return self.labelled_logps(self.hidden_states(**batch)[source_index], target_ids)

    def logps_and_entropies(
        self,
        source_index: torch.Tensor,
        target_ids: torch.Tensor,
        temperature: float,
        *,
        entropy_has_gradient: bool,
        **batch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p(target) and the entropy of the distribution that gave it, (N,) fp32 each, in nats.

        Args:
            temperature: divides the logits.
        """
        with self.autocast(source_index.device):
            hidden = self.hidden_states(**batch)[source_index]
            if entropy_has_gradient:
                return self.checked_projection(hidden, target_ids, temperature)
            entropies = torch.empty(len(target_ids), device=hidden.device)
            return self.labelled_logps(hidden, target_ids, temperature, entropies), entropies

    def labelled_logps(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        entropies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Project hidden states (N, H) to the vocabulary and return the targets' log-probabilities, (N,).

        Args:
            entropies: takes the entropies, (N,), where they are wanted.
        """
        head = self.bare_lm.get_output_embeddings()
        if plain_projection(head) and not has_logit_transform(self.config):
            scaled = hidden if temperature == 1 else hidden / temperature
            return LinearLogps.apply(scaled, head.weight, targets, self.chunk, entropies)
        logps, found = self.checked_projection(hidden, targets, temperature)
        if entropies is not None:
            entropies.copy_(found.detach())
        return logps

    def checked_projection(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project chunk by chunk, computing each chunk again for its gradient, (N,) fp32 twice."""

        def project(h: torch.Tensor) -> torch.Tensor:
            return self.project(h) / temperature

        chunks = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        parts = [checkpoint(projected_logps, project, h, t, use_reentrant=False) for h, t in chunks]
        logps, entropies = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(entropies)

    @property
    def chunk(self) -> int:
        """How many positions are projected at one time."""
        return max(1, CHUNK_BYTES // (4 * self.config.get_text_config().vocab_size))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states → logits as the model computes them: head, scale, soft cap. (n, H) → (n, V)."""
        config = self.config.get_text_config().to_dict()
        logits = self.bare_lm.get_output_embeddings()(hidden)
        if config.get("logit_scale"):  # Cohere
            logits = logits * config["logit_scale"]
        if config.get("logits_scaling"):  # Granite
            logits = logits / config["logits_scaling"]
        if config.get("final_logit_softcapping"):  # Gemma 2
            logits = (
                torch.tanh(logits / config["final_logit_softcapping"]) * config["final_logit_softcapping"]
            )
        return logits


class FlatScorer(FlatModel):
    """A decoder with a score head (num_labels 1) that maps a flat batch to the scores of its answers.

    The head is kept and computed in float32, whatever the decoder computes in.
    """

    def __init__(self, lm: PreTrainedModel | PeftModel, **options):
        super().__init__(lm, **options)
        self.bare_lm.score.float()

    def forward(self, last_index: torch.Tensor, **batch) -> torch.Tensor:
        """Return the score of every document or answer, read at its last token, (S,) fp32.

        Args:
            last_index: (S,); see `collator`.
        """
        with self.autocast(last_index.device):
            hidden = self.hidden_states(**batch)[last_index]
        return self.bare_lm.score(hidden.float())[:, 0]


def plain_projection(head: nn.Module) -> bool:
    """True for a frozen matrix without bias and without adapters."""
    adapted = isinstance(head, BaseTunerLayer | ModulesToSaveWrapper)
    return not adapted and isinstance(head, nn.Linear) and head.bias is None and not head.weight.requires_grad


def has_logit_transform(config) -> bool:
    """True when the model does something to its logits."""
    text = config.get_text_config().to_dict()
    return any(text.get(name) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"))
