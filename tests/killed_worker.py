"""Processes that test_killed_runs.py starts: cases of soak.py, and ranks that hang, fail or die.

    python tests/killed_worker.py FOLDER [move]

Prints a line for each case of soak.py, and writes ends.json: how the others ended. Everything is
imported once, and computed in forks.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soak
import torch
from programs import ended, exit_codes, fork_ranks
from soak import Case

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.run.checkpoints import Checkpoints

TIMEOUT = 5  # seconds


def main() -> None:
    """Run every case, or those that resume with other ranks."""
    folder = Path(sys.argv[1])
    soak.prepare(folder)
    if sys.argv[2:] == ["move"]:
        args = soak.parser().parse_args(["--move", "--updates", "4", "--save_steps", "2"])
        alone, together = Case(1, 1, 0, 0), Case(1, 2, 3, 0)
        soak.move(alone, together, folder, args)
        soak.move(together, alone, folder, args)
        return
    args = soak.parser().parse_args(["--kills", "1", "--updates", "6", "--save_steps", "2"])
    draw = random.Random(1)
    wait_for = {work: two_ranks(work, folder) for work in (dies, raises, hangs)}
    ends = {"dies": wait_for[dies]()}
    soak.soak(Case(3, 1, 0, 4), folder, args, draw)  # the others only wait meanwhile
    ends |= {"raises": wait_for[raises](), "hangs": wait_for[hangs]()}
    case = Case(1, 2, 3, 4)
    length = soak.run_whole(case, folder, args)
    ends["stopped"] = stopped(case, folder, args)
    soak.kill_and_compare(case, folder, args, draw, length)
    (folder / "ends.json").write_text(json.dumps(ends))


def two_ranks(work: Callable[[], None], folder: Path) -> Callable[[], dict[str, Any]]:
    """Start two ranks that do something together; what waits for them returns how they ended.

    Returns once they have met: with many pairs that start at once, one could miss the other for
    longer than the timeout of this test.
    """
    log, met = folder / f"{work.__name__}.log", folder / f"{work.__name__}.met"

    def train() -> None:
        distributed.initialize(0, TIMEOUT)
        distributed.barrier()
        met.touch()
        work()

    ranks = fork_ranks(lambda: console.run_main(train), 2, log)
    while not (met.exists() or any(map(ended, ranks))):
        time.sleep(0.02)
    start = time.perf_counter()
    return lambda: {"codes": exit_codes(ranks), "said": log.read_text(),
                    "seconds": time.perf_counter() - start}


def stopped(case: Case, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run a case that one rank's SIGTERM stops after step 3."""
    right = Checkpoints.step_boundary

    def step_boundary(self: Checkpoints, step: int, *more: Any, **how: Any) -> None:
        if step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        right(self, step, *more, **how)

    Checkpoints.step_boundary = step_boundary
    codes = soak.Run(case, folder, folder / "killed", args).wait()
    Checkpoints.step_boundary = right
    saved = sorted(p.name for p in (folder / "killed.partial" / "checkpoints").iterdir())
    return {"codes": codes, "said": (folder / "killed.log").read_text(), "saved": saved}


def hangs() -> None:
    """Rank 1 stays away until the other has given up."""
    if distributed.rank() == 1:
        stay_away("hangs")
    distributed.sum_over_ranks(torch.ones(1))


def stay_away(name: str) -> None:
    """End this rank once another one has written to their log that it no longer waits."""
    log = Path(sys.argv[1]) / f"{name}.log"
    while "--collective_timeout" not in log.read_text():
        time.sleep(0.1)
    os._exit(7)


def raises() -> None:
    """Rank 1 has a bug."""
    if distributed.rank() == 1:
        raise ZeroDivisionError("the cause")
    distributed.barrier()


def dies() -> None:
    """Rank 1 is killed."""
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


if __name__ == "__main__":
    main()
