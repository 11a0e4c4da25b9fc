"""An OpenAI-compatible endpoint: any client that speaks /v1/chat/completions can talk to a model.

    python -m alpaca_rlhf.inference.serve --path output/final/actor output/actor

Takes folders of step 1 or 3, adapters' folders or hub ids. Bound to this machine only; needs
`pip install fastapi uvicorn`. A dialogue that is too long for the model loses its oldest turns, as
in the chats; what cannot be answered gets status 400 and one line that says why.
"""

import argparse
import asyncio
import contextlib
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from alpaca_rlhf.inference import flags
from alpaca_rlhf.utils.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from alpaca_rlhf.inference.chat_model import ChatModel, End, Job
    from alpaca_rlhf.utils.configs import SamplingConfig
    from alpaca_rlhf.utils.data.tokenizer import Message

# Fields of a request that would change the answer and are not served, and what they may hold.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "tools": ([],), "functions": ([],), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
}
SECONDS_TO_END = 5  # for replies that are on their way when it is stopped
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of this program."""
    parser = flags.Parser("python -m alpaca_rlhf.inference.serve", __doc__)
    parser.add("--path", "folders of models or adapters, or hub ids", nargs="+", required=True)
    parser.add("--host", "address to listen at", default="127.0.0.1")
    parser.add("--port", "port to listen at; 0 takes a free one",
               type=flags.number(int, low=0, high=65535), default="8000")
    parser.add("--at_once", "chats of a model that stream at the same time; the others wait",
               type=flags.number(int, low=1), default="8")
    parser.add_sampling(temperature=1.0, top_p=1.0)
    parser.add_loading()
    args = parser.parse_args(argv)
    flags.require("fastapi", "uvicorn")
    return args


def main(args: argparse.Namespace) -> None:
    """Load the models and answer until stopped."""
    import uvicorn

    from alpaca_rlhf.evaluation.saved import open_policy, short_names
    from alpaca_rlhf.inference.chat_model import ChatModel

    listener = listen(args.host, args.port)
    served = {}
    for name, path in zip(short_names(args.path), args.path, strict=True):
        policy = open_policy(path, flags.load_options(args))
        served[name] = Served(
            name, ChatModel(policy, args.at_once), flags.sampling(args, policy.context)
        )
    host, port = listener.getsockname()[:2]
    sys.stdout.write(f"serving {', '.join(served)} at http://{host}:{port}/v1\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        application(served), log_level="warning", timeout_graceful_shutdown=SECONDS_TO_END
    )
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it is stopped
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, taken before the models are loaded.

    Raises:
        UserError: the address or port is not to be had.
    """
    try:
        return socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); take "
                        "another port, or 0 for a free one") from error


class BadRequest(Exception):
    """What a client has sent cannot be served."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Served:
    """A model under its name, with the sampling for what a request leaves open."""

    name: str
    model: "ChatModel"
    sampling: "SamplingConfig"


@dataclass(frozen=True)
class Request:
    """What a client wants."""

    served: Served
    messages: "list[Message]"
    sampling: "SamplingConfig"
    seed: int | None
    stop: list[str]
    stream: bool
    usage: bool


def application(served: dict[str, Served]) -> "FastAPI":
    """The endpoint over models by name."""
    from fastapi import FastAPI
    from fastapi import Request as Incoming
    from fastapi.responses import JSONResponse, StreamingResponse

    app = FastAPI(title="alpaca-rlhf", docs_url=None, redoc_url=None)

    @app.exception_handler(BadRequest)
    async def refuse(_: Incoming, error: BadRequest) -> JSONResponse:
        return JSONResponse(_error(str(error)), error.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "alpaca-rlhf"}
                for name in served]
        return {"object": "list", "data": rows}

    @app.post("/v1/chat/completions")
    async def completions(incoming: Incoming) -> Any:
        try:
            body = json.loads(await incoming.body())
        except (ValueError, RecursionError):
            raise BadRequest("the body is not JSON") from None
        request = read(body, served)
        running = await start(request)
        if request.stream:
            return StreamingResponse(
                running.events(), media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        return JSONResponse(await running.whole())

    return app


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None,
                      "code": None}}


# --- reading a request ---------------------------------------------------------------------------


def read(body: Any, served: dict[str, Served]) -> Request:
    """A request's body, checked.

    Raises:
        BadRequest: says what is wrong with it.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    name = body.get("model")
    if not isinstance(name, str) or name not in served:
        raise BadRequest(f"no model {str(name)[:80]!r} here; there are {', '.join(served)}", 404)
    for field_name, harmless in _REFUSED.items():
        if body.get(field_name) is not None and body[field_name] not in harmless:
            raise BadRequest(f"{field_name}: not served here; leave it out")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise BadRequest("stop: must be a text or a list of texts")
    options = body.get("stream_options") or {}
    return Request(
        served[name], messages_of(body.get("messages")), _sampling(body, served[name]),
        _number(body, "seed", int, flags.number(int, low=0)), stop, bool(body.get("stream")),
        isinstance(options, dict) and bool(options.get("include_usage")),
    )


def messages_of(given: Any) -> "list[Message]":
    """The messages of a request, the last of them the user's.

    Raises:
        BadRequest: says which one is wrong.
    """
    from alpaca_rlhf.inference.conversation import cleaned, printable

    if not isinstance(given, list) or not given:
        raise BadRequest("messages: must be a list with at least one message")
    messages: list[Message] = []
    for number, one in enumerate(given, 1):
        role = _ROLES.get(str(one.get("role"))) if isinstance(one, dict) else None
        if role is None:
            raise BadRequest(f"messages, {number}: the role must be one of {', '.join(_ROLES)}")
        if role == "system" and number > 1:
            raise BadRequest(f"messages, {number}: a system's message must be the first")
        text = _text(one.get("content"), number)
        try:
            text = printable(text).strip() if role == "assistant" else cleaned(text)
        except UserError as error:
            raise BadRequest(f"messages, {number}: {error}") from None
        messages.append({"role": role, "content": text})
    if messages[-1]["role"] != "user":
        raise BadRequest("messages: the last one must be the user's")
    return messages


def _text(content: Any, number: int) -> str:
    if isinstance(content, list):  # of parts
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        parts = [text for text in texts if isinstance(text, str)]
        if len(parts) == len(content):
            return "\n".join(parts)
    if not isinstance(content, str):
        raise BadRequest(f"messages, {number}: the content must be text")
    return content


def _sampling(body: dict[str, Any], served: Served) -> "SamplingConfig":
    limit = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    context = served.model.policy.context
    given = {
        "max_new_tokens": _number(body, limit, int, flags.number(int, low=1)),
        "temperature": _number(body, "temperature", float, flags.number(float, low=0)),
        "top_p": _number(body, "top_p", float, flags.number(float, above=0, high=1)),
        "top_k": _number(body, "top_k", int, flags.number(int, low=0)),
        "repetition_penalty": _number(
            body, "repetition_penalty", float, flags.number(float, above=0)
        ),
    }
    made = replace(served.sampling, **{k: v for k, v in given.items() if v is not None})
    if made.max_new_tokens >= context:
        # Clients ask for more than there is as a matter of course: they get what there is.
        made = replace(made, max_new_tokens=max(1, context // 2))
    return made


def _number(body: dict[str, Any], name: str, kind: type, check: Any) -> Any:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name}: must be a number")
    try:
        return check(str(kind(value)))
    except (argparse.ArgumentTypeError, ValueError, OverflowError) as error:
        raise BadRequest(f"{name} {error}") from None


# --- answering -----------------------------------------------------------------------------------


async def start(request: Request) -> "Running":
    """Join the model's queue.

    Raises:
        BadRequest: the dialogue cannot be answered.
    """
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(piece: Any) -> None:
        """From the model's thread; a server that has gone down takes nothing more."""
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    submit = partial(
        request.served.model.submit, request.messages, request.sampling, deliver, request.seed
    )
    try:
        job = await asyncio.to_thread(submit)
    except UserError as error:
        raise BadRequest(str(error)) from None
    return Running(request, job, pieces)


@dataclass
class Running:
    """A reply that is being drawn, and the forms in which it goes to the client."""

    request: Request
    job: "Job"
    pieces: "asyncio.Queue[Any]"
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    end: "End | None" = None
    stopped: bool = False

    async def texts(self) -> AsyncIterator[str]:
        """Pieces of the reply, up to a stop text if there is one; leaving early cancels it."""
        from alpaca_rlhf.inference.chat_model import End

        whole, sent = "", 0
        # What may be the beginning of a stop text is held back.
        held = max((len(text) for text in self.request.stop), default=1) - 1
        try:
            while self.end is None:
                piece = await self.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, End):
                    self.end = piece
                elif not self.stopped:
                    whole += piece
                found = [at for text in self.request.stop if (at := whole.find(text)) >= 0]
                if found and not self.stopped:
                    self.stopped, whole = True, whole[: min(found)]
                    self.job.cancel()
                until = len(whole) - (0 if self.end or self.stopped else held)
                if until > sent:
                    yield whole[sent:until]
                    sent = until
        finally:
            self.job.cancel()

    def _finish(self) -> str:
        assert self.end is not None
        return "stop" if self.stopped or self.end.reason == "cancelled" else self.end.reason

    def _usage(self) -> dict[str, int]:
        assert self.end is not None
        prompt, reply = self.end.prompt_tokens, self.end.reply_tokens
        return {"prompt_tokens": prompt, "completion_tokens": reply,
                "total_tokens": prompt + reply}

    def _record(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created,
                "model": self.request.served.name, **more}

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event(self._record("chat.completion.chunk", choices=[choice]))

    async def events(self) -> AsyncIterator[str]:
        """As server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for text in self.texts():
                yield self._chunk({"content": text})
        except Exception as error:  # the status has gone out already: the stream says it
            yield _event(_error(f"the model failed: {type(error).__name__}: {error}"))
            return
        yield self._chunk({}, self._finish())
        if self.request.usage:
            yield _event(self._record("chat.completion.chunk", choices=[], usage=self._usage()))
        yield "data: [DONE]\n\n"

    async def whole(self) -> dict[str, Any]:
        """As one record."""
        text = "".join([piece async for piece in self.texts()])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": self._finish()}
        return self._record("chat.completion", choices=[choice], usage=self._usage())


def _event(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"


if __name__ == "__main__":
    flags.run(parse, main)
