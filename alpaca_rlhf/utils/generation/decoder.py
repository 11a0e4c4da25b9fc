"""Generate responses by continuous batching: one forward pass at a time, with every slot in use.

A session has a number of slots. Prompts of similar length are prefilled together, and responses to
one prompt share its prefill. Then each decoding step adds a token to the response in every slot; a
response that has ended leaves its slot, and the next one takes it. Responses may also be added and
cancelled between steps. Each is drawn with its own random numbers, so it does not depend on the
responses it is batched with.

    rollout = Decoder(model).generate(prompts, SamplingConfig(64), eos_ids, pad_id)

    session = DecodingSession(Decoder(model), slots=8, eos_ids=[2])
    session.add([1, 5, 9], SamplingConfig(64), seed=0)
    while session.busy:
        for response in session.step():
            response.tokens[-1], response.ended
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import Cache

from alpaca_rlhf.utils import distributed, rl_math
from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, pad
from alpaca_rlhf.utils.generation.kv_cache import SlotCache
from alpaca_rlhf.utils.generation.rollout import Rollout
from alpaca_rlhf.utils.generation.sampling import sample
from alpaca_rlhf.utils.generation.steps import DecodingStep, ForwardStep, prefill

WORTH_A_PASS = 256  # tokens of padding that cost more than another pass over the weights


class Decoder:
    """A model and the means to generate with it, kept between calls.

    Args:
        model: a causal LM in evaluation mode.
        slots: maximum number of responses that are decoded together; 0 is no limit.
        step: computes the next logits; by default the model's forward pass.
        cache: its buffers are used again.
        seconds: time spent on each part of the work is added here.
        in_step: every forward pass is a collective (ZeRO-3 without gathered weights), so every
            rank makes as many as the rank that needs most.
    """

    def __init__(
        self, model: nn.Module, slots: int = 0, *, step: DecodingStep | None = None,
        cache: SlotCache | None = None, seconds: dict[str, float] | None = None,
        in_step: bool = False,
    ) -> None:
        self.model, self.slots = model, slots
        self.step: DecodingStep = ForwardStep(model) if step is None else step
        self.cache = SlotCache() if cache is None else cache
        self.seconds = {} if seconds is None else seconds
        self._in_step = in_step

    @torch.no_grad()
    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, eos_ids: Tensor, pad_id: int,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """Generate `sampling.num_generations` responses to each prompt, in consecutive rows.

        Args:
            prompts: [B, P], padded left, on the model's device.
            sampling: parameters of all responses.
            eos_ids: [E] ids that end a response.
            pad_id: fills rows after their end.
            generator: source of the random numbers, on the model's device.
        """
        copies, device = sampling.num_generations, prompts.input_ids.device
        count = len(prompts.input_ids) * copies
        numbers: list[list[float]] = [[]] * count
        if sampling.temperature > 0:
            # One row more than is used, so that seeds keep giving the responses they always gave.
            numbers = torch.rand(
                count + 1, sampling.max_new_tokens, dtype=torch.float64,
                device=device, generator=generator,
            ).tolist()[:count]
        responses = [Response(sampling, uniform) for uniform in numbers]
        rows = [
            [token for token, real in zip(*pair, strict=True) if real]
            for pair in zip(
                prompts.input_ids.tolist(), prompts.attention_mask.tolist(), strict=True)
        ]
        session = DecodingSession(self, self.slots or count, eos_ids.tolist(), device)
        # The longest first: a batch that does not fit into memory fails at once.
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            session.enqueue(rows[i], responses[i * copies : (i + 1) * copies])
        while self._busy_on_any_rank(session):
            if session.busy:
                session.step()
            else:  # take part in the collectives of the other ranks' forward passes
                self.model(input_ids=prompts.input_ids[:1, -1:], use_cache=False)
        return _as_rollout(prompts, responses, pad_id)

    def _busy_on_any_rank(self, session: "DecodingSession") -> bool:
        if not self._in_step:
            return session.busy
        busy = torch.tensor(float(session.busy), device=distributed.device())
        return bool(distributed.max_over_ranks(busy).item())


@dataclass(eq=False)
class Response:
    """A response while it is generated.

    Attributes:
        sampling: its sampling parameters.
        uniform: random numbers in [0, 1), one for each token; empty for greedy decoding.
        tokens: generated so far, eos included.
        logprobs: of the tokens, in nats, logits over temperature.
        ended: no more tokens will come: after eos, at the maximum length, or cancelled.
        seen: [V] bool, tokens that the repetition penalty applies to.
    """

    sampling: SamplingConfig
    uniform: Sequence[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    seen: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A prompt with the responses that are to be generated to it."""

    ids: list[int]
    responses: Sequence[Response]


@dataclass(frozen=True, eq=False)
class _Prefilled:
    """A response whose prompt is prefilled, until it gets a slot."""

    response: Response
    cache: Cache  # keys and values of all prompts prefilled together
    row: int  # in the cache
    length: int  # tokens of the prompt


class DecodingSession:
    """Responses that are decoded together; they may join and leave between steps.

    Args:
        decoder: used by no other session at the same time.
        slots: maximum number of responses that are decoded together.
        eos_ids: ids that end a response.
        device: of the model; by default this process's.
    """

    def __init__(
        self, decoder: Decoder, slots: int, eos_ids: Collection[int],
        device: torch.device | None = None,
    ) -> None:
        self._decoder, self._slots, self._eos_ids = decoder, slots, frozenset(eos_ids)
        self._device = distributed.device() if device is None else device
        self._queue: list[_Prompt] = []
        self._waiting: list[_Prefilled] = []  # prefilled together
        self._rows: list[Response | None] = []  # by slot

    # ---------------------------------------------------------------- joining and leaving

    def add(self, ids: list[int], sampling: SamplingConfig, seed: int | None = None) -> Response:
        """Queue a prompt for one response, drawn with random numbers of its own.

        Args:
            ids: the prompt.
            sampling: parameters of this response; `num_generations` is ignored.
            seed: None is a new one each time.
        """
        uniform: list[float] = []
        if sampling.temperature > 0:
            generator = torch.Generator(device=self._device)
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)
            uniform = torch.rand(
                sampling.max_new_tokens, dtype=torch.float64, device=self._device,
                generator=generator,
            ).tolist()
        response = Response(sampling, uniform)
        self.enqueue(ids, [response])
        return response

    def enqueue(self, ids: list[int], responses: Sequence[Response]) -> None:
        """Queue a prompt for one or more responses that share its prefill."""
        self._queue.append(_Prompt(ids, responses))

    def cancel(self, response: Response) -> None:
        """End a response with the tokens it has."""
        response.ended = True
        self._queue = [prompt for prompt in self._queue if response not in prompt.responses]
        self._free_slots()

    @property
    def busy(self) -> bool:
        """Whether a response is still to be generated."""
        return bool(self._queue) or self._unfinished > 0

    @property
    def free(self) -> int:
        """Number of slots that no response uses or waits for."""
        return self._slots - self._unfinished

    @property
    def _unfinished(self) -> int:
        started = chain((waiting.response for waiting in self._waiting), filter(None, self._rows))
        queued = chain.from_iterable(prompt.responses for prompt in self._queue)
        return sum(not response.ended for response in chain(started, queued))

    # ---------------------------------------------------------------- forward passes

    @torch.no_grad()
    def step(self) -> list[Response]:
        """Make one forward pass: prefill prompts if slots are free, else decode.

        Returns:
            The responses that got a token.
        """
        self._fill_slots()
        living = len(self._rows) - self._rows.count(None)
        drawn: list[Response] = []
        if self._queue and not self._waiting and living < self._slots:
            drawn = self._prefill()
        elif living:
            drawn = self._decode()
        self._free_slots()
        return drawn

    def _prefill(self) -> list[Response]:
        """Run the next prompts through the model and draw the first token of their responses."""
        start = time.perf_counter()
        cache, model = self._decoder.cache, self._decoder.model
        if not self._rows:
            longest = max(len(prompt.ids) for prompt in self._queue)
            new = max(r.sampling.max_new_tokens for p in self._queue for r in p.responses)
            cache.begin(self._slots, longest, new, self._device)
        wanted = min(self._slots, self._unfinished) - len(self._rows)
        if wanted > 0:
            self._rows += [None] * wanted
            cache.add_rows(wanted)
        prompts = self._next_prompts()
        ids, mask = pad([prompt.ids for prompt in prompts], 0, left=True)
        logits, prefilled = prefill(model, ids.to(self._device), mask.to(self._device))
        start = self._took("prefill", start)
        joining = [
            _Prefilled(response, prefilled, row, len(prompt.ids))
            for row, prompt in enumerate(prompts) for response in prompt.responses
        ]
        for one in joining:
            if one.response.sampling.repetition_penalty != 1:
                one.response.seen = torch.zeros(
                    logits.shape[-1], dtype=torch.bool, device=self._device)
                one.response.seen[prompts[one.row].ids] = True
        logits = logits[torch.tensor([one.row for one in joining], device=self._device)]
        drawn = self._draw(logits, [one.response for one in joining])
        self._waiting = joining
        self._took("sampling", start)
        return drawn

    def _next_prompts(self) -> list[_Prompt]:
        """Take as many prompts as fit the slots, but without those that would mostly be padding."""
        size = max(1, len(self._rows) // len(self._queue[0].responses))
        head = sorted(self._queue[:size], key=lambda prompt: -len(prompt.ids))
        longest = len(head[0].ids)
        padding = [(len(head) - k) * (longest - len(head[k].ids)) for k in range(len(head))]
        cut = max(range(len(head)), key=padding.__getitem__)
        if padding[cut] <= WORTH_A_PASS:
            cut = len(head)
        self._queue = head[cut:] + self._queue[size:]
        return head[:cut]

    def _decode(self) -> list[Response]:
        """Add a token to the response in every slot."""
        start = time.perf_counter()
        cache = self._decoder.cache
        cache.make_room()
        tokens = [0 if response is None else response.tokens[-1] for response in self._rows]
        logits = self._decoder.step(torch.tensor(tokens, device=self._device), cache)
        cache.advance()
        start = self._took("decode", start)
        drawn = self._draw(logits, self._rows)
        self._took("sampling", start)
        return drawn

    def _draw(self, logits: Tensor, rows: Sequence[Response | None]) -> list[Response]:
        """Draw the next token of each response from logits [N, V]; rows of None are idle."""
        alike: dict[tuple[float, ...], list[tuple[int, Response]]] = {}
        for row, response in enumerate(rows):
            if response is not None:
                by = response.sampling
                key = by.temperature, by.top_p, by.top_k, by.repetition_penalty
                alike.setdefault(key, []).append((row, response))
        for group in alike.values():
            chosen, responses = zip(*group, strict=True)
            some = logits if len(group) == len(rows) else logits[list(chosen)]
            self._draw_alike(some, responses)
        return [response for group in alike.values() for _, response in group]

    def _draw_alike(self, logits: Tensor, responses: Sequence[Response]) -> None:
        """Draw a token for responses whose distributions have the same parameters."""
        sampling = responses[0].sampling
        uniform = seen = None
        if sampling.temperature > 0:
            uniform = torch.tensor(
                [response.uniform[len(response.tokens)] for response in responses],
                dtype=torch.float64, device=self._device,
            )
        if sampling.repetition_penalty != 1:
            seen = torch.stack([r.seen for r in responses if r.seen is not None])
        tokens = sample(logits, sampling, uniform, seen)
        logprobs = rl_math.token_logprobs(
            logits.unsqueeze(1), tokens.unsqueeze(1), sampling.temperature or 1.0
        )
        for response, token, logprob in zip(
            responses, tokens.tolist(), logprobs.squeeze(1).tolist(), strict=True
        ):
            response.tokens.append(token)
            response.logprobs.append(logprob)
            if response.seen is not None:
                response.seen[token] = True
            full = len(response.tokens) == response.sampling.max_new_tokens
            response.ended = full or token in self._eos_ids

    # ---------------------------------------------------------------- slots

    def _free_slots(self) -> None:
        """Free the slots of responses that have ended; drop rows that nothing will fill."""
        self._waiting = [one for one in self._waiting if not one.response.ended]
        ended = [slot for slot, row in enumerate(self._rows) if row is not None and row.ended]
        if not ended:
            return
        for slot in ended:
            self._rows[slot] = None
        self._decoder.cache.vacate(ended)
        living = [slot for slot, row in enumerate(self._rows) if row is not None]
        if not (self._waiting or self._queue) and len(living) <= len(self._rows) // 2:
            self._decoder.cache.shrink(living)
            self._rows = [self._rows[slot] for slot in living]

    def _fill_slots(self) -> None:
        """Give free slots to responses whose prompts are prefilled."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        joining = self._waiting[: len(free)]
        if not joining:
            return
        start = time.perf_counter()
        slots = free[: len(joining)]
        self._waiting = self._waiting[len(joining) :]
        self._decoder.cache.admit(
            joining[0].cache, [one.row for one in joining], slots, [one.length for one in joining]
        )
        for slot, one in zip(slots, joining, strict=True):
            self._rows[slot] = one.response
        self._took("refill", start)

    def _took(self, part: str, start: float) -> float:
        """Add the time since `start` to a part of the work; return the current time."""
        now = time.perf_counter()
        seconds = self._decoder.seconds
        seconds[part] = seconds.get(part, 0.0) + now - start
        return now


def _as_rollout(prompts: PromptBatch, responses: Sequence[Response], pad_id: int) -> Rollout:
    """Join finished responses to their prompts."""
    device = prompts.input_ids.device
    tokens, mask = pad([response.tokens for response in responses], pad_id)
    longest = mask.shape[1]
    logprobs = torch.tensor([r.logprobs + [0.0] * (longest - len(r.logprobs)) for r in responses])
    tokens, mask, logprobs = (part.to(device) for part in (tokens, mask, logprobs))
    copies = len(responses) // len(prompts.input_ids)
    ids, prompt_mask = (
        part.repeat_interleave(copies, dim=0)
        for part in (prompts.input_ids, prompts.attention_mask)
    )
    return Rollout(
        input_ids=torch.cat([ids, tokens], dim=-1),
        attention_mask=torch.cat([prompt_mask, mask], dim=-1),
        response_mask=mask, decoded_logprobs=logprobs,
    )
