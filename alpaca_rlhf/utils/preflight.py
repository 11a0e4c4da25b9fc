"""Checks before data are read and models are loaded, of what would otherwise fail late.

The memory plan counts weights, gradients and optimizer states of one rank from the models'
configurations: a lower bound, since activations, logits and the KV cache come on top. Sources:
Rajbhandari et al. 2020 (ZeRO), section 3, for the bytes per parameter; Hu et al. 2021 (LoRA) for
the adapters.
"""

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from alpaca_rlhf.utils import console, distributed, ds_config, optimizer
from alpaca_rlhf.utils.configs import AdapterConfig, EngineConfig, LoadingConfig, RoleConfig
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import pointer_problem
from alpaca_rlhf.utils.logging import tracker
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import attention, is_multimodal, load_config
from alpaca_rlhf.utils.model.quantized import require_quantizer
from alpaca_rlhf.utils.model.reward_model import require_reward_model

GB = 1e9
# Bytes per trained parameter, in fp32: Adam's moments; master weights; sums of gradients.
MOMENTS, MASTER_COPY, GRADIENT = 8, 4, 4
# What is read of a hub id besides weights: configuration, tokenizer and chat template.
DESCRIPTIONS = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]


@dataclass(frozen=True)
class Planned:
    """A model that a run trains."""

    role: RoleConfig
    loading: LoadingConfig
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    scores: bool = False  # a sequence classifier with one label instead of a causal LM
    # The model as it was loaded is needed too (the reference model, the reward model).
    needs_frozen_copy: bool = False
    offloads_frozen_copy: bool = False
    # Longest sequence in tokens, and the flags that it comes from.
    length: int = 0
    length_flags: str = ""
    decodes: bool = False  # rows of different lengths, padded left, as step 3 does

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return distributed.resolve_dtype(self.loading.dtype)

    @property
    def bits(self) -> int | None:
        """Bits of the weights of linear layers if they are quantized."""
        return self.adapters.bits if lora.base_is_frozen(self.role, self.adapters) else None


class Need(NamedTuple):
    """Bytes of one rank on its device and in host memory; `weights` are part of these."""

    device: float
    host: float
    weights: float


def check(models: Sequence[Planned], trackers: Sequence[str] = ()) -> None:
    """Check that models can be found, optimizers and trackers built, and that all of it fits.

    Raises:
        UserError: a hub model is not in the cache and there is no network; a compiler or a
            tracker's package is missing; --deepspeed_config asks for what is not supported; the
            weights do not fit; a model is of a kind that is not served, or the critic is no
            reward model. A folder that is no model is left to its loader.
    """
    tracker.require_packages(trackers)
    paths = [model.role.model_name_or_path for model in models]
    for path in [*paths, models[0].loading.tokenizer_name_or_path]:
        if path is not None:
            require_cached(path)
    fetch(models)
    for model in models:
        require_weights(model.role.model_name_or_path)
        if model.scores and model.decodes:
            require_reward_model(model.role, model.loading)
    engine = models[0].engine
    if engine.deepspeed_config:
        for line in ds_config.check_overrides(engine.deepspeed_config, engine.offload):
            console.say(line)
    if engine.offload:
        optimizer.require_offloading()
    if all(_is_hub_id(path) or (Path(path) / "config.json").exists() for path in paths):
        for line in dict.fromkeys(line for model in models for line in require_served(model)):
            console.say(line)
        warning = memory_warning(models)
        if warning:
            console.say(warning)


def require_cached(path: str) -> None:
    """Refuse a hub id that is not in the cache when HF_HUB_OFFLINE is set.

    Raises:
        UserError: names the cache, and how to fill it.
    """
    if not (_is_hub_id(path) and constants.HF_HUB_OFFLINE):
        return
    wanted = ("config.json", "tokenizer_config.json", "tokenizer.json")
    if any(isinstance(try_to_load_from_cache(path, name), str) for name in wanted):
        return
    raise UserError(
        f"{path}: no such folder, HF_HUB_OFFLINE is set, and the hub's cache "
        f"({constants.HF_HUB_CACHE}) has nothing of that name; give a folder, unset "
        f"HF_HUB_OFFLINE, or fill the cache where there is a network (hf download {path})"
    )


def require_weights(path: str) -> None:
    """Raise UserError where a folder's weights or configuration are pointers of git LFS."""
    folder = Path(path)
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in [*folder.glob("config.json"), *weights]:
        if problem := pointer_problem(file):
            raise UserError(f"no model can be loaded from {path}: its {file.name} is {problem}")


def fetch(models: Sequence[Planned]) -> None:
    """Fetch what loading will read of hub ids, by one process of each node; the others wait."""
    loading = models[0].loading
    paths = {model.role.model_name_or_path: True for model in models}
    if loading.tokenizer_name_or_path is not None:
        paths.setdefault(loading.tokenizer_name_or_path, False)
    if distributed.is_first_on_node() and not constants.HF_HUB_OFFLINE:
        for path, weights in paths.items():
            if _is_hub_id(path):
                _fetch(path, weights, loading.trust_remote_code)
    distributed.barrier()


def _fetch(path: str, weights: bool, code: bool) -> None:
    wanted = [*DESCRIPTIONS, *["*.py"] * code, *["model*.safetensors"] * weights]
    in_folders = "*/*"  # other formats, and training states
    try:
        folder = snapshot_download(path, allow_patterns=wanted, ignore_patterns=in_folders)
        if weights and not any(Path(folder).glob("model*.safetensors")):
            snapshot_download(
                path, allow_patterns="pytorch_model*.bin", ignore_patterns=in_folders)
    except Exception as error:  # of the network or the hub: the loaders say what they cannot find
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise


def _is_hub_id(path: str) -> bool:
    return not Path(path).exists() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None


# --- architectures -------------------------------------------------------------------------------

# Models that see what comes after a token, though some have a class for causal LMs.
_ENCODERS = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"}


def require_served(model: Planned) -> list[str]:
    """Check that a model is a decoder of text which can do what the step asks of it.

    Returns:
        Lines to say.

    Raises:
        UserError: it is of another kind, its positions end too early, or LoRA does not cover it.
    """
    role, made = model.role, _empty(model)
    config = made.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", 0)
    relative = any(name.startswith("rope") and value for name, value in vars(config).items())
    if limit and not relative and model.length > limit:
        raise UserError(f"{model.length_flags}: {role.model_name_or_path} has {limit} positions, "
                        f"and a sequence may have {model.length} tokens; give at most {limit}")
    recurrent = made._is_stateful or any(
        "attention" not in kind or "linear" in kind
        for kind in getattr(config, "layer_types", None) or ()
    )
    if model.decodes and recurrent:
        raise UserError(
            f"{role.model_name_or_path}: {config.model_type} has recurrent layers, and rows of "
            "different lengths are decoded with a KV cache; give a model with attention in every "
            "layer")
    if model.scores and not isinstance(getattr(made, "score", None), nn.Linear):
        raise UserError(f"{role.model_name_or_path}: {type(made).__name__} has no score layer to "
                        "make a reward model of; give a causal decoder, as LLaMA")
    _require_quantizable(model, made)
    if role.lora_dim:
        lora.require_coverage(made, lora.match_modules(made, role), role, model.adapters)
    if model.loading.attn_implementation == "sdpa" != made.config._attn_implementation:
        return [f"{config.model_type} has no SDPA; --attn_implementation eager is taken"]
    return []


def _require_quantizable(model: Planned, made: Any) -> None:
    """Refuse a model that is quantized already, or of which the larger part would not be."""
    path = model.role.model_name_or_path
    given = getattr(made.config, "quantization_config", None)
    method = getattr(given, "quant_method", None) or (given or {}).get("quant_method")
    if given and (model.bits or method == "bitsandbytes"):
        raise UserError(f"{path}: its weights are quantized already ({method}), and what is "
                        "exported would not be whole; give the model that they were made from")
    if model.bits is None:
        return
    heads = (made.get_output_embeddings(), getattr(made, "score", None))
    linear, others = 0, dict[str, int]()
    for name, module in made.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            if type(module) in (nn.Linear, Conv1D):
                linear += weight.numel() * (module not in heads)
            elif weight.dim() > 1 and not isinstance(module, nn.Embedding):
                others[f"{name}.{own}"] = weight.numel()
    if sum(others.values()) > linear:
        raise UserError(f"--load_in_{model.bits}bit: only plain linear layers are quantized, and "
                        f"the larger part of {path} is in others, such as {next(iter(others))}; "
                        "remove the flag, or give another model")
    require_quantizer(model.bits, model.dtype, made)


def _empty(model: Planned) -> Any:
    """Build a model without weights.

    Raises:
        UserError: it is no causal decoder of text, or transformers has no class for it.
    """
    path, config = model.role.model_name_or_path, load_config(model.role, model.loading)
    kind = config.model_type
    if config.is_encoder_decoder or kind in _ENCODERS:
        raise UserError(f"{path}: {kind} is an encoder, not a causal decoder, which predicts the "
                        "next token; give a model such as LLaMA or Qwen")
    if is_multimodal(config):
        raise UserError(f"{path}: {kind} is a multimodal model, with parts for vision or audio, "
                        "whose text part is no causal LM by itself; give a model of text alone")
    auto_class: Any = AutoModelForCausalLM
    if model.scores:
        auto_class, config.num_labels = AutoModelForSequenceClassification, 1
    try:
        with torch.device("meta"):
            return auto_class.from_config(
                config, trust_remote_code=model.loading.trust_remote_code,
                attn_implementation=attention(
                    auto_class, config, model.loading.attn_implementation),
            )
    except (ValueError, ImportError, AttributeError) as error:
        what = "reward model" if model.scores else "causal LM"
        remedy = "--attn_implementation eager" if "attn_impl" in str(error) else "another model"
        raise UserError(f"{path}: {kind} cannot be built as a {what} "
                        f"({str(error).strip().splitlines()[0][:200]}); take {remedy}") from error


# --- memory --------------------------------------------------------------------------------------


def size(model: Planned) -> tuple[int, int]:
    """Count all parameters of a model, and the trained ones, without allocating them.

    Raises:
        UserError: there is no such model, or `--lora_module_name` matches nothing in it.
    """
    made = _empty(model)
    total = sum(weight.numel() for weight in made.parameters())
    if not model.role.lora_dim:
        return total, total
    weights = (lora.target_weight(made, name) for name in lora.match_modules(made, model.role))
    adapter = sum(
        model.role.lora_dim * sum(weight.shape[-2:]) * (len(weight) if weight.dim() == 3 else 1)
        for weight in weights
    )
    return total + adapter, adapter if model.adapters.only_optimize_lora else total + adapter


def need(models: Sequence[Planned], ranks: int) -> Need:
    """Return what the models need on one of `ranks` ranks."""
    device = host = weights = 0.0
    for model in models:
        (total, trained), width = size(model), model.dtype.itemsize
        stage = ds_config.effective_stage(model.role.zero_stage, model.dtype)
        frozen = lora.base_is_frozen(model.role, model.adapters)
        copies = 2 if model.needs_frozen_copy and not frozen else 1
        held = copies * total * width / (ranks if stage == 3 else 1)
        gradients = trained * GRADIENT / (ranks if stage >= 2 else 1)
        state = MOMENTS + (MASTER_COPY if width < MASTER_COPY else 0)
        states = trained * state / (ranks if stage >= 1 else 1)
        moved = (states + (held if stage == 3 else 0)) if model.engine.offload else 0.0
        if model.offloads_frozen_copy and stage == 3 and copies == 2 and not model.engine.offload:
            moved = held / 2
        device += held + gradients + states - moved
        host += moved
        weights += held
    return Need(device, host, weights)


def fits(wanted: Need) -> bool:
    """Return whether a rank has that much free memory."""
    device, host = distributed.free_memory()
    if distributed.on_cpu():
        return wanted.device + wanted.host <= host
    return wanted.device <= device and wanted.host <= host


def remedy(models: Sequence[Planned], ranks: int) -> str:
    """Return the flags with which the models would fit."""
    now = list(models)
    flags: list[str] = []
    for saving in range(4):
        for i, model in enumerate(now):
            helps, flag, changes = _savings(model, ranks)[saving]
            if helps:
                flags.append(flag)
                now[i] = replace(model, **changes)
        if flags and fits(need(now, ranks)):
            return f"try {' '.join(dict.fromkeys(flags))}"
    return "take a smaller model, or more ranks and --zero_stage 3"


def _savings(model: Planned, ranks: int) -> list[tuple[bool, str, dict[str, Any]]]:
    """Return four savings of memory, the cheapest first: does it help, flags, what they change."""
    role, stage_3 = model.role, f"{model.role.flag('zero_stage')} 3"
    sharded = replace(role, zero_stage=3)
    return [
        (model.dtype == torch.float32 and distributed.has_bf16(), "--dtype bf16",
         {"loading": replace(model.loading, dtype="bf16")}),
        (ranks > 1 and role.zero_stage < 3, stage_3, {"role": sharded}),
        (role.lora_dim == 0, f"{role.flag('lora_dim')} 16",
         {"role": replace(role, lora_dim=16),
          "adapters": replace(model.adapters, only_optimize_lora=True)}),
        # Below stage 3 the weights stay on the device, and stage 0 cannot offload.
        (not model.engine.offload and not distributed.on_cpu(),
         "--offload" if role.zero_stage == 3 else f"--offload {stage_3}",
         {"role": sharded, "engine": replace(model.engine, offload=True)}),
    ]


def memory_warning(models: Sequence[Planned]) -> str | None:
    """Return a warning with a remedy if the models will not fit, else None.

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
