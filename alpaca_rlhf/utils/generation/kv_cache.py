"""KV cache for rows that start and end at different times, in buffers that are allocated once.

Each row has a slot. All rows write the same column, the front, and a row's tokens fill the columns
before it without a gap: to a forward pass of transformers, a row that started late looks like a
prompt with padding on its left, which every model family and attention kernel understands. When a
row ends, its slot is free for the next prompt, whose keys and values are computed separately and
copied in up to the front. Only columns from the earliest living row on are attended to. When the
front reaches the end of the buffers, the columns in use move back to the beginning.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

SLACK = 64  # columns beyond the longest row, so that moving them back is rare


class _Layer(DynamicLayer):
    """Keys and values of one layer [slots, heads, columns, head size]."""

    def __init__(self, cache: "SlotCache", keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._cache = cache
        # Zeros: masked values are multiplied by 0 and must not be infinite.
        self.keys, self.values = (
            part.new_zeros(cache.slots, part.shape[1], cache.columns, part.shape[3])
            for part in (keys, values)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column [rows, heads, 1, size] at the front; return the columns in use."""
        rows, first, front = self._cache.rows, self._cache.first, self._cache.front
        self.keys[:rows, :, front : front + 1] = key_states
        self.values[:rows, :, front : front + 1] = value_states
        return self.keys[:rows, :, first : front + 1], self.values[:rows, :, first : front + 1]

    def get_seq_length(self) -> int:
        return self._cache.front - self._cache.first

    def moved(self, buffer: Tensor, shift: int) -> Tensor:
        """Move the columns in use by `shift`, to a larger buffer if the cache has grown."""
        cache = self._cache
        kept = buffer[:, :, cache.first : cache.front].clone()
        if cache.columns > buffer.shape[2]:
            buffer = buffer.new_zeros(*buffer.shape[:2], cache.columns, buffer.shape[3])
        buffer[:, :, cache.first + shift : cache.front + shift] = kept
        return buffer


class SlotCache(Cache):
    """KV cache whose rows are filled by `admit` and continued by decoding steps.

    Attributes:
        slots, columns: size of the buffers.
        front: the column that the next token of every row is written to.
        first: the earliest column in use.
        starts: [rows] the first column of each row; set by `make_room`.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[Any]
        self.slots = self.columns = self.front = self.first = self._lowest_front = 0
        self._starts: list[int] = []
        self._living: list[bool] = []
        self.starts = torch.empty(0, dtype=torch.long)

    def begin(self, slots: int, prompt: int, new: int, device: torch.device) -> None:
        """Start without rows; large enough buffers are used again.

        Args:
            slots: maximum number of rows.
            prompt, new: expected maximum length of prompts and responses in tokens; the buffers
                grow if one turns out to be longer.
            device: of the model.
        """
        columns = prompt + new + SLACK
        if slots > self.slots or columns > self.columns:
            self.layers = []
            self.slots, self.columns = max(slots, self.slots), max(columns, self.columns)
        self.front = self.first = self._lowest_front = prompt
        self._starts, self._living = [], []
        self.starts = torch.empty(0, dtype=torch.long, device=device)

    def release(self) -> None:
        """Free the buffers."""
        self.layers = []
        self.slots = self.columns = 0

    @property
    def size(self) -> int:
        """Bytes of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def rows(self) -> int:
        """Number of slots that take part in a step: the first ones."""
        return len(self._starts)

    @property
    def positions(self) -> Tensor:
        """Position [rows, 1] of the token at the front within its row."""
        return (self.front - self.starts).unsqueeze(-1)

    @property
    def visible(self) -> Tensor:
        """Mask [rows, W] of the columns in use that each row attends to, the front included."""
        columns = torch.arange(self.first, self.front + 1, device=self.starts.device)
        return columns >= self.starts.unsqueeze(-1)

    def additive_mask(self, dtype: torch.dtype) -> Tensor:
        """Return `visible` as [rows, 1, 1, W]: 0 where it is true, else the lowest number."""
        hidden = ~self.visible[:, None, None]
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)

    def add_rows(self, count: int) -> None:
        """Let more slots take part."""
        self._starts += [self.front] * count
        self._living += [False] * count

    def admit(
        self, prompts: Cache, picks: Sequence[int], slots: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Copy prompts into slots.

        Args:
            prompts: their keys and values, padded on the left.
            picks: rows of `prompts`.
            slots: the slot for each.
            lengths: of each, in tokens.
        """
        width = max(lengths)
        self.make_room(width)
        if not self.layers:
            self.layers = [_Layer(self, layer.keys, layer.values) for layer in prompts.layers]
        device, columns = self.starts.device, slice(self.front - width, self.front)
        pick, slot = torch.tensor(picks, device=device), torch.tensor(slots, device=device)
        for layer, given in zip(self.layers, prompts.layers, strict=True):
            layer.keys[slot, :, columns] = given.keys[pick, :, -width:]
            layer.values[slot, :, columns] = given.values[pick, :, -width:]
        for i, length in zip(slots, lengths, strict=True):
            self._starts[i], self._living[i] = self.front - length, True

    def vacate(self, slots: Sequence[int]) -> None:
        """Give up these rows; their columns need not be kept."""
        for slot in slots:
            self._living[slot] = False

    def shrink(self, keep: Sequence[int]) -> None:
        """Keep only these slots, in this order."""
        kept = torch.tensor(keep, dtype=torch.long, device=self.starts.device)
        for layer in self.layers:
            layer.keys[: len(keep)] = layer.keys[kept]
            layer.values[: len(keep)] = layer.values[kept]
        self._starts = [self._starts[i] for i in keep]
        self._living = [self._living[i] for i in keep]

    def make_room(self, width: int = 0) -> None:
        """Prepare for a step, or for prompts of up to `width` tokens.

        Columns that no living row uses are left out. The others are moved if the front is outside
        the buffers or too close to their beginning; buffers that are too small grow.
        """
        living = [s for s, lives in zip(self._starts, self._living, strict=True) if lives]
        self.first = min(living, default=self.front)
        if not width <= self.front < self.columns:
            front = max(self._lowest_front, self.front - self.first, width)
            if front >= self.columns:
                self.columns = 2 * front + SLACK
            shift = front - self.front
            for layer in self.layers:
                layer.keys, layer.values = (
                    layer.moved(buffer, shift) for buffer in (layer.keys, layer.values))
            self.front, self.first = front, self.first + shift
            self._starts = [start + shift for start in self._starts]
        # A vacant row still sees the columns that it saw, so nothing in it is undefined.
        starts = [max(start, self.first) for start in self._starts]
        self.starts = torch.tensor(starts, dtype=torch.long, device=self.starts.device)

    def advance(self) -> None:
        """Go on to the next column: the one at the front is written."""
        self.front += 1
