"""A policy for many chats at once: one thread decodes them in one batch, each streams its text.

Chats join the batch in the order in which they came, up to `slots` of them; the others wait. Each
response is drawn with random numbers of its own, so it does not depend on the other chats.

    chat = ChatModel(open_policy("output/actor", LoadingConfig()))
    for piece in chat.stream(messages, SamplingConfig(max_new_tokens=64, temperature=0.7)):
        …
"""

import queue
import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from alpaca_rlhf.evaluation.conversation import fit_context, printable
from alpaca_rlhf.evaluation.saved import Policy
from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.generation.decoder import Decoder, DecodingSession, Response

_INCOMPLETE = "\ufffd"  # the tokenizer's text for bytes of a character whose rest is to come


@dataclass(frozen=True)
class End:
    """The last piece of a response."""

    reason: Literal["stop", "length", "cancelled"]  # stop: at eos or a stop string
    prompt_tokens: int
    response_tokens: int
    dropped_turns: int  # of the dialogue, which did not fit the context
    text: str  # the whole response


Piece = str | End | Exception


@dataclass(eq=False)
class Job:
    """A response that was asked for; see `ChatModel.submit`."""

    prompt: list[int]
    dropped_turns: int  # of the dialogue, which did not fit the context
    sampling: SamplingConfig
    seed: int
    stop: Sequence[str]
    deliver: Callable[[Piece], None]
    text: str = ""  # delivered so far
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """End the response before its next token; it keeps the tokens it has."""
        self.cancelled.set()


class ChatModel:
    """A policy, which nothing else may use from here on, its thread, and the responses to generate.

    At most `slots` responses are decoded together.
    """

    def __init__(self, policy: Policy, slots: int = 8) -> None:
        self.policy, self._slots = policy, slots
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # A fast tokenizer refuses to be used by two threads at once.
        self._tokenizer = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(
        self, messages: Sequence[Message], sampling: SamplingConfig,
        deliver: Callable[[Piece], None], seed: int | None = None, stop: Sequence[str] = (),
    ) -> Job:
        """Queue a response to a dialogue whose last turn is the user's.

        `deliver` is called in the model's thread with pieces of text, and last with an `End` or an
        exception. The text ends before the first of the `stop` strings. Without a seed, each
        response has another one.

        Raises:
            UserError: the dialogue does not fit, or the template refuses it.
        """
        with self._tokenizer:
            prompt, dropped = fit_context(
                self.policy.chat, messages, self.policy.context, sampling.max_new_tokens)
        job = Job(
            prompt=prompt, dropped_turns=dropped, sampling=sampling, deliver=deliver, stop=stop,
            seed=secrets.randbits(63) if seed is None else seed,
        )
        self._waiting.put(job)
        return job

    def stream(
        self, messages: Sequence[Message], sampling: SamplingConfig, seed: int | None = None
    ) -> Generator[str | End, None, None]:
        """Yield the pieces of a response, and last an `End`; closing the generator cancels it.

        Raises:
            UserError: as `submit` does.
        """
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
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
        """End the thread after the responses that were asked for."""
        self._waiting.put(None)
        self._thread.join()

    # ---------------------------------------------------------------- the model's thread

    @torch.inference_mode()
    def _work(self) -> None:
        session, jobs, closing = self._session(), dict[Response, Job](), False
        while jobs or not closing:
            while session.free and not closing:
                try:
                    job = self._waiting.get(block=not jobs)
                except queue.Empty:
                    break
                closing = job is None
                if job is not None:
                    jobs[session.add(job.prompt, job.sampling, job.seed)] = job
            try:
                self._step(session, jobs)
            except Exception:  # out of memory, for instance
                failed = list(jobs.values())
                session, jobs = self._session(), {}
                for job in failed:
                    self._retry_alone(job)

    def _session(self) -> DecodingSession:
        return DecodingSession(Decoder(self.policy.model), self._slots, self.policy.eos_ids)

    def _retry_alone(self, job: Job) -> None:
        """Generate a response again, without the others, after a step that failed.

        Its seed gives it the same tokens, so text that was delivered is not delivered again.
        """
        session = self._session()
        jobs = {session.add(job.prompt, job.sampling, job.seed): job}
        try:
            while jobs:
                self._step(session, jobs)
        except Exception as error:
            job.deliver(error)

    def _step(self, session: DecodingSession, jobs: dict[Response, Job]) -> None:
        """Make one forward pass and deliver the text it adds; remove the jobs that have ended."""
        cancelled = [response for response, job in jobs.items() if job.cancelled.is_set()]
        for response in cancelled:
            session.cancel(response)
        for response in cancelled + session.step():
            job = jobs[response]
            stopped = self._deliver(job, response)
            if stopped:
                session.cancel(response)
            if response.ended:
                del jobs[response]
                at_eos = bool(response.tokens) and response.tokens[-1] in self.policy.eos_ids
                job.deliver(End(
                    reason="stop" if stopped or at_eos else
                    "cancelled" if job.cancelled.is_set() else "length",
                    prompt_tokens=len(job.prompt), response_tokens=len(response.tokens),
                    dropped_turns=job.dropped_turns, text=job.text,
                ))

    def _deliver(self, job: Job, response: Response) -> bool:
        """Deliver new text; return whether it has reached a stop string.

        Incomplete characters, spaces, and what may begin a stop string wait for the next token.
        """
        with self._tokenizer:
            text = self.policy.chat.text(response.tokens)
        if text.endswith(_INCOMPLETE) and not response.ended:
            return False
        text = printable(text).strip()
        found = [at for string in job.stop if (at := text.find(string)) >= 0]
        end = min(found, default=len(text))
        if not (found or response.ended):
            end -= max(map(len, job.stop), default=1) - 1
        # What was delivered stays, even if later bytes change how it is spelled.
        piece = text[len(job.text) : end]
        if piece:
            job.text += piece
            job.deliver(piece)
        return bool(found)
