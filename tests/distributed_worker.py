"""Two ranks that run every case of test_distributed.py, one after the other.

    python tests/distributed_worker.py FOLDER [PREFIXES OF CASES ...]

FOLDER holds the small models, `overrides.json` for DeepSpeed and `experience.pt`; the ranks write
`results_*.json`, and `weights_*.pt` and exports to compare. Both are forks of one process, so that
the libraries are imported once.
"""

import contextlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from conftest import Small, fill_adapters, hybrid_engine, learn, moved, snapshot
from fake_vllm import serving
from plain import forward_logits
from programs import exit_codes, fork_ranks

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience
from alpaca_rlhf.utils import console, distributed, supervised, training_loop
from alpaca_rlhf.utils.configs import BatchConfig, RolloutEngineConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import (
    PromptBatch,
    collate_pairs,
    collate_prompts,
    collate_tokens,
    pad,
    rank_batches,
)
from alpaca_rlhf.utils.errors import TrainingStopped
from alpaca_rlhf.utils.generation.vllm_engine import VLLMEngine
from alpaca_rlhf.utils.generation.vllm_server import VLLMServer
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.weights.ema import Ema
from alpaca_rlhf.utils.model.weights.whole import merged_state_dict
from alpaca_rlhf.utils.run import export

STAGES = (0, 1, 2, 3)
# Stage, LoRA rank and hybrid engine of step 3: every pair of values occurs.
SERVED = ((0, 0), (0, 4), (3, 0), (3, 4))  # stage and LoRA rank of step 3 on a vLLM server
STEP3 = ((0, 0, False), (0, 4, False), (0, 0, True), (0, 4, True), (1, 0, True), (1, 4, False),
         (2, 0, False), (2, 4, True), (3, 0, False), (3, 4, True))
# Role, stage and precision of steps 1 and 2.
HALF = (("actor", 0, "bf16"), ("actor", 3, "bf16"), ("critic", 2, "bf16"), ("critic", 3, "bf16"))
# Role, stage, LoRA rank, precision and bits of quantized weights in steps 1 and 2.
QUANTIZED = (("actor", 0, 4, "fp32", 4), ("critic", 2, 4, "fp32", 4), ("actor", 2, 4, "fp32", 8),
             ("critic", 1, 4, "fp32", 8)) if find_spec("bitsandbytes") else ()
# Prompts that are answered greedily: several waves of 16 on each rank.
GREEDY = 72
# Eight rows of unlike length, so that the ranks hold unlike numbers of tokens.
TOKENS = [
    {"input_ids": [1, *range(50, 50 + n)], "labels": [-100, *range(50, 50 + n)]}
    for n in (11, 2, 5, 1, 7, 3, 2, 9)
]
PAIRS = [
    {"chosen_ids": [1, *range(60, 60 + n), 2], "rejected_ids": [1, *range(90, 92 + n % 3), 2]}
    for n in (5, 1, 3, 2, 4, 6, 1, 2)
]


def of_this_rank(batch: PromptBatch) -> PromptBatch:
    """Return every second row, on two ranks."""
    mine = slice(distributed.rank(), None, distributed.world_size())
    return PromptBatch(batch.input_ids[mine], batch.attention_mask[mine])


# ------------------------------------------------------------------- the steps, compared by weights


def two_steps(
    small: Small, role: str, stage: int, lora_rank: int = 0, dtype: str = "fp32",
    bits: int | None = None,
) -> tuple[Any, dict[str, float]]:
    """Take two optimizer steps over the eight rows: micro-batches of 4 rows over all ranks.

    Returns:
        The engine, and loss and gradient norm of the second step.
    """
    torch.manual_seed(0)  # of the adapter
    engine = small.trained(role, stage, lora_rank, dtype=dtype, bits=bits, **small.comparable)
    world = distributed.world_size()
    if role == "actor":
        rows, collate, loss = TOKENS, collate_tokens, step1.loss
    else:
        rows, collate, loss = PAIRS, collate_pairs, step2.loss
    batches = rank_batches(list(range(8)), 4 // world, distributed.rank(), world)
    for _ in range(2):
        micro = [collate([rows[i] for i in batch], pad_id=3) for batch in batches]
        weight = training_loop.global_weight(micro)
        result = training_loop.optimizer_step(engine, micro, partial(loss, engine), weight)
    return engine, {"loss": result["loss"], "norm": training_loop.gradient_norm(engine)}


def ppo_step(
    small: Small, stage: int, lora_rank: int, experience: Experience, share: bool = False
) -> Any:
    """One update from the same eight rollouts, dealt out over all ranks."""
    engine = small.roles(stage, lora_rank, places={"share_backbone": share}, **small.comparable)
    mine = experience.rows(list(range(8))[distributed.rank() :: distributed.world_size()])
    learn(small.trainer(engine, micro=8), mine)
    return engine


def weights(engine: Any, on_this_rank: bool = True) -> dict[str, torch.Tensor]:
    """Return the weights of the plain model, with the adapter merged."""
    model = engine.module.model if hasattr(engine.module, "model") and hasattr(
        lora.unwrapped(engine.module.model), "score"
    ) else engine.module
    return merged_state_dict(model, on_this_rank)[0]


def save(folder: Path, name: str, engine: Any, record: Any = None) -> dict[str, Any]:
    """Save the weights, to compare them with those of the same step on one rank."""
    state = weights(engine, distributed.is_main())
    if distributed.is_main():
        torch.save(state, folder / f"weights_{name}.pt")
    return dict(record or {})


# ------------------------------------------------------------------- step 3, run through


def iterations(
    small: Small, folder: Path, stage: int, lora_rank: int, hybrid: bool, dtype: str = "fp32"
) -> dict[str, Any]:
    """Run two PPO iterations."""
    engine = small.roles(stage, lora_rank, eos_every=6, dtype=dtype, **small.comparable)
    maker = small.maker(engine, hybrid=hybrid, tokens=8)
    trainer = small.trainer(engine, accumulation=2)
    before, tokens, records = snapshot(engine.actor.module), [], []
    for number in range(2):
        experience, metrics = small.experience(
            maker, prompts=of_this_rank(small.prompts(8)), trainer=trainer, number=number)
        metrics |= learn(trainer, experience, number)
        tokens.append(distributed.gather_rows(
            [row[kept.bool()].tolist()
             for row, kept in zip(experience.responses, experience.response_mask, strict=True)]
        ))
        records.append(metrics)
    if dtype == "fp32":
        save(folder, f"step3_{stage}_{lora_rank}_{hybrid}", engine.actor)
    return {
        "metrics": records, "tokens": tokens, "moved": len(moved(before, engine.actor.module)),
        "finite": all(math.isfinite(value) for m in records for value in m.values()),
    }


# ------------------------------------------------------------------- ZeRO-3 and generation mode


def whole(model: torch.nn.Module) -> bool:
    """Return whether every weight is whole."""
    return all(p.numel() == p.ds_numel for p in model.parameters())


def sharded(model: torch.nn.Module) -> bool:
    """Return whether every weight is sharded."""
    return all(p.numel() == 0 for p in model.parameters())


def hook_counts(model: torch.nn.Module) -> list[int]:
    """Count the forward hooks of each module."""
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def gathering(small: Small) -> dict[str, Any]:
    """Record the state of ZeRO-3 before, in and after generation mode, and after an exception."""
    engine = small.trained("actor", 3, lora=4)
    model, record = engine.module, {}
    batch = small.prompts(2)
    expected = forward_logits(engine, batch.input_ids, batch.attention_mask).detach()
    before, hooks = snapshot(model), hook_counts(model)
    record["sharded_before"] = sharded(model)
    record["hooks_before"] = sum(hooks)
    for fails in (False, True):
        with contextlib.suppress(KeyboardInterrupt), \
                hybrid_engine(engine).generation_mode():
            record["whole_inside"] = whole(model)
            record["hooks_inside"] = sum(hook_counts(model))
            folded = [layer.merged for layer in lora.lora_layers(model)]
            record["folded_inside"] = all(folded)
            if fails:
                raise KeyboardInterrupt
        after = forward_logits(engine, batch.input_ids, batch.attention_mask).detach()
        record["after exception" if fails else "after"] = {
            "sharded": sharded(model), "hooks": hook_counts(model) == hooks,
            "unmoved": not moved(before, model), "same_logits": after.equal(expected),
            "folded": any(layer.merged for layer in lora.lora_layers(model)),
        }
    return record


def greedy_replies(small: Small, stage: int, unpin: bool, lora_rank: int) -> dict[str, Any]:
    """Greedy responses to this rank's prompts; their lengths differ much between the ranks."""
    engine = small.trained("actor", stage, lora_rank)
    fill_adapters(engine.module)
    texts = [messages for messages, _ in islice(assistant_world.pretraining_texts(3), GREEDY)]
    mine = texts[distributed.rank() :: distributed.world_size()]
    prompts = collate_prompts(
        [{"prompt_ids": small.chat.prompt_ids(messages)[-60:]} for messages in mine], 3
    )
    # On rank 0 nearly every reply ends at once; on rank 1 few do.
    often = 2 if distributed.rank() == 0 else 40
    hybrid = hybrid_engine(engine, slots=16, unpin_actor_parameters=unpin)
    before = snapshot(engine.module)
    rollout = hybrid.generate(
        prompts, SamplingConfig(12, 0), torch.arange(0, len(small.tokenizer), often), 3
    )
    kept = rollout.response_mask.bool()
    return {
        "in_step": hybrid.decodes_in_step, "unmoved": not moved(before, engine.module),
        "replies": distributed.gather_rows(
            [[row[mask].tolist() for row, mask in zip(rollout.responses, kept, strict=True)]]
        ),
    }


# ------------------------------------------------------------------- exports, averages, the rest


def exported(small: Small, folder: Path, stage: int, role: str) -> dict[str, Any]:
    """Export the model after the two steps."""
    engine, _ = two_steps(small, role, stage, lora_rank=4)
    model = engine.module if role == "actor" else engine.module.model
    before = snapshot(engine.module)
    export.export(model, small.tokenizer, folder / f"export_{role}_{stage}", "card", {})
    return {"unmoved": not moved(before, engine.module)}


def averaged(small: Small, stage: int, **changes: Any) -> dict[str, Any]:
    """Average the weights before and after a step, then continue the run."""
    engines = []
    for _ in range(2):
        torch.manual_seed(0)  # of the adapter
        engines.append(small.trained("actor", stage, lora=4, **{**small.comparable, **changes}))
    engine, without = engines
    ema = Ema(engine.module, decay=0.25)
    start = snapshot(engine.module)

    def step(which: Any) -> None:
        micro = [collate_tokens(TOKENS[distributed.rank() :: 2], pad_id=3)]
        training_loop.optimizer_step(
            which, micro, partial(step1.loss, which), training_loop.global_weight(micro)
        )

    step(engine)
    ema.update()
    end = snapshot(engine.module)
    # What is measured before an export leaves the small weights gathered.
    forward_logits(engine, *pad([[1, 50, 51]], value=3))
    with ema.swapped_in():
        inside = snapshot(engine.module)
    trained = [name for name in start if "lora_" in name]
    error = max(
        (inside[n] - (0.25 * start[n] + 0.75 * end[n])).abs().max().item() for n in trained
    )
    record = {
        "error": error, "moved": any(not start[n].equal(end[n]) for n in trained),
        "back": not moved(end, engine.module),
    }
    step(engine)
    for _ in range(2):
        step(without)
    record["goes_on"] = not moved(snapshot(without.module), engine.module)
    return record


def one_rank_not_finite(small: Small, stage: int) -> dict[str, Any]:
    """Make the loss non-finite on rank 1 alone: neither rank may step, nor wait for ever."""
    engine = small.trained("actor", stage, **small.comparable)
    before = snapshot(engine.module)
    micro = [collate_tokens(TOKENS[i : i + 2], pad_id=3) for i in (0, 2)]

    def objective(batch: Any) -> Any:
        loss, stats = step1.loss(engine, batch)
        bad = distributed.rank() == 1 and batch is micro[1]
        return (loss * math.nan if bad else loss), stats

    weight = training_loop.global_weight(micro)
    skipped = training_loop.optimizer_step(engine, micro, objective, weight) is None
    unmoved = not moved(before, engine.module)
    good = training_loop.optimizer_step(
        engine, micro, partial(step1.loss, engine), weight
    )
    return {"skipped": skipped, "unmoved": unmoved, "goes_on": good is not None}


def measured(small: Small) -> dict[str, Any]:
    """Evaluate seven held-out rows on two ranks, under ZeRO-3."""
    engine = small.trained("actor", 3)

    def measure(engine: Any, batch: Any) -> list[list[float]]:
        forward_logits(engine, batch.input_ids, batch.attention_mask)
        return [[float(n)] for n in batch.attention_mask.sum(-1).tolist()]

    objective = replace(step1.objective(pad_id=3), measure=measure)
    data: Any = SimpleNamespace(held_out=TOKENS[:7])
    rows = supervised.evaluate(engine, data, objective, BatchConfig(per_device_eval_batch_size=2))
    return {"lengths": sorted(n for (n,) in rows)}


def over_ranks(small: Small, experience: Experience) -> dict[str, Any]:
    """Reduce over both ranks: sums, maxima, gathered rows, whitening, mean score."""
    rank = distributed.rank()
    maker = small.maker(small.roles(0, 4, eos_every=6))
    made, metrics = small.experience(maker, reward_normalization="reference")
    inside = made.advantages[made.response_mask.bool()].tolist()
    with mock.patch.object(distributed, "bf16_gain", lambda: (4.0, 1.0)[rank]):
        auto = str(distributed.resolve_dtype("auto"))
    return {
        "auto": distributed.gather_rows([auto]),
        "sum": distributed.sum_over_ranks(torch.tensor([1.0 + rank])).item(),
        "max": distributed.max_over_ranks(torch.tensor([1.0 + rank])).item(),
        "rows": distributed.gather_rows([rank, rank * 10]),
        "tokens": distributed.gather_rows([made.responses.tolist()]),
        "advantages": distributed.gather_rows([inside]), "score_mean": metrics["reward/score_mean"],
        "scores": distributed.gather_rows(made.score.tolist()),
    }


def cases(small: Small, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return every case by its name."""
    experience = Experience(**torch.load(folder / "experience.pt"))
    assert {f.name for f in fields(Experience)} == set(vars(experience))
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "gathering": partial(gathering, small), "measured": partial(measured, small),
        "over_ranks": partial(over_ranks, small, experience),
        "half_step3": partial(iterations, small, folder, 3, 4, True, "bf16"),
        # Small weights stay gathered beside their shards, unless DeepSpeed is told otherwise.
        "ema_gathered": partial(averaged, small, 3, overrides=small.unclipped),
    }
    for (stage, unpin), rank in product(((0, False), (3, False), (3, True)), (0, 4)):
        made[f"greedy_{stage}_{unpin}_{rank}"] = partial(greedy_replies, small, stage, unpin, rank)
    for stage, rank, role in product(STAGES, (0, 4), ("actor", "critic")):
        if rank == 0 or stage in (0, 3):
            made[f"step_{role}_{stage}_{rank}"] = partial(
                saved_steps, small, folder, f"{role}_{stage}_{rank}", role, stage, rank)
    for stage in STAGES:
        made[f"ppo_{stage}"] = partial(saved_ppo_step, small, folder, stage, experience)
        if stage < 3:
            adapted = replace(small, folder=folder / "adapted")
            made[f"shared_{stage}"] = partial(
                saved_ppo_step, adapted, folder, stage, experience, "shared")
        made[f"ema_{stage}"] = partial(averaged, small, stage)
        made[f"not_finite_{stage}"] = partial(one_rank_not_finite, small, stage)
    for how in STEP3:
        made["step3_{}_{}_{}".format(*how)] = partial(iterations, small, folder, *how)
    for how in SERVED:
        made["served_{}_{}".format(*how)] = partial(on_a_server, small, *how)
    for role, stage, dtype in HALF:
        made[f"half_{role}_{stage}_{dtype}"] = partial(
            saved_steps, small, folder, f"half_{role}_{stage}_0_{dtype}", role, stage, 0, dtype)
    for how in QUANTIZED:
        name = "quantized_{}_{}_{}".format(*how[:2], how[-1])
        made[name] = partial(saved_steps, small, folder, name, *how)
    for stage, role in product((0, 3), ("actor", "critic")):
        made[f"export_{role}_{stage}"] = partial(exported, small, folder, stage, role)
    return made


def on_a_server(small: Small, stage: int, lora_rank: int) -> dict[str, Any]:
    """Two PPO iterations with a server that both ranks ask; then a transfer without one tensor."""
    torch.manual_seed(0)
    roles = small.roles(stage, lora_rank, **small.comparable)
    fill_adapters(roles.actor.module)
    prompts, differences, stopped = of_this_rank(small.prompts(8)), [], ""
    with contextlib.ExitStack() as stack:
        fake = None
        if distributed.is_main():
            fake = stack.enter_context(serving(small.folder / "actor"))
        url, = distributed.gather_rows([fake.url] if fake else [])
        server = VLLMServer(url, 60.0)
        server.describe()
        maker = small.maker(roles, rollout_engine=VLLMEngine(
            roles.actor, [server], RolloutEngineConfig(), small.prompts(4).unpadded()))
        for _ in range(2):
            experience, metrics = small.experience(maker, prompts=prompts)
            differences.append(metrics["rollout/decoding_difference_max"])
            learn(small.trainer(roles, micro=4), experience)
        if fake:
            fake.withheld = {"model.layers.1.mlp.down_proj.weight"}
        try:
            maker.generate(prompts)
        except TrainingStopped as stop:
            stopped = str(stop)
        stops = distributed.gather_rows([stopped])
        return {"differences": differences, "stops": stops,
                "answered": len(fake.prompts) if fake else None,
                "whole": fake and fake.loaded == set(fake.base.state_dict())}


def saved_steps(small: Small, folder: Path, name: str, *how: Any) -> dict[str, Any]:
    """Save the weights after the two steps."""
    return save(folder, name, *two_steps(small, *how))


def saved_ppo_step(
    small: Small, folder: Path, stage: int, experience: Experience, kind: str = "ppo"
) -> dict[str, Any]:
    """Save actor and critic after a step of PPO; kind "shared" has one base and four adapters."""
    share = kind == "shared"
    engine = ppo_step(small, stage, 4 if share else 0, experience, share)
    save(folder, f"{kind}_actor_{stage}", engine.actor)
    return save(folder, f"{kind}_critic_{stage}", engine.critic)


def run_cases() -> None:
    """Run every case on this rank; one that fails leaves its traceback and ends the process."""
    folder = Path(sys.argv[1])
    distributed.initialize(0)
    small = Small(folder, str(folder / "overrides.json"))
    results: dict[str, Any] = {}
    for name, case in cases(small, folder).items():
        if sys.argv[2:] and not name.startswith(tuple(sys.argv[2:])):
            continue
        start = time.perf_counter()
        try:
            torch.manual_seed(0)
            results[name] = case()
        except Exception:
            # The other rank is now out of step: nothing after this would mean anything.
            results["failed"] = f"{name}: {traceback.format_exc()}"
            break
        results[name]["seconds"] = time.perf_counter() - start
    (folder / f"results_{distributed.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    sys.exit(max(exit_codes(fork_ranks(lambda: console.run_main(run_cases), 2))))
