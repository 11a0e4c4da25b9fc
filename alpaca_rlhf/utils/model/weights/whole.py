"""Weights as other programs read them: whole under ZeRO-3, adapters merged or by themselves."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alpaca_rlhf.utils.model.lora import ADAPTER, base_weight, lora_layers, unwrapped
from alpaca_rlhf.utils.model.weights.quantized import is_quantized


def gathered_state_dict(
    model: nn.Module, on_this_rank: bool, parts: Sequence[str] = ("",)
) -> dict[str, Tensor]:
    """Return weights, whole, in host memory; ZeRO-3 gathers one tensor at a time.

    All ranks must call it; those with `on_this_rank` false get an empty dict. `parts` leaves out
    the weights whose names have none of them.
    """
    state = {}
    for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        if not any(part in name for part in parts):
            continue
        with _whole([tensor]):
            if on_this_rank:
                state[name] = _on_host(tensor)
    return state


def adapter_state_dict(model: nn.Module, on_this_rank: bool) -> dict[str, Tensor]:
    """Return what peft saves, as `gathered_state_dict` does: embeddings too, if it wants them."""
    parts = (".lora_", ".modules_to_save.", *EMBEDDING_LAYER_NAMES)
    return gathered_state_dict(model, on_this_rank, parts)


def _whole(tensors: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    return deepspeed.zero.GatheredParameters([x for x in tensors if hasattr(x, "ds_id")])


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).to("cpu", copy=True).contiguous()


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


class PlainWeight(NamedTuple):
    """A weight of the plain model; what merging an adapter changed and lost are squared norms."""

    name: str
    tensor: Tensor
    update: float = 0.0
    lost: float = 0.0


def plain_weights(
    model: nn.Module, on_this_rank: bool, *, merge: bool = True, tied: bool = False
) -> Iterator[PlainWeight]:
    """Yield the plain model's weights, whole, in host memory, each with its adapter merged.

    Merged (Hu et al. 2021, eq. 3) each is W + (alpha / r) B A, with W [out, in], A [r, in],
    B [out, r], summed in fp32 and rounded once; Conv1D has W transposed, and experts have a stack
    of them. The model is not changed, and ZeRO-3 gathers one weight and its adapter at a time.
    For a quantized W the one that was quantized is taken.

    All ranks must exhaust it in lockstep; those with `on_this_rank` false get empty tensors.

    Args:
        merge: False leaves the adapter out, and quantized weights as they are stored.
        tied: give tied weights under each of their names.
    """
    plain: Any = unwrapped(model)
    layers = {id(base_weight(layer)): layer for layer in lora_layers(plain) if merge}
    reads = merge and on_this_rank and any(map(is_quantized, plain.parameters()))
    before = dict(plain.load_originals().named_parameters()) if reads else {}
    named = plain.named_parameters(remove_duplicate=not tied)
    for name, tensor in [*named, *_persistent_buffers(plain)]:
        if ".lora_" in name or ".original_module." in name:
            continue
        name = name.replace(".base_layer", "").replace(f".modules_to_save.{ADAPTER}", "")
        layer: Any = layers.get(id(tensor))
        if reads and is_quantized(tensor):
            tensor = before.pop(name)
        adapter = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight] if layer else []
        with _whole([tensor, *adapter]):
            held = [_on_host(part) for part in (tensor, *adapter) if on_this_rank]
        if len(held) < 2:
            yield PlainWeight(name, held[0] if held else torch.empty(0))
            continue
        weight, a, b = held
        update = _update(layer, a.float(), b.float())
        exact = weight.float() + update
        merged = exact.to(weight.dtype)
        yield PlainWeight(name, merged, update.square().sum().item(),
                          (merged.float() - exact).square().sum().item())


def merged_state_dict(model: nn.Module, on_this_rank: bool) -> tuple[dict[str, Tensor], float]:
    """Return `plain_weights`, and the error of rounding as a share of the update, both as norms.

    All ranks must call it; those with `on_this_rank` false get an empty dict.
    """
    weights = [weight for weight in plain_weights(model, on_this_rank) if on_this_rank]
    updated, lost = (sum(w.update for w in weights), sum(w.lost for w in weights))
    return {w.name: w.tensor for w in weights}, (lost / updated) ** 0.5 if updated else 0.0


def _update(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return what an adapter adds to its weight, of the weight's shape, as peft lays it out."""
    scaling = layer.scaling[ADAPTER]
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        # A Conv1D that is quantized holds its weight transposed.
        conv = getattr(layer.get_base_layer(), "source_cls", None) is Conv1D
        return scaling * (b @ a).T if layer.fan_in_fan_out or conv else scaling * (b @ a)
    b, a = b.view(len(b), -1, experts).permute(2, 0, 1), a.view(experts, -1, a.shape[-1])
    update = scaling * (b @ a)  # [experts, out, in]
    return update if layer._did_swap_in_out_features else update.transpose(1, 2)
