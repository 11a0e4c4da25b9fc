"""The four losses: tensors in, sums out.

Each returns a *sum* over trained tokens (or pairs), in fp32. The caller divides by the count of the
whole optimizer step, all micro-batches and ranks together, so accumulating uneven micro-batches
gives the gradient of one big batch (see `training_loop.optimizer_step`).

What needs logits computes them from hidden states, for some tokens at a time: logits of all tokens
of a batch are often larger than the model.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

# exp of a larger log-ratio would be an accident, not a gradient; clamped tokens are counted.
MAX_LOG_RATIO = 20.0


MOST_LOGITS = 2**25  # that stand at the same time: 128 MiB


class Head(NamedTuple):
    """A vocabulary projection.

    Attributes:
        weight: [V, D]; None if the hidden states are logits already.
        bias: [V] or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None


def token_loss(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihood, in nats, of N tokens.

    torch's own `linear_cross_entropy` gives the sum in the precision of the model, which overflows
    in fp16.

    Args:
        hidden: [N, D] states that predict them.
        head: gives their logits.
        targets: [N] the tokens.
    """
    return _TokenLoss.apply(hidden, *head, targets)


def chosen_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float = 1.0, *,
    entropy: bool = False, entropy_gradient: bool = False,
) -> Tensor:
    """Log-probabilities [N, 1] of tokens, in nats, in fp32; the second of [N, 2] is the entropy.

    Args:
        hidden: [N, D] states that predict them.
        head: gives their logits.
        targets: [N] the tokens.
        temperature: divides the logits.
        entropy: also compute the entropies of the distributions.
        entropy_gradient: they have a gradient.
    """
    return _ChosenLogprobs.apply(hidden, *head, targets, temperature, entropy, entropy_gradient)


class _Gradients:
    """Gradients of hidden states, weight and bias, added up from those of some tokens' logits."""

    def __init__(self, hidden: Tensor, head: Head, needed: tuple[bool, ...]) -> None:
        self._hidden, self._head = hidden, head
        parts = (hidden, *head)
        # Sums over tokens are taken in fp32.
        self.sums = [torch.zeros_like(part, dtype=torch.float32 if i else part.dtype)
                     if needs and part is not None else None
                     for i, (part, needs) in enumerate(zip(parts, needed, strict=True))]

    def add(self, some: slice, logits: Tensor) -> None:
        """Add what follows from the gradient of the logits [n, V] of some tokens."""
        hidden, weight, bias = self.sums
        logits = logits.to(self._hidden.dtype)
        if hidden is not None:
            hidden[some] = logits if self._head.weight is None else logits @ self._head.weight
        if weight is not None and weight.dtype == logits.dtype:
            weight.addmm_(logits.T, self._hidden[some])
        elif weight is not None:
            weight += logits.T @ self._hidden[some]
        if bias is not None:
            bias += logits.sum(0, dtype=torch.float32)

    def scaled(self, factor: Tensor | float) -> list[Tensor | None]:
        """Return the sums times a factor, in the precision of what they are the gradients of."""
        return [None if total is None else (total * factor).to(self._hidden.dtype)
                for total in self.sums]


def _logits(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yield logits [n, V] in fp32, which may be overwritten, of some tokens at a time."""
    words = hidden.shape[-1] if head.weight is None else head.weight.shape[0]
    rows = max(1, MOST_LOGITS // words)
    for start in range(0, len(hidden), rows):
        some = slice(start, start + rows)
        logits = hidden[some]
        if head.weight is not None:
            logits = F.linear(logits, head.weight, head.bias)
        yield some, logits.float().clone() if head.weight is None else logits.float()


class _TokenLoss(torch.autograd.Function):
    """The loss, and its gradient at once, so that no logits are computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        head, needed = Head(weight, bias), ctx.needs_input_grad[:3]
        gradients = _Gradients(hidden, head, needed)
        total = torch.zeros((), device=hidden.device)
        for some, logits in _logits(hidden, head):
            chosen = targets[some].unsqueeze(-1)
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(-1, chosen)).sum()
            if any(needed):
                logits.sub_(norm).exp_()
                logits.scatter_add_(-1, chosen, -torch.ones_like(norm))
                gradients.add(some, logits)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.scaled(given[0]), None


class _ChosenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor,
        temperature: float, entropy: bool, entropy_gradient: bool,
    ) -> Tensor:
        found = hidden.new_empty(len(hidden), 1 + entropy, dtype=torch.float32)
        for some, logits in _logits(hidden, Head(weight, bias)):
            logits /= temperature
            norm = logits.logsumexp(-1, keepdim=True)
            found[some, :1] = logits.gather(-1, targets[some].unsqueeze(-1)) - norm
            if entropy:
                found[some, 1:] = norm - (logits.sub(norm).exp_() * logits).sum(-1, keepdim=True)
        ctx.save_for_backward(hidden, weight, bias, targets, found)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        return found

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, found = ctx.saved_tensors
        head = Head(weight, bias)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:3])
        of_logprobs, of_entropies = given[0][:, :1], given[0][:, 1:]
        for some, logits in _logits(hidden, head):
            logprobs = logits.div_(ctx.temperature).log_softmax(-1)
            # d logprob / d logit = [chosen] - p;  d entropy / d logit = -p (log p + entropy).
            scale = -of_logprobs[some]
            if ctx.entropy_gradient:
                scale = scale - of_entropies[some] * (logprobs + found[some, 1:])
            gradient = logprobs.exp_().mul_(scale)
            gradient.scatter_add_(-1, targets[some].unsqueeze(-1), of_logprobs[some])
            gradients.add(some, gradient)
        return *gradients.scaled(1 / ctx.temperature), None, None, None, None


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected) (Ouyang et al. 2022, eq. 1).

    Args:
        chosen: [B] scores of the preferred responses.
        rejected: [B] scores of the other responses.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), summed over the mask.

    Args:
        logprobs: [B, R] under the policy that is trained, nats.
        old_logprobs: [B, R] under the policy that sampled, nats.
        advantages: [B, R].
        mask: [B, R], 1 on response tokens.
        clip: epsilon.

    Returns:
        The sum, and sums over the mask (the maximum for `ratio_max`): `clip_fraction`, `approx_kl`
        (k3 of the update, nats), `ratio_mean`, `ratio_max`, `clamped`.
    """
    mask = mask.float()
    raw = (logprobs.float() - old_logprobs.float()) * mask
    log_ratio = raw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    with torch.no_grad():
        stats = {
            "clip_fraction": ((clipped > plain) * mask).sum(),
            "approx_kl": ((ratio - 1.0 - log_ratio) * mask).sum(),
            "ratio_mean": (ratio * mask).sum(),
            "ratio_max": (ratio * mask).max(),
            "clamped": ((raw.abs() > MAX_LOG_RATIO) * mask).sum(),
        }
    return (torch.maximum(plain, clipped) * mask).sum(), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the larger of the plain and the clipped squared error, summed over the mask.

    PPO's value loss with clipping (Schulman et al. 2017; "N implementation details", 2023).

    Args:
        values: [B, R] of the critic that is trained.
        old_values: [B, R] of the rollout.
        returns: [B, R].
        mask: [B, R].
        clip: most that a value may differ from the rollout's in the clipped error.

    Returns:
        The sum, and the sum over the mask of `clip_fraction`.
    """
    mask = mask.float()
    values, old_values = values.float(), old_values.float()
    moved = old_values + (values - old_values).clamp(-clip, clip)
    plain = (values - returns).square()
    clipped = (moved - returns).square()
    stats = {"clip_fraction": ((clipped > plain) * mask).sum().detach()}
    return 0.5 * (torch.maximum(plain, clipped) * mask).sum(), stats
