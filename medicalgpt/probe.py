"""What a loaded model can do, found out by trying before the first step."""

import logging

from medicalgpt.collator import FlatCollator, on_device
from medicalgpt.engine import FlatLM, FlatModel, FlatScorer
from medicalgpt.errors import ModelError
from medicalgpt.tokenization import tokens

import psutil
import torch
from transformers import PreTrainedModel

logger = logging.getLogger("medicalgpt")


def probe_batch(documents: list[list[int]], device: torch.device, *, padded: bool = False) -> dict:
    """Return a batch of documents, every token trained."""
    flat = tokens([i for document in documents for i in document])
    collate = FlatCollator(padded=padded)
    batch = collate([{"input_ids": flat, "labels": flat, "lengths": list(map(len, documents))}])
    return on_device(batch, device)


def outputs(model: FlatModel, batch: dict) -> torch.Tensor:
    """Return what the model says at every position that predicts: log-probabilities or scores, (N,)."""
    if isinstance(model, FlatScorer):
        batch = batch | {"last_index": batch["source_index"]}
    return model(**batch)


def confines_documents(model: FlatModel, vocab_size: int) -> bool:
    """Return whether documents of one row stay apart and say what the model itself says about them.

    Two rows that differ in their first document must agree on the second, and agree with the model's own
    forward on it alone. Models that ignore the attention function, keep a window only in their mask, or carry
    state along the row, fail, and are trained on padded rows.
    """
    a, b, c = probe_documents(vocab_size)
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            rows = (probe_batch([x, c], device) for x in (a, b))
            beside_a, beside_b = (outputs(model, row)[-len(c) + 1 :] for row in rows)
    except (TypeError, ValueError, AttributeError, KeyError):
        return False
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "dtype" in str(error):
            raise
        return False
    half = next(model.parameters()).dtype != torch.float32 or model.autocast_dtype is not None
    same = (beside_a - beside_b).abs().max() < (1e-2 if half else 1e-4)
    return bool(same and agrees_with(own_outputs(model, c), beside_a, half))


def probe_documents(vocab_size: int) -> list[list[int]]:
    """Return three documents of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(10, vocab_size - 1), vocab_size, (3, 24), generator=generator).tolist()


def own_outputs(model: FlatModel, document: list[int]) -> torch.Tensor:
    """Return the same of a document by the model's own forward and attention, (T - 1,)."""
    bare_lm = model.bare_lm
    used = bare_lm.config._attn_implementation
    ids = torch.tensor([document], device=next(model.parameters()).device)
    bare_lm.set_attn_implementation(own_attention(bare_lm))
    try:
        with torch.no_grad(), model.autocast(ids.device):
            if isinstance(model, FlatLM):
                logps = bare_lm(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                return logps[:-1].gather(1, ids[0, 1:, None])[:, 0]
            hidden = bare_lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        bare_lm.set_attn_implementation(used)
    return bare_lm.score(hidden[0, :-1].float())[:, 0].detach()


def own_attention(bare_lm: PreTrainedModel) -> str:
    """Return the library's attention for a model."""
    return "sdpa" if bare_lm._supports_sdpa else "eager"


def agrees_with(expected: torch.Tensor, actual: torch.Tensor, half: bool) -> bool:
    """Return whether two computations of the same log-probabilities differ by rounding only."""
    return bool((expected - actual).abs().mean() < (0.1 if half else 1e-3))


def choose_rows(model: FlatModel) -> None:
    """Decide by the probe whether the model's batches are flat rows or padded ones; say so if padded.

    Raises:
        ModelError: what is computed here is not what the model itself says, either way.
    """
    bare_lm, was_training = model.bare_lm, model.training
    vocab_size = bare_lm.get_input_embeddings().num_embeddings
    model.eval()
    model.padded = not confines_documents(model, vocab_size)
    if model.padded:
        bare_lm.set_attn_implementation(own_attention(bare_lm))
        logger.info(
            "padded=True: documents of one row would see each other in this model, so rows hold one document"
        )
        document, parameter = probe_documents(vocab_size)[0], next(model.parameters())
        half = parameter.dtype != torch.float32 or model.autocast_dtype is not None
        with torch.no_grad():
            found = outputs(model, probe_batch([document], parameter.device, padded=True))
        if not agrees_with(own_outputs(model, document), found, half):
            raise ModelError(
                f"{bare_lm.config.model_type}: the model does something to its logits that this toolkit "
                "does not know; it cannot be trained here"
            )
    model.train(was_training)


class SavedBytes:
    """Counts the storages that autograd keeps for backward, each once, parameters apart."""

    def __init__(self, model: torch.nn.Module):
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that backward will need."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def bytes_saved_for_backward(model: FlatModel, vocab_size: int, num_tokens: int = 64) -> float:
    """Measure what a training step keeps for its backward pass, in bytes per token of the row."""
    parameter = next(model.parameters())
    document = [i % vocab_size for i in range(num_tokens)]
    batch = probe_batch([document], parameter.device, padded=model.padded)
    batch |= {"source_index": batch["source_index"][:1], "target_ids": batch["target_ids"][:1]}
    saved = SavedBytes(model)
    was_training, state = model.training, torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        logps = model.train()(**batch)  # the graph lives on, so no address is used twice
    torch.set_rng_state(state)
    model.train(was_training)
    total = sum(saved.sizes.values())
    del logps
    return total / num_tokens


def free_memory(num_ranks: int) -> float:
    """Return the memory one rank's step may use, in bytes: of its GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return psutil.virtual_memory().available / num_ranks
