"""The optimizer step from uneven micro-batches, and which rows a run trains and measures on."""

import dataclasses
import math

import pytest
import torch
from conftest import moved, snapshot
from torch import nn
from torch.testing import assert_close

from alpaca_rlhf.utils import losses, training_loop
from alpaca_rlhf.utils.configs import CheckpointConfig
from alpaca_rlhf.utils.data.batches import collate_pairs, collate_tokens
from alpaca_rlhf.utils.model.causal_lm import forward_logits
from alpaca_rlhf.utils.model.reward_model import scores
from alpaca_rlhf.utils.run.checkpoints import Checkpoints
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
from alpaca_rlhf.utils.run.run_folder import RunFolder
from alpaca_rlhf.utils.training_loop import Plan, global_weight, optimizer_step

STAGES = [0, 1, 2, 3]
# 11, 2 and 5 trained tokens, and 1: batches of unlike weight, whichever way they are cut.
ROWS = [
    {"input_ids": [1, *range(50, 62)], "labels": [-100, -100, *range(51, 62)]},
    {"input_ids": [1, 70, 71, 72], "labels": [-100, -100, 71, 72]},
    {"input_ids": [1, *range(80, 87)], "labels": [-100, -100, -100, *range(82, 87)]},
    {"input_ids": [1, 90, 91, 2], "labels": [-100, -100, -100, 2]},
]
PAIRS = [
    {"chosen_ids": [1, 50, 51, 52, 2], "rejected_ids": [1, 50, 2]},
    {"chosen_ids": [1, 60, 2], "rejected_ids": [1, 60, 61, 62, 63, 2]},
    {"chosen_ids": [1, 70, 71, 2], "rejected_ids": [1, 70, 72, 2]},
]


def token_objective(engine):
    def objective(batch):
        logits = forward_logits(engine, batch.input_ids, batch.attention_mask)
        loss = losses.token_loss(logits, batch.labels)
        return loss, {"length_max": batch.attention_mask.sum(-1).max().float()}

    return objective


def pair_objective(engine):
    def objective(batch):
        chosen, rejected = scores(engine, batch.input_ids, batch.attention_mask).chunk(2)
        return losses.pairwise_loss(chosen, rejected), {"accuracy": (chosen > rejected).sum()}

    return objective


def tokens(*groups):
    return [collate_tokens([ROWS[i] for i in group], pad_id=3) for group in groups]


def actor(small, stage=0, **changes):
    """A step of plain size: a large eps makes Adam follow the gradient, not its sign alone."""
    plain = {"adam_eps": 0.1, "learning_rate": 0.1, "overrides": small.unclipped}
    return small.trained("actor", stage, **{**plain, **changes})


def step(engine, micro_batches, objective=token_objective):
    return optimizer_step(
        engine, micro_batches, objective(engine), global_weight(micro_batches)
    )


def check_same_step(small, groups, stage=0):
    """Uneven micro-batches leave the weights where one big batch leaves them."""
    start = snapshot(small.causal_lm())
    big, cut = actor(small, stage), actor(small, stage)
    one = step(big, tokens([0, 1, 2, 3]))
    many = step(cut, tokens(*groups))
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    for name, weight in snapshot(big.module).items():
        assert_close(snapshot(cut.module)[name], weight, rtol=1e-4, atol=2e-6)
    assert max((p - start[n]).abs().max() for n, p in snapshot(big.module).items()) > 1e-3


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("groups", [([0], [1], [2], [3]), ([0, 1, 2], [3]), ([1, 3], [0, 2])])
def test_uneven_micro_batches_take_the_step_of_one_big_batch(small, groups, stage):
    check_same_step(small, groups, stage)


def test_a_mean_of_micro_batch_means_is_noticed(small, monkeypatch):
    right = training_loop.optimizer_step

    def means(engine, micro_batches, objective, total_weight):
        def mean(batch):
            loss, stats = objective(batch)
            return loss / batch.weight(), stats

        return right(engine, micro_batches, mean, torch.tensor(float(len(micro_batches))))

    monkeypatch.setitem(step.__globals__, "optimizer_step", means)
    with pytest.raises(AssertionError):
        check_same_step(small, ([0], [1], [2], [3]))


def test_pairs_in_uneven_micro_batches_take_the_step_of_one_big_batch(small):
    plain = {"adam_eps": 0.1, "learning_rate": 0.1, "overrides": small.unclipped}
    engines = [small.trained("critic", **plain) for _ in range(2)]
    cuts = [[[0, 1, 2]], [[0], [1, 2]]]
    results = [
        step(engine, [collate_pairs([PAIRS[i] for i in g], pad_id=3) for g in cut], pair_objective)
        for engine, cut in zip(engines, cuts, strict=True)
    ]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"])
    first, second = (snapshot(engine.module) for engine in engines)
    for name, weight in first.items():
        assert_close(second[name], weight, rtol=1e-4, atol=2e-6)


def test_the_loss_is_the_token_mean_and_maxima_are_maxima(small):
    with torch.no_grad():
        total = sum(
            losses.token_loss(small.causal_lm()(input_ids=b.input_ids).logits, b.labels)
            for b in tokens([0], [1], [2], [3])
        )
    result = step(actor(small), tokens([0, 1], [2, 3]))
    assert result["loss"] == pytest.approx(total.item() / 19, rel=1e-5)
    assert result["length_max"] == 13


def test_a_last_short_accumulation_is_a_whole_step(small):
    # The engine was promised four micro-batches; the data ended after one.
    schedule = dataclasses.replace(small.schedule(), accumulation_steps=4)
    promised = dataclasses.replace(small)
    object.__setattr__(promised, "schedule", lambda: schedule)
    engines = actor(promised), actor(small)
    for engine in engines:
        step(engine, tokens([0, 1]))
        assert engine.global_steps == 1
    first, second = (snapshot(engine.module) for engine in engines)
    for name, weight in first.items():
        assert_close(second[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_changes_nothing_and_is_forgotten(small, stage):
    disturbed, calm = actor(small, stage), actor(small, stage)
    before = snapshot(disturbed.module)
    right = token_objective(disturbed)
    calls = []

    def second_is_nan(batch):
        calls.append(batch)
        loss, stats = right(batch)
        return (loss * math.nan if len(calls) == 2 else loss), stats

    batches = tokens([0], [1], [2])
    assert optimizer_step(disturbed, batches, second_is_nan, global_weight(batches)) is None
    assert moved(before, disturbed.module) == set()
    assert len(calls) == 2
    for engine in (disturbed, calm):
        step(engine, tokens([2], [3]))
    for name, weight in snapshot(calm.module).items():
        assert_close(snapshot(disturbed.module)[name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_told(small, stage, bad):
    engine = actor(small, stage)
    before, batches = snapshot(engine.module), tokens([0], [1])

    def steep(batch):
        # The loss is finite, its slope is not.
        logits = forward_logits(engine, batch.input_ids, batch.attention_mask)
        logits.register_hook(lambda gradient: gradient * bad)
        return losses.token_loss(logits, batch.labels), {}

    assert optimizer_step(engine, batches, steep, global_weight(batches)) is None
    assert moved(before, engine.module) == set()
    assert step(engine, batches) is not None
    assert moved(before, engine.module) != set()
    assert all(weight.isfinite().all() for weight in snapshot(engine.module).values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_norm_is_that_before_clipping(small, stage):
    engine, plain = actor(small, stage, overrides=None), small.causal_lm()
    batch = tokens([0])[0]
    loss = losses.token_loss(plain(input_ids=batch.input_ids).logits, batch.labels) / 11
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    step(engine, tokens([0]))
    assert norm > 1.0
    assert training_loop.gradient_norm(engine) == pytest.approx(norm.item(), rel=1e-4)


# ------------------------------------------------------------------- the loop


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.logged, self.events = [], []

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def event(self, kind, step, message):
        self.events.append((kind, step, message))


def run(small, plan, rows=5, objective=None, evaluate=dict, lengths=None, most=10, first=0):
    """Train on rows that name themselves by their length; gives back the steps and the rows."""
    engine, seen, tracker = actor(small), [], Recorder()
    data = [{"input_ids": [1] + [60 + i] * (i + 1), "labels": [-100] + [60 + i] * (i + 1)}
            for i in range(rows)]

    def collate(chosen):
        seen.append([len(row["input_ids"]) - 2 for row in chosen])
        return collate_tokens(chosen, pad_id=3)

    checkpoints = Checkpoints(
        RunFolder(None), {"model": engine}, config=CheckpointConfig(), step=1, arguments={},
        found=None,
    )
    checkpoints.progress.step = first
    training_loop.train(
        engine, data, collate, (objective or token_objective)(engine), plan, tracker, evaluate,
        checkpoints, NonFiniteGuard(None, most, "lower the learning rate"), lengths,
    )
    return tracker.logged, seen


def plan(**changes):
    made = Plan(epochs=2, max_steps=None, batch_size=2, accumulation_steps=2, seed=4)
    return dataclasses.replace(made, **changes)


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own(small):
    logged, seen = run(small, plan())
    # Five rows: batches of 2, 2 and 1; steps of two batches and of one.
    assert [len(batch) for batch in seen] == [2, 2, 1, 2, 2, 1]
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    assert plan().total_steps(5) == 4


def test_rows_whose_lengths_are_given_share_batches_with_their_like(small):
    logged, seen = run(small, plan(epochs=1), rows=7, lengths=[5, 1, 3, 5, 3, 1, 9])
    assert sorted(map(sorted, seen)) == [[0, 3], [1, 5], [2, 4], [6]]
    assert seen[-1] == [6]
    assert len(logged) == plan(epochs=1).total_steps(7) == 2


@pytest.mark.parametrize("limit", [1, 3])
def test_max_steps_ends_the_training(small, limit):
    logged, _ = run(small, plan(max_steps=limit))
    assert [step for step, _ in logged] == list(range(1, limit + 1))
    assert plan(max_steps=limit).total_steps(5) == limit


def test_every_step_logs_finite_metrics(small):
    logged, _ = run(small, plan(epochs=1))
    for _, metrics in logged:
        names = {"loss", "grad_norm", "lr", "epoch", "weight_per_second", "memory_gb"}
        assert names <= metrics.keys()
        assert all(map(math.isfinite, metrics.values()))


def test_training_lowers_the_loss(small):
    logged, _ = run(small, plan(epochs=8))
    assert logged[-1][1]["loss"] < 0.7 * logged[0][1]["loss"]


def test_it_is_measured_in_between_and_not_once_more_at_the_end(small):
    logged, _ = run(small, plan(eval_interval=2), evaluate=lambda: {"perplexity": 3.0})
    assert [step for step, metrics in logged if metrics.get("eval/perplexity") == 3.0] == [2]


def broken_at(*calls):
    """An objective that is not finite at some of its calls, counted from 1, or at all."""
    counted = []

    def objective(engine):
        right = token_objective(engine)

        def broken(batch):
            counted.append(batch)
            loss, stats = right(batch)
            return (loss * math.nan if not calls or len(counted) in calls else loss), stats

        return broken

    return objective


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_training(small, capsys):
    with pytest.raises(FloatingPointError) as error:
        run(small, plan(), objective=broken_at(), most=2)
    assert str(error.value) == (
        "non-finite loss or gradient in 2 consecutive optimizer steps (--max_skipped_steps 2); "
        "lower the learning rate"
    )
    warning = "warning: non-finite loss or gradient in step {}, which is skipped"
    assert capsys.readouterr().out.splitlines()[-2:] == [warning.format(1), warning.format(2)]


def test_a_step_that_is_not_finite_is_skipped_and_counted_and_the_training_goes_on(small):
    # One micro-batch a step: the second and the fourth are skipped, which is not in a row.
    logged, _ = run(small, plan(accumulation_steps=1), objective=broken_at(2, 4), most=2)
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert [metrics["skipped_steps"] for _, metrics in logged] == [0, 1, 1, 2, 2, 2]
    assert ["loss" in metrics for _, metrics in logged] == [True, False, True, False, True, True]


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_resumed_training_takes_the_rows_that_are_left_and_no_others(small, first):
    _, whole = run(small, plan())
    logged, rest = run(small, plan(), first=first)
    assert [step for step, _ in logged] == list(range(first + 1, 5))
    # Steps of 2 micro-batches and of 1, twice.
    assert rest == whole[[0, 2, 3, 5][first]:]


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_measures_each_row_once_in_evaluation_mode(small, training):
    engine = actor(small)
    engine.train(training)
    modes = []

    def measure(batch):
        modes.append(engine.module.training)
        return [[n] for n in batch.attention_mask.sum(-1).tolist()]

    given = training_loop.evaluate_sums(
        engine, ROWS, lambda rows: collate_tokens(rows, 3), measure, batch_size=3
    )
    assert sorted(given) == [[4], [4], [8], [13]]
    assert modes == [False, False]
    assert engine.module.training is training


def test_evaluation_may_stop_after_some_batches(small):
    given = training_loop.evaluate_sums(
        actor(small), ROWS, lambda rows: collate_tokens(rows, 3),
        lambda batch: [[1.0]] * len(batch.input_ids), batch_size=1, max_batches=2,
    )
    assert len(given) == 2
