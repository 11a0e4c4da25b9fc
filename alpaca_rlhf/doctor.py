"""Check whether this machine, or each of several, is ready for training.

    python -m alpaca_rlhf.doctor [--output_dir DIR] [--data_output_path DIR]
    python alpaca_rlhf/training_model/my_deepspeed.py --hostfile HOSTS --module alpaca_rlhf.doctor

Each row of the table is OK, a warning (WARN: training is possible) or an error (FAIL), with what to
do about it: versions, devices, memory, compiler, ports, shared memory, disks and the hub; then two
computations on the device, PPO's maths against values worked out by hand, and greedy responses in a
padded batch against the same prompts one by one. Started by the launcher, every machine prints its
table, and the ranks add up a tensor. The exit code is 1 if any row is a FAIL, else 0.
"""

import argparse
import importlib.metadata
import math
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
GB = 10**9
OK, WARN, FAIL = "OK", "WARN", "FAIL"
WRONG_RESULT = "do not train here; install the tested versions"
PROMPTS = [[5, 9, 2, 7, 3, 11, 6], [8, 4], [12, 3, 3, 10, 5]]


class Row(NamedTuple):
    """One finding, and what to do about it unless it is OK."""

    name: str
    status: str
    found: str
    remedy: str = ""


def tested_versions() -> dict[str, str]:
    """Return the versions of requirements.txt, from the file or from the installed package."""
    if REQUIREMENTS.exists():
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in importlib.metadata.requires("alpaca-rlhf") or []
                 if line.endswith('extra == "tested"')]
    pins = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {pin[1]: pin[2] for pin in pins if pin}


def versions() -> list[Row]:
    """Compare the libraries with the tested versions."""
    rows, install, tested = [], "pip install -r requirements.txt", tested_versions()
    for name, pin in tested.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(name, FAIL, "not installed", install))
            continue
        if version.split("+")[0] != pin:
            rows.append(Row(name, WARN, f"{version}, tested with {pin}", install))
    same = f"{len(tested) - len(rows)} of {len(tested)} libraries as tested"
    python = f"Python {platform.python_version()}; {same}"
    return [Row("versions", OK if tested else WARN, python, install), *rows]


def devices() -> list[Row]:
    """Join the other ranks, if there are any; describe accelerators and memory."""
    from alpaca_rlhf.utils import distributed

    distributed.initialize(0)
    device, host = distributed.free_memory()
    rows = [Row("devices", OK, distributed.describe_devices())]
    if distributed.on_cpu() and Path("/dev/nvidiactl").exists():
        rows = [Row("devices", FAIL, "an NVIDIA GPU that torch cannot use",
                    "install torch's CUDA build, and a driver that fits it")]
    free = f"{host / GB:.1f} GB free for each rank of this machine"
    if distributed.on_cpu():
        auto, gain = "bf16" if distributed.has_bf16() else "fp32", distributed.bf16_gain()
        rows.append(Row("bf16", OK, f"{gain:.1f} times as fast as fp32: --dtype auto is {auto}"))
    else:
        free = f"{device / GB:.1f} GB free on the device; host: {free}"
    few = min(device, host) < 4 * GB
    return [*rows, Row("memory", WARN if few else OK, free, "end other programs")]


def compiler() -> list[Row]:
    """Look for the compiler of --offload's optimizer and of the hybrid engine's loops."""
    from alpaca_rlhf.utils.optimizer import missing_build_tools

    missing = missing_build_tools()
    found = f"no {' and no '.join(missing)}" if missing else "C++ compiler and ninja"
    return [Row("compiler", WARN if missing else OK, found,
                "needed for --offload, and on a CPU the compiler for fast decoding")]


def ports() -> list[Row]:
    """Check the default port of --no_ssh, and that this machine's own name has an address."""
    from alpaca_rlhf.training_model.launching import NO_SSH_PORT, is_free

    free = is_free(NO_SSH_PORT)
    rows = [Row("port", OK if free else WARN, f"{NO_SSH_PORT} is {'free' if free else 'taken'}",
                "with --no_ssh give --master_port")]
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        rows.append(Row("host name", WARN, f"{socket.gethostname()} has no address",
                        "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"))
    return rows


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Row]:
    """Check the memory through which the ranks of one machine communicate."""
    if not folder.exists():
        return [Row("shared memory", OK, f"no {folder} on this system")]
    free = shutil.disk_usage(folder).free
    few = free < GB
    return [Row("shared memory", WARN if few else OK, f"{free / GB:.2f} GB free in {folder}",
                "1 GB or more; in a container --shm-size=8g or --ipc=host")]


def disk(name: str, folder: Path) -> list[Row]:
    """Check that a folder, which need not exist, can be written, and how much fits into it."""
    there = next(f for f in [folder.absolute(), *folder.absolute().parents] if f.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return [Row(name, FAIL, f"{folder}: {error.strerror}", "give another folder")]
    few = free < 10 * GB
    return [Row(name, WARN if few else OK, f"{folder}: {free / GB:.1f} GB free",
                "a 7B model is 14 GB; free some, or give another")]


def hub() -> list[Row]:
    """Check that models and data sets can be downloaded from the Hugging Face hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return [Row("hub", OK, f"offline (HF_HUB_OFFLINE); folders, and {constants.HF_HUB_CACHE}")]
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=3).close()  # by a proxy, if one is set
    except urllib.error.HTTPError:
        pass  # it has answered
    except OSError as error:
        return [Row("hub", WARN, f"{constants.ENDPOINT} cannot be reached ({error})",
                    "set HF_HUB_OFFLINE=1 and give folders; else every look-up waits")]
    return [Row("hub", OK, f"{constants.ENDPOINT} can be reached")]


def maths() -> list[Row]:
    """Compute losses and advantages on the device; compare with values worked out by hand."""
    import torch
    from torch import Tensor

    from alpaca_rlhf.utils import distributed, losses, rl_math

    def row(*values: float) -> Tensor:
        return torch.tensor([values], dtype=torch.float32, device=distributed.device())

    one, zero = row(1), row(0)
    mask = row(1, 1, 1, 0)  # a response of three tokens; the fourth must not count
    cases = {
        # log 2 + log(1 + e^-2)
        "pairwise loss": (losses.pairwise_loss(row(0, 2)[0], row(0, 0)[0]), [0.8200752]),
        # One token with ratio 1.5, which is clipped at 1.2.
        "policy loss": (losses.policy_loss(row(math.log(1.5)), zero, one, one, 0.2)[0], [-1.2]),
        # Half the larger of (1 - 2)^2 and, clipped, (0.2 - 2)^2.
        "value loss": (losses.value_loss(one, zero, 2 * one, one, 0.2)[0], [1.62]),
        # Backwards: 1 - 0.5; 0.95 x 0.5; 0.95 x 0.475.
        "advantages": (rl_math.gae(row(0, 0, 1, 7), row(0.5, 0.5, 0.5, 7), mask, 1.0, 0.95)[0],
                       [0.45125, 0.475, 0.5, 0.0]),
    }
    wrong = [f"{name}: {result.flatten().tolist()}, by hand {by_hand}"
             for name, (result, by_hand) in cases.items()
             if not torch.allclose(result.flatten(), row(*by_hand)[0], rtol=0, atol=1e-5)]
    return [Row("maths", FAIL if wrong else OK,
                "; ".join(wrong) or f"{len(cases)} results as by hand", WRONG_RESULT)]


def generation() -> list[Row]:
    """Compare the greedy responses of a small random LLaMA in a padded batch and one by one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alpaca_rlhf.utils import distributed
    from alpaca_rlhf.utils.configs import SamplingConfig
    from alpaca_rlhf.utils.data.batches import PromptBatch, pad
    from alpaca_rlhf.utils.generation.decoder import Decoder

    device = distributed.device()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Wide weights: where two tokens are nearly as likely, rounding decides between them.
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        )).to(device).eval()

    def responses(prompts: list[list[int]]) -> list[list[int]]:
        batch = PromptBatch(*pad(prompts, 0, left=True)).to(device)
        rollout = Decoder(model).generate(
            batch, SamplingConfig(12, temperature=0), torch.tensor([1], device=device), 0)
        return [row[kept.bool()].tolist()
                for row, kept in zip(rollout.responses, rollout.response_mask, strict=True)]

    together, alone = responses(PROMPTS), [responses([prompt])[0] for prompt in PROMPTS]
    wrong = [f"prompt {i}: {a} in a batch, {b} alone"
             for i, (a, b) in enumerate(zip(together, alone, strict=True)) if a != b]
    return [Row("generation", FAIL if wrong else OK,
                "; ".join(wrong) or f"{len(PROMPTS)} responses in a batch as alone", WRONG_RESULT)]


def ranks() -> list[Row]:
    """Sum a tensor over the ranks, if there are several, and measure the speed."""
    import torch

    from alpaca_rlhf.utils import distributed

    count = distributed.world_size()
    if count == 1:
        return []
    numbers = torch.full((4_000_000,), float(distributed.rank() + 1), device=distributed.device())
    distributed.barrier()
    start = time.perf_counter()
    total = distributed.sum_over_ranks(numbers)[-1].item()
    speed = numbers.nbytes / GB / (time.perf_counter() - start)
    right = total == count * (count + 1) / 2
    return [Row("ranks", OK if right else FAIL,
                f"{count} ranks add up to {total:g}, {speed:.2f} GB/s",
                "look at the network between the machines")]


def examine(places: dict[str, Path]) -> list[Row]:
    """Run all checks on this rank's machine, `places` being its disks by name.

    A check that raises is a finding, too.
    """
    checks: dict[str, Callable[[], list[Row]]] = {
        "versions": versions, "devices": devices, "compiler": compiler, "port": ports,
        "shared memory": shared_memory,
        **{name: partial(disk, name, folder) for name, folder in places.items()},
        "hub": hub, "maths": maths, "generation": generation, "ranks": ranks,
    }
    rows = []
    for name, check in checks.items():
        try:
            rows += check()
        except Exception as error:  # whatever is wrong with this machine, the other rows are wanted
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
            rows.append(Row(name, FAIL, found, "see docs/launching.md"))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run all checks, print the tables; return the exit code."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alpaca_rlhf"
    parser = argparse.ArgumentParser(
        "doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("output"),
                        help="folder for results (default: output)")
    parser.add_argument("--data_output_path", type=Path, default=cache,
                        help="cache of models and data (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    found = examine({"output": options.output_dir, "cache": options.data_output_path})
    machines = [(socket.gethostname(), found)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from alpaca_rlhf.utils import distributed

        machines = distributed.gather_rows(machines if distributed.is_first_on_node() else [])
    statuses = [row.status for _, rows in machines for row in rows]
    if os.environ.get("RANK", "0") == "0":
        for host, rows in machines:
            print(host)
            for row in rows:
                print(f"{row.status:<5} {row.name:<14} {row.found}")
                if row.status != OK:
                    print(f"{'':<5} {'':<14} -> {row.remedy}")
            print()
        print(", ".join(f"{statuses.count(status)} {status}" for status in (OK, WARN, FAIL))
              + f" ({time.perf_counter() - began:.0f} s)")
    return 1 if FAIL in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
