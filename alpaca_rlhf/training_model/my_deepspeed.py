"""DeepSpeed's launcher as an ordinary Python script.

    python alpaca_rlhf/training_model/my_deepspeed.py --num_gpus 2 path/to/main.py --its --flags
    python alpaca_rlhf/training_model/my_deepspeed.py --debug path/to/main.py --its --flags

It takes every argument of the `deepspeed` command and runs DeepSpeed's own runner in this process,
so that an IDE starts it like any other script, from a clone that was never installed. It puts the
interpreter's `bin` first on PATH (ninja, deepspeed) and the repository first on PYTHONPATH, finds a
free port, honours CUDA_VISIBLE_DEVICES also beside --num_gpus, and without an accelerator gives
each rank its share of the cores; with a hostfile all of this holds on every node. The exit code is
the training script's; Ctrl-C, or ending this process, ends every worker. With --debug there is no
launcher: the script runs in this process, where breakpoints work.
"""

import importlib.util
import logging
import os
import runpy
import signal
import site
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_TO_END = 40  # the launcher itself gives its workers 30 between SIGTERM and SIGKILL
# Signals that end workers which have printed nothing.
KILLED: dict[int, str] = {
    signal.SIGKILL: "SIGKILL (out of memory?)",
    signal.SIGSEGV: "SIGSEGV",
    signal.SIGABRT: "SIGABRT (a collective that took longer than --collective_timeout?)",
    signal.SIGBUS: "SIGBUS (shared memory full?)",
}


class OwnFlags(ArgumentParser):
    """The flags that the `deepspeed` command does not have; they, too, precede the script."""

    words = {"--debug": 1, "--debug_ranks": 2, "--debug_port": 2}  # words taken, unless --x=y

    def __init__(self) -> None:
        super().__init__("my_deepspeed.py", add_help=False, allow_abbrev=False, usage=SUPPRESS)
        self.add_argument("--debug", action="store_true", help="run the script in this process, as "
                          "the only rank and without launcher, so that breakpoints work")
        self.add_argument("--debug_ranks", metavar="N,N", default="", help="ranks that wait at "
                          "start until a debugger is attached (debugpy)")
        self.add_argument("--debug_port", metavar="N", type=int, default=5678, help="rank R waits "
                          "on this port plus R, for clients of its own machine (default: 5678)")

    def error(self, message: str) -> NoReturn:
        """Raise the message of a wrong flag."""
        raise ValueError(message)

    def take(
        self, argv: list[str], parse: Callable[[list[str]], Namespace]
    ) -> tuple[Namespace, list[str]]:
        """Take our flags out of `argv`; the runner's `parse` tells where the script is."""
        others: list[int] = []
        marks: list[int] = []
        i = 0
        while i < len(argv):
            name, equals, _ = argv[i].partition("=")
            width = 1 if equals else self.words.get(name, 1)
            (marks if name in self.words else others).extend(range(i, min(i + width, len(argv))))
            i += width
        script_flags = parse([argv[i] for i in others]).user_args
        script = others[-1 - len(script_flags)]
        ours = [i for i in marks if i < script]  # what follows it belongs to the script
        own = self.parse_args([argv[i] for i in ours])
        if not all(rank.isdigit() for rank in own.debug_ranks.split(",") if own.debug_ranks):
            self.error(f"--debug_ranks {own.debug_ranks}: must be numbers of ranks, such as 0,1")
        return own, [word for i, word in enumerate(argv) if i not in ours]


def prepare_debugging(own: Namespace) -> str:
    """Make the workers of `--debug_ranks` wait for a debugger; return text for the start-up line.

    Raises:
        ValueError: debugpy is not installed.
    """
    from alpaca_rlhf.utils import distributed

    if not own.debug_ranks:
        return ""
    if importlib.util.find_spec("debugpy") is None:
        raise ValueError(distributed.NO_DEBUGPY)
    os.environ[distributed.DEBUG_RANKS] = own.debug_ranks
    os.environ[distributed.DEBUG_PORT] = str(own.debug_port)
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"  # it would end ranks that wait for long
    ports = (f"{own.debug_port + int(rank)} (rank {rank})" for rank in own.debug_ranks.split(","))
    return f", debugger awaited on port {' and '.join(ports)}"


def run_here(options: Namespace, launcher_flags: list[str], port: int) -> None:
    """Run the script in this process as the only rank, as Python itself would."""
    from alpaca_rlhf.utils import console

    if options.no_python:
        raise ValueError("--debug --no_python: only Python runs in this process; leave one out")
    os.environ[console.DEBUGGED] = "1"
    # Set here, so that it does not join a group that an old environment describes.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    words = [word for word in launcher_flags if word != "--module"]
    unused = f"; without effect here: {' '.join(words)}" if words else ""
    print(f"my_deepspeed: {options.user_script}: one rank in this process{unused}", flush=True)
    sys.argv = [options.user_script, *options.user_args]
    if options.module:
        runpy.run_module(options.user_script, run_name="__main__", alter_sys=True)
    else:
        site.addsitedir(str(Path(options.user_script).resolve().parent))
        runpy.run_path(options.user_script, run_name="__main__")


def stop_workers() -> None:
    """End the workers that are still running; does nothing after an ordinary end."""
    import psutil  # a requirement of deepspeed

    workers = psutil.Process().children(recursive=True)
    launchers = psutil.Process().children()
    for launcher in launchers:
        launcher.terminate()
    psutil.wait_procs(launchers, timeout=SECONDS_TO_END)
    for worker in workers:
        if worker.is_running():
            worker.kill()


def launch(argv: list[str]) -> None:
    """Prepare the environment and run DeepSpeed's runner with `argv`, completed."""
    logging.disable(logging.WARNING)  # deepspeed warns where there is no accelerator
    from alpaca_rlhf.training_model import launching
    from alpaca_rlhf.utils import distributed
    from alpaca_rlhf.utils.files import expanded

    distributed.on_cpu()
    logging.disable(logging.NOTSET)
    runner = launching.runner_for_hosts()
    # Port 0: none asked for. At "error" the launcher repeats the whole command of a failed worker.
    defaults = ["--master_port=0", "--log_level=critical"]
    own, argv = OwnFlags().take(argv, lambda words: runner.parse_args(defaults + words))
    options = runner.parse_args(defaults + argv)
    first_of_script = len(argv) - len(options.user_args) - 1
    # The shell leaves the ~ of --hostfile=~/x.
    argv[: first_of_script + 1] = ["=".join(map(expanded, word.split("=", 1)))
                                   for word in argv[: first_of_script + 1]]
    options = runner.parse_args(defaults + argv)
    launcher_flags, script_and_flags = argv[:first_of_script], argv[first_of_script:]
    if not (options.module or options.no_python or os.path.exists(options.user_script)):
        raise ValueError(f"no training script {options.user_script} (seen from {os.getcwd()})")
    for variable, folder in (("PATH", os.path.dirname(sys.executable)), ("PYTHONPATH", REPOSITORY)):
        parts = [str(folder), *filter(None, os.environ.get(variable, "").split(os.pathsep))]
        os.environ[variable] = os.pathsep.join(dict.fromkeys(parts))
    if own.debug:
        run_here(options, launcher_flags, launching.choose_port(options.master_port))
        return
    debugging = prepare_debugging(own)
    chosen, text = launching.choose(options)
    print(f"my_deepspeed: {options.user_script}: {text}{debugging}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        runner.main(defaults + launcher_flags + chosen + script_and_flags)
    finally:
        stop_workers()


def main(argv: list[str]) -> int:
    """Run the launcher; return this process's exit code."""
    site.addsitedir(str(REPOSITORY))  # as PYTHONPATH does for the workers
    from alpaca_rlhf.utils.console import TIMED_OUT, under_debugger

    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        OwnFlags().print_help()
        argv = ["--help"]
    try:
        launch(argv)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        killed = KILLED.get(256 - code) or KILLED.get(code - 128)  # the latter of mpirun and srun
        if code == TIMED_OUT:
            print("my_deepspeed: a rank waited for another one for longer than "
                  "--collective_timeout; the lines above name the place", file=sys.stderr)
        elif killed:
            print(f"my_deepspeed: a worker was ended by {killed}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, AssertionError) as error:
        # DeepSpeed's launcher raises these for a command line, hostfile or launcher it refuses.
        if under_debugger():
            raise
        print(f"my_deepspeed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
