"""Is this machine, or each of these machines, fit to train on?

    python -m alpaca_rlhf.doctor [--output_dir DIR] [--data_output_path DIR]
    python alpaca_rlhf/training_model/my_deepspeed.py --hostfile HOSTS --module alpaca_rlhf.doctor

A row for each thing that training needs: as it should be (OK), no hindrance yet (WARN), or in the
way (FAIL), with what to do about it. It looks at versions, devices, compiler, ports, shared memory,
disks and the network, then tests on the device that the maths comes out as worked out by hand and
that a reply does not depend on the batch it is written in. Through the launcher it looks at every
machine, and has the ranks meet. Exit code: 1 if anything is a FAIL, else 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
GB = 10**9
OK, WARN, FAIL = "OK", "WARN", "FAIL"


class Row(NamedTuple):
    """What was looked at, how it stands, what was found and what to do."""

    name: str
    status: str
    found: str
    remedy: str = ""


def tested_versions() -> dict[str, str]:
    """The versions that the tests run with: of requirements.txt, in a clone or as installed."""
    if REQUIREMENTS.exists():
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in importlib.metadata.requires("alpaca-rlhf") or []
                 if line.endswith('extra == "tested"')]
    pins = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {pin[1]: pin[2] for pin in pins if pin}


def versions() -> list[Row]:
    """Python and the libraries, against the tested versions."""
    rows = []
    install = "pip install -r requirements.txt"
    tested = tested_versions()
    for name, pin in tested.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(name, FAIL, "not installed", install))
            continue
        if version.split("+")[0] != pin:
            rows.append(Row(name, WARN, f"{version}, tested with {pin}", install))
    same = len(tested) - len(rows)
    python = f"Python {platform.python_version()}; {same} of {len(tested)} libraries as tested"
    if sys.version_info < (3, 11):
        return [Row("versions", FAIL, python, "use Python 3.11 or newer"), *rows]
    return [Row("versions", OK if tested else WARN, python, "" if tested else install), *rows]


def devices() -> list[Row]:
    """Accelerators and memory."""
    from alpaca_rlhf.utils import distributed

    device, host = distributed.free_memory()
    rows = [Row("devices", OK, distributed.describe_devices())]
    if distributed.on_cpu() and Path("/dev/nvidiactl").exists():
        rows = [Row("devices", FAIL, "an NVIDIA GPU that torch cannot use",
                    "install torch's CUDA build, and a driver that fits it")]
    free = f"{host / GB:.1f} GB free for each rank of this machine"
    if not distributed.on_cpu():
        free = f"{device / GB:.1f} GB free on the device; host: {free}"
    few = min(device, host) < 4 * GB
    return [*rows, Row("memory", WARN if few else OK, free, "end other programs" if few else "")]


def compiler() -> list[Row]:
    """What --offload compiles its optimizer with, and the hybrid engine its loops."""
    from alpaca_rlhf.utils.optimizer import missing_build_tools

    missing = missing_build_tools()
    if missing:
        found = f"no {' and no '.join(missing)}"
        return [Row("compiler", WARN, found,
                    "needed for --offload, and on a CPU the compiler for fast decoding")]
    return [Row("compiler", OK, "C++ compiler and ninja")]


def ports() -> list[Row]:
    """Whether ranks could listen here, and whether this machine knows its own name."""
    from alpaca_rlhf.training_model.launching import NO_SSH_PORT, choose_port, is_free

    port = choose_port(0)
    with socket.socket() as listener:
        listener.bind(("", port))
        listener.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    default = "free" if is_free(NO_SSH_PORT) else "taken"
    rows = [Row("port", OK, f"port {port} takes connections; {NO_SSH_PORT}, the default, is "
                            f"{default}")]
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        rows.append(Row("host name", WARN, f"{socket.gethostname()} has no address",
                        "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"))
    return rows


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Row]:
    """What ranks of one machine, and workers that load data, talk through."""
    if not folder.exists():
        return [Row("shared memory", OK, f"no {folder} on this system")]
    free = shutil.disk_usage(folder).free
    few = free < GB
    return [Row("shared memory", WARN if few else OK, f"{free / GB:.2f} GB free in {folder}",
                "1 GB or more; in a container --shm-size=8g or --ipc=host" if few else "")]


def disks(places: dict[str, Path]) -> list[Row]:
    """Whether each folder can be written, and how much goes into it.

    Args:
        places: a name for the table, and the folder; it need not exist.
    """
    rows = []
    for name, folder in places.items():
        there = next(f for f in [folder.absolute(), *folder.absolute().parents] if f.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                free = shutil.disk_usage(there).free
        except OSError as error:
            rows.append(Row(name, FAIL, f"{folder}: {error.strerror}", "give another folder"))
            continue
        few = free < 10 * GB
        rows.append(Row(name, WARN if few else OK, f"{folder}: {free / GB:.1f} GB free",
                        "a 7B model is 14 GB; free some, or give another" if few else ""))
    return rows


def hub() -> list[Row]:
    """Whether models and data sets can come from the Hugging Face hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return [Row("hub", OK, f"offline (HF_HUB_OFFLINE); folders, and {constants.HF_HUB_CACHE}")]
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()  # by a proxy, if one is set
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        return [Row("hub", WARN, f"{constants.ENDPOINT} cannot be reached ({error})",
                    "set HF_HUB_OFFLINE=1 and give folders; else every look-up waits")]
    return [Row("hub", OK, f"{constants.ENDPOINT} can be reached")]


def maths() -> list[Row]:
    """The losses and PPO's maths, on the device."""
    from alpaca_rlhf.utils import self_test

    return _tested("maths", self_test.maths(), f"{len(self_test.CASES)} numbers as by hand")


def generation() -> list[Row]:
    """Greedy replies in a padded batch and alone, on the device."""
    from alpaca_rlhf.utils import self_test

    return _tested("generation", self_test.generation(),
                   f"{len(self_test.PROMPTS)} replies in a batch as alone")


def _tested(name: str, wrong: list[str], right: str) -> list[Row]:
    if wrong:
        return [Row(name, FAIL, "; ".join(wrong), "do not train here; install the tested versions")]
    return [Row(name, OK, right)]


def meeting() -> list[Row]:
    """Whether the ranks add up, and how fast, when there are several."""
    import torch

    from alpaca_rlhf.utils import distributed

    ranks = distributed.world_size()
    if ranks == 1:
        return []
    numbers = torch.full((4_000_000,), float(distributed.rank() + 1), device=distributed.device())
    distributed.barrier()
    start = time.perf_counter()
    total = distributed.sum_over_ranks(numbers)[-1].item()
    speed = numbers.nbytes / GB / (time.perf_counter() - start)
    right = total == ranks * (ranks + 1) / 2
    return [Row("ranks", OK if right else FAIL,
                f"{ranks} ranks add up to {total:g}, {speed:.2f} GB/s",
                "" if right else "look at the network between the machines")]


def look(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a check; if it breaks down, that is the finding."""
    try:
        return check()
    except Exception as error:  # whatever is wrong with this machine, the other rows are wanted
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [Row(name, FAIL, found, "see docs/launching.md")]


def start() -> list[Row]:
    """Join the other ranks, if there are any."""
    from alpaca_rlhf.utils import distributed

    distributed.initialize(0)
    return []


def examine(places: dict[str, Path]) -> list[Row]:
    """All rows of this rank's machine."""
    checks: dict[str, Callable[[], list[Row]]] = {
        "versions": versions, "start": start, "devices": devices, "compiler": compiler,
        "port": ports, "shared memory": shared_memory, "disk": lambda: disks(places), "hub": hub,
        "maths": maths, "generation": generation, "ranks": meeting,
    }
    return [row for name, check in checks.items() for row in look(name, check)]


def table(rows: list[Row]) -> str:
    """Aligned, a remedy below its row."""
    lines = []
    for row in rows:
        lines.append(f"{row.status:<5} {row.name:<14} {row.found}")
        if row.remedy:
            lines.append(f"{'':<5} {'':<14} -> {row.remedy}")
    return "\n".join(lines)


def of_all_machines(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each machine, by its name; every rank calls it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return [(socket.gethostname(), rows)]
    from alpaca_rlhf.utils import distributed

    first_here = int(os.environ["LOCAL_RANK"]) == 0
    mine = (socket.gethostname(), [tuple(row) for row in rows])
    gathered = distributed.gather_rows([mine] if first_here else [])
    return [(host, [Row(*row) for row in found]) for host, found in gathered]


def main(argv: list[str] | None = None) -> int:
    """Look at everything, print the table; return the exit code."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alpaca_rlhf"
    parser = argparse.ArgumentParser(
        "doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output"),
                        help="where results are to go (default: output)")
    parser.add_argument("--data_output_path", type=Path, default=cache,
                        help="the cache of models and data (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    machines = of_all_machines(examine(
        {"output": options.output_dir, "cache": options.data_output_path}))
    counts = dict.fromkeys((OK, WARN, FAIL), 0)
    for host, rows in machines:
        for row in rows:
            counts[row.status] += 1
        if os.environ.get("RANK", "0") == "0":
            print(f"{host}\n{table(rows)}\n")
    if os.environ.get("RANK", "0") == "0":
        print(", ".join(f"{n} {status}" for status, n in counts.items())
              + f" ({time.perf_counter() - began:.0f} s)")
    return 1 if counts[FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
