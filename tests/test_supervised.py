"""The runner of steps 1 and 2: rows of each optimizer step, training, resuming, evaluation."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import snapshot
from test_training_loop import actor

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.utils import distributed, supervised
from alpaca_rlhf.utils.configs import (
    BatchConfig,
    CheckpointConfig,
    ScheduleConfig,
    TrackingConfig,
)
from alpaca_rlhf.utils.run.checkpoints import Found
from alpaca_rlhf.utils.run.run_folder import RunFolder


def plan(lengths=(1,) * 5, rows=2, accumulation=2, epochs=2, seed=4, **schedule):
    """Two epochs over five rows of one length: batches of 2, 2 and 1 rows, steps of 2 and 1."""
    return supervised.Plan(
        ScheduleConfig(
            num_train_epochs=epochs, gradient_accumulation_steps=accumulation, **schedule
        ),
        BatchConfig(per_device_train_batch_size=rows), seed, lengths,
    )


def flat(steps):
    return [row for step in steps for batch in step for row in batch]


def on_each_of_two_ranks(monkeypatch, function):
    """The results of a function on rank 0 and rank 1 of two."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_rows", list)
    results = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        results.append(function())
    return results


# --- the plan ------------------------------------------------------------------------------------


def test_each_epoch_takes_every_row_once_in_a_new_order():
    steps = list(plan().micro_batches(0))
    assert [[len(batch) for batch in step] for step in steps] == [[2, 2], [1], [2, 2], [1]]
    first, second = flat(steps[:2]), flat(steps[2:])
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert steps != list(plan(seed=5).micro_batches(0))
    assert (plan().steps_per_epoch, plan().total_steps) == (2, 4)


def test_rows_of_similar_length_share_a_batch():
    steps = list(plan([5, 1, 3, 5, 3, 1, 9], epochs=1).micro_batches(0))
    batches = [sorted(batch) for step in steps for batch in step]
    assert sorted(batches) == [[0, 3], [1, 5], [2, 4], [6]]
    assert batches[-1] == [6]


@pytest.mark.parametrize(("limit", "steps"), [(None, 4), (1, 1), (3, 3), (9, 4)])
def test_max_steps_limits_the_training(limit, steps):
    assert plan(max_steps=limit).total_steps == steps


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_a_resumed_plan_yields_the_steps_that_are_left(first):
    assert list(plan().micro_batches(first)) == list(plan().micro_batches(0))[first:]


def test_micro_batches_by_tokens_keep_the_rows_of_each_optimizer_step():
    lengths = [3, 50, 20, 7, 30, 11, 40, 5, 9, 60]
    plain = list(plan(lengths, rows=2, accumulation=2, epochs=1).micro_batches(0))
    filled = list(plan(lengths, rows=2, accumulation=2, epochs=1,
                       max_tokens_per_micro_batch=60).micro_batches(0))
    assert [sorted(sum(step, [])) for step in filled] == [sorted(sum(step, [])) for step in plain]
    tokens = [len(cut) * max(lengths[row] for row in cut) for step in filled for cut in step]
    assert max(tokens) <= 60
    assert max(len(cut) for step in filled for cut in step) > 2


def test_two_ranks_take_the_rows_that_one_rank_takes_with_twice_the_batch_size(monkeypatch):
    lengths = [(37 * i * i) % 101 + 1 for i in range(24)]
    alone = [sorted(flat([step])) for step in plan(lengths, rows=4).micro_batches(0)]
    ranks = on_each_of_two_ranks(monkeypatch, lambda: list(plan(lengths).micro_batches(0)))
    assert [sorted(flat(steps)) for steps in zip(*ranks, strict=True)] == alone


# --- training ------------------------------------------------------------------------------------

ROWS = [{"input_ids": [1] + [60 + i] * (i + 1), "labels": [-100] + [60 + i] * (i + 1)}
        for i in range(5)]
HELD_OUT = [{"input_ids": [1] + [90 + i] * (i + 1), "labels": [-100] + [90 + i] * (i + 1)}
            for i in range(3)]
DATA = SimpleNamespace(train=ROWS, held_out=HELD_OUT, fingerprint=lambda: "of the rows")


def train(small, folder, plan, loss=step1.loss, found=None):
    """Train on rows that name themselves: metrics of each step, rows of each batch, weights."""
    engine, made, seen = actor(small), step1.objective(3), []

    def collate(rows):
        if rows[0]["input_ids"][1] < 90:
            seen.append([row["input_ids"][1] - 60 for row in rows])
        return made.collate(rows)

    before, after, _, _ = supervised.train(
        engine, DATA, replace(made, collate=collate, loss=loss), plan,
        folder=RunFolder(str(folder)), found=found,
        checkpoint=CheckpointConfig(save_steps=1, save_total_limit=9),
        tracking=TrackingConfig(), step=1, arguments={},
    )
    lines = folder.with_name(f"{folder.name}.partial") / "metrics.jsonl"
    logged = [json.loads(line) for line in lines.read_text().splitlines()]
    return SimpleNamespace(logged=logged, seen=seen, before=before, after=after,
                           weights=snapshot(engine.module))


def broken_at(*calls):
    """The loss of step 1, non-finite at some of its calls, counted from 1; at all without any."""
    count = 0

    def loss(engine, batch):
        nonlocal count
        count += 1
        value, stats = step1.loss(engine, batch)
        return (value * math.nan if count in calls or not calls else value), stats

    return loss


def test_training_takes_the_rows_of_the_plan_and_lowers_the_loss(small, tmp_path):
    run = train(small, tmp_path / "out", plan(epochs=8))
    assert run.seen == [batch for step in plan(epochs=8).micro_batches(0) for batch in step]
    assert [row["step"] for row in run.logged] == list(range(1, 17))
    assert run.logged[-1]["loss"] < 0.7 * run.logged[0]["loss"]
    assert run.before["tokens"] == run.after["tokens"] == 6
    assert run.before["perplexity"] != run.after["perplexity"]
    for row in run.logged:
        assert {"grad_norm", "lr", "epoch", "weight", "weight_per_second", "memory_gb",
                "skipped_steps"} <= row.keys()
        assert all(map(math.isfinite, row.values()))


def test_training_is_evaluated_at_the_interval_but_not_at_its_last_step(small, tmp_path):
    interval = replace(plan(), batches=replace(plan().batches, eval_interval=2))
    logged = train(small, tmp_path / "out", interval).logged
    assert [row["step"] for row in logged if "eval/perplexity" in row] == [2]


def test_too_many_consecutive_non_finite_steps_abort_the_training(small, tmp_path, capsys):
    with pytest.raises(FloatingPointError) as error:
        train(small, tmp_path / "out", plan(max_skipped_steps=2), broken_at())
    assert str(error.value) == (
        "non-finite loss or gradient in 2 consecutive optimizer steps (--max_skipped_steps 2); "
        "lower --learning_rate"
    )
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.partition(", which is skipped;")[0] for line in warnings] == [
        f"warning: non-finite loss or gradient in step {step}" for step in (1, 2)]


def test_a_non_finite_step_is_skipped_and_counted_and_the_training_continues(small, tmp_path):
    # One micro-batch per step. The second and the fourth are skipped: they are not consecutive.
    logged = train(small, tmp_path / "out", plan(accumulation=1, max_skipped_steps=2),
                   broken_at(2, 4)).logged
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert [row["skipped_steps"] for row in logged] == [0, 1, 1, 2, 2, 2]
    assert ["loss" in row for row in logged] == [True, False, True, False, True, True]


@pytest.mark.parametrize("first", [1, 2])
def test_a_resumed_training_takes_the_steps_that_are_left_to_the_same_weights(
    small, tmp_path, first
):
    whole = train(small, tmp_path / "whole", plan())
    checkpoint = tmp_path / "whole.partial" / "checkpoints" / f"step-{first:08d}"
    resumed = train(small, tmp_path / "resumed", plan(), found=Found(checkpoint, convert=False))
    assert [row["step"] for row in resumed.logged] == list(range(first + 1, 5))
    assert resumed.seen == whole.seen[[0, 2, 3][first]:]  # batches of each step: 2, 1, 2, 1
    assert resumed.before == whole.before
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(resumed.weights[name].equal(whole.weights[name]) for name in whole.weights)


# --- evaluation ----------------------------------------------------------------------------------


def evaluate(engine, modes, rows=2, most=None):
    def measure(engine, batch):
        modes.append(engine.module.training)
        return [[n] for n in batch.attention_mask.sum(-1).tolist()]

    return supervised.evaluate(
        engine, SimpleNamespace(held_out=ROWS), replace(step1.objective(3), measure=measure),
        BatchConfig(per_device_eval_batch_size=rows, eval_iters=most),
    )


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_measures_each_row_once_in_evaluation_mode(small, training):
    engine, modes = actor(small), []
    engine.train(training)
    assert sorted(evaluate(engine, modes, rows=3)) == [[2], [3], [4], [5], [6]]
    assert modes == [False, False]
    assert engine.module.training is training
    assert len(evaluate(engine, [], rows=1, most=2)) == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_two_ranks_count_each_row_once_in_the_same_number_of_batches(small, monkeypatch, rows):
    engine, modes = actor(small), []
    ranks = on_each_of_two_ranks(monkeypatch, lambda: evaluate(engine, modes, rows))
    assert sorted(ranks[0] + ranks[1]) == [[2], [3], [4], [5], [6]]
    assert len(modes) == 2 * math.ceil(3 / rows)


def test_perplexity_is_exp_of_the_mean_loss_per_token_of_all_rows():
    result = step1.perplexity([[3.0, 2.0], [1.0, 6.0]])
    assert result == {"perplexity": math.exp(0.5), "loss": 0.5, "tokens": 8.0}
    assert step1.perplexity([]) == {}


@torch.no_grad()
def test_a_row_is_measured_by_its_loss_and_trained_tokens(small):
    engine = actor(small)
    batch = step1.objective(3).collate(ROWS[1:3])
    measured = step1.measure(engine, batch)
    total, tokens = (sum(column) for column in zip(*measured, strict=True))
    assert tokens == 5
    assert total == pytest.approx(step1.loss(engine, batch)[0].item())


def test_accuracy_is_the_share_of_pairs_whose_chosen_response_scores_higher():
    pairs = [[1.0, 0.0, 9, 9], [3.0, -2.0, 9, 9], [2.0, 2.0, 9, 9], [4.0, 5.0, 9, 9]]
    result = step2.accuracy(pairs)
    assert (result["accuracy"], result["pairs"]) == (0.5, 4)
    assert (result["score_mean"], result["rejected_mean"]) == (2.5, 1.25)
    assert result["score_std"] == pytest.approx(math.sqrt(1.25))
    assert result["accuracy_low"] < 0.5 < result["accuracy_high"]
    assert step2.accuracy([]) == {}
