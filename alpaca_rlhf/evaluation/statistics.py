"""Figures of merit of evaluations, and how sure one may be of them: numbers in, numbers out.

A share of cases comes with Wilson's interval; whatever else is measured over prompts or pairs comes
with a bootstrap interval over them. All intervals are of 95 %.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1000


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (E. B. Wilson, 1927); half a success is a tie."""
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return middle - half, middle + half


def bootstrap_interval(
    rows: Array, statistic: Callable[[Array], float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of a statistic over resampled rows (B. Efron, 1979).

    Args:
        rows: [N] or [N, ...]; what was measured on each prompt or pair.
        statistic: rows [N, ...] -> number; resamples for which it is not finite are left out.
        seed: of the resampling.
        resamples: how many.

    Returns:
        Low and high; both nan where no resample has a finite statistic.
    """
    generator = np.random.default_rng(seed)
    drawn = (rows[generator.integers(0, len(rows), len(rows))] for _ in range(resamples))
    found = np.array([statistic(sample) for sample in drawn])
    found = found[np.isfinite(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose chosen response has the higher score, with its Wilson interval.

    Attributes:
        share, low, high: None where there are no pairs.
        pairs: number of pairs.
    """

    share: float | None
    low: float | None
    high: float | None
    pairs: int


def accuracy(correct: Array) -> Accuracy:
    """Return the accuracy over pairs; `correct` [N] is 1 where a pair is in order, else 0."""
    if not len(correct):
        return Accuracy(share=None, low=None, high=None, pairs=0)
    low, high = wilson_interval(float(correct.sum()), len(correct))
    return Accuracy(share=float(correct.mean()), low=low, high=high, pairs=len(correct))


def accuracy_by_length(
    correct: Array, tokens: Array, buckets: int = 4
) -> dict[tuple[int, int], Accuracy]:
    """Return the accuracy over pairs of similar length, shortest first.

    The length of a pair is the token count of its longer sequence as the reward model reads it:
    prompt and response, after truncation. Bucket edges are quantiles, so that buckets hold similar
    numbers of pairs; pairs of one length always share a bucket.

    Args:
        correct: [N], 1 where a pair is in order, else 0.
        tokens: [N], length of each pair.
        buckets: at most this many.

    Returns:
        (shortest, longest) length in a bucket -> its accuracy; no bucket is empty.
    """
    if not len(tokens):
        return {}
    edges = np.quantile(tokens, np.arange(1, buckets) / buckets)
    place = np.searchsorted(edges, tokens, side="left")
    members = [place == i for i in np.unique(place)]
    return {(int(tokens[rows].min()), int(tokens[rows].max())): accuracy(correct[rows])
            for rows in members}


def accuracy_by_longer_response(correct: Array, longer_by: Array) -> dict[str, Accuracy]:
    """Return the accuracy over pairs by which response is longer: chosen, rejected or neither.

    Args:
        correct: [N], 1 where a pair is in order, else 0.
        longer_by: [N], tokens of the chosen response minus tokens of the rejected one.
    """
    sign = np.sign(longer_by)
    return {name: accuracy(correct[sign == one])
            for name, one in (("chosen", 1), ("rejected", -1), ("neither", 0))}


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence: its range, their number, mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def calibration(margins: Array, bins: int = 10) -> tuple[float, list[Bin]]:
    """Return the expected calibration error (Guo et al. 2017, eq. 3) and its non-empty bins.

    The confidence in a pair is sigmoid(|margin|), the probability that a Bradley-Terry model gives
    to the response it scores higher; a pair is in order where the margin is positive.

    Args:
        margins: [N], score of the chosen response minus score of the rejected one.
        bins: number of bins of equal width, from confidence 0.5 to 1.

    Returns:
        sum over bins of count / N * |accuracy - confidence|, and the bins that are not empty.
    """
    confidence, correct = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    filled = [
        Bin(low=float(edges[i]), high=float(edges[i + 1]), count=int((place == i).sum()),
            confidence=float(confidence[place == i].mean()),
            accuracy=float(correct[place == i].mean()))
        for i in np.unique(place)
    ]
    error = sum(b.count * abs(b.accuracy - b.confidence) for b in filled) / len(margins)
    return error, filled


def pearson(pairs: Array) -> float:
    """Correlation of two columns [N, 2]; nan where one of them does not vary."""
    deviations = pairs - pairs.mean(0)
    scale = math.sqrt(float((deviations[:, 0] ** 2).sum() * (deviations[:, 1] ** 2).sum()))
    return float((deviations[:, 0] * deviations[:, 1]).sum()) / scale if scale > 0 else math.nan


def spearman(pairs: Array) -> float:
    """Correlation of the ranks of two columns [N, 2]; equal values share their mean rank."""
    return pearson(np.stack([_ranks(column) for column in pairs.T], axis=1))


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def best_of_n(scores: Array, values: Array, n: int) -> Array:
    """What the best-scored of n replies is worth, in the mean over all choices of n of the N drawn.

    The i-th lowest of N scores is the highest of C(i - 1, n - 1) of the C(N, n) subsets (the
    estimator of Nakano et al. 2021, appendix I, without its variance).

    Args:
        scores: [P, N], by which the best is chosen.
        values: [P, N], what a reply is worth; the scores themselves, or another judge's.
        n: from 1 to N.

    Returns:
        [P].
    """
    count = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    order = np.argsort(scores, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1) @ weights


def length_controlled_rate(outcomes: Array, longer_by: Array) -> float:
    """The win rate that would be if both sides' replies were equally long.

    A logistic regression of the outcome on tanh(difference of lengths / its deviation), read off at
    difference 0 (the length term of Dubois et al. 2024, "Length-Controlled AlpacaEval"). A ridge of
    0.01 on the length's weight keeps it finite where length alone decides.

    Args:
        outcomes: [N], 1 for a win, 0.5 for a tie, 0 for a loss.
        longer_by: [N], tokens by which the reply is longer than the other side's.
    """
    spread = float(longer_by.std()) or 1.0
    design = np.stack([np.ones(len(outcomes)), np.tanh(longer_by / spread)], axis=1)
    ridge = np.diag([1e-6, 0.01])
    weights = np.zeros(2)
    for _ in range(50):  # Newton's steps; a handful is enough
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        slope = design.T @ (outcomes - chance) - ridge @ weights
        curve = (design * (chance * (1 - chance))[:, None]).T @ design + ridge
        step = np.linalg.solve(curve, slope)
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-np.clip(weights[0], -30, 30))))
