"""What a loaded model can do, found out by trying before the first step."""

import logging

from medicalgpt.collator import FlatCollator
from medicalgpt.engine import FlatLM
from medicalgpt.tokenization import tokens

import psutil
import torch

logger = logging.getLogger("medicalgpt")


def probe_batch(documents: list[list[int]], device: torch.device, *, padded: bool = False) -> dict:
    """Return a batch of documents, every token trained."""
    flat = tokens([i for document in documents for i in document])
    collate = FlatCollator(padded=padded)
    batch = collate([{"input_ids": flat, "labels": flat, "lengths": list(map(len, documents))}])
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def confines_documents(model: FlatLM, vocab_size: int) -> bool:
    """Return whether documents of one row stay apart.

    Two rows that differ in their first document must agree on the second, and agree with it alone. Models
    that ignore the attention function, or carry state along the row, fail, and are trained on padded rows.
    """
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randint(min(10, vocab_size - 1), vocab_size, (3, 24), generator=generator).tolist()
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            beside_a, beside_b, alone = (
                model(**probe_batch(documents, parameter.device))[-len(c) + 1 :]
                for documents in ([a, c], [b, c], [c])
            )
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    loose = 1e-3 if parameter.dtype == torch.float32 else 0.25
    return bool((beside_a - beside_b).abs().max() < 1e-4 and (beside_a - alone).abs().max() < loose)


def choose_rows(model: FlatLM) -> None:
    """Decide by the probe whether the model's batches are flat rows or padded ones; say so if padded."""
    causal_lm = model.causal_lm
    model.padded = not confines_documents(model, causal_lm.get_input_embeddings().num_embeddings)
    if model.padded:
        causal_lm.set_attn_implementation("sdpa" if causal_lm._supports_sdpa else "eager")
        logger.info(
            "padded=True: documents of one row would see each other in this model, so rows hold one document"
        )


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


def bytes_saved_for_backward(model: FlatLM, vocab_size: int, num_tokens: int = 64) -> float:
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
