"""The runner that steps 1 and 2 share: epochs, evaluation, checkpoints, metrics.

What differs between the two steps is an `Objective`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.configs import BatchConfig, CheckpointConfig, ScheduleConfig, TrackingConfig
from alpaca_rlhf.utils.data.batches import (
    covering_batches,
    length_grouped,
    micro_batches,
    rank_batches,
)
from alpaca_rlhf.utils.data.prepare import Prepared
from alpaca_rlhf.utils.engine import Engine
from alpaca_rlhf.utils.logging.tracker import Tracker
from alpaca_rlhf.utils.run.checkpoints import Checkpoints, Found
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
from alpaca_rlhf.utils.run.run_folder import RunFolder
from alpaca_rlhf.utils.training_loop import Stats, global_weight, gradient_norm, optimizer_step

Numbers = list[list[float]]  # for each held-out row, what `Objective.measure` gives


@dataclass(frozen=True)
class Objective:
    """Loss and evaluation of a supervised step.

    Attributes:
        collate: encoded rows -> batch.
        loss: engine, batch -> (sum of losses, sums of metrics).
        measure: engine, batch -> a list of numbers for each row.
        summarize: those lists of all held-out rows -> metrics.
        describe: metrics -> one line for the console.
        shown: metrics for the progress bar, with their names there.
    """

    collate: Callable[[list[dict[str, Any]]], Any]
    loss: Callable[[Engine, Any], tuple[Tensor, Stats]]
    measure: Callable[[Engine, Any], Numbers]
    summarize: Callable[[Numbers], dict[str, float]]
    describe: Callable[[dict[str, float]], str]
    shown: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """Optimizer steps of a training, and the rows of each, in an order that `seed` decides."""

    schedule: ScheduleConfig
    batches: BatchConfig
    seed: int
    lengths: Sequence[int]
    """Number of tokens of each row (pair: both); rows of similar length share a batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        rows, size = list(range(len(self.lengths))), self.batches.per_device_train_batch_size
        micro_batches = len(rank_batches(rows, size, 0, distributed.world_size()))
        return math.ceil(micro_batches / self.schedule.gradient_accumulation_steps)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps = self.steps_per_epoch * self.schedule.num_train_epochs
        return min(steps, self.schedule.max_steps or steps)

    def micro_batches(self, first: int) -> Iterator[list[list[int]]]:
        """Yield this rank's micro-batches, as row numbers, of each optimizer step from `first` on.

        The order is a function of seed and epoch: to resume, the number of the step is enough.
        """
        size, world = self.batches.per_device_train_batch_size, distributed.world_size()
        per_epoch, accumulation = self.steps_per_epoch, self.schedule.gradient_accumulation_steps
        most = self.schedule.max_tokens_per_micro_batch
        for epoch in range(first // per_epoch, self.schedule.num_train_epochs):
            order = length_grouped(self.lengths, size * world, self.seed, epoch)
            batches = rank_batches(order, size, distributed.rank(), world)
            done = max(0, first - epoch * per_epoch)
            for start in range(done * accumulation, len(batches), accumulation):
                step = batches[start : start + accumulation]
                if most is None:
                    yield step
                else:
                    yield micro_batches(list(chain.from_iterable(step)), self.lengths, size, most)


class Trained(NamedTuple):
    """Metrics before and after a training, the numbers of `Objective.measure` after it."""

    before: dict[str, float]
    after: dict[str, float]
    numbers: Numbers
    checkpoints: Checkpoints


def train(
    engine: Engine, data: Prepared, objective: Objective, plan: Plan, *, folder: RunFolder,
    found: Found | None, checkpoint: CheckpointConfig, tracking: TrackingConfig, step: int,
    arguments: dict[str, Any],
) -> Trained:
    """Evaluate, train (or resume training from the checkpoint `found`), evaluate.

    Raises:
        FloatingPointError: too many consecutive optimizer steps were non-finite.
        TrainingStopped: a signal asked for it.
    """
    guard = NonFiniteGuard(folder.path, plan.schedule.max_skipped_steps, "lower --learning_rate")
    checkpoints = Checkpoints(
        folder, {"model": engine}, config=checkpoint, step=step, arguments=arguments, found=found,
        shared={"faults": guard},
    )
    progress = checkpoints.restore(data.fingerprint())
    if not progress.before:
        progress.before = objective.summarize(evaluate(engine, data, objective, plan.batches))
    console.say(f"before: {objective.describe(progress.before)}")
    tracker = Tracker(
        folder.path, plan.total_steps, objective.shown,
        tracking=tracking, arguments=arguments, resume_step=progress.step,
    )
    with tracker, checkpoints.deferring_signals():
        _train(engine, data, objective, plan, checkpoints, guard, tracker)
    numbers = evaluate(engine, data, objective, plan.batches)
    after = objective.summarize(numbers)
    console.say(f"after: {objective.describe(after)}")
    return Trained(progress.before, after, numbers, checkpoints)


def _train(
    engine: Engine, data: Prepared, objective: Objective, plan: Plan, checkpoints: Checkpoints,
    guard: NonFiniteGuard, tracker: Tracker,
) -> None:
    """Train on every row of every epoch, from the step on that was restored."""
    total, per_epoch, first = plan.total_steps, plan.steps_per_epoch, checkpoints.progress.step
    interval, loss = plan.batches.eval_interval, partial(objective.loss, engine)
    seen, started = 0, time.perf_counter()
    for step, batches in zip(range(first + 1, total + 1), plan.micro_batches(first), strict=False):
        micro_batches = [
            objective.collate([data.train[i] for i in rows]).to(distributed.device())
            for rows in batches
        ]
        engine.train()
        weight, random_state = global_weight(micro_batches), torch.get_rng_state()
        metrics = optimizer_step(engine, micro_batches, loss, weight)
        if metrics is None:
            guard.skip(step, micro_batches, random_state)
            metrics = {}
        else:
            guard.step_taken()
            metrics |= {"grad_norm": gradient_norm(engine), "lr": engine.get_lr()[0]}
        seen += int(weight)
        metrics |= {
            "epoch": (step - 1) / per_epoch, "weight": int(weight),
            "weight_per_second": seen / (time.perf_counter() - started),
            "memory_gb": distributed.memory_gb(), "skipped_steps": guard.skipped,
        }
        if interval and step % interval == 0 and step < total:
            result = objective.summarize(evaluate(engine, data, objective, plan.batches))
            metrics |= {f"eval/{name}": value for name, value in result.items()}
        tracker.log(metrics, step)
        ends_epoch = step % per_epoch == 0 and step < total
        checkpoints.step_boundary(step, tracker, due=guard.at_first_skip or ends_epoch)


@torch.no_grad()
def evaluate(engine: Engine, data: Prepared, objective: Objective, config: BatchConfig) -> Numbers:
    """Return the numbers of `Objective.measure` for each held-out row, in no certain order."""
    rows, training = data.held_out, engine.module.training
    engine.eval()
    numbers: Numbers = []
    batches = covering_batches(
        len(rows), config.per_device_eval_batch_size, distributed.rank(), distributed.world_size()
    )
    for indices, counts in batches[: config.eval_iters]:
        batch = objective.collate([rows[i] for i in indices]).to(distributed.device())
        measured = objective.measure(engine, batch)
        if counts:
            numbers += measured
    engine.train(training)
    return distributed.gather_rows(numbers)
