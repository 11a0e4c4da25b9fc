"""One set of actor weights, two modes: train and generate.

Inside `generation_mode` dropout and gradient checkpointing are off; with the hybrid engine enabled
ZeRO-3's shards are gathered once for the whole rollout instead of once a token, and LoRA is folded
into the weights. On leaving, also by an exception, everything is as it was, bit for bit.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch import nn

from alpaca_rlhf.utils.model.lora import folded

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class HybridEngine:
    """Takes the actor to generation and back.

    Args:
        engine: the actor's DeepSpeed engine.
        enabled: gather and fold; else decode in the training layout.
        release_cache: give the accelerator's cached memory back after each rollout.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, enabled: bool, release_cache: bool = False
    ) -> None:
        self.engine = engine
        self.enabled = enabled
        self._release_cache = release_cache

    @property
    def decodes_in_step(self) -> bool:
        """Whether each token is a collective: ZeRO-3 with shards that are not gathered."""
        return self.engine.zero_optimization_stage() == 3 and not self.enabled

    @contextlib.contextmanager
    def generation_mode(self) -> Iterator[nn.Module]:
        """The model to decode with."""
        model = self.engine.module
        training = model.training
        model.eval()
        try:
            with contextlib.ExitStack() as stack:
                if self.enabled:
                    stack.enter_context(_gathered(model))
                    stack.enter_context(folded(model))
                yield model
        finally:
            model.train(training)
            if self._release_cache:
                get_accelerator().empty_cache()


@contextlib.contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights on every rank, and none of the hooks that would partition them again."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    with deepspeed.zero.GatheredParameters(sharded):
        kept = [(m, name, getattr(m, name)) for m in model.modules() for name in _HOOKS]
        try:
            for module, name, _ in kept:
                setattr(module, name, OrderedDict())
            yield
        finally:
            for module, name, hooks in kept:
                setattr(module, name, hooks)
