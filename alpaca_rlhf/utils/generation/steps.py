"""Decoding steps: the logits after the next token of every row, by the fastest correct way.

A model's own forward pass always works. Two other steps are faster where they apply: one compiled
for a CPU (`cpu/llama_step.py`) and the forward pass as a CUDA graph (`cuda_graph.py`). `fastest`
takes the first that applies and gives the forward pass's logits on this machine.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from alpaca_rlhf.utils import console, rl_math
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.cuda_graph import GraphStep, attends_in_windows
from alpaca_rlhf.utils.generation.kv_cache import SlotCache

# Largest difference of logits, relative to the largest logit: sums are taken in another order.
TOLERANCE, COARSE_TOLERANCE = {torch.float32: 1e-4}, 0.05


class DecodingStep(Protocol):
    """Computes the next logits of all rows of a cache.

    Attributes:
        name: for messages.
        reusable: whether its buffers are worth keeping until `fill` is called again.
    """

    name: str
    reusable: bool = True

    @staticmethod
    def objection(model: PreTrainedModel) -> str | None:
        """Return the reason why the step cannot be used for a model, or None."""
        return None

    def fill(self) -> None:
        """Read the model's weights: before the first call, and after every change."""
        return

    def release(self) -> None:
        """Free what `fill` and calls have allocated; `fill` allocates it again."""
        return

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """Return logits [N, V] after tokens [N], written to the front of the cache.

        They may be overwritten by the next call.
        """


class ForwardStep(DecodingStep):
    """The forward pass of any causal LM with an ordinary KV cache."""

    name = "the model's forward pass"

    def __init__(self, model: Any) -> None:
        self._model = model

    def _mask(self, cache: SlotCache) -> Tensor:
        return cache.visible.long()

    def __call__(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """Return logits [N, V] after tokens [N]."""
        return self._model(
            input_ids=tokens.unsqueeze(-1), attention_mask=self._mask(cache),
            position_ids=cache.positions, past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]


class MaskedStep(ForwardStep):
    """The forward pass with a mask that is made here; transformers would wait for the device.

    For models whose layers attend to all columns, and that need no mask [N, W] for other ends.
    """

    def _mask(self, cache: SlotCache) -> Tensor:
        return cache.additive_mask(self._model.dtype)


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Cache]:
    """Return the logits [B, V] after prompts, and their keys and values.

    Args:
        model: a causal LM.
        ids, mask: prompts [B, P], padded left.
    """
    # Without the model's configuration: layers with a window would keep only the window.
    cache = DynamicCache()
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=rl_math.position_ids(mask),
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]
    return logits, cache


def fastest(model: Any, use_cuda_graph: bool) -> DecodingStep:
    """Return a filled step for a model; say why a faster one is not used.

    Args:
        model: a causal LM with whole weights, in evaluation mode.
        use_cuda_graph: try a CUDA graph first.
    """
    kinds: Sequence[type[GraphStep | LlamaStep]] = (
        (GraphStep, LlamaStep) if use_cuda_graph else (LlamaStep,)
    )
    for kind in kinds:
        reason, level = kind.objection(model), ""
        if reason is None:
            step = kind(model)
            level, reason = "warning: ", _failure(model, step)
            if reason is None:
                return step
        console.say(f"{level}{kind.name} is not used: {reason}")
    masked = MaskedStep(model)
    return ForwardStep(model) if attends_in_windows(model) or _failure(model, masked) else masked


def _failure(model: Any, step: DecodingStep) -> str | None:
    """Fill a step; return the reason why it cannot be used, or None."""
    try:
        step.fill()
        if agrees(model, step):
            return None
    except Exception as error:  # whatever a library raises for what a graph cannot hold
        return f"it fails ({(str(error) or type(error).__name__).splitlines()[0]})"
    return "it does not give the logits of the model's forward pass"


@torch.no_grad()
def agrees(model: Any, step: DecodingStep) -> bool:
    """Return whether a filled step gives the logits of the model's forward pass, up to rounding.

    Two arbitrary prompts of different lengths are continued greedily by a few tokens.
    """
    width, steps = 6, 3
    words = model.get_input_embeddings().num_embeddings
    ids = torch.arange(2 * width, device=model.device).view(2, width) * 7 % words
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    logits, prompts = prefill(model, ids, mask)
    forward, caches = ForwardStep(model), (SlotCache(), SlotCache())
    for cache in caches:
        cache.begin(2, width, steps, ids.device)
        cache.add_rows(2)
        cache.admit(prompts, [0, 1], [0, 1], [width, width - 2])
    for _ in range(steps):
        token = logits.argmax(-1)
        for cache in caches:
            cache.make_room()
        logits = forward(token, caches[0])
        given = step(token, caches[1])
        for cache in caches:
            cache.advance()
        difference = (given - logits).abs().max() / logits.abs().max()
        if not difference <= TOLERANCE.get(logits.dtype, COARSE_TOLERANCE):
            return False
    return True
