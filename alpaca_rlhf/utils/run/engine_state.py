"""Weights, optimizer state and learning-rate schedule of a DeepSpeed engine, saved and loaded.

DeepSpeed writes one file for each rank and ZeRO shard. The ranks and the ZeRO stage that wrote a
checkpoint load it as it is. For others (`convert`) it goes through DeepSpeed's universal format,
which holds weights and optimizer states whole, by name; without ZeRO a checkpoint is whole already.
From there the values are set, shard by shard, on the ranks and the stage that load it.
"""

import argparse
import contextlib
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.engine import Engine
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.optimizer import parameter_groups
from alpaca_rlhf.utils.run.run_folder import write_durably

TAG = "engine"
MOMENTS = ("exp_avg", "exp_avg_sq")
ValueOf = Callable[[str, str], Tensor | None]  # name, "fp32" or a moment -> the whole tensor
# In DeepSpeed's files besides tensors and plain values.
DEEPSPEED_CLASSES = [LossScaler, DynamicLossScaler, fragment_address]


class CheckpointFiles(CheckpointEngine):
    """Writes and reads the files of a checkpoint, ours and DeepSpeed's.

    Files are forced to the disk. Only tensors and plain values are unpickled. An error while
    writing is noted, not raised: between DeepSpeed's barriers, a rank that raised would leave the
    others waiting. `errors` tells all ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self._error: str | None = None

    @contextlib.contextmanager
    def noting_errors(self, path: Path | str) -> Iterator[None]:
        """Inside, an error while writing to `path` is noted."""
        try:
            yield
        # torch's archive writer turns an exception of its file into a RuntimeError of its own.
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            self._error = self._error or f"{path}: {getattr(cause, 'strerror', None) or error}"

    def errors(self) -> list[str]:
        """Return the first error of each rank that had one; all ranks must call it together."""
        return distributed.gather_rows([self._error] if self._error else [])

    def create(self, info: Any) -> None:
        """Prepare nothing."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, of tensors and plain values."""
        with self.noting_errors(path):
            write_durably(Path(path), lambda file: torch.save(_plain(state_dict), file))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file.

        Raises:
            UserError: it holds more than tensors and plain values.
        """
        try:
            with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(f"{path}: holds more than data, or is damaged, and is not read; give "
                            "a checkpoint that a run has written") from None

    def commit(self, info: Any) -> bool:
        """Leave the manifest to `Checkpoints`."""
        return True


def _plain(state: Any) -> Any:
    """Return a state with the values of enums in their place: some Pythons pickle those as code."""
    if isinstance(state, Enum):
        return state.value
    if type(state) is dict:
        return {name: _plain(value) for name, value in state.items()}
    return state


def save(engine: Engine, folder: Path, files: CheckpointFiles) -> None:
    """Save an engine, without its frozen weights; all ranks together."""
    engine.checkpoint_engine = files
    # DeepSpeed would copy a script that turns shards into weights: exports and `load` do that here.
    engine._copy_recovery_script = lambda _: None
    # Collectives follow these two, after which rank 0 has written more than the others.
    engine._save_checkpoint = _then_barrier(Engine._save_checkpoint, engine)
    engine._save_zero_checkpoint = _then_barrier(Engine._save_zero_checkpoint, engine)
    engine.save_checkpoint(
        str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=_partly_frozen(engine)
    )


def _then_barrier(write: Callable[..., None], engine: Engine) -> Callable[..., None]:
    def together(*arguments: Any, **options: Any) -> None:
        write(engine, *arguments, **options)
        distributed.barrier()

    return together


def load(engine: Engine, folder: Path, files: CheckpointFiles, *, convert: bool) -> None:
    """Load an engine of the same model and trainable parameters; all ranks together.

    Args:
        convert: whether another number of ranks or another ZeRO stage saved it.

    Raises:
        UserError: the checkpoint does not fit the engine, or holds more than data.
    """
    if convert:
        _load_converted(engine, folder / TAG, files)
        return
    engine.checkpoint_engine = files
    loaded, _ = engine.load_checkpoint(
        str(folder), tag=TAG, load_module_strict=not _partly_frozen(engine)
    )
    if loaded is None:
        raise UserError(f"{folder}: this checkpoint is of another kind of model or ZeRO stage; "
                        "give the arguments it was written with")


def _partly_frozen(engine: Engine) -> bool:
    return not all(p.requires_grad for p in engine.module.parameters())


# --- conversion ----------------------------------------------------------------------------------


def _load_converted(engine: Engine, source: Path, files: CheckpointFiles) -> None:
    common = files.load(str(sorted(source.glob("*model_states.pt"))[0]), "cpu")
    step = float(common["global_steps"] - common["skipped_steps"])
    if any(source.glob("*_optim_states.pt")):
        with _universal(source, files) as value_of:
            _set_values(engine, value_of, step)
    else:
        _set_values(engine, _without_zero(engine, common), step)
    engine.lr_scheduler.load_state_dict(common["lr_scheduler"])
    for group, rate in zip(
        engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    engine.global_steps, engine.skipped_steps = common["global_steps"], common["skipped_steps"]


def _set_values(engine: Engine, value_of: ValueOf, step: float) -> None:
    """Set weights and moments of every trainable parameter."""
    sharded = engine.zero_optimization()
    plain = engine.optimizer.optimizer if sharded else engine.optimizer
    if sharded:
        _make_states(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 saves values flat, and its parameters have an empty shape between uses.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        found = {kind: value_of(name, kind) for kind in ("fp32", *MOMENTS)}
        values = {kind: v.view(shape) for kind, v in found.items() if v is not None}
        weight = values.pop("fp32")
        if sharded:
            safe_set_full_fp32_param(parameter, weight)
            # That set the optimizer's copy; this sets the weights that compute.
            if hasattr(parameter, "ds_tensor"):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if distributed.is_main():
                        parameter.data.copy_(weight)
            else:
                parameter.data.copy_(weight)
            for kind, moment in values.items():
                safe_set_full_optimizer_state(parameter, moment, kind)
        else:
            parameter.data.copy_(weight)
            plain.state[parameter] = {
                kind: moment.to(parameter.device, torch.float32)
                for kind, moment in values.items()
            }
    for state in filter(None, plain.state.values()):
        state["step"] = torch.tensor(step)


def _make_states(zero: Any) -> None:
    """Make ZeRO's moments, all 0, where no step has made them yet."""
    shards = getattr(zero, "single_partition_of_fp32_groups", None)
    for shard in zero.fp32_partitioned_groups_flat if shards is None else shards:
        if not zero.optimizer.state[shard]:
            zero.optimizer.state[shard] = {"step": torch.tensor(0.0)} | {
                kind: torch.zeros_like(shard.data) for kind in MOMENTS
            }
    if shards is not None:
        zero._lazy_init_hp_params_optimizer_state()


def _without_zero(engine: Engine, common: dict[str, Any]) -> ValueOf:
    """Return the values of a checkpoint without ZeRO, by name.

    Its optimizer numbers the parameters in the order of `parameter_groups`.
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    order = [
        names[id(p)] for group in parameter_groups(engine.module, 0.0, 0.0, 0.0)
        for p in group["params"]
    ]
    moments = {order[i]: state for i, state in common["optimizer"]["state"].items()}

    def value_of(name: str, kind: str) -> Tensor | None:
        if kind == "fp32":
            return common["module"][name].float()
        return moments.get(name, {}).get(kind)

    return value_of


@contextlib.contextmanager
def _universal(source: Path, files: CheckpointFiles) -> Iterator[ValueOf]:
    """Give the values of a checkpoint with ZeRO, by name, from a temporary folder beside it."""
    made = source.with_name(f".{source.name}.universal")
    # The converter unpickles anything, so every file is read first in a way that does not.
    for path in sorted(source.rglob("*.pt")):
        files.load(str(path), "cpu")
    distributed.barrier()
    if distributed.is_main():
        # A conversion that was cut short may have left one.
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
        yield value_of
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(made, ignore_errors=True)
            made.with_name("latest_universal").unlink(missing_ok=True)
        distributed.barrier()
