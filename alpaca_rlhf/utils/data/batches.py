"""Encoded rows to padded batches: which rows form a batch on which rank, and the padding.

Every rank gets the same number of batches, and n ranks with batch size b see what one rank with
batch size n * b sees.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from alpaca_rlhf.utils import distributed, rl_math
from alpaca_rlhf.utils.configs import PPOConfig
from alpaca_rlhf.utils.data.sources import load_from_hub
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import UNREADABLE, read_text
from alpaca_rlhf.utils.losses import IGNORE_INDEX

# Fields that run over P + R, padded on both sides; the others run over R, or over B alone.
_SEQUENCES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Batch:
    """A record of tensors."""

    def map_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """Return a copy with every tensor replaced by `change(name, tensor)`."""
        names = [field.name for field in fields(self)]
        return replace(self, **{name: change(name, getattr(self, name)) for name in names})

    def to(self, device: torch.device) -> Self:
        """Return a copy on another device."""
        return self.map_tensors(lambda _, tensor: tensor.to(device))


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Sequences of step 1 and of the language-model (ptx) loss, padded right."""

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T], 0 at padding
    labels: Tensor  # [B, T], -100 where nothing is trained

    def weight(self) -> int:
        """Return the number of trained tokens."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs of step 2, padded right; rows 0 … B-1 are chosen, rows B … 2B-1 rejected."""

    input_ids: Tensor  # [2B, T]
    attention_mask: Tensor  # [2B, T], 0 at padding

    def weight(self) -> int:
        """Return the number of pairs."""
        return self.input_ids.shape[0] // 2


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Prompts of step 3, padded left, so that responses follow them directly."""

    input_ids: Tensor  # [B, P]
    attention_mask: Tensor  # [B, P], 0 at padding

    def unpadded(self) -> list[list[int]]:
        """Return the ids of each prompt."""
        rows = zip(self.input_ids.tolist(), self.attention_mask.tolist(), strict=True)
        return [[token for token, real in zip(*row, strict=True) if real] for row in rows]


@dataclass(frozen=True)
class Rollout(Batch):
    """Prompts and responses. B rollouts, P prompt tokens (left-padded), R response tokens.

    Records that extend it add tensors [B, R], padded right with zeros, or [B].
    """

    input_ids: Tensor  # [B, P + R]
    attention_mask: Tensor  # [B, P + R], 1 on prompt and response tokens
    response_mask: Tensor  # [B, R], 1 up to and including the first eos
    # [B, R] in nats, logits over temperature; 0 outside the mask, NaN where they are not known.
    decoded_logprobs: Tensor

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

    def aligned(self) -> tuple[Tensor, Tensor]:
        """Return the rows without padding on their left.

        Returns:
            ids [B, T] and labels [B, T]: the response tokens, -100 elsewhere.
        """
        ids, ends = rl_math.align(self.input_ids, self.attention_mask)
        column, ends = torch.arange(ids.shape[1], device=ids.device), ends.unsqueeze(-1)
        starts = ends - self.response_mask.sum(-1, keepdim=True)
        return ids, ids.where((column >= starts) & (column < ends), IGNORE_INDEX)

    def spread(self, values: Tensor) -> Tensor:
        """Return values of all response tokens [N], row by row, as [B, R]; 0 outside the mask."""
        mask = self.response_mask.bool()
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

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

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        return self.attention_mask.sum(-1).tolist()

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


def pad(rows: list[list[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad rows to the longest: ids [B, T] and mask [B, T], which is 0 at padding."""
    longest = max(map(len, rows), default=0)
    ids = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


def collate_tokens(rows: list[dict[str, Any]], pad_id: int) -> TokenBatch:
    """Pad B rows of `prepare_sft` to [B, T]."""
    ids, mask = pad([row["input_ids"] for row in rows], pad_id)
    labels, _ = pad([row["labels"] for row in rows], IGNORE_INDEX)
    return TokenBatch(ids, mask, labels)


def collate_pairs(rows: list[dict[str, Any]], pad_id: int) -> PairBatch:
    """Pad B rows of `prepare_pairs` to [2B, T]."""
    sequences = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    return PairBatch(*pad(sequences, pad_id))


def collate_prompts(rows: list[dict[str, Any]], pad_id: int) -> PromptBatch:
    """Pad B rows of `prepare_prompts` to [B, P]."""
    return PromptBatch(*pad([row["prompt_ids"] for row in rows], pad_id, left=True))


# --- order ---------------------------------------------------------------------------------------


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """Return the indices 0 … n-1 in an order fixed by seed and epoch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def length_grouped(
    lengths: Sequence[int], size: int, seed: int, epoch: int, pool: int = 50
) -> list[int]:
    """Return the indices of all rows in an order whose successive batches have similar lengths.

    The rows are shuffled, sorted by length within pools of `pool` batches, cut into batches, and
    the batches are shuffled: a larger pool pads less and mixes less. The order depends on the
    arguments alone, so a resumed run, or one with another number of ranks for the same global
    batch of `size` rows, continues in it.
    """
    order = shuffled(len(lengths), seed, epoch)
    batches: list[list[int]] = []
    for start in range(0, len(order), pool * size):
        rows = sorted(order[start : start + pool * size], key=lengths.__getitem__)
        batches += [rows[at : at + size] for at in range(0, len(rows), size)]
    # A batch that is not full stays last: the order is cut into full batches from the start.
    full = len(order) // size
    places = [*shuffled(full, seed + 1, epoch), *range(full, len(batches))]
    return [row for place in places for row in batches[place]]


def rank_batches(
    order: list[int], batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Return one rank's batches of an order of rows.

    Each global batch of `world_size * batch_size` rows is dealt out to the ranks in turn. So is a
    last, smaller one; its rows are left out when there are fewer of them than ranks.
    """
    size = batch_size * world_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batch[rank::world_size] for batch in batches if len(batch) >= world_size]


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], size: int, most_tokens: int | None = None
) -> list[list[int]]:
    """Cut the rows of an optimizer step into micro-batches of similar length, the longest first.

    Args:
        rows: of this rank.
        lengths: of all rows, in tokens.
        size: number of rows of a micro-batch.
        most_tokens: of a micro-batch, padding included, in place of `size`. Every rank still gets
            the same number of micro-batches, as many as the rank that needs most.
    """
    order = sorted(rows, key=lambda row: -lengths[row])
    if most_tokens is None:
        return [order[start : start + size] for start in range(0, len(order), size)]
    cuts: list[list[int]] = []
    for row in order:
        if cuts and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] <= most_tokens:
            cuts[-1].append(row)
        else:
            cuts.append([row])
    ranks = distributed.gather_rows([(len(cuts), len(order))])
    # A rank with a row less than another cannot have more micro-batches than rows.
    count = min(max(cut for cut, _ in ranks), min(held for _, held in ranks))
    while len(cuts) < count:
        most = max(range(len(cuts)), key=lambda i: len(cuts[i]))
        half = len(cuts[most]) // 2
        cuts[most : most + 1] = [cuts[most][:half], cuts[most][half:]]
    while len(cuts) > count:
        cuts[-2:] = [cuts[-2] + cuts[-1]]
    return cuts


def length_groups(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide rows into `count` groups of similar length, each cut where that saves most padding.

    There are fewer groups if there are fewer rows.
    """
    groups = [sorted(range(len(lengths)), key=lengths.__getitem__)]
    while len(groups) < min(count, len(lengths)):
        _, i, cut = max(
            (cut * (lengths[group[-1]] - lengths[group[cut - 1]]), i, cut)
            for i, group in enumerate(groups) for cut in range(1, len(group))
        )
        groups[i : i + 1] = [groups[i][:cut], groups[i][cut:]]
    return groups


def covering_batches(
    n: int, batch_size: int, rank: int, world_size: int
) -> list[tuple[list[int], bool]]:
    """Return one rank's batches for an evaluation that covers rows 0 … n-1 once over all ranks.

    The flag of a batch is False where it only fills up: under ZeRO-3 all ranks must take part in
    each forward pass, but the result must not be counted.
    """
    mine = list(range(rank, n, world_size))
    real = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    most = math.ceil(math.ceil(n / world_size) / batch_size)
    return [(batch, True) for batch in real] + [([0], False)] * (most - len(real))


# --- plain text ----------------------------------------------------------------------------------


def text_batches(
    ppo: PPOConfig, chat: ChatFormat, *, length: int, count: int, skip: int
) -> Iterator[list[TokenBatch] | None]:
    """Yield, for each PPO iteration, this rank's batches of text for the ptx loss.

    Each has `count` batches of rows of `length` tokens, or is None where no text is given. The
    first `skip` iterations are left out.

    Raises:
        UserError: the text cannot be read, or does not fill a single row.
    """
    if ppo.unsupervised_dataset_name is None:
        return repeat(None)
    rows = text_rows(
        ppo.unsupervised_dataset_name, ppo.unsupervised_dataset_config_name, chat, length
    )
    return _cycled(rows, ppo.per_device_training_batch_size, chat.pad_id, count, skip)


def _cycled(
    rows: list[dict[str, list[int]]], size: int, pad_id: int, count: int, skip: int
) -> Iterator[list[TokenBatch]]:
    world = distributed.world_size()
    position = distributed.rank() + skip * count * size * world
    while True:
        batches = []
        for _ in range(count):
            chosen = [rows[(position + i * world) % len(rows)] for i in range(size)]
            position += size * world
            batches.append(collate_tokens(chosen, pad_id).to(distributed.device()))
        yield batches


def text_rows(
    name: str, configuration: str | None, chat: ChatFormat, length: int
) -> list[dict[str, list[int]]]:
    """Cut plain text into rows of `length` tokens, all of which are trained.

    The name is that of a local text file, in which an empty line ends a text, or of a hub data set
    with a column `text`. eos ends each text; what does not fill the last row is left out.

    Raises:
        UserError: the text cannot be read, or does not fill a single row.
    """
    flag = f"--unsupervised_dataset_name {name}"
    texts = _file(Path(name), flag) if Path(name).is_file() else _hub(name, configuration, flag)
    ids = [token for text in texts if text.strip() for token in chat.text_ids(text)]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise UserError(
            f"{flag}: holds {len(ids)} tokens, less than one row of {length} "
            "(--max_prompt_seq_len + --max_answer_seq_len); give more text, or shorten the rows"
        )
    return [{"input_ids": row, "labels": row} for row in rows]


def _file(path: Path, flag: str) -> list[str]:
    try:
        return read_text(path).split("\n\n")
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag}: cannot be read ({reason}); give another") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}: not UTF-8 at byte {error.start}; convert the file") from error


def _hub(name: str, configuration: str | None, flag: str) -> list[str]:
    rows = load_from_hub(
        name, configuration, problem=f"{flag}: no such file, and the hub did not give it",
        remedy="give a local text file", split="train",
    )
    if "text" not in rows.column_names:
        raise UserError(
            f"{flag}: no column text; there are {', '.join(rows.column_names)}; give a data set "
            "with one, or a local text file"
        )
    return rows["text"]
