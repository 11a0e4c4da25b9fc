"""Rollouts on vLLM servers: prompts are shared out, weights are sent before each rollout.

    servers = connect(config, role, …)                       # before models are loaded
    rollout_engine = VLLMEngine(actor, servers, config, probe)
    rollout_engine.sync_weights(step)
    rollout = rollout_engine.generate(prompts, sampling, eos_ids, pad_id, generator)

Weights go layer by layer from all ranks to a folder and from there into the servers: never the
whole model on one rank. In fp32 a LoRA adapter is merged on the way; in other precisions rounding
would lose most of it, so the servers get the adapter and apply it themselves. After each transfer
every server's log-probabilities of some prompts are compared with those of the ranks that train
(docs/rollouts_vllm.md).
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from alpaca_rlhf.utils import console, distributed, losses
from alpaca_rlhf.utils.configs import (
    LoadingConfig,
    PPOConfig,
    RoleConfig,
    RolloutEngineConfig,
    SamplingConfig,
)
from alpaca_rlhf.utils.data.batches import PromptBatch, Rollout, pad
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.generation.decoder import Response, as_rollout
from alpaca_rlhf.utils.generation.rollout_engine import RolloutEngine
from alpaca_rlhf.utils.generation.vllm_server import SHAPE, Served, ServerError, VLLMServer
from alpaca_rlhf.utils.model.causal_lm import at_labels, load_config
from alpaca_rlhf.utils.model.lora import unwrapped
from alpaca_rlhf.utils.model.weights.whole import PlainWeight, adapter_state_dict, plain_weights

PAUSES = (1.0, 2.0, 4.0)  # seconds before another attempt at a request
MOST_REQUESTS = 256  # that a rank waits for at the same time
PART_BYTES = 2**28  # of weights in host memory before they are written
PROBES = 8  # prompts
ADAPTER_FOLDER = "adapter"
SHARED_MEMORY = "/dev/shm"
# Mean difference of log-probabilities, in nats: in fp32 and in half precision. After the first
# transfer also: at most JUMP times what it was then, where that is not below a floor.
FP32, HALF = 1e-4, 5e-2
JUMP, FLOOR, HALF_FLOOR = 3.0, 1e-6, 2e-2
# vLLM's: the ranks that it can be started with, and the lowest temperature but 0.
LORA_RANKS, LEAST_TEMPERATURE = (8, 16, 32, 64, 128, 256, 320, 512), 0.01


def connect(
    config: RolloutEngineConfig, actor: RoleConfig, loading: LoadingConfig,
    sampling: SamplingConfig, ppo: PPOConfig, prompt_length: int,
) -> list[VLLMServer]:
    """Ask every server about itself; no server for the native engine.

    Raises:
        UserError: one does not answer, or serves another model, precision or length.
    """
    dtype = str(distributed.resolve_dtype(loading.dtype)).removeprefix("torch.")
    servers = list[VLLMServer]()
    if config.rollout_engine == "vllm":
        with distributed.failing_together():
            home = _home(config)
            if distributed.is_main() and home and not os.access(home, os.W_OK | os.X_OK):
                raise UserError(f"--vllm_sync_dir {home}: is no folder that can be written to; "
                                "give one that this machine and the servers' see")
            for url in config.urls:
                server = VLLMServer(url, config.vllm_timeout)
                server.describe()
                _check_model(server, actor, loading, dtype)
                _check_responses(server, sampling, ppo, prompt_length)
                servers.append(server)
    return servers


def _home(config: RolloutEngineConfig) -> str | None:
    """Return the folder for weights on their way; None is the system's for temporary files."""
    if config.vllm_sync_dir:
        return os.path.abspath(config.vllm_sync_dir)
    return SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None


def _check_model(
    server: VLLMServer, actor: RoleConfig, loading: LoadingConfig, dtype: str
) -> None:
    """Refuse a server that cannot take the actor's weights as they are.

    Raises:
        UserError: says what to serve.
    """
    served, flag, path = server.served, f"--vllm_url {server.url}", actor.model_name_or_path
    config = load_config(actor, loading).get_text_config()
    for name in SHAPE:
        here, there = getattr(config, name, None), served.shape.get(name)
        if there is not None and here is not None and here != there:
            raise UserError(f"{flag}: serves a model whose {name} is {there}, and --actor_model_"
                            f"name_or_path {path} has {here}; serve {path}")
    if served.dtype != dtype:
        raise UserError(f"{flag}: serves in {served.dtype}, and the actor trains in {dtype} "
                        f"(precision); serve with --dtype {dtype}")
    if dtype != "float32" and actor.lora_dim > served.max_lora_rank:
        rank = next((rank for rank in LORA_RANKS if rank >= actor.lora_dim), actor.lora_dim)
        raise UserError(
            f"{flag}: takes adapters up to rank {served.max_lora_rank}, and in {dtype} the adapter "
            f"itself is sent; serve with --enable-lora --max-lora-rank {rank}")


def _check_responses(
    server: VLLMServer, sampling: SamplingConfig, ppo: PPOConfig, prompt_length: int
) -> None:
    """Refuse a server whose responses PPO could not learn from.

    Raises:
        UserError: says how to serve.
    """
    served, flag = server.served, f"--vllm_url {server.url}"
    needed = prompt_length + sampling.max_new_tokens
    if served.max_length < needed:
        raise UserError(
            f"{flag}: has room for {served.max_length} tokens, and --max_prompt_seq_len + "
            f"--max_answer_seq_len is {needed}; serve with --max-model-len {needed}, or shorten")
    if sampling.temperature < LEAST_TEMPERATURE:
        raise UserError(f"--temperature {sampling.temperature}: vLLM samples at "
                        f"{LEAST_TEMPERATURE} or more; raise it, or take --rollout_engine native")
    if not _known(served, sampling):
        if ppo.rollout_is_clip is not None:
            raise UserError(f"--rollout_is_clip {ppo.rollout_is_clip}: needs log-probabilities of"
                            f" the distribution that PPO trains; {_REMEDY}")
        console.say(f"{flag}: gives the log-probabilities of another distribution than PPO's, so "
                    f"they are compared on {PROBES} prompts and not on the rollouts; {_REMEDY}")


_REMEDY = ("serve with --logprobs-mode processed_logprobs and leave --top_p, --top_k and "
           "--repetition_penalty out, or with raw_logprobs and --temperature 1")


def _known(served: Served, sampling: SamplingConfig) -> bool:
    """Return whether the server's log-probabilities are those of logits over temperature."""
    whole = sampling.top_p == 1 and sampling.top_k == 0 and sampling.repetition_penalty == 1
    return {"processed_logprobs": whole, "raw_logprobs": sampling.temperature == 1}.get(
        served.logprobs_mode, False)


@dataclass
class Freshness:
    """Compares a server's log-probabilities of the probe with the training layout's.

    Args:
        limit: of the mean difference, in nats.
        floor: a difference that is never a jump.
    """

    limit: float
    floor: float = FLOOR
    _last: tuple[Tensor, Tensor] | None = None
    _first: float = 0.0

    def problem(self, served: Tensor, trained: Tensor) -> str | None:
        """Return what is wrong after a transfer of weights, None if nothing is.

        Args:
            served: [N] log-probabilities by the server, nats.
            trained: [N] by the ranks that train.
        """
        mean = (served - trained).abs().mean().item()
        if self._last is None:
            if not mean <= self.limit:
                return (f"precision, or another model: log-probabilities differ by {mean:.2g} nats "
                        f"on average (allowed: {self.limit:.2g})")
            self._first = mean
        else:
            before, expected = self._last
            limit = min(self.limit, max(JUMP * self._first, self.floor))
            moved = (trained - expected).abs().mean() > self.limit / 50
            if not mean <= limit or (moved and served.equal(before)):
                return (f"weights not updated: log-probabilities differ by {mean:.2g} nats on "
                        f"average (allowed: {limit:.2g})")
        self._last = served, trained
        return None


class VLLMEngine(RolloutEngine):
    """Generates with vLLM servers, which get the actor's weights.

    Args:
        actor: its DeepSpeed engine.
        servers: from `connect`.
        config: where weights are written on their way.
        probe: ids of some prompts.
    """

    def __init__(
        self, actor: deepspeed.DeepSpeedEngine, servers: Sequence[VLLMServer],
        config: RolloutEngineConfig, probe: Sequence[Sequence[int]],
    ) -> None:
        self._actor, self._servers, self._config = actor, servers, config
        self._model = unwrapped(actor.module)
        exact = self._model.dtype == torch.float32
        self._sends_adapter = isinstance(actor.module, PeftModel) and not exact
        self._frozen_base = self._sends_adapter and not any(
            weight.requires_grad for name, weight in actor.module.named_parameters()
            if ".lora_" not in name)
        self._probe = [list(ids) for ids in probe if len(ids) > 1]
        self._limit = FP32 if exact else HALF
        floor = FLOOR if exact else HALF_FLOOR
        self._freshness = [Freshness(self._limit, floor) for _ in servers]
        self._step: int | None = None

    # --- weights ---------------------------------------------------------------------------------

    def sync_weights(self, step: int) -> None:
        """Give the servers the actor's weights after `step` optimizer steps, and prove it.

        All ranks must call it. Nothing happens if they have these weights.

        Raises:
            TrainingStopped: they could not be transferred, or the servers still compute with
                others.
        """
        if step == self._step:
            return
        with contextlib.ExitStack() as leaving:
            with distributed.failing_together():
                folder = self._folder(leaving) if distributed.is_main() else None
            failure = self._write(folder)
            with distributed.failing_together():
                if failure:
                    raise TrainingStopped(
                        f"error: --rollout_engine vllm: weights not updated: {failure}")
                if folder:
                    self._load(folder)
            names = distributed.gather_rows([folder.name] if folder else [])
        for server in self._servers if self._sends_adapter else []:
            server.model, = names
        self._prove()
        self._step = step

    def _folder(self, leaving: contextlib.ExitStack) -> Path:
        """Make a folder that is removed at the end of the transfer."""
        home = _home(self._config)
        try:
            return Path(leaving.enter_context(tempfile.TemporaryDirectory(
                prefix="alpaca_rlhf-weights-", dir=home, ignore_cleanup_errors=True)))
        except OSError as error:
            raise TrainingStopped(f"error: --vllm_sync_dir {home}: {error}") from error

    def _write(self, folder: Path | None) -> str | None:
        """Write what the servers need; the ranks in lockstep, of which one has a folder."""
        failure = None
        if not (self._frozen_base and self._step is not None):
            weights = plain_weights(self._actor.module, folder is not None,
                                    merge=not self._sends_adapter, tied=True)
            for number, part in enumerate(_parts(weights)):
                if folder and not failure:
                    failure = self._save(part, folder / f"model-{number:05d}.safetensors")
        if self._sends_adapter:
            adapter = adapter_state_dict(self._actor.module, folder is not None)
            if folder and not failure:
                failure = self._save_adapter(adapter, folder / ADAPTER_FOLDER)
        return failure

    def _save_adapter(self, adapter: dict[str, Tensor], folder: Path) -> str | None:
        module: Any = self._actor.module
        try:
            module.save_pretrained(str(folder), state_dict=adapter, save_embedding_layers=False)
        except Exception as error:  # the other ranks wait for this one
            return f"{folder} could not be written: {error}"
        return None

    def _save(self, part: dict[str, Tensor], path: Path) -> str | None:
        """Write a file, look at what a server will find, and return what is wrong."""
        try:
            # By the names of a saved model, which some families do not use in memory.
            saved = revert_weight_conversion(self._model, part)
            save_file({name: tensor.contiguous() for name, tensor in saved.items()}, path,
                      metadata={"format": "pt"})
            with safe_open(path, "pt") as file:
                missing = saved.keys() - file.keys()
        except Exception as error:  # the other ranks wait for this one
            return f"{path} could not be written: {error}"
        return f"{path} lacks {', '.join(sorted(missing))}" if missing else None

    def _load(self, folder: Path) -> None:
        """Let all servers load at the same time."""
        def load(server: VLLMServer) -> None:
            if any(folder.glob("*.safetensors")):
                self._attempt(server, partial(server.load_weights, folder))
            if self._sends_adapter:
                self._attempt(server, partial(
                    server.load_adapter, folder / ADAPTER_FOLDER, folder.name))

        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(load, self._servers))

    def _attempt(self, server: VLLMServer, request: Callable[[], Any]) -> Any:
        """Return what a request returns, if need be after some attempts.

        Raises:
            TrainingStopped: none succeeded.
        """
        for wait in (*PAUSES, None):
            try:
                return request()
            except ServerError as error:
                if wait is None or not error.again:
                    raise _stopped(server, error) from error
                time.sleep(wait)

    def _prove(self) -> None:
        """Compare every server with the training layout; raise on all ranks if one is stale."""
        expected = self._expected()
        with distributed.failing_together():
            if not distributed.is_main():
                return
            for server, freshness in zip(self._servers, self._freshness, strict=True):
                rows = [self._attempt(server, partial(server.prompt_logprobs, ids))
                        for ids in self._probe]
                served = torch.tensor([value for row in rows for value in row])
                problem = freshness.problem(served, expected)
                if problem:
                    raise TrainingStopped(f"error: --vllm_url {server.url}: {problem}")

    @torch.no_grad()
    def _expected(self) -> Tensor:
        """Return the training layout's log-probabilities [N] of the probe."""
        ids, mask = pad(self._probe, 0)
        labels = ids.where(mask.bool(), losses.IGNORE_INDEX)
        module, device = self._actor.module, distributed.device()
        training = module.training
        module.eval()
        found = at_labels(self._actor, ids.to(device), labels.to(device), losses.chosen_logprobs)
        module.train(training)
        return found[:, 0].cpu()

    # --- rollouts --------------------------------------------------------------------------------

    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, eos_ids: Tensor, pad_id: int,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """Generate responses to this rank's prompts [B, P]; the arguments are `Decoder.generate`'s.

        Raises:
            TrainingStopped: on all ranks, if a request failed on every attempt.
        """
        rows = prompts.unpadded()
        responses = [Response(row, sampling, ()) for row in rows
                     for _ in range(sampling.num_generations)]
        seeds = torch.randint(2**31, (len(responses),), generator=generator,
                              device=prompts.input_ids.device).tolist()
        ends = eos_ids.tolist()
        with distributed.failing_together():
            pool = ThreadPoolExecutor(max(1, min(len(responses), MOST_REQUESTS)))
            try:
                # Copies of a prompt go to one server, which computes it once.
                numbers = (i // sampling.num_generations for i in count())
                list(pool.map(partial(self._complete, ends), numbers, responses, seeds))
            finally:
                pool.shutdown(cancel_futures=True)
        return as_rollout(prompts, responses, pad_id)

    def _complete(self, eos_ids: list[int], number: int, response: Response, seed: int) -> None:
        """Let a server write a response to prompt `number`, or after a failure the next one."""
        for attempt, wait in enumerate((*PAUSES, None)):
            server = self._servers[(distributed.rank() + number + attempt) % len(self._servers)]
            try:
                server.complete(response, seed, eos_ids)
                break
            except ServerError as error:
                if wait is None or not error.again:
                    raise _stopped(server, error) from error
                time.sleep(wait)
        vocabulary = self._model.config.get_text_config().vocab_size
        if max(response.tokens) >= vocabulary:
            raise _stopped(server, f"sampled token {max(response.tokens)}, and the actor's "
                                   f"vocabulary has {vocabulary}")
        if not _known(server.served, response.sampling):
            response.logprobs = [float("nan")] * len(response.tokens)

    def verify(self, difference: float) -> None:
        """Check the rollouts' log-probabilities against those of the training layout.

        Args:
            difference: mean over the rollouts of all ranks, in nats; NaN where it is not known.

        Raises:
            TrainingStopped: the rollouts come from other weights than the actor's.
        """
        if difference > self._limit:
            raise TrainingStopped(
                f"error: --rollout_engine vllm: weights not updated, or precision: the rollouts' "
                f"log-probabilities differ from the actor's by {difference:.2g} nats on average "
                f"(allowed: {self._limit:.2g}); was a server started again?")

    def shutdown(self) -> None:
        """Close the connections; the servers go on."""
        for server in self._servers:
            server.close()


def _stopped(server: VLLMServer, reason: object) -> TrainingStopped:
    return TrainingStopped(f"error: --vllm_url {server.url}: {reason}")


def _parts(weights: Iterator[PlainWeight]) -> Iterator[dict[str, Tensor]]:
    """Collect weights into parts of whole layers and PART_BYTES or more."""
    part: dict[str, Tensor] = {}
    layer = None
    for name, tensor, *_ in weights:
        if not tensor.numel():
            continue  # of a rank that does not write
        now = [word for word in name.split(".") if word.isdigit()][:1]
        full = sum(held.nbytes for held in part.values()) >= PART_BYTES
        if full and now != layer:
            yield part
            part = {}
        part[name], layer = tensor, now
    if part:
        yield part
