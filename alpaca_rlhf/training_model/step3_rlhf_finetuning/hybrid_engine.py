"""One set of actor weights, two modes: training and generation.

Inside `generation_mode` dropout and gradient checkpointing are off. With the hybrid engine enabled,
ZeRO-3 shards are gathered once for the whole rollout instead of once per token, LoRA adapters are
merged into the weights, and a faster decoding step is used where there is one. On leaving, also by
an exception, everything is as it was, bit for bit.

    hybrid = HybridEngine(actor, HybridEngineConfig(enable_hybrid_engine=True))
    rollout = hybrid.generate(prompts, sampling, eos_ids, pad_id)

docs/hybrid_engine.md says what each of these gains and how that was measured.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import HybridEngineConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, Rollout
from alpaca_rlhf.utils.generation.decoder import Decoder
from alpaca_rlhf.utils.generation.rollout_engine import RolloutEngine
from alpaca_rlhf.utils.generation.steps import DecodingStep, fastest
from alpaca_rlhf.utils.model.lora import folded, unwrapped

# Parameters of up to this many elements cost more to gather one by one than to copy together.
GATHERED_TOGETHER = 2**17
LOOK_EVERY = 4  # decoding steps; an accelerator goes on meanwhile
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class HybridEngine(RolloutEngine):
    """Takes the actor from training to generation and back.

    Args:
        engine: the actor's DeepSpeed engine.
        config: how to generate.
        slots: maximum number of responses that are decoded together; 0 is no limit.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, config: HybridEngineConfig, slots: int = 0
    ) -> None:
        self._engine, self._config = engine, config
        self._fast_step: DecodingStep | None = None  # chosen at the first visit, filled at each
        waits = distributed.on_cpu() or self.decodes_in_step
        self._decoder = Decoder(engine.module, slots, in_step=self.decodes_in_step,
                                look_every=1 if waits else LOOK_EVERY)

    @property
    def decodes_in_step(self) -> bool:
        """True if each forward pass is a collective: ZeRO-3 with shards that are not gathered."""
        gathers = self._config.enable_hybrid_engine and not self._config.unpin_actor_parameters
        return self._engine.zero_optimization_stage() == 3 and not gathers

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent on enter, prefill, decode, sampling, refill and leave."""
        return self._decoder.seconds

    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, eos_ids: Tensor, pad_id: int,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """Generate responses to prompts [B, P] in one visit to generation mode.

        The arguments are those of `Decoder.generate`.
        """
        with self.generation_mode() as decoder:
            return decoder.generate(prompts, sampling, eos_ids, pad_id, generator)

    @contextlib.contextmanager
    def generation_mode(self) -> Iterator[Decoder]:
        """Enter generation mode; yield a decoder to use inside."""
        decoder, model, leaving = self._decoder, self._engine.module, contextlib.ExitStack()
        leaving.callback(self._release_buffers)
        leaving.callback(model.train, model.training)
        model.eval()
        base = unwrapped(model)
        if base.config._attn_implementation.startswith("flash"):
            # Flash attention finds the lengths of padded rows on the host, in every layer.
            leaving.callback(base.set_attn_implementation, base.config._attn_implementation)
            base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
        try:
            with decoder.timed("enter"):
                if self._config.enable_hybrid_engine and not self.decodes_in_step:
                    leaving.enter_context(_gathered(model))
                    leaving.enter_context(folded(model))
                    decoder.step = self._filled_step(model)
            yield decoder
        finally:
            with decoder.timed("leave"), leaving:
                decoder.step = None

    def _filled_step(self, model: nn.Module) -> DecodingStep:
        """Return the fastest decoding step with the weights of this visit."""
        if self._fast_step is None:
            self._fast_step = fastest(unwrapped(model), self._config.enable_cuda_graph)
        else:
            self._fast_step.fill()
        return self._fast_step

    def shutdown(self) -> None:
        """Free the KV cache, and the weights laid out for decoding."""
        self._release_buffers(at_end=True)

    def _release_buffers(self, at_end: bool = False) -> None:
        """Free what is not kept for the next visit."""
        cache = self._decoder.cache
        release = at_end or self._config.release_inference_cache or (
            cache.size > distributed.free_memory()[0])
        if self._fast_step and (release or not self._fast_step.reusable):
            self._fast_step.release()
        if release:
            cache.release()
            get_accelerator().empty_cache()


@contextlib.contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Hold whole weights on every rank, without the hooks that would partition them again."""
    sharded: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    # DeepSpeed gathers parameters one by one; small ones go together first, as in training.
    small = [
        p for p in sharded
        if p.ds_numel <= GATHERED_TOGETHER and p.ds_status == ZeroParamStatus.NOT_AVAILABLE
    ]
    if small:
        small[0].all_gather_coalesced(small).wait()
    with deepspeed.zero.GatheredParameters(sharded):
        # Without a module's own `setattr`, which is slow.
        kept = [(vars(m), name, vars(m)[name]) for m in model.modules() for name in _HOOKS]
        try:
            for attributes, name, _ in kept:
                attributes[name] = OrderedDict()
            yield
        finally:
            for attributes, name, hooks in kept:
                attributes[name] = hooks
