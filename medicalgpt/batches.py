"""Which rows a rank trains on, in which order: the same batches of an epoch however many ranks share them."""

from collections.abc import Iterator

import torch
from torch.utils.data import BatchSampler, DataLoader


class RankBatches(BatchSampler):
    """Deals the batches of an epoch out to ranks in turn, as one rank with more accumulation would take them.

    The order depends on seed and epoch only. Where the batches do not come out even, the last ranks get an
    empty batch, which the collators turn into a row without a trained token: no row is trained twice, and no
    rank waits.

    Args:
        num_rows: rows of the data set.
        shuffle: False: in their order.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        rank: int,
        num_ranks: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
    ):
        self.num_rows, self.batch_size, self.drop_last = num_rows, batch_size, drop_last
        self.rank, self.num_ranks, self.seed, self.shuffle = rank, num_ranks, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, over all ranks."""
        whole, rest = divmod(self.num_rows, self.batch_size)
        return whole + (rest > 0 and not (self.drop_last and whole))

    def __len__(self) -> int:
        """Return this rank's batches of an epoch; every rank has as many."""
        return -(-self.num_batches // self.num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches, each a list of row numbers."""
        order = torch.arange(self.num_rows)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_rows, generator=generator)
        batches = order.split(self.batch_size)[: self.num_batches]
        for turn in range(len(self)):
            place = turn * self.num_ranks + self.rank
            yield batches[place].tolist() if place < len(batches) else []


class RankLoader(DataLoader):
    """A loader over RankBatches that takes the epoch from the training loop."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.batch_sampler.set_epoch(epoch)
