"""Step 2, the reward model: a sequence classifier learns which of two responses was preferred.

    python alpaca_rlhf/training_model/my_deepspeed.py \\
        alpaca_rlhf/training_model/step2_reward_model_finetuning/main.py --output_dir output/critic
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.evaluation.report import page
from alpaca_rlhf.evaluation.statistics import wilson_interval
from alpaca_rlhf.utils import arguments, console, distributed, losses, supervised
from alpaca_rlhf.utils.configs import Step2Config
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.batches import PairBatch, collate_pairs, length_groups
from alpaca_rlhf.utils.data.tokenizer import load_chat
from alpaca_rlhf.utils.engine import Engine, build_trained
from alpaca_rlhf.utils.logging import records
from alpaca_rlhf.utils.memory import planning
from alpaca_rlhf.utils.model.reward_model import (
    TokenScorer,
    load_reward_model,
    save_statistics,
    scores,
)
from alpaca_rlhf.utils.run import checkpoints, export
from alpaca_rlhf.utils.training_loop import Stats

LENGTH_GROUPS = 3
PAIR = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")  # scores, tokens with prompt


def main() -> None:
    """Parse, set up, build, train, export."""
    args = arguments.parse(Step2Config)
    config = arguments.to_config(args)
    distributed.initialize(args.run.seed, args.run.collective_timeout)
    for notice in arguments.notices(args):
        console.say(notice)
    folder, found = checkpoints.open_run(args.run, args.checkpoint, step=2, arguments=config)
    role = tiny_llama.or_embedded(args.model, prepare.cache_home(args.data.data_output_path))
    args = replace(args, model=role)
    planning.check(args)

    chat = load_chat(role.model_name_or_path, args.loading, args.data.chat_template)
    data = prepare.prepare_pairs(
        args.data, seed=args.run.seed, max_seq_len=args.batches.max_seq_len, chat=chat
    )
    console.say(data.describe())
    data.check_against(role.model_name_or_path, "the model to start from")
    if args.run.dry_run:
        return planning.report(args, max(data.lengths()))
    plan = supervised.Plan(args.schedule, args.batches, args.run.seed, data.lengths(sequences=2))
    engine, summary = build_trained(
        partial(load_reward_model, tokenizer=chat.tokenizer), role, loading=args.loading,
        adapters=args.lora, engine=args.engine, schedule=args.schedule, wrap=TokenScorer,
        micro_batch_size=args.batches.per_device_train_batch_size, total_steps=plan.total_steps,
    )
    console.say(f"model: {summary}")

    export.rehearse(engine.module.model, chat.tokenizer, folder.path)
    before, after, pairs, checkpoint = supervised.train(
        engine, data, objective(chat.pad_id), plan, folder=folder, found=found,
        checkpoint=args.checkpoint, tracking=args.tracking, step=2, arguments=config,
    )
    facts = {"base model": role.model_name_or_path, "held-out pairs": describe(after)}
    with checkpoint.saving_on_failure():
        export.export(engine.module.model, chat.tokenizer, folder.path, "Reward model", facts)
    save_scores(folder.path, after, pairs)
    data.save_record(folder.path)
    folder.finish(config, {"step": 2, "before": before, "after": after, "data": data.report})
    page.write_beside(folder.final)


def objective(pad_id: int) -> supervised.Objective:
    """Return the objective of the reward model, for batches padded with `pad_id`."""
    return supervised.Objective(
        collate=partial(collate_pairs, pad_id=pad_id), loss=loss, measure=measure,
        summarize=accuracy, describe=describe,
        shown={"loss": "loss", "accuracy": "accuracy", "lr": "lr", "weight_per_second": "pairs/s"},
    )


def loss(engine: Engine, batch: PairBatch) -> tuple[torch.Tensor, Stats]:
    """Return the sum of the pairwise losses, and the number of pairs in the right order."""
    chosen, rejected = _scores(engine, batch)
    return losses.pairwise_loss(chosen, rejected), {"accuracy": (chosen > rejected).sum()}


def _scores(engine: Engine, batch: PairBatch) -> tuple[torch.Tensor, ...]:
    """Return the scores [B] of chosen and of rejected; sequences of a pair differ in length."""
    lengths = batch.attention_mask.sum(-1).tolist()
    groups = [(rows, lengths[rows[-1]]) for rows in length_groups(lengths, LENGTH_GROUPS)]
    return scores(engine, batch.input_ids, batch.attention_mask, groups).chunk(2)


def measure(engine: Engine, batch: PairBatch) -> list[list[float]]:
    """Return the scores and lengths in tokens of chosen and rejected, in the order of `PAIR`."""
    pair = _scores(engine, batch)
    lengths = batch.attention_mask.sum(-1).to(pair[0].dtype).chunk(2)
    return torch.stack([*pair, *lengths], dim=-1).tolist()


def accuracy(pairs: list[list[float]]) -> dict[str, float]:
    """Return the share of pairs in the right order, its interval, and the scores' statistics."""
    if not pairs:
        return {}
    chosen, rejected, *_ = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    right = int((chosen > rejected).sum())
    low, high = wilson_interval(right, len(pairs))
    return {
        "accuracy": right / len(pairs), "accuracy_low": low, "accuracy_high": high,
        "score_mean": chosen.mean().item(), "score_std": chosen.std(correction=0).item(),
        "rejected_mean": rejected.mean().item(), "pairs": len(pairs),
    }


def save_scores(
    folder: Path | None, result: dict[str, float], pairs: supervised.Numbers
) -> None:
    """Save the scores of held-out pairs and their statistics, which step 3 normalizes with."""
    if folder is None or not pairs or not distributed.is_main():
        return
    save_statistics(folder, result["score_mean"], result["score_std"], len(pairs))
    records.write_rows(
        folder / records.PAIRS_FILE, [dict(zip(PAIR, pair, strict=True)) for pair in pairs]
    )


def describe(result: dict[str, float]) -> str:
    """Return the result of an evaluation as one line for the console."""
    if not result:
        return "no held-out data to evaluate on"
    return (
        f"accuracy {result['accuracy']:.3f} (95 % interval {result['accuracy_low']:.3f} to "
        f"{result['accuracy_high']:.3f}) on {result['pairs']} held-out pairs; chosen score "
        f"{result['score_mean']:.3f} ± {result['score_std']:.3f}, rejected "
        f"{result['rejected_mean']:.3f}"
    )


if __name__ == "__main__":
    console.run_main(main)
