"""Drawing replies from a causal LM: the distribution, and continuous batching with a KV cache.

The prompts of a whole request go through a fixed number of slots. Prompts of like length are
prefilled together, a wave at a time; the replies to one prompt share its prefill. Then every step
gives each slot a token: a reply that has ended leaves its slot, and the next prompt, prefilled
already, takes it. What a reply is drawn with are uniform numbers of its own, fixed at the start by
the seed, so it does not depend on what it was batched with.

The shapes are those of `deepspeed.runtime.rollout`, with log-probabilities and a mask beside them.

    request = RolloutRequest(ids, mask)
    batch = Decoder(model).generate(request, SamplingConfig(64), eos_ids, pad_id)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from alpaca_rlhf.utils import distributed, rl_math
from alpaca_rlhf.utils.generation.kv_cache import SlotCache

FEW, BLOCK = 4096, 256  # weights that one running sum is for; those of a block, where it is not
BELOW_ONE = 1 - 2**-53  # the largest fp64 below 1
# Of logits, relative to the largest: the same sums in another order.
AGREEMENT, ROUGHLY = {torch.float32: 1e-4}, 0.05
WORTH_A_PASS = 256  # tokens of padding that cost more than another pass over the weights


@dataclass(frozen=True)
class SamplingConfig:
    """How replies are drawn.

    Attributes:
        max_new_tokens: most tokens of a reply, eos included.
        temperature: divides the logits; 0 is greedy.
        top_p: smallest set of tokens with at least this probability; 1 is all.
        top_k: only the k likeliest tokens; 0 is all.
        repetition_penalty: the logit of a token that occurs in prompt or reply is divided by it
            if positive, multiplied if negative (Keskar et al. 2019, section 4.1); 1 does nothing.
        n_samples_per_prompt: replies to each prompt.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    n_samples_per_prompt: int = 1


@dataclass(frozen=True)
class RolloutRequest:
    """Prompts."""

    prompt_ids: Tensor  # [B, P], padded left
    prompt_attention_mask: Tensor  # [B, P]


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts and replies: N = B * n_samples_per_prompt rows, the replies to a prompt in a row."""

    input_ids: Tensor  # [N, P + R], R the longest reply (of this rank)
    attention_mask: Tensor  # [N, P + R]
    response_start_idx: Tensor  # [N], P throughout: prompts are padded left
    response_mask: Tensor  # [N, R], 1 up to and including the first eos
    logprobs: Tensor  # [N, R] of the drawn tokens, logits over temperature; 0 outside the mask


def sample(
    logits: Tensor, sampling: SamplingConfig, uniform: Tensor | None, seen: Tensor | None = None
) -> Tensor:
    """One token for each row, by inverting the distribution function.

    Args:
        logits: [B, V].
        sampling: the distribution.
        uniform: [B] in [0, 1), fp64; None where greedy.
        seen: [B, V], which tokens the repetition penalty is for.

    Returns:
        Tokens [B].
    """
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty),
                             logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None, "only greedy decoding needs no numbers to draw with"
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    order = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, order = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, order = logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        # A token is kept while those before it do not reach top_p: the likeliest always is.
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        outside = cumulative - probabilities >= sampling.top_p * cumulative[:, -1:]
        probabilities = probabilities.masked_fill(outside, 0.0)
    index = _drawn(probabilities, uniform)
    return index if order is None else order.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _drawn(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where [B] the distribution functions of weights [B, N] reach numbers [B] in [0, 1).

    Of many weights a block is found first, then a place in it: running sums of a whole vocabulary
    in fp64 would be the dearest part of a step.
    """
    count = weights.shape[-1]
    if count <= FEW:
        return _found(weights, uniform)[0]
    blocks = F.pad(weights, (0, -count % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, inside = _found(blocks.sum(-1), uniform)
    rows = torch.arange(len(weights), device=weights.device)
    place = _found(blocks[rows, block], inside)[0]
    return (block * BLOCK + place).clamp(max=count - 1)


def _found(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where the distribution functions reach the numbers, and how far in its weight, in [0, 1)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    aim = uniform.unsqueeze(-1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, aim, right=True).clamp(max=weights.shape[-1] - 1)
    inside = 1 - (cumulative.gather(-1, index) - aim) / weights.gather(-1, index)
    return index.squeeze(-1), inside.clamp(0, BELOW_ONE).squeeze(-1)


def forward_step(model: nn.Module, tokens: Tensor, cache: SlotCache) -> Tensor:
    """Logits [rows, V] after tokens [rows], by the forward pass of any causal LM."""
    return model(
        input_ids=tokens.unsqueeze(-1), attention_mask=cache.visible.long(),
        position_ids=cache.positions, past_key_values=cache, use_cache=True, logits_to_keep=1,
    ).logits[:, -1]


Step = Callable[[Tensor, SlotCache], Tensor]


@torch.no_grad()
def agrees(model: Any, step: Step) -> bool:
    """Whether a step gives the logits of the model's own forward pass, to their rounding.

    Two made-up prompts of unlike length are continued by a few tokens, the likeliest ones.
    """
    width, steps = 6, 3
    ids = torch.arange(2 * width, device=model.device).view(2, width) * 7 % model.config.vocab_size
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
        apart = (given - logits).abs().max() / logits.abs().max()
        if not apart <= AGREEMENT.get(logits.dtype, ROUGHLY):
            return False
    return True


@dataclass
class Decoder:
    """A model with what it decodes with.

    Attributes:
        model: a causal LM, in evaluation mode.
        slots: most replies that are drawn at once; 0 takes all.
        cache: its buffers are used again.
        step: tokens [rows] and cache -> logits [rows, V]; by default the model's own forward pass.
        in_step: under ZeRO-3 without gathered weights each forward pass is a collective, so every
            rank makes as many as the one that needs most.
        seconds: spent so far on each part of the work.
    """

    model: nn.Module
    slots: int = 0
    cache: SlotCache = field(default_factory=SlotCache)
    step: Step | None = None
    in_step: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def generate(
        self,
        request: RolloutRequest,
        sampling: SamplingConfig,
        eos_ids: Tensor,
        pad_id: int,
        generator: torch.Generator | None = None,
    ) -> RolloutBatch:
        """Draw replies to prompts.

        Args:
            request: the prompts of a whole round.
            sampling: the distribution.
            eos_ids: [E] ids that end a reply.
            pad_id: stands behind a reply that has ended; such a row is never extended.
            generator: of this rank, on the model's device.
        """
        return _Generation(self, request, sampling, eos_ids, pad_id, generator).run()


@dataclass(frozen=True)
class _Wave:
    """Prefilled prompts, the first token of each of their replies drawn."""

    prompts: Cache
    lengths: list[int]
    seen: Tensor | None
    tokens: Tensor  # [replies of the wave]
    replies: list[int]


class _Generation:
    """One request on its way through the slots."""

    def __init__(
        self, decoder: Decoder, request: RolloutRequest, sampling: SamplingConfig,
        eos_ids: Tensor, pad_id: int, generator: torch.Generator | None,
    ) -> None:
        self._decoder, self._request, self._sampling = decoder, request, sampling
        self._eos_ids, self._pad_id = eos_ids, pad_id
        self._copies = sampling.n_samples_per_prompt
        self._limit = sampling.max_new_tokens
        ids, self._device = request.prompt_ids, request.prompt_ids.device
        self._count = len(ids) * self._copies
        slots = min(decoder.slots or self._count, self._count)
        # One row more, for what the slots without a reply are given.
        self._uniform = None if sampling.temperature == 0 else torch.rand(
            self._count + 1, self._limit, dtype=torch.float64, device=self._device,
            generator=generator,
        )
        self._lengths: list[int] = request.prompt_attention_mask.sum(-1).tolist()
        # The longest first: what does not fit into memory shows at once.
        self._prompts = sorted(range(len(ids)), key=lambda i: -self._lengths[i])
        self._wave_size = max(1, slots // self._copies)
        self._waiting: list[tuple[_Wave, int]] = []  # a wave and the place of a reply in it
        self._cache = decoder.cache
        self._cache.begin(slots, ids.shape[1], self._limit, self._device)
        # What each slot holds: a reply, drawn up to a number of tokens; None once it has ended.
        self._drawn: list[int | None] = [None] * slots
        self._reply = torch.full((slots,), self._count, device=self._device)
        self._place = torch.zeros(slots, dtype=torch.long, device=self._device)
        self._token = torch.full((slots,), pad_id, device=self._device)
        self._seen: Tensor | None = None
        self._record: list[tuple[Tensor, Tensor, Tensor]] = []  # where, token, log-probability

    def run(self) -> RolloutBatch:
        """One forward pass a turn, until every reply (of every rank, if in step) has ended."""
        while self._goes_on():
            if self._prompts and not self._waiting and None in self._drawn:
                self._prefill()
            elif self._living:
                self._decode()
            else:
                self._keep_step()
            self._admit()
        return self._result()

    @property
    def _living(self) -> int:
        return sum(drawn is not None for drawn in self._drawn)

    def _goes_on(self) -> bool:
        busy = bool(self._prompts or self._waiting or self._living)
        if not self._decoder.in_step:
            return busy
        mine = torch.tensor(float(busy), device=self._device)
        return bool(distributed.max_over_ranks(mine).item())

    # --------------------------------------------------------------- the three kinds of turns

    def _prefill(self) -> None:
        """Take the next prompts together, and draw the first token of each of their replies."""
        start = time.perf_counter()
        wave = self._next_wave()
        self._prompts = self._prompts[len(wave) :]
        lengths = [self._lengths[i] for i in wave]
        rows = torch.tensor(wave, device=self._device)
        ids = self._request.prompt_ids[rows, -max(lengths) :]
        mask = self._request.prompt_attention_mask[rows, -max(lengths) :]
        # Without the model's configuration: layers with a window would keep only the window.
        prompts = DynamicCache()
        logits = self._decoder.model(
            input_ids=ids, attention_mask=mask, position_ids=rl_math.position_ids(mask),
            past_key_values=prompts, use_cache=True, logits_to_keep=1,
        ).logits[:, -1].repeat_interleave(self._copies, dim=0)
        start = self._took("prefill", start)
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool, device=self._device)
            copies = ids.repeat_interleave(self._copies, dim=0)
            real = mask.repeat_interleave(self._copies, dim=0).bool()
            first = copies[:, -1:]  # a real token in every row: what is padding points at it
            seen.scatter_(1, torch.where(real, copies, first), True)
        replies = [i * self._copies + j for i in wave for j in range(self._copies)]
        reply = torch.tensor(replies, device=self._device)
        tokens, ended = self._draw(logits, reply, torch.zeros_like(reply), seen)
        copied = [length for length in lengths for _ in range(self._copies)]
        made = _Wave(prompts, copied, seen, tokens, replies)
        going_on = [] if self._limit == 1 else [i for i, end in enumerate(ended) if not end]
        self._waiting = [(made, i) for i in going_on]
        self._took("sampling", start)

    def _next_wave(self) -> list[int]:
        """As many prompts as there are slots, but without those that would mostly be padding."""
        wave = self._prompts[: self._wave_size]
        lengths = [self._lengths[i] for i in wave]
        padding = [(len(wave) - k) * (lengths[0] - lengths[k]) for k in range(len(wave))]
        cut = max(range(len(wave)), key=padding.__getitem__)
        return wave[:cut] if padding[cut] > WORTH_A_PASS else wave

    def _decode(self) -> None:
        """A token for every slot."""
        start = time.perf_counter()
        cache, step = self._cache, self._decoder.step
        cache.make_room()
        logits = (
            step(self._token, cache) if step else
            forward_step(self._decoder.model, self._token, cache)
        )
        cache.advance()
        start = self._took("decode", start)
        self._place = (self._place + 1).clamp_(max=self._limit - 1)
        self._token, ended = self._draw(logits, self._reply, self._place, self._seen)
        left = []
        for slot, drawn in enumerate(self._drawn):
            if drawn is not None:
                self._drawn[slot] = drawn + 1
                if ended[slot] or drawn + 1 == self._limit:
                    left.append(slot)
        if left:
            self._leave(left)
        self._took("sampling", start)

    def _keep_step(self) -> None:
        """Nothing to do but the collectives of the others' forward passes."""
        one = self._request.prompt_ids[:1, -1:]
        self._decoder.model(input_ids=one, attention_mask=torch.ones_like(one), use_cache=False)

    # --------------------------------------------------------------- drawing

    def _draw(
        self, logits: Tensor, reply: Tensor, place: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, list[bool]]:
        """Tokens [rows] for places in replies, kept for the result; and which of them are eos."""
        uniform = None if self._uniform is None else self._uniform[reply, place]
        token = sample(logits, self._sampling, uniform, seen)
        logprob = rl_math.token_logprobs(
            logits.unsqueeze(1), token.unsqueeze(1), self._sampling.temperature or 1.0
        )
        self._record.append((reply * self._limit + place, token, logprob.squeeze(1)))
        if seen is not None:
            seen.scatter_(1, token.unsqueeze(1), True)
        return token, torch.isin(token, self._eos_ids).tolist()

    # --------------------------------------------------------------- slots

    def _leave(self, slots: list[int]) -> None:
        """Replies have ended: their slots are free, and go when nothing will take them."""
        self._cache.vacate(slots)
        self._reply[torch.tensor(slots, device=self._device)] = self._count
        for slot in slots:
            self._drawn[slot] = None
        nobody_waits = not (self._waiting or self._prompts)
        if nobody_waits and 0 < self._living <= len(self._drawn) // 2:
            keep = [slot for slot, drawn in enumerate(self._drawn) if drawn is not None]
            self._cache.shrink(keep)
            self._drawn = [self._drawn[slot] for slot in keep]
            kept = torch.tensor(keep, device=self._device)
            self._reply, self._place = self._reply[kept], self._place[kept]
            self._token = self._token[kept]
            self._seen = None if self._seen is None else self._seen[kept]

    def _admit(self) -> None:
        """Those that wait take the free slots."""
        free = [slot for slot, drawn in enumerate(self._drawn) if drawn is None]
        free = free[: len(self._waiting)]
        if not free:
            return
        start = time.perf_counter()
        # Those that wait are of one wave: the next is prefilled when none is left.
        entering, self._waiting = self._waiting[: len(free)], self._waiting[len(free) :]
        wave, places = entering[0][0], [place for _, place in entering]
        self._cache.admit(
            wave.prompts, [place // self._copies for place in places], free,
            [wave.lengths[place] for place in places],
        )
        slot, place = (torch.tensor(of, device=self._device) for of in (free, places))
        # A new tensor: the old one is kept in the record.
        self._token = self._token.index_copy(0, slot, wave.tokens[place])
        self._reply[slot] = torch.tensor([wave.replies[p] for p in places], device=self._device)
        self._place[slot] = 0
        if wave.seen is not None:
            if self._seen is None:
                shape = len(self._drawn), wave.seen.shape[1]
                self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._seen[slot] = wave.seen[place]
        for i in free:
            self._drawn[i] = 1
        self._took("refill", start)

    # --------------------------------------------------------------- the result

    def _result(self) -> RolloutBatch:
        """Everything that was drawn, in the order of the prompts."""
        shape = self._count + 1, self._limit
        where, token, logprob = (torch.cat(column) for column in zip(*self._record, strict=True))
        tokens = torch.full(shape, self._pad_id, device=self._device)
        logprobs = torch.zeros(shape, device=self._device)
        drawn = torch.zeros(shape, dtype=torch.long, device=self._device)
        for made, values in ((tokens, token), (logprobs, logprob), (drawn, where * 0 + 1)):
            made.view(-1)[where] = values
        longest = int(drawn[:-1].sum(-1).max())
        tokens, logprobs, mask = (
            made[:-1, :longest] for made in (tokens, logprobs, drawn)
        )
        ids, prompt_mask = (
            part.repeat_interleave(self._copies, dim=0)
            for part in (self._request.prompt_ids, self._request.prompt_attention_mask)
        )
        return RolloutBatch(
            torch.cat([ids, tokens], dim=-1), torch.cat([prompt_mask, mask], dim=-1),
            torch.full((self._count,), ids.shape[1], device=self._device), mask, logprobs,
        )

    def _took(self, part: str, start: float) -> float:
        """Count the time since `start`; the time now."""
        now = time.perf_counter()
        seconds = self._decoder.seconds
        seconds[part] = seconds.get(part, 0.0) + now - start
        return now
