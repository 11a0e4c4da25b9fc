"""Load Hugging Face models for training, and run a causal LM as the losses need it."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.models.auto import modeling_auto

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.configs import LoadingConfig, RoleConfig
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.losses import IGNORE_INDEX
from alpaca_rlhf.utils.model.lora import unwrapped
from alpaca_rlhf.utils.model.weights import quantized
from alpaca_rlhf.utils.projection import Head

# Names of weights in a multimodal model, and in a causal LM that is its text part.
_TEXT_PART = {r"^language_model\.lm_head\.": "lm_head.",
              r"^(?:model\.)?language_model\.(?:model\.)?": "model."}


def is_multimodal(config: Any) -> bool:
    """Return whether a model has parts for images or sound."""
    return config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or (
        config.get_text_config() is not config and len(config.sub_configs) > 1)


def load_config(role: RoleConfig, loading: LoadingConfig) -> Any:
    """Load the model's configuration, with the role's dropout, and without a pad it has no row for.

    Of a multimodal model it is that of the text part, if that is a causal LM by itself.

    Raises:
        UserError: there is none at the role's path.
    """
    config = _read_config(role, loading)
    parts = (config, config.get_text_config(decoder=True))
    if is_multimodal(config) and type(parts[1]) in AutoModelForCausalLM._model_mapping:
        parts[1].tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        config = parts[1]
    for part in parts:
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, int | float):
                setattr(part, name, role.dropout)
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if pad is not None and rows and not 0 <= pad < rows:
            part.pad_token_id = None
    return config


def _read_config(role: RoleConfig, loading: LoadingConfig) -> Any:
    path = role.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=loading.trust_remote_code)
        config.get_text_config(decoder=True)  # raises where there are several
        return config
    except (OSError, ValueError) as error:
        if Path(path).is_dir() and not (Path(path) / "config.json").exists():
            reason = "the folder has no config.json; give a Hugging Face model folder"
        elif Path(path).exists():
            reason = f"{_first_line(error)}; give a Hugging Face model folder"
        else:
            reason = "no such folder, and no model of that name can be had; check the name"
        raise UserError(f"no model can be loaded from {path}: {reason}") from error


def attention(auto_class: Any, config: Any, wanted: str) -> str:
    """Return the attention implementation: eager where the model family has no SDPA."""
    family = getattr(auto_class, "_model_mapping", {}).get(type(config), None)
    family = family[0] if isinstance(family, tuple) else family
    return "eager" if wanted == "sdpa" and family and not family._supports_sdpa else wanted


def load_model(
    auto_class: Any, role: RoleConfig, loading: LoadingConfig, ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase, **config_changes: Any,
) -> PreTrainedModel:
    """Load a model with `auto_class.from_pretrained`; under ZeRO-3 it is partitioned as it loads.

    Args:
        auto_class: AutoModelForCausalLM or AutoModelForSequenceClassification.
        role: path, dropout and gradient checkpointing.
        loading: precision and attention; with `bits` the weights of linear layers are quantized.
        ds_config: DeepSpeed's configuration, which has the ZeRO stage.
        tokenizer: the embeddings are enlarged when it has more tokens than they have rows.
        **config_changes: attributes set on the model's configuration.

    Raises:
        UserError: no model there, or broken weights.
    """
    config, path = load_config(role, loading), role.model_name_or_path
    for name, value in config_changes.items():
        setattr(config, name, value)
    # To the device at once: below ZeRO-3 every rank would hold the whole model in host memory.
    sharded = ds_config["zero_optimization"]["stage"] == 3
    device_map = None if sharded or distributed.on_cpu() else {"": distributed.device()}
    dtype = distributed.resolve_dtype(loading.dtype)
    is_part = config.model_type != _read_config(role, loading).model_type
    if is_part:
        console.say(f"{path}: of a multimodal model the text part ({config.model_type}) is taken")
    read = partial(
        auto_class.from_pretrained, path, key_mapping=_TEXT_PART if is_part else None, dtype=dtype,
        attn_implementation=attention(auto_class, config, loading.attn_implementation),
        trust_remote_code=loading.trust_remote_code,
    )
    quantization = {}
    if loading.bits is not None:
        device_map, originals = {"": distributed.device()}, partial(
            read, config=copy.deepcopy(config))
        quantization["quantization_config"] = quantized.config(
            loading.bits, dtype, scores="num_labels" in config_changes)
    with _partitioned_loading(ds_config):
        try:
            model, found = read(config=config, output_loading_info=True, device_map=device_map,
                                **quantization)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"no model can be loaded from {path}: {_first_line(error)}; copy or train it again"
            ) from error
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"no model can be loaded from {path}: {_first_line(error)}") from error
        if is_part and (missing := set(found["missing_keys"]) - {"score.weight"}):
            raise UserError(f"{path}: its weights have no text part of type {config.model_type} "
                            f"({min(missing)} is missing); give a model of text alone")
        _enlarge_embeddings(model, 1 + max(tokenizer.get_vocab().values()))
    if loading.bits is not None:
        quantized.settle(model, originals)
    if role.gradient_checkpointing:
        recompute_activations(model)
    return model


def recompute_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    distributed.return_freed_memory()
    # Inputs must require grad, or no layer after a frozen embedding is trained.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


def load_causal_lm(
    role: RoleConfig, loading: LoadingConfig, ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """Load a causal LM; see `load_model`."""
    return load_model(AutoModelForCausalLM, role, loading, ds_config, tokenizer)


def _enlarge_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give the embeddings a row for every token, the same new ones in every model and rank."""
    before = model.config.get_text_config().vocab_size
    if rows > before:
        on = [] if distributed.on_cpu() else [distributed.device()]
        with torch.random.fork_rng(devices=on):
            torch.manual_seed(0)
            model.resize_token_embeddings(rows)
        console.say(f"model: {rows - before} rows are added to its {before:,} embeddings, for "
                    "tokens that only the tokenizer has")


@contextlib.contextmanager
def _partitioned_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    if ds_config["zero_optimization"]["stage"] < 3:
        yield
        return
    alive = HfDeepSpeedConfig(ds_config)  # transformers holds it by a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TokenHead(nn.Linear):
    """A vocabulary projection that can compute numbers of chosen tokens in place of logits.

    Called by the model's own forward pass, it works under ZeRO-3 and LoRA like any module.

    Attributes:
        asked: what to compute instead of logits, from hidden states [B, T, D].
        applies: whether the model gives the head's output as it is.
    """

    asked: Callable[[Tensor, Head], Tensor] | None = None
    applies = True

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [B, T, V], or what was asked for."""
        if self.asked is None:
            return super().forward(hidden)
        return self.asked(hidden, Head(self.weight, self.bias))


def at_labels(
    model: nn.Module, input_ids: Tensor, labels: Tensor,
    compute: Callable[[Tensor, Head, Tensor], Tensor],
) -> Tensor:
    """Run a causal LM, and compute something of the labels that are not -100.

    Only the positions that predict them go through the vocabulary projection.

    Args:
        model: a causal LM, or its DeepSpeed engine.
        input_ids: [B, T], padded right. What follows a token does not change what predicts it, so
            there is no mask, and attention takes its fastest way.
        labels: [B, T] tokens, -100 where nothing is computed.
        compute: hidden states [N, D], head, labels [N] -> what is returned.
    """
    trained = labels[:, 1:] != IGNORE_INDEX
    targets, given = labels[:, 1:][trained], []

    def asked(hidden: Tensor, head: Head) -> Tensor:
        given.append(compute(hidden[:, :-1][trained], head, targets))
        return given[0]

    head: Any = unwrapped(getattr(model, "module", model)).get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = TokenHead  # in place: hooks and ties of the weights stay
    if isinstance(head, TokenHead) and head.applies:
        head.asked = asked
        try:
            found = model(input_ids=input_ids, use_cache=False).logits
        finally:
            head.asked = None
        if given and found.data_ptr() == given[0].data_ptr():
            return found
        head.applies = False  # the model scales or caps its logits
    logits = model(input_ids=input_ids, use_cache=False).logits
    return compute(logits[:, :-1][trained], Head(None), targets)
