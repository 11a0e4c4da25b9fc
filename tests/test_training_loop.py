"""The optimizer step: the gradient of one big batch from uneven micro-batches, or no step."""

import math
import platform
from functools import partial

import pytest
import torch
from conftest import moved, snapshot
from plain import forward_logits, token_loss
from torch import nn
from torch.testing import assert_close

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.utils import distributed, training_loop
from alpaca_rlhf.utils.data.batches import collate_pairs, collate_tokens
from alpaca_rlhf.utils.training_loop import global_weight, optimizer_step

STAGES = [0, 1, 2, 3]
# 11, 2, 5 and 1 trained tokens: batches of different weight, whichever way they are cut.
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


def token_objective(engine, batch):
    """The loss of step 1, with a metric of which the maximum is reported."""
    loss, stats = step1.loss(engine, batch)
    return loss, stats | {"length_max": batch.attention_mask.sum(-1).max().float()}


def tokens(*groups):
    return [collate_tokens([ROWS[i] for i in group], pad_id=3) for group in groups]


def pairs(*groups):
    return [collate_pairs([PAIRS[i] for i in group], pad_id=3) for group in groups]


def actor(small, stage=0, **changes):
    return small.trained("actor", stage, **{**small.comparable, **changes})


def step(engine, micro_batches, objective=token_objective):
    return optimizer_step(
        engine, micro_batches, partial(objective, engine), global_weight(micro_batches)
    )


def check_same_step(engines, batches, objective):
    """The two engines take the same step, each from its own micro-batches."""
    start = snapshot(engines[0].module)
    one, other = (step(*given, objective) for given in zip(engines, batches, strict=True))
    assert one.keys() == other.keys()
    assert list(one.values()) == pytest.approx(list(other.values()), rel=1e-5)
    first, second = (snapshot(engine.module) for engine in engines)
    assert_close(second, first, rtol=1e-4, atol=2e-6)
    assert max((first[name] - start[name]).abs().max() for name in first) > 1e-3


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("groups", [([0], [1], [2], [3]), ([0, 1, 2], [3]), ([1, 3], [0, 2])])
def test_uneven_micro_batches_take_the_step_of_one_big_batch(small, groups, stage):
    engines = actor(small, stage), actor(small, stage)
    check_same_step(engines, (tokens([0, 1, 2, 3]), tokens(*groups)), token_objective)


def test_pairs_in_uneven_micro_batches_take_the_step_of_one_big_batch(small):
    engines = [small.trained("critic", **small.comparable) for _ in range(2)]
    check_same_step(engines, (pairs([0, 1, 2]), pairs([0], [1, 2])), step2.loss)


def test_a_step_with_fewer_micro_batches_than_the_accumulation_is_a_whole_step(small):
    # The first engine expects four micro-batches; the data ends after one.
    engines = actor(small, accumulation=4), actor(small)
    check_same_step(engines, (tokens([0, 1]), tokens([0, 1])), token_objective)
    assert engines[0].global_steps == 1


def test_the_loss_is_the_mean_per_token_and_maxima_are_maxima(small):
    with torch.no_grad():
        total = sum(
            token_loss(small.causal_lm()(input_ids=b.input_ids).logits, b.labels)
            for b in tokens([0], [1], [2], [3])
        )
    result = step(actor(small), tokens([0, 1], [2, 3]))
    assert result["loss"] == pytest.approx(total.item() / 19, rel=1e-5)
    assert result["length_max"] == 13


@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_loss_changes_nothing_and_leaves_no_gradient_behind(small, stage):
    disturbed, calm = actor(small, stage), actor(small, stage)
    before, calls = snapshot(disturbed.module), []

    def second_is_nan(engine, batch):
        calls.append(batch)
        loss, stats = step1.loss(engine, batch)
        return (loss * math.nan if len(calls) == 2 else loss), stats

    assert step(disturbed, tokens([0], [1], [2]), second_is_nan) is None
    assert len(calls) == 3
    assert moved(before, disturbed.module) == set()
    for engine in (disturbed, calm):
        step(engine, tokens([2], [3]))
    assert_close(snapshot(disturbed.module), snapshot(calm.module), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_loss_with_a_finite_gradient_changes_nothing(small, stage):
    engine = actor(small, stage)
    before = snapshot(engine.module)

    def far(engine, batch):
        loss, stats = step1.loss(engine, batch)
        return loss + math.inf, stats

    assert step(engine, tokens([0], [1]), far) is None
    assert moved(before, engine.module) == set()


def test_metrics_are_means_and_maxima_over_all_ranks(monkeypatch):
    others = torch.tensor([[4.0, 7.0], [6.0, 2.0]], dtype=torch.float64)
    monkeypatch.setattr(training_loop.distributed, "gather",
                        lambda mine: torch.cat([mine.unsqueeze(0), others]))
    sums = {"loss": torch.tensor(2.0).double(), "length_max": torch.tensor(5.0).double()}
    assert training_loop._over_ranks(sums, torch.tensor(4.0)) == {"loss": 3.0, "length_max": 7.0}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_gradient_of_a_finite_loss_changes_nothing(small, stage, bad):
    engine = actor(small, stage)
    before, batches = snapshot(engine.module), tokens([0], [1])

    def steep(engine, batch):
        logits = forward_logits(engine, batch.input_ids, batch.attention_mask)
        logits.register_hook(lambda gradient: gradient * bad)
        return token_loss(logits, batch.labels), {}

    assert step(engine, batches, steep) is None
    assert moved(before, engine.module) == set()
    assert step(engine, batches) is not None
    assert moved(before, engine.module) != set()
    assert all(weight.isfinite().all() for weight in snapshot(engine.module).values())


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_norm_is_the_one_before_clipping(small, stage):
    engine, plain = actor(small, stage, overrides=None), small.causal_lm()
    batch = tokens([0])[0]
    loss = token_loss(plain(input_ids=batch.input_ids).logits, batch.labels) / 11
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    step(engine, tokens([0]))
    assert norm > 1.0
    assert training_loop.gradient_norm(engine) == pytest.approx(norm.item(), rel=1e-4)


# --- memory --------------------------------------------------------------------------------------


def test_a_single_rank_without_zero_does_not_copy_the_gradient(small):
    # DeepSpeed would flatten all of it, for a sum over one rank.
    assert not small.trained("actor").enable_backward_allreduce
    assert small.trained("actor", stage=1).enable_backward_allreduce


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
@pytest.mark.parametrize("returned", [False, True])
def test_freed_tensors_go_back_to_the_system(imported, tmp_path, returned):
    script = tmp_path / "memory.py"
    script.write_text(f"""
import resource, torch
from alpaca_rlhf.utils import distributed
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
if {returned}:
    distributed.return_freed_memory()
large = torch.ones(7_500_000)
del large  # 30 MB: from here on glibc takes smaller blocks from its heap
before, freed, kept = resident(), [], []
for _ in range(20):
    freed.append(torch.ones(2_000_000))
    kept.append(torch.ones(16_000))
del freed
print(resident() - before)
""")
    done = imported.run([script], tmp_path)
    assert done.returncode == 0, done.stderr
    held = float(done.stdout)  # MB, of 160
    assert held < 40 if returned else held > 120


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
@pytest.mark.parametrize(("calls", "chosen", "keeps"), [
    ("", None, False), ("keep", None, True), ("keep return", None, False),
    ("return keep", None, False), ("keep", "MALLOC_ARENA_MAX", False)])
def test_a_large_tensor_that_is_freed_is_kept_for_the_next_one(
    imported, tmp_path, calls, chosen, keeps
):
    script = tmp_path / "memory.py"
    script.write_text(f"""
import os, resource, torch
from alpaca_rlhf.utils import distributed
if {chosen!r}:
    os.environ[{chosen!r}] = "2"
for name in {calls.split()}:
    getattr(distributed, f"{{name}}_freed_memory")()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)  # 200 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
""")
    done = imported.run([script], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) < 100) is keeps  # else 49,000 pages of 4 kB, or 100 of 2 MB


def test_training_keeps_freed_memory_unless_it_recomputes(small, monkeypatch):
    called = []
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: called.append(1))
    small.trained("actor", gradient_checkpointing=True)
    assert not called
    small.trained("actor")
    assert called


def test_gradient_checkpointing_returns_freed_memory(small, monkeypatch):
    called = []
    monkeypatch.setattr(distributed, "return_freed_memory", lambda: called.append(1))
    small.causal_lm()
    assert not called
    small.causal_lm(gradient_checkpointing=True)
    assert called
