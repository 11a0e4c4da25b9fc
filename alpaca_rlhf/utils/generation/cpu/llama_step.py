"""A decoding step of the LLaMA family on a CPU, from compiled operations.

A step multiplies a few rows by every weight of the model, so it takes as long as reading the
weights does, plus the operations between the products. The weights are copied into a layout for
products of few rows, projections of the same input are one product, and the loops in between are
those of `kernels`. A model in bf16 has half the bytes to read; only its weights and KV cache are in
bf16 here, so the logits are nearer to those in fp32 than its forward pass's are. Its adapters are
not merged (see `lora.folded`): their own two products are added.

Models made of the LLaMA family's modules have such a step (LLaMA, Mistral, Qwen2 and the like);
`LlamaStep.objection` returns why another has none. That the modules compute the same is not taken
for granted: `steps.agrees` compares a step with the model's forward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alpaca_rlhf.utils.generation.cpu.kernels import (
    KernelsMissing,
    Product,
    attended,
    library,
    normalized,
)
from alpaca_rlhf.utils.generation.kv_cache import SlotCache
from alpaca_rlhf.utils.model import lora

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class LlamaStep:
    """Computes the next logits of all rows of a LLaMA by the compiled operations.

    Args:
        model: a model without an `objection`.
    """

    name = "the compiled decoding step"
    reusable = True
    FOR_CPUS = "it is for CPUs"  # the last objection but that of the compiler

    def __init__(self, model: Any) -> None:
        self._model = model
        self._products: list[list[_Adapted]] = []  # of each decoder layer, then of the head

    @staticmethod
    def objection(model: PreTrainedModel) -> str | None:
        """Return the reason why there is no such step for a model, or None."""
        if {p.dtype for p in model.parameters()} not in ({torch.float32}, {torch.bfloat16}):
            return "it is for weights in fp32 and bf16"
        if getattr(model.config, "sliding_window", None) is not None:
            return "the model attends to a sliding window"
        layers = list(getattr(getattr(model, "model", None), "layers", []))
        if not layers or not all(_is_llama(layer) for layer in layers):
            return "the model is not made of LLaMA's modules"
        if model.get_input_embeddings().weight.device.type != "cpu":
            return LlamaStep.FOR_CPUS
        try:
            library()
        except KernelsMissing as error:
            return str(error)
        return None

    def fill(self) -> None:
        """Copy the model's weights as they are now."""
        if not self._products:
            for layer in self._model.model.layers:
                attention, mlp = layer.self_attn, layer.mlp
                self._products.append([
                    _Adapted(attention.q_proj, attention.k_proj, attention.v_proj),
                    _Adapted(attention.o_proj),
                    _Adapted(mlp.gate_proj, mlp.up_proj),
                    _Adapted(mlp.down_proj),
                ])
            self._products.append([_Adapted(self._model.get_output_embeddings())])
        for products in self._products:
            for product in products:
                product.fill()

    def release(self) -> None:
        """Free the copy of the weights."""
        self._products = []

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """Return logits [N, V], in fp32, after tokens [N], written to the front of the cache."""
        model = self._model.model
        x = model.embed_tokens(tokens).float()
        cosines, sines = (part.squeeze(1) for part in model.rotary_emb(x, cache.positions))
        *products, [head] = self._products
        for layer, (attention_in, attention_out, mlp_in, mlp_out), buffers in zip(
            model.layers, products, cache.layers, strict=True
        ):
            joined = attention_in(_normed(layer.input_layernorm, x))
            x = x + attention_out(attended(
                joined, cosines, sines, buffers.keys, buffers.values, cache.front, cache.starts,
                layer.self_attn.scaling,
            ))
            joined = mlp_in(_normed(layer.post_attention_layernorm, x))
            gate, up = joined.chunk(2, dim=-1)
            x = x + mlp_out(layer.mlp.act_fn(gate) * up)
        return head(_normed(model.norm, x))


def _normed(norm: Any, x: Tensor) -> Tensor:
    return normalized(x, norm.weight.float(), norm.variance_epsilon)


class _Adapted(Product):
    """A product with what adapters add that are not merged."""

    def fill(self) -> None:
        super().fill()
        self._adapter = lora.unfolded(self._layers)

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x)
        if self._adapter is not None:
            a, b = self._adapter
            y.addmm_(x @ a.T, b.T)
        return y


def _is_llama(layer: Any) -> bool:
    return _consists_of(layer, _LAYER) and _consists_of(layer.self_attn, _ATTENTION) and (
        _consists_of(layer.mlp, _MLP))


def _consists_of(module: nn.Module, names: set[str]) -> bool:
    """Return whether a module has exactly these submodules, with the attributes that are read."""
    parts = dict(module.named_children())
    return parts.keys() == names and all(
        hasattr(part, "variance_epsilon") for name, part in parts.items() if "norm" in name
    ) and all(hasattr(part, "weight") for name, part in parts.items() if "proj" in name)
