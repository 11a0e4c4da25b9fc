"""Which rows form which batch on which rank: the same number of batches on every rank."""

import math
from collections.abc import Sequence

import torch


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """The indices 0 … n-1 in an order fixed by seed and epoch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def length_grouped(
    lengths: Sequence[int], size: int, seed: int, epoch: int, pool: int = 50
) -> list[int]:
    """The indices of all rows, so that every `size` in turn are a batch of like lengths.

    The rows are shuffled, sorted by length within pools of `pool` batches, cut into batches, and
    the batches are shuffled. A function of its arguments alone, so that a run that is resumed, or
    that has another number of ranks for the same global batch, goes on in the same order.

    Args:
        lengths: tokens of each row.
        size: rows of a global batch.
        seed, epoch: of the shuffling.
        pool: batches that are sorted together; more of them pad less and mix less.
    """
    order = shuffled(len(lengths), seed, epoch)
    batches: list[list[int]] = []
    for start in range(0, len(order), pool * size):
        rows = sorted(order[start : start + pool * size], key=lengths.__getitem__)
        batches += [rows[at : at + size] for at in range(0, len(rows), size)]
    # A batch that is not full stays last: what reads the order cuts it into full ones.
    full = len(order) // size
    places = [*shuffled(full, seed + 1, epoch), *range(full, len(batches))]
    return [row for place in places for row in batches[place]]


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
