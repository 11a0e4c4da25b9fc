"""When each alarm goes off, what it says, and that healthy runs set off none."""

import math

import pytest

from alpaca_rlhf.utils.logging.alarms import CLOSE, EXACT, HALF, Alarms

# Metrics of the embedded pipeline at the beginning and at the end (docs/tracking.md).
HEALTHY = {
    "reward/score_mean": (-0.8, 3.4), "reward/score_std": (3.2, 2.6), "kl/k1": (0.0, 3.3),
    "response/length_mean": (9.1, 16.0), "response/eos_rate": (1.0, 1.0),
    "response/repetition": (0.002, 0.01), "policy/entropy": (0.5, 0.33),
    "value/explained_variance": (-10.0, 0.85),
}
ITERATIONS = 48


def told(**ends):
    """Return the alarms, by kind, of a run whose metrics change evenly from start to end."""
    ends = {**HEALTHY, **ends}
    alarms, found = Alarms(), {}
    for number in range(ITERATIONS):
        part = number / (ITERATIONS - 1)
        row = {name: a + (b - a) * part for name, (a, b) in ends.items()}
        if "value/explained_variance" not in ends or ends["value/explained_variance"] == (-10, .85):
            row["value/explained_variance"] = 1 - 11 * math.exp(-number / 4)
        new = alarms.check(row)
        assert not new.keys() & found, "each kind once"
        found |= new
    return found


def test_a_healthy_run_sets_off_none():
    assert told() == {}


@pytest.mark.parametrize(
    ("kind", "ends", "seen", "remedy"),
    [
        ("kl", {"kl/k1": (0.0, 40.0)}, "15.", "raise --kl_coef"),
        ("eos", {"response/eos_rate": (1.0, 0.6)}, "end with eos", "raise --missing_eos_penalty"),
        ("length", {"response/length_mean": (10.0, 60.0)}, "responses grow", "raise --kl_coef"),
        ("repetition", {"response/repetition": (0.0, 0.5)}, "repeat", "look at the samples"),
        ("entropy", {"policy/entropy": (0.5, 0.02)}, "collapses", "--entropy_coef"),
        ("critic", {"value/explained_variance": (-0.4, -0.2)}, "does not predict",
         "--critic_warmup_steps"),
    ],
)
def test_each_goes_off_alone_and_says_what_it_saw_and_what_to_do(kind, ends, seen, remedy):
    found = told(**ends)
    assert found.keys() == {kind}
    assert seen in found[kind] and remedy in found[kind]


@pytest.mark.parametrize("bought", [
    {"response/eos_rate": (1.0, 0.6)}, {"response/length_mean": (10.0, 60.0)},
    {"response/repetition": (0.0, 0.5)},
])
def test_longer_or_endless_responses_are_no_alarm_while_the_score_stays(bought):
    assert told(**{"reward/score_mean": (1.0, 1.2), **bought}) == {}


def test_short_responses_may_double():
    assert told(**{"response/length_mean": (3.0, 8.0)}) == {}


@pytest.mark.parametrize(("seen", "alarmed"), [(1e-6, False), (2e-5, True), (math.nan, True)])
def test_a_ratio_other_than_1_before_the_first_update_is_an_alarm_at_once(seen, alarmed):
    found = Alarms().check({"policy/first_log_ratio_max": seen})
    assert list(found) == ["ratio"] * alarmed
    assert all("dropout is on" in message for message in found.values())


@pytest.mark.parametrize(("limits", "metric", "good", "bad", "kind"), [
    (CLOSE, "policy/first_log_ratio_max", 9e-4, 2e-3, "ratio"),
    (HALF, "policy/first_log_ratio_mean", 9e-3, 2e-2, "ratio"),
    (EXACT, "rollout/decoding_difference_max", 9e-3, 2e-2, "decoding"),
    (HALF, "rollout/decoding_difference_mean", 4e-2, 6e-2, "decoding"),
])
def test_log_ratios_and_decoding_have_limits_by_precision(limits, metric, good, bad, kind):
    assert Alarms(limits).check({metric: good}) == {}
    assert list(Alarms(limits).check({metric: bad})) == [kind]
    assert HALF.keys().isdisjoint(EXACT), "in half precision single tokens differ by a tenth"


def test_a_non_finite_kl_is_an_alarm():
    alarms = Alarms()
    assert [list(alarms.check({"kl/k1": kl})) for kl in (1.0, 1.0, 1.0, 1.0, math.nan)] == [
        [], [], [], [], ["kl"]]


def test_a_single_outlier_is_no_alarm():
    alarms = Alarms()
    for number in range(ITERATIONS):
        assert alarms.check({"kl/k1": 60.0 if number == 20 else 2.0}) == {}


def test_the_critic_has_some_iterations_to_learn():
    alarms = Alarms()
    found = [bool(alarms.check({"value/explained_variance": -1.0})) for _ in range(22)]
    assert found == [False] * 20 + [True, False]
