"""Step 1, supervised fine-tuning: a causal LM learns to write the chosen replies.

    python alpaca_rlhf/training_model/my_deepspeed.py \\
        alpaca_rlhf/training_model/step1_supervised_finetuning/main.py --output_dir output/actor
"""

import math
from dataclasses import asdict
from functools import partial

import torch

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.evaluation.report import page
from alpaca_rlhf.utils import arguments, console, distributed, losses, preflight, training_loop
from alpaca_rlhf.utils.arguments import Step1Arguments
from alpaca_rlhf.utils.configs import DataConfig, SFTConfig
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.batches import TokenBatch, collate_tokens
from alpaca_rlhf.utils.data.prepare import Prepared
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, describe, load_tokenizer
from alpaca_rlhf.utils.engine import Engine, ModelSettings, Schedule, build_trained
from alpaca_rlhf.utils.logging.tracker import Outside, Tracker
from alpaca_rlhf.utils.memory_plan import Planned
from alpaca_rlhf.utils.model.causal_lm import LoadOptions, forward_logits, load_causal_lm
from alpaca_rlhf.utils.run import export
from alpaca_rlhf.utils.run.checkpoints import Checkpoints, open_run
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard

SHOWN = {"loss": "loss", "lr": "lr", "weight_per_second": "tokens/s"}


def main() -> None:
    """Parse, set up, build, train, export."""
    args = arguments.parse_step1()
    distributed.initialize(args.run.seed, args.run.collective_timeout)
    for notice in arguments.notices(args):
        console.say(notice)
    run, saving = arguments.run_config(args)
    config = arguments.to_config(args)
    folder, found = open_run(run, saving, step=args.step, arguments=config)
    home = prepare.cache_home(args.data.data_output_path)
    path = args.model.model_name_or_path or tiny_llama.shared(home)
    preflight.check(
        [Planned(path, model_settings(args))], args.loading.tokenizer_name_or_path,
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

    evaluate = partial(perplexity, engine, data, form.pad_id, args)
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
            engine, data.train, partial(collate_tokens, pad_id=form.pad_id),
            partial(objective, engine), plan, tracker, evaluate, checkpoints, guard,
            data.lengths(),
        )
    after = evaluate()
    console.say(f"after: {summary(after)}")

    facts = {"base model": path, "held-out perplexity": summary(after)}
    card = export.model_card("Supervised fine-tuned model", facts)
    export.export(engine.module, form.tokenizer, folder.path, card)
    data.save_record(folder.path)
    results = {"step": 1, "before": before, "after": after, "data": data.report}
    folder.finish(config, results)
    page.write_beside(folder.final)


def plan_of(args: Step1Arguments) -> training_loop.Plan:
    """How long to train, on batches of what size."""
    return training_loop.Plan(
        args.optimization.num_train_epochs, args.optimization.max_steps,
        args.batches.per_device_train_batch_size, args.optimization.gradient_accumulation_steps,
        args.run.seed, args.batches.eval_interval,
    )


def build(
    args: Step1Arguments, path: str, form: ChatFormat, plan: training_loop.Plan, total_steps: int
) -> Engine:
    """The model, in DeepSpeed's hands."""
    schedule = Schedule(
        plan.batch_size, plan.accumulation_steps, args.optimization.lr_scheduler_type,
        args.optimization.num_warmup_steps, total_steps,
    )
    engine, trains = build_trained(
        model_settings(args), schedule, partial(load_causal_lm, path, form.tokenizer)
    )
    console.say(f"model: {trains}")
    return engine


def load_data(args: Step1Arguments, form: ChatFormat) -> Prepared:
    """This step's share of the data, and the data that is for this step only."""
    return prepare.prepare_sft(
        DataConfig(**asdict(args.data)), SFTConfig(**asdict(args.sft)), seed=args.run.seed,
        max_seq_len=args.batches.max_seq_len, chat=form,
    )


def model_settings(args: Step1Arguments) -> ModelSettings:
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
    engine: Engine, batch: TokenBatch
) -> tuple[torch.Tensor, training_loop.Stats]:
    """Sum of the negative log-likelihood of the trained tokens."""
    logits = forward_logits(engine, batch.input_ids, batch.attention_mask)
    return losses.token_loss(logits, batch.labels), {}


def perplexity(
    engine: Engine, data: Prepared, pad_id: int, args: Step1Arguments
) -> dict[str, float]:
    """exp of the mean loss a token on held-out replies; empty when nothing is held out."""

    def measure(batch: TokenBatch) -> list[list[float]]:
        loss, _ = objective(engine, batch)
        rows = len(batch.input_ids)
        return [[loss.item() / rows, batch.weight() / rows]] * rows

    numbers = training_loop.evaluate_sums(
        engine, data.held_out, partial(collate_tokens, pad_id=pad_id), measure,
        args.batches.per_device_eval_batch_size, args.batches.eval_iters,
    )
    if not numbers:
        return {}
    loss, tokens = (sum(column) for column in zip(*numbers, strict=True))
    return {"perplexity": math.exp(loss / tokens), "loss": loss / tokens, "tokens": tokens}


def summary(result: dict[str, float]) -> str:
    """A measurement for people."""
    if not result:
        return "nothing held out to measure on"
    return f"perplexity {result['perplexity']:.3f} on {result['tokens']:.0f} held-out tokens"


if __name__ == "__main__":
    console.run_main(main)
