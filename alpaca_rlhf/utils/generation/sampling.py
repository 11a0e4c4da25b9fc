"""The sampling distribution: temperature, top-k, top-p and repetition penalty.

A token is drawn by inverting the cumulative distribution at a uniform random number that the caller
gives, so the same number always draws the same token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alpaca_rlhf.utils import rl_math
from alpaca_rlhf.utils.configs import SamplingConfig

# One running sum covers up to this many weights; more are searched by blocks of BLOCK.
MOST_AT_ONCE, BLOCK = 4096, 256
BELOW_ONE = 1 - 2**-53  # the largest fp64 below 1


def draw(
    logits: Tensor, samplings: Sequence[SamplingConfig], uniform: Sequence[float],
    seen: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row, each with sampling parameters of its own.

    Args:
        logits: [B, V].
        samplings: parameters of each row.
        uniform: a random number in [0, 1) for each row, not used by greedy decoding.
        seen: [V] bool for each row with a repetition penalty, the tokens that it applies to.

    Returns:
        Tokens [B], and their log-probabilities [B] in nats, logits over temperature.
    """
    alike: dict[tuple[float, ...], list[int]] = {}
    for row, by in enumerate(samplings):
        key = by.temperature, by.top_p, by.top_k, by.repetition_penalty
        alike.setdefault(key, []).append(row)
    tokens = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    logprobs = torch.zeros(len(logits), device=logits.device)
    for rows in alike.values():
        sampling = samplings[rows[0]]
        some = logits if len(alike) == 1 else logits[rows]
        numbers = torch.tensor(
            [uniform[row] for row in rows], dtype=torch.float64, device=logits.device)
        penalized = [mask for row in rows if (mask := seen[row]) is not None]
        drawn = sample(some, sampling, numbers, torch.stack(penalized) if penalized else None)
        of_drawn = rl_math.token_logprobs(
            some.unsqueeze(1), drawn.unsqueeze(1), sampling.temperature or 1.0
        ).squeeze(1)
        tokens[rows], logprobs[rows] = drawn, of_drawn
    return tokens, logprobs


def sample(
    logits: Tensor, sampling: SamplingConfig, uniform: Tensor | None, seen: Tensor | None = None
) -> Tensor:
    """Draw one token for each row by inverting the cumulative distribution.

    Args:
        logits: [B, V].
        sampling: parameters of the distribution.
        uniform: [B] in [0, 1), fp64; None for greedy decoding.
        seen: [B, V] bool, tokens that the repetition penalty applies to.

    Returns:
        Tokens [B].
    """
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty),
                             logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None, "only greedy decoding needs no random numbers"
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    order = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, order = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, order = logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        # A token is kept while those before it do not reach top_p, so the first always is.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        outside = cumulative - probabilities >= sampling.top_p * cumulative[:, -1:]
        probabilities = probabilities.masked_fill(outside, 0.0)
    index = _invert(probabilities, uniform)
    return index if order is None else order.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index [B] at which the cumulative sums of weights [B, N] reach the share `uniform` [B].

    With many weights a block is found first and then a weight in it: fp64 running sums of a whole
    vocabulary would be the most expensive part of a decoding step.
    """
    count = weights.shape[-1]
    if count <= MOST_AT_ONCE:
        return _search(weights, uniform)[0]
    blocks = F.pad(weights, (0, -count % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, inside = _search(blocks.sum(-1), uniform)
    rows = torch.arange(len(weights), device=weights.device)
    place = _search(blocks[rows, block], inside)[0]
    return (block * BLOCK + place).clamp(max=count - 1)


def _search(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B] where the cumulative sum reaches the share, and the share [B] of that weight."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    inside = 1 - (cumulative.gather(-1, index) - target) / weights.gather(-1, index)
    return index.squeeze(-1), inside.clamp(0, BELOW_ONE).squeeze(-1)


def uniform_numbers(
    count: int, sampling: SamplingConfig, device: torch.device, generator: torch.Generator | None
) -> list[list[float]]:
    """Return random numbers in [0, 1) for `count` responses, one for each token they may have.

    Greedy decoding needs none.
    """
    if sampling.temperature == 0:
        return [[]] * count
    return torch.rand(
        count, sampling.max_new_tokens, dtype=torch.float64, device=device, generator=generator
    ).tolist()
