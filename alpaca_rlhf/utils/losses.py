"""The four losses: tensors in, sums out.

Each returns a *sum* over trained tokens (or pairs), in fp32. The caller divides by the count of the
whole optimizer step, all micro-batches and ranks together, so accumulating uneven micro-batches
gives the gradient of one big batch (see `training_loop.optimizer_step`).

What needs logits computes them from hidden states, for some tokens at a time (`projection`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alpaca_rlhf.utils.projection import ChosenLogprobs, Head, TokenLoss

IGNORE_INDEX = -100

# exp of a larger log-ratio would be an accident, not a gradient; clamped tokens are counted.
MAX_LOG_RATIO = 20.0


def token_loss(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihood, in nats, of N tokens.

    torch's own `linear_cross_entropy` gives the sum in the precision of the model, which overflows
    in fp16.

    Args:
        hidden: [N, D] states that predict them.
        head: gives their logits.
        targets: [N] the tokens.
    """
    return TokenLoss.apply(hidden, *head, targets)


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
    return ChosenLogprobs.apply(hidden, *head, targets, temperature, entropy, entropy_gradient)


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected) (Ouyang et al. 2022, eq. 1).

    Args:
        chosen: [B] scores of the preferred responses.
        rejected: [B] scores of the other responses.
    """
    return -F.logsigmoid(chosen.float() - rejected.float()).sum()


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate of PPO (Schulman et al. 2017, eq. 7), summed over the mask.

    Args:
        logprobs: [B, R] under the policy that is trained, nats.
        old_logprobs: [B, R] under the policy that sampled, nats.
        advantages: [B, R].
        mask: [B, R], 1 on response tokens.
        clip: epsilon.
        weights: [B, R] of the tokens, from `rl_math.importance_weights`; by default 1.

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
    loss = torch.maximum(plain, clipped) * mask
    return (loss if weights is None else loss * weights).sum(), stats


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
