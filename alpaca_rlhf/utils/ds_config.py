"""DeepSpeed's configuration from ZeRO stage, offloading, precision and batch sizes."""

import json
from pathlib import Path
from typing import Any

import torch

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.errors import UserError

MAX_GRAD_NORM = 1.0


def effective_stage(zero_stage: int, dtype: torch.dtype) -> int:
    """Return the ZeRO stage that trains: in bf16 and fp16 at least 2.

    Below it DeepSpeed 0.19 keeps no fp32 sum of bf16 gradients in the optimizer that checkpoints
    can be converted from, and without ZeRO it does not scale an fp16 loss at `backward`.
    """
    return zero_stage if dtype == torch.float32 else max(zero_stage, 2)


def make(
    *, zero_stage: int, dtype: torch.dtype, micro_batch_size: int = 1,
    accumulation_steps: int = 1, offload: bool = False, overrides: str | None = None,
) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`.

    Args:
        zero_stage: 0 to 3; see `effective_stage`.
        dtype: precision of the weights; gradients are summed, over micro-batches and ranks, and
            weights are updated in fp32.
        micro_batch_size: rows of a micro-batch on each rank.
        accumulation_steps: micro-batches of an optimizer step.
        offload: keep optimizer states, and under ZeRO-3 the weights, in host memory. (Without ZeRO
            nothing is offloaded.)
        overrides: path of a JSON file merged over the result.

    Raises:
        UserError: the file contradicts a batch size or the ZeRO stage given by flags.
    """
    zero_stage = effective_stage(zero_stage, dtype)
    zero: dict[str, Any] = {"stage": zero_stage}
    if offload and zero_stage:
        zero["offload_optimizer"] = {"device": "cpu"}
        if zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    if zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * distributed.world_size(),
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16, "loss_scale_window": 100},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if overrides:
        _merge(config, json.loads(Path(overrides).read_text()), overrides)
    return config


_BY_FLAGS = {
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "stage",
}


def _merge(config: dict[str, Any], extra: dict[str, Any], path: str) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value, path)
        elif key in _BY_FLAGS and value not in ("auto", config[key]):
            raise UserError(
                f"--deepspeed_config {path}: {key} is {value}, but the flags give {config[key]}; "
                f"take {key} out of the file"
            )
        elif value != "auto":
            config[key] = value
