"""Generation by DeepSpeed's own hybrid engine, and the question whether it is right.

Its kernels take the decoder layers' places. They need CUDA, follow transformers late, and leave
peft's adapters out: so before each rollout a few prompts are continued by both engines, and it goes
on only while the greedy tokens are the same. On a CPU this module is tested with a stand-in.
"""

from typing import Any

import deepspeed
import torch
from torch import Tensor

from alpaca_rlhf.utils import distributed, rl_math
from alpaca_rlhf.utils.generation.decoder import RolloutBatch, RolloutRequest, SamplingConfig
from alpaca_rlhf.utils.model.lora import lora_layers

PROMPTS, TOKENS = 4, 16  # of the comparison


def config(longest: int, pin: bool, release_cache: bool) -> dict[str, Any]:
    """The section of DeepSpeed's configuration that makes an engine a hybrid one.

    Args:
        longest: tokens of a prompt and its reply.
        pin: hold the gathered weights through the rollout, under ZeRO-3.
        release_cache: free the KV cache between rollouts.
    """
    return {
        "enabled": True, "max_out_tokens": longest, "pin_parameters": pin,
        "release_inference_cache": release_cache,
    }


def drives(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether an engine is DeepSpeed's hybrid one: `config` was in its configuration."""
    return isinstance(engine, deepspeed.DeepSpeedHybridEngine)


def probe(request: RolloutRequest) -> tuple[RolloutRequest, SamplingConfig]:
    """A few prompts, and how both engines continue them."""
    few = RolloutRequest(request.prompt_ids[:PROMPTS], request.prompt_attention_mask[:PROMPTS])
    return few, SamplingConfig(TOKENS, temperature=0)


def objection(
    engine: Any, ours: RolloutBatch, request: RolloutRequest, sampling: SamplingConfig,
    eos_ids: Tensor, pad_id: int,
) -> str | None:
    """None if the engine gives the tokens that ours has given, on every rank; else what is wrong.

    Args:
        engine: DeepSpeed's.
        ours: what the native backend made of the request.
        request, sampling, eos_ids, pad_id: of both.
    """
    reason = None
    if lora_layers(engine.module):
        reason = "it leaves peft's adapters out"
    else:
        try:
            theirs = generate(engine, request, sampling, eos_ids, pad_id)
        except Exception as error:  # it fails in many ways, and none of them may end a run
            reason = f"it fails ({type(error).__name__}: {error})"
        else:
            same = ours.input_ids.shape == theirs.input_ids.shape
            if not (same and ours.input_ids.equal(theirs.input_ids)):
                reason = "its greedy tokens are not those of the model"
    wrong = torch.tensor(float(reason is not None), device=request.prompt_ids.device)
    if distributed.max_over_ranks(wrong).item():
        return reason or "it is not right on every rank"
    return None


@torch.no_grad()
def generate(
    engine: Any, request: RolloutRequest, sampling: SamplingConfig, eos_ids: Tensor, pad_id: int,
    generator: torch.Generator | None = None, slots: int = 0,
) -> RolloutBatch:
    """Draw replies by the engine's `generate`, so many rows at once (0: all of them)."""
    copies, device = sampling.n_samples_per_prompt, request.prompt_ids.device
    ids = request.prompt_ids.repeat_interleave(copies, dim=0)
    mask = request.prompt_attention_mask.repeat_interleave(copies, dim=0)
    shape, size = (len(ids), sampling.max_new_tokens), slots or len(ids)
    tokens = torch.full(shape, pad_id, device=device)
    logprobs = torch.zeros(shape, device=device)
    how = _options(engine, sampling, eos_ids, pad_id)
    training = engine.module.training
    engine.eval()
    try:
        with torch.random.fork_rng():
            # transformers draws from the global generator.
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=device)))
            for rows in (slice(i, i + size) for i in range(0, len(ids), size)):
                made = engine.generate(input_ids=ids[rows], attention_mask=mask[rows], **how)
                drawn = made.sequences[:, ids.shape[1] :]
                tokens[rows, : drawn.shape[1]] = drawn
                for place, logits in enumerate(made.logits):
                    logprobs[rows, place] = rl_math.token_logprobs(
                        logits.unsqueeze(1), drawn[:, place : place + 1],
                        sampling.temperature or 1.0,
                    ).squeeze(1)
    finally:
        engine.train(training)
    kept = rl_math.response_mask(tokens, eos_ids)
    longest = int(kept.sum(-1).max())
    kept, tokens, logprobs = kept[:, :longest], tokens[:, :longest], logprobs[:, :longest]
    return RolloutBatch(
        torch.cat([ids, tokens.masked_fill(kept == 0, pad_id)], dim=-1),
        torch.cat([mask, kept], dim=-1),
        torch.full((len(ids),), ids.shape[1], device=device), kept, logprobs * kept,
    )


def _options(
    engine: Any, sampling: SamplingConfig, eos_ids: Tensor, pad_id: int
) -> dict[str, Any]:
    """The same distribution, in the words of transformers."""
    how: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens, "eos_token_id": eos_ids.tolist(),
        "pad_token_id": pad_id, "do_sample": sampling.temperature > 0,
        "repetition_penalty": sampling.repetition_penalty,
        "return_dict_in_generate": True, "output_logits": True,
        "synced_gpus": engine.zero_optimization_stage() == 3,
    }
    if sampling.temperature > 0:
        how |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    return how
