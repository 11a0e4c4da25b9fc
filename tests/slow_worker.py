"""Pairs of ranks that test_slow_ranks.py starts: rank 0 works longer than the collective timeout.

    python tests/slow_worker.py FOLDER

Writes FOLDER/ends.json: how each pair has ended, {name: {codes, said, seconds}}.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from killed_worker import TIMEOUT, stay_away, two_ranks

from alpaca_rlhf.evaluation.report import page
from alpaca_rlhf.utils import distributed, ds_config
from alpaca_rlhf.utils.configs import TrackingConfig
from alpaca_rlhf.utils.logging import tracker
from alpaca_rlhf.utils.run import engine_state, export, nonfinite
from alpaca_rlhf.utils.run.checkpoints import Checkpoints
from alpaca_rlhf.utils.run.run_folder import RunFolder


def slowly(*_: Any, **__: Any) -> None:
    """Work on rank 0 for longer than the others would wait for a tensor."""
    if distributed.is_main():
        time.sleep(1.2 * TIMEOUT)


def first() -> None:
    """Fill a cache."""
    with distributed.main_first():
        slowly()


def exporting() -> None:
    """Export a model."""
    export._save_model = slowly
    export.unwrapped, export.merged_state_dict = (lambda _: None), (lambda *_: ({}, 0.0))
    export.export(torch.nn.Linear(1, 1), None, FOLDER, "", {})


def saving(stage: int) -> None:
    """Save DeepSpeed's part of a checkpoint."""
    class Slow(engine_state.CheckpointFiles):
        def save(self, state_dict: Any, path: str) -> None:
            super().save(state_dict, path)
            slowly()

    model = torch.nn.Linear(8, 8)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()),
        config=ds_config.make(zero_stage=stage, dtype=torch.float32))
    engine_state.save(engine, FOLDER / f"stage-{stage}", Slow())


def saving_plain() -> None:
    """Save without ZeRO."""
    saving(0)


def saving_whole() -> None:
    """Save where rank 0 writes all weights."""
    saving(2)


def saving_shards() -> None:
    """Save where each rank writes a part of the weights."""
    saving(3)


def cleaning() -> None:
    """Remove a checkpoint that could not be written."""
    folder = RunFolder(None)
    folder.path = FOLDER
    checkpoints = Checkpoints(folder, {}, config=None, step=1, arguments={}, found=None)
    checkpoints._write = lambda *_: ["disk full"]
    sys.modules[Checkpoints.__module__].shutil.rmtree = slowly
    checkpoints.save()


@dataclass
class NoBatch:
    """A micro-batch without tensors."""


def noting() -> None:
    """Save the batch of a skipped step."""
    nonfinite.write_durably = slowly
    nonfinite.NonFiniteGuard(FOLDER, 10, "").skip(1, [NoBatch()], torch.get_rng_state())


class SlowTracker:
    """A tracker that uploads at its end."""

    def finish(self) -> None:
        """Upload."""
        slowly()


def starting() -> None:
    """Start a tracker."""
    tracker._started = lambda *_: slowly() or []
    tracker.Tracker(None, 1, {}, tracking=TrackingConfig())


def finishing() -> None:
    """End a tracker."""
    tracker._started = lambda *_: [tracker._Sink("slow", SlowTracker())]
    with tracker.Tracker(None, 1, {}, tracking=TrackingConfig()):
        pass


def reporting() -> None:
    """Write report.html."""
    page.read_run = page.write = slowly
    page.write_beside(FOLDER)


def hangs_in_zero() -> None:
    """Rank 1 misses a collective in a group of DeepSpeed's own."""
    group = deepspeed.utils.groups._clone_world_group()
    if distributed.rank() == 1:
        stay_away("hangs_in_zero")
    torch.distributed.all_reduce(torch.ones(1), group=group)


def dies_while_others_wait() -> None:
    """Rank 0 is killed while it fills a cache."""
    with distributed.main_first():
        if distributed.is_main():
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)


SURVIVES = (first, exporting, saving_plain, saving_whole, saving_shards, cleaning, noting, starting,
            finishing, reporting)
ENDS = (hangs_in_zero, dies_while_others_wait)

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])

    def then_a_tensor(work: Any) -> Any:
        """Follow the work by a collective on tensors."""
        def both() -> None:
            work()
            distributed.sum_over_ranks(torch.ones(1))
        both.__name__ = work.__name__
        return both

    waiting = {work.__name__: two_ranks(then_a_tensor(work), FOLDER)
               for work in (*SURVIVES, *ENDS)}
    (FOLDER / "ends.json").write_text(json.dumps({name: end() for name, end in waiting.items()}))
