"""The rollout phase: what the four roles say of a reply, and the experience it becomes."""

import dataclasses
import math
import sys

import pytest
import torch
from conftest import moved, snapshot
from torch.testing import assert_close

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Rollout, ScoredRollout
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
    RolloutMaker,
    ScoreNormalizer,
    length_groups,
    load_reward_function,
    make_experience,
)
from alpaca_rlhf.utils import rl_math
from alpaca_rlhf.utils.data.batches import pad
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model.causal_lm import LoadOptions, response_logits
from alpaca_rlhf.utils.model.reward_model import TokenScorer, scores


def ending_often(engine, small):
    """Every sixth id ends a reply, so that lengths differ."""
    engine.eos_ids = torch.arange(0, len(small.tokenizer), 6)
    return engine


@pytest.fixture(scope="module")
def engine(small):
    return ending_often(small.roles(lora=4), small)


@pytest.fixture(scope="module")
def whole(small):
    """Roles without an adapter: reference and reward model are copies."""
    return ending_often(small.roles(), small)


@pytest.fixture(scope="module")
def scored(small, engine):
    maker = small.maker(engine, tokens=8)
    return maker.score(maker.generate(small.prompts(8)))


def disturbed(engine, amount=0.1):
    """The weights of the actor that train, moved; gives back how to undo it."""
    torch.manual_seed(9)
    before = snapshot(engine.actor.module)
    with torch.no_grad():
        for parameter in engine.actor.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * amount)

    def undo():
        with torch.no_grad():
            for name, parameter in engine.actor.module.named_parameters():
                parameter.copy_(before[name])

    return undo


# ------------------------------------------------------------------- what is generated


def test_a_rollout_is_the_prompt_then_the_reply_and_padding_behind_it(small, engine):
    prompts = small.prompts(8)
    rollout = small.maker(engine, tokens=8).generate(prompts)
    split = prompts.input_ids.shape[1]
    assert rollout.input_ids[:, :split].equal(prompts.input_ids)
    assert rollout.attention_mask[:, :split].equal(prompts.attention_mask)
    assert rollout.attention_mask[:, split:].equal(rollout.response_mask)
    lengths = rollout.response_mask.sum(-1).tolist()
    assert len(set(lengths)) > 2
    assert rollout.responses[rollout.response_mask == 0].eq(small.form.pad_id).all()
    for row, length in zip(rollout.responses, lengths, strict=True):
        ends = torch.isin(row[:length], engine.eos_ids)
        assert not ends[:-1].any()
        assert ends[-1] or length == rollout.response_length


def test_a_reply_that_ends_at_once_keeps_its_row(small, engine, monkeypatch):
    monkeypatch.setattr(engine, "eos_ids", torch.arange(len(small.tokenizer)))
    maker = small.maker(engine)
    scored = maker.score(maker.generate(small.prompts(4)))
    assert scored.response_mask.tolist() == [[1]] * 4
    assert scored.has_eos.all()


def test_a_seed_gives_the_same_rollouts_again_and_the_next_round_others(small, engine):
    maker = small.maker(engine, seed=5)
    first, further = (maker.generate(small.prompts(8)) for _ in range(2))
    maker.reseed(5)
    again = maker.generate(small.prompts(8))
    assert first.input_ids.equal(again.input_ids)
    assert not first.input_ids.equal(further.input_ids)


def test_several_replies_to_a_prompt_stand_in_a_row_and_differ(small, engine):
    prompts = small.prompts(3)
    rollout = small.maker(engine, tokens=8).generate(prompts, replies=4)
    split = prompts.input_ids.shape[1]
    assert rollout.input_ids[:, :split].equal(prompts.input_ids.repeat_interleave(4, dim=0))
    for i in range(0, 12, 4):
        assert len({tuple(row) for row in rollout.responses[i : i + 4].tolist()}) > 1


def test_generating_and_scoring_leave_weights_and_mode_as_they_are(small, engine):
    engine.train(True)
    before = snapshot(engine.actor.module) | snapshot(engine.critic.module)
    maker = small.maker(engine, hybrid=True)
    maker.score(maker.generate(small.prompts(4)))
    assert moved(before, engine.actor.module) == set()
    assert moved(before, engine.critic.module) == set()
    assert engine.actor.module.training
    assert engine.critic.module.training


# ------------------------------------------------------------------- log-probabilities


@torch.no_grad()
def plain_logprobs(model, rollout, temperature):
    """Row by row, without padding, from the whole sequence's logits."""
    expected = torch.zeros(rollout.response_mask.shape)
    for i in range(len(rollout)):
        ids = rollout.input_ids[i][rollout.attention_mask[i].bool()]
        n = int(rollout.response_mask[i].sum())
        logprobs = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
        for t in range(n):
            place = len(ids) - n + t
            expected[i, t] = logprobs[place - 1, ids[place]]
    return expected


def check_logprobs(small, engine, temperature):
    maker = small.maker(engine, tokens=8, temperature=temperature)
    scored = maker.score(maker.generate(small.prompts(8)))
    expected = plain_logprobs(small.causal_lm(), scored, temperature)
    assert_close(scored.logprobs, expected, rtol=1e-4, atol=1e-4)
    assert_close(scored.ref_logprobs, expected, rtol=1e-4, atol=1e-4)
    assert scored.logprobs.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_logprobs_are_the_sampled_tokens_under_the_tempered_policy(small, engine, temperature):
    check_logprobs(small, engine, temperature)


def test_a_temperature_missing_in_the_logprobs_is_noticed(small, engine, monkeypatch):
    right = rl_math.token_logprobs
    monkeypatch.setattr(
        rl_math, "token_logprobs", lambda logits, tokens, temperature: right(logits, tokens)
    )
    with pytest.raises(AssertionError):
        check_logprobs(small, engine, temperature=0.5)


@torch.no_grad()
def test_left_padded_and_unpadded_copies_of_a_text_get_the_same_logprobs(small):
    model = small.causal_lm()
    rows = [[1, 50, 60, 70, 80, 90], [1, 40, 50, 60]]

    def logprobs(**padding):
        ids, mask = pad(rows, value=3, left=True, **padding)
        logits = response_logits(model, ids, mask, 3)
        return rl_math.token_logprobs(logits, ids[:, -3:])

    alone = torch.cat([
        rl_math.token_logprobs(
            model(input_ids=torch.tensor([row])).logits[:, -4:-1], torch.tensor([row[-3:]])
        )
        for row in rows
    ])
    assert_close(logprobs(), alone, rtol=1e-4, atol=1e-4)
    assert_close(logprobs(length=11), alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_only_response_positions_go_through_the_vocabulary_projection(small):
    model, seen = small.causal_lm(), []
    model.lm_head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    batch = small.prompts(2)
    response_logits(model, batch.input_ids, batch.attention_mask, 3)
    assert seen == [4]


@pytest.mark.parametrize("roles", ["engine", "whole"])
def test_before_the_first_update_the_kl_to_the_reference_is_0(small, roles, request):
    maker = small.maker(request.getfixturevalue(roles))
    _, metrics = small.experience(maker, count=8)
    assert abs(metrics["kl/k1"]) < 1e-5
    assert abs(metrics["kl/k3"]) < 1e-5


def check_reference_stays(small, engine):
    """The actor moves, and the reference's log-probabilities stay those of the SFT model."""
    undo = disturbed(engine)
    try:
        maker = small.maker(engine)
        scored = maker.score(maker.generate(small.prompts(4)))
        expected = plain_logprobs(small.causal_lm(), scored, 1.0)
        assert_close(scored.ref_logprobs, expected, rtol=1e-4, atol=1e-4)
        assert (scored.logprobs - scored.ref_logprobs).abs().max() > 0.01
    finally:
        undo()


@pytest.mark.parametrize("roles", ["engine", "whole"])
def test_the_reference_stays_the_sft_model_when_the_actor_moves(small, roles, request):
    check_reference_stays(small, request.getfixturevalue(roles))


def test_a_reference_that_shares_weights_that_train_is_noticed(small, whole, monkeypatch):
    monkeypatch.setattr(whole, "_reference", whole.actor)
    with pytest.raises(AssertionError):
        check_reference_stays(small, whole)


def test_an_adapter_that_is_not_turned_off_is_noticed(small, engine, monkeypatch):
    monkeypatch.setattr(engine, "_reference", engine.actor)
    with pytest.raises(AssertionError):
        check_reference_stays(small, engine)


def check_no_dropout(small, dropping):
    maker = small.maker(dropping)
    rollout = maker.generate(small.prompts(4))
    first, second = maker.score(rollout), maker.score(rollout)
    for field in dataclasses.fields(ScoredRollout):
        assert getattr(first, field.name).equal(getattr(second, field.name)), field.name


@pytest.fixture(scope="module")
def dropping(small):
    return small.roles(lora=4, load=LoadOptions(dropout=0.3), lora_dropout=0.3)


def test_dropout_is_off_while_a_rollout_is_scored(small, dropping):
    dropping.train(True)
    check_no_dropout(small, dropping)


def test_dropout_that_is_left_on_is_noticed(small, dropping, monkeypatch):
    dropping.train(True)
    monkeypatch.setattr(RLHFEngine, "train", lambda self, mode: None)
    with pytest.raises(AssertionError):
        check_no_dropout(small, dropping)


# ------------------------------------------------------------------- values and scores


@torch.no_grad()
def test_a_value_is_the_critics_at_the_state_before_each_response_token(small, scored):
    scorer = TokenScorer(small.reward_model())
    for i in range(len(scored)):
        ids = scored.input_ids[i][scored.attention_mask[i].bool()]
        n = int(scored.response_mask[i].sum())
        expected = scorer(ids[None], torch.ones_like(ids[None]))[0, len(ids) - n - 1 : -1]
        assert_close(scored.values[i, :n], expected, rtol=1e-4, atol=1e-4)
        assert scored.values[i, n:].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("roles", ["engine", "whole"])
def test_the_score_is_the_reward_models_at_the_last_real_token(small, roles, request):
    maker = small.maker(request.getfixturevalue(roles), tokens=8)
    scored = maker.score(maker.generate(small.prompts(8)))
    scorer = TokenScorer(small.reward_model())
    for i in range(len(scored)):
        ids = scored.input_ids[i][scored.attention_mask[i].bool()][None]
        expected = scores(scorer, ids, torch.ones_like(ids))
        assert_close(scored.score[i : i + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("roles", ["engine", "whole"])
def test_the_reward_model_stays_when_the_critic_moves(small, roles, request):
    roles = request.getfixturevalue(roles)
    maker = small.maker(roles)
    rollout = maker.generate(small.prompts(4))
    before, kept = maker.score(rollout), snapshot(roles.critic.module)
    with torch.no_grad():
        for parameter in roles.critic.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    after = maker.score(rollout)
    with torch.no_grad():
        for name, parameter in roles.critic.module.named_parameters():
            parameter.copy_(kept[name])
    assert after.score.equal(before.score)
    assert (after.values - before.values).abs().max() > 0.01


def test_has_eos_tells_the_replies_that_ended_from_those_that_ran_to_the_limit(scored, engine):
    expected = [
        torch.isin(row[mask.bool()], engine.eos_ids).any().item()
        for row, mask in zip(scored.responses, scored.response_mask, strict=True)
    ]
    assert scored.has_eos.tolist() == expected
    assert len(set(expected)) == 2, "all replies end alike"


def test_pads_that_happen_to_be_eos_do_not_count_as_an_end(small, engine):
    maker = small.maker(engine)
    rollout = maker.generate(small.prompts(4))
    cut = torch.zeros_like(rollout.response_mask)
    cut[:, 0] = 1
    ids = rollout.input_ids.clone()
    ids[:, -rollout.response_length :] = 0  # an id that ends a reply
    ids[:, -rollout.response_length] = 1  # and one that does not
    mask = torch.cat([rollout.attention_mask[:, : -rollout.response_length], cut], dim=-1)
    assert not maker.score(Rollout(ids, mask, cut, cut * 0.0)).has_eos.any()


def test_rows_are_scored_in_groups_of_like_length_and_of_so_many_tokens():
    assert length_groups([3, 8, 1, 4, 3], [1, 1, 1, 1, 1], tokens=10) == [[1], [3, 0], [4, 2]]
    assert length_groups([3, 8, 1], [1, 1, 1], tokens=1) == [[1], [0], [2]]
    # 5 + 5 columns of two rows: their padding counts.
    assert length_groups([5, 1], [1, 5], tokens=20) == [[0, 1]]
    assert length_groups([5, 1], [1, 5], tokens=19) == [[0], [1]]


def test_groups_change_nothing_but_the_memory(small, engine, monkeypatch):
    maker, sizes, right = small.maker(engine, tokens=8), [], RolloutMaker._score_group
    rollout = maker.generate(small.prompts(8))
    monkeypatch.setattr(
        RolloutMaker, "_score_group",
        lambda self, part: sizes.append(part.input_ids.numel()) or right(self, part),
    )
    grouped = maker.score(rollout)
    maker._scoring_tokens = 10_000
    together = maker.score(rollout)
    assert len(sizes) > 3
    assert max(sizes[:-1]) <= 60
    assert sizes[-1] == rollout.input_ids.numel()
    for field in dataclasses.fields(ScoredRollout):
        given, expected = getattr(grouped, field.name), getattr(together, field.name)
        if field.name == "input_ids":  # what id stands in the padding is of no account
            given, expected = (ids * rollout.attention_mask for ids in (given, expected))
        assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_a_rank_with_fewer_groups_keeps_step_and_counts_none_twice(small, engine, monkeypatch):
    maker = small.maker(engine, tokens=8)
    rollout = maker.generate(small.prompts(8))
    expected, passes = maker.score(rollout), []
    monkeypatch.setattr(
        "alpaca_rlhf.utils.distributed.max_over_ranks", lambda most: torch.tensor(11.0)
    )
    hook = engine.critic.register_forward_pre_hook(lambda *_: passes.append(1))
    scored = maker.score(rollout)
    hook.remove()
    assert len(passes) == 2 * 11  # values, and scores with the adapter off
    for field in dataclasses.fields(ScoredRollout):
        assert getattr(scored, field.name).equal(getattr(expected, field.name))


# ------------------------------------------------------------------- a function for a reward


def test_a_reward_function_is_given_prompts_and_replies_as_text(small, engine):
    seen = []

    def length(prompts, replies):
        seen.extend(zip(prompts, replies, strict=True))
        return [float(len(reply)) for reply in replies]

    maker = small.maker(engine, reward_function=length)
    scored = maker.score(maker.generate(small.prompts(2)))
    assert seen[0][0] == "Human: What is the capital of France?\n\nAssistant:"
    assert scored.score.tolist() == [float(len(reply)) for _, reply in seen]
    kept = scored.responses[0][scored.response_mask[0].bool()]
    assert seen[0][1] == small.tokenizer.decode(kept, skip_special_tokens=True).strip()


@pytest.mark.parametrize("given", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_a_reward_function_that_gives_too_few_or_no_numbers_is_refused(small, engine, given):
    maker = small.maker(engine, reward_function=lambda prompts, replies: given)
    rollout = maker.generate(small.prompts(2))
    with pytest.raises(UserError) as error:
        maker.score(rollout)
    assert str(error.value) == (
        f"--reward_function: gave {len(given)} numbers for 2 replies, or one that is not finite; "
        "give one finite float for each"
    )


def test_a_reward_function_is_found_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def one(prompts, replies):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward_function("rewards_of_mine:one")(["a"], ["b"]) == [1.0]
    sys.modules.pop("rewards_of_mine")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("no_such_module:f", "No module named 'no_such_module'; give module:name, with its folder "
                             "on PYTHONPATH"),
        ("math:nothing", "module 'math' has no attribute 'nothing'; give module:name, with its "
                         "folder on PYTHONPATH"),
        ("math:pi", "is not callable; name a function"),
    ],
)
def test_a_reward_function_that_cannot_be_had_is_one_line(name, line):
    with pytest.raises(UserError) as error:
        load_reward_function(name)
    assert str(error.value) == f"--reward_function {name}: {line}"


# ------------------------------------------------------------------- normalisation


def test_scores_are_normalised_by_the_statistics_of_the_checkpoint():
    normalizer = ScoreNormalizer("checkpoint", 0.5, 2.0)
    assert normalizer(torch.tensor([0.5, 2.5, -3.5])).tolist() == [0.0, 1.0, -2.0]


def test_scores_are_normalised_by_the_first_rollouts_and_those_stay(group):
    normalizer = ScoreNormalizer("reference")
    assert_close(normalizer(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
    assert_close(normalizer(torch.tensor([4.0, 4.0])), torch.tensor([2.0, 2.0]))


def test_scores_may_be_left_as_they_are():
    assert ScoreNormalizer("none")(torch.tensor([4.0])).tolist() == [4.0]


def test_equal_scores_do_not_divide_by_zero(group):
    assert ScoreNormalizer("reference")(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------- experience


def by_hand(**changes):
    """Two replies of 2 and 1 tokens; the second ran to its limit."""
    mask = torch.tensor([[1, 1], [1, 0]])
    record = {
        "input_ids": torch.tensor([[1, 5, 6, 2], [1, 5, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), "response_mask": mask,
        "decoded_logprobs": torch.tensor([[-1.0, -2.5], [-3.0, 9.0]]),
        "logprobs": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        "ref_logprobs": torch.tensor([[-2.0, -1.5], [-3.0, 0.0]]),
        "values": torch.tensor([[0.5, 0.2], [0.1, 0.0]]),
        "score": torch.tensor([3.0, 9.0]), "has_eos": torch.tensor([True, False]),
    }
    return ScoredRollout(**{**record, **changes})


def made(small, scored, **changes):
    return make_experience(
        scored, ScoreNormalizer("none"), small.reward_settings(**changes), kl_coef=0.1
    )


def test_rewards_become_advantages_by_hand(small):
    experience, metrics = made(small, by_hand(), lam=1.0, whiten=False)
    # Row 0: rewards -0.1, 0.05 + 3; row 1: the score is held at 5 and pays 1 for no eos.
    assert_close(experience.returns, torch.tensor([[2.95, 3.05], [4.0, 0.0]]))
    assert_close(experience.advantages, torch.tensor([[2.45, 2.85], [3.9, 0.0]]))
    expected = {
        "reward/score_mean": 6.0, "reward/score_std": 3.0, "reward/normalized_mean": 4.0,
        "kl/k1": 0.25, "reward/kl_penalty": 0.025, "response/length_mean": 1.5,
        "response/eos_rate": 0.5, "response/repetition": 0.0,
        "rollout/decoding_difference_max": 0.5,
    }
    for name, number in expected.items():
        assert metrics[name] == pytest.approx(number), name


def test_a_score_is_clipped_on_both_sides(small):
    scored = by_hand(score=torch.tensor([-70.0, 70.0]), has_eos=torch.tensor([True, True]))
    experience, _ = made(small, scored, lam=1.0, whiten=False)
    assert_close(experience.returns[:, 0], torch.tensor([-5.05, 5.0]))


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_response(small, scored):
    experience, _ = made(small, scored)
    inside = experience.advantages[scored.response_mask.bool()]
    assert_close(inside.mean().item(), 0.0, rtol=0, atol=1e-5)
    assert_close(inside.std(correction=0).item(), 1.0, rtol=0, atol=1e-4)


def test_returns_are_not_whitened(small, scored):
    whitened, _ = made(small, scored)
    plain, _ = made(small, scored, whiten=False)
    assert whitened.returns.equal(plain.returns)


def test_what_stands_after_eos_changes_no_advantage_no_return_and_no_metric(small, scored):
    noise = 100.0 * (1 - scored.response_mask)
    changed = dataclasses.replace(
        scored, logprobs=scored.logprobs + noise, ref_logprobs=scored.ref_logprobs - noise,
        values=scored.values + noise,
    )
    (plain, plain_metrics), (other, other_metrics) = made(small, scored), made(small, changed)
    assert noise.any()
    assert other.advantages.equal(plain.advantages)
    assert other.returns.equal(plain.returns)
    assert other_metrics == plain_metrics


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[2.95, 3.05], [4.0, 9.0]], 1.0), ([[0.0, 0.0], [0.0, 9.0]], 0.0)],
)
def test_explained_variance_is_1_of_a_critic_that_knows_and_0_of_one_that_says_nothing(
    small, values, expected
):
    # With lambda 1 the returns are the rewards to come, whatever the critic says.
    _, metrics = made(small, by_hand(values=torch.tensor(values)), lam=1.0)
    assert metrics["value/explained_variance"] == pytest.approx(expected, abs=1e-4)
