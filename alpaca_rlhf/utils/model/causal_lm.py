"""Loading Hugging Face models for training, and the causal LM's forward in the form PPO needs."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from alpaca_rlhf.utils import rl_math
from alpaca_rlhf.utils.errors import UserError

# The names that model families give to their dropout rates.
_DROPOUT = (
    "dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "classifier_dropout",
)


@dataclass(frozen=True)
class LoadOptions:
    """How a model is brought into memory.

    Attributes:
        dtype: of the weights.
        attn_implementation: sdpa, eager or flash_attention_2.
        dropout: put into every dropout rate of the config.
        gradient_checkpointing: recompute activations in the backward pass.
        trust_remote_code: allow the code of a hub repository to run.
    """

    dtype: torch.dtype = torch.float32
    attn_implementation: str = "sdpa"
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False


def load_config(path: str, options: LoadOptions) -> Any:
    """The model's configuration.

    Raises:
        UserError: there is none at `path`.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        if Path(path).is_dir() and not (Path(path) / "config.json").exists():
            reason = "the folder has no config.json; give a Hugging Face model folder"
        elif Path(path).exists():
            reason = f"{_first_line(error)}; give a Hugging Face model folder"
        else:
            reason = "no such folder, and no model of that name can be had; check the name"
        raise UserError(f"no model can be loaded from {path}: {reason}") from error
    for name in _DROPOUT:
        if getattr(config, name, None) is not None:
            setattr(config, name, options.dropout)
    return config


def load_model(
    auto_class: Any,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions,
    ds_config: dict[str, Any],
    **config_changes: Any,
) -> PreTrainedModel:
    """`auto_class.from_pretrained`, partitioned as it loads under ZeRO-3.

    Args:
        auto_class: AutoModelForCausalLM or AutoModelForSequenceClassification.
        path: hub id or folder.
        tokenizer: the embeddings are enlarged when it has more tokens than they have rows.
        options: precision and the like.
        ds_config: says whether this is ZeRO-3.
        **config_changes: attributes set on the model's configuration.

    Raises:
        UserError: no model there, or broken weights.
    """
    config = load_config(path, options)
    for name, value in config_changes.items():
        setattr(config, name, value)
    with _partitioned_loading(ds_config):
        try:
            model = auto_class.from_pretrained(
                path, config=config, dtype=options.dtype, use_safetensors=None,
                attn_implementation=options.attn_implementation,
                trust_remote_code=options.trust_remote_code,
            )
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"no model can be loaded from {path}: {_first_line(error)}; copy or train it again"
            ) from error
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"no model can be loaded from {path}: {_first_line(error)}") from error
        if len(tokenizer) > config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
    if options.gradient_checkpointing:
        # Inputs must require grad, or nothing behind a frozen embedding is trained.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def load_causal_lm(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions,
    ds_config: dict[str, Any],
) -> PreTrainedModel:
    """A causal LM; see `load_model`."""
    return load_model(AutoModelForCausalLM, path, tokenizer, options, ds_config)


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


def forward_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits [B, T, V] of ids [B, T], padding on either side."""
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=rl_math.position_ids(attention_mask),
        use_cache=False,
    ).logits


def response_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_length: int
) -> Tensor:
    """Logits [B, R, V] at the state before each of the last R tokens of ids [B, P + R].

    Only those positions go through the vocabulary projection.
    """
    return model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=rl_math.position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=response_length + 1,
    ).logits[:, :-1]
