"""Sums and means over the answers of all ranks: every rank gets the same numbers."""

from collections.abc import Sequence

import torch


class RankMeans:
    """Adds up over the ranks of a run.

    Args:
        num_ranks: 1: nothing is sent.
        device: where sums are made.
    """

    def __init__(self, num_ranks: int, device: torch.device | str):
        self.num_ranks, self.device = num_ranks, device

    def sums(self, values: Sequence[float]) -> list[float]:
        """Add numbers up."""
        if self.num_ranks == 1:
            return [float(value) for value in values]
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up in place."""
        if self.num_ranks > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def names(self, names: list[str]) -> list[str]:
        """Return the names that any rank has; one without answers has none."""
        if self.num_ranks == 1:
            return names
        every: list[list[str]] = [[]] * self.num_ranks
        torch.distributed.all_gather_object(every, names)
        return max(every, key=len)

    def mean(self, values: torch.Tensor) -> float:
        """Return the mean of values, (R,) on every rank."""
        total, count = self.sums([values.sum().item(), len(values)])
        return total / count

    def std(self, values: torch.Tensor) -> float:
        """Return the standard deviation of values, (R,) on every rank."""
        return self.moments(values, torch.ones_like(values))[1] ** 0.5

    def moments(self, values: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
        """Return mean and variance of the values whose mask is 1."""
        total, count = self.sums([(values * mask).sum().item(), mask.sum().item()])
        mean = total / count
        (squares,) = self.sums([((values - mean) ** 2 * mask).sum().item()])
        return mean, squares / count

    def whiten(self, values: torch.Tensor, mask: torch.Tensor, *, keep_mean: bool = False) -> torch.Tensor:
        """Scale to unit variance and, unless it is kept, mean zero; 0 where the mask is 0."""
        mean, variance = self.moments(values, mask)
        scaled = (values - mean) / (variance + 1e-8) ** 0.5
        return (scaled + mean if keep_mean else scaled) * mask
