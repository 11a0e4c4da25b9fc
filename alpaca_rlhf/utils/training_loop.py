"""The one place where an optimizer step is taken, in all three steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from alpaca_rlhf.utils import distributed

Stats = dict[str, Tensor]


class Batch(Protocol):
    """A micro-batch."""

    def weight(self) -> int:
        """Return the number of trained tokens, or pairs: what the loss is a sum over."""

    def to(self, device: torch.device) -> Any:
        """Move the batch to a device."""


Objective = Callable[[Any], tuple[Tensor, Stats]]
Collate = Callable[[list[dict[str, Any]]], Any]


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    micro_batches: Sequence[Any],
    objective: Objective,
    total_weight: Tensor,
) -> dict[str, float] | None:
    """Take one optimizer step: `accumulate`, then `engine.step()`.

    Returns:
        The metrics, or None if the loss or the gradient is non-finite on some rank: then nothing
        has changed. (In fp16 a non-finite gradient is left to the loss scale.)
    """
    metrics = accumulate(engine, micro_batches, objective, total_weight)
    if metrics is None:
        return None
    engine.step()
    return metrics if engine.was_step_applied() or engine.fp16_enabled() else None


def accumulate(
    engine: deepspeed.DeepSpeedEngine,
    micro_batches: Sequence[Any],
    objective: Objective,
    total_weight: Tensor,
) -> dict[str, float] | None:
    """Compute the gradient of micro-batches of any sizes, on any number of ranks.

    The gradient is that of sum(loss) / total_weight over all micro-batches and ranks, as of one big
    batch. (DeepSpeed averages gradients over ranks, hence the factor; its own division by the
    number of micro-batches would make a mean of means.)

    Args:
        engine: the model and its optimizer.
        micro_batches: of this rank; every rank has the same number.
        objective: batch -> (sum of losses, sums or maxima (`*_max`) of metrics).
        total_weight: number of tokens or pairs in all micro-batches of all ranks.

    Returns:
        `loss` and the metrics' means (maxima) over the whole step, or None if the loss, or without
        ZeRO the gradient, is non-finite on some rank: then the gradient is 0.

    One collective and one wait for the device in a step, whatever the number of micro-batches.
    """
    sums: Stats = {}
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        loss, stats = objective(batch)
        engine.backward(loss / total_weight * distributed.world_size(), scale_wrt_gas=False)
        if not last:
            engine.step()
        for name, value in {"loss": loss, **stats}.items():
            value = value.detach().double()
            if name not in sums:
                sums[name] = value
            else:
                largest = name.endswith("_max")
                sums[name] = torch.maximum(sums[name], value) if largest else sums[name] + value
    metrics = _over_ranks(sums, total_weight)
    if math.isfinite(metrics["loss"]) and _plain_norm_is_finite(engine):
        return metrics
    clear_gradients(engine)
    return None


def step_together(*engines: deepspeed.DeepSpeedEngine) -> None:
    """Step fp16 engines with accumulated gradients, or none if the gradient of one overflows.

    An engine whose gradient has overflowed lowers its loss scale.
    """
    overflows = [engine.optimizer.has_overflow() for engine in engines]
    for engine, overflow in zip(engines, overflows, strict=True):
        if overflow or not any(overflows):
            engine.step()
        else:
            clear_gradients(engine)


def _plain_norm_is_finite(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Record the gradient's norm where DeepSpeed does not: when it clips a plain optimizer's."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return True
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    engine._global_grad_norm = nn.utils.get_total_norm(gradients)
    return bool(torch.isfinite(engine._global_grad_norm))


def clear_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Drop the accumulated gradient."""
    engine.zero_grad()
    optimizer = engine.optimizer
    if hasattr(optimizer, "zero_grad"):
        optimizer.zero_grad()
    if hasattr(optimizer, "all_grad_tensors"):
        # ZeRO-2 keeps those of earlier micro-batches apart; its zero_grad() does not clear them.
        for kept in (optimizer.all_grad_tensors, optimizer.averaged_gradients):
            kept.update(dict.fromkeys(kept))
        optimizer.micro_step_id = -1


def _over_ranks(sums: Stats, total_weight: Tensor) -> dict[str, float]:
    """Return the means of sums, and the maxima of maxima, over all ranks."""
    ranks = distributed.gather(torch.stack(list(sums.values())))
    means, maxima = (ranks.sum(0) / total_weight).tolist(), ranks.max(0).values.tolist()
    return {name: maxima[i] if name.endswith("_max") else means[i] for i, name in enumerate(sums)}


def global_weight(micro_batches: Sequence[Batch]) -> Tensor:
    """Return the number of trained tokens or pairs of an optimizer step, over all ranks."""
    mine = sum(batch.weight() for batch in micro_batches)
    return distributed.sum_over_ranks(
        torch.tensor(float(mine), dtype=torch.float64, device=distributed.device())
    ).clamp(min=1)


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Return the global norm of the last step's gradient, before clipping."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else math.nan
