"""One decoding step of a LLaMA, written out for a CPU in fp32.

A step multiplies a few rows with every weight of the model: what it costs is reading the weights,
and what stands between the products. So the weights are laid out for products of few rows,
projections of one input are joined into one product, and the loops between the products are the
compiled ones of `kernels`. The weights laid out are a copy, filled on entering generation mode.

Any model made of the LLaMA family's parts has such a step (LLaMA, Mistral, Qwen2 and what is built
like them); `LlamaStep.objection` says why another has not. That the parts mean the same is not
taken on trust: `decoding.agrees` compares a step with the model's own forward pass.
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

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class _Joined:
    """The product of one or more linear layers that have the same input."""

    def __init__(self, *layers: Any) -> None:
        self._layers = layers
        outputs = sum(len(layer.weight) for layer in layers)
        self._product = Product(outputs, layers[0].weight.shape[1])

    def fill(self) -> None:
        """Take the layers' weights as they are now."""
        self._product.fill(
            [layer.weight for layer in self._layers], [layer.bias for layer in self._layers]
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)


class _Layer:
    """What a decoder layer multiplies with."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_in = _Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.attention_out = _Joined(attention.o_proj)
        self.mlp_in = _Joined(mlp.gate_proj, mlp.up_proj)
        self.mlp_out = _Joined(mlp.down_proj)
        self.activation = mlp.act_fn
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.scaling = attention.scaling

    def fill(self) -> None:
        """Take the weights as they are now."""
        for joined in (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out):
            joined.fill()


def _normed(norm: Any, x: Tensor) -> Tensor:
    return normalized(x, norm.weight, norm.variance_epsilon)


class LlamaStep:
    """Computes the next logits of all rows of a LLaMA by the compiled kernels.

    Args:
        model: a model without an `objection`.
    """

    name = "the compiled decoding step"
    reusable = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers: list[_Layer] = []
        self._head: Any = None

    @staticmethod
    def objection(model: PreTrainedModel) -> str | None:
        """Return the reason why there is no such step for a model, or None."""
        if model.get_input_embeddings().weight.device.type != "cpu":
            return "it is for CPUs"
        if any(p.dtype != torch.float32 for p in model.parameters()):
            return "it is for fp32"
        if getattr(model.config, "sliding_window", None) is not None:
            return "the model attends to a sliding window"
        decoder = getattr(model, "model", None)
        parts = [(layer, _LAYER) for layer in getattr(decoder, "layers", [])]
        for layer, _ in list(parts):
            parts += [(getattr(layer, "self_attn", None), _ATTENTION),
                      (getattr(layer, "mlp", None), _MLP)]
        if not parts or not all(_consists_of(part, names) for part, names in parts):
            return "the model is not made of LLaMA's modules"
        try:
            library()
        except KernelsMissing as error:
            return str(error)
        return None

    def fill(self) -> None:
        """Copy the model's weights as they are now into the layout of the kernels."""
        if not self._layers:
            self._layers = [_Layer(layer) for layer in self._model.model.layers]
            self._head = _Joined(self._model.get_output_embeddings())
        for layer in self._layers:
            layer.fill()
        self._head.fill()

    def release(self) -> None:
        """Free the copy of the weights."""
        self._layers, self._head = [], None

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """Return logits [N, V] after tokens [N]; their keys and values go to the cache's front."""
        decoder = self._model.model
        x = decoder.embed_tokens(tokens)
        cosines, sines = (part.squeeze(1) for part in decoder.rotary_emb(x, cache.positions))
        for layer, held in zip(self._layers, cache.layers, strict=True):
            joined = layer.attention_in(_normed(layer.norms[0], x))
            x = x + layer.attention_out(attended(
                joined, cosines, sines, held.keys, held.values, cache.front, cache.starts,
                layer.scaling,
            ))
            gate, up = layer.mlp_in(_normed(layer.norms[1], x)).chunk(2, dim=-1)
            x = x + layer.mlp_out(layer.activation(gate) * up)
        return self._head(_normed(decoder.norm, x))


def _consists_of(module: Any, names: set[str]) -> bool:
    """Return whether a module has exactly these submodules, with the attributes that are read."""
    parts = dict(module.named_children()) if isinstance(module, nn.Module) else {}
    return parts.keys() == names and all(
        hasattr(part, "variance_epsilon") for name, part in parts.items() if "norm" in name
    ) and all(hasattr(part, "weight") for name, part in parts.items() if "proj" in name)
