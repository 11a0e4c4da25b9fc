"""Exponential moving average of the trainable parameters, in fp32, on every ZeRO stage."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Averages what each rank holds: whole tensors, or its shards under ZeRO-3.

    Args:
        model: its trainable parameters are averaged.
        decay: share of the old average that is kept at an update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # Any: ZeRO-3 gives parameters methods of its own.
        self._parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        self._decay = decay
        self._average = [_held(p).detach().float().clone() for p in self._parameters]

    @property
    def sharded(self) -> bool:
        """True if each rank has another part of the average."""
        return any(hasattr(p, "ds_tensor") for p in self._parameters)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return this rank's part."""
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Restore this rank's part."""
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)

    @torch.no_grad()
    def update(self) -> None:
        """Set average = decay * average + (1 - decay) * weight."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            average.lerp_(_held(parameter).float(), 1.0 - self._decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averages as its weights, inside the context."""
        own = [_held(p).detach().clone() for p in self._parameters]
        try:
            self._put(self._average)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            if hasattr(parameter, "ds_tensor"):
                # A gathered copy would hide the shard that is about to change.
                parameter.partition()
            _held(parameter).copy_(value)


def _held(parameter: nn.Parameter) -> Tensor:
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
