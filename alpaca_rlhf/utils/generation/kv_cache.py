"""Keys and values of the rows that decode together, in buffers that are allocated once.

Each row has a slot. All rows write at one column, the front, and a row's tokens stand in the
columns before it, in one piece: so a forward pass of transformers takes a row that was admitted
late for a prompt with padding on its left, which every family and attention kernel understands. A
row that has ended leaves its slot to the next prompt, whose keys and values, computed beside, are
copied in up to the front. Only the columns from the earliest living row on are attended to, and
when the front comes to the buffers' end the columns in use move back to their beginning.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

SLACK = 64  # columns beyond the longest row, so that moving them back is rare


class _Layer(CacheLayerMixin):
    """One layer's buffers [slots, heads, columns, size of a head]."""

    def __init__(self, cache: "SlotCache", keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._cache = cache
        # Zeros: what is masked is multiplied with 0, and must not be infinite.
        self.keys, self.values = (
            torch.zeros(
                cache.slots, part.shape[1], cache.columns, part.shape[3], dtype=part.dtype,
                device=part.device,
            )
            for part in (keys, values)
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column [rows, heads, 1, size] at the front; give what is attended to."""
        rows, first, front = self._cache.rows, self._cache.first, self._cache.front
        self.keys[:rows, :, front : front + 1] = key_states
        self.values[:rows, :, front : front + 1] = value_states
        return self.keys[:rows, :, first : front + 1], self.values[:rows, :, first : front + 1]

    def get_seq_length(self) -> int:
        """Columns attended to before the front."""
        return self._cache.front - self._cache.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Columns of the buffers."""
        return self._cache.columns


class _WholeLayer(CacheLayerMixin):
    """One layer's buffers as a pass sees them whose shapes never change."""

    def __init__(self, layer: _Layer, rows: int, front: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._front = layer.keys[:rows], layer.values[:rows], front
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one column at the front that is in memory when this is done; give all columns."""
        self.keys.index_copy_(2, self._front, key_states)
        self.values.index_copy_(2, self._front, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Columns beside the new token's."""
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Columns of the buffers."""
        return self.keys.shape[2]


class SlotCache(Cache):
    """A cache for `rows` slots, written by decoding steps and by `admit`.

    Attributes:
        slots, columns: size of the buffers.
        rows: slots that take part, the first ones; it only shrinks while one request is served.
        front: the column that the next token of every row goes to.
        first: the earliest column in use.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[Any]
        self.slots = self.columns = self.rows = self.front = self.first = 0
        self._longest_prompt = 0
        self._starts: list[int] = []
        self._start = self._visible = torch.empty(0)

    def begin(self, slots: int, longest_prompt: int, new_tokens: int, device: torch.device) -> None:
        """Make ready for a request: at most so many rows, prompt tokens and new tokens.

        Buffers that are large enough are used again.
        """
        columns = longest_prompt + new_tokens + SLACK
        if slots > self.slots or columns > self.columns:
            self.layers = []
            self.slots, self.columns = max(slots, self.slots), max(columns, self.columns)
        self.rows, self.front, self.first = slots, longest_prompt, longest_prompt
        self._longest_prompt = longest_prompt
        self._starts = [self.front] * slots
        self._start = torch.full((slots,), self.front, device=device)
        # A slot without a row sees its newest column alone: nothing in it is ever undefined.
        self._visible = torch.zeros(slots, self.columns, dtype=torch.bool, device=device)
        self._visible[:, self.front :] = True

    def release(self) -> None:
        """Give the buffers back."""
        self.layers = []
        self.slots = self.columns = 0

    @property
    def positions(self) -> Tensor:
        """Position [rows, 1] of the token at the front, counted from each row's first."""
        return (self.front - self._start[: self.rows]).unsqueeze(-1)

    @property
    def starts(self) -> Tensor:
        """The first column [rows] that each row attends to; the one at the front is its last."""
        return self._start[: self.rows].clamp(min=self.first)

    @property
    def visible(self) -> Tensor:
        """Which columns [rows, W] each row attends to, the one at the front included."""
        return self._visible[: self.rows, self.first : self.front + 1]

    def admit(
        self, prompts: Cache, picks: Sequence[int], slots: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Put prompts into slots.

        Args:
            prompts: their keys and values, padded left.
            picks: rows of `prompts`.
            slots: where each goes.
            lengths: tokens of each.
        """
        if not self.layers:
            self.layers = [_Layer(self, layer.keys, layer.values) for layer in prompts.layers]
        device = self._start.device
        pick, slot = torch.tensor(picks, device=device), torch.tensor(slots, device=device)
        width = max(lengths)
        for layer, given in zip(self.layers, prompts.layers, strict=True):
            layer.keys[slot, :, self.front - width : self.front] = given.keys[pick, :, -width:]
            layer.values[slot, :, self.front - width : self.front] = given.values[pick, :, -width:]
        starts = [self.front - length for length in lengths]
        for i, start in zip(slots, starts, strict=True):
            self._starts[i] = start
        begun = torch.tensor(starts, device=device)
        self._start[slot] = begun
        columns = torch.arange(self.columns, device=device)
        self._visible[slot] = columns >= begun.unsqueeze(-1)

    def vacate(self, slots: Sequence[int]) -> None:
        """These rows have ended; what they wrote is no longer of account."""
        self._start[torch.tensor(slots, device=self._start.device)] = self.front
        for slot in slots:
            self._starts[slot] = self.columns

    def whole(self, front: Tensor) -> Cache:
        """The buffers of the rows that take part, all columns of them, to write at `front` [1]."""
        return Cache(layers=[_WholeLayer(layer, self.rows, front) for layer in self.layers])

    def advance(self) -> None:
        """The column at the front is written: go on to the next."""
        self.front += 1

    def shrink(self, keep: Sequence[int]) -> None:
        """Keep some slots alone, in this order; the others take no part any more."""
        kept = torch.tensor(keep, device=self._start.device)
        for layer in self.layers:
            layer.keys[: len(keep)] = layer.keys[kept]
            layer.values[: len(keep)] = layer.values[kept]
        self._visible[: len(keep)] = self._visible[kept]
        self._start = self._start[kept]
        self._starts = [self._starts[i] for i in keep]
        self.rows = len(keep)

    def make_room(self) -> None:
        """Before a step: leave out columns that no row uses, and see that the front is a column."""
        living = [start for start in self._starts if start < self.columns]
        self.first = min(living, default=self.front)
        if self.front < self.columns:
            return
        shift = self.front - max(self._longest_prompt, self.front - self.first)
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[:, :, :-shift] = buffer[:, :, shift:].clone()
        self._visible[:, :-shift] = self._visible[:, shift:].clone()
        self._visible[:, -shift:] = True
        self.front -= shift
        self.first -= shift
        self._start -= shift
        self._starts = [s if s >= self.columns else s - shift for s in self._starts]
