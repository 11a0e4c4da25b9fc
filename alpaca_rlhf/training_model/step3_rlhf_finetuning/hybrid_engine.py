"""One set of actor weights, two modes: train and generate.

Inside `generation_mode` dropout and gradient checkpointing are off. With the hybrid engine enabled
ZeRO-3's shards are gathered once for the whole rollout instead of once a token, LoRA is folded into
the weights and, on a CPU, the weights are laid out for products of few rows. On leaving, also by an
exception, everything is as it was, bit for bit.

    batch = HybridEngine(engine, enabled=True).generate(request, sampling, eos_ids, pad_id)

docs/hybrid_engine.md says what each of these gains, and how that was measured.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from transformers import PreTrainedModel

from alpaca_rlhf.training_model.step3_rlhf_finetuning import deepspeed_backend
from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.cuda_graph import GraphStep
from alpaca_rlhf.utils.generation.decoder import (
    Decoder,
    RolloutBatch,
    RolloutRequest,
    SamplingConfig,
    agrees,
)
from alpaca_rlhf.utils.model.lora import folded, unwrapped

TOGETHER = 2**17  # numbers of a parameter that costs a call of its own more than a copy
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class HybridEngine:
    """Takes the actor to generation and back.

    Args:
        engine: the actor's DeepSpeed engine.
        enabled: gather, fold and lay out; else decode in the training layout.
        slots: replies that are drawn at once; 0 is all of a request.
        unpin: under ZeRO-3, do not hold the whole weights through the rollout: they are gathered
            layer by layer in every forward pass, all ranks in step.
        release_cache: give the memory of KV cache and laid out weights back after each rollout.
        theirs: generate with DeepSpeed's own hybrid engine, which `engine` then is, as
            long as it gives the same greedy tokens as ours.
        graphs: decode by CUDA graphs, if they give the forward pass's logits.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, enabled: bool, slots: int = 0,
        unpin: bool = False, release_cache: bool = False, theirs: bool = False,
        graphs: bool = False,
    ) -> None:
        self.engine = engine
        self.enabled = enabled
        self._whole = enabled and not unpin
        self._release_cache = release_cache
        self._theirs = theirs
        self._slots = slots
        self._kind: type[LlamaStep] | type[GraphStep] = GraphStep if graphs else LlamaStep
        self._trusted: bool | None = None  # a step of that kind, once it has been compared
        self._step: LlamaStep | GraphStep | None = None
        self._decoder = Decoder(engine.module, slots, in_step=self.decodes_in_step)

    @property
    def decodes_in_step(self) -> bool:
        """Whether each token is a collective: ZeRO-3 with shards that are not gathered."""
        return self.engine.zero_optimization_stage() == 3 and not self._whole

    @property
    def seconds(self) -> dict[str, float]:
        """What generation has spent so far on enter, prefill, decode, sampling, refill, leave."""
        return self._decoder.seconds

    def generate(
        self,
        request: RolloutRequest,
        sampling: SamplingConfig,
        eos_ids: Tensor,
        pad_id: int,
        generator: torch.Generator | None = None,
    ) -> RolloutBatch:
        """Draw replies, in one visit to generation mode; arguments as `Decoder.generate` has."""
        if self._theirs and self._theirs_is_right(request, eos_ids, pad_id):
            return deepspeed_backend.generate(
                self.engine, request, sampling, eos_ids, pad_id, generator, self._slots
            )
        with self.generation_mode():
            return self._decoder.generate(request, sampling, eos_ids, pad_id, generator)

    @contextlib.contextmanager
    def generation_mode(self) -> Iterator[nn.Module]:
        """The model to decode with."""
        model, start = self.engine.module, time.perf_counter()
        training = model.training
        model.eval()
        try:
            with contextlib.ExitStack() as stack:
                if self._whole:
                    stack.enter_context(_gathered(model))
                if not self.decodes_in_step and self.enabled:
                    stack.enter_context(folded(model))
                    stack.enter_context(self._own_step(model))
                start = self._took("enter", start)
                try:
                    yield model
                finally:
                    start = time.perf_counter()
        finally:
            model.train(training)
            if self._release_cache:
                self._decoder.cache.release()
                self._step = None
                get_accelerator().empty_cache()
            self._took("leave", start)

    @contextlib.contextmanager
    def _own_step(self, model: nn.Module) -> Iterator[None]:
        """A decoding step of our own where there is one for the model."""
        plain = unwrapped(model)
        if self._trusted is None:
            self._trusted = self._has_step(plain)
        if self._trusted:
            if self._step is None:
                self._step = self._kind(plain)
            self._step.fill()
            self._decoder.step = self._step
        try:
            yield
        finally:
            self._decoder.step = None
            if self._kind is GraphStep:  # where the weights will be next time is not known
                self._step = None

    def _has_step(self, plain: PreTrainedModel) -> bool:
        """Whether there is such a step, and it is right; if not, that is said."""
        forward = "decoding goes through the model's forward pass"
        objection = self._kind.objection(plain)
        if objection is not None:
            console.say(f"{forward}: {objection}")
            return False
        self._step = self._kind(plain).fill()
        try:
            if agrees(plain, self._step):
                return True
            wrong = "does not give the model's own logits"
        except RuntimeError as error:  # what a CUDA graph cannot hold
            wrong = f"fails ({str(error).splitlines()[0]})"
        self._step = None
        console.say(f"warning: {self._kind.name} {wrong}; {forward}")
        return False

    def _theirs_is_right(self, request: RolloutRequest, eos_ids: Tensor, pad_id: int) -> bool:
        """Whether DeepSpeed's engine writes what ours does; if not, ours is used from here on.

        Asked at every rollout: weights that are not followed show only after an update.
        """
        few, greedy = deepspeed_backend.probe(request)
        with self.generation_mode():
            ours = self._decoder.generate(few, greedy, eos_ids, pad_id)
        objection = deepspeed_backend.objection(self.engine, ours, few, greedy, eos_ids, pad_id)
        if objection is not None:
            self._theirs = False
            console.say(
                f"warning: --hybrid_engine_backend deepspeed: {objection}; the native backend is "
                "used"
            )
        return self._theirs

    def _took(self, part: str, start: float) -> float:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - start
        return now


@contextlib.contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights on every rank, and none of the hooks that would partition them again."""
    sharded: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    # DeepSpeed gathers parameters one by one; small ones go together first, as they do in training.
    small = [
        p for p in sharded
        if p.ds_numel <= TOGETHER and p.ds_status == ZeroParamStatus.NOT_AVAILABLE
    ]
    if small:
        small[0].all_gather_coalesced(small).wait()
    with deepspeed.zero.GatheredParameters(sharded):
        # Past a module's own `setattr`, which is slow.
        kept = [(vars(m), name, vars(m)[name]) for m in model.modules() for name in _HOOKS]
        try:
            for attributes, name, _ in kept:
                attributes[name] = OrderedDict()
            yield
        finally:
            for attributes, name, hooks in kept:
                attributes[name] = hooks
