"""Numbers of logits without the logits of all tokens, which are often larger than the model.

Hidden states go through the vocabulary projection some tokens at a time, forward and backward, and
no logits are kept. `losses` says what is computed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_LOGITS = 2**25  # that stand at the same time: 128 MiB


class Head(NamedTuple):
    """A vocabulary projection.

    Attributes:
        weight: [V, D]; None if the hidden states are logits already.
        bias: [V] or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None


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


class TokenLoss(torch.autograd.Function):
    """The loss, and its gradient at once, so that no logits are computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        """Return the sum; see `losses.token_loss`."""
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
        """Scale the gradients of the forward pass."""
        return *ctx.gradients.scaled(given[0]), None


class ChosenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor,
        temperature: float, entropy: bool, entropy_gradient: bool,
    ) -> Tensor:
        """Return [N, 1], or [N, 2] with entropies; see `losses.chosen_logprobs`."""
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
        """Return the gradients, from logits that are computed again."""
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
