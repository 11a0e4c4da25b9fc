"""The rollout phase: generated responses, what the four roles compute of them, the experience."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from conftest import moved, snapshot
from plain import response_logits
from torch.testing import assert_close

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import ScoredRollout
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
    AdaptiveKLController,
    RewardNormalizer,
    make_experience,
)
from alpaca_rlhf.utils import distributed, rl_math
from alpaca_rlhf.utils.configs import PPOConfig, RewardConfig
from alpaca_rlhf.utils.data.batches import Rollout, pad
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.reward_model import TokenScorer, scores
from alpaca_rlhf.utils.reward_function import apply_reward_function, load_reward_function


@pytest.fixture(scope="module")
def engines(small):
    """Roles with and without adapters; without, reference and reward model are copies."""
    return {"lora": small.roles(lora=4, eos_every=6), "whole": small.roles(eos_every=6)}


@pytest.fixture(params=["lora", "whole"])
def roles(request, engines):
    return engines[request.param]


@pytest.fixture
def engine(engines):
    return engines["lora"]


def scored_rollout(small, engine, count=8, tokens=8, **options):
    maker = small.maker(engine, tokens=tokens, **options)
    return maker.score(maker.generate(small.prompts(count)))[0]


@pytest.fixture(scope="module")
def scored(small, engines):
    return scored_rollout(small, engines["lora"])


def sequences(rollout):
    """Ids [1, T] of each row without padding, and the number of its response tokens."""
    for ids, mask, response in zip(
        rollout.input_ids, rollout.attention_mask, rollout.response_mask, strict=True
    ):
        yield ids[mask.bool()][None], int(response.sum())


def assert_equal(given, expected):
    for field in dataclasses.fields(ScoredRollout):
        assert getattr(given, field.name).equal(getattr(expected, field.name)), field.name


# --- generated responses -------------------------------------------------------------------------


def test_a_rollout_is_the_prompt_then_the_response_then_padding(small, engine):
    prompts = small.prompts(8)
    rollout = small.maker(engine, tokens=8).generate(prompts)
    split = prompts.input_ids.shape[1]
    assert rollout.input_ids[:, :split].equal(prompts.input_ids)
    assert rollout.attention_mask[:, :split].equal(prompts.attention_mask)
    assert rollout.attention_mask[:, split:].equal(rollout.response_mask)
    lengths = rollout.response_mask.sum(-1).tolist()
    assert len(set(lengths)) > 2
    assert rollout.responses[rollout.response_mask == 0].eq(small.chat.pad_id).all()
    for row, length in zip(rollout.responses, lengths, strict=True):
        ends = torch.isin(row[:length], engine.eos_ids)
        assert not ends[:-1].any()
        assert ends[-1] or length == rollout.response_length


def test_a_response_that_ends_at_once_keeps_its_row(small, engine, monkeypatch):
    monkeypatch.setattr(engine, "eos_ids", torch.arange(len(small.tokenizer)))
    scored = scored_rollout(small, engine, count=4)
    assert scored.response_mask.tolist() == [[1]] * 4
    assert scored.has_eos.all()


def test_the_seed_and_the_rank_decide_the_responses(small, engine, monkeypatch):
    maker = small.maker(engine, seed=5)
    first, further = (maker.generate(small.prompts(8)) for _ in range(2))
    maker.reseed(5)
    assert maker.generate(small.prompts(8)).input_ids.equal(first.input_ids)
    assert not further.input_ids.equal(first.input_ids)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    maker.reseed(5)
    assert not maker.generate(small.prompts(8)).input_ids.equal(first.input_ids)


def test_several_responses_to_a_prompt_are_consecutive_rows_and_differ(small, engine):
    prompts = small.prompts(3)
    rollout = small.maker(engine, tokens=8).generate(prompts, 4)
    split = prompts.input_ids.shape[1]
    assert rollout.input_ids[:, :split].equal(prompts.input_ids.repeat_interleave(4, dim=0))
    for i in range(0, 12, 4):
        assert len({tuple(row) for row in rollout.responses[i : i + 4].tolist()}) > 1


def test_generating_and_scoring_leave_weights_and_mode_as_they_were(small, engine):
    engine.train(True)
    before = snapshot(engine.actor.module) | snapshot(engine.critic.module)
    scored_rollout(small, engine, count=4, hybrid=True)
    for trained in (engine.actor.module, engine.critic.module):
        assert moved(before, trained) == set()
        assert trained.training


# --- log-probabilities ---------------------------------------------------------------------------


@torch.no_grad()
def plain_logprobs(model, rollout, temperature=1.0):
    """Log-probabilities [B, R] row by row, without padding, from the logits of all positions."""
    expected = torch.zeros(rollout.response_mask.shape)
    for row, (ids, n) in enumerate(sequences(rollout)):
        logprobs = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        start = ids.shape[1] - n
        for t in range(n):
            expected[row, t] = logprobs[start + t - 1, ids[0, start + t]]
    return expected


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_logprobs_are_of_the_sampled_tokens_under_the_tempered_policy(small, engine, temperature):
    scored = scored_rollout(small, engine, temperature=temperature)
    expected = plain_logprobs(small.causal_lm(), scored, temperature)
    for name in ("logprobs", "ref_logprobs", "decoded_logprobs"):
        assert_close(getattr(scored, name), expected, rtol=1e-4, atol=1e-4)
        assert getattr(scored, name).dtype == torch.float32


@torch.no_grad()
def test_a_text_has_the_same_logprobs_padded_left_or_not(small):
    model, rows = small.causal_lm(), [[1, 50, 60, 70, 80, 90], [1, 40, 50, 60]]

    def logprobs(rows):
        ids, mask = pad(rows, 3, left=True)
        return rl_math.token_logprobs(response_logits(model, ids, mask, 3), ids[:, -3:])

    alone = torch.cat([logprobs([row]) for row in rows])
    assert_close(logprobs(rows), alone, rtol=1e-4, atol=1e-4)
    assert_close(logprobs([*rows, [1] * 11])[:2], alone, rtol=1e-4, atol=1e-4)


def test_before_the_first_update_the_kl_to_the_reference_is_0(small, roles):
    _, metrics = small.experience(small.maker(roles), count=8)
    assert abs(metrics["kl/k1"]) < 1e-5
    assert abs(metrics["kl/k3"]) < 1e-5


def test_reference_and_reward_model_stay_when_actor_and_critic_move(small, roles):
    maker = small.maker(roles)
    rollout = maker.generate(small.prompts(4))
    before, models = maker.score(rollout)[0], (roles.actor.module, roles.critic.module)
    kept = [snapshot(model) for model in models]
    torch.manual_seed(9)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        after = maker.score(rollout)[0]
        for model, weights in zip(models, kept, strict=True):
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    assert after.score.equal(before.score)
    assert after.ref_logprobs.equal(before.ref_logprobs)
    assert (after.values - before.values).abs().max() > 0.01
    assert (after.logprobs - before.logprobs).abs().max() > 0.01


def test_dropout_is_off_while_a_rollout_is_scored(small):
    engine = small.roles(lora=4, dropout=0.3, lora_dropout=0.3)
    engine.train(True)
    maker = small.maker(engine)
    rollout = maker.generate(small.prompts(4))
    assert_equal(*(maker.score(rollout)[0] for _ in range(2)))


# --- values and scores ---------------------------------------------------------------------------


@torch.no_grad()
def test_values_are_of_the_states_before_each_token_and_the_score_of_the_whole(small, roles):
    scored, scorer = scored_rollout(small, roles), TokenScorer(small.reward_model())
    for row, (ids, n) in enumerate(sequences(scored)):
        mask = torch.ones_like(ids)
        expected = scorer(ids)[0, -n - 1 : -1]
        assert_close(scored.values[row, :n], expected, rtol=1e-4, atol=1e-4)
        assert scored.values[row, n:].eq(0).all()
        expected = scores(scorer, ids, mask)
        assert_close(scored.score[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_has_eos_tells_responses_that_ended_from_those_that_ran_to_the_limit(scored, engine):
    expected = [torch.isin(ids[0, -n:], engine.eos_ids).any().item() for ids, n in
                sequences(scored)]
    assert scored.has_eos.tolist() == expected
    assert len(set(expected)) == 2


def test_padding_whose_id_is_an_eos_id_is_no_end(small, engine):
    maker = small.maker(engine)
    rollout = maker.generate(small.prompts(4))
    cut = torch.zeros_like(rollout.response_mask)
    cut[:, 0] = 1
    ids = rollout.input_ids.clone()
    ids[:, -rollout.response_length :] = 0  # an eos id
    ids[:, -rollout.response_length] = 1  # and one that is none
    mask = torch.cat([rollout.attention_mask[:, : -rollout.response_length], cut], dim=-1)
    assert not maker.score(Rollout(ids, mask, cut, cut * 0.0))[0].has_eos.any()


# --- micro-batches -------------------------------------------------------------------------------


def test_the_micro_batches_change_no_result_beyond_rounding_and_rows_keep_their_order(
    small, engine
):
    maker = small.maker(engine, tokens=8)
    rollout = maker.generate(small.prompts(8))
    cuts = (None, [[5, 2], [7, 0, 1], [6], [3, 4]], [range(8)])
    by_length, shuffled, together = (maker.score(rollout, cut)[0] for cut in cuts)
    for other in (by_length, shuffled):
        for field in dataclasses.fields(ScoredRollout):
            one, all_rows = getattr(other, field.name), getattr(together, field.name)
            if field.name == "input_ids":
                one, all_rows = (ids * rollout.attention_mask for ids in (one, all_rows))
            assert_close(one, all_rows, rtol=1e-4, atol=1e-5)


def test_each_model_scores_all_micro_batches_before_the_next_one_does(small, engine):
    seen, maker = [], small.maker(engine, tokens=8)
    rollout = maker.generate(small.prompts(6))
    adapter_on = {"actor": lora.lora_layers(engine.actor.module)[0],
                  "critic": lora.lora_layers(engine.critic.module)[0]}
    hooks = [
        getattr(engine, role).register_forward_pre_hook(
            lambda *_, role=role: seen.append((role, not adapter_on[role].disable_adapters)))
        for role in adapter_on
    ]
    maker.score(rollout)
    for hook in hooks:
        hook.remove()
    assert seen == [(role, on) for on in (True, False) for role in ("actor", "critic")
                    for _ in range(3)]


# --- a reward function ---------------------------------------------------------------------------


def test_a_reward_function_receives_prompts_and_responses_as_text(small, engine):
    seen = []

    def length(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [float(len(response)) for response in responses]

    scored = scored_rollout(small, engine, count=2, reward_function=length)
    assert seen[0][0] == "Human: What is the capital of France?\n\nAssistant:"
    assert scored.score.tolist() == [float(len(response)) for _, response in seen]
    kept = scored.responses[0][scored.response_mask[0].bool()]
    assert seen[0][1] == small.tokenizer.decode(kept, skip_special_tokens=True).strip()


def broken(prompts, responses):
    return [len(response) / 0 for response in responses]


@pytest.mark.parametrize(("function", "found"), [
    (lambda *_: [1.0], "returned 1 values"),
    (lambda *_: [1.0, math.nan], "returned nan"),
    (lambda *_: [1.0, -math.inf], "returned -inf"),
    (lambda *_: [1e39, 0.0], "returned 1e+39"),
    (lambda *_: [1.0, None], "returned None"),
    (lambda *_: ["good", 1.0], "returned 'good'"),
    (lambda *_: None, "TypeError: 'NoneType' object is not iterable (…)"),
    (lambda *_: 1.0, "TypeError: 'float' object is not iterable (…)"),
    (broken, f"ZeroDivisionError: division by zero ({__file__}:…, in <listcomp>)"),
])
def test_a_reward_function_that_fails_or_returns_no_numbers_is_one_line(function, found):
    with pytest.raises(UserError) as error:
        apply_reward_function(function, ["a", "b"], ["c", "d"])
    pattern = ".*".join(re.escape(part) for part in found.split("…"))
    assert re.fullmatch(
        f"--reward_function: {pattern}; return one finite float for each of the 2 responses",
        str(error.value))


@pytest.mark.parametrize("values", [
    [True, False], [np.float32(1), np.float64(0)], [torch.tensor(1.0), torch.tensor([0.0])],
    np.array([1, 0]), torch.tensor([1.0, 0.0], dtype=torch.bfloat16), (1, 0), ["1", "0"]])
def test_a_reward_function_may_return_any_numbers(values):
    assert apply_reward_function(lambda *_: values, ["a", "b"], ["c", "d"]) == [1.0, 0.0]


def test_a_reward_function_is_found_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def one(prompts, responses):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward_function("own_rewards:one")(["a"], ["b"]) == [1.0]


# --- normalization and the KL coefficient --------------------------------------------------------


@pytest.mark.parametrize(("mode", "expected"), [
    ("checkpoint", [[0.25, 1.25], [1.75, 1.75]]),  # saved: mean 0.5, standard deviation 2
    ("reference", [[-1.0, 1.0], [2.0, 2.0]]),  # mean and standard deviation of the first scores
    ("none", [[1.0, 3.0], [4.0, 4.0]]),
])
def test_scores_and_values_are_normalized_by_the_same_fixed_statistics(small, mode, expected):
    normalizer = RewardNormalizer(RewardConfig(reward_normalization=mode), small.critic)
    for given, normalized in zip([[1.0, 3.0], [4.0, 4.0]], expected, strict=True):
        normalizer.measure(by_hand(score=torch.tensor(given)))
        for normalize in (normalizer.scores, normalizer.values):
            assert_close(normalize(torch.tensor(given)), torch.tensor(normalized))


def test_equal_scores_are_normalized_to_0(group):
    normalizer = RewardNormalizer(RewardConfig(reward_normalization="reference"), "")
    normalizer.measure(by_hand(score=torch.tensor([2.0, 2.0])))
    assert normalizer.scores(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


def test_a_reward_function_and_the_critic_are_each_normalized_by_their_own_statistics(
    group, capsys
):
    normalizer = RewardNormalizer(RewardConfig(reward_function="a:b"), "no such folder")
    normalizer.measure(by_hand(
        score=torch.tensor([1.0, 3.0]), values=torch.tensor([[7.0, 10.0], [30.0, 0.0]])))
    assert_close(normalizer.scores(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
    assert_close(normalizer.values(torch.tensor([10.0, 30.0])), torch.tensor([-1.0, 1.0]))
    assert capsys.readouterr().out == (
        "--reward_function: its scores are normalized by those of the first rollouts\n")


def test_the_critic_starts_in_the_unit_of_the_reward(small, engine):
    # The values of the critic, which starts as the reward model, are its scores: at the last state
    # a critic with the reward model's output predicts exactly the normalized score.
    scored, reward = by_hand(score=torch.tensor([4.5, -1.5])), RewardConfig(kl_coef=0.0)
    values = torch.tensor([[4.5, 4.5], [-1.5, 0.0]])
    scored = dataclasses.replace(scored, values=values, has_eos=torch.tensor([True, True]))
    experience, metrics = make_experience(
        scored, RewardNormalizer(reward, small.critic), reward,
        PPOConfig(whiten_advantages=False), kl_coef=0.0)
    assert_close(experience.values, torch.tensor([[2.0, 2.0], [-1.0, 0.0]]))
    assert_close(experience.advantages, torch.zeros(2, 2))
    assert metrics["value/explained_variance"] == pytest.approx(1.0)


def test_the_adaptive_kl_coefficient_moves_toward_the_target_by_at_most_a_fifth_per_horizon():
    controller = AdaptiveKLController(
        RewardConfig(kl_coef=0.1, kl_controller="adaptive", kl_target=6.0, kl_horizon=1000))
    controller.update(6.6, episodes=100)  # a tenth above: 1 + 0.1 * 100 / 1000
    assert controller.coef == pytest.approx(0.101)
    controller.update(60.0, episodes=100)  # limited to a fifth
    assert controller.coef == pytest.approx(0.101 * 1.02)
    controller.update(0.0, episodes=1000)
    assert controller.coef == pytest.approx(0.101 * 1.02 * 0.8)
    fixed = AdaptiveKLController(RewardConfig(kl_coef=0.05))
    fixed.update(100.0, episodes=10_000)
    assert fixed.coef == 0.05


# --- experience ----------------------------------------------------------------------------------


def by_hand(**changes):
    """Two responses of 2 and 1 tokens; the second has no eos."""
    record = {
        "input_ids": torch.tensor([[1, 5, 6, 2], [1, 5, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "response_mask": torch.tensor([[1, 1], [1, 0]]),
        "decoded_logprobs": torch.tensor([[-1.0, -2.5], [-3.0, 9.0]]),
        "logprobs": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-2.0, -1.5], [-3.0, 0.0]]),
        "values": torch.tensor([[0.5, 0.2], [0.1, 0.0]]),
        "score": torch.tensor([3.0, 9.0]), "has_eos": torch.tensor([True, False]),
    }
    return ScoredRollout(**{**record, **changes})


def made(scored, **ppo):
    reward = RewardConfig(reward_normalization="none")
    return make_experience(
        scored, RewardNormalizer(reward, ""), reward, PPOConfig(**ppo), kl_coef=0.1)


def test_rewards_become_advantages_by_hand(group):
    experience, metrics = made(by_hand(), lam=1.0, whiten_advantages=False)
    # Row 0: rewards -0.1 and 0.05 + 3; row 1: the score is clipped to 5 and pays 1 for no eos.
    assert_close(experience.returns, torch.tensor([[2.95, 3.05], [4.0, 0.0]]))
    assert_close(experience.advantages, torch.tensor([[2.45, 2.85], [3.9, 0.0]]))
    expected = {
        "reward/score_mean": 6.0, "reward/score_std": 3.0, "reward/normalized_mean": 4.0,
        "kl/k1": 0.25, "kl/k3": (math.exp(-1) + math.exp(0.5) - 1.5) / 2,
        "reward/kl_penalty": 0.025, "response/length_mean": 1.5, "response/eos_rate": 0.5,
        "response/repetition": 0.0, "rollout/decoding_difference_max": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_gamma_discounts_and_lambda_weighs(group):
    experience, _ = made(by_hand(), gamma=0.5, lam=0.8, whiten_advantages=False)
    # Row 0: deltas -0.1 + 0.5 * 0.2 - 0.5 and 3.05 - 0.2.
    expected = [[-0.5 + 0.5 * 0.8 * 2.85, 2.85], [3.9, 0.0]]
    assert_close(experience.advantages, torch.tensor(expected))


def test_a_score_is_clipped_on_both_sides(group):
    scored = by_hand(score=torch.tensor([-70.0, 70.0]), has_eos=torch.tensor([True, True]))
    experience, _ = made(scored, lam=1.0, whiten_advantages=False)
    assert_close(experience.returns[:, 0], torch.tensor([-5.05, 5.0]))


def test_whitened_advantages_have_mean_0_and_std_1_over_the_response_and_returns_stay(scored):
    (whitened, _), (plain, _) = made(scored), made(scored, whiten_advantages=False)
    inside = whitened.advantages[scored.response_mask.bool()]
    assert_close(inside.mean().item(), 0.0, rtol=0, atol=1e-5)
    assert_close(inside.std(correction=0).item(), 1.0, rtol=0, atol=1e-4)
    assert whitened.advantages[scored.response_mask == 0].eq(0).all()
    assert whitened.returns.equal(plain.returns)


def test_nothing_after_eos_changes_an_advantage_a_return_or_a_metric(scored):
    noise = 100.0 * (1 - scored.response_mask)
    changed = dataclasses.replace(
        scored, logprobs=scored.logprobs + noise, ref_logprobs=scored.ref_logprobs - noise,
        values=scored.values + noise,
    )
    (plain, plain_metrics), (other, other_metrics) = made(scored), made(changed)
    assert noise.any()
    assert other.advantages.equal(plain.advantages)
    assert other.returns.equal(plain.returns)
    assert other_metrics == plain_metrics


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[2.95, 3.05], [4.0, 9.0]], 1.0), ([[0.0, 0.0], [0.0, 9.0]], 0.0)],
)
def test_explained_variance_is_1_of_a_perfect_critic_and_0_of_a_constant_one(
    group, values, expected
):
    # With lambda 1 the returns are the rewards to come, whatever the critic's values.
    _, metrics = made(by_hand(values=torch.tensor(values)), lam=1.0)
    assert metrics["value/explained_variance"] == pytest.approx(expected, abs=1e-4)
