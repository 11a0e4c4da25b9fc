"""The records of PPO: a rollout with its scores, and the experience of one PPO iteration.

Shapes: B rollouts, P prompt tokens (left-padded), R response tokens (right-padded).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alpaca_rlhf.utils.data.batches import Rollout


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """A rollout scored by actor, reference model, critic and reward model."""

    logprobs: Tensor  # [B, R] of the sampled tokens, under the policy that sampled them
    ref_logprobs: Tensor  # [B, R] under the reference model
    values: Tensor  # [B, R] of the state before each response token, in the critic's unit
    score: Tensor  # [B] of the reward model, not normalized
    has_eos: Tensor  # [B] bool


@dataclass(frozen=True)
class Forward:
    """Forward passes over all rollouts whose graph is kept: an update needs no other.

    N response tokens, row by row.
    """

    actor: Tensor  # [N, 2] log-probabilities and entropies
    values: Tensor  # [N] of the critic, in its unit


@dataclass(frozen=True)
class Experience(ScoredRollout):
    """Scored rollouts with advantages: what an update learns from. Its values are normalized."""

    advantages: Tensor  # [B, R], whitened, zero outside the mask
    returns: Tensor  # [B, R], zero outside the mask
