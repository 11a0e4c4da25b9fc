"""Figures of merit of evaluations, and how sure one may be of them: numbers in, numbers out."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (E. B. Wilson, 1927); half a success is a tie."""
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return middle - half, middle + half


@dataclass(frozen=True)
class Bin:
    """Cases of like confidence: from `low` to `high`, how many, how sure and how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(confidence: Array, right: Array, bins: int = 10) -> tuple[float, list[Bin]]:
    """Expected calibration error (Guo et al. 2017, eq. 3), and the bins it is made of.

    Args:
        confidence: [N], the probability given to the answer that was chosen, from 0.5 to 1.
        right: [N], 1 where it was the right one.
        bins: of equal width.

    Returns:
        sum over bins of count / N * |accuracy - confidence|, and the bins that are not empty.
    """
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    filled = [
        Bin(float(edges[i]), float(edges[i + 1]), int((place == i).sum()),
            float(confidence[place == i].mean()), float(right[place == i].mean()))
        for i in range(bins) if (place == i).any()
    ]
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in filled) / len(confidence)
    return error, filled
