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

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import Cache

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, Rollout, pad
from alpaca_rlhf.utils.generation.kv_cache import SlotCache
from alpaca_rlhf.utils.generation.sampling import draw, uniform_numbers
from alpaca_rlhf.utils.generation.steps import DecodingStep, ForwardStep, prefill

WORTH_A_PASS = 256  # tokens of padding that cost more than another pass over the weights


@dataclass
class Decoder:
    """A model and the means to generate with it.

    Attributes:
        model: a causal LM in evaluation mode.
        slots: maximum number of responses that are decoded together; 0 is no limit.
        step: computes the next logits; by default the model's forward pass.
        cache: its buffers are used again.
        in_step: every forward pass is a collective (ZeRO-3 without gathered weights), so every
            rank makes as many as the rank that needs most.
        look_every: decoding steps between two looks at the tokens, each of which waits for the
            device. What follows eos until then is dropped.
        seconds: time spent on each part of the work is added here.
    """

    model: nn.Module
    slots: int = 0
    step: DecodingStep | None = None
    cache: SlotCache = field(default_factory=SlotCache)
    in_step: bool = False
    look_every: int = 1
    seconds: dict[str, float] = field(default_factory=dict)

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
        rows = prompts.unpadded()
        # One row of numbers more than is used, so that seeds give the responses they always gave.
        numbers = uniform_numbers(len(rows) * copies + 1, sampling, device, generator)
        responses = [
            Response(rows[i // copies], sampling, uniform) for i, uniform in enumerate(numbers[:-1])
        ]
        session = DecodingSession(self, self.slots or len(responses), eos_ids.tolist(), device)
        # The longest first: a batch that does not fit into memory fails at once.
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            session.enqueue(responses[i * copies : (i + 1) * copies])
        while self._busy_on_any_rank(session):
            if session.busy:
                session.step()
            else:  # take part in the collectives of the other ranks' forward passes
                self.model(input_ids=prompts.input_ids[:1, -1:], use_cache=False)
        return as_rollout(prompts, responses, pad_id)

    def _busy_on_any_rank(self, session: "DecodingSession") -> bool:
        if not self.in_step:
            return session.busy
        busy = torch.tensor(float(session.busy), device=distributed.device())
        return bool(distributed.max_over_ranks(busy).item())

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time spent inside to a part of the work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@dataclass(eq=False)
class Response:
    """A response while it is generated.

    Attributes:
        prompt: ids.
        sampling: its sampling parameters.
        uniform: a random number in [0, 1) for each token; empty for greedy decoding.
        tokens: generated so far, eos included.
        logprobs: of the tokens, in nats, logits over temperature.
        ended: no more tokens will come: after eos, at the maximum length, or cancelled.
        seen: [V] bool, tokens that the repetition penalty applies to.
    """

    prompt: list[int]
    sampling: SamplingConfig
    uniform: Sequence[float]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    seen: Tensor | None = None


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
        self._next_logits = decoder.step or ForwardStep(decoder.model)
        self._device = distributed.device() if device is None else device
        self._queue: list[Sequence[Response]] = []  # those to one prompt together
        self._waiting: list[tuple[int, Response]] = []  # with their rows of _prefilled
        self._prefilled = Cache(layers=[])
        self._rows: list[Response | None] = []  # by slot

    # ---------------------------------------------------------------- joining and leaving

    def add(self, prompt: list[int], sampling: SamplingConfig, seed: int | None = None) -> Response:
        """Queue a prompt for one response, drawn with random numbers of its own.

        Args:
            prompt: ids.
            sampling: parameters of this response; `num_generations` is ignored.
            seed: of the random numbers; None is a new one each time.
        """
        generator = torch.Generator(device=self._device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        [uniform] = uniform_numbers(1, sampling, self._device, generator)
        response = Response(prompt, sampling, uniform)
        self.enqueue([response])
        return response

    def enqueue(self, responses: Sequence[Response]) -> None:
        """Queue responses to one prompt, which share its prefill."""
        self._queue.append(responses)

    def cancel(self, response: Response) -> None:
        """End a response with the tokens it has."""
        response.ended = True
        self._queue = [responses for responses in self._queue if response not in responses]
        self._free_slots()

    @property
    def busy(self) -> bool:
        """True while a response is still to be generated."""
        return bool(self._queue) or self._unfinished > 0

    @property
    def free(self) -> int:
        """Number of slots that no response uses or waits for."""
        return self._slots - self._unfinished

    @property
    def _unfinished(self) -> int:
        waiting = (response for _, response in self._waiting)
        responses = chain(filter(None, self._rows), waiting, chain.from_iterable(self._queue))
        return sum(not response.ended for response in responses)

    # ---------------------------------------------------------------- forward passes

    @torch.no_grad()
    def step(self) -> list[Response]:
        """Prefill prompts if slots are free, else make `look_every` decoding steps.

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
        self._add_rows()
        prompts = self._next_prompts()
        with self._decoder.timed("prefill"):
            ids, mask = pad([responses[0].prompt for responses in prompts], 0, left=True)
            logits, self._prefilled = prefill(
                self._decoder.model, ids.to(self._device), mask.to(self._device))
        with self._decoder.timed("sampling"):
            self._waiting = [
                (row, response) for row, responses in enumerate(prompts) for response in responses
            ]
            for _, response in self._waiting:
                if response.sampling.repetition_penalty != 1:
                    response.seen = torch.zeros_like(logits[0], dtype=torch.bool)
                    response.seen[response.prompt] = True
            logits = logits[torch.tensor([row for row, _ in self._waiting], device=self._device)]
            responses = [response for _, response in self._waiting]
            self._append(responses, [self._draw(logits, responses, 0)])
            return responses

    def _add_rows(self) -> None:
        """Let as many slots take part as there are responses for them."""
        cache = self._decoder.cache
        if not self._rows:
            queued = list(chain.from_iterable(self._queue))
            longest = max(len(response.prompt) for response in queued)
            most = max(response.sampling.max_new_tokens for response in queued)
            cache.begin(self._slots, longest, most, self._device)
        more = max(0, min(self._slots, self._unfinished) - len(self._rows))
        self._rows += [None] * more
        cache.add_rows(more)

    def _next_prompts(self) -> list[Sequence[Response]]:
        """Take as many prompts as fit the slots, but without those that would mostly be padding."""
        size = max(1, len(self._rows) // len(self._queue[0]))
        head = sorted(self._queue[:size], key=lambda responses: -len(responses[0].prompt))
        lengths = [len(responses[0].prompt) for responses in head]
        padding = [(len(head) - k) * (lengths[0] - lengths[k]) for k in range(len(head))]
        cut = max(range(len(head)), key=padding.__getitem__)
        if padding[cut] <= WORTH_A_PASS:
            cut = len(head)
        self._queue = head[cut:] + self._queue[size:]
        return head[:cut]

    def _decode(self) -> list[Response]:
        """Add tokens to the response in every slot."""
        cache, decoder = self._decoder.cache, self._decoder
        slots = [slot for slot, row in enumerate(self._rows) if row is not None]
        responses = [row for row in self._rows if row is not None]
        living = torch.tensor(slots, device=self._device)
        tokens = torch.zeros(len(self._rows), dtype=torch.long, device=self._device)
        tokens[living] = torch.tensor([r.tokens[-1] for r in responses], device=self._device)
        left = min(r.sampling.max_new_tokens - len(r.tokens) for r in responses)
        drawn = []
        for ahead in range(min(left, decoder.look_every)):
            with decoder.timed("decode"):
                cache.make_room()
                logits = self._next_logits(tokens, cache)
                cache.advance()
            with decoder.timed("sampling"):
                if len(slots) < len(self._rows):
                    logits = logits[living]
                drawn.append(self._draw(logits, responses, ahead))
                tokens[living] = drawn[-1][0]
        with decoder.timed("sampling"):
            self._append(responses, drawn)
        return responses

    def _draw(
        self, logits: Tensor, responses: Sequence[Response], ahead: int
    ) -> tuple[Tensor, Tensor]:
        """Draw a token [N] of each response and its log-probability [N] from logits [N, V].

        `ahead` tokens of each are drawn, but not appended yet.
        """
        tokens, logprobs = draw(
            logits, [r.sampling for r in responses],
            [r.uniform[len(r.tokens) + ahead] if r.uniform else 0.0 for r in responses],
            [r.seen for r in responses],
        )
        for i, response in enumerate(responses):
            if response.seen is not None:
                response.seen.index_fill_(0, tokens[i : i + 1], True)
        return tokens, logprobs

    def _append(
        self, responses: Sequence[Response], drawn: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Append what was drawn, up to each response's end."""
        # One transfer, for which all work is waited; fp64 holds tokens and numbers exactly.
        steps = torch.stack([torch.stack([t.double(), p.double()]) for t, p in drawn]).tolist()
        for i, response in enumerate(responses):
            for tokens, logprobs in steps:
                response.tokens.append(int(tokens[i]))
                response.logprobs.append(logprobs[i])
                full = len(response.tokens) == response.sampling.max_new_tokens
                response.ended = full or response.tokens[-1] in self._eos_ids
                if response.ended:
                    break

    # ---------------------------------------------------------------- slots

    def _free_slots(self) -> None:
        """Free the slots of responses that have ended; drop rows that nothing will fill."""
        self._waiting = [(row, response) for row, response in self._waiting if not response.ended]
        ended = [slot for slot, row in enumerate(self._rows) if row is not None and row.ended]
        if not ended:
            return
        cache = self._decoder.cache
        for slot in ended:
            self._rows[slot] = None
        cache.vacate(ended)
        living = [slot for slot, row in enumerate(self._rows) if row is not None]
        if not (self._waiting or self._queue) and len(living) <= len(self._rows) // 2:
            cache.shrink(living)
            self._rows = [self._rows[slot] for slot in living]

    def _fill_slots(self) -> None:
        """Give free slots to responses whose prompts are prefilled."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        joining = self._waiting[: len(free)]
        if not joining:
            return
        with self._decoder.timed("refill"):
            self._waiting = self._waiting[len(joining) :]
            slots, picks = free[: len(joining)], [row for row, _ in joining]
            lengths = [len(response.prompt) for _, response in joining]
            self._decoder.cache.admit(self._prefilled, picks, slots, lengths)
            for slot, (_, response) in zip(slots, joining, strict=True):
                self._rows[slot] = response
            if not self._waiting:
                self._prefilled = Cache(layers=[])


def as_rollout(prompts: PromptBatch, responses: Sequence[Response], pad_id: int) -> Rollout:
    """Join finished responses to their prompts."""
    tokens, mask = pad([response.tokens for response in responses], pad_id)
    longest = mask.shape[1]
    logprobs = torch.tensor([r.logprobs + [0.0] * (longest - len(r.logprobs)) for r in responses])
    device, copies = prompts.input_ids.device, len(responses) // len(prompts.input_ids)
    tokens, mask, logprobs = (part.to(device) for part in (tokens, mask, logprobs))
    repeated = prompts.map_tensors(lambda _, part: part.repeat_interleave(copies, dim=0))
    return Rollout(
        input_ids=torch.cat([repeated.input_ids, tokens], dim=-1),
        attention_mask=torch.cat([repeated.attention_mask, mask], dim=-1),
        response_mask=mask, decoded_logprobs=logprobs,
    )
