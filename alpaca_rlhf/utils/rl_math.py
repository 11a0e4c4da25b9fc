"""The mathematics of PPO for language models: tensors in, tensors out, no state, no options.

Shapes: B rollouts, P prompt tokens (left-padded), R response tokens (right-padded), V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, T] that count real tokens only, so padding on either side changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def align(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of rows [B, T], on either side, to their right.

    Returns:
        ids [B, T'] of the longest row's length, and the rows' lengths [B].
    """
    lengths = mask.sum(-1)
    order = (mask == 0).long().argsort(dim=-1, stable=True)[:, : max(1, int(lengths.max()))]
    return ids.gather(1, order), lengths


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Index [B] of the last real token of each row of a mask [B, T], padding on either side."""
    index = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (attention_mask.long() * index).argmax(-1)


def gather_last(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Return [B] of values [B, T]: each row's value at its last real token."""
    return values.gather(-1, last_token_index(attention_mask).unsqueeze(-1)).squeeze(-1)


def response_mask(tokens: Tensor, eos_ids: Tensor) -> Tensor:
    """Mask of 1 up to and including the first eos of each row, by position.

    Args:
        tokens: [B, R] generated ids; those after the first eos are ignored.
        eos_ids: [E] ids that end a response.

    Returns:
        [B, R], int64.
    """
    is_eos = torch.isin(tokens, eos_ids).long()
    before = is_eos.cumsum(-1) - is_eos
    return (before == 0).long()


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [B, R], nats, in fp32, of tokens [B, R]; logits [B, R, V] / temperature."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates k1 and k3 of KL(policy || reference), each [B], in nats per sequence.

    k1 sums log p/q, k3 sums (q/p - 1) - log q/p, which is never negative
    (J. Schulman, "Approximating KL divergence", 2020). All arguments [B, R].
    """
    log_ratio = (logprobs - ref_logprobs) * mask
    k3 = (torch.exp(-log_ratio) - 1.0 + log_ratio) * mask
    return log_ratio.sum(-1), k3.sum(-1)


def importance_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, most: float
) -> Tensor:
    """Truncated importance weights [B, R] of sampled tokens: min(p / q, most), 0 off the mask.

    They correct for an engine that samples with other rounding than the policy is trained with
    (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; as
    OpenRLHF's `tis` with a lower bound of 0). All tensors [B, R].

    Args:
        logprobs: log p, before the update, nats.
        sampled_logprobs: log q, by the engine that sampled, nats.
        mask: 1 on response tokens.
        most: upper bound.
    """
    ratio = ((logprobs - sampled_logprobs) * mask).exp()
    return ratio.clamp(max=most) * mask


def token_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, score: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """-kl_coef * (logprob - ref_logprob) on every masked token, plus the score on the last one.

    Args:
        logprobs, ref_logprobs, mask: [B, R].
        score: [B], normalized and clipped.

    Returns:
        [B, R], zero outside the mask.
    """
    mask = mask.float()
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    at_end = F.one_hot(last_token_index(mask), mask.shape[-1]).to(rewards.dtype) * mask
    return rewards + at_end * score.unsqueeze(-1)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over masked tokens (Schulman et al. 2015, eq. 16).

    Args:
        rewards, values, mask: [B, R]; the mask is a prefix of each row. Outside it
            they count as zero, so nothing after eos can change an advantage.

    Returns:
        advantages and returns = advantages + values, [B, R], zero outside the mask.
    """
    mask = mask.float()
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """[count, sum, sum of squares] of values over the mask, in fp64, to be summed over ranks."""
    kept = values.double() * mask
    return torch.stack([mask.double().sum(), kept.sum(), (kept * kept).sum()])


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation from `masked_moments`."""
    count, total, squares = moments.unbind()
    count = count.clamp(min=1)
    mean = total / count
    return mean, (squares / count - mean * mean).clamp(min=0).sqrt()


def whiten(values: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """(values - mean) / std over the mask, zero outside; values and mask [B, R].

    `moments` are those of `masked_moments`, summed over ranks.
    """
    mean, std = mean_and_std(moments)
    return ((values - mean) / (std + 1e-8) * mask).to(values.dtype)


def repetition(tokens: Tensor, mask: Tensor) -> Tensor:
    """Share [B] of bigrams of each response that occurred earlier in it; tokens, mask [B, R]."""
    rows = []
    for row, real in zip(tokens.tolist(), mask.sum(-1).tolist(), strict=True):
        pairs = list(zip(row[: int(real)], row[1 : int(real)], strict=False))
        rows.append(1.0 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return torch.tensor(rows, device=tokens.device)
