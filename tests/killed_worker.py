"""What test_killed_runs.py starts: cases of soak.py, and ranks that go wrong, forked off here.

    python tests/killed_worker.py FOLDER [move]

A line on standard output for each case. Everything is imported once, and computed in forks.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soak
from soak import Case

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.run import checkpoints

TIMEOUT = 5


def main() -> None:
    """Every case, or those that move elsewhere."""
    folder = Path(sys.argv[1])
    soak.prepare(folder)
    if sys.argv[2:] == ["move"]:
        move(folder)
        return
    ends = {work.__name__: ranks(work, folder) for work in (stuck, raises, dies)}
    args = soak.parser().parse_args(["--kills", "1", "--updates", "6", "--save_steps", "2"])
    draw = random.Random(1)
    for case in Case(3, 1, 0, 4), Case(1, 2, 3, 4):
        soak.soak(case, folder, args, draw)
    ends["stopped"] = stopped(case, folder, args)
    (folder / "ends.json").write_text(json.dumps(ends))


def move(folder: Path) -> None:
    """Runs that go on elsewhere."""
    args = soak.parser().parse_args(["--move", "--updates", "4", "--save_steps", "2"])
    alone, together = Case(1, 1, 0, 0), Case(1, 2, 3, 0)
    soak.move(alone, together, folder, args)
    soak.move(together, alone, folder, args)


def ranks(work: Callable[[], None], folder: Path) -> dict:
    """Two ranks that do something: their exit codes, and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"{work.__name__}.log"
    started, processes = time.perf_counter(), []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            soak.write_to(log)
            console.run_main(lambda: (distributed.initialize(0, TIMEOUT), work()))
            os._exit(0)
        processes.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes]
    return {"codes": codes, "said": log.read_text(), "seconds": time.perf_counter() - started}


def stopped(case: Case, folder: Path, args: argparse.Namespace) -> dict:
    """A run that one rank's SIGTERM ends and that is resumed, beside the `whole` one of a soak."""
    right = checkpoints.Checkpoints.step_boundary

    def boundary(self: checkpoints.Checkpoints, step: int, *more: Any, **how: Any) -> None:
        if step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        right(self, step, *more, **how)

    checkpoints.Checkpoints.step_boundary = boundary
    output = folder / "stopped"
    codes = soak.Run(case, folder, output, args).wait()
    said = (folder / "stopped.log").read_text()
    saved = sorted(p.name for p in (folder / "stopped.partial" / "checkpoints").iterdir())
    checkpoints.Checkpoints.step_boundary = right
    resumed = soak.Run(case, folder, output, args, resume=True).wait()
    return {"codes": codes, "said": said, "saved": saved, "resumed": resumed,
            "differences": soak.differences(folder / "whole", output)}


def stuck() -> None:
    """Rank 1 stays away until long after the other has given up."""
    distributed.barrier()
    if distributed.rank() == 1:
        time.sleep(3 * TIMEOUT)
        os._exit(7)
    distributed.barrier()


def raises() -> None:
    """Rank 1 has a bug."""
    distributed.barrier()
    if distributed.rank() == 1:
        raise ZeroDivisionError("the cause")
    distributed.barrier()


def dies() -> None:
    """Rank 1 is gone."""
    distributed.barrier()
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


if __name__ == "__main__":
    main()
