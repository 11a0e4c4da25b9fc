"""A stand-in for a vLLM server: the same HTTP interface around a small model in this process.

It loads weights as vLLM does, from safetensors in a folder, into a model of its own, and has
switches for everything that goes wrong with a real one.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.generation.sampling import sample


class FakeVLLM(ThreadingHTTPServer):
    """Serves a model folder on a free port.

    Attributes:
        calls: number of requests, by path.
        prompts: of the responses that were written.
        withheld: names of weights that a transfer leaves as they are; None for all of them.
        broken: HTTP status of the next requests to a path, first to last; 0 hangs up, and -1 does
            so after the work.
        facts: replace what the server says about itself.
        loaded: names of the weights of the last transfer.
    """

    daemon_threads = True

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.folder, self.lock = folder, threading.Lock()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        # As vLLM's, its output head keeps weights of its own.
        self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.clone())
        self.base = self.model
        self.calls, self.prompts = Counter[str](), list[list[int]]()
        self.withheld: set[str] | None = set()
        self.broken: dict[str, list[int]] = {}
        self.facts: dict[str, Any] = {}
        self.loaded: set[str] = set()
        self.paused, self.adapters = False, list[str]()
        self.max_length, self.lora, self.mode = 512, True, "processed_logprobs"

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients are disconnected on purpose."""

    # --- what the endpoints do -------------------------------------------------------------------

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": str(self.folder), "parent": None,
                          "max_model_len": self.max_length}]}

    def server_info(self) -> dict[str, Any]:
        config = {"dtype": str(self.base.dtype), "logprobs_mode": self.mode,
                  "hf_config": f"LlamaConfig {self.base.config.to_json_string()}"}
        return {"vllm_config": {"model_config": config | self.facts,
                                "lora_config": {"max_lora_rank": 16} if self.lora else None}}

    def reload_weights(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.paused and body["method"] == "reload_weights"
        self.unload()
        own, self.loaded = dict(self.base.state_dict()), set()
        for path in sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                self.loaded.add(name)
                if self.withheld is not None and name not in self.withheld:
                    own[name].copy_(tensor)
        return {"results": [None]}

    def unload(self) -> None:
        """Take the adapter out of the base model's layers."""
        if isinstance(self.model, PeftModel):
            self.model = self.base = self.model.unload()

    def load_adapter(self, body: dict[str, Any]) -> str:
        assert "load_inplace" not in body
        if body["lora_name"] in self.adapters:
            raise ValueError("The lora adapter has already been loaded.")
        self.adapters.append(body["lora_name"])
        self.unload()
        self.model = PeftModel.from_pretrained(self.base, body["lora_path"]).eval()
        return "Success"

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert not self.paused
        ids = body["prompt"]
        if len(ids) + body["max_tokens"] > self.max_length:
            raise ValueError(f"maximum context length is {self.max_length} tokens")
        with self.lock:
            if body["model"] not in (str(self.folder), *self.adapters):
                raise ValueError(f"there is no model {body['model']}")
            model = self.base if body["model"] == str(self.folder) else self.model
            if "prompt_logprobs" in body:
                logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
                rows = [{str(token): {"logprob": logits[i, token].item()}}
                        for i, token in enumerate(ids[1:])]
                return {"choices": [{"prompt_logprobs": [None, *rows]}]}
            self.prompts.append(ids)
            return {"choices": [self.sample(model, ids, body)]}

    def sample(self, model: Any, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """Draw a response as the engine of this package does, without a cache."""
        generator = torch.Generator().manual_seed(body["seed"])
        by = SamplingConfig(
            temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"],
            repetition_penalty=body["repetition_penalty"])
        tokens, logprobs, reason = list[int](), list[float](), "length"
        while len(tokens) < body["max_tokens"] and reason == "length":
            logits = model(torch.tensor([prompt + tokens])).logits[:, -1].float()
            uniform = torch.rand(1, dtype=torch.float64, generator=generator)
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, prompt + tokens] = True
            token = int(sample(logits, by, uniform, seen if by.repetition_penalty != 1 else None))
            scale = body["temperature"] if self.mode == "processed_logprobs" else 1.0
            logprobs.append((logits[0] / scale).log_softmax(-1)[token].item())
            tokens.append(token)
            reason = "stop" if token in body["stop_token_ids"] else "length"
        return {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs},
                "finish_reason": reason, "prompt_token_ids": prompt}


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: FakeVLLM
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        server.calls[path] += 1
        status = server.broken[path].pop(0) if server.broken.get(path) else 200
        if status == 0:
            self.close_connection = True
            return
        answer: Any = {"error": {"message": "out of order"}}
        if status in (200, -1):
            try:
                answer = self._result(path, body)
            except (ValueError, AssertionError) as error:
                status, answer = 400, {"error": {"message": str(error)}}
        if status == -1:
            self.close_connection = True
            return
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _result(self, path: str, body: dict[str, Any]) -> Any:
        server = self.server
        if path in ("/pause", "/resume"):
            server.paused = path == "/pause"
            return {}
        return {
            "/v1/models": server.models, "/server_info": server.server_info,
            "/reset_prefix_cache": lambda: {"success": True},
            "/collective_rpc": lambda: server.reload_weights(body),
            "/v1/load_lora_adapter": lambda: server.load_adapter(body),
            "/v1/unload_lora_adapter": lambda: server.adapters.remove(body["lora_name"]),
            "/v1/completions": lambda: server.complete(body),
        }[path]()


@contextmanager
def serving(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[FakeVLLM]:
    """Serve a model folder until the context ends."""
    with FakeVLLM(folder, dtype) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
