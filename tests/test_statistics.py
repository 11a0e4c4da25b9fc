"""Intervals and figures of merit, against numbers worked out by hand or by other means."""

import itertools
import math

import numpy as np
import pytest

from alpaca_rlhf.evaluation import statistics


def array(*values):
    return np.array(values, dtype=np.float64)


def test_wilsons_interval_of_eight_in_ten():
    low, high = statistics.wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


def test_half_a_success_is_between_its_neighbours():
    lows = [statistics.wilson_interval(n, 10)[0] for n in (4, 4.5, 5)]
    assert lows == sorted(lows) and len(set(lows)) == 3


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error_says():
    rows = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = statistics.bootstrap_interval(rows, np.mean, seed=0)
    assert low < rows.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * rows.std() / 20, rel=0.15)


def test_the_bootstrap_is_fixed_by_its_seed_and_leaves_out_what_is_not_finite():
    rows = np.stack([array(1, 2, 3, 4), array(1, 2, 3, 5)], axis=1)
    first = statistics.bootstrap_interval(rows, statistics.pearson, seed=3)
    assert first == statistics.bootstrap_interval(rows, statistics.pearson, seed=3)
    assert all(map(math.isfinite, first))
    assert all(map(math.isnan, statistics.bootstrap_interval(rows, lambda _: math.nan)))


def test_accuracy_is_a_share_with_wilsons_interval_and_none_without_pairs():
    found = statistics.accuracy(array(1, 1, 0, 1))
    low, high = statistics.wilson_interval(3, 4)
    assert found == {"share": 0.75, "low": low, "high": high, "pairs": 4}
    assert statistics.accuracy(array()) == {"share": None, "low": None, "high": None, "pairs": 0}


def test_accuracy_by_length_has_buckets_of_similar_size_and_never_splits_a_length():
    correct, tokens = array(1, 0, 1, 1, 0, 0, 1, 1), array(5, 9, 5, 5, 12, 20, 30, 9)
    found = statistics.accuracy_by_length(correct, tokens)
    assert {bucket: (one["share"], one["pairs"]) for bucket, one in found.items()} == {
        (5, 5): (1.0, 3), (9, 9): (0.5, 2), (12, 12): (0.0, 1), (20, 30): (0.5, 2)}
    assert [(bucket, one["pairs"]) for bucket, one in statistics.accuracy_by_length(
        array(1, 0), array(7, 7)).items()] == [((7, 7), 2)]
    assert statistics.accuracy_by_length(array(), array()) == {}


def test_accuracy_by_the_longer_response():
    found = statistics.accuracy_by_longer_response(array(1, 1, 0, 1), array(3, 1, -2, 5))
    assert {name: (one["share"], one["pairs"]) for name, one in found.items()} == {
        "chosen": (1.0, 3), "rejected": (0.0, 1), "neither": (None, 0)}


def test_calibration_error_is_the_mean_distance_of_confidence_and_accuracy():
    # Margins of confidence 0.62 (right in 1 of 2) and 0.99 (right in 2 of 2).
    small, large = math.log(0.62 / 0.38), math.log(0.99 / 0.01)
    error, bins = statistics.calibration(array(small, -small, large, large))
    assert error == pytest.approx(0.5 * 0.12 + 0.5 * 0.01)
    assert [(b["count"], b["accuracy"]) for b in bins] == [(2, 0.5), (2, 1.0)]
    assert [b["confidence"] for b in bins] == pytest.approx([0.62, 0.99])
    tied, certain = statistics.calibration(array(0, 100))[1]
    assert (tied["low"], tied["accuracy"], certain["high"]) == (0.5, 0.0, 1.0)


def test_correlations_of_lines_ranks_and_constants():
    curve = np.stack([array(1, 2, 3, 4), array(1, 8, 27, 64)], axis=1)
    assert statistics.spearman(curve) == pytest.approx(1.0)
    assert statistics.pearson(curve) == pytest.approx(np.corrcoef(curve.T)[0, 1])
    assert math.isnan(statistics.pearson(np.stack([array(1, 2), array(5, 5)], axis=1)))


def test_equal_values_share_their_rank():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    tied = np.stack([array(10, 20, 20, 30), array(1, 2, 3, 4)], axis=1)
    assert statistics.spearman(tied) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_is_the_mean_over_all_choices_of_n(n):
    scores, values = array(0.3, 2.0, -1.0, 0.9), array(10.0, 20.0, 40.0, 80.0)
    chosen = [max(some, key=lambda i: scores[i]) for some in itertools.combinations(range(4), n)]
    expected = np.mean([values[i] for i in chosen])
    assert statistics.best_of_n(scores[None], values[None], n) == pytest.approx([expected])


def test_where_length_plays_no_part_controlling_for_it_changes_nothing():
    outcomes = array(1, 1, 1, 0) .repeat(50)
    rate = statistics.length_controlled_rate(outcomes, np.zeros(200))
    assert rate == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("skill", [0.0, 1.0])
def test_at_equal_length_only_skill_is_left(skill):
    generator = np.random.default_rng(0)
    longer_by = generator.normal(8, 5, 20000)
    chance = 1 / (1 + np.exp(-(skill + 2 * np.tanh(longer_by / longer_by.std()))))
    outcomes = (generator.random(20000) < chance).astype(float)
    rate = statistics.length_controlled_rate(outcomes, longer_by)
    assert rate == pytest.approx(1 / (1 + math.exp(-skill)), abs=0.05)
    assert rate < outcomes.mean() - 0.1


def test_a_side_that_always_wins_and_is_always_longer_gets_a_finite_rate():
    rate = statistics.length_controlled_rate(np.ones(50), np.full(50, 7.0))
    assert 0.9 < rate <= 1
