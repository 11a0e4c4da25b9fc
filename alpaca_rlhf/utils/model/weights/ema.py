"""Exponential moving average of the trainable parameters, in fp32, on every ZeRO stage."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alpaca_rlhf.utils import distributed


class Ema:
    """Averages the fp32 master weights; under ZeRO each rank averages the part that it updates.

    Args:
        model: its trainable parameters are averaged.
        decay: share of the old average that is kept at an update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # Any: ZeRO gives parameters attributes and methods of its own.
        self._parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        self._decay = decay
        self._average = [_master(p).clone() for p in self._parameters]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return whole averages on rank 0; all ranks must call it together."""
        pairs = zip(self._parameters, self._average, strict=True)
        whole = (_whole(parameter, average) for parameter, average in pairs)
        return {"average": [value.cpu() for value in whole if distributed.is_main()]}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Restore this rank's part of whole averages."""
        for parameter, average, saved in zip(
            self._parameters, self._average, state["average"], strict=True
        ):
            start, count = _span(parameter)
            average.copy_(saved.flatten()[start : start + count])

    @torch.no_grad()
    def update(self) -> None:
        """Set average = decay * average + (1 - decay) * weight."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            average.lerp_(_master(parameter), 1.0 - self._decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averages as its weights, inside the context; all ranks together."""
        own = [_held(p).detach().clone() for p in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self._average, strict=True):
                sharded = hasattr(parameter, "ds_tensor")
                _put(parameter, average if sharded else _whole(parameter, average))
            yield
        finally:
            for parameter, weight in zip(self._parameters, own, strict=True):
                _put(parameter, weight)


def _span(parameter: Any) -> tuple[int, int]:
    """Return first element and number of elements of the part that this rank updates."""
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.ds_numel
        start = min(size * distributed.rank(), parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)
    if hasattr(parameter, "_hp_mapping"):  # of ZeRO-1 and 2; None where another rank updates it
        mapping = parameter._hp_mapping
        address = mapping and mapping.lp_fragment_address
        return (address.start, address.numel) if address else (0, 0)
    return 0, parameter.numel()


def _master(parameter: Any) -> Tensor:
    """Return the part of the fp32 weight that this rank updates, flat."""
    count = _span(parameter)[1]
    if hasattr(parameter, "ds_tensor"):
        weight = parameter._z3_optimizer.get_local_fp32_param(parameter)
    elif hasattr(parameter, "_hp_mapping") and count:
        weight = parameter._hp_mapping.hp_fragment
    else:
        weight = parameter.data
    return weight.detach().flatten()[:count].float()


def _whole(parameter: Any, part: Tensor) -> Tensor:
    """Join the parts of all ranks."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if not (hasattr(parameter, "ds_tensor") or hasattr(parameter, "_hp_mapping")):
        return part.view(shape)
    start, count = _span(parameter)
    whole = part.new_zeros(shape.numel(), device=distributed.device())
    whole[start : start + count] = part
    return distributed.sum_over_ranks(whole).view(shape)


def _held(parameter: Any) -> Tensor:
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


@torch.no_grad()
def _put(parameter: Any, value: Tensor) -> None:
    """Set the weight that computes; under ZeRO-3 this rank's shard, which may end in padding."""
    if hasattr(parameter, "ds_tensor"):
        # A gathered copy would hide the shard that is about to change.
        parameter.partition()
    held = _held(parameter)
    held.flatten()[: value.numel()].copy_(value.flatten())
