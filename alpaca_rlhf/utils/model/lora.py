"""LoRA through peft: target modules, trainable parameters, merging.

Modules that match nothing raise an error; heads are always trained. Beside linear layers, GPT-2's
Conv1D among them, peft adapts weights that a module holds itself: the experts of an MoE layer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alpaca_rlhf.utils.configs import AdapterConfig, RoleConfig
from alpaca_rlhf.utils.errors import UserError

ADAPTER = "default"  # peft's name for the only adapter there is


def match_modules(model: PreTrainedModel, role: RoleConfig) -> list[str]:
    """Return the full names of the linear layers, and of the experts' weights, that get an adapter.

    Without `lora_module_name` these are all projections of the decoder (attention and MLP in the
    LLaMA family), never the output head.

    Raises:
        UserError: one of the names given matches nothing.
    """
    wanted = role.lora_module_name
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    linear: list[str] = []
    for name, module in model.named_modules():
        if id(module) in heads:
            continue
        grouped = "grouped" in type(module).__name__.lower()
        if isinstance(module, nn.Linear | Conv1D) and not grouped:
            linear.append(name)
        elif not type(module).__module__.startswith("torch.nn."):
            # A layer that is no matrix product of its whole input is adapted through its weights.
            linear += [f"{name}.{own}" for own, weight in module.named_parameters(recurse=False)
                       if "bias" not in own and (
                           len(_shape(weight)) == 3
                           or (len(_shape(weight)) == 2 and (grouped or "expert" in name)))]
    if not wanted:
        return linear
    parts = [part.strip() for part in wanted.split(",") if part.strip()]
    for part in parts:
        if not any(part in name for name in linear):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(f"{role.flag('lora_module_name')} {part}: matches no linear layer; "
                            f"there are {', '.join(kinds)}")
    return [name for name in linear if any(part in name for part in parts)]


def _shape(weight: nn.Parameter) -> torch.Size:
    """Return the whole shape, also of a weight that ZeRO-3 has sharded or that is quantized."""
    state = getattr(weight, "quant_state", None)  # two elements are in a byte
    return getattr(weight, "ds_shape", weight.shape) if state is None else state.shape


def _holds_module(model: nn.Module, target: str) -> bool:
    parent, _, name = target.rpartition(".")
    return isinstance(getattr(model.get_submodule(parent), name), nn.Module)


def target_weight(model: nn.Module, target: str) -> nn.Parameter:
    """Return the weight of a name from `match_modules`: [out, in], or [experts, …, …]."""
    return model.get_parameter(f"{target}.weight" if _holds_module(model, target) else target)


def require_coverage(
    model: PreTrainedModel, targets: Sequence[str], role: RoleConfig, adapters: AdapterConfig
) -> None:
    """Refuse adapters that would leave the larger part frozen, or that peft cannot train.

    Raises:
        UserError: names what would be left out, or the flag that experts do not go with.
    """
    inside = [target for target in targets if not _holds_module(model, target)]
    if inside and (adapters.lora_dropout or role.zero_stage == 3):
        flag = (f"--lora_dropout {adapters.lora_dropout}" if adapters.lora_dropout
                else f"{role.flag('zero_stage')} 3")
        raise UserError(f"{flag}: adapters on weights such as {inside[0]} do not work with it; "
                        f"leave it out, or name other layers by {role.flag('lora_module_name')}")
    if role.lora_module_name or adapters.only_optimize_lora is False:
        return
    covered = {id(target_weight(model, target)) for target in targets}
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    outside = {id(weight) for module in model.modules()
               if isinstance(module, nn.Embedding) or module in heads
               for weight in module.parameters()}
    left: dict[str, int] = {}
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and id(weight) not in covered | outside:
            kind = ".".join(part for part in name.split(".")[-3:] if not part.isdigit())
            left[kind] = left.get(kind, 0) + weight.numel()
    total = sum(target_weight(model, target).numel() for target in targets)
    if sum(left.values()) > total:
        named = ", ".join(f"{kind} ({count:,})" for kind, count in left.items())
        raise UserError(
            f"{role.flag('lora_dim')}: adapters would leave the larger part frozen: they cover "
            f"{total:,} parameters, and not {named}; train without LoRA, or name what to adapt by "
            f"{role.flag('lora_module_name')}")


def add_lora(
    model: nn.Module, targets: Sequence[str], role: RoleConfig, adapters: AdapterConfig
) -> PeftModel:
    """Wrap a causal LM or sequence classifier with one adapter; its `score` head trains in full.

    `targets` are names from `match_modules`.
    """
    head = ["score"] if hasattr(model, "score") else None
    modules = [target for target in targets if _holds_module(model, target)]
    inside = [target for target in targets if target not in modules]
    config = LoraConfig(
        r=role.lora_dim, lora_alpha=adapters.lora_alpha or 2 * role.lora_dim,
        lora_dropout=adapters.lora_dropout, target_modules=modules, modules_to_save=head,
        target_parameters=inside or None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in modules),
    )
    # Adapters in the model's precision (peft would make them fp32): DeepSpeed wants only one.
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    if not adapters.only_optimize_lora:
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_("original_module" not in name)
    return wrapped


def base_is_frozen(role: RoleConfig, adapters: AdapterConfig) -> bool:
    """Return whether the model with its adapter disabled stays the model that was loaded."""
    return role.lora_dim > 0 and adapters.only_optimize_lora


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model, with the LoRA layers inside it if there are any."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, base)


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Disable the adapter, and use the head as it was loaded, inside the context."""
    assert isinstance(model, PeftModel), "only a model with an adapter can disable it"
    with model.disable_adapter():
        yield


def describe_training(model: nn.Module, targets: Sequence[str] | None) -> str:
    """Return one line: parameters that LoRA matched, and trainable parameters by kind."""
    counts = {"lora": 0, "head": 0, "base": 0}
    total = 0
    for name, parameter in model.named_parameters():
        if "original_module" in name:
            continue
        size = _shape(parameter).numel()
        total += size
        if parameter.requires_grad:
            kind = "lora" if "lora_" in name else "head" if "score" in name else "base"
            counts[kind] += size
    trains = ", ".join(f"{kind} {n:,}" for kind, n in counts.items() if n)
    matched = "LoRA off"
    if targets is not None:
        covered = sum(_shape(base_weight(layer)).numel() for layer in lora_layers(model))
        kinds = ", ".join(sorted({target.rsplit(".", 1)[-1] for target in targets}))
        matched = f"LoRA matched {len(targets)} modules ({kinds}) with {covered:,} parameters"
    return f"{matched}; trains {sum(counts.values()):,} of {total:,} parameters ({trains})"


def base_weight(layer: LoraLayer) -> Any:
    """Return the weight that an adapter is for."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the layers that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def unfolded(layers: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Return A [R, in] and B [out, R], in fp32, of linear layers with the same input.

    x A^T B^T is what adapters that are not merged add to the layers' joined outputs. None if there
    are none.
    """
    a, b = [], []
    for layer in layers:
        weight = base_weight(layer) if isinstance(layer, LoraLayer) else layer.weight
        a.append(weight.new_empty(0, weight.shape[1]).float())
        b.append(weight.new_empty(len(weight), 0).float())
        if isinstance(layer, LoraLayer) and not layer.merged:
            a[-1] = layer.lora_A[ADAPTER].weight.detach().float()
            b[-1] = layer.scaling[ADAPTER] * layer.lora_B[ADAPTER].weight.detach().float()
    joined = torch.cat(a)
    return (joined, torch.block_diag(*b)) if len(joined) else None


@contextlib.contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Merge the adapters into fp32 weights for decoding, inside the context.

    In other precisions nothing is merged: rounding would lose most of an adapter that has learned
    little so far. On leaving, every weight is as it was, bit for bit: the old weights are kept
    beside the merged ones, or, under ZeRO-3 on several ranks, where the weights must be gathered,
    in the shards. peft skips the adapter's products in layers that are marked as merged.
    """
    layers = [layer for layer in lora_layers(model)
              if not layer.merged and base_weight(layer).dtype == torch.float32]
    kept: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = base_weight(layer)
                update = layer.get_delta_weight(ADAPTER)
                layer.merged_adapters.append(ADAPTER)
                # With one rank the gathered weight is the shard itself.
                if hasattr(weight, "ds_id") and weight.data_ptr() != weight.ds_tensor.data_ptr():
                    weight.data.add_(update)
                else:
                    kept.append((weight, weight.data))
                    weight.data = weight.data + update
        yield
    finally:
        for weight, data in kept:
            weight.data = data
        for layer in layers:
            if ADAPTER in layer.merged_adapters:
                layer.merged_adapters.remove(ADAPTER)
