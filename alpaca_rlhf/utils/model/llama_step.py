"""One decoding step of a LLaMA, written out for a CPU in fp32.

A step multiplies a few rows with every weight of the model: what it costs is reading the weights,
and Python between the products. So the weights are laid out in oneDNN's blocks for products of few
rows, projections of one input are joined into one product, and nothing stands between the products
but what the formulas ask for. The packed weights are a copy, made on entering generation mode.

Any model made of the LLaMA family's parts has such a step (LLaMA, Mistral, Qwen2 and what is built
like them); `LlamaStep.made_for` says why another has not. That the parts mean the same is not taken
on trust: `agrees` compares a step with the model's own forward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from alpaca_rlhf.utils import rl_math
from alpaca_rlhf.utils.model.decoding import forward_step
from alpaca_rlhf.utils.model.slot_cache import SlotCache

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PACKED_FROM = 2**18  # numbers of a weight; calling oneDNN takes longer than a smaller one gains
AGREEMENT = 1e-4  # of logits, relative to the largest: fp32 in another order of summation


class _Product:
    """x -> x W^T + b of one or more linear layers that have the same input."""

    def __init__(self, layers: Sequence[Any], rows: int) -> None:
        weights = [layer.weight for layer in layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        self._packed = weight.numel() >= PACKED_FROM
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self._weight = weight
        biases = [
            torch.zeros(len(w)) if layer.bias is None else layer.bias
            for layer, w in zip(layers, weights, strict=True)
        ]
        self._bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self._bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


class _Layer:
    """The packed weights of a decoder layer."""

    def __init__(self, layer: Any, rows: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_in = _Product(
            [attention.q_proj, attention.k_proj, attention.v_proj], rows
        )
        self.attention_out = _Product([attention.o_proj], rows)
        self.mlp_in = _Product([mlp.gate_proj, mlp.up_proj], rows)
        self.mlp_out = _Product([mlp.down_proj], rows)
        self.activation = mlp.act_fn
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.size, self.scaling = attention.head_dim, attention.scaling
        self.queries = attention.q_proj.weight.shape[0] // self.size
        self.keys = attention.k_proj.weight.shape[0] // self.size


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class LlamaStep:
    """The next token's logits, for every row of a cache.

    Args:
        model: one that `made_for` has no objection to, weights whole.
        rows: of the products that the weights are packed for.
    """

    def __init__(self, model: Any, rows: int) -> None:
        decoder = model.model
        self._embed, self._rotary, self._norm = (
            decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        )
        self._layers = [_Layer(layer, rows) for layer in decoder.layers]
        self._head = _Product([model.get_output_embeddings()], rows)

    @staticmethod
    def made_for(model: PreTrainedModel) -> str | None:
        """None, or what stands in the way of a step of this model."""
        weight = model.get_input_embeddings().weight
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return "it is for a CPU with oneDNN"
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
            return "the model is not made of LLaMA's parts"
        return None

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """Logits [rows, V] after tokens [rows], whose keys and values go to the cache's front."""
        x = self._embed(tokens)
        cos, sin = self._rotary(x, cache.positions)
        half = sin.shape[-1] // 2
        # What `rotate_half` negates is negated in the sine, once for all layers.
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        mask = torch.zeros(cache.visible.shape).masked_fill_(~cache.visible, -torch.inf)
        mask = mask[:, None, None, :]
        for i, layer in enumerate(self._layers):
            x = x + layer.attention_out(self._attended(layer, i, x, cos, sin, mask, cache))
            gate, up = layer.mlp_in(_normed(layer.norms[1], x)).chunk(2, dim=-1)
            x = x + layer.mlp_out(layer.activation(gate) * up)
        return self._head(_normed(self._norm, x))

    def _attended(
        self, layer: _Layer, index: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
        cache: SlotCache,
    ) -> Tensor:
        """Attention [rows, heads * size] over the cache and the new token."""
        joined = layer.attention_in(_normed(layer.norms[0], x)).view(len(x), -1, layer.size)
        turning = joined[:, : layer.queries + layer.keys]
        turned = torch.addcmul(turning * cos, turning.roll(layer.size // 2, -1), sin)
        keys, values = cache.update(
            turned[:, layer.queries :].unsqueeze(2),
            joined[:, layer.queries + layer.keys :].unsqueeze(2), index,
        )
        attended = F.scaled_dot_product_attention(
            turned[:, : layer.queries].unsqueeze(2), keys, values, attn_mask=mask,
            scale=layer.scaling, enable_gqa=layer.queries != layer.keys,
        )
        return attended.reshape(len(x), -1)


def _consists_of(module: Any, names: set[str]) -> bool:
    """Whether these are a module's parts, each with what a step reads off it."""
    parts = dict(module.named_children()) if isinstance(module, nn.Module) else {}
    return parts.keys() == names and all(
        hasattr(part, "variance_epsilon") for name, part in parts.items() if "norm" in name
    ) and all(hasattr(part, "weight") for name, part in parts.items() if "proj" in name)


@torch.no_grad()
def agrees(model: Any, step: LlamaStep) -> bool:
    """Whether a step gives the logits of the model's own forward pass, to fp32's rounding.

    Two made-up prompts of unlike length are continued by a few tokens, the likeliest ones.
    """
    width, steps = 6, 3
    ids = torch.arange(2 * width).view(2, width) * 7 % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    prompts = DynamicCache()
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=rl_math.position_ids(mask),
        past_key_values=prompts, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]
    caches = SlotCache(), SlotCache()
    for cache in caches:
        cache.begin(2, width, steps, ids.device)
        cache.admit(prompts, [0, 1], [0, 1], [width, width - 2])
    for _ in range(steps):
        token = logits.argmax(-1)
        for cache in caches:
            cache.make_room()
        logits = forward_step(model, token, caches[0])
        given = step(token, caches[1])
        for cache in caches:
            cache.advance()
        if (given - logits).abs().max() > AGREEMENT * logits.abs().max():
            return False
    return True

