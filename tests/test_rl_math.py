"""The mathematics of PPO against numbers worked out by hand and against slower definitions."""

import math

import pytest
import torch
from torch.testing import assert_close

from alpaca_rlhf.utils import rl_math

# --- masks and positions -------------------------------------------------------------------------


def test_positions_and_the_last_token_count_real_tokens_only_padded_on_either_side():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])
    assert rl_math.position_ids(mask)[mask.bool()].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert rl_math.last_token_index(mask).tolist() == [4, 2, 2]
    assert rl_math.gather_last(torch.arange(15.0).view(3, 5), mask).tolist() == [4.0, 7.0, 12.0]


@pytest.mark.parametrize(("tokens", "expected"), [
    ([5, 2, 7, 2], [1, 1, 0, 0]),  # one eos, and another after it
    ([5, 6, 7, 8], [1, 1, 1, 1]),  # none: it ran to the limit
    ([9, 5, 5, 5], [1, 0, 0, 0]),  # the other eos id, at once
    ([5, 6, 7, 2], [1, 1, 1, 1]),  # at the very end
    ([2, 9, 2, 9], [1, 0, 0, 0]),
    ([0, 0, 2, 0], [1, 1, 1, 0]),  # the pad id is a token like others: position decides
])
def test_a_response_ends_with_its_first_eos_of_several_ids(tokens, expected):
    mask = rl_math.response_mask(torch.tensor([tokens]), torch.tensor([2, 9]))
    assert mask.tolist() == [expected]


# --- log-probabilities and KL --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "probability"), [(1.0, 0.75), (2.0, 0.6339746), (0.5, 0.9)]
)
def test_log_probabilities_are_those_of_logits_over_temperature(
    temperature, probability
):
    logits = torch.tensor([[[0.0, math.log(3)]]])
    logprobs = rl_math.token_logprobs(logits, torch.tensor([[1]]), temperature)
    assert_close(logprobs.item(), math.log(probability), rtol=1e-6, atol=0)


def test_log_probabilities_of_half_precision_logits_are_fp32():
    logits = torch.tensor([[[10.0, 0.0]]], dtype=torch.bfloat16)
    logprobs = rl_math.token_logprobs(logits, torch.tensor([[0]]))
    assert logprobs.dtype == torch.float32
    assert_close(logprobs.item(), -math.log1p(math.exp(-10)), rtol=1e-2, atol=0)


def test_k1_and_k3_are_summed_over_the_response_in_nats():
    logprobs = torch.tensor([[-1.0, -2.0, 9.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.75, -9.0]])
    k1, k3 = rl_math.kl_estimates(logprobs, ref_logprobs, torch.tensor([[1, 1, 0]]))
    assert_close(k1.tolist(), [0.25])
    assert_close(k3.item(), math.exp(-0.5) - 0.5 + math.exp(0.25) - 1.25)


def test_k3_is_never_negative_and_its_mean_is_the_kl_divergence():
    torch.manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    sampled = torch.multinomial(p, 20_000, replacement=True).unsqueeze(-1)
    k1, k3 = rl_math.kl_estimates(p.log()[sampled], q.log()[sampled], torch.ones_like(sampled))
    exact = (p * (p / q).log()).sum()
    assert k3.min() >= 0
    assert_close(k1.mean(), exact, rtol=0, atol=0.02)
    assert_close(k3.mean(), exact, rtol=0, atol=0.02)


# --- rewards -------------------------------------------------------------------------------------


def test_every_token_pays_kl_and_the_score_is_on_the_last_one():
    """Rows of 2, 3, 1 and no tokens."""
    logprobs = torch.tensor(
        [[-1.0, -1.0, 5.0], [-1.0, -1.0, -1.0], [-1.0, 5.0, 5.0], [5.0, 5.0, 5.0]])
    ref_logprobs = torch.tensor(
        [[-2.0, -3.0, -5.0], [-1.0, -1.0, -1.0], [0.0, -5.0, -5.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    rewards = rl_math.token_rewards(
        logprobs, ref_logprobs, torch.tensor([3.0, -2.0, 1.0, 4.0]), mask, kl_coef=0.1
    )
    expected = [[-0.1, 2.8, 0.0], [0.0, 0.0, -2.0], [1.1, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert_close(rewards, torch.tensor(expected))


# --- advantages ----------------------------------------------------------------------------------


def naive_gae(rewards, values, length, gamma, lam):
    """Equation 16 as a double sum over one row."""
    value = [*values[:length], 0.0]
    delta = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)
    ]


def test_gae_of_two_tokens_by_hand():
    advantages, returns = rl_math.gae(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.2]]), torch.tensor([[1, 1]]), 0.9, 0.8
    )
    assert_close(advantages, torch.tensor([[0.256, 0.8]]))
    assert_close(returns, torch.tensor([[0.756, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_double_sum_that_defines_it(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, dtype=torch.float64)
    lengths = [7, 4, 1, 5]
    mask = (torch.arange(7) < torch.tensor(lengths).unsqueeze(-1)).long()
    advantages, returns = rl_math.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = naive_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert_close(advantages[row, :length].tolist(), expected, rtol=1e-9, atol=1e-9)
        assert advantages[row, length:].eq(0).all()
    assert_close(returns, (advantages + values) * mask)


def test_nothing_after_eos_changes_an_advantage_or_a_return_by_a_bit():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    logprobs, ref_logprobs, values = torch.randn(3, 2, 5)

    def advantages(noise):
        rewards = rl_math.token_rewards(
            logprobs + noise, ref_logprobs - noise, torch.tensor([1.0, -1.0]), mask, 0.1)
        found, returns = rl_math.gae(rewards + noise, values + noise, mask, 1.0, 0.95)
        return rl_math.whiten(found, mask, rl_math.masked_moments(found + noise, mask)), returns

    plain, changed = advantages(0 * mask), advantages(1e3 * (1 - mask))
    assert all(one.equal(other) for one, other in zip(plain, changed, strict=True))


# --- whitening -----------------------------------------------------------------------------------


def test_whitening_subtracts_the_mean_and_divides_by_the_std_over_the_mask():
    # Mean 2 and standard deviation sqrt(2/3) of 1, 2 and 3.
    values, mask = torch.tensor([[1.0, 2.0], [3.0, 100.0]]), torch.tensor([[1, 1], [1, 0]])
    white = rl_math.whiten(values, mask, rl_math.masked_moments(values, mask))
    assert_close(white, torch.tensor([[-1.2247449, 0.0], [1.2247449, 0.0]]))


def test_moments_of_parts_add_up_to_those_of_the_whole():
    values, mask = torch.randn(6, 4), torch.randint(0, 2, (6, 4))
    parts = [rl_math.masked_moments(values[part], mask[part]) for part in (slice(2), slice(2, 6))]
    assert_close(parts[0] + parts[1], rl_math.masked_moments(values, mask))


def test_equal_values_whiten_to_zero_and_an_empty_mask_to_no_nan():
    # Of three times 0.1 the mean of squares minus the square of the mean is -1.7e-18.
    same = torch.full((1, 3), 0.1, dtype=torch.float64)
    for mask in (torch.ones(1, 3), torch.zeros(1, 3)):
        white = rl_math.whiten(same, mask, rl_math.masked_moments(same, mask))
        assert_close(white, torch.zeros_like(same), rtol=0, atol=1e-6)


# --- repetition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "length", "share"), [
    ([5, 6, 5, 6], 4, 1 / 3), ([5, 5, 5, 5], 4, 2 / 3), ([1, 2, 3, 4], 4, 0.0),
    ([7, 7, 7, 7], 1, 0.0), ([5, 6, 5, 6], 2, 0.0),
])
def test_repetition_is_the_share_of_pairs_of_tokens_that_occurred_before(tokens, length, share):
    mask = (torch.arange(4) < length).long().unsqueeze(0)
    assert_close(rl_math.repetition(torch.tensor([tokens]), mask).tolist(), [share])
