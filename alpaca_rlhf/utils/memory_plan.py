"""Whether the models of a run fit, told from their configurations before anything is loaded.

Counted are weights, gradients and the optimizer's state of one rank: a lower bound, since what a
batch takes (activations, logits, the KV cache) comes on top. Sources: Rajbhandari et al. 2020
(ZeRO), section 3, for the bytes a parameter, and Hu et al. 2021 (LoRA) for the adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.engine import ModelSettings
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import load_config

GB = 1e9
MOMENTS, MASTER_COPY = 8, 4  # bytes a trained parameter: Adam's two in fp32; the weight in fp32


@dataclass(frozen=True)
class Planned:
    """A model that a run trains.

    Attributes:
        path: hub id or folder.
        settings: how it is loaded and trained.
        prefix: of its flags, such as "actor_".
        scores: loaded as a sequence classifier with one label, not as a causal LM.
        has_twin: whether an untrained one of it is needed too (the reference, the reward model).
    """

    path: str
    settings: ModelSettings
    prefix: str = ""
    scores: bool = False
    has_twin: bool = False


@dataclass(frozen=True)
class Size:
    """Parameters of a model: all, and those trained."""

    total: int
    trained: int


@dataclass(frozen=True)
class Need:
    """Bytes of one rank: on its device and in host memory; `weights` are a part of these."""

    device: float
    host: float
    weights: float


def size(model: Planned) -> Size:
    """Count its parameters, without making them.

    Raises:
        UserError: there is no such model, or `--lora_module_name` matches nothing in it.
    """
    settings = model.settings
    config = load_config(model.path, settings.load)
    kind = AutoModelForSequenceClassification if model.scores else AutoModelForCausalLM
    if model.scores:
        config.num_labels = 1
    with torch.device("meta"):
        made = kind.from_config(config, trust_remote_code=settings.load.trust_remote_code)
    total = sum(weight.numel() for weight in made.parameters())
    if not settings.lora_rank:
        return Size(total, total)
    targets = lora.match_modules(made, settings.lora_modules, settings.lora_flag)
    sides = (made.get_submodule(name).weight.shape for name in targets)
    adapter = sum(settings.lora_rank * sum(side) for side in sides)
    return Size(total + adapter, adapter if settings.only_lora else total + adapter)


def need(models: Sequence[Planned], ranks: int) -> Need:
    """What the models take of one of `ranks` ranks."""
    device = host = weights = 0.0
    for model in models:
        settings, count = model.settings, size(model)
        stage, width = settings.zero_stage, settings.load.dtype.itemsize
        copies = 2 if model.has_twin and not settings.adapter_off_is_frozen else 1
        held = copies * count.total * width / (ranks if stage == 3 else 1)
        gradients = count.trained * width / (ranks if stage >= 2 else 1)
        state = MOMENTS + (MASTER_COPY if width < MASTER_COPY else 0)
        optimizer = count.trained * state / (ranks if stage >= 1 else 1)
        aside = (optimizer + (held if stage == 3 else 0)) if settings.offload else 0.0
        device += held + gradients + optimizer - aside
        host += aside
        weights += held
    return Need(device, host, weights)


def fits(wanted: Need) -> bool:
    """Whether a rank has that much free."""
    device, host = distributed.free_memory()
    if distributed.on_cpu():
        return wanted.device + wanted.host <= host
    return wanted.device <= device and wanted.host <= host


# What saves memory, the cheapest first: flags of a model, and its settings under them.
Saving = tuple[str, ModelSettings]


def _in_bf16(model: Planned, ranks: int) -> Saving | None:
    load = model.settings.load
    if load.dtype != torch.float32 or not distributed.has_bf16():
        return None
    return "--dtype bf16", replace(model.settings, load=replace(load, dtype=torch.bfloat16))


def _sharded(model: Planned, ranks: int) -> Saving | None:
    if ranks == 1 or model.settings.zero_stage == 3:
        return None
    return f"--{model.prefix}zero_stage 3", replace(model.settings, zero_stage=3)


def _with_adapter(model: Planned, ranks: int) -> Saving | None:
    if model.settings.lora_rank:
        return None
    changed = replace(model.settings, lora_rank=16, only_lora=True)
    return f"--{model.prefix}lora_dim 16", changed


def _offloaded(model: Planned, ranks: int) -> Saving | None:
    if model.settings.offload or distributed.on_cpu():
        return None
    if model.settings.zero_stage == 3:
        return "--offload", replace(model.settings, offload=True)
    # Below stage 3 the weights would stay, and at 0 there is no offloading.
    flags = f"--offload --{model.prefix}zero_stage 3"
    return flags, replace(model.settings, offload=True, zero_stage=3)


SAVINGS = (_in_bf16, _sharded, _with_adapter, _offloaded)


def remedy(models: Sequence[Planned], ranks: int) -> str:
    """The flags under which the models would fit."""
    now = list(models)
    flags: list[str] = []
    for saving in SAVINGS:
        for i, model in enumerate(now):
            changed = saving(model, ranks)
            if changed is not None:
                flags.append(changed[0])
                now[i] = replace(model, settings=changed[1])
        if flags and fits(need(now, ranks)):
            return f"try {' '.join(dict.fromkeys(flags))}"
    return "take a smaller model, or more ranks and --zero_stage 3"


def check(models: Sequence[Planned]) -> str | None:
    """A warning when the models will not fit, with the flags that would help; None when they do.

    Raises:
        UserError: not even the weights fit.
    """
    ranks = distributed.world_size()
    wanted = need(models, ranks)
    if fits(wanted):
        return None
    device, host = distributed.free_memory()
    free = f"{device / GB:.1f} GB are free"
    if not distributed.on_cpu():
        free += f" on the device and {host / GB:.1f} GB in host memory"
    if wanted.weights > (host if distributed.on_cpu() else device + host):
        raise UserError(f"the weights alone take {wanted.weights / GB:.1f} GB on each rank, and "
                        f"{free}; {remedy(models, ranks)}")
    takes = f"{wanted.device / GB:.1f} GB"
    if wanted.host:
        takes += f" and {wanted.host / GB:.1f} GB of host memory"
    return (f"warning: weights, gradients and optimizer take {takes} on each rank, activations "
            f"not counted, and {free}; {remedy(models, ranks)}")
