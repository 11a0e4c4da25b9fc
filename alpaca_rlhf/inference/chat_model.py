"""A policy that many talk to at once: a queue before it, and replies that come piece by piece.

One thread owns the model. It takes up to `at_once` chats from the queue, in the order they came,
and gives each of them a token in turn, so that all of them stream; the others wait. What a reply is
drawn with is a generator of its own, so it does not depend on who else is talking.

    chat = ChatModel(open_policy("output/actor", LoadingConfig()))
    for piece in chat.stream(messages, SamplingConfig(256, temperature=0.7)):
        …
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from alpaca_rlhf.evaluation.saved import Policy
from alpaca_rlhf.inference.conversation import fitted, printable
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.generation.sampling import sample

_HALF_CHARACTER = "\ufffd"  # what a tokenizer gives while bytes of a character are still to come


@dataclass(frozen=True)
class End:
    """The last thing that is delivered of a reply.

    Attributes:
        reason: "stop" (it ended by itself), "length" (at the limit) or "cancelled".
        prompt_tokens, reply_tokens: how many.
        dropped_turns: turns of the dialogue that did not fit.
        text: the whole reply.
    """

    reason: str
    prompt_tokens: int
    reply_tokens: int
    dropped_turns: int
    text: str


Deliver = Callable[[str | End | Exception], None]


@dataclass
class Job:
    """One reply on its way.

    Attributes:
        prompt: ids.
        dropped_turns: of the dialogue, to make it fit.
        sampling: the distribution.
        seed: None is a new one each time.
        deliver: is given the pieces, and an End or an exception at last.
    """

    prompt: list[int]
    dropped_turns: int
    sampling: SamplingConfig
    seed: int | None
    deliver: Deliver
    ids: list[int] = field(default_factory=list)
    text: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop it at the next token; what there is of it stays."""
        self.cancelled.set()


class ChatModel:
    """A policy, the thread that owns it and the queue before it.

    Args:
        policy: is used by no one else from here on.
        at_once: chats that stream at the same time; each holds a KV cache.
    """

    def __init__(self, policy: Policy, at_once: int = 8) -> None:
        self.policy = policy
        self._at_once = at_once
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # A fast tokenizer refuses to be used by two threads at once.
        self._tokenizer = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(
        self, messages: Sequence[Message], sampling: SamplingConfig, deliver: Deliver,
        seed: int | None = None,
    ) -> Job:
        """Join the queue; `deliver` is called from the model's thread.

        Raises:
            UserError: the dialogue does not fit, or the template refuses it.
        """
        with self._tokenizer:
            prompt, dropped = fitted(
                self.policy.form, messages, self.policy.context, sampling.max_new_tokens
            )
        job = Job(prompt, dropped, sampling, seed, deliver)
        self._waiting.put(job)
        return job

    def stream(
        self, messages: Sequence[Message], sampling: SamplingConfig, seed: int | None = None
    ) -> Generator[str | End, None, None]:
        """The pieces of a reply, and an End; whoever stops listening cancels it.

        Raises:
            UserError: as `submit` does.
        """
        pieces: queue.SimpleQueue[str | End | Exception] = queue.SimpleQueue()
        job = self.submit(messages, sampling, pieces.put, seed)
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if isinstance(piece, End):
                    return
        finally:
            job.cancel()

    def close(self) -> None:
        """End the thread once the replies at hand are done."""
        self._waiting.put(None)
        self._thread.join()

    # --------------------------------------------------------------- the model's thread

    @torch.inference_mode()
    def _work(self) -> None:
        active: deque[tuple[Job, Iterator[int]]] = deque()
        closing = False
        while not (closing and not active):
            while not closing and len(active) < self._at_once:
                try:
                    job = self._waiting.get(block=not active)
                except queue.Empty:
                    break
                closing = job is None
                if job is not None:
                    active.append((job, self._tokens(job)))
            if active:
                job, tokens = active.popleft()
                if self._advance(job, tokens):
                    active.append((job, tokens))

    def _advance(self, job: Job, tokens: Iterator[int]) -> bool:
        """Draw one token and deliver what it adds; whether the reply goes on."""
        try:
            token = None if job.cancelled.is_set() else next(tokens, None)
            if token is not None:
                job.ids.append(token)
            goes_on = token is not None and token not in self.policy.eos_ids
            self._deliver_text(job, at_end=not goes_on)
            if not goes_on:
                job.deliver(self._end(job))
            return goes_on
        except Exception as error:  # out of memory, say: that chat fails, the others go on
            job.deliver(error)
            return False

    def _deliver_text(self, job: Job, at_end: bool) -> None:
        """What the reply's text has grown by; half characters and spaces at its end wait."""
        with self._tokenizer:
            text = self.policy.form.tokenizer.decode(job.ids, skip_special_tokens=True)
        if text.endswith(_HALF_CHARACTER) and not at_end:
            return
        # What was sent stays sent, though bytes that make no character may respell it.
        piece = printable(text).strip()[len(job.text) :]
        if piece:
            job.text += piece
            job.deliver(piece)

    def _end(self, job: Job) -> End:
        ended = bool(job.ids) and job.ids[-1] in self.policy.eos_ids
        reason = "stop" if ended else "cancelled" if job.cancelled.is_set() else "length"
        return End(reason, len(job.prompt), len(job.ids), job.dropped_turns, job.text)

    def _tokens(self, job: Job) -> Iterator[int]:
        """Tokens of a reply, one at each `next`, at most as many as may be."""
        device, sampling = distributed.device(), job.sampling
        generator = torch.Generator(device=device)
        if job.seed is None:
            generator.seed()
        else:
            generator.manual_seed(job.seed)
        cache = DynamicCache()
        ids = torch.tensor([job.prompt], device=device)
        seen = None
        for _ in range(sampling.max_new_tokens):
            logits = self.policy.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            if sampling.repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool) if seen is None else seen
                seen.scatter_(1, ids, True)
            uniform = None if sampling.temperature == 0 else torch.rand(
                1, dtype=torch.float64, device=device, generator=generator
            )
            ids = sample(logits, sampling, uniform, seen).unsqueeze(0)
            yield int(ids)
