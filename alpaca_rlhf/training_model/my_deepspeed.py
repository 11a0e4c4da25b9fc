"""DeepSpeed's launcher as an ordinary Python script.

    python alpaca_rlhf/training_model/my_deepspeed.py --num_gpus 2 path/to/main.py --its --flags
    python alpaca_rlhf/training_model/my_deepspeed.py --debug path/to/main.py --its --flags

It takes every argument of the `deepspeed` command and hands it to DeepSpeed's own runner, in this
process, so that an IDE starts it like any other script, from a clone that was never installed.
First it settles what the runner leaves open: the interpreter's `bin` leads PATH (ninja, deepspeed),
the repository root leads PYTHONPATH, a free port is found, CUDA_VISIBLE_DEVICES holds also beside
--num_gpus, and without an accelerator each rank gets its share of the cores; with a hostfile it is
the same on every node. The exit code is the training script's; Ctrl-C, or ending this process, ends
every worker. With --debug there is no launcher: the script runs here, and breakpoints in it hold.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import runpy
import signal
import site
import socket
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[2]
# Below the range from which the kernel serves outgoing connections: nothing else is given such a
# port between our look at it and the moment, seconds later, when rank 0 listens on it.
PORTS = range(20_000, 32_000)
DEFAULT_HOSTFILE = "/job/hostfile"  # the runner's; it need not exist
NO_SSH_PORT = 29_500
SECONDS_TO_END = 40  # the launcher itself gives its workers 30 between SIGTERM and SIGKILL
# The launcher's exit code when a signal ended a worker, which then has said nothing itself.
KILLED = {
    256 - signal.SIGKILL: "SIGKILL (out of memory?)",
    256 - signal.SIGSEGV: "SIGSEGV",
    256 - signal.SIGABRT: "SIGABRT",
    256 - signal.SIGBUS: "SIGBUS (shared memory full?)",
}


def put_first(variable: str, folder: str) -> None:
    """Put `folder` at the head of a search path that is kept in the environment."""
    parts = [part for part in os.environ.get(variable, "").split(os.pathsep) if part]
    os.environ[variable] = os.pathsep.join([folder] + [part for part in parts if part != folder])


def is_free(port: int) -> bool:
    """Whether rank 0 could listen on `port` of this machine now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def choose_port(asked: int) -> int:
    """Return the port asked for (0: none) if it is free, else a free one.

    At random, so that two launches at once do not find the same.
    """
    candidates = random.SystemRandom().sample(PORTS, 100)
    return next(port for port in [asked, *candidates] if port and is_free(port))


def usable_cores() -> int:
    """Count the cores that this process may run on (macOS cannot say: all of them)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def choose_cpu(options: Namespace) -> tuple[list[str], str]:
    """Start the ranks asked for, or one (the runner: one a NUMA node), with a share of the cores.

    Returns the runner's flags and words for the start-up line; sets what the workers inherit.
    """
    flags: list[str] = []
    if options.num_gpus <= 0 and not (options.include or options.exclude):
        options.num_gpus, flags = 1, ["--num_gpus=1"]
    ranks = max(1, options.num_gpus)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # the runner would read it as a list of CPUs
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # known now; spares a warning from each rank
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
    return flags, f"{ranks} rank(s) on the CPU, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"


def choose_devices(options: Namespace, available: int) -> tuple[list[str], str]:
    """Take the first --num_gpus of CUDA_VISIBLE_DEVICES (the runner: of the machine's devices).

    Returns the runner's flags and words for the start-up line.
    """
    if options.include or options.exclude:
        return [], f"devices {options.include or 'all but ' + options.exclude}"
    count = options.num_gpus if options.num_gpus > 0 else available
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count > available:
        among = f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""
        raise ValueError(f"--num_gpus {count}: there are {available} devices here{among}")
    if not visible:
        return [], f"{count} of {available} devices"
    devices = [name.strip() for name in visible.split(",")][:count]
    if not all(name.isdigit() for name in devices):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: the launcher takes device numbers only")
    del os.environ["CUDA_VISIBLE_DEVICES"]  # it is in the flag now; the runner would warn
    include = "localhost:" + ",".join(devices)
    return ["--num_gpus=-1", "--num_nodes=-1", f"--include={include}"], f"devices {include}"


class OwnFlags(ArgumentParser):
    """The flags that DeepSpeed's command doesn't have; like its flags they precede the script."""

    words = {"--debug": 1, "--debug_ranks": 2, "--debug_port": 2}  # that each takes, unless --x=y

    def __init__(self) -> None:
        super().__init__("my_deepspeed.py", add_help=False, allow_abbrev=False, usage=SUPPRESS)
        self.add_argument("--debug", action="store_true", help="no launcher and no worker: the "
                          "script runs in this process, as one rank, and breakpoints in it hold")
        self.add_argument("--debug_ranks", metavar="N,N", default="", help="ranks that wait at "
                          "their start until a debugger is attached (debugpy)")
        self.add_argument("--debug_port", metavar="N", type=int, default=5678, help="rank R waits "
                          "on this port plus R, for clients of its own machine (default: 5678)")

    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        raise ValueError(message)

    def take(
        self, argv: list[str], parse: Callable[[list[str]], Namespace]
    ) -> tuple[Namespace, list[str]]:
        """Our flags, and the other words of `argv`.

        Args:
            argv: flags of both kinds, the script, its flags.
            parse: the runner's parser, which knows where the script stands.
        """
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
        ours = {i for i in marks if i < script}  # what stands behind it is the script's own
        own = self.parse_args([argv[i] for i in sorted(ours)])
        ranks = own.debug_ranks.split(",") if own.debug_ranks else []
        if not all(rank.isdigit() for rank in ranks):
            self.error(f"--debug_ranks {own.debug_ranks}: must be numbers of ranks, such as 0,1")
        return own, [word for i, word in enumerate(argv) if i not in ours]


def prepare_debugging(own: Namespace) -> str:
    """Let the workers of `--debug_ranks` wait for a client; words for the start-up line.

    Raises:
        ValueError: there is no debugpy.
    """
    from alpaca_rlhf.utils import debugging

    if not own.debug_ranks:
        return ""
    if importlib.util.find_spec("debugpy") is None:
        raise ValueError(debugging.INSTALL)
    os.environ[debugging.RANKS] = own.debug_ranks
    os.environ[debugging.PORT] = str(own.debug_port)
    # The other ranks wait for the one that stands at a breakpoint: a week, in minutes.
    os.environ["DEEPSPEED_TIMEOUT"] = str(7 * 24 * 60)
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    ports = (f"{own.debug_port + int(rank)} (rank {rank})" for rank in own.debug_ranks.split(","))
    return f", debugger awaited on port {' and '.join(ports)}"


def run_here(options: Namespace, launcher_flags: list[str]) -> None:
    """Run the script in this process as the only rank, as Python itself would."""
    from alpaca_rlhf.utils import console

    if options.no_python:
        raise ValueError("--debug --no_python: only Python runs in this process; leave one out")
    os.environ[console.DEBUGGED] = "1"
    # With a place of its own it joins no group that an environment left over may speak of.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(choose_port(options.master_port)))
    words = [word for word in launcher_flags if word != "--module"]
    unused = f"; without effect here: {' '.join(words)}" if words else ""
    print(f"my_deepspeed: {options.user_script}: one rank in this process{unused}", flush=True)
    sys.argv = [options.user_script, *options.user_args]
    if options.module:
        runpy.run_module(options.user_script, run_name="__main__", alter_sys=True)
    else:
        site.addsitedir(str(Path(options.user_script).resolve().parent))
        runpy.run_path(options.user_script, run_name="__main__")


def choose(options: Namespace) -> tuple[list[str], str]:
    """Decide hosts, devices, cores and port.

    Returns:
        Flags for the runner, behind the user's, and words for the start-up line.

    Raises:
        ValueError: flags that cannot be followed, in one line.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if os.path.isfile(options.hostfile):
        return choose_hosts(options, accelerator.device_name() == "cpu")
    if options.hostfile != DEFAULT_HOSTFILE:
        raise ValueError(f"--hostfile {options.hostfile}: no such file")
    if options.no_ssh:
        raise ValueError("--no_ssh: needs --hostfile FILE, the same on every node")
    if accelerator.device_name() == "cpu":
        chosen, words = choose_cpu(options)
    else:
        chosen, words = choose_devices(options, accelerator.device_count())
    port = choose_port(options.master_port)
    if options.master_port not in (0, port):
        words += f", port {options.master_port} is taken"
    return [*chosen, f"--master_port={port}"], f"{words}, port {port}"


def choose_hosts(options: Namespace, on_cpu: bool) -> tuple[list[str], str]:
    """Many machines: what one of them decides for all, and with --no_ssh each by the same rule."""
    from alpaca_rlhf.training_model import launching

    launching.install()
    flags, hosts = launching.describe(options)
    words = f"{len(hosts)} hosts of {options.hostfile}"
    if on_cpu:
        ranks = options.num_gpus if options.num_gpus > 0 else max(hosts.values())
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // ranks)))
        words += f", {ranks} rank(s) on each CPU, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    # Nodes that are started one by one must agree on a port without a word to each other.
    port = options.master_port or (NO_SSH_PORT if options.no_ssh else choose_port(0))
    return [*flags, f"--master_port={port}"], f"{words}, port {port}"


def stop_workers() -> None:
    """End what the runner started and left running; does nothing after an ordinary end."""
    import psutil  # a requirement of deepspeed, which looks after its own workers with it

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
    logging.disable(logging.WARNING)  # importing deepspeed warns where there is no accelerator
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    get_accelerator()
    logging.disable(logging.NOTSET)
    # Port 0: none asked for. At "error" the launcher repeats the whole command of a failed worker.
    defaults = ["--master_port=0", "--log_level=critical"]
    own, argv = OwnFlags().take(argv, lambda words: runner.parse_args(defaults + words))
    options = runner.parse_args(defaults + argv)
    first_of_script = len(argv) - len(options.user_args) - 1
    launcher_flags, script_and_flags = argv[:first_of_script], argv[first_of_script:]
    if not (options.module or options.no_python or os.path.exists(options.user_script)):
        raise ValueError(f"no training script {options.user_script} (seen from {os.getcwd()})")
    put_first("PATH", os.path.dirname(sys.executable))
    put_first("PYTHONPATH", str(REPOSITORY))
    if own.debug:
        run_here(options, launcher_flags)
        return
    debugging = prepare_debugging(own)
    chosen, words = choose(options)
    print(f"my_deepspeed: {options.user_script}: {words}{debugging}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        runner.main(defaults + launcher_flags + chosen + script_and_flags)
    finally:
        stop_workers()


def main(argv: list[str]) -> int:
    """Run the launcher; return this process's exit code."""
    # What PYTHONPATH does for the workers.
    site.addsitedir(str(REPOSITORY))
    from alpaca_rlhf.utils.console import under_debugger

    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        OwnFlags().print_help()
        argv = ["--help"]
    try:
        launch(argv)
    except SystemExit as ended:
        if ended.code in KILLED:
            print(f"my_deepspeed: a worker was ended by {KILLED[ended.code]}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, AssertionError) as error:
        # With these DeepSpeed's launcher refuses a command line, a host file or a launcher.
        if under_debugger():
            raise
        print(f"my_deepspeed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
