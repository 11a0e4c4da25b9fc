"""The OpenAI-compatible endpoint: a FastAPI application over one or more `ChatModel`s."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.exceptions import HTTPException

from alpaca_rlhf.evaluation.conversation import cleaned, printable
from alpaca_rlhf.inference.chat_model import ChatModel, End, Piece
from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.errors import UserError

# Fields that would change the response and are not supported, and values of them that would not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "tools": ([],), "functions": ([],), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
}
_SAMPLING = {"temperature", "top_p", "top_k", "repetition_penalty"}  # named as in SamplingConfig
Json = dict[str, Any]


class ChatMessage(BaseModel):
    """A message of a request, cleaned, with a role that chat templates know."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        return "\n".join(map(str, texts)) if texts and None not in texts else content

    @model_validator(mode="after")
    def _clean(self) -> Self:
        self.role = "system" if self.role == "developer" else self.role
        text = printable(self.content).strip()
        self.content = text if self.role == "assistant" else cleaned(text)
        return self


class ChatRequest(BaseModel):
    """The body of a request, as far as it is used."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)
    stop: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    stream_options: Json | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stop(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _check(self) -> Self:
        roles = [message.role for message in self.messages]
        if "system" in roles[1:]:
            raise ValueError("messages: a system message must be the first")
        if roles[-1] != "user":
            raise ValueError("messages: the last one must be the user's")
        for name, harmless in _UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise ValueError(f"{name}: not supported; leave it out")
        return self

    def sampling(self, defaults: SamplingConfig, context: int) -> SamplingConfig:
        """Return the sampling parameters; a length beyond the context becomes half of it."""
        longest = self.max_completion_tokens or self.max_tokens or defaults.max_new_tokens
        return replace(
            defaults, max_new_tokens=longest if longest < context else max(1, context // 2),
            **self.model_dump(include=_SAMPLING, exclude_none=True),
        )


def application(chats: dict[str, ChatModel], defaults: SamplingConfig) -> FastAPI:
    """Build the endpoint of models by name; `defaults` are what a request leaves open."""
    app = FastAPI(title="alpaca-rlhf", docs_url=None, redoc_url=None)

    @app.exception_handler(ValidationError)
    @app.exception_handler(UserError)
    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_error(_one_line(error)), getattr(error, "status_code", 400))

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> Json:
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "alpaca-rlhf"}
                for name in chats]
        return {"object": "list", "data": rows}

    @app.post("/v1/chat/completions")
    async def completions(incoming: Request) -> Any:
        request = ChatRequest.model_validate_json(await incoming.body())
        if request.model not in chats:
            raise HTTPException(404, f"no model {request.model[:80]!r} here; there are "
                                f"{', '.join(chats)}")
        generated = _generate(chats[request.model], request, defaults)
        await anext(generated)  # raises what is wrong before the response begins
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()),
                "model": request.model}
        if not request.stream:
            *_, end = [piece async for piece in generated]
            assert isinstance(end, End)
            choice = {"index": 0, "message": {"role": "assistant", "content": end.text},
                      "finish_reason": end.reason}
            return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(end)}
        usage = bool((request.stream_options or {}).get("include_usage"))
        return StreamingResponse(
            _events(generated, head, usage), media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )

    return app


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: " * bool(place) + first["msg"].removeprefix("Value error, ")
    return str(getattr(error, "detail", error))


def _error(message: str) -> Json:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None,
                      "code": None}}


async def _generate(
    chat: ChatModel, request: ChatRequest, defaults: SamplingConfig
) -> AsyncIterator[Piece]:
    """Queue a response, yield "", and then its pieces; leaving early cancels it."""
    pieces: asyncio.Queue[Piece] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the server has stopped
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    job = await asyncio.to_thread(
        chat.submit, [message.model_dump() for message in request.messages],
        request.sampling(chat.policy.resolve(defaults), chat.policy.context),
        deliver, request.seed, request.stop or [],
    )
    try:
        piece: Piece = ""
        while not isinstance(piece, End):
            yield piece
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
        yield piece
    finally:
        job.cancel()


async def _events(generated: AsyncIterator[Piece], head: Json, usage: bool) -> AsyncIterator[str]:
    """Yield the response as server-sent events."""
    def event(**record: Any) -> str:
        return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        return event(**head, choices=[{"index": 0, "delta": delta, "finish_reason": finish}])

    head = {**head, "object": "chat.completion.chunk"}
    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in generated:
            if isinstance(piece, End):
                yield chunk({}, piece.reason)
                if usage:
                    yield event(**head, choices=[], usage=_usage(piece))
            else:
                yield chunk({"content": str(piece)})
    except Exception as error:  # the status has been sent: the stream has to tell it
        yield event(**_error(f"the model failed: {type(error).__name__}: {error}"))
        return
    yield "data: [DONE]\n\n"


def _usage(end: End) -> dict[str, int]:
    return {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.response_tokens,
            "total_tokens": end.prompt_tokens + end.response_tokens}
