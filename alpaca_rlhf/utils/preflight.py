"""Checks before data are read and models are loaded, of what would otherwise fail late.

Whether the run fits into memory is for `planning.check` to say.
"""

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from alpaca_rlhf.utils import console, distributed, ds_config, optimizer
from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    EngineConfig,
    LoadingConfig,
    RoleConfig,
    Step3Config,
    StepConfig,
    SupervisedConfig,
)
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import pointer_problem
from alpaca_rlhf.utils.logging import tracker
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import attention, is_multimodal, load_config
from alpaca_rlhf.utils.model.reward_model import require_reward_model
from alpaca_rlhf.utils.model.weights.quantized import require_quantizer

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


def planned(args: StepConfig) -> list[Planned]:
    """Return the models that a step trains."""
    if isinstance(args, SupervisedConfig):
        length = args.batches.max_seq_len
        return [Planned(args.model, args.loading, args.lora, args.engine, scores=args.step == 2,
                        length=length, length_flags=f"--max_seq_len {length}")]
    assert isinstance(args, Step3Config)
    prompt, response = args.rollout.max_prompt_seq_len, args.sampling.max_new_tokens
    actor = Planned(
        args.actor, args.loading, args.lora, args.engine, needs_frozen_copy=True, decodes=True,
        length=prompt + response, offloads_frozen_copy=args.roles.offload_reference_model,
        length_flags=f"--max_prompt_seq_len {prompt} and --max_answer_seq_len {response}",
    )
    scored = args.reward.reward_function is None
    return [actor, replace(actor, role=args.critic, scores=True, needs_frozen_copy=scored,
                           offloads_frozen_copy=args.roles.offload_reward_model)]


def check(models: Sequence[Planned], trackers: Sequence[str] = ()) -> None:
    """Check that models can be found and are served, and optimizers and trackers can be built.

    Raises:
        UserError: a hub model is not in the cache and there is no network; a compiler or a
            tracker's package is missing; --deepspeed_config asks for what is not supported; a
            model is of a kind that is not served, or the critic is no reward model. A folder that
            is no model is left to its loader.
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
    if all(map(has_config, paths)):
        for line in dict.fromkeys(line for model in models for line in require_served(model)):
            console.say(line)


def has_config(path: str) -> bool:
    """Return whether a hub id or a folder with a configuration is named."""
    return _is_hub_id(path) or (Path(path) / "config.json").exists()


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
    role, made = model.role, empty(model)
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


def empty(model: Planned) -> Any:
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
