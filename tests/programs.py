"""Start programs of the package, and ranks, as processes of their own.

    python tests/programs.py PATH/main.py [flags]        two ranks on this machine, no launcher
    python tests/programs.py --serve                     forks for `Imported`
"""

import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING = REPOSITORY / "alpaca_rlhf" / "training_model"
BOOTSTRAP = TRAINING / "my_deepspeed.py"
STEPS = {1: "step1_supervised_finetuning", 2: "step2_reward_model_finetuning",
         3: "step3_rlhf_finetuning"}
MAINS = {number: TRAINING / name / "main.py" for number, name in STEPS.items()}
LIBRARIES = (
    "datasets", "peft", "transformers.models.llama.modeling_llama", "matplotlib.pyplot",
    "torch._dynamo", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
    *(f"alpaca_rlhf.training_model.{step}.main" for step in STEPS.values()),
)
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


class Imported:
    """A process that has imported the libraries, and runs programs in forks of itself.

    A program starts at once where a process of its own would import for ten seconds; in nothing
    else does it differ from one started as `python PROGRAM`.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(
        self, words: Sequence[Any], folder: Path, given: bytes = b"", **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with its flags in `folder`, with `given` on standard input."""
        return self.end(self.start(words, folder, given, **changes))

    def start(
        self, words: Sequence[Any], folder: Path, given: bytes = b"", **changes: str
    ) -> tuple[int, Path]:
        """Start a script; return its process number, and a folder, which `end` needs."""
        place = Path(tempfile.mkdtemp(prefix="program-"))
        (place / "0").write_bytes(given)
        process = self._ask({"words": list(map(str, words)), "folder": str(folder),
                             "place": str(place), "environment": changes})
        return process, place

    def end(self, started: tuple[int, Path]) -> subprocess.CompletedProcess[str]:
        """Wait for a script, and return its exit code and what it printed."""
        process, place = started
        deadline = time.monotonic() + 500
        while (code := self._ask({"process": process})) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        printed = [(place / name).read_text() for name in "12"]
        shutil.rmtree(place)
        assert code is not None, printed
        return subprocess.CompletedProcess([], code, *printed)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process, and what still runs in its forks."""
        self._process.communicate()


def serve() -> None:
    """Do what the lines of standard input ask for; in a fork, return to run its script."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # importing prints
    import_libraries()
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            answer: int | None = os.fork()
            if not answer:
                return become(**request)
            running.add(answer)
        else:
            done, status = os.waitpid(request["process"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
            running.discard(done)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for process in running:
        os.killpg(process, signal.SIGKILL)
    sys.exit()


def become(words: list[str], folder: str, place: str, environment: dict[str, str]) -> None:
    """Give this fork the arguments, streams, folder and environment of a script."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    os.chdir(folder)
    os.environ.update(environment)
    for number, flags in enumerate((os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2)):
        os.dup2(os.open(f"{place}/{number}", flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.argv = words


def import_libraries() -> None:
    """Import what the steps need, without computing anything: that would start threads."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage whenever it builds an engine: not among the libraries


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
    """Wait for a condition, for at most 200 seconds."""
    deadline = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def fork(work: Callable[[], object], log: Path | None = None, **environment: str) -> int:
    """Do something in a fork, which may write both its outputs to a log; return its process id."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    work()
    sys.stdout.flush()
    os._exit(0)


def fork_ranks(work: Callable[[], object], ranks: int, log: Path | None = None) -> list[int]:
    """Do something in forks that are the ranks of one world; return their process ids."""
    with socket.socket() as kept:  # the forks keep the port from others until rank 0 listens there
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        return [
            fork(work, log, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                 LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=str(kept.getsockname()[1]))
            for rank in range(ranks)
        ]


def ended(process: int) -> bool:
    """Return whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def exit_codes(processes: Sequence[int]) -> list[int]:
    """Wait for children, and return their exit codes, or signals as negative numbers."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv == ["--serve"]:
        serve()
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        import_libraries()
        sys.exit(max(exit_codes(fork_ranks(
            lambda: runpy.run_path(sys.argv[0], run_name="__main__"), 2))))
