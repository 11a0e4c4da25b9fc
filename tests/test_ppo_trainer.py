"""The update phase: the plan, the first update, what moves the weights, and what is skipped."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import fill_adapters, learn, moved, snapshot
from plain import token_loss
from torch.testing import assert_close

from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import (
    Iteration,
    Plan,
    PPOTrainer,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
    RewardNormalizer,
    make_experience,
)
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import (
    PPOConfig,
    ReportConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    ScheduleConfig,
)
from alpaca_rlhf.utils.data.batches import collate_tokens
from alpaca_rlhf.utils.logging.alarms import Alarms
from alpaca_rlhf.utils.model import lora

NOTHING = SimpleNamespace(train=lambda mode: None)  # the roles, where no update is computed
ROLES = {"whole": {}, "lora": {"lora": 4}}


def build(small, kind="whole", **changes):
    return small.roles(eos_every=6, **ROLES[kind], **changes)


def rollouts(small, engine, temperature=1.0):
    return small.experience(small.maker(engine, tokens=8, temperature=temperature), count=8)[0]


@pytest.fixture(scope="module")
def experience(small):
    """Eight rollouts of different lengths, some of them without eos."""
    made = rollouts(small, build(small))
    assert len(set(made.response_mask.sum(-1).tolist())) > 2
    return made


# --- the plan ------------------------------------------------------------------------------------


def plan(prompts=10, rollouts=4, generations=1, micro=2, accumulation=1, ppo_epochs=1, **changes):
    report = {name: changes.pop(name) for name in ("enable_test_mode", "test_stop_step")
              if name in changes}
    return Plan(
        ScheduleConfig(gradient_accumulation_steps=accumulation, **changes),
        RolloutConfig(per_device_generation_batch_size=rollouts),
        SamplingConfig(num_generations=generations),
        PPOConfig(per_device_training_batch_size=micro, ppo_epochs=ppo_epochs),
        ReportConfig(**report), seed=4, prompts=prompts,
    )


def test_each_epoch_of_prompts_has_an_order_of_its_own_without_a_short_iteration():
    made = plan(num_train_epochs=2)
    iterations = list(made)
    assert [len(prompts) for prompts in iterations] == [4] * 4
    for epoch in (iterations[:2], iterations[2:]):
        assert len(set(sum(epoch, []))) == 8
    assert iterations[:2] != iterations[2:]
    assert [made.ends_epoch(number) for number in (1, 2, 3, 4)] == [False, True, False, False]


def test_prompts_of_several_responses_and_too_few_prompts_fill_an_iteration():
    assert [len(prompts) for prompts in plan(generations=2)] == [2] * 5
    (only,) = plan(prompts=3, rollouts=8)
    assert len(only) == 8
    assert set(only) == {0, 1, 2}


def test_two_ranks_share_the_prompts_of_one_rank_with_twice_the_batch_size(monkeypatch):
    alone, ranks = [sorted(prompts) for prompts in plan(rollouts=8)], []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks.append(list(plan()))
    assert [sorted(sum(both, [])) for both in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize(("options", "iterations", "steps"), [
    ({}, 2, 4), ({"num_train_epochs": 3}, 6, 12), ({"max_steps": 1}, 1, 2),
    ({"max_steps": 3, "num_train_epochs": 3}, 2, 4), ({"ppo_epochs": 2}, 2, 8),
    ({"accumulation": 2}, 2, 2), ({"micro": 4}, 2, 2), ({"micro": 4, "accumulation": 3}, 2, 2),
    ({"num_train_epochs": 9, "enable_test_mode": True, "test_stop_step": 2}, 3, 6),
])
def test_the_plan_counts_iterations_and_optimizer_steps(options, iterations, steps):
    made = plan(**options)
    assert (made.count, made.total_steps, len(list(made))) == (iterations, steps, iterations)
    assert [made.complete(n) for n in (0, steps - 1, steps)] == [0, iterations - 1, iterations]


# --- the first update ----------------------------------------------------------------------------


def iteration(small, engine, trainer, number=0, reuse=True):
    """An iteration of 8 rollouts, scored as a run does."""
    maker = small.maker(engine)
    rollout = maker.generate(small.prompts(8))
    plan = trainer.plan(rollout, number)
    takes_over = reuse and trainer.takes_over(plan)
    scored, forward = maker.score(
        rollout, sum(plan, []), keep_for=trainer._ppo if takes_over else None)
    config = RewardConfig(reward_normalization="none")
    experience, metrics = make_experience(
        scored, RewardNormalizer(config, ""), config, trainer._ppo, config.kl_coef)
    return Iteration(experience, metrics, forward)


@pytest.mark.parametrize("kind", [*ROLES, "bf16"])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_the_only_step_of_an_iteration_takes_over_the_forward_passes_of_scoring(
    small, kind, entropy
):
    """The step is the same, with two forward passes instead of four."""
    dtype = kind if kind == "bf16" else "fp32"
    made, passes = [], []
    for reuse in (True, False):
        torch.manual_seed(1)
        engine = small.roles(
            dtype=dtype, lora=4 if kind == "lora" else 0, eos_every=9, **small.comparable)
        counted = [0]
        for role in (engine.actor.module, engine.critic.module):
            lora.unwrapped(getattr(role, "model", role)).base_model.register_forward_pre_hook(
                lambda *_, counted=counted: counted.__setitem__(0, counted[0] + 1))
        trainer = small.trainer(engine, micro=8, entropy_coef=entropy)
        one = iteration(small, engine, trainer, reuse=reuse)
        assert (one.forward is not None) is reuse
        counted[0] = 0
        metrics = trainer.update(one, 0)
        passes.append(counted[0])
        assert one.forward is None
        made.append((snapshot(engine.actor.module), snapshot(engine.critic.module), metrics))
    assert passes == [0, 2]
    for ours, plain in zip(made[0][:2], made[1][:2], strict=True):
        assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    for name, value in made[1][2].items():
        if not name.startswith(("time", "throughput")):
            assert made[0][2][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(("roles", "trainer", "taken"), [
    ({}, {"micro": 8}, True),
    ({}, {"micro": 4}, False), ({}, {"micro": 4, "accumulation": 2}, False),
    ({}, {"micro": 8, "ppo_epochs": 2}, False),
    ({}, {"micro": 8, "critic_warmup_steps": 1}, False),
    ({}, {"micro": 8, "max_tokens": 10**6}, True), ({}, {"micro": 8, "max_tokens": 20}, False),
    ({"dropout": 0.1}, {"micro": 8}, False),
    ({"lora": 4, "lora_dropout": 0.1}, {"micro": 8}, False), ({"stage": 2}, {"micro": 8}, True),
    ({"stage": 3}, {"micro": 8}, False),
])
def test_forward_passes_are_taken_over_where_an_iteration_has_one_step_and_nothing_is_drawn(
    small, roles, trainer, taken
):
    engine = small.roles(eos_every=9, **roles)
    trainer = small.trainer(engine, **trainer)
    rollout = small.maker(engine).generate(small.prompts(8))
    assert trainer.takes_over(trainer.plan(rollout, 0)) is taken


@pytest.mark.parametrize("how", [{"micro": 4}, {"micro": 2}, {"micro": 8, "max_tokens": 60}])
def test_micro_batches_of_similar_length_make_the_step_of_one_batch(small, experience, how):
    after = []
    for one in ({"micro": 8}, {"accumulation": 8 // how["micro"], **how}):
        engine = build(small, **small.comparable)
        trainer = small.trainer(engine, **one)
        [step] = trainer.plan(experience, 0)
        assert sorted(sum(step, [])) == list(range(8))
        after.append([learn(trainer, experience), snapshot(engine.actor.module)])
    assert len(step) > 1
    lengths = [[experience.lengths()[row] for row in cut] for cut in step]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True)
    if "max_tokens" in how:
        assert all(len(cut) * max(cut) <= 60 or len(cut) == 1 for cut in lengths)
    assert_close(after[1][1], after[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("dtype", "stages"), [("fp32", (0, 1, 2, 3)), ("bf16", (2, 3))])
def test_the_ptx_loss_gives_the_same_step_at_every_stage(small, experience, dtype, stages):
    rows = [{"input_ids": row, "labels": row} for row in ([1, *range(50, 60)], [1, 70, 71])]
    after = []
    for stage in stages:
        engine = build(small, stage=stage, dtype=dtype, **small.comparable)
        learn(small.trainer(engine, micro=8), experience, 0, [collate_tokens(rows, pad_id=3)])
        after.append(snapshot(engine.actor.module))
    for other in after[1:]:
        assert_close(other, after[0], rtol=1e-3, atol=1e-5)


def test_the_schedule_of_the_actor_counts_its_own_steps(small, experience):
    # Of 10 steps the critic is trained alone in 6: linear decay to 0 takes the actor the other 4.
    engine = build(small, lr_scheduler_type="linear", total_steps=10, critic_warmup_steps=6)
    trainer, rates = small.trainer(engine, micro=8, critic_warmup_steps=6), []
    for number in range(10):
        rates.append(learn(trainer, experience, number).get("lr/actor"))
    assert rates[:6] == [None] * 6
    assert rates[6:] == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0.0])


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_at_the_first_update_every_ratio_is_1_and_no_alarm_goes_off(small, kind, temperature):
    engine = build(small, kind)
    trainer = small.trainer(engine, micro=8, temperature=temperature)
    metrics = learn(trainer, rollouts(small, engine, temperature))
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/first_log_ratio_max"] < 1e-5
    assert Alarms().check(metrics) == {}


@pytest.mark.parametrize(("mistake", "temperature"), [
    ({"dropout": 0.3}, 1.0), ({"lora": 4, "lora_dropout": 0.5}, 1.0), ({}, 0.6)])
def test_a_ratio_other_than_1_at_the_first_update_sets_off_an_alarm(small, mistake, temperature):
    engine = small.roles(**mistake)
    fill_adapters(engine.actor.module)  # one that is zero has nothing to drop
    experience, trainer = rollouts(small, engine), small.trainer(engine, temperature=temperature)
    first, second = (learn(trainer, experience, number) for number in (0, 1))
    assert list(Alarms().check(first)) == ["ratio"]
    assert "policy/first_log_ratio_max" not in second


# --- what moves the weights ----------------------------------------------------------------------


def weights_after(small, experience, **options):
    """Weights of actor and critic after the updates on this experience."""
    engine = build(small, **small.comparable)
    learn(small.trainer(engine, **options), experience)
    return snapshot(engine.actor.module), snapshot(engine.critic.module)


def test_uneven_micro_batches_take_the_step_of_one_big_batch(small, experience):
    whole = weights_after(small, experience, micro=8)
    cut = weights_after(small, experience, micro=3, accumulation=3)
    assert_close(cut, whole, rtol=1e-4, atol=2e-6)
    start = snapshot(small.causal_lm())
    assert (whole[0]["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("where", ["after eos", "in the padding of prompts"])
def test_nothing_outside_the_response_and_the_prompt_moves_a_weight(small, experience, where):
    outside = experience.response_mask == 0
    ids, split = experience.input_ids.clone(), -experience.response_length
    if where == "after eos":
        ids[:, split:][outside] = 77
        # Ratios above 1 at negative advantages: clipping would not hide them.
        changes = {"logprobs": -15.0, "ref_logprobs": -50.0, "values": 0.05, "advantages": -50.0,
                   "returns": 50.0}
    else:
        ids[:, :split][experience.attention_mask[:, :split] == 0] = 77
        changes = {}
    changed = dataclasses.replace(experience, input_ids=ids, **{
        name: getattr(experience, name) + much * outside for name, much in changes.items()})
    assert outside.any()
    assert not ids.equal(experience.input_ids)
    assert_close(weights_after(small, changed, micro=8),
                 weights_after(small, experience, micro=8), rtol=1e-5, atol=1e-6)


def test_the_policy_moves_toward_tokens_with_an_advantage(small, experience):
    # A small step: what it changes is then what the gradient says, whatever the weights are.
    engine = build(small, **{**small.comparable, "learning_rate": 1e-3})
    sign = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0).unsqueeze(-1)
    changed = dataclasses.replace(experience, advantages=sign * experience.response_mask)
    learn(small.trainer(engine, micro=8), changed)
    engine.train(False)
    with torch.no_grad():
        after = changed.spread(engine.logprobs(engine.actor, changed, 1.0)[:, 0])
    assert ((after - changed.logprobs) * changed.advantages).sum() > 0.01


def test_the_critic_moves_toward_the_returns(small, experience):
    trainer = small.trainer(build(small), micro=8, ppo_epochs=6)
    above = experience.returns + 3 * experience.response_mask
    changed = dataclasses.replace(experience, returns=above)
    first = learn(trainer, changed, 0)["value/loss"]
    assert learn(trainer, changed, 1)["value/loss"] < first


def test_an_entropy_bonus_raises_the_entropy(small, experience):
    still = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    gains = []
    for coef in (0.0, 1.0):
        trainer = small.trainer(build(small, **small.comparable), micro=8, entropy_coef=coef)
        before, after = (learn(trainer, still, number)["policy/entropy"] for number in (0, 1))
        gains.append(after - before)
    assert gains[0] == pytest.approx(0, abs=1e-5)
    assert gains[1] > 0.01


def test_the_ptx_loss_is_a_token_mean_of_its_own_times_its_weight(small, experience):
    rows = [[1, *range(50, 60)], [1, 70, 71]]
    batches = [collate_tokens([{"input_ids": row, "labels": row}], pad_id=3) for row in rows]

    @torch.no_grad()
    def total(model):
        return sum(token_loss(model(input_ids=b.input_ids).logits, b.labels).item()
                   for b in batches)

    engine = build(small, **small.comparable)
    before = total(engine.actor.module)
    trainer = small.trainer(engine, micro=4, accumulation=2, unsup_coef=0.5)
    metrics = learn(trainer, experience, 0, batches)
    assert metrics["policy/unsup_loss"] == pytest.approx(0.5 * before / 12, rel=1e-4)
    assert total(engine.actor.module) < before


@pytest.mark.parametrize("kind", ROLES)
def test_the_critics_warm_up_leaves_the_actor_and_its_average_unchanged(small, experience, kind):
    engine = build(small, kind)
    trainer = small.trainer(
        engine, micro=8, critic_warmup_steps=2, enable_ema=True, ema_decay=0.5)
    model = engine.actor.module
    actor, critic = snapshot(model), snapshot(engine.critic.module)
    for number in range(2):
        metrics = learn(trainer, experience, number)
        assert moved(actor, model) == set()
        assert "policy/loss" not in metrics
    assert moved(critic, engine.critic.module) != set()
    with trainer.ema.swapped_in():
        assert moved(actor, model) == set()
    learn(trainer, experience, 2)
    own = snapshot(model)
    assert moved(actor, model) != set()
    with trainer.ema.swapped_in():
        assert moved(actor, model) != set()
        assert moved(own, model) != set()
    assert moved(own, model) == set()


# --- epochs, steps and metrics of an iteration ---------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """The rows of each optimizer step, by their score; no step is taken."""
    rows = []

    def record(self, micro_batches, text):
        rows.append(torch.cat([batch.score for batch in micro_batches]).tolist())
        return {}

    monkeypatch.setattr(PPOTrainer, "_step", record)
    return rows


def test_each_epoch_of_an_iteration_takes_every_row_once_in_a_new_order(small, experience, taken):
    learn(small.trainer(NOTHING, ppo_epochs=2, micro=3), experience)
    assert [len(rows) for rows in taken] == [3, 3, 2, 3, 3, 2]
    first, second = sum(taken[:3], []), sum(taken[3:], [])
    assert sorted(first) == sorted(second) == sorted(experience.score.tolist())
    assert first != second
    learn(small.trainer(NOTHING, ppo_epochs=2, micro=3), experience, 1)
    assert taken[6:] != taken[:6]


@pytest.mark.parametrize(("micro", "accumulation", "epochs", "steps"), [
    (2, 1, 1, 4), (3, 1, 2, 6), (2, 3, 1, 2), (8, 4, 3, 3)])
def test_an_iteration_takes_the_steps_of_the_plan(
    small, experience, taken, micro, accumulation, epochs, steps
):
    learn(small.trainer(NOTHING, micro=micro, accumulation=accumulation, ppo_epochs=epochs),
          experience)
    made = plan(8, 8, micro=micro, accumulation=accumulation, ppo_epochs=epochs)
    assert made.total_steps == len(taken) == steps


def test_a_resumed_iteration_takes_the_steps_that_are_left(small, experience, taken):
    learn(small.trainer(NOTHING, ppo_epochs=2, micro=3), experience)
    whole, before = taken.copy(), []
    taken.clear()
    trainer = small.trainer(NOTHING, ppo_epochs=2, micro=3)
    trainer.update(Iteration(experience, {}, records=[{}] * 4), 0,
                   before_step=lambda: before.append(trainer.iteration))
    assert taken == whole[4:]
    assert len(before) == 2
    assert trainer.iteration is None


def test_an_iteration_reports_every_metric_and_all_are_finite(small, experience):
    engine = build(small, "lora")
    _, rollout = small.experience(small.maker(engine))
    metrics = rollout | learn(small.trainer(engine), experience)
    named = """
        reward/score_mean reward/score_std reward/normalized_mean reward/kl_penalty kl/k1 kl/k3
        policy/loss policy/entropy policy/clip_fraction policy/approx_kl policy/ratio_mean
        policy/ratio_max policy/clamped value/loss value/clip_fraction value/explained_variance
        response/length_mean response/eos_rate response/repetition lr/actor lr/critic
        grad_norm/actor grad_norm/critic time/update policy/skipped_steps
    """.split()
    assert set(named) <= metrics.keys()
    assert all(map(math.isfinite, metrics.values()))


# --- non-finite steps ----------------------------------------------------------------------------


def test_non_finite_returns_are_skipped_and_counted_and_leave_actor_and_critic_unchanged(
    small, experience
):
    engine = build(small, "lora")
    actor, critic = snapshot(engine.actor.module), snapshot(engine.critic.module)
    trainer = small.trainer(engine, micro=8)
    broken = dataclasses.replace(experience, returns=experience.returns * math.nan)
    assert learn(trainer, broken, 0)["policy/skipped_steps"] == 1
    assert (trainer.steps, trainer.taken) == (0, 1)
    assert moved(actor, engine.actor.module) == set()
    assert moved(critic, engine.critic.module) == set()
    assert learn(trainer, experience, 1)["policy/skipped_steps"] == 1
    assert (trainer.steps, trainer.taken) == (1, 2)
    assert moved(actor, engine.actor.module) != set()


def test_non_finite_advantages_leave_the_actor_unchanged(small, experience):
    engine = build(small)
    actor, trainer = snapshot(engine.actor.module), small.trainer(engine, micro=8)
    broken = dataclasses.replace(experience, advantages=experience.advantages / 0.0)
    assert learn(trainer, broken)["policy/skipped_steps"] == 1
    assert moved(actor, engine.actor.module) == set()


def test_too_many_consecutive_non_finite_steps_abort_the_run(small, experience):
    trainer = small.trainer(build(small), micro=8, most=3)
    broken = dataclasses.replace(experience, returns=experience.returns * math.inf)
    for number, given in enumerate([broken, broken, experience, broken, broken]):
        learn(trainer, given, number)
    with pytest.raises(FloatingPointError) as error:
        learn(trainer, broken, 5)
    assert str(error.value) == (
        "non-finite loss or gradient in 3 consecutive optimizer steps (--max_skipped_steps 3); "
        "lower the learning rate"
    )


# --- over several iterations ---------------------------------------------------------------------


def iterations(small, reward_function, count, tokens, responses):
    """Metrics of each PPO iteration; the critic starts with 0 everywhere."""
    engine = small.roles(learning_rate=5e-3, adam_eps=1e-5, needs_reward_model=False)
    engine.eos_ids = torch.tensor([-1])
    with torch.no_grad():
        engine.critic.module.model.score.weight.zero_()
    maker = small.maker(engine, tokens=tokens, reward_function=reward_function)
    trainer = small.trainer(engine, micro=8 * responses)
    history = []
    for number in range(count):
        experience, metrics = small.experience(
            maker, 8, generations=responses, missing_eos_penalty=0.0, clip_reward_value=10.0)
        history.append(metrics | learn(trainer, experience, number))
    return history


def vowels(prompts, responses):
    return [10.0 * sum(c in "aeiou" for c in text) / max(1, len(text)) for text in responses]


def test_a_reward_is_learned(small):
    history = iterations(small, vowels, count=14, tokens=1, responses=10)
    scores = [metrics["reward/score_mean"] for metrics in history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.8 * history[0]["reward/score_std"]
    assert history[-1]["kl/k3"] > 0.3


def test_with_a_constant_reward_of_0_nothing_rises_and_the_kl_stays_near_0(small):
    history = iterations(
        small, lambda prompts, responses: [0.0] * len(responses), count=8, tokens=6, responses=1)
    assert all(metrics["reward/score_mean"] == 0 for metrics in history)
    assert all(abs(metrics["kl/k3"]) < 0.01 for metrics in history)
