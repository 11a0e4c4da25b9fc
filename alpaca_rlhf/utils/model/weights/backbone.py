"""One frozen base model for all four roles of step 3, which then differ in their adapters.

Steps 1 and 2 with LoRA leave such adapters beside what they export, with some elements of the
weights under them: those show whether two adapters were trained on the same base.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alpaca_rlhf.utils import console, distributed, ds_config
from alpaca_rlhf.utils.configs import AdapterConfig, LoadingConfig, RoleConfig
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm, recompute_activations
from alpaca_rlhf.utils.model.reward_model import ScoreHead
from alpaca_rlhf.utils.model.weights.quantized import mark_like, twin
from alpaca_rlhf.utils.model.weights.whole import plain_weights

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
SAMPLE_FILE = "base_sample.safetensors"
SAMPLED = 16  # elements of a weight


def save_adapter(model: nn.Module, adapter: dict[str, Tensor], sample: dict[str, Tensor],
                 folder: Path) -> None:
    """Save an adapter and, from `sample_base`, what says which base it belongs to."""
    assert isinstance(model, PeftModel), "only a model with an adapter has one to save"
    model.save_pretrained(str(folder), state_dict=adapter, safe_serialization=True)
    save_file(sample, folder / SAMPLE_FILE)


def sample_base(model: nn.Module, on_this_rank: bool) -> dict[str, Tensor]:
    """Return some elements of each weight under the adapters; all ranks must call it."""
    sample = {}
    for name, tensor, *_ in plain_weights(model, on_this_rank, merge=False):
        if tensor.numel():
            flat = tensor.flatten()
            sample[name] = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].clone()
    return sample


def base_model(path: str, adapter: dict[str, Any]) -> str:
    """Return the base model of an adapter; a relative path may be in any folder around it.

    Raises:
        UserError: the adapter's configuration names none, or a folder that is not there.
    """
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}: the adapter does not name its base model; set "
                        f"base_model_name_or_path in its {ADAPTER_CONFIG}")
    around = [Path(), *Path(path).absolute().parents]
    found = next((str(folder / base) for folder in around if (folder / base).is_dir()), None)
    if found is None and (Path(base).is_absolute() or base.count("/") != 1 or base[0] == "."):
        raise UserError(f"{path}: the adapter's base model is {base}, and there is no such folder; "
                        f"put it there, or set base_model_name_or_path in {ADAPTER_CONFIG}")
    return found or base


def has_adapter(role: RoleConfig) -> bool:
    """Return whether a role's folder holds an adapter."""
    return (Path(role.model_name_or_path) / ADAPTER_FOLDER / ADAPTER_CONFIG).exists()


def require_shareable(roles: Sequence[RoleConfig], adapters: AdapterConfig) -> None:
    """Check the adapters of roles that are to share a base, before anything is loaded.

    Raises:
        UserError: there is no adapter, it is not of the rank or scale that the flags give, or the
            adapters belong to different bases.
    """
    samples = []
    for role in roles:
        folder = Path(role.model_name_or_path) / ADAPTER_FOLDER
        given = f"{role.flag('model_name_or_path')} {role.model_name_or_path}"
        if not has_adapter(role):
            raise UserError(f"{given}: has no adapter ({ADAPTER_FOLDER}/{ADAPTER_CONFIG}), and "
                            "--share_backbone needs one; run steps 1 and 2 with --lora_dim, or "
                            "leave --share_backbone out")
        config = _config(folder)
        if config.r != role.lora_dim:
            raise UserError(f"{role.flag('lora_dim')} {role.lora_dim}: the adapter in {folder} has "
                            f"rank {config.r}; give {role.flag('lora_dim')} {config.r}")
        if adapters.lora_alpha not in (None, config.lora_alpha):
            raise UserError(f"--lora_alpha {adapters.lora_alpha}: the adapter in {folder} has "
                            f"{config.lora_alpha}; leave the flag out")
        if (role.prefix == "critic_") != ("score" in (config.modules_to_save or [])):
            raise UserError(f"{given}: its adapter has {'no' if role.prefix == 'critic_' else 'a'} "
                            "score head; give the actor what step 1 wrote, the critic what step 2 "
                            "wrote")
        samples.append(_sample(folder))
    first, second = samples
    if changed := _difference(first, second):
        raise UserError(
            f"--share_backbone: the adapters of actor and critic were trained on different bases "
            f"({changed} differs); run steps 1 and 2 from the same --model_name_or_path")


def _config(folder: Path) -> LoraConfig:
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: {str(error).splitlines()[0]}; train the "
                        "adapter again") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: is no LoRA adapter; train one by --lora_dim")
    return config


def _sample(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / SAMPLE_FILE)
    except FileNotFoundError:
        console.say(f"{folder}: has no {SAMPLE_FILE}, so whether it was trained on the same base "
                    "cannot be checked")
        return {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / SAMPLE_FILE}: {error}; train the adapter again") from error


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """Return the first weight of which two samples differ by more than rounding to a precision."""
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        narrow = a.dtype
        if a.dtype != b.dtype:
            if not (a.is_floating_point() and b.is_floating_point()):
                continue  # only one of them is quantized
            narrow = min(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        if a.shape != b.shape or not torch.equal(a.to(narrow).float(), b.to(narrow).float()):
            return name
    return None


class Backbone:
    """The frozen base of adapters, and models that share its weights.

    Args:
        roles: actor and critic; `require_shareable` holds.
        loading, adapters: their options.
        tokenizer: of all roles.

    Raises:
        UserError: the base is not the one that the adapters were trained on.
    """

    def __init__(
        self, roles: Sequence[RoleConfig], loading: LoadingConfig, adapters: AdapterConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        folder, self._adapters = Path(roles[0].model_name_or_path) / ADAPTER_FOLDER, adapters
        path = base_model(str(folder), _config(folder).to_dict())
        role = replace(roles[0], model_name_or_path=path, gradient_checkpointing=False)
        whole = ds_config.make(zero_stage=0, dtype=distributed.resolve_dtype(loading.dtype))
        loading = replace(loading, bits=adapters.bits)
        self._base = load_causal_lm(role, loading, whole, tokenizer)
        self._base.requires_grad_(False)
        sample = sample_base(self._base, True)
        for one in roles:
            folder = Path(one.model_name_or_path) / ADAPTER_FOLDER
            if changed := _difference(sample, _sample(folder)):
                raise UserError(f"--share_backbone: {path} is not the model that the adapter in "
                                f"{folder} was trained on ({changed} differs); put that one there")

    def policy(
        self, role: RoleConfig, loading: LoadingConfig, ds_config: dict[str, Any]
    ) -> PeftModel:
        """Return a causal LM with an adapter of its own on the shared weights."""
        return self._adapted(self._twin(self._base), role)

    def reward_model(
        self, role: RoleConfig, loading: LoadingConfig, ds_config: dict[str, Any]
    ) -> PeftModel:
        """Return a sequence classifier with an adapter and a head of its own."""
        base, config = self._base, copy.deepcopy(self._base.config)
        config.num_labels = 1
        with torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(
                config, attn_implementation=base.config._attn_implementation,
                trust_remote_code=loading.trust_remote_code)
        setattr(made, made.base_model_prefix, self._twin(getattr(base, base.base_model_prefix)))
        mark_like(made, base)
        # The adapter brings the head that is used.
        head = nn.Linear(made.score.in_features, 1, made.score.bias is not None,
                         device=base.device, dtype=base.dtype)
        made.score = ScoreHead(head.requires_grad_(False))
        for weight in head.parameters():
            nn.init.zeros_(weight)
        return self._adapted(made, role)

    @staticmethod
    def _twin(module: Any) -> Any:
        """Copy a module but not its weights."""
        return twin(module)

    def _adapted(self, model: PreTrainedModel, role: RoleConfig) -> PeftModel:
        folder = Path(role.model_name_or_path) / ADAPTER_FOLDER
        config = _config(folder)
        config.lora_dropout = self._adapters.lora_dropout
        try:
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=True, config=config,
                autocast_adapter_dtype=False, torch_device=str(model.device))
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{folder}: the adapter does not fit its base model ({reason}); train "
                            "it again") from error
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(model.dtype)
            assert not weight.is_meta, f"{name} has no values"
        if role.gradient_checkpointing:
            recompute_activations(model)
        return adapted
