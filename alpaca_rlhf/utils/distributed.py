"""Ranks, devices, seeds, reductions and memory; no other module asks for the kind of device.

A process that no launcher has started becomes rank 0 of a world of size 1.

Tensors are exchanged in the default process group, where a rank that hangs ends the run after
`--collective_timeout`. Ranks wait for work on the host, such as tokenizing or writing an export,
in a gloo group whose timeout is a day: there a rank that ends closes its connections, which ends
the others at once. Host work that only some ranks do is followed by `barrier`, so that no
collective on tensors waits for it.
"""

import contextlib
import ctypes
import datetime
import functools
import importlib.util
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import TorchBackend
from torch import Tensor

from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.errors import TrainingStopped, UserError

# Set by `my_deepspeed.py --debug_ranks N,N --debug_port N`; the launcher passes them to each host.
DEBUG_RANKS, DEBUG_PORT = "ALPACA_RLHF_DEBUG_RANKS", "ALPACA_RLHF_DEBUG_PORT"
NO_DEBUGPY = "--debug_ranks needs debugpy: pip install debugpy"
HOST_TIMEOUT = datetime.timedelta(days=1)  # of waiting for another rank's work on the host
WORTH_BF16 = 1.5  # times as fast as fp32, from which on `--dtype auto` is bf16 on a CPU
# glibc's mallopt: free memory at the heap's end that is returned; from which size on blocks lie
# outside the heap; how many may.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
OMPI_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"


@dataclass
class _Place:
    """Place of this process among the ranks, set by `initialize`.

    Attributes:
        first_on_node: whether its local rank is 0.
        local_size: number of ranks on its node.
        host_group: the group for work on the host; None if this is the only rank.
        returns_memory: whether freed memory goes back to the system.
    """

    first_on_node: bool = True
    local_size: int = 1
    host_group: dist.ProcessGroup | None = None
    returns_memory: bool = False


_place = _Place()


def initialize(seed: int, timeout: int = 1800) -> None:
    """Join the process group and seed every random generator.

    Every rank gets the same seed; what differs by rank, such as sampling, has its own generator.

    Args:
        seed: seed of Python's, numpy's and torch's generators.
        timeout: seconds that a rank waits for the others in a collective.

    Raises:
        UserError: mpirun has not said where rank 0 is, or a debugger cannot attach.
    """
    set_rank()
    wait_for_debugger()
    if os.environ.get(DEBUG_RANKS):
        timeout = 7 * 24 * 3600  # the other ranks wait for the one at a breakpoint
    import deepspeed

    console.quiet_libraries()
    _place.first_on_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not on_cpu():
        _choose_device()
    # Only DeepSpeed's own inference uses this extension. On a CPU the first start would compile it,
    # which takes a minute and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    limit = datetime.timedelta(seconds=timeout)
    deepspeed.init_distributed(verbose=False, timeout=limit)
    # ZeRO's own groups would have torch's default, 10 minutes with NCCL.
    TorchBackend.new_group = lambda self, ranks: dist.new_group(ranks, timeout=limit)
    _place.host_group = None
    if world_size() > 1:
        _place.host_group = dist.new_group(backend="gloo", timeout=max(limit, HOST_TIMEOUT))
    hosts = gather_rows([socket.gethostname()])
    # srun and mpirun do not set LOCAL_SIZE.
    _place.local_size = int(os.environ.get("LOCAL_SIZE") or hosts.count(socket.gethostname()))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _choose_device() -> None:
    """Take a device, and make LOCAL_RANK its index, which DeepSpeed reads there.

    They differ where srun shows each rank its own device only.
    """
    index = int(os.environ["LOCAL_RANK"]) % get_accelerator().device_count()
    get_accelerator().set_device(index)
    os.environ["LOCAL_RANK"] = str(index)
    if OMPI_LOCAL_RANK in os.environ:  # DeepSpeed refuses two that differ
        os.environ[OMPI_LOCAL_RANK] = str(index)


# RANK, WORLD_SIZE and LOCAL_RANK by the names of mpirun and srun.
_OTHER_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", OMPI_LOCAL_RANK),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def set_rank() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous, unless a launcher has.

    They are those of mpirun or srun if MASTER_ADDR says where rank 0 is; without it a plain
    `python main.py` in a slurm job would wait for others. Otherwise this is the only process.

    Raises:
        UserError: one of several processes of mpirun, without MASTER_ADDR.
    """
    if "RANK" in os.environ:
        return
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for names in _OTHER_NAMES:
        if "MASTER_ADDR" in os.environ and all(name in os.environ for name in names):
            os.environ.setdefault("MASTER_PORT", "29500")
            os.environ.update(zip(alone, map(os.environ.__getitem__, names), strict=True))
            return
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UserError("mpirun has started several processes, but MASTER_ADDR is not set; start "
                        "them with my_deepspeed.py --launcher openmpi, or with mpirun -x "
                        "MASTER_ADDR=HOST")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def wait_for_debugger() -> None:
    """Wait until a debugger is attached, if `my_deepspeed.py --debug_ranks` names this rank.

    The rank listens on this host only, because a debugger may run any code; a worker of another
    host is reached through `ssh -L`.

    Raises:
        UserError: debugpy is not installed here, or the port is taken.
    """
    rank = os.environ["RANK"]
    if rank not in os.environ.get(DEBUG_RANKS, "").split(","):
        return
    if importlib.util.find_spec("debugpy") is None:
        raise UserError(NO_DEBUGPY)
    # Else debugpy warns at each start about frozen modules, where we set no breakpoint.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    import debugpy

    port = int(os.environ[DEBUG_PORT]) + int(rank)
    try:
        debugpy.listen(("127.0.0.1", port))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--debug_port {os.environ[DEBUG_PORT]}: rank {rank} cannot listen on port {port} "
            f"({' '.join(str(error).split())}); give another"
        ) from error
    sys.stdout.write(f"rank {rank} waits for a debugger on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    debugpy.wait_for_client()


def on_cpu() -> bool:
    """Return whether this machine has no accelerator."""
    return get_accelerator().device_name() == "cpu"


def device() -> torch.device:
    """Return the device of this rank."""
    return torch.device(get_accelerator().current_device_name())


def has_bf16() -> bool:
    """Return whether this machine computes in bf16, and not slowly.

    torch reports bf16 as supported also where it is emulated, which is slower than fp32 (GPUs
    before Ampere, most CPUs).
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bf16_gain() >= WORTH_BF16 if on_cpu() else accelerator.is_bf16_supported()


@functools.cache
def bf16_gain() -> float:
    """Return how many times as fast as in fp32 this CPU multiplies matrices in bf16.

    The median of some products in turn, the first of which do not count, on one thread: other
    load on the machine then slows down both. It takes less than 0.1 s, also where bf16 crawls.
    """
    sides = [(torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
             for dtype in (torch.float32, torch.bfloat16)]
    gains: list[float] = []
    threads, end = torch.get_num_threads(), time.perf_counter() + 0.05
    torch.set_num_threads(1)
    while len(gains) < 4 or (len(gains) < 16 and time.perf_counter() < end):
        times = [time.perf_counter()]
        for x, weight in sides:
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter())
        gains.append((times[1] - times[0]) / (times[2] - times[1]))
    torch.set_num_threads(threads)
    return statistics.median(gains[1:])


@functools.cache  # step 3 asks for each of its roles
def _auto_dtype(ranks: int) -> torch.dtype:
    """Return the dtype of `--dtype auto`, the same on all `ranks`; say why where it may surprise.

    The slowest CPU decides for all.
    """
    if on_cpu():
        gain = min(gather_rows([bf16_gain()]))
        if bf16 := gain >= WORTH_BF16:
            console.say(f"--dtype auto: bf16, because this CPU multiplies matrices {gain:.1f} "
                        "times as fast as in fp32")
    elif not (bf16 := has_bf16()):
        console.say("--dtype auto: this accelerator has no bf16, so it is fp32; --dtype fp16 is "
                    "faster and takes less memory")
    return torch.bfloat16 if bf16 else torch.float32


def resolve_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name: fp32, bf16, fp16 or auto (bf16 if it is fast here).

    On a CPU `auto` is a collective the first time.

    Raises:
        UserError: fp16 on a CPU without it, or bf16 on an accelerator without it.
    """
    if name == "auto":
        return _auto_dtype(world_size())
    if name == "fp16" and on_cpu() and not get_accelerator().is_fp16_supported():
        raise UserError("--dtype fp16: this CPU does not train in fp16; take fp32 or bf16")
    if name == "bf16" and not (on_cpu() or has_bf16()):
        raise UserError("--dtype bf16: this accelerator has no bf16; take fp16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and messages."""
    return rank() == 0


def is_first_on_node() -> bool:
    """Return whether this is the first process of its node, which fills the node's caches."""
    return _place.first_on_node


def barrier() -> None:
    """Wait for every rank, for as long as its work on the host takes."""
    if world_size() > 1:
        # Unlike dist.barrier, this needs nothing of the device.
        dist.all_reduce(torch.zeros(1), group=_place.host_group)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Wait for every rank after the body, and raise on all of them if it raises on one.

    Raises:
        TrainingStopped: on the ranks whose own body did not raise.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = gather_rows([str(failure)] if failure else [])
    if failure:
        raise failure
    if failures:
        raise TrainingStopped(f"another rank failed: {failures[0]}")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise sum of a tensor of any shape over ranks, on every rank."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise maximum of a tensor of any shape over ranks, on every rank."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values, op=op)
    return values


def gather(values: Tensor) -> Tensor:
    """Return the tensors of all ranks, of one shape [...], as [ranks, ...] on every rank."""
    if world_size() == 1:
        return values.unsqueeze(0)
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def gather_rows(rows: list) -> list:
    """Concatenate lists of picklable rows in the order of the ranks, on every rank."""
    if world_size() == 1:
        return rows
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, rows, _place.host_group)
    return [row for part in parts for row in part]


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the body in one process of each node, then in the others, which find its files."""
    if not is_first_on_node():
        barrier()
    yield
    barrier()
    if is_first_on_node():
        barrier()


def usable_cores() -> int:
    """Return the number of cores this process may run on (all of them on macOS)."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def describe_devices() -> str:
    """Describe this machine's accelerators, or the cores that this process may run on."""
    if on_cpu():
        return (f"no accelerator; {usable_cores()} cores of the CPU, "
                f"{torch.get_num_threads()} thread(s)")
    accelerator = get_accelerator()
    name = accelerator.device_name()
    if name == "cuda":
        name = torch.cuda.get_device_name()
    precision = "bf16" if has_bf16() else "no bf16: --dtype auto is fp32"
    size = accelerator.total_memory() / 1e9
    return f"{accelerator.device_count()} x {name}, {size:.0f} GB each, {precision}"


# Limit and use of a container's memory, in control groups of version 2 and 1.
_CONTAINER = (("memory.max", "memory.current"),
              ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """Return the free bytes of this rank's device, and its share of the free host memory.

    On a CPU both are the same memory. The limit of a container counts.
    """
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in _CONTAINER:
        if (groups / limit).exists() and (groups / used).exists():
            allowed = (groups / limit).read_text().strip()
            if allowed != "max":
                free = min(free, int(allowed) - int((groups / used).read_text()))
    host = max(0, free) / _place.local_size
    return host if on_cpu() else get_accelerator().available_memory(), host


def return_freed_memory() -> None:
    """Let a CPU's large tensors go back to the system when they are freed.

    glibc keeps blocks of up to 32 MB in its heap once one was freed, and what is allocated between
    them leaves gaps: nearly as much memory again as the tensors that gradient checkpointing keeps.
    """
    _place.returns_memory = True
    _mallopt({M_MMAP_MAX: 2**16, M_TRIM_THRESHOLD: 2**17, M_MMAP_THRESHOLD: 2**20})


def keep_freed_memory() -> None:
    """Keep what a CPU's tensors free for those of the next step, unless it is to be returned.

    The system clears fresh memory page by page, which takes longer than many an operation on it.
    """
    if not _place.returns_memory:
        _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def _mallopt(values: dict[int, int]) -> None:
    if not on_cpu() or any(name.startswith("MALLOC_") for name in os.environ):
        return  # what the user has chosen stays
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for name, value in values.items():
            ctypes.CDLL(None).mallopt(name, value)


def memory_gb() -> float:
    """Return this rank's peak memory so far in GB, on a CPU that of the process."""
    if on_cpu():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return get_accelerator().max_memory_allocated() / 1e9
