"""A checkpoint for other ranks, or another ZeRO stage, than have written it.

DeepSpeed's universal format holds weights and optimizer states whole, by name, where a checkpoint
holds every rank's shards. What ZeRO 1 to 3 wrote is converted to it; without ZeRO a checkpoint is
whole already. From there the values are set, shard by shard, on whatever ranks and stage read them.
"""

import argparse
import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.engine import Engine
from alpaca_rlhf.utils.optimizer import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
Load = Callable[..., Any]


def deepspeeds_classes() -> list[Any]:
    """What DeepSpeed's files hold besides tensors and plain values."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [
        loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address
    ]


def load(engine: Engine, folder: Path, tag: str, read: Load) -> None:
    """Set an engine's weights, optimizer and schedule from a checkpoint; all ranks together.

    Args:
        engine: of the same model, the same parameters training.
        folder, tag: where `engine.save_checkpoint` wrote.
        read: path, device -> what a file holds, unpickling nothing but data.
    """
    source = folder / tag
    common = read(str(sorted(source.glob("*model_states.pt"))[0]), "cpu")
    zero = any(source.glob("*_optim_states.pt"))
    values = _sharded(source, read) if zero else _whole(engine, common)
    with values as (value_of, step):
        _set(engine, value_of, step)
    engine.lr_scheduler.load_state_dict(common["lr_scheduler"])
    for group, rate in zip(
        engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    engine.global_steps, engine.skipped_steps = common["global_steps"], common["skipped_steps"]


def _set(engine: Engine, value_of: Callable[[str, str], Tensor | None], step: float) -> None:
    """Weights and moments of every parameter that trains."""
    sharded = engine.zero_optimization()
    plain = engine.optimizer.optimizer if sharded else engine.optimizer
    if sharded:
        _make_states(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 gives its values flat, and has parameters of another shape than they seem.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        found = {kind: value_of(name, kind) for kind in ("fp32", *MOMENTS)}
        weight, *_ = values = [None if v is None else v.view(shape) for v in found.values()]
        assert weight is not None, f"{name} is not in the checkpoint"
        moments = dict(zip(MOMENTS, values[1:], strict=True))
        if sharded:
            safe_set_full_fp32_param(parameter, weight)
            # That sets what the optimizer holds; this, what computes.
            if hasattr(parameter, "ds_tensor"):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if distributed.is_main():
                        parameter.data.copy_(weight)
            else:
                parameter.data.copy_(weight)
            for kind, moment in moments.items():
                if moment is not None:
                    safe_set_full_optimizer_state(parameter, moment, kind)
        else:
            parameter.data.copy_(weight)
            plain.state[parameter] = {"step": torch.tensor(step)} | {
                kind: moment.to(parameter.device, torch.float32)
                for kind, moment in moments.items() if moment is not None
            }
    for state in plain.state.values():
        state["step"] = torch.tensor(step)


def _make_states(zero: Any) -> None:
    """ZeRO's moments, zero, where no step has made them yet."""
    shards = getattr(zero, "single_partition_of_fp32_groups", None)
    for shard in zero.fp32_partitioned_groups_flat if shards is None else shards:
        if not zero.optimizer.state[shard]:
            zero.optimizer.state[shard] = {"step": torch.tensor(0.0)} | {
                kind: torch.zeros_like(shard.data) for kind in MOMENTS
            }
    if shards is not None:
        zero._lazy_init_hp_params_optimizer_state()


@contextlib.contextmanager
def _whole(
    engine: Engine, common: dict[str, Any]
) -> Iterator[tuple[Callable[[str, str], Tensor | None], float]]:
    """What a checkpoint without ZeRO holds, by name: its optimizer counts parameters by group."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    order = [
        names[id(p)] for group in parameter_groups(engine.module, 0.0, 0.0, 0.0)
        for p in group["params"]
    ]
    states = common["optimizer"]["state"]
    by_name = {order[number]: state for number, state in states.items()}

    def value_of(name: str, kind: str) -> Tensor | None:
        if kind == "fp32":
            return common["module"][name].float()
        return by_name.get(name, {}).get(kind)

    yield value_of, max((float(state["step"]) for state in states.values()), default=0.0)


@contextlib.contextmanager
def _sharded(
    source: Path, read: Load
) -> Iterator[tuple[Callable[[str, str], Tensor | None], float]]:
    """What ZeRO has written, by name, through the universal format in a folder for the time."""
    made = source.with_name(f".{source.name}.universal")
    # The converter unpickles anything: so every file is read first by what unpickles only data.
    steps = [
        float(step) for path in sorted(source.rglob("*.pt"))
        for step in _steps(read(str(path), "cpu").get("optimizer_state_dict"))
    ]
    distributed.barrier()
    if distributed.is_main():
        # One that is there is of a conversion that was cut short.
        shutil.rmtree(made, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(argparse.Namespace(
                input_folder=str(source), output_folder=str(made), num_extract_workers=1,
                num_merge_workers=1, keep_temp_folder=False, strict=False,
                inject_missing_state=True,
            ))
    distributed.barrier()

    def value_of(name: str, kind: str) -> Tensor | None:
        path = made / "zero" / name / f"{kind}.pt"
        if not path.exists():
            return None
        held = torch.load(path, map_location="cpu", weights_only=True)
        return held["param"] if isinstance(held, dict) else held

    try:
        yield value_of, max(steps, default=0.0)
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(made, ignore_errors=True)
            made.with_name("latest_universal").unlink(missing_ok=True)


def _steps(held: Any) -> Iterator[Any]:
    """Every entry `step` in a file of ZeRO's: each stage nests it elsewhere."""
    if isinstance(held, dict):
        for key, value in held.items():
            if key == "step" and isinstance(value, int | float | Tensor):
                yield value
            else:
                yield from _steps(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _steps(value)
