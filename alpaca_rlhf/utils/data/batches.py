"""Rows of ids -> padded batches: frozen records, a shape on every line."""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from alpaca_rlhf.utils.losses import IGNORE_INDEX


@dataclass(frozen=True)
class _Batch:
    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class TokenBatch(_Batch):
    """Step 1 (and ptx): sequences, padded right."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    labels: Tensor  # [B, T], -100 where nothing is trained

    def weight(self) -> int:
        """Number of trained tokens."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class PairBatch(_Batch):
    """Step 2: B pairs, padded right; rows 0 … B-1 are chosen, rows B … 2B-1 rejected."""

    input_ids: Tensor  # [2B, T]
    attention_mask: Tensor  # [2B, T]

    def weight(self) -> int:
        """Number of pairs."""
        return self.input_ids.shape[0] // 2


@dataclass(frozen=True)
class PromptBatch(_Batch):
    """Step 3: prompts, padded left, so that what is generated follows at once."""

    input_ids: Tensor  # [B, P]
    attention_mask: Tensor  # [B, P]


def pad(
    rows: list[list[int]], value: int, left: bool = False, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids [N, T] and mask [N, T] of rows of unlike lengths; T is the longest, or `length`."""
    longest = max((len(row) for row in rows), default=0) if length is None else length
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


def collate_tokens(rows: list[dict[str, Any]], pad_id: int) -> TokenBatch:
    """Rows with `input_ids` and `labels` of one length each."""
    ids, mask = pad([row["input_ids"] for row in rows], pad_id)
    labels, _ = pad([row["labels"] for row in rows], IGNORE_INDEX)
    return TokenBatch(ids, mask, labels)


def collate_pairs(rows: list[dict[str, Any]], pad_id: int) -> PairBatch:
    """Rows with `chosen_ids` and `rejected_ids`."""
    sequences = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    return PairBatch(*pad(sequences, pad_id))


def collate_prompts(rows: list[dict[str, Any]], pad_id: int) -> PromptBatch:
    """Rows with `prompt_ids`."""
    return PromptBatch(*pad([row["prompt_ids"] for row in rows], pad_id, left=True))
