"""The four losses against numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from alpaca_rlhf.utils.losses import pairwise_loss, policy_loss, token_loss, value_loss

# --- tokens and pairs ----------------------------------------------------------------------------


def test_token_loss_sums_the_trained_labels_each_predicted_one_position_before():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(9), 0.0], [50.0, -50.0]]])
    labels = torch.tensor([[1, 1, 0]])  # the first has nothing before it to be predicted from
    assert_close(token_loss(logits, labels).item(), -math.log(0.75) - math.log(0.9))


def test_token_loss_leaves_out_labels_of_minus_100():
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, -100, 3, -100], [-100, -100, -100, -100]])
    assert_close(token_loss(logits, labels), -logits[0, 1].log_softmax(-1)[3])


def test_token_loss_of_half_precision_logits_is_computed_in_fp32():
    logits = torch.tensor([[[8.0, 0.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    loss = token_loss(logits, torch.tensor([[-100, 0]]))
    assert loss.dtype == torch.float32
    assert_close(loss.item(), math.log1p(math.exp(-8)), rtol=1e-4, atol=0)


def test_pairwise_loss_is_the_sum_of_minus_log_sigmoid_of_the_differences():
    loss = pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert_close(loss.item(), 0.3132617 + 2.1269280, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("chosen", "expected"), [(200.0, 0.0), (-200.0, 400.0)])
def test_pairwise_loss_stays_finite_at_scores_of_200(chosen, expected):
    score = torch.tensor([chosen], requires_grad=True)
    loss = pairwise_loss(score, torch.tensor([-chosen]))
    loss.backward()
    assert loss.item() == expected
    assert score.grad.isfinite().all()


# --- policy --------------------------------------------------------------------------------------

# Four tokens: clipped above, clipped below, and twice not clipped, where the clip would help the
# policy; then padding.
MASK = torch.tensor([[1, 1, 1, 1, 0]])
GIVEN = {
    "logprobs": torch.tensor([[1.5, 0.5, 1.5, 0.5, 7.0]]).log(), "old_logprobs": torch.zeros(1, 5),
    "advantages": torch.tensor([[2.0, -1.0, -1.0, 1.0, 3.0]]),
}


def surrogate(mask=MASK, **changes):
    return policy_loss(**{**GIVEN, **changes}, mask=mask, clip=0.2)


def test_policy_loss_is_the_clipped_surrogate_summed_over_the_response():
    loss, stats = surrogate()
    assert_close(loss.item(), -1.2 * 2.0 + 0.8 + 1.5 - 0.5)
    logs = 2 * math.log(1.5) + 2 * math.log(0.5)
    expected = {"clip_fraction": 2.0, "ratio_mean": 4.0, "ratio_max": 1.5, "clamped": 0.0,
                "approx_kl": 4.0 - 4 - logs}
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected)


def test_a_clipped_token_and_padding_have_no_gradient():
    logprobs = GIVEN["logprobs"].clone().requires_grad_()
    surrogate(logprobs=logprobs)[0].backward()
    assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, 1.5, -0.5, 0.0]]))


def test_a_log_ratio_beyond_20_is_clamped_and_counted():
    logprobs = torch.tensor([[50.0, -50.0, 0.0, 0.0, 50.0]])
    loss, stats = surrogate(logprobs=logprobs, advantages=-torch.ones(1, 5))
    assert stats["clamped"] == 2
    assert_close(loss.item(), math.exp(20) + 0.8 + 1.0 + 1.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GIVEN)
def test_nothing_after_eos_changes_the_policy_loss(name):
    changed = GIVEN[name].clone()
    changed[0, 4] = -1e4
    assert surrogate(**{name: changed}) == surrogate()
    assert surrogate(torch.ones(1, 5), **{name: changed}) != surrogate()


# --- value ---------------------------------------------------------------------------------------


def test_value_loss_is_half_the_larger_of_plain_and_clipped_error():
    # Clipped above and below, not far enough to be clipped, and clipped with the smaller error.
    values = torch.tensor([[0.5, -0.5, -0.1, 0.5, 9.0]])
    returns = torch.tensor([[1.0, -1.0, 1.0, 0.0, 0.0]])
    loss, stats = value_loss(values, torch.zeros(1, 5), returns, MASK, clip=0.2)
    assert_close(loss.item(), 0.5 * (0.8**2 + 0.8**2 + 1.1**2 + 0.5**2))
    assert stats["clip_fraction"] == 2


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nothing_after_eos_changes_the_value_loss(which):
    given = [torch.tensor([[0.3, 0.1, 0.2, 0.4, 0.7]]) for _ in range(3)]
    plain, _ = value_loss(*given, MASK, clip=0.2)
    given[which] = torch.tensor([[0.3, 0.1, 0.2, 0.4, -1e4]])
    assert value_loss(*given, MASK, clip=0.2)[0] == plain
