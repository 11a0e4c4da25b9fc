"""Memory and arithmetic of a model's passes, from its own code run on tensors without data.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = passes(model, Job(rows=4, length=512, tokens=2048))
    found.training.activations                   # bytes at the peak of a backward pass

Torch's fake tensors have shapes only, so nothing is allocated or computed, and every family's own
layers, attention kernels and checkpoints count.
"""

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import DynamicCache, masking_utils

from alpaca_rlhf.utils import losses
from alpaca_rlhf.utils.model.causal_lm import TokenHead
from alpaca_rlhf.utils.model.lora import unwrapped
from alpaca_rlhf.utils.model.reward_model import TokenScorer
from alpaca_rlhf.utils.projection import Head


class Job(NamedTuple):
    """A micro-batch: rows, their length and trained tokens; of which kind the loss is."""

    rows: int
    length: int
    tokens: int = 0
    policy: bool = False  # log-probabilities and entropies in place of a token loss
    checkpointing: bool = False
    trains: bool = True  # there is a backward pass


class Moment(NamedTuple):
    """Bytes at the peak of a pass: gradients of weights, logits, and everything else it made."""

    activations: float = 0.0
    logits: float = 0.0
    gradients: float = 0.0


class Passes(NamedTuple):
    """Bytes and FLOPs of the passes over a micro-batch.

    Attributes:
        inference: a forward pass without a graph.
        saved: bytes kept from the forward to the backward pass.
        early, late: forward and backward, until half of the weights have their gradients and after
            that; the peak is that of all but gradients, which begin at none. Apart, each grows
            linearly with the layers.
        cache: bytes of keys and values of one token.
        inference_flops, training_flops: of the whole micro-batch.
    """

    inference: Moment
    saved: float
    early: Moment
    late: Moment
    cache: float
    inference_flops: float
    training_flops: float

    @property
    def training(self) -> Moment:
        """Peak of forward and backward."""
        return max(self.early, self.late, key=lambda moment: sum(moment[:2]))


class Meter(TorchDispatchMode):
    """Adds up the bytes of living tensors, and FLOPs, of the operations inside it.

    Args:
        model: its weights do not count.
        words: size of the vocabulary; tensors [..., words] are logits.
    """

    def __init__(self, model: nn.Module, words: int = 0) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._words, self.now, self.logits, self.gradients = words, 0, 0, 0
        self.reset()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._left = len(trained) // 2
        for weight in trained:
            weight.register_post_accumulate_grad_hook(self._accumulated)

    def reset(self) -> None:
        """Begin a new pass."""
        self.flops, self.peaks = 0.0, [Moment(), Moment()]

    def _accumulated(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.gradients += weight.grad.nbytes
        self._left -= 1

    def _freed(self, key: int, size: int, logits: int) -> None:
        self._known.discard(key)
        self.now -= size
        self.logits -= logits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count what it makes."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor)
        moment = Moment(self.now - self.logits - self.gradients, self.logits, self.gradients)
        late = int(self._left < 0)
        if sum(moment[:2]) > sum(self.peaks[late][:2]):
            self.peaks[late] = moment
        self.flops += _flops(func, args, kwargs or {}, found)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            logits = size if tensor.dim() > 1 and tensor.shape[-1] == self._words else 0
            self._known.add(key)
            self.now, self.logits = self.now + size, self.logits + logits
            weakref.finalize(storage, self._freed, key, size, logits)


def _flops(func: Any, args: Any, kwargs: dict[str, Any], found: Any) -> float:
    """Return the FLOPs of a matrix product or of attention, else 0."""
    if "attention_for_cpu" in str(func):  # a forward pass has two products, a backward pass five
        q, k = args[1:3] if (backward := "backward" in str(func)) else args[:2]
        return (5 if backward else 2) * 2.0 * q.numel() * k.shape[-2]
    count = flop_registry.get(func.overloadpacket)
    return float(count(*args, **kwargs, out_val=found)) if count else 0.0


DEPTHS = (2, 4)  # layers of the two models that a deeper one is extrapolated from


def passes(model: Any, job: Job, adapted: Callable[[Any], Any] = lambda model: model) -> Passes:
    """Return what passes over a micro-batch take; of a deep model from its first layers.

    Args:
        model: a causal LM or a sequence classifier on the meta device, without an adapter; unused
            afterwards.
        job: the micro-batch.
        adapted: model -> model with its adapter.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [name for name, part in model.named_modules()
             if isinstance(part, nn.ModuleList) and len(part) == depth]
    if depth <= 2 * DEPTHS[1] or len(lists) != 1:
        return trace(adapted(model), job)
    few, more = (trace(adapted(_cut(model, lists[0], layers)), job) for layers in DEPTHS)
    share = (depth - DEPTHS[1]) / (DEPTHS[1] - DEPTHS[0])

    def grown(a: Any, b: Any) -> Any:
        if isinstance(a, Moment):
            return Moment._make(max(0.0, grown(*pair)) for pair in zip(a, b, strict=True))
        return b + share * (b - a)

    return Passes._make(grown(*pair) for pair in zip(few, more, strict=True))


def _cut(model: Any, layers: str, depth: int) -> Any:
    """Return a copy of a model with its first layers."""
    whole = model.get_submodule(layers)
    model.set_submodule(layers, nn.ModuleList())
    made = copy.deepcopy(model)
    model.set_submodule(layers, whole)
    made.set_submodule(layers, nn.ModuleList(copy.deepcopy(list(whole[:depth]))))
    return made


def trace(model: Any, job: Job) -> Passes:
    """Run a micro-batch through a model without data: forward, backward, and forward alone.

    Args:
        model: a causal LM or a sequence classifier on the meta device, with its adapter if it has
            one; it is used up.
        job: the micro-batch.
    """
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # errors raise
    with FakeTensorMode(), _one_sequence_in_a_row():
        _leave_meta(model)
        model.train()
        plain = unwrapped(model)
        if job.checkpointing:
            plain.gradient_checkpointing_enable(
                {"use_reentrant": False, "preserve_rng_state": False})
            plain.enable_input_require_grads()
        words = getattr(plain.config.get_text_config(), "vocab_size", 0)
        run = partial(_scores if hasattr(plain, "score") else _language, model)
        ids = torch.zeros(job.rows, job.length, dtype=torch.long)
        saved, early, late, flops, cache = 0, Moment(), Moment(), 0.0, DynamicCache()
        with Meter(model, words) as meter:
            if job.trains:
                loss = run(ids, job)
                saved = meter.now
                loss.backward()
                (early, late), flops = meter.peaks, meter.flops
                del loss
                model.zero_grad()
                meter.gradients = 0
            with torch.no_grad():
                model.eval()
                start = meter.now
                meter.reset()
                run(ids, job)
                alone, forward = max(meter.peaks), meter.flops
                decoder = getattr(plain, plain.base_model_prefix)
                decoder(input_ids=ids[:1], past_key_values=cache, use_cache=True)
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    alone = Moment(max(0, alone.activations - start), alone.logits)
    return Passes(
        inference=alone, saved=saved, early=early, late=late, cache=kept / job.length,
        inference_flops=forward, training_flops=flops)


@contextlib.contextmanager
def _one_sequence_in_a_row() -> Iterator[None]:
    """Let transformers not look for packed sequences, which needs data: rows then have no mask."""
    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


def _leave_meta(model: nn.Module) -> None:
    """Move weights and buffers from meta to the CPU, where attention has its fast kernel."""
    moved: dict[int, Any] = {}  # a weight that several modules share stays one
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None or old.device.type != "meta":
                continue
            if id(old) not in moved:
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                weight = isinstance(old, nn.Parameter)
                moved[id(old)] = old, nn.Parameter(new, old.requires_grad) if weight else new
            (module._parameters if name in module._parameters else module._buffers)[
                name] = moved[id(old)][1]


def _scores(model: Any, ids: Tensor, job: Job) -> Tensor:
    return TokenScorer(model)(ids).sum()


def _language(model: Any, ids: Tensor, job: Job) -> Tensor:
    """Return the loss of `job.tokens` tokens, computed as `at_labels` does."""
    # Chosen by position: which tokens a mask chooses is data.
    chosen = torch.arange(max(1, job.tokens)) % ids.numel()
    given: list[Tensor] = []

    def asked(hidden: Tensor, head: Head) -> Tensor:
        hidden, targets = hidden.flatten(0, 1)[chosen], ids.flatten()[chosen]
        compute = partial(losses.chosen_logprobs, entropy=True) if job.policy else losses.token_loss
        given.append(compute(hidden, head, targets).sum())
        return given[0]

    head = unwrapped(model).get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = TokenHead
    if isinstance(head, TokenHead):
        head.asked = asked
        found = model(input_ids=ids, use_cache=False).logits
        head.asked = None
        if given and found is given[0]:
            return found  # else the model scales or caps its logits
    given.clear()
    return asked(model(input_ids=ids, use_cache=False).logits, Head(None))
