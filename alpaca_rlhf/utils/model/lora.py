"""LoRA through peft: what is matched, what trains, and the whole model's weights again.

An adapter that matches nothing raises; heads always train.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from alpaca_rlhf.utils.errors import UserError

ADAPTER = "default"  # peft's name for the only adapter there is


def match_modules(model: PreTrainedModel, wanted: str | None, flag: str) -> list[str]:
    """Full names of the linear layers that LoRA goes into.

    Args:
        model: a Hugging Face model.
        wanted: comma list of names or parts of names; None takes every projection of the decoder
            (attention and MLP in the LLaMA family), never the output head.
        flag: the flag `wanted` came from, for the message.

    Raises:
        UserError: one of the names matches nothing.
    """
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in heads
    ]
    if not wanted:
        return linear
    parts = [part.strip() for part in wanted.split(",") if part.strip()]
    for part in parts:
        if not any(part in name for name in linear):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(f"{flag} {part}: matches no linear layer; there are {', '.join(kinds)}")
    return [name for name in linear if any(part in name for part in parts)]


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    only_lora: bool = True,
) -> PeftModel:
    """Wrap a model with one LoRA adapter; a `score` head is trained in full beside it.

    Args:
        model: a causal LM or a sequence classifier.
        rank, alpha, dropout: of the adapter.
        targets: names from `match_modules`.
        only_lora: freeze the rest of the base.
    """
    head = ["score"] if hasattr(model, "score") else None
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets),
        modules_to_save=head,
    )
    wrapped = get_peft_model(model, config)
    if not only_lora:
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_("original_module" not in name)
    return wrapped


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model, LoRA layers inside it if there are any."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, base)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before the adapter (and the head as it was saved)."""
    assert isinstance(model, PeftModel), "only a model with an adapter can turn it off"
    with model.disable_adapter():
        yield


def describe_training(model: nn.Module, targets: Sequence[str] | None) -> str:
    """How many parameters LoRA matched and how many train, by kind, in one line."""
    base = unwrapped(model)
    counts = {"lora": 0, "head": 0, "base": 0}
    total = 0
    for name, parameter in model.named_parameters():
        if "original_module" in name:
            continue
        size = getattr(parameter, "ds_numel", parameter.numel())
        total += size
        if parameter.requires_grad:
            kind = "lora" if "lora_" in name else "head" if "score" in name else "base"
            counts[kind] += size
    trains = ", ".join(f"{kind} {n:,}" for kind, n in counts.items() if n)
    matched = "LoRA off"
    if targets is not None:
        weights = [base.get_submodule(name).get_base_layer().weight for name in targets]
        covered = sum(getattr(w, "ds_numel", w.numel()) for w in weights)
        matched = f"LoRA matched {len(targets)} modules with {covered:,} parameters"
    return f"{matched}; trains {sum(counts.values()):,} of {total:,} parameters ({trains})"


def gathered_state_dict(model: nn.Module, on_this_rank: bool) -> dict[str, Tensor]:
    """Every weight, whole, on the host; one tensor at a time is gathered under ZeRO-3.

    All ranks must call it; those with `on_this_rank` false get an empty dict.
    """
    state = {}
    tensors = [*model.named_parameters(), *_persistent_buffers(model)]
    for name, tensor in tensors:
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if on_this_rank:
                state[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return state


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def merged_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the plain model, adapter added: W + (alpha / r) B A (Hu et al. 2021, eq. 3).

    Args:
        model: where the scaling is read off; it is left as it is.
        state: from `gathered_state_dict(model)`.
    """
    if not isinstance(model, PeftModel):
        return state
    prefix = "base_model.model."
    plain = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, layer in unwrapped(model).named_modules():
        if isinstance(layer, LoraLayer):
            a = plain.pop(f"{name}.lora_A.{ADAPTER}.weight").float()
            b = plain.pop(f"{name}.lora_B.{ADAPTER}.weight").float()
            weight = plain.pop(f"{name}.base_layer.weight")
            update = layer.scaling[ADAPTER] * (b @ a)
            plain[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
            if f"{name}.base_layer.bias" in plain:
                plain[f"{name}.bias"] = plain.pop(f"{name}.base_layer.bias")
    trained_head = f".modules_to_save.{ADAPTER}."
    for name in [name for name in plain if trained_head in name]:
        plain[name.replace(trained_head, ".")] = plain.pop(name)
    return {name: tensor for name, tensor in plain.items() if ".original_module." not in name}


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that carry an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Adapters added into their weights, for decoding; on leaving each weight is as it was.

    The folded weight is a new tensor and the old one is put back, so nothing is lost to rounding.
    Under ZeRO-3 the weights must be gathered. peft's layers take their short way (no adapter
    product) while they count as merged.
    """
    layers = [layer for layer in lora_layers(model) if not layer.merged]
    kept: list[tuple[LoraLayer, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.get_base_layer().weight
                kept.append((layer, weight.data))
                update = layer.get_delta_weight(ADAPTER).to(weight.dtype)
                weight.data = weight.data + update
                layer.merged_adapters.append(ADAPTER)
        yield
    finally:
        for layer, data in kept:
            layer.get_base_layer().weight.data = data
            if ADAPTER in layer.merged_adapters:
                layer.merged_adapters.remove(ADAPTER)
