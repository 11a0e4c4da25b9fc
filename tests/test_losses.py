"""The four losses against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from plain import entropy
from torch.testing import assert_close

from alpaca_rlhf.utils import projection
from alpaca_rlhf.utils.losses import (
    chosen_logprobs,
    pairwise_loss,
    policy_loss,
    token_loss,
    value_loss,
)
from alpaca_rlhf.utils.projection import Head

# --- tokens and pairs ----------------------------------------------------------------------------


def test_token_loss_sums_the_negative_log_likelihoods_of_logits():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(9), 0.0]])
    loss = token_loss(logits, Head(None), torch.tensor([1, 0]))
    assert_close(loss.item(), -math.log(0.75) - math.log(0.9))


@pytest.mark.parametrize(("temperature", "probability"), [(1, 0.75), (2, 0.6339746), (0.5, 0.9)])
def test_log_probabilities_and_entropies_are_those_of_logits_over_temperature(
    temperature, probability
):
    logits, p = torch.tensor([[0.0, math.log(3)]]), probability
    [[logprob, entropy]] = chosen_logprobs(
        logits, Head(None), torch.tensor([1]), temperature, entropy=True).tolist()
    assert logprob == pytest.approx(math.log(p), rel=1e-6)
    assert entropy == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-6)


# Against the plain formulation in the same precision, which rounds in another order.
PRECISIONS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HEADS = {"weight": (True, False), "weight and bias": (True, True), "logits": (False, False)}


def compared(loss, plain, *, dtype, head, trained="hidden weight bias"):
    """Compare loss and gradients of 33 tokens."""
    torch.manual_seed(0)
    has_weight, has_bias = HEADS[head]
    leaves = {
        "hidden": torch.randn(33, 16 if has_weight else 50),
        "weight": torch.randn(50, 16) if has_weight else None,
        "bias": torch.randn(50) if has_bias else None,
    }
    leaves = {name: part.to(dtype).requires_grad_(name in trained)
              for name, part in leaves.items() if part is not None}
    targets, gradients = torch.randint(50, (33,)), []
    hidden, head = leaves["hidden"], Head(leaves.get("weight"), leaves.get("bias"))
    logits = hidden if head.weight is None else F.linear(hidden, *head)
    for made in (loss(hidden, head, targets), plain(logits.float(), targets)):
        assert made.dtype == torch.float32
        (0.3 * made.sum()).backward()
        gradients.append([made.detach(), *(part.grad for part in leaves.values())])
        for part in leaves.values():
            part.grad = None
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= PRECISIONS[dtype] * theirs.norm()


@pytest.fixture(params=[7 * 50, 33 * 50])
def most(request, monkeypatch):
    monkeypatch.setattr(projection, "MOST_LOGITS", request.param)


@pytest.mark.usefixtures("most")
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("head", HEADS)
def test_token_loss_and_its_gradients_are_those_of_the_plain_formulation(dtype, head):
    compared(token_loss, lambda z, t: F.cross_entropy(z, t, reduction="sum"),
             dtype=dtype, head=head)


@pytest.mark.usefixtures("most")
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("head", HEADS)
def test_log_probabilities_and_entropies_have_the_gradients_of_the_plain_formulation(dtype, head):
    weights = torch.randn(2, 33, generator=torch.Generator().manual_seed(1))

    def weighted(hidden, head, targets):
        found = chosen_logprobs(
            hidden, head, targets, 0.7, entropy=True, entropy_gradient=True)
        return found * weights.T

    def plain(logits, targets):
        chosen = (logits / 0.7).log_softmax(-1).gather(-1, targets[:, None])
        return torch.cat([chosen, entropy(logits, 0.7)[:, None]], -1) * weights.T

    compared(weighted, plain, dtype=dtype, head=head)


@pytest.mark.parametrize("trained", ["hidden", "weight", "hidden weight"])
@pytest.mark.parametrize("loss", [token_loss, chosen_logprobs])
def test_what_is_frozen_gets_no_gradient(loss, trained):
    def plain(logits, targets):
        nll = F.cross_entropy(logits, targets, reduction="none")
        return nll.sum() if loss is token_loss else -nll[:, None]

    compared(loss, plain, dtype=torch.float32, head="weight", trained=trained)


def test_an_entropy_without_a_gradient_is_a_number_only():
    logits = torch.randn(3, 9, requires_grad=True)
    found = chosen_logprobs(logits, Head(None), torch.tensor([1, 2, 3]), entropy=True)
    found[:, 1].sum().backward()
    assert logits.grad.eq(0).all()


def test_no_logits_of_all_tokens_stand_at_once(monkeypatch):
    monkeypatch.setattr(projection, "MOST_LOGITS", 10 * 500)
    largest, right = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *given: largest.append(
        (made := right(*given)).numel()) or made)
    hidden, head = torch.randn(95, 4, requires_grad=True), Head(torch.randn(500, 4))
    for loss in (token_loss, chosen_logprobs):
        loss(hidden, head, torch.zeros(95, dtype=torch.long)).sum().backward()
    assert max(largest) == 10 * 500
    assert len(largest) == 3 * 10, "once for the loss, twice for log-probabilities"


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
