"""DeepSpeed's launcher as an ordinary Python script.

    python alpaca_rlhf/training_model/my_deepspeed.py --num_gpus 2 path/to/main.py --its --flags

It takes every argument of the `deepspeed` command and hands it to DeepSpeed's own runner, in this
process, so that an IDE starts it like any other script, from a clone that was never installed.
First it settles what the runner leaves open: the interpreter's `bin` leads PATH (ninja, deepspeed),
the repository root leads PYTHONPATH, a free port is found, CUDA_VISIBLE_DEVICES holds also beside
--num_gpus, and without an accelerator each rank gets its share of the cores. The exit code is the
training script's; Ctrl-C, or ending this process, ends every worker.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import sys
from argparse import Namespace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Below the range from which the kernel serves outgoing connections: nothing else is given such a
# port between our look at it and the moment, seconds later, when rank 0 listens on it.
PORTS = range(20_000, 32_000)
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

    accelerator = get_accelerator()
    logging.disable(logging.NOTSET)
    # Port 0: none asked for. At "error" the launcher repeats the whole command of a failed worker.
    defaults = ["--master_port=0", "--log_level=critical"]
    options = runner.parse_args(defaults + argv)
    first_of_script = len(argv) - len(options.user_args) - 1
    own_flags, script_and_flags = argv[:first_of_script], argv[first_of_script:]
    if not (options.module or options.no_python or os.path.exists(options.user_script)):
        raise ValueError(f"no training script {options.user_script} (seen from {os.getcwd()})")
    put_first("PATH", os.path.dirname(sys.executable))
    put_first("PYTHONPATH", str(REPOSITORY))
    chosen: list[str] = []
    if os.path.isfile(options.hostfile):  # its nodes agree on a port, and have their own devices
        words = f"hosts of {options.hostfile}"
        defaults.remove("--master_port=0")
    else:
        if accelerator.device_name() == "cpu":
            chosen, words = choose_cpu(options)
        else:
            chosen, words = choose_devices(options, accelerator.device_count())
        port = choose_port(options.master_port)
        if options.master_port not in (0, port):
            words += f", port {options.master_port} is taken"
        words += f", port {port}"
        chosen.append(f"--master_port={port}")
    print(f"my_deepspeed: {options.user_script}: {words}", flush=True)
    runner.main(defaults + own_flags + chosen + script_and_flags)


def main(argv: list[str]) -> int:
    """Run the launcher; return this process's exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        argv = ["--help"]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        launch(argv)
    except SystemExit as ended:
        if ended.code in KILLED:
            print(f"my_deepspeed: a worker was ended by {KILLED[ended.code]}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        print(f"my_deepspeed: {error}", file=sys.stderr)
        return 2
    finally:
        stop_workers()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
