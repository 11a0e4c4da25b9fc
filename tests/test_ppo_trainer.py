"""The update phase: what holds at the first update, what moves when, and what is refused."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import learn, moved, snapshot
from torch.testing import assert_close

from alpaca_rlhf.training_model.step3_rlhf_finetuning import ppo_trainer
from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import (
    AdaptiveKLController,
    PPOTrainer,
    steps_per_round,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
    ScoreNormalizer,
    make_experience,
)
from alpaca_rlhf.utils import losses
from alpaca_rlhf.utils.data.batches import collate_tokens
from alpaca_rlhf.utils.logging.alarms import Alarms, Limits
from alpaca_rlhf.utils.model.causal_lm import LoadOptions
from alpaca_rlhf.utils.model.ema import Ema

# Adam then follows the gradient's size, not its sign alone: what is compared is the gradient.
PLAIN = {"adam_eps": 0.1, "learning_rate": 0.1, "lora_learning_rate": 0.1}
NOTHING = SimpleNamespace(train=lambda mode: None)  # the roles, where no update is computed
ROLES = {"whole": {}, "lora": {"lora": 4}}


def roles(small, kind="whole", **changes):
    """Every sixth id ends a reply, so that lengths differ."""
    engine = small.roles(**ROLES[kind], **changes)
    engine.eos_ids = torch.arange(0, len(small.tokenizer), 6)
    return engine


def round_of(small, engine, temperature=1.0):
    maker = small.maker(engine, tokens=8, temperature=temperature)
    return small.experience(maker, count=8)[0]


# ------------------------------------------------------------------- before the first update


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_at_the_first_update_every_ratio_is_1_and_no_alarm_goes_off(small, kind, temperature):
    engine = roles(small, kind)
    experience = round_of(small, engine, temperature)
    settings = small.ppo(micro_batch_size=8, temperature=temperature)
    metrics = learn(small.trainer(engine, settings), experience, 0)
    assert abs(metrics["policy/ratio_mean"] - 1) < 1e-5
    assert abs(metrics["policy/ratio_max"] - 1) < 1e-5
    assert abs(metrics["policy/approx_kl"]) < 1e-5
    assert metrics["policy/clip_fraction"] == 0
    assert metrics["policy/first_log_ratio_max"] < 1e-5
    assert Alarms(Limits()).check(metrics) == []


@pytest.mark.parametrize(
    ("mistake", "temperature"),
    [({"load": LoadOptions(dropout=0.3)}, 1.0), ({"lora": 4, "lora_dropout": 0.5}, 1.0),
     ({}, 0.6)],
)
def test_a_ratio_that_is_not_1_at_the_first_update_sets_off_an_alarm(
    small, mistake, temperature
):
    engine = small.roles(**mistake)
    if "lora" in mistake:
        with torch.no_grad():  # an adapter that is zero has nothing to drop
            for name, parameter in engine.actor.module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
    experience = round_of(small, engine)
    trainer = small.trainer(engine, small.ppo(temperature=temperature))
    first, second = (learn(trainer, experience, number) for number in (0, 1))
    assert [alarm.kind for alarm in Alarms(Limits()).check(first)] == ["ratio"]
    assert "policy/first_log_ratio_max" not in second


# ------------------------------------------------------------------- one step


def weights_after(small, experience, settings):
    engine = roles(small, **PLAIN, overrides=small.unclipped)
    learn(small.trainer(engine, settings), experience, 0)
    return snapshot(engine.actor.module), snapshot(engine.critic.module)


@pytest.fixture(scope="module")
def experience(small):
    """Of a policy with weights of its own, so that ratios are not all 1."""
    return round_of(small, roles(small))


def check_accumulation(small, experience):
    assert len(set(experience.response_mask.sum(-1).tolist())) > 2
    whole = weights_after(small, experience, small.ppo(micro_batch_size=8))
    cut = weights_after(small, experience, small.ppo(micro_batch_size=3, accumulation_steps=3))
    start = snapshot(small.causal_lm()), snapshot(small.reward_model())
    for one, other, before in zip(whole, cut, start, strict=True):
        names = [name.removeprefix("model.") if "score" in name else name for name in one]
        assert len(names) == len(before)
        for name, weight in one.items():
            assert_close(other[name], weight, rtol=1e-4, atol=2e-6)
    name = "lm_head.weight"
    assert (whole[0][name] - start[0][name]).abs().max() > 1e-4


def test_uneven_micro_batches_take_the_step_of_one_big_batch(small, experience):
    check_accumulation(small, experience)


def test_a_mean_of_micro_batch_means_is_noticed(small, experience, monkeypatch):
    right = ppo_trainer.optimizer_step

    def means(engine, micro_batches, objective, total_weight):
        def mean(batch):
            loss, stats = objective(batch)
            return loss / batch.weight(), stats

        return right(engine, micro_batches, mean, torch.tensor(float(len(micro_batches))))

    monkeypatch.setattr(ppo_trainer, "optimizer_step", means)
    with pytest.raises(AssertionError):
        check_accumulation(small, experience)


def check_after_eos(small, experience):
    """Ids, values, log-probabilities, advantages and returns behind the end move no weight."""
    outside = experience.response_mask == 0
    assert outside.any()
    ids = experience.input_ids.clone()
    ids[:, -experience.response_length :][outside] = 77
    # Ratios above 1 at negative advantages: the clip would not hide them.
    much = 50.0 * outside
    changed = dataclasses.replace(
        experience, input_ids=ids, logprobs=experience.logprobs - 15.0 * outside,
        ref_logprobs=experience.ref_logprobs - much, values=experience.values + 0.05 * outside,
        advantages=experience.advantages - much, returns=experience.returns + much,
    )
    settings = small.ppo(micro_batch_size=8)
    for one, other in zip(
        weights_after(small, experience, settings), weights_after(small, changed, settings),
        strict=True,
    ):
        for name, weight in one.items():
            assert_close(other[name], weight, rtol=1e-5, atol=1e-6)


def test_nothing_after_eos_moves_a_weight(small, experience):
    check_after_eos(small, experience)


@pytest.mark.parametrize(("loss", "place"), [("policy_loss", 3), ("value_loss", 3)])
def test_pads_left_unmasked_in_a_loss_are_noticed(small, experience, monkeypatch, loss, place):
    right = getattr(losses, loss)

    def wrong(*given):
        given = list(given)
        given[place] = torch.ones_like(given[place])
        return right(*given)

    monkeypatch.setattr(losses, loss, wrong)
    with pytest.raises(AssertionError):
        check_after_eos(small, experience)


def check_prompt_padding(small, experience):
    """What ids stand in the padding of the prompts is of no account."""
    ids = experience.input_ids.masked_fill(experience.attention_mask == 0, 77)
    assert not ids.equal(experience.input_ids)
    settings = small.ppo(micro_batch_size=8)
    one, other = (
        weights_after(small, dataclasses.replace(experience, input_ids=given), settings)[0]
        for given in (experience.input_ids, ids)
    )
    for name, weight in one.items():
        assert_close(other[name], weight, rtol=1e-5, atol=1e-6)


def test_the_padding_of_prompts_moves_no_weight(small, experience):
    check_prompt_padding(small, experience)


def test_prompt_padding_that_is_attended_to_is_noticed(small, experience, monkeypatch):
    right = ppo_trainer.response_logits
    monkeypatch.setattr(
        ppo_trainer, "response_logits",
        lambda model, ids, mask, length: right(model, ids, torch.ones_like(mask), length),
    )
    with pytest.raises(AssertionError):
        check_prompt_padding(small, experience)


def test_the_policy_moves_toward_what_had_an_advantage(small, experience):
    # A small step: what it changes is then what the gradient says, whatever the weights are.
    engine = roles(small, **{**PLAIN, "learning_rate": 1e-3})
    sign = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0).unsqueeze(-1)
    told = dataclasses.replace(experience, advantages=sign * experience.response_mask)
    learn(small.trainer(engine, small.ppo(micro_batch_size=8)), told, 0)
    engine.train(False)
    with torch.no_grad():
        after = engine.logprobs(
            engine.actor, told.input_ids, told.attention_mask, told.responses, 1.0
        )
    gained = (after - told.logprobs) * told.advantages
    assert gained.sum() > 0.01


def test_the_critic_moves_toward_the_returns(small, experience):
    engine = roles(small)
    trainer = small.trainer(engine, small.ppo(micro_batch_size=8, epochs=6))
    above = experience.returns + 3 * experience.response_mask
    told = dataclasses.replace(experience, returns=above)
    first = learn(trainer, told, 0)["value/loss"]
    assert learn(trainer, told, 1)["value/loss"] < first


def test_each_pass_takes_every_row_once_in_a_new_order(small, experience, monkeypatch):
    taken = []

    def record(self, micro_batches, text):
        taken.append(torch.cat([batch.score for batch in micro_batches]).tolist())
        return {}

    monkeypatch.setattr(PPOTrainer, "_step", record)
    learn(small.trainer(NOTHING, small.ppo(epochs=2, micro_batch_size=3)), experience, 0)
    assert [len(rows) for rows in taken] == [3, 3, 2, 3, 3, 2]
    first, second = sum(taken[:3], []), sum(taken[3:], [])
    assert sorted(first) == sorted(second) == sorted(experience.score.tolist())
    assert first != second


@pytest.mark.parametrize(
    ("rollouts", "micro", "accumulation", "epochs", "steps"),
    [(8, 2, 1, 1, 4), (8, 3, 1, 2, 6), (8, 2, 3, 1, 2), (8, 8, 4, 3, 3)],
)
def test_the_steps_of_a_round_are_those_it_takes(
    small, experience, monkeypatch, rollouts, micro, accumulation, epochs, steps
):
    settings = small.ppo(micro_batch_size=micro, accumulation_steps=accumulation, epochs=epochs)
    taken = []
    monkeypatch.setattr(PPOTrainer, "_step", lambda self, *_: taken.append(1) or {})
    learn(small.trainer(NOTHING, settings), experience, 0)
    assert steps_per_round(rollouts, settings) == len(taken) == steps


def test_a_round_reports_every_metric_and_all_are_finite(small, experience):
    engine = roles(small, "lora")
    _, rollout = small.experience(small.maker(engine), count=4)
    metrics = rollout | learn(small.trainer(engine, small.ppo()), experience, 0)
    named = """
        reward/score_mean reward/score_std reward/normalized_mean reward/kl_penalty kl/k1 kl/k3
        policy/loss policy/entropy policy/clip_fraction policy/approx_kl policy/ratio_mean
        policy/ratio_max policy/clamped value/loss value/clip_fraction value/explained_variance
        response/length_mean response/eos_rate response/repetition lr/actor lr/critic
        grad_norm/actor grad_norm/critic time/update
    """.split()
    assert set(named) <= metrics.keys()
    assert all(map(math.isfinite, metrics.values()))


# ------------------------------------------------------------------- options of the update


def test_an_entropy_bonus_raises_the_entropy(small, experience):
    still = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    entropies = {}
    for coef in (0.0, 1.0):
        engine = roles(small, **PLAIN)
        trainer = small.trainer(engine, small.ppo(micro_batch_size=8, entropy_coef=coef))
        entropies[coef] = [learn(trainer, still, i)["policy/entropy"] for i in range(2)]
    assert entropies[0.0][1] == pytest.approx(entropies[0.0][0], abs=1e-5)
    assert entropies[1.0][1] > entropies[1.0][0] + 0.01


TEXT = [{"input_ids": [1, *range(50, 60)], "labels": [1, *range(50, 60)]},
        {"input_ids": [1, 70, 71], "labels": [1, 70, 71]}]


def test_the_language_modelling_loss_is_a_token_mean_of_its_own_times_its_weight(
    small, experience
):
    batches = [collate_tokens([row], pad_id=3) for row in TEXT]
    with torch.no_grad():
        total = sum(
            losses.token_loss(small.causal_lm()(input_ids=b.input_ids).logits, b.labels)
            for b in batches
        )
    engine = roles(small, **PLAIN)
    settings = small.ppo(micro_batch_size=4, accumulation_steps=2, unsup_coef=0.5)
    metrics = learn(small.trainer(engine, settings), experience, 0, batches)
    assert metrics["policy/unsup_loss"] == pytest.approx(0.5 * total.item() / 12, rel=1e-4)
    with torch.no_grad():
        after = sum(
            losses.token_loss(engine.actor.module(input_ids=b.input_ids).logits, b.labels)
            for b in batches
        )
    assert after < total


@pytest.mark.parametrize("kind", ROLES)
def test_the_critics_warm_up_leaves_the_actor_and_its_average_unchanged(
    small, experience, kind
):
    engine = roles(small, kind)
    ema = Ema(engine.actor.module, decay=0.5)
    trainer = small.trainer(
        engine, small.ppo(micro_batch_size=8, critic_warmup_steps=2), ema
    )
    actor, critic = snapshot(engine.actor.module), snapshot(engine.critic.module)
    for i in range(2):
        metrics = learn(trainer, experience, i)
        assert moved(actor, engine.actor.module) == set()
        assert "policy/loss" not in metrics
    assert moved(critic, engine.critic.module) != set()
    with ema.swapped_in():
        assert moved(actor, engine.actor.module) == set()
    learn(trainer, experience, 2)
    assert moved(actor, engine.actor.module) != set()
    own = snapshot(engine.actor.module)
    with ema.swapped_in():
        assert moved(actor, engine.actor.module) != set()
        assert moved(own, engine.actor.module) != set()
    assert moved(own, engine.actor.module) == set()


# ------------------------------------------------------------------- what is not finite


def test_an_update_that_is_not_finite_is_skipped_counted_and_leaves_both_unchanged(
    small, experience
):
    engine = roles(small, "lora")
    actor, critic = snapshot(engine.actor.module), snapshot(engine.critic.module)
    trainer = small.trainer(engine, small.ppo(micro_batch_size=8))
    broken = dataclasses.replace(experience, returns=experience.returns * math.nan)
    metrics = learn(trainer, broken, 0)
    assert metrics["policy/skipped_steps"] == 1
    assert moved(actor, engine.actor.module) == set()
    assert moved(critic, engine.critic.module) == set()
    assert learn(trainer, experience, 1)["policy/skipped_steps"] == 1
    assert moved(actor, engine.actor.module) != set()


def test_advantages_that_are_not_finite_leave_the_actor_unchanged(small, experience):
    engine = roles(small)
    actor = snapshot(engine.actor.module)
    trainer = small.trainer(engine, small.ppo(micro_batch_size=8))
    broken = dataclasses.replace(experience, advantages=experience.advantages / 0.0)
    assert learn(trainer, broken, 0)["policy/skipped_steps"] == 1
    assert moved(actor, engine.actor.module) == set()


def test_too_many_updates_in_a_row_that_are_not_finite_end_the_run(small, experience):
    trainer = small.trainer(roles(small), small.ppo(micro_batch_size=8), most=3)
    broken = dataclasses.replace(experience, returns=experience.returns * math.inf)
    learn(trainer, broken, 0)
    learn(trainer, broken, 1)
    learn(trainer, experience, 2)  # a good one in between starts the count anew
    learn(trainer, broken, 3)
    learn(trainer, broken, 4)
    with pytest.raises(FloatingPointError) as error:
        learn(trainer, broken, 5)
    assert str(error.value) == (
        "non-finite loss or gradient in 3 consecutive optimizer steps (--max_skipped_steps 3); "
        "lower the learning rate"
    )


# ------------------------------------------------------------------- over several rounds


def rounds(small, reward_function, count, learning_rate, tokens, batches):
    """Metrics of each round, of a critic that begins with 0 everywhere."""
    engine = small.roles(learning_rate=learning_rate, adam_eps=1e-5, needs_reward_model=False)
    engine.eos_ids = torch.tensor([-1])
    with torch.no_grad():
        engine.critic.module.model.score.weight.zero_()
    maker = small.maker(engine, tokens=tokens, reward_function=reward_function)
    trainer = small.trainer(engine, small.ppo(micro_batch_size=8 * batches))
    settings = small.reward_settings(missing_eos_penalty=0.0, clip=10.0)
    history = []
    for number in range(count):
        scored = maker.score(maker.generate(small.prompts(8), replies=batches))
        experience, metrics = make_experience(
            scored, ScoreNormalizer("none"), settings, kl_coef=0.05
        )
        history.append(metrics | learn(trainer, experience, number))
    return history


def vowels(prompts, replies):
    return [10.0 * sum(c in "aeiou" for c in reply) / max(1, len(reply)) for reply in replies]


def test_a_reward_is_learnt(small):
    history = rounds(small, vowels, count=14, learning_rate=5e-3, tokens=1, batches=10)
    scores = [metrics["reward/score_mean"] for metrics in history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.8 * history[0]["reward/score_std"]
    assert history[-1]["kl/k3"] > 0.3


def test_with_a_constant_reward_of_0_nothing_rises_and_the_kl_stays_near_0(small):
    history = rounds(
        small, lambda prompts, replies: [0.0] * len(replies), count=8, learning_rate=5e-3,
        tokens=6, batches=1,
    )
    assert all(metrics["reward/score_mean"] == 0 for metrics in history)
    assert all(abs(metrics["kl/k3"]) < 0.01 for metrics in history)


# ------------------------------------------------------------------- the coefficient of KL


def test_the_adaptive_coefficient_moves_toward_the_target_by_at_most_a_fifth_a_horizon():
    controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    controller.update(6.6, episodes=100)  # a tenth above: 1 + 0.1 * 100 / 1000
    assert controller.coef == pytest.approx(0.101)
    controller.update(60.0, episodes=100)  # held at a fifth
    assert controller.coef == pytest.approx(0.101 * 1.02)
    controller.update(0.0, episodes=1000)
    assert controller.coef == pytest.approx(0.101 * 1.02 * 0.8)


def test_the_fixed_coefficient_stays():
    controller = AdaptiveKLController(0.05)
    controller.update(100.0, episodes=10_000)
    assert controller.coef == 0.05
