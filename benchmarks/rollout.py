"""Speed of rollouts, as ratios to transformers' `generate` in the same run.

    python benchmarks/rollout.py                                   # the embedded tiny LLaMA
    python benchmarks/rollout.py --model output/smollm2-135m --cases full varied

Both sides have the same weights, prompts and maximum lengths and sample from the whole distribution
at temperature 1. They run alternately, and the result is the median of the ratios, which other load
on the machine disturbs least. In the cases "full" every response has the maximum length. In the
case "varied" 64 responses end at lengths drawn in advance, with a median of a quarter of the
maximum. In the case "ZeRO-3" two ranks generate: ours with the weights gathered once, `generate`
with `synced_gpus` and a gather of every weight for each token (DeepSpeed keeps weights of fewer
than 100,000 elements whole, which is most of a tiny model; here it does not). Our time includes
entering and leaving generation mode.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.demo.tiny_llama import ensure_tiny_llama
from alpaca_rlhf.training_model import launching
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    EngineConfig,
    HybridEngineConfig,
    LoadingConfig,
    RoleConfig,
    SamplingConfig,
    ScheduleConfig,
)
from alpaca_rlhf.utils.data.batches import PromptBatch, collate_prompts
from alpaca_rlhf.utils.data.prepare import cache_home
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, load_tokenizer
from alpaca_rlhf.utils.engine import Engine, build_trained
from alpaca_rlhf.utils.generation.decoder import DecodingSession
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm

CASES = ("full", "varied", "zero3")
NEVER = torch.tensor([-1])
PAD = 0


def main() -> None:
    """Measure the cases and print them as Markdown."""
    args = parser().parse_args()
    if args.zero3_rank:
        distributed.initialize(0)
        zero3_rank(args)
        return
    torch.set_num_threads(args.threads)
    distributed.initialize(0)
    model = args.model or str(ensure_tiny_llama(cache_home(None)))
    name = Path(model).name
    engine, chat = build(model, 0, args.lora_dim, args.dtype)
    weights = sum(p.numel() for p in engine.module.parameters())
    say(f"## {name}: {weights / 1e6:.1f} M parameters, {args.dtype}, {args.threads} threads, limit "
        f"{args.new_tokens} new tokens, median of {args.repeats}\n")
    say(HEADER)
    for batch in args.batch if "full" in args.cases else ():
        prompts = some_prompts(chat, batch)
        report(f"full, batch {batch}", engine, prompts, batch, [args.new_tokens] * batch, args)
    if "varied" in args.cases:
        lengths = varied_lengths(64, args.new_tokens)
        report("varied, 64 prompts, batch 16", engine, some_prompts(chat, 64), 16, lengths, args)
    if "zero3" in args.cases:
        zero3(args, model)
    say(f"\nmemory read by one pass over 256 MB: {bandwidth():.1f} GB/s")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="a Hugging Face folder (default: the embedded tiny LLaMA)")
    made.add_argument(
        "--batch", type=int, nargs="+", default=[8, 16], help="slots, cases full and zero3"
    )
    made.add_argument("--new_tokens", type=int, default=128, help="maximum length of a response")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--lora_dim", type=int, default=0, help="rank of an adapter")
    made.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both sides")
    made.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    made.add_argument("--zero3_rank", action="store_true", help=argparse.SUPPRESS)
    return made


# ------------------------------------------------------------------- what is measured


def build(
    model: str, stage: int, lora_dim: int, dtype: str = "fp32"
) -> tuple[Engine, ChatFormat]:
    """Build the actor as step 3 does."""
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        # As in a large model, no weight is too small to be gathered.
        overrides = Path(folder) / "overrides.json"
        overrides.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
        engine, _ = build_trained(
            partial(load_causal_lm, tokenizer=tokenizer),
            RoleConfig(
                model_name_or_path=model, learning_rate=1e-5, lora_learning_rate=1e-4,
                zero_stage=stage, lora_dim=lora_dim,
            ),
            loading=LoadingConfig(dtype=dtype),
            adapters=AdapterConfig(only_optimize_lora=lora_dim > 0),
            engine=EngineConfig(deepspeed_config=str(overrides)),
            schedule=ScheduleConfig(lr_scheduler_type="constant"), micro_batch_size=1,
            total_steps=1,
        )
    return engine, ChatFormat(tokenizer)


def some_prompts(chat: ChatFormat, count: int) -> PromptBatch:
    """Return prompts of the embedded data, padded left."""
    texts = islice(assistant_world.pretraining_texts(3), count)
    return collate_prompts([{"prompt_ids": chat.prompt_ids(m)} for m, _ in texts], PAD)


def varied_lengths(count: int, limit: int) -> list[int]:
    """Return log-normal lengths with a median of a quarter of the limit, none above it."""
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.8).exp()
    return (drawn * limit / 4).round().clamp(1, limit).long().tolist()


class _Ends(StoppingCriteria):
    """Ends rows of `generate` at their lengths."""

    def __init__(self, prompt: int, lengths: list[int]) -> None:
        self._prompt, self._lengths = prompt, torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return input_ids.shape[1] - self._prompt >= self._lengths


def theirs(
    engine: Engine, prompts: PromptBatch, slots: int, lengths: list[int], limit: int,
    synced: bool = False,
) -> None:
    """Generate with transformers, batch by batch."""
    model = engine.module.eval()
    for i in range(0, len(lengths), slots):
        rows = slice(i, i + slots)
        with torch.no_grad():
            model.generate(
                input_ids=prompts.input_ids[rows], attention_mask=prompts.attention_mask[rows],
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=limit,
                eos_token_id=None, pad_token_id=PAD, synced_gpus=synced,
                stopping_criteria=StoppingCriteriaList(
                    [_Ends(prompts.input_ids.shape[1], lengths[rows])]
                ),
            )
    model.train()


def ours(hybrid: HybridEngine, prompts: PromptBatch, slots: int, lengths: list[int]) -> None:
    """Generate with the hybrid engine, from entering generation mode to leaving it."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(
        prompts.input_ids, prompts.attention_mask, strict=True)]
    with hybrid.generation_mode() as decoder:
        session = DecodingSession(decoder, slots, eos_ids=[])
        responses = [
            session.add(row, SamplingConfig(length), seed)
            for seed, (row, length) in enumerate(zip(rows, lengths, strict=True))
        ]
        while session.busy:
            session.step()
    assert [len(response.tokens) for response in responses] == lengths


# ------------------------------------------------------------------- how it is measured


def took(run: Callable[[], None]) -> float:
    """Return the seconds a run takes, starting when all ranks are ready."""
    distributed.barrier()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


HEADER = (
    "| case | `generate`, tokens/s | ours, tokens/s | ratio (lowest to highest) | prefill | decode "
    "| sampling | refill | enter + leave |\n" + "| --- " * 9 + "|"
)


def report(
    case: str, engine: Engine, prompts: PromptBatch, slots: int, lengths: list[int],
    args: argparse.Namespace, synced: bool = False,
) -> None:
    """Print one line of the table; the first run of both is a warm-up and does not count."""
    hybrid = HybridEngine(engine, HybridEngineConfig(enable_hybrid_engine=True), slots)
    limit, pairs = max(lengths), []
    for turn in range(args.repeats + 1):
        slow = took(lambda: theirs(engine, prompts, slots, lengths, limit, synced))
        if turn == 1:
            hybrid.seconds.clear()
        fast = took(lambda: ours(hybrid, prompts, slots, lengths))
        pairs.append((slow, fast))
    pairs, tokens = pairs[1:], sum(lengths) * distributed.world_size()
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(slow / fast for slow, fast in pairs)
    whole = sum(fast for _, fast in pairs)
    seconds = hybrid.seconds
    shares = [seconds["prefill"], seconds["decode"], seconds["sampling"], seconds["refill"],
              seconds["enter"] + seconds["leave"]]
    cells = [case, f"{tokens / slow:.0f}", f"{tokens / fast:.0f}",
             f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})",
             *(f"{part / whole:.1%}" for part in shares)]
    say("| " + " | ".join(cells) + " |")


def zero3(args: argparse.Namespace, model: str) -> None:
    """Run the case of two ranks, in processes of their own with one thread each."""
    command = [
        sys.executable, __file__, "--zero3_rank", "--model", model,
        "--new_tokens", str(args.new_tokens), "--lora_dim", str(args.lora_dim),
        "--dtype", args.dtype, "--repeats", str(args.repeats), "--batch", *map(str, args.batch),
    ]
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.choose_port(0))}
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    if any([process.wait() for process in ranks]):
        raise SystemExit("the case ZeRO-3 failed")


def zero3_rank(args: argparse.Namespace) -> None:
    """Run one of the two ranks: as many prompts as slots, every response of maximum length."""
    torch.set_num_threads(1)
    engine, chat = build(args.model, 3, args.lora_dim, args.dtype)
    for batch in args.batch:
        report(f"ZeRO-3, 2 ranks, batch {batch} each", engine, some_prompts(chat, batch), batch,
               [args.new_tokens] * batch, args, synced=True)


def bandwidth() -> float:
    """Return the GB/s of a sum over a tensor larger than the caches."""
    numbers = torch.zeros(64 * 2**20)
    return numbers.numel() * 4 / 1e9 / min(took(lambda: numbers.sum()) for _ in range(10))


def say(text: str) -> None:
    """Print a line on rank 0."""
    if distributed.is_main():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
