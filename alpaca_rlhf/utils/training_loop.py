"""The epoch loop that steps 1 and 2 share, and the one place where an optimizer step is taken."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.data.batches import (
    covering_batches,
    length_grouped,
    rank_batches,
    shuffled,
)
from alpaca_rlhf.utils.logging.tracker import Tracker
from alpaca_rlhf.utils.run.checkpoints import Checkpoints
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard

Stats = dict[str, Tensor]


class Batch(Protocol):
    """What an objective is computed from; its weight is what its loss is a sum over."""

    def weight(self) -> int:
        """Number of trained tokens, or pairs."""

    def to(self, device: torch.device) -> Any:
        """The batch on a device."""


Objective = Callable[[Any], tuple[Tensor, Stats]]
Collate = Callable[[list[dict[str, Any]]], Any]


def optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    micro_batches: Sequence[Any],
    objective: Objective,
    total_weight: Tensor,
) -> dict[str, float] | None:
    """One optimizer step from micro-batches of any sizes, on any number of ranks.

    The gradient is that of sum(loss) / total_weight over all micro-batches and ranks: of one big
    batch. (DeepSpeed averages gradients over ranks, hence the factor; its own division by the
    number of micro-batches would make a mean of means.)

    Args:
        engine: takes the step.
        micro_batches: of this rank; every rank has the same number.
        objective: batch -> (sum of losses, sums or maxima (`*_max`) for the record).
        total_weight: what the loss is a sum over, all micro-batches and ranks together.

    Returns:
        `loss` and the record's means (maxima) over the whole step, or None when the loss of a
        micro-batch is not finite on some rank, or the gradient is not (in fp16 that is the loss
        scale's affair): then nothing is changed.
    """
    sums: Stats = {}
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        loss, stats = objective(batch)
        bad = (~torch.isfinite(loss.detach())).float()
        if distributed.max_over_ranks(bad).item():
            _forget_gradients(engine)
            return None
        engine.backward(loss / total_weight * distributed.world_size(), scale_wrt_gas=False)
        if last and not _plain_norm_is_finite(engine):
            _forget_gradients(engine)
            return None
        engine.step()
        for name, value in {"loss": loss.detach(), **stats}.items():
            value = value.detach().double()
            if name not in sums:
                sums[name] = value
            else:
                largest = name.endswith("_max")
                sums[name] = torch.maximum(sums[name], value) if largest else sums[name] + value
    if not (engine.was_step_applied() or engine.fp16_enabled()):
        return None
    return _over_ranks(sums, total_weight)


def _plain_norm_is_finite(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Note the gradient's norm where DeepSpeed does not: it clips a plain optimizer's unseen."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return True
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    engine._global_grad_norm = nn.utils.get_total_norm(gradients)
    return bool(torch.isfinite(engine._global_grad_norm))


def _forget_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    engine.zero_grad()
    optimizer = engine.optimizer
    if hasattr(optimizer, "zero_grad"):
        optimizer.zero_grad()
    if hasattr(optimizer, "all_grad_tensors"):
        # ZeRO-2 holds those of earlier micro-batches apart, and its zero_grad forgets them not.
        for kept in (optimizer.all_grad_tensors, optimizer.averaged_gradients):
            kept.update(dict.fromkeys(kept))
        optimizer.micro_step_id = -1


def _over_ranks(sums: Stats, total_weight: Tensor) -> dict[str, float]:
    maxima = {name: value for name, value in sums.items() if name.endswith("_max")}
    plain = {name: value for name, value in sums.items() if name not in maxima}
    means = distributed.sum_over_ranks(torch.stack(list(plain.values()))) / total_weight
    result = dict(zip(plain, means.tolist(), strict=True))
    if maxima:
        largest = distributed.max_over_ranks(torch.stack(list(maxima.values())))
        result |= dict(zip(maxima, largest.tolist(), strict=True))
    return result


def global_weight(micro_batches: Sequence[Batch]) -> Tensor:
    """What the losses of an optimizer step are sums over, of all ranks together."""
    mine = sum(batch.weight() for batch in micro_batches)
    return distributed.sum_over_ranks(
        torch.tensor(float(mine), dtype=torch.float64, device=distributed.device())
    ).clamp(min=1)


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Global norm of the last step's gradient, before clipping."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else math.nan


@dataclass(frozen=True)
class Plan:
    """How long to train.

    Attributes:
        epochs: passes over the data.
        max_steps: optimizer steps after which to stop, or None.
        batch_size: rows of a micro-batch.
        accumulation_steps: micro-batches of an optimizer step.
        seed: of the order of rows.
        eval_interval: optimizer steps between measurements; 0 measures before and after only.
    """

    epochs: int
    max_steps: int | None
    batch_size: int
    accumulation_steps: int
    seed: int
    eval_interval: int = 0

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps that one pass over so many rows takes."""
        world = distributed.world_size()
        batches = len(rank_batches(list(range(rows)), self.batch_size, 0, world))
        return math.ceil(batches / self.accumulation_steps)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps that training on so many rows takes."""
        steps = self.steps_per_epoch(rows) * self.epochs
        return min(steps, self.max_steps) if self.max_steps else steps

    def batches(
        self, rows: int, lengths: Sequence[int] | None, first: int
    ) -> Iterator[list[list[int]]]:
        """The rows of each of this rank's micro-batches, for each optimizer step from `first` on.

        Args:
            rows: how many there are.
            lengths: of the rows; rows of like length then share a batch.
            first: number of the step, counted from 0.
        """
        world, per_epoch = distributed.world_size(), self.steps_per_epoch(rows)
        for epoch in range(first // per_epoch, self.epochs):
            order = (
                length_grouped(lengths, self.batch_size * world, self.seed, epoch)
                if lengths else shuffled(rows, self.seed, epoch)
            )
            batches = rank_batches(order, self.batch_size, distributed.rank(), world)
            done = max(0, first - epoch * per_epoch)
            for start in range(done * self.accumulation_steps, len(batches),
                               self.accumulation_steps):
                yield batches[start : start + self.accumulation_steps]


def train(
    engine: deepspeed.DeepSpeedEngine,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    objective: Objective,
    plan: Plan,
    tracker: Tracker,
    evaluate: Callable[[], dict[str, float]],
    checkpoints: Checkpoints,
    guard: NonFiniteGuard,
    lengths: Sequence[int] | None = None,
) -> None:
    """Train on every row of every epoch, in an order of its own each time.

    Args:
        engine: is trained.
        rows: encoded; all ranks hold the same.
        collate: rows -> batch.
        objective: batch -> (sum of losses, sums or maxima for the record).
        plan: how long.
        tracker: is told every step.
        evaluate: measures in between.
        checkpoints: say which step is the first, and are saved.
        guard: counts the non-finite steps.
        lengths: of the rows; rows of like length then share a batch.

    Raises:
        FloatingPointError: too many steps in a row were not finite.
        TrainingStopped: a signal asked for it.
    """
    total, per_epoch = plan.total_steps(len(rows)), plan.steps_per_epoch(len(rows))
    first = checkpoints.progress.step
    seen, started = 0, time.perf_counter()
    batches = plan.batches(len(rows), lengths, first)
    for step, chosen in zip(range(first + 1, total + 1), batches, strict=False):
        micro = [collate([rows[i] for i in batch]).to(distributed.device()) for batch in chosen]
        engine.train()
        weight, random_state = global_weight(micro), torch.get_rng_state()
        metrics = optimizer_step(engine, micro, objective, weight)
        if metrics is None:
            guard.skip(step, micro, random_state)
            metrics = {}
        else:
            guard.step_taken()
            metrics |= {"grad_norm": gradient_norm(engine), "lr": engine.get_lr()[0]}
        seen += int(weight)
        metrics["epoch"] = (step - 1) / per_epoch
        metrics["weight"] = int(weight)
        metrics["weight_per_second"] = seen / (time.perf_counter() - started)
        metrics["memory_gb"] = distributed.memory_gb()
        metrics["skipped_steps"] = guard.skipped
        if plan.eval_interval and step % plan.eval_interval == 0 and step < total:
            metrics |= {f"eval/{name}": value for name, value in evaluate().items()}
        tracker.log(metrics, step)
        ends_epoch = step % per_epoch == 0 and step < total
        checkpoints.step_boundary(step, tracker, due=guard.at_first_skip or ends_epoch)


@torch.no_grad()
def evaluate_sums(
    engine: deepspeed.DeepSpeedEngine,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    measure: Callable[[Any], list[list[float]]],
    batch_size: int,
    max_batches: int | None = None,
) -> list[list[float]]:
    """Rows of numbers for held-out data, one row for each of `rows` (in no certain order).

    Args:
        engine: put into evaluation mode and back.
        rows: held-out rows; all ranks hold the same.
        collate: rows -> batch.
        measure: batch -> one list of numbers for each row.
        batch_size: rows of a batch.
        max_batches: stop after so many on each rank.
    """
    training = engine.module.training
    engine.eval()
    numbers: list[list[float]] = []
    batches = covering_batches(
        len(rows), batch_size, distributed.rank(), distributed.world_size()
    )
    for indices, counts in batches[:max_batches]:
        measured = measure(collate([rows[i] for i in indices]).to(distributed.device()))
        if counts:
            numbers += measured
    engine.train(training)
    return distributed.gather_rows(numbers)
