"""Parameter groups, the optimizer for the device, and the learning-rate schedule."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from alpaca_rlhf.utils.errors import UserError

BETAS = (0.9, 0.95)
LONGEST_BUILD = 600  # seconds that a compilation of DeepSpeed's CPU optimizer may take


def parameter_groups(
    model: nn.Module, learning_rate: float, lora_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trainable parameters: adapters, other matrices, and the rest without decay.

    Biases and norm weights (one dimension) have no weight decay. Empty groups are left out.
    """
    groups: dict[str, dict[str, Any]] = {
        "lora": {"lr": lora_learning_rate, "weight_decay": weight_decay, "params": []},
        "decay": {"lr": learning_rate, "weight_decay": weight_decay, "params": []},
        "no_decay": {"lr": learning_rate, "weight_decay": 0.0, "params": []},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Under ZeRO-3 a parameter's own shape is that of its shard.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        kind = "lora" if "lora_" in name else "decay" if dimensions > 1 else "no_decay"
        groups[kind]["params"].append(parameter)
    return [{"name": kind, **group} for kind, group in groups.items() if group["params"]]


def missing_build_tools() -> list[str]:
    """Return the tools that this machine lacks to compile an extension, with their remedies."""
    missing = []
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        missing.append(f"C++ compiler ({compiler}; Debian and Ubuntu: apt-get install g++)")
    # Also where the virtual environment is not active.
    path = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])
    if shutil.which("ninja", path=path) is None:
        missing.append("ninja (pip install ninja)")
    return missing


def require_offloading() -> None:
    """Check that the optimizer for offloaded states can be built.

    Raises:
        UserError: it would have to be compiled, and tools are missing, or an earlier compilation
            was killed.
    """
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get("cpu_adam"):
        return
    missing = missing_build_tools()
    if missing:
        raise UserError("--offload: DeepSpeed compiles its CPU optimizer at first use, and there "
                        f"is no {' and no '.join(missing)}; install it, or leave --offload out")
    here = os.path.dirname(sys.executable)
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + here
    _check_build_lock()


def _check_build_lock() -> None:
    """Refuse the lock of a compilation that was killed: torch would wait for it without end.

    Raises:
        UserError: the lock is older than any compilation takes.
    """
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("cpu_adam", False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > LONGEST_BUILD:
        raise UserError(f"--offload: {lock} was left by a compilation of DeepSpeed's CPU optimizer "
                        f"that was killed, and would be waited for; delete {lock.parent}")


def create_optimizer(
    groups: list[dict[str, Any]], offload: bool = False, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """Build AdamW with betas (0.9, 0.95): torch's fused one, or DeepSpeed's for offloading."""
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=BETAS, eps=eps, adamw_mode=True)
    return torch.optim.AdamW(groups, betas=BETAS, eps=eps, fused=True)


def create_scheduler(
    optimizer: torch.optim.Optimizer, kind: str, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build a learning-rate schedule counted in optimizer steps."""
    return get_scheduler(
        kind, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max(1, total_steps)
    )
