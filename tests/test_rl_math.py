"""The mathematics of PPO against numbers worked out by hand and against slower definitions."""

import math

import pytest
import torch
from torch.testing import assert_close

from alpaca_rlhf.utils import rl_math

# ------------------------------------------------------------------- masks and positions


def test_positions_count_real_tokens_whichever_side_is_padded():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    positions = rl_math.position_ids(mask)
    assert positions[mask.bool()].tolist() == [0, 1, 2, 0, 1, 2]


def test_the_last_real_token_is_found_whichever_side_is_padded():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    assert rl_math.last_token_index(mask).tolist() == [3, 1, 2]
    values = torch.arange(12.0).view(3, 4)
    assert rl_math.gather_last(values, mask).tolist() == [3.0, 5.0, 10.0]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 2, 7, 2], [1, 1, 0, 0]),  # one end, and another after it
        ([5, 6, 7, 8], [1, 1, 1, 1]),  # none: it ran to the limit
        ([9, 5, 5, 5], [1, 0, 0, 0]),  # the other id that ends a reply, at once
        ([5, 6, 7, 2], [1, 1, 1, 1]),  # at the very end
        ([2, 9, 2, 9], [1, 0, 0, 0]),
    ],
)
def test_a_response_goes_up_to_and_including_its_first_eos_of_several(tokens, expected):
    mask = rl_math.response_mask(torch.tensor([tokens]), torch.tensor([2, 9]))
    assert mask.tolist() == [expected]


@pytest.mark.parametrize("pad", [0, 2, 5])
def test_the_mask_goes_by_position_whatever_the_pad_is(pad):
    # 5 is also a token the policy wrote, 2 is eos: neither is taken for padding before the end.
    tokens = torch.tensor([[5, 5, 2, pad, pad]])
    assert rl_math.response_mask(tokens, torch.tensor([2])).tolist() == [[1, 1, 1, 0, 0]]


# ------------------------------------------------------------------- log-probabilities and KL


@pytest.mark.parametrize(
    ("temperature", "probability"), [(1.0, 0.75), (2.0, 0.6339746), (0.5, 0.9)]
)
def test_log_probabilities_are_those_of_logits_over_temperature(temperature, probability):
    logits = torch.tensor([[[0.0, math.log(3)]]])
    given = rl_math.token_logprobs(logits, torch.tensor([[1]]), temperature)
    assert_close(given.item(), math.log(probability), rtol=1e-6, atol=0)


def test_log_probabilities_of_half_precision_logits_are_fp32():
    logits = torch.tensor([[[10.0, 0.0]]], dtype=torch.bfloat16)
    given = rl_math.token_logprobs(logits, torch.tensor([[0]]))
    assert given.dtype == torch.float32
    assert_close(given.item(), -math.log1p(math.exp(-10)), rtol=1e-2, atol=0)


def test_entropy_is_in_nats_and_follows_the_temperature():
    assert_close(rl_math.entropy(torch.zeros(1, 1, 4)).item(), math.log(4))
    logits = torch.tensor([[[0.0, math.log(3)]]])
    p = 0.9  # 3^2 / (1 + 3^2)
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert_close(rl_math.entropy(logits, 0.5).item(), expected)


def test_k1_and_k3_are_summed_over_the_response_in_nats():
    logprobs = torch.tensor([[-1.0, -2.0, 9.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.75, -9.0]])
    k1, k3 = rl_math.kl_estimates(logprobs, ref_logprobs, torch.tensor([[1, 1, 0]]))
    assert_close(k1.tolist(), [0.25])
    assert_close(k3.item(), math.exp(-0.5) - 0.5 + math.exp(0.25) - 1.25)


def test_k3_is_never_negative_and_its_mean_is_the_kl_divergence():
    torch.manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    drawn = torch.multinomial(p, 20_000, replacement=True).unsqueeze(-1)
    k1, k3 = rl_math.kl_estimates(p.log()[drawn], q.log()[drawn], torch.ones_like(drawn))
    exact = (p * (p / q).log()).sum()
    assert k3.min() >= 0
    assert_close(k1.mean(), exact, rtol=0, atol=0.02)
    assert_close(k3.mean(), exact, rtol=0, atol=0.02)


# ------------------------------------------------------------------- rewards


def check_rewards():
    """Hand numbers: KL on every token, the score on the eos of rows of 2, 3 and 1 tokens."""
    logprobs = torch.tensor([[-1.0, -1.0, 5.0], [-1.0, -1.0, -1.0], [-1.0, 5.0, 5.0]])
    ref_logprobs = torch.tensor([[-2.0, -3.0, -5.0], [-1.0, -1.0, -1.0], [0.0, -5.0, -5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    rewards = rl_math.token_rewards(
        logprobs, ref_logprobs, torch.tensor([3.0, -2.0, 1.0]), mask, kl_coef=0.1
    )
    expected = [[-0.1, 2.8, 0.0], [0.0, 0.0, -2.0], [1.1, 0.0, 0.0]]
    assert_close(rewards, torch.tensor(expected))


def test_kl_is_paid_on_every_token_and_the_score_stands_on_the_last_one():
    check_rewards()


def test_a_score_one_past_eos_is_noticed(monkeypatch):
    right = rl_math.last_token_index
    monkeypatch.setattr(
        rl_math, "last_token_index", lambda mask: (right(mask) + 1).clamp(max=mask.shape[-1] - 1)
    )
    with pytest.raises(AssertionError):
        check_rewards()


def test_a_row_without_any_response_token_earns_nothing():
    nothing = torch.zeros(1, 3)
    rewards = rl_math.token_rewards(nothing, nothing, torch.tensor([4.0]), nothing.long(), 0.1)
    assert rewards.tolist() == [[0.0, 0.0, 0.0]]


# ------------------------------------------------------------------- advantages


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
def test_gae_equals_the_double_sum_it_is_defined_by(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, dtype=torch.float64)
    lengths = [7, 4, 1, 5]
    mask = (torch.arange(7) < torch.tensor(lengths).unsqueeze(-1)).long()
    advantages, returns = rl_math.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = naive_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert_close(advantages[row, :length].tolist(), expected, rtol=1e-9, atol=1e-9)
        assert advantages[row, length:].eq(0).all()
        assert returns[row, length:].eq(0).all()
    assert_close(returns, (advantages + values) * mask)


def check_nothing_after_eos_matters():
    """Rewards, values and log-probabilities behind the mask move no advantage, not by a bit."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    logprobs, ref_logprobs, values = torch.randn(3, 2, 5)
    score = torch.tensor([1.0, -1.0])

    def advantages(*changed):
        rewards = rl_math.token_rewards(changed[0], changed[1], score, mask, 0.1)
        given, returns = rl_math.gae(rewards, changed[2], mask, 1.0, 0.95)
        return rl_math.whiten(given, mask, rl_math.masked_moments(given, mask)), returns

    plain = advantages(logprobs, ref_logprobs, values)
    noise = 1e3 * (1 - mask)
    changed = advantages(logprobs + noise, ref_logprobs - noise, values + noise)
    assert all(a.equal(b) for a, b in zip(plain, changed, strict=True))


def test_nothing_after_eos_changes_an_advantage_or_a_return():
    check_nothing_after_eos_matters()


@pytest.mark.parametrize(
    ("function", "mask_argument", "check"),
    [
        ("gae", 2, check_nothing_after_eos_matters),
        ("kl_estimates", 2, lambda: test_k1_and_k3_are_summed_over_the_response_in_nats()),
        ("token_rewards", 3, check_rewards),
        ("masked_moments", 1, lambda: check_whitening()),
    ],
)
def test_pads_left_unmasked_are_noticed(monkeypatch, function, mask_argument, check):
    right = getattr(rl_math, function)

    def wrong(*given, **named):
        given = list(given)
        given[mask_argument] = torch.ones_like(given[mask_argument])
        return right(*given, **named)

    monkeypatch.setattr(rl_math, function, wrong)
    with pytest.raises(AssertionError):
        check()


# ------------------------------------------------------------------- whitening


def check_whitening():
    """Mean 2 and deviation sqrt(2/3) of 1, 2, 3; what is masked stays zero."""
    values, mask = torch.tensor([[1.0, 2.0], [3.0, 100.0]]), torch.tensor([[1, 1], [1, 0]])
    white = rl_math.whiten(values, mask, rl_math.masked_moments(values, mask))
    assert_close(white, torch.tensor([[-1.2247449, 0.0], [1.2247449, 0.0]]))


def test_whitening_subtracts_the_mean_and_divides_by_the_deviation_over_the_mask():
    check_whitening()


def test_moments_of_parts_add_up_to_those_of_the_whole():
    values, mask = torch.randn(6, 4), torch.randint(0, 2, (6, 4))
    parts = rl_math.masked_moments(values[:2], mask[:2]) + rl_math.masked_moments(
        values[2:], mask[2:]
    )
    assert_close(parts, rl_math.masked_moments(values, mask))


def test_equal_values_whiten_to_zero_and_an_empty_mask_to_no_nan():
    same = torch.full((1, 3), 4.0)
    for mask in (torch.ones(1, 3), torch.zeros(1, 3)):
        white = rl_math.whiten(same, mask, rl_math.masked_moments(same, mask))
        assert white.tolist() == [[0.0, 0.0, 0.0]]


# ------------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    ("tokens", "length", "share"),
    [([5, 6, 5, 6], 4, 1 / 3), ([5, 5, 5, 5], 4, 2 / 3), ([1, 2, 3, 4], 4, 0.0),
     ([7, 7, 7, 7], 1, 0.0), ([5, 6, 5, 6], 2, 0.0)],
)
def test_repetition_is_the_share_of_pairs_that_occurred_before(tokens, length, share):
    mask = (torch.arange(4) < length).long().unsqueeze(0)
    assert_close(rl_math.repetition(torch.tensor([tokens]), mask).tolist(), [share])
