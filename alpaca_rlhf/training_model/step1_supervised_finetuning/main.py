"""Step 1, supervised fine-tuning: a causal LM learns to write the chosen responses.

    python alpaca_rlhf/training_model/my_deepspeed.py \\
        alpaca_rlhf/training_model/step1_supervised_finetuning/main.py --output_dir output/actor
"""

import math
from dataclasses import replace
from functools import partial

import torch

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.evaluation.report import page
from alpaca_rlhf.utils import arguments, console, distributed, losses, supervised
from alpaca_rlhf.utils.configs import Step1Config
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.batches import TokenBatch, collate_tokens
from alpaca_rlhf.utils.data.tokenizer import load_chat
from alpaca_rlhf.utils.engine import Engine, build_trained
from alpaca_rlhf.utils.memory import planning
from alpaca_rlhf.utils.model.causal_lm import at_labels, load_causal_lm
from alpaca_rlhf.utils.run import checkpoints, export
from alpaca_rlhf.utils.training_loop import Stats


def main() -> None:
    """Parse, set up, build, train, export."""
    args = arguments.parse(Step1Config)
    config = arguments.to_config(args)
    distributed.initialize(args.run.seed, args.run.collective_timeout)
    for notice in arguments.notices(args):
        console.say(notice)
    folder, found = checkpoints.open_run(args.run, args.checkpoint, step=1, arguments=config)
    role = tiny_llama.or_embedded(args.model, prepare.cache_home(args.data.data_output_path))
    args = replace(args, model=role)
    planning.check(args)

    chat = load_chat(role.model_name_or_path, args.loading, args.data.chat_template)
    data = prepare.prepare_sft(
        args.data, args.sft, seed=args.run.seed, max_seq_len=args.batches.max_seq_len, chat=chat
    )
    console.say(data.describe())
    data.check_against(role.model_name_or_path, "the model to start from")
    if args.run.dry_run:
        return planning.report(args, max(data.lengths()))
    plan = supervised.Plan(args.schedule, args.batches, args.run.seed, data.lengths())
    engine, summary = build_trained(
        partial(load_causal_lm, tokenizer=chat.tokenizer), role, loading=args.loading,
        adapters=args.lora, engine=args.engine, schedule=args.schedule,
        micro_batch_size=args.batches.per_device_train_batch_size, total_steps=plan.total_steps,
    )
    console.say(f"model: {summary}")

    export.rehearse(engine.module, chat.tokenizer, folder.path)
    before, after, _, checkpoint = supervised.train(
        engine, data, objective(chat.pad_id), plan, folder=folder, found=found,
        checkpoint=args.checkpoint, tracking=args.tracking, step=1, arguments=config,
    )
    facts = {"base model": role.model_name_or_path, "held-out perplexity": describe(after)}
    title = "Supervised fine-tuned model"
    with checkpoint.saving_on_failure():
        export.export(engine.module, chat.tokenizer, folder.path, title, facts)
    data.save_record(folder.path)
    folder.finish(config, {"step": 1, "before": before, "after": after, "data": data.report})
    page.write_beside(folder.final)


def objective(pad_id: int) -> supervised.Objective:
    """Return the objective of supervised fine-tuning, for batches padded with `pad_id`."""
    return supervised.Objective(
        collate=partial(collate_tokens, pad_id=pad_id), loss=loss, measure=measure,
        summarize=perplexity, describe=describe,
        shown={"loss": "loss", "lr": "lr", "weight_per_second": "tokens/s"},
    )


def loss(engine: Engine, batch: TokenBatch) -> tuple[torch.Tensor, Stats]:
    """Return the sum of the negative log-likelihood of the trained tokens, in nats."""
    return at_labels(engine, batch.input_ids, batch.labels, losses.token_loss), {}


def measure(engine: Engine, batch: TokenBatch) -> list[list[float]]:
    """Return loss and number of trained tokens of a batch, shared out to its rows."""
    total, rows = loss(engine, batch)[0].item(), len(batch.input_ids)
    return [[total / rows, batch.weight() / rows]] * rows


def perplexity(numbers: list[list[float]]) -> dict[str, float]:
    """Return exp of the mean loss per token; nothing when there are no held-out rows."""
    if not numbers:
        return {}
    total, tokens = (sum(column) for column in zip(*numbers, strict=True))
    return {"perplexity": math.exp(total / tokens), "loss": total / tokens, "tokens": tokens}


def describe(result: dict[str, float]) -> str:
    """Return the result of an evaluation as one line for the console."""
    if not result:
        return "no held-out data to evaluate on"
    return f"perplexity {result['perplexity']:.3f} on {result['tokens']:.0f} held-out tokens"


if __name__ == "__main__":
    console.run_main(main)
