"""Which rows form which batch on which rank: the same number of batches on every rank."""

import math

import torch


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """The indices 0 … n-1 in an order fixed by seed and epoch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def rank_batches(
    order: list[int], batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """This rank's batches of an order of rows.

    Each global batch is `world_size * batch_size` rows, dealt out to the ranks in turn, so that n
    ranks with batch b see what one rank with batch n * b sees. A last, smaller global batch is
    dealt out alike; its rows are left out when there are fewer of them than ranks.
    """
    size = batch_size * world_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batch[rank::world_size] for batch in batches if len(batch) >= world_size]


def covering_batches(
    n: int, batch_size: int, rank: int, world_size: int
) -> list[tuple[list[int], bool]]:
    """Batches that cover rows 0 … n-1 once over all ranks, for measuring.

    Every rank gets the same number of batches, because under ZeRO-3 all must take each forward
    pass; the second item is False for a batch that only keeps step and must not be counted.
    """
    mine = list(range(rank, n, world_size))
    real = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    most = math.ceil(math.ceil(n / world_size) / batch_size)
    return [(batch, True) for batch in real] + [([0], False)] * (most - len(real))
