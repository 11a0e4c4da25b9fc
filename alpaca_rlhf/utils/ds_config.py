"""DeepSpeed's configuration from ZeRO stage, offloading, precision and batch sizes."""

import json
from pathlib import Path
from typing import Any

import torch

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import read_text

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
        _merge(config, json.loads(read_text(Path(overrides))), overrides)
    zero["stage"] = effective_stage(zero_stage, dtype)
    return config


# Keys of --deepspeed_config. A file may repeat what the flags say of these.
_BY_FLAGS = {
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size",
    "zero_optimization.stage", "bf16.enabled", "fp16.enabled",
}
# Decided by flags; dropped with a line that says so.
_DROPPED = {
    "optimizer": "--learning_rate, --weight_decay and --offload",
    "scheduler": "--lr_scheduler_type and --num_warmup_steps",
    "activation_checkpointing": "--gradient_checkpointing",
    "hybrid_engine": "--enable_hybrid_engine",
}
# What this program cannot honour, unless it is off.
_NO_QUANTIZATION = "sums of gradients and weights would no longer be those that are tested"
_REFUSED = {
    "zero_optimization.zero_quantized_weights": _NO_QUANTIZATION,
    "zero_optimization.zero_quantized_nontrainable_weights": _NO_QUANTIZATION,
    "zero_optimization.zero_quantized_gradients": _NO_QUANTIZATION,
    "zero_optimization.zenflow": "an optimizer step would not be complete when it ends",
    "zero_optimization.mics_shard_size": "checkpoints and generation expect whole ZeRO groups",
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has it",
    "fp16.fp16_master_weights_and_grads": "weights are updated in fp32",
    "bf16.bf16_master_weights_and_grads": "weights are updated in fp32",
    "bf16.bf16_optimizer_states": "moments are kept in fp32",
    "amp": "precision is that of --dtype",
    "torch_autocast": "precision is that of --dtype",
    "pipeline": "the models are not pipelines",
    "tensor_parallel": "every rank computes with the whole model",
    "sequence_parallel_size": "every rank computes whole sequences",
    "elasticity": "the number of ranks is fixed; checkpoints move to another one",
    "autotuning": "the launcher does not tune",
    "curriculum_learning": "the order of rows is that of --seed",
    "data_efficiency": "the order of rows is that of --seed",
    "progressive_layer_drop": "every forward pass runs all layers",
    "compression_training": "weights are not compressed",
    "quantize_training": "weights are not quantized",
    "sparse_attention": "attention is that of --attn_implementation",
    "gradient_allreduce_op": "a loss is a sum that is divided by the tokens of all ranks",
}
# Pass to DeepSpeed as they are, and so does everything below `_SECTIONS`.
_KNOWN = {
    "gradient_clipping", "communication_data_type", "prescale_gradients", "steps_per_print",
    "gradient_predivide_factor", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather",
}
_SECTIONS = {
    "zero_optimization", "bf16", "fp16", "data_types", "aio", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "csv_monitor", "comet", "checkpoint", "nebula", "compile",
}


def check_overrides(path: str, offload: bool) -> list[str]:
    """Check the keys of a --deepspeed_config, and return a line for each that has no effect.

    Args:
        path: of the JSON file.
        offload: whether --offload is given.

    Raises:
        UserError: it asks for what this program cannot honour.
    """
    extra, lines = json.loads(read_text(Path(path))), []
    zero = extra.get("zero_optimization") or {}
    nested = {f"{section}.{key}": value for section in ("zero_optimization", "bf16", "fp16")
              for key, value in (extra.get(section) or {}).items()}
    for key, value in {**extra, **nested}.items():
        if key in _REFUSED and _is_on(value):
            raise UserError(f"--deepspeed_config {path}: {key} is not supported: {_REFUSED[key]}; "
                            f"take {key} out of the file")
        if key in _DROPPED:
            lines.append(f"--deepspeed_config {path}: {key} has no effect: {_DROPPED[key]} decide")
        elif "." not in key and key not in _KNOWN | _SECTIONS | _BY_FLAGS | _REFUSED.keys():
            lines.append(f"warning: --deepspeed_config {path}: {key} is passed to DeepSpeed "
                         "untested")
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device not in ("none", "auto") and not offload:
        raise UserError(f"--deepspeed_config {path}: zero_optimization.offload_optimizer needs "
                        "another optimizer; give --offload too")
    return lines


def _is_on(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) not in (False, "auto")
    return value is True or value not in (None, False, "auto", "mean", 1, -1)


def _merge(
    config: dict[str, Any], extra: dict[str, Any], path: str, section: str = ""
) -> None:
    for key, value in extra.items():
        name = f"{section}{key}"
        if name in _DROPPED or value == "auto":
            continue
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value, path, f"{name}.")
        elif name not in _BY_FLAGS:
            config[key] = value
        elif value != config[key]:
            raise UserError(
                f"--deepspeed_config {path}: {name} is {value}, but the flags give {config[key]}; "
                f"take {name} out of the file"
            )
