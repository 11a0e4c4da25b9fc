"""Step 2, the reward model: a sequence classifier learns which of two replies was preferred.

    python alpaca_rlhf/training_model/my_deepspeed.py \\
        alpaca_rlhf/training_model/step2_reward_model_finetuning/main.py --output_dir output/critic
"""

from dataclasses import asdict
from functools import partial

import torch

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.evaluation.report import page
from alpaca_rlhf.evaluation.statistics import wilson_interval
from alpaca_rlhf.utils import arguments, console, distributed, losses, preflight, training_loop
from alpaca_rlhf.utils.arguments import Step2Arguments
from alpaca_rlhf.utils.configs import DataConfig
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.batches import PairBatch, collate_pairs
from alpaca_rlhf.utils.data.prepare import Prepared
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, describe, load_tokenizer
from alpaca_rlhf.utils.engine import Engine, ModelSettings, Schedule, build_trained
from alpaca_rlhf.utils.logging import records
from alpaca_rlhf.utils.logging.tracker import Outside, Tracker
from alpaca_rlhf.utils.memory_plan import Planned
from alpaca_rlhf.utils.model.causal_lm import LoadOptions
from alpaca_rlhf.utils.model.reward_model import (
    TokenScorer,
    load_reward_model,
    save_statistics,
    scores,
)
from alpaca_rlhf.utils.run import export as checkpoint
from alpaca_rlhf.utils.run.checkpoints import Checkpoints, open_run
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
from alpaca_rlhf.utils.run.run_folder import RunFolder

SHOWN = {
    "loss": "loss", "accuracy": "accuracy", "lr": "lr", "weight_per_second": "pairs/s",
}


def main() -> None:
    """Parse, set up, build, train, export."""
    args = arguments.parse_step2()
    distributed.initialize(args.run.seed, args.run.collective_timeout)
    for notice in arguments.notices(args):
        console.say(notice)
    run, saving = arguments.run_config(args)
    config = arguments.to_config(args)
    folder, found = open_run(run, saving, step=args.step, arguments=config)
    home = prepare.cache_home(args.data.data_output_path)
    path = args.model.model_name_or_path or tiny_llama.shared(home)
    preflight.check(
        [Planned(path, model_settings(args), scores=True)], args.loading.tokenizer_name_or_path,
        arguments.trackers(args),
    )
    form = ChatFormat(load_tokenizer(
        args.loading.tokenizer_name_or_path or path, args.data.chat_template,
        args.loading.trust_remote_code,
    ))
    console.say(describe(form.tokenizer))
    data = load_data(args, form)
    console.say(data.describe())
    data.check_against(path, "the model to start from")
    plan = plan_of(args)
    total_steps = plan.total_steps(len(data.train))
    engine = build(args, path, form, plan, total_steps)

    def evaluate() -> dict[str, float]:
        return accuracy(score_pairs(engine, data, form.pad_id, args))

    guard = NonFiniteGuard(
        folder.path, args.optimization.max_skipped_steps, "lower --learning_rate"
    )
    checkpoints = Checkpoints(
        folder, {"model": engine}, config=saving, step=args.step, arguments=config, found=found,
        shared={"faults": guard},
    )
    progress = checkpoints.restore(data.fingerprint())
    progress.before = before = progress.before or evaluate()
    console.say(f"before: {summary(before)}")
    outside = Outside(arguments.trackers(args), args.run.logging_dir, config)
    tracker = Tracker(folder.path, total_steps, SHOWN, outside, resume_step=progress.step)
    with tracker, checkpoints.deferring_signals():
        training_loop.train(
            engine, data.train, partial(collate_pairs, pad_id=form.pad_id),
            partial(objective, engine), plan, tracker, evaluate, checkpoints, guard,
            data.lengths(),
        )
    pairs = score_pairs(engine, data, form.pad_id, args)
    after = accuracy(pairs)
    console.say(f"after: {summary(after)}")

    export(engine, form, folder, path, pairs)
    data.save_record(folder.path)
    results = {"step": 2, "before": before, "after": after, "data": data.report}
    folder.finish(config, results)
    page.write_beside(folder.final)


def export(
    engine: Engine, form: ChatFormat, folder: RunFolder, base: str,
    pairs: list[dict[str, float]],
) -> None:
    """The reward model, the statistics of its scores, and the scores of held-out pairs."""
    measured = accuracy(pairs)
    facts = {"base model": base, "held-out pairs": summary(measured)}
    card = checkpoint.model_card("Reward model", facts)
    checkpoint.export(engine.module.model, form.tokenizer, folder.path, card)
    if folder.path and pairs and distributed.is_main():
        save_statistics(
            folder.path, measured["score_mean"], measured["score_std"], len(pairs)
        )
        records.write_rows(folder.path / records.PAIRS_FILE, pairs)


def plan_of(args: Step2Arguments) -> training_loop.Plan:
    """How long to train, on batches of what size."""
    return training_loop.Plan(
        args.optimization.num_train_epochs, args.optimization.max_steps,
        args.batches.per_device_train_batch_size, args.optimization.gradient_accumulation_steps,
        args.run.seed, args.batches.eval_interval,
    )


def build(
    args: Step2Arguments, path: str, form: ChatFormat, plan: training_loop.Plan, total_steps: int
) -> Engine:
    """The model, in DeepSpeed's hands."""
    schedule = Schedule(
        plan.batch_size, plan.accumulation_steps, args.optimization.lr_scheduler_type,
        args.optimization.num_warmup_steps, total_steps,
    )
    engine, trains = build_trained(
        model_settings(args), schedule, partial(load_reward_model, path, form.tokenizer),
        wrap=TokenScorer,
    )
    console.say(f"model: {trains}")
    return engine


def load_data(args: Step2Arguments, form: ChatFormat) -> Prepared:
    """This step's share of the pairs."""
    return prepare.prepare_pairs(
        DataConfig(**asdict(args.data)), seed=args.run.seed,
        max_seq_len=args.batches.max_seq_len, chat=form,
    )


def model_settings(args: Step2Arguments) -> ModelSettings:
    """How the model is loaded and trained."""
    model, lora = args.model, args.lora
    load = LoadOptions(
        distributed.resolve_dtype(args.loading.dtype), args.loading.attn_implementation,
        model.dropout, model.gradient_checkpointing, args.loading.trust_remote_code,
    )
    return ModelSettings(
        load, model.zero_stage, args.optimization.offload, args.optimization.deepspeed_config,
        model.learning_rate, model.lora_learning_rate, model.weight_decay, model.lora_dim,
        lora.lora_alpha, lora.lora_dropout, model.lora_module_name, "--lora_module_name",
        lora.only_optimize_lora,
    )


def objective(
    engine: Engine, batch: PairBatch
) -> tuple[torch.Tensor, training_loop.Stats]:
    """Sum of the pairwise losses, and how many pairs are in order."""
    chosen, rejected = scores(engine, batch.input_ids, batch.attention_mask).chunk(2)
    in_order = (chosen > rejected).sum()
    return losses.pairwise_loss(chosen, rejected), {"accuracy": in_order}


def score_pairs(
    engine: Engine, data: Prepared, pad_id: int, args: Step2Arguments
) -> list[dict[str, float]]:
    """`chosen`, `rejected` (scores) and the tokens of both, prompt included, of held-out pairs."""

    def measure(batch: PairBatch) -> list[list[float]]:
        pair = scores(engine, batch.input_ids, batch.attention_mask).chunk(2)
        lengths = batch.attention_mask.sum(-1).to(pair[0].dtype).chunk(2)
        return torch.stack([*pair, *lengths], dim=-1).tolist()

    numbers = training_loop.evaluate_sums(
        engine, data.held_out, partial(collate_pairs, pad_id=pad_id), measure,
        args.batches.per_device_eval_batch_size, args.batches.eval_iters,
    )
    names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
    return [dict(zip(names, row, strict=True)) for row in numbers]


def accuracy(pairs: list[dict[str, float]]) -> dict[str, float]:
    """Share of held-out pairs in order, with its interval, and the scores of chosen replies."""
    if not pairs:
        return {}
    chosen, rejected = (
        torch.tensor([pair[name] for pair in pairs], dtype=torch.float64)
        for name in ("chosen", "rejected")
    )
    right = int((chosen > rejected).sum())
    low, high = wilson_interval(right, len(pairs))
    return {
        "accuracy": right / len(pairs), "accuracy_low": low, "accuracy_high": high,
        "score_mean": chosen.mean().item(), "score_std": chosen.std(correction=0).item(),
        "rejected_mean": rejected.mean().item(), "pairs": len(pairs),
    }


def summary(result: dict[str, float]) -> str:
    """A measurement for people."""
    if not result:
        return "nothing held out to measure on"
    return (
        f"accuracy {result['accuracy']:.3f} (95 % from {result['accuracy_low']:.3f} to "
        f"{result['accuracy_high']:.3f}) on {result['pairs']} held-out pairs; chosen score "
        f"{result['score_mean']:.3f} ± {result['score_std']:.3f}, rejected "
        f"{result['rejected_mean']:.3f}"
    )


if __name__ == "__main__":
    console.run_main(main)
