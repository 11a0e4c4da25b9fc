"""Prompts with the responses generated to them, as one frozen record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from alpaca_rlhf.utils.data.batches import Batch

# Fields that run over P + R, padded on both sides; the others run over R, or over B alone.
_SEQUENCES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Rollout(Batch):
    """Prompts and responses. B rollouts, P prompt tokens (left-padded), R response tokens.

    Records that extend it add tensors [B, R], padded right with zeros, or [B].
    """

    input_ids: Tensor  # [B, P + R]
    attention_mask: Tensor  # [B, P + R], 1 on prompt and response tokens
    response_mask: Tensor  # [B, R], 1 up to and including the first eos
    decoded_logprobs: Tensor  # [B, R] in nats, logits over temperature; 0 outside the mask

    @property
    def response_length(self) -> int:
        """R, the length of the longest response in tokens."""
        return self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """Response tokens [B, R]; padding where the mask is 0."""
        return self.input_ids[:, -self.response_length :]

    def weight(self) -> int:
        """Return the number of response tokens, which the losses are sums over."""
        return int(self.response_mask.sum())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, indices: Sequence[int]) -> Self:
        """Return some rows, without the columns in which all of them are padding."""
        index = torch.as_tensor(indices, device=self.input_ids.device)
        prompt = self.input_ids.shape[1] - self.response_length
        longest = max(1, int(self.response_mask[index].sum(-1).max()))
        first = int(self.attention_mask[index, :prompt].any(0).long().argmax())

        def picked(name: str, value: Tensor) -> Tensor:
            if name in _SEQUENCES:
                return value[index, first : prompt + longest]
            return value[index, :longest] if value.dim() == 2 else value[index]

        return self.map_tensors(picked)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Concatenate records of different P and R; the padding has mask 0."""
        responses = max(part.response_length for part in parts)
        prompts = max(part.input_ids.shape[1] - part.response_length for part in parts)

        def padded(part: Self) -> Self:
            right = responses - part.response_length
            left = prompts + responses - part.input_ids.shape[1] - right
            return part.map_tensors(lambda name, value: value if value.dim() == 1 else F.pad(
                value, (left if name in _SEQUENCES else 0, right)))

        wide = [padded(part) for part in parts]
        return wide[0].map_tensors(
            lambda name, _: torch.cat([getattr(part, name) for part in wide]))
