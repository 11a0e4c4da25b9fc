"""A vLLM server over HTTP: token ids go in, token ids and log-probabilities come out.

The user starts it (`scripts/serve_rollouts.sh MODEL`). Weights are loaded from safetensors in a
folder that the server can read; nothing is unpickled on either side. Pausing, loading and resetting
the prefix cache are development endpoints, which vLLM has with VLLM_SERVER_DEV_MODE=1.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.generation.decoder import Response

CONNECT_SECONDS = 10.0
START = "start it with scripts/serve_rollouts.sh MODEL"
# Facts of a model's config.json that must be those of the actor.
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


class ServerError(Exception):
    """A request that failed; the message is one line.

    Args:
        message: names the server and the reason.
        again: whether another attempt may succeed.
    """

    def __init__(self, message: str, again: bool = True) -> None:
        super().__init__(message)
        self.again = again


class Served(NamedTuple):
    """Description that a server gives of itself."""

    name: str  # of the model, in requests
    max_length: int  # tokens of prompt and response
    dtype: str
    logprobs_mode: str
    max_lora_rank: int  # of adapters; 0 if it takes none
    shape: dict[str, Any]  # SHAPE, as far as it is known


class VLLMServer:
    """One server.

    Args:
        url: such as http://127.0.0.1:8000.
        timeout: seconds that a request may take.

    Attributes:
        model: name of the model or adapter that requests ask for.
        served: what `describe` has found.
    """

    served: Served

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.model = url.rstrip("/"), ""
        key = os.environ.get("VLLM_API_KEY")
        try:
            self._client = httpx.Client(
                base_url=self.url, timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None), trust_env=False,  # no proxy
                headers={"Authorization": f"Bearer {key}"} if key else None,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"--vllm_url {url}: {error}; give http://HOST:PORT") from error

    def describe(self) -> Served:
        """Ask the server about itself.

        Raises:
            UserError: it does not answer, or was started without VLLM_SERVER_DEV_MODE=1.
        """
        try:
            models = self._call("GET", "/v1/models")["data"]
            info = self._call("GET", "/server_info?config_format=json")["vllm_config"]
            base = next(model for model in models if not model.get("parent"))
            config = info["model_config"]
            self.model = base["id"]
            self.served = Served(
                name=base["id"], max_length=int(base["max_model_len"]),
                dtype=str(config["dtype"]).rsplit(".", 1)[-1],
                logprobs_mode=str(config.get("logprobs_mode")),
                max_lora_rank=int((info.get("lora_config") or {}).get("max_lora_rank", 0)),
                shape=_shape(config.get("hf_config")),
            )
            return self.served
        except ServerError as error:
            missing = str(error).startswith("/server_info: HTTP 404")
            remedy = ("it has no development endpoints (VLLM_SERVER_DEV_MODE=1); " if missing
                      else "") + START
            raise UserError(f"--vllm_url {self.url}: {error}; {remedy}") from error
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise UserError(f"--vllm_url {self.url}: does not answer as a vLLM server does "
                            f"({type(error).__name__}: {error}); {START}") from error

    def complete(self, response: Response, seed: int, eos_ids: Sequence[int]) -> None:
        """Generate the tokens of a response, and their log-probabilities.

        Raises:
            ServerError: the request failed, or its answer is not whole.
        """
        sampling = response.sampling
        answer = self._call("POST", "/v1/completions", {
            "model": self.model, "prompt": response.prompt, "seed": seed, "n": 1,
            "max_tokens": sampling.max_new_tokens, "stop_token_ids": list(eos_ids),
            "ignore_eos": True,  # the served model's own, which may be others
            "logprobs": 0, "return_token_ids": True, **_distribution(sampling),
        })
        try:
            choice = answer["choices"][0]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            reason, prompt = choice["finish_reason"], choice.get("prompt_token_ids")
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"an answer without token ids or log-probabilities ({error})",
                              again=False) from error
        if reason not in ("stop", "length") or not tokens or len(tokens) != len(logprobs):
            raise ServerError(f"an answer that is not whole (finish_reason {reason})")
        if prompt is not None and prompt != response.prompt:
            raise ServerError("an answer to another prompt than was sent", again=False)
        response.tokens, response.logprobs, response.ended = tokens, logprobs, True

    def prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities, in nats, of all tokens but the first, at temperature 1."""
        answer = self._call("POST", "/v1/completions", {
            "model": self.model, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0,
            "temperature": 0.0,
        })
        try:
            rows = answer["choices"][0]["prompt_logprobs"][1:]
            return [row[str(token)]["logprob"] for token, row in zip(ids[1:], rows, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError("an answer without log-probabilities of the prompt",
                              again=False) from error

    def load_weights(self, folder: Path) -> None:
        """Replace the weights by those of a folder, and forget what was computed with the old."""
        self._call("POST", "/pause?mode=abort")
        self._call("POST", "/collective_rpc", {
            "method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self._resume()

    def load_adapter(self, folder: Path, name: str) -> None:
        """Load a LoRA adapter under a new name, and forget the one that requests ask for now.

        Under an old name vLLM would read the folder again for every request.
        """
        try:
            self._call("POST", "/v1/load_lora_adapter",
                       {"lora_name": name, "lora_path": str(folder)})
        except ServerError as error:
            if "already" not in str(error):  # an attempt whose answer was lost
                raise
        if self.model != self.served.name:
            with contextlib.suppress(ServerError):  # at worst it is kept until there is no room
                self._call("POST", "/v1/unload_lora_adapter", {"lora_name": self.model})

    def _resume(self) -> None:
        done = self._call("POST", "/reset_prefix_cache")
        if isinstance(done, dict) and done.get("success") is False:
            raise ServerError("the prefix cache could not be reset")
        self._call("POST", "/resume")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer, decoded.

        Raises:
            ServerError: it failed.
        """
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise ServerError(f"no answer in time to {path} (--vllm_timeout)") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"no answer ({str(error) or type(error).__name__})") from error
        if answer.status_code >= 400:
            raise ServerError(
                f"{path.split('?')[0]}: HTTP {answer.status_code} {_reason(answer)}".rstrip(),
                again=answer.status_code >= 500)
        try:
            return answer.json() if answer.content else None
        except ValueError:
            return None  # some endpoints answer with a sentence


def _distribution(sampling: SamplingConfig) -> dict[str, Any]:
    """Return every parameter of the distribution: a server may have defaults of its own."""
    return {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        "min_p": 0.0, "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "skip_special_tokens": False,
    }


def _shape(config: Any) -> dict[str, Any]:
    """Return SHAPE from a config, which is a dict or its printed form."""
    if isinstance(config, str):
        try:
            config = json.loads(config[config.index("{"):])
        except ValueError:
            return {}
    return {name: config[name] for name in SHAPE if name in config} if isinstance(
        config, dict) else {}


def _reason(answer: httpx.Response) -> str:
    """Return the message of an error, on one line."""
    try:
        body = answer.json()
        error = body.get("error", body)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(str(text).split())[:300]
