"""The records that PPO hands on: what was generated, and what is learnt from. Frozen.

Shapes: B rollouts, P prompt tokens (left-padded), R response tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Fields that run over P + R, padded on both sides; the others run over R, or over B alone.
_SEQUENCES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Rollout:
    """Prompts and the replies drawn to them."""

    input_ids: Tensor  # [B, P + R]
    attention_mask: Tensor  # [B, P + R], 1 on prompt and response tokens
    response_mask: Tensor  # [B, R], 1 up to and including the first eos
    decoded_logprobs: Tensor  # [B, R] of the drawn tokens, as decoding had them

    @property
    def response_length(self) -> int:
        """R."""
        return self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """[B, R] generated tokens; what the mask leaves out is padding."""
        return self.input_ids[:, -self.response_length :]

    def weight(self) -> int:
        """Number of response tokens: what the losses are sums over."""
        return int(self.response_mask.sum())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same record on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def rows(self, indices: Sequence[int]) -> Self:
        """Some rows, without the columns in which all of them are padding."""
        index = torch.as_tensor(indices, device=self.input_ids.device)
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        prompt = self.input_ids.shape[1] - self.response_length
        longest = max(1, int(picked["response_mask"].sum(-1).max()))
        first = int(picked["attention_mask"][:, :prompt].any(0).long().argmax())
        for name, value in picked.items():
            if name in _SEQUENCES:
                picked[name] = value[:, first : prompt + longest]
            elif value.dim() == 2:
                picked[name] = value[:, :longest]
        return type(self)(**picked)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Records of unlike P and R as one; masks are 0 on what is added."""
        responses = max(part.response_length for part in parts)
        prompts = max(part.input_ids.shape[1] - part.response_length for part in parts)
        columns: dict[str, list[Tensor]] = {f.name: [] for f in fields(cls)}
        for part in parts:
            right = responses - part.response_length
            left = prompts + responses - part.input_ids.shape[1] - right
            for name, column in columns.items():
                value = getattr(part, name)
                if value.dim() == 2:
                    value = F.pad(value, (left if name in _SEQUENCES else 0, right))
                column.append(value)
        return cls(**{name: torch.cat(column) for name, column in columns.items()})


@dataclass(frozen=True)
class ScoredRollout(Rollout):
    """A rollout and what the four roles say of it."""

    logprobs: Tensor  # [B, R] of the sampled tokens, under the policy that sampled them
    ref_logprobs: Tensor  # [B, R] under the reference
    values: Tensor  # [B, R] of the state before each response token
    score: Tensor  # [B] of the reward model, as it comes
    has_eos: Tensor  # [B] bool


@dataclass(frozen=True)
class Experience(ScoredRollout):
    """What an update learns from."""

    advantages: Tensor  # [B, R], whitened, zero outside the mask
    returns: Tensor  # [B, R], zero outside the mask

    def mini_batches(self, size: int, order: Sequence[int]) -> list[Self]:
        """The rows in some order, `size` at a time."""
        return [self.rows(order[i : i + size]) for i in range(0, len(order), size)]
