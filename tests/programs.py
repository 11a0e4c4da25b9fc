"""Start programs of the package, and ranks, as processes of their own.

    python tests/programs.py PATH/main.py [flags]        two ranks on this machine, no launcher
"""

import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING = REPOSITORY / "alpaca_rlhf" / "training_model"
BOOTSTRAP = TRAINING / "my_deepspeed.py"
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Writes what it sees to <last argument><rank>.json; imports no torch, so that a launch is short.
WORKER = """
import json, os, sys
piped = "--read" in sys.argv
seen = {"argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ),
        "stdin": sys.stdin.read() if piped else ""}
with open(sys.argv[-1] + os.environ["RANK"] + ".json", "w") as file:
    json.dump(seen, file)
if piped:
    sys.stdout.write("printed by the worker\\n")  # one write, which no other worker's can split
sys.exit(2 if "--fail" in sys.argv else 0)
"""

# Writes its process number to <last argument><rank>.pid.
SLEEPER = """
import os, sys, time
with open(sys.argv[-1] + os.environ["RANK"] + ".pid", "w") as file:
    file.write(str(os.getpid()))
time.sleep(120)
"""


def environment(**changes: str | None) -> dict[str, str]:
    """Return the environment of a single process on the CPU, without a network.

    Args:
        **changes: variables to set, or to remove if None.
    """
    kept = {name: value for name, value in os.environ.items()
            if name not in (*DISTRIBUTED, "DS_ACCELERATOR")}
    values = {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
              "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8", "TERM": "dumb", **changes}
    return {name: value for name, value in values.items() if value is not None}


def process_numbers(files: list[Path]) -> list[int]:
    """Wait until every file holds a process number, and return them."""
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_alive(process: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for a condition, for at most 100 seconds."""
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def fork_ranks(work: Callable[[], object], count: int = 2) -> int:
    """Run `work` in forks of this process, which has imported the libraries once.

    Returns:
        The highest exit code of the ranks.
    """
    ranks = []
    with socket.socket() as kept:  # the forks keep the port from others until rank 0 listens there
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE=str(count), LOCAL_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(kept.getsockname()[1]))
        for rank in map(str, range(count)):
            child = os.fork()
            if not child:
                os.environ.update(RANK=rank, LOCAL_RANK=rank)
                work()
                os._exit(0)
            ranks.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks)


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401 (each rank would import it)

    from alpaca_rlhf.utils import supervised  # noqa: F401

    sys.argv = sys.argv[1:]
    sys.exit(fork_ranks(lambda: runpy.run_path(sys.argv[0], run_name="__main__")))
