"""From a saved model to a DeepSpeed engine that trains it, or to a frozen model for inference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import deepspeed
from deepspeed import DeepSpeedEngine as Engine
from peft import PeftModel
from torch import nn

from alpaca_rlhf.utils import distributed, ds_config
from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    EngineConfig,
    LoadingConfig,
    RoleConfig,
    ScheduleConfig,
)
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.optimizer import create_optimizer, create_scheduler, parameter_groups

LARGEST_BUCKET = 500_000_000  # DeepSpeed's default, in elements

# Role, loading and DeepSpeed's configuration -> a Hugging Face model.
Load = Callable[[RoleConfig, LoadingConfig, dict[str, Any]], Any]


def build_trained(
    load: Load, role: RoleConfig, *, loading: LoadingConfig, adapters: AdapterConfig,
    engine: EngineConfig, schedule: ScheduleConfig, micro_batch_size: int, total_steps: int,
    adam_eps: float = 1e-8, wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> tuple[Engine, str]:
    """Load a model, add LoRA if the role has it, and give it to DeepSpeed.

    Args:
        load: loads the model, which may have its adapter already.
        role, loading, adapters, engine, schedule: its options.
        micro_batch_size: rows of a micro-batch on each rank.
        total_steps: optimizer steps of the whole training.
        adam_eps: AdamW's epsilon.
        wrap: a module to put around the model, adapters included.

    Returns:
        The engine, and a line about LoRA and trainable parameters.
    """
    config = ds_config.make(
        zero_stage=role.zero_stage, dtype=distributed.resolve_dtype(loading.dtype),
        micro_batch_size=micro_batch_size,
        accumulation_steps=schedule.gradient_accumulation_steps,
        offload=engine.offload, overrides=engine.deepspeed_config,
    )
    if not role.gradient_checkpointing:
        distributed.keep_freed_memory()
    bits = adapters.bits if lora.base_is_frozen(role, adapters) else None
    model = load(role, replace(loading, bits=bits), config)
    targets = None
    if isinstance(model, PeftModel):
        targets = model.base_model.targeted_module_names
    elif role.lora_dim:
        targets = lora.match_modules(model, role)
        model = lora.add_lora(model, targets, role, adapters)
    summary = lora.describe_training(model, targets)
    if bits is not None:
        summary += f"; frozen linear layers in {bits} bits"
    # DeepSpeed's buffers for gradients need not be larger than all of them.
    sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad]
    config["zero_optimization"].setdefault("reduce_bucket_size", min(LARGEST_BUCKET, sum(sizes)))
    groups = parameter_groups(
        model, role.learning_rate, role.lora_learning_rate or 0.0, role.weight_decay
    )
    optimizer = create_optimizer(groups, engine.offload, adam_eps)
    scheduler = create_scheduler(
        optimizer, schedule.lr_scheduler_type, schedule.num_warmup_steps, total_steps
    )
    stage = config["zero_optimization"]["stage"]
    if stage != role.zero_stage:
        summary += f"; ZeRO stage {stage}, the lowest that trains right in {loading.dtype}"
    made, *_ = deepspeed.initialize(
        model=wrap(model) if wrap else model, optimizer=optimizer, lr_scheduler=scheduler,
        config=config,
    )
    if stage == 0 and distributed.world_size() == 1:
        made.enable_backward_allreduce = False  # it would copy the whole gradient for nothing
    return made, summary


def build_frozen(
    load: Load, role: RoleConfig, loading: LoadingConfig, engine: EngineConfig
) -> nn.Module:
    """Load a model for inference; under ZeRO-3 sharded, and offloaded, like the trained one."""
    config = ds_config.make(
        zero_stage=3 if role.zero_stage == 3 else 0,
        dtype=distributed.resolve_dtype(loading.dtype), offload=engine.offload,
    )
    model = load(replace(role, gradient_checkpointing=False), loading, config)
    model.requires_grad_(False)
    if role.zero_stage == 3:
        model, *_ = deepspeed.initialize(model=model, config=config)
    else:
        model.to(distributed.device())
    model.eval()
    return model
