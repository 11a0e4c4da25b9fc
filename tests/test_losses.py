"""The four losses against numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from alpaca_rlhf.utils.losses import pairwise_loss, policy_loss, token_loss, value_loss


def test_token_loss_sums_the_labels_that_are_trained_each_predicted_one_place_before():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(9), 0.0], [50.0, -50.0]]])
    labels = torch.tensor([[1, 1, 0]])  # the first has nothing before it to predict it from
    assert_close(token_loss(logits, labels).item(), -math.log(0.75) - math.log(0.9))


def test_token_loss_leaves_out_what_is_not_trained():
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, -100, 3, -100], [-100, -100, -100, -100]])
    expected = -logits[0, 1].log_softmax(-1)[3]
    assert_close(token_loss(logits, labels), expected)


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


# Three tokens: held back above, held back below, and one that may move; then padding.
RATIOS = torch.tensor([[1.5, 0.5, 1.5, 7.0]])
ADVANTAGES = torch.tensor([[2.0, -1.0, -1.0, 3.0]])
MASK = torch.tensor([[1, 1, 1, 0]])


def surrogate(**changes):
    given = {
        "logprobs": RATIOS.log(), "old_logprobs": torch.zeros(1, 4), "advantages": ADVANTAGES,
        "mask": MASK,
    }
    return policy_loss(**{**given, **changes}, clip=0.2)


def test_policy_loss_is_the_clipped_surrogate_summed_over_the_response():
    loss, _ = surrogate()
    assert_close(loss, torch.tensor(-1.2 * 2.0 + 0.8 + 1.5))


def test_policy_loss_counts_what_is_clipped_and_measures_the_ratios():
    _, stats = surrogate()
    assert stats["clip_fraction"] == 2
    assert_close(stats["ratio_mean"].item(), 3.5)
    assert_close(stats["ratio_max"].item(), 1.5)
    expected = 2 * (0.5 - math.log(1.5)) - 0.5 + math.log(2)
    assert_close(stats["approx_kl"], torch.tensor(expected))
    assert stats["clamped"] == 0


def test_a_clipped_token_has_no_gradient_and_padding_has_none():
    logprobs = RATIOS.log().requires_grad_()
    surrogate(logprobs=logprobs)[0].backward()
    assert_close(logprobs.grad, torch.tensor([[0.0, 0.0, 1.5, 0.0]]))


def test_a_log_ratio_beyond_20_is_held_and_counted():
    loss, stats = surrogate(
        logprobs=torch.tensor([[50.0, -50.0, 0.0, 50.0]]), advantages=-torch.ones(1, 4)
    )
    assert stats["clamped"] == 2
    assert_close(loss.item(), math.exp(20) + 0.8 + 1.0, rtol=1e-6, atol=0)


def test_value_loss_is_half_the_larger_of_plain_and_clipped_error():
    values = torch.tensor([[0.5, -0.1, 9.0]])
    loss, stats = value_loss(
        values, torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([[1, 1, 0]]), clip=0.2
    )
    assert_close(loss.item(), 0.5 * (0.8**2 + 1.1**2))
    assert stats["clip_fraction"] == 1


@pytest.mark.parametrize("which", ["logprobs", "old_logprobs", "advantages"])
def test_what_stands_after_eos_changes_no_policy_loss(which):
    given = {"logprobs": RATIOS.log(), "old_logprobs": torch.zeros(1, 4), "advantages": ADVANTAGES}
    given[which] = given[which].clone()
    given[which][0, 3] = -1e4
    changed, stats = surrogate(**given)
    plain, plain_stats = surrogate()
    assert changed == plain
    assert stats == plain_stats


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_stands_after_eos_changes_no_value_loss(which):
    given = [torch.tensor([[0.3, 0.1, 0.7]]) for _ in range(3)]
    mask = torch.tensor([[1, 1, 0]])
    plain, _ = value_loss(*given, mask, clip=0.2)
    given[which] = torch.tensor([[0.3, 0.1, -1e4]])
    assert value_loss(*given, mask, clip=0.2)[0] == plain


def test_an_unmasked_pad_is_noticed():
    assert surrogate(mask=torch.ones(1, 4))[0] != surrogate()[0]
