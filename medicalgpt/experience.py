"""What an update knows of its answers, token by token."""

from dataclasses import dataclass

import torch


@dataclass
class Experience:
    """What is known of the answers of an update before its passes, (R, T) each, 0 behind an answer's end."""

    mask: torch.Tensor
    logps: torch.Tensor
    reference_logps: torch.Tensor
    values: torch.Tensor | None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def flat(self, name: str, rows: list[int]) -> torch.Tensor:
        """Return one of them for some answers, token after token as a flat batch has them, (N,)."""
        return getattr(self, name)[rows][self.mask[rows].bool()]
