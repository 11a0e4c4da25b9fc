"""Statistics of evaluations, with 95 % intervals: Wilson's for shares, a bootstrap for the rest."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Figures = dict[str, Any]


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Return the confidence interval of a share (E. B. Wilson, 1927); half a success is a tie."""
    z = 1.96
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return middle - half, middle + half


def bootstrap_interval(
    rows: Array, statistic: Callable[[Array], float], seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of a statistic over 1,000 resamples (B. Efron, 1979).

    `rows` [N, ...] are what was measured for each prompt or pair. Resamples with a non-finite
    statistic are left out; both limits are nan where all are.
    """
    generator = np.random.default_rng(seed)
    drawn = (rows[generator.integers(0, len(rows), len(rows))] for _ in range(1000))
    found = np.array([statistic(sample) for sample in drawn])
    found = found[np.isfinite(found)]
    if not len(found):
        return math.nan, math.nan
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def accuracy(correct: Array) -> Figures:
    """Return `share` of pairs in order, its Wilson interval (`low`, `high`), and number of `pairs`.

    `correct` [N] is 1 where the chosen response has the higher score, else 0. Without pairs, all
    but their number are None.
    """
    if not len(correct):
        return {"share": None, "low": None, "high": None, "pairs": 0}
    low, high = wilson_interval(float(correct.sum()), len(correct))
    return {"share": float(correct.mean()), "low": low, "high": high, "pairs": len(correct)}


def accuracy_by_length(correct: Array, tokens: Array) -> dict[tuple[int, int], Figures]:
    """Return the accuracy over pairs of similar length: {(shortest, longest): accuracy}.

    Buckets are quarters of the pairs, or nearly so: pairs of one length always share a bucket, and
    no bucket is empty. `tokens` [N] is the length of each pair's longer sequence as the reward
    model reads it: prompt and response, after truncation.
    """
    if not len(tokens):
        return {}
    edges = np.quantile(tokens, [0.25, 0.5, 0.75])
    place = np.searchsorted(edges, tokens, side="left")
    members = [place == i for i in np.unique(place)]
    return {(int(tokens[rows].min()), int(tokens[rows].max())): accuracy(correct[rows])
            for rows in members}


def accuracy_by_longer_response(correct: Array, longer_by: Array) -> dict[str, Figures]:
    """Return the accuracy over pairs by which response is longer: chosen, rejected or neither.

    `longer_by` [N] is the tokens of the chosen response minus those of the rejected one.
    """
    sign = np.sign(longer_by)
    return {name: accuracy(correct[sign == one])
            for name, one in (("chosen", 1), ("rejected", -1), ("neither", 0))}


def calibration(margins: Array) -> tuple[float, list[Figures]]:
    """Return the expected calibration error (Guo et al. 2017, eq. 3) and its non-empty bins.

    `margins` [N] are scores of the chosen response minus scores of the rejected one; a pair is in
    order where the margin is positive. The confidence in a pair is sigmoid(|margin|), the
    probability that a Bradley-Terry model gives to the response it scores higher; ten bins of equal
    width go from confidence 0.5 to 1. The error is the sum over bins of
    count / N * |accuracy - confidence|.
    """
    confidence, correct = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    edges = np.linspace(0.5, 1.0, 11)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, 9)
    filled = [
        {"low": float(edges[i]), "high": float(edges[i + 1]), "count": int((place == i).sum()),
         "confidence": float(confidence[place == i].mean()),
         "accuracy": float(correct[place == i].mean())}
        for i in np.unique(place)
    ]
    error = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in filled) / len(margins)
    return error, filled


def pearson(pairs: Array) -> float:
    """Return the correlation of two columns [N, 2]; nan where one of them is constant."""
    deviations = pairs - pairs.mean(0)
    scale = math.sqrt(float((deviations[:, 0] ** 2).sum() * (deviations[:, 1] ** 2).sum()))
    return float((deviations[:, 0] * deviations[:, 1]).sum()) / scale if scale > 0 else math.nan


def spearman(pairs: Array) -> float:
    """Return the correlation of the ranks of two columns [N, 2]; ties share their mean rank."""
    def ranks(values: Array) -> Array:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[place]

    return pearson(np.stack([ranks(column) for column in pairs.T], axis=1))


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """Format a figure and its interval for a table."""
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def best_of_n(scores: Array, values: Array, n: int) -> Array:
    """Return the value [P] of the best-scored of n responses, averaged over all choices of n of N.

    The i-th lowest of N scores is the highest in C(i - 1, n - 1) of the C(N, n) subsets (the
    estimator of Nakano et al. 2021, appendix I). The best is chosen by `scores` [P, N]; `values`
    [P, N] are the scores themselves or those of another judge.
    """
    count = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    order = np.argsort(scores, axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1) @ weights


def length_controlled_rate(outcomes: Array, longer_by: Array) -> float:
    """Return the win rate at equal length (after Dubois et al. 2024, Length-Controlled AlpacaEval).

    It is the prediction of a logistic regression of the outcome on tanh(length difference / its
    standard deviation) at difference 0. A ridge of 0.01 keeps the weight of the length finite where
    length alone decides. `outcomes` [N] are 1 for a win, 0.5 for a tie, 0 for a loss; `longer_by`
    [N] is in tokens.
    """
    spread = float(longer_by.std()) or 1.0
    design = np.stack([np.ones(len(outcomes)), np.tanh(longer_by / spread)], axis=1)
    ridge = np.diag([1e-6, 0.01])
    weights = np.zeros(2)
    for _ in range(50):  # Newton's method; it converges in a few steps
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        slope = design.T @ (outcomes - chance) - ridge @ weights
        curve = (design * (chance * (1 - chance))[:, None]).T @ design + ridge
        step = np.linalg.solve(curve, slope)
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-np.clip(weights[0], -30, 30))))
