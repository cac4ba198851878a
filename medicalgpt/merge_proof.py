"""Proof of a merge, tensor by tensor: every written matrix is its base plus its adapter.

A probe of the whole model tells a broken merge from a right one only when the adapter does more than
rounding; here each adapted matrix is checked by itself. For a fixed random vector x, W′x must be Wx + (ΔW)x
with W′ read back from the disk; a matrix that is trained in full must be read back as it was.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

ALLOWED = 0.1  # of the adapter's own effect on x
ROUNDING = 1e-5  # of W x, in float32


@dataclass(frozen=True)
class Expected:
    """What one matrix must do to x: without its adapter and with it, both (out,)."""

    before: torch.Tensor
    after: torch.Tensor


def probe_vector(size: int) -> torch.Tensor:
    """Return the same random x for every matrix of one width, (in,)."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def product(weight: torch.Tensor) -> torch.Tensor:
    """Return W x in float32; a vector is multiplied element by element."""
    return (
        weight.float().cpu() @ probe_vector(weight.shape[-1]) if weight.dim() == 2 else weight.float().cpu()
    )


def expected_products(model: PeftModel) -> dict[str, Expected]:
    """Return {name in the merged model: what it must do} of every adapted matrix, before merging.

    Adapters that are no plain low-rank sum (DoRA) are left to the probe of the whole model.
    """
    expected = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            (adapter,) = module.active_adapters
            if module.use_dora.get(adapter):
                continue
            weight = module.get_base_layer().weight.detach()
            merged = weight + module.get_delta_weight(adapter).to(weight.dtype)
            expected[f"{name}.weight"] = Expected(product(weight), product(merged))
        elif isinstance(module, ModulesToSaveWrapper):
            (adapter,) = module.active_adapters
            trained = dict(module.modules_to_save[adapter].named_parameters())
            for part, before in module.original_module.named_parameters():
                after = trained[part].detach().to(before.dtype)
                expected[f"{name}.{part}"] = Expected(product(before.detach()), product(after))
    return expected


def wrong_tensors(model: nn.Module, expected: dict[str, Expected]) -> list[str]:
    """Return the matrices of the model, read back from the disk, that are not base plus adapter."""
    wrong = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, products in expected.items():
        found = product(parameters[name].detach()) if name in parameters else None
        effect = (products.after - products.before).norm()
        limit = ALLOWED * effect + ROUNDING * products.before.norm()
        if found is None or not (found - products.after).norm() <= limit:
            wrong.append(name)
    return wrong


def is_visible(expected: dict[str, Expected]) -> bool:
    """Return whether the adapter changes any matrix at all, in the type that the base is kept in."""
    return any(not torch.equal(products.before, products.after) for products in expected.values())
