"""From a checkpoint to a DeepSpeed engine that trains it, or to a frozen model that only infers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
from torch import nn

from alpaca_rlhf.utils import distributed, ds_config
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import LoadOptions
from alpaca_rlhf.utils.optimizer import create_optimizer, create_scheduler, parameter_groups

Engine = deepspeed.DeepSpeedEngine
Load = Callable[[LoadOptions, dict[str, Any]], Any]  # -> a Hugging Face model


@dataclass(frozen=True)
class ModelSettings:
    """How a model is loaded and trained.

    Attributes:
        load: precision, dropout, checkpointing.
        zero_stage, offload, overrides: for DeepSpeed (see `ds_config.make`).
        learning_rate: of everything that trains but the adapter.
        lora_learning_rate: of the adapter.
        weight_decay: of matrices.
        lora_rank: 0 trains the whole model.
        lora_alpha, lora_dropout: of the adapter.
        lora_modules, lora_flag: names or parts of names, and the flag they came from.
        only_lora: freeze what is neither adapter nor head.
        adam_eps: of AdamW.
        hybrid_engine: that section of DeepSpeed's configuration, if its own one is to generate.
    """

    load: LoadOptions
    zero_stage: int
    offload: bool
    overrides: str | None
    learning_rate: float
    lora_learning_rate: float | None
    weight_decay: float
    lora_rank: int
    lora_alpha: float | None
    lora_dropout: float
    lora_modules: str | None
    lora_flag: str
    only_lora: bool
    adam_eps: float = 1e-8
    hybrid_engine: dict[str, Any] | None = None

    @property
    def adapter_off_is_frozen(self) -> bool:
        """Whether the model without its adapter stays the model that was loaded."""
        return self.lora_rank > 0 and self.only_lora


@dataclass(frozen=True)
class Schedule:
    """Batches and learning-rate schedule, counted in optimizer steps.

    Attributes:
        micro_batch_size: rows of a backward pass on one rank.
        accumulation_steps: backward passes of an optimizer step.
        kind: of schedule.
        warmup_steps, total_steps: of the schedule.
    """

    micro_batch_size: int
    accumulation_steps: int
    kind: str
    warmup_steps: int
    total_steps: int


def build_trained(
    settings: ModelSettings,
    schedule: Schedule,
    load: Load,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> tuple[deepspeed.DeepSpeedEngine, str]:
    """Load a model, put LoRA in if asked for, and give it to DeepSpeed.

    Args:
        settings: of the model.
        schedule: of its optimizer.
        load: loads it with options and DeepSpeed's config.
        wrap: put around it, LoRA and all, before DeepSpeed has it.

    Returns:
        The engine, and a line that says what LoRA matched and what trains.
    """
    config = ds_config.make(
        zero_stage=settings.zero_stage, dtype=settings.load.dtype, offload=settings.offload,
        micro_batch_size=schedule.micro_batch_size,
        accumulation_steps=schedule.accumulation_steps, world_size=distributed.world_size(),
        overrides=settings.overrides,
    )
    if settings.hybrid_engine is not None:
        config["hybrid_engine"] = settings.hybrid_engine
    model = load(settings.load, config)
    targets = None
    if settings.lora_rank:
        targets = lora.match_modules(model, settings.lora_modules, settings.lora_flag)
        model = lora.add_lora(
            model, rank=settings.lora_rank, alpha=settings.lora_alpha or 2 * settings.lora_rank,
            dropout=settings.lora_dropout, targets=targets, only_lora=settings.only_lora,
        )
    summary = lora.describe_training(model, targets)
    groups = parameter_groups(
        model, settings.learning_rate, settings.lora_learning_rate or 0.0, settings.weight_decay
    )
    optimizer = create_optimizer(groups, settings.offload, settings.adam_eps)
    scheduler = create_scheduler(
        optimizer, schedule.kind, schedule.warmup_steps, schedule.total_steps
    )
    engine, *_ = deepspeed.initialize(
        model=wrap(model) if wrap else model, optimizer=optimizer, lr_scheduler=scheduler,
        config=config,
    )
    return engine, summary


def build_frozen(settings: ModelSettings, load: Load) -> nn.Module:
    """A model that only infers; sharded like its trained twin when that is under ZeRO-3."""
    config = ds_config.make(
        zero_stage=3 if settings.zero_stage == 3 else 0, dtype=settings.load.dtype,
        micro_batch_size=1, accumulation_steps=1, world_size=distributed.world_size(),
    )
    model = load(replace(settings.load, gradient_checkpointing=False), config)
    model.requires_grad_(False)
    if settings.zero_stage == 3:
        model, *_ = deepspeed.initialize(model=model, config=config)
    else:
        model.to(distributed.device())
    model.eval()
    return model
