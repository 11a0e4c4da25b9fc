"""Step 3, PPO: the actor writes replies, the reward model scores them, the actor learns.

    python alpaca_rlhf/training_model/my_deepspeed.py \\
        alpaca_rlhf/training_model/step3_rlhf_finetuning/main.py \\
        --actor_model_name_or_path output/actor --critic_model_name_or_path output/critic \\
        --enable_hybrid_engine --output_dir output/final
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.evaluation.report import page
from alpaca_rlhf.training_model.step3_rlhf_finetuning import deepspeed_backend, evaluate_policy
from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import (
    Experience,
    ScoredRollout,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import (
    AdaptiveKLController,
    PPOSettings,
    PPOTrainer,
    Round,
    steps_per_round,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
    RewardSettings,
    RolloutMaker,
    ScoreNormalizer,
    load_reward_function,
    make_experience,
    mean_over_ranks,
    token_rewards,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.samples import token_records
from alpaca_rlhf.utils import arguments, console, distributed, preflight
from alpaca_rlhf.utils.arguments import Step3Arguments
from alpaca_rlhf.utils.configs import DataConfig
from alpaca_rlhf.utils.console import table
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.batches import (
    TokenBatch,
    collate_prompts,
    collate_tokens,
    shuffled,
    text_rows,
)
from alpaca_rlhf.utils.data.prepare import Prepared
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, describe, load_tokenizer, require_same
from alpaca_rlhf.utils.engine import ModelSettings, Schedule
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.generation.decoder import SamplingConfig
from alpaca_rlhf.utils.logging.alarms import CLOSE, EXACT, Alarms, Limits
from alpaca_rlhf.utils.logging.tracker import Outside, Tracker
from alpaca_rlhf.utils.memory_plan import Planned
from alpaca_rlhf.utils.model.causal_lm import LoadOptions
from alpaca_rlhf.utils.model.ema import Ema
from alpaca_rlhf.utils.model.reward_model import is_reward_model, load_statistics
from alpaca_rlhf.utils.run import export as checkpoint
from alpaca_rlhf.utils.run.checkpoints import Checkpoints, Stateful, open_run
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
from alpaca_rlhf.utils.run.run_folder import RunFolder

SHOWN = {
    "reward/score_mean": "reward", "kl/k1": "KL", "throughput/tokens_per_second": "tokens/s",
    "response/length_mean": "length", "response/eos_rate": "eos", "policy/loss": "policy loss",
    "value/loss": "value loss",
}
SAMPLES = 4  # rollouts of a table


def main() -> None:
    """Parse, set up, build, then rollout phase and update phase in turn, export."""
    args = arguments.parse_step3()
    distributed.initialize(args.run.seed, args.run.collective_timeout)
    for notice in arguments.notices(args):
        console.say(notice)
    reward_function = (
        load_reward_function(args.reward.reward_function) if args.reward.reward_function else None
    )
    normalizer = score_normalizer(args)
    run, saving = arguments.run_config(args)
    config = arguments.to_config(args)
    folder, found = open_run(run, saving, step=args.step, arguments=config)
    preflight.check(
        planned(args), args.loading.tokenizer_name_or_path, arguments.trackers(args)
    )
    form = ChatFormat(load_tokenizers(args))
    console.say(describe(form.tokenizer))
    data = load_data(args, form)
    console.say(data.describe())
    data.check_against(args.actor.actor_model_name_or_path, "the actor")
    data.check_against(args.critic.critic_model_name_or_path, "the reward model")
    rounds = Rounds(args, len(data.train))
    engine = build(args, form, rounds.total_steps, needs_reward_model=reward_function is None)
    maker = RolloutMaker(
        engine, hybrid_engine(args, engine), form, sampling(args), args.run.seed,
        scoring_tokens(args), reward_function,
    )
    ema = Ema(engine.actor.module, args.actor.ema_decay) if args.actor.enable_ema else None
    guard = NonFiniteGuard(
        folder.path, args.optimization.max_skipped_steps,
        "lower --actor_learning_rate and --critic_learning_rate, or take --dtype bf16",
    )
    trainer = PPOTrainer(engine, ppo_settings(args), guard, ema)
    controller = kl_controller(args)
    own, shared = states(trainer, maker, ema, guard, controller, normalizer)
    checkpoints = Checkpoints(
        folder, {"actor": engine.actor, "critic": engine.critic}, config=saving, step=args.step,
        arguments=config, found=found, own=own, shared=shared,
    )
    progress = checkpoints.restore(data.fingerprint())
    if progress.before is None:
        progress.before = measure(args, maker, data)
        maker.reseed(args.run.seed)
    outside = Outside(arguments.trackers(args), args.run.logging_dir, config)
    tracker = Tracker(
        folder.path, rounds.count, SHOWN, outside, alarms(args), args.report.stop_on_alarm,
        resume_step=rounds.done(progress.step),
    )
    with tracker, checkpoints.deferring_signals():
        train(args, rounds, data, maker, trainer, normalizer, controller, tracker, checkpoints,
              guard)
    after = measure(args, maker, data)

    export(engine, form, folder, ema, after)
    for role in ("actor", "critic"):
        data.save_record(folder.path and folder.path / role)
    folder.finish(config, results(data, progress.before, after))
    page.write_beside(folder.final)


def states(
    trainer: PPOTrainer, maker: RolloutMaker, ema: Ema | None, guard: NonFiniteGuard,
    controller: AdaptiveKLController, normalizer: ScoreNormalizer,
) -> tuple[dict[str, Stateful], dict[str, Stateful]]:
    """What a checkpoint holds besides the engines: of each rank, and alike on all."""
    own: dict[str, Stateful] = {"trainer": trainer, "sampler": maker}
    shared: dict[str, Stateful] = {
        "faults": guard, "controller": controller, "normalizer": normalizer,
    }
    if ema is not None:
        (own if ema.sharded else shared)["ema"] = ema
    return own, shared


class Rounds:
    """How many rounds of rollouts and updates there are, and which prompts each one takes.

    Args:
        args: of the run.
        prompts: how many there are to train on.
    """

    def __init__(self, args: Step3Arguments, prompts: int) -> None:
        rollout = args.rollout
        self.rollouts = rollout.per_device_generation_batch_size * rollout.generation_batches
        self._size = self.rollouts // rollout.num_generations * distributed.world_size()
        self._prompts = prompts
        self._seed = args.run.seed
        self._per_epoch = max(1, prompts // self._size)
        steps = steps_per_round(self.rollouts, ppo_settings(args))
        self.count = self._per_epoch * args.optimization.num_train_epochs
        if args.optimization.max_steps:
            self.count = min(self.count, math.ceil(args.optimization.max_steps / steps))
        if args.report.enable_test_mode:
            self.count = min(self.count, args.report.test_stop_step + 1)
        self.total_steps = self.count * steps
        self._steps = steps

    def done(self, steps: int) -> int:
        """Rounds that are complete after so many optimizer steps."""
        return steps // self._steps

    def ends_epoch(self, number: int) -> bool:
        """Whether a round, counted from 1, is the last of an epoch, but not of all."""
        return number % self._per_epoch == 0 and number < self.count

    def describe(self) -> str:
        """One line for the console."""
        return (
            f"{self.count} rounds of {self.rollouts} rollouts on each of "
            f"{distributed.world_size()} ranks, {self.total_steps} optimizer steps"
        )

    def __iter__(self) -> Iterator[list[int]]:
        """For each round, this rank's prompts, by index."""
        order: list[int] = []
        epoch = 0
        for number in range(self.count):
            if number == epoch * self._per_epoch:
                # An epoch of its own order; too few prompts for one round are taken repeatedly.
                once = shuffled(self._prompts, self._seed, epoch)
                order = once * math.ceil(self._size / len(once))
                epoch += 1
            start = number % self._per_epoch * self._size
            yield order[start + distributed.rank() : start + self._size : distributed.world_size()]


def train(
    args: Step3Arguments, rounds: Rounds, data: Prepared, maker: RolloutMaker,
    trainer: PPOTrainer, normalizer: ScoreNormalizer, controller: AdaptiveKLController,
    tracker: Tracker, checkpoints: Checkpoints, guard: NonFiniteGuard,
) -> None:
    """Rollout phase and update phase in turn."""
    tracker.note(rounds.describe())
    per_round = rounds.rollouts // args.ppo.per_device_training_batch_size
    if args.optimization.gradient_accumulation_steps > per_round:
        tracker.note(
            f"--gradient_accumulation_steps {args.optimization.gradient_accumulation_steps}: a "
            f"round has {per_round} micro-batches, and an optimizer step never spans two rounds"
        )
    done = rounds.done(checkpoints.progress.step)
    text = language_model_text(args, maker.form, per_round, done)
    for number, indices in islice(enumerate(rounds, 1), done, None):
        start = time.perf_counter()
        rows = [data.train[i] for i in indices]
        under_way = trainer.round or roll_out(args, rows, maker, normalizer, controller)

        def between(at: int = number) -> None:
            checkpoints.step_boundary(
                trainer.taken, tracker, due=guard.at_first_skip, tracker_step=at,
                mid_iteration=True,
            )

        metrics = trainer.learn(under_way, number - 1, next(text), between)
        episodes = rounds.rollouts * distributed.world_size()
        metrics |= throughput(metrics, episodes, time.perf_counter() - start)
        report(args, rounds, number, metrics, under_way.experience, maker, normalizer, tracker)
        controller.update(metrics["kl/k1"], episodes)
        checkpoints.step_boundary(
            trainer.taken, tracker, tracker_step=number,
            due=guard.at_first_skip or rounds.ends_epoch(number),
        )


def roll_out(
    args: Step3Arguments, rows: list[dict[str, Any]], maker: RolloutMaker,
    normalizer: ScoreNormalizer, controller: AdaptiveKLController,
) -> Round:
    """The rollout phase: replies to prompts, scored and made into experience."""
    start = time.perf_counter()
    prompts = collate_prompts(rows, maker.form.pad_id).to(distributed.device())
    rollout = maker.generate(prompts, args.rollout.num_generations)
    generated = time.perf_counter()
    scored = maker.score(rollout)
    experience, metrics = make_experience(
        scored, normalizer, reward_settings(args), controller.coef
    )
    metrics["time/rollout"] = generated - start
    metrics["time/scoring"] = time.perf_counter() - generated
    metrics["kl/coef"] = controller.coef
    gold = gold_rule(args)
    if gold is not None:
        replies = maker.texts(scored)[1]
        asked = [row for row in rows for _ in range(args.rollout.num_generations)]
        rated = [gold(row, reply) for row, reply in zip(asked, replies, strict=True)]
        metrics["reward/gold_mean"] = mean_over_ranks(
            torch.tensor(rated, device=distributed.device())
        )
    return Round(experience, metrics)


def throughput(metrics: dict[str, float], episodes: int, seconds: float) -> dict[str, float]:
    """Of a round with so many episodes on all ranks."""
    tokens = metrics["response/length_mean"] * episodes
    return {
        "throughput/episodes_per_second": episodes / seconds,
        "throughput/tokens_per_second": tokens / seconds,
        "throughput/tokens": round(tokens),
        "memory/peak_gb": distributed.memory_gb(),
    }


def report(
    args: Step3Arguments, rounds: Rounds, number: int, metrics: dict[str, float],
    experience: Experience, maker: RolloutMaker, normalizer: ScoreNormalizer, tracker: Tracker,
) -> None:
    """What is kept and shown of a round."""
    if is_due(number, rounds.count, args.report.log_samples_steps):
        _, rewards = token_rewards(
            experience, normalizer, reward_settings(args), metrics["kl/coef"]
        )
        tracker.samples(token_records(experience, rewards, maker.form, SAMPLES), number)
    if args.report.print_answers and (number - 1) % args.report.print_answers_interval == 0:
        tracker.note(answers(maker, experience))
    tracker.log(metrics, number)


def kl_controller(args: Step3Arguments) -> AdaptiveKLController:
    """Fixed or adaptive."""
    reward = args.reward
    return AdaptiveKLController(
        reward.kl_coef, reward.kl_target if reward.kl_controller == "adaptive" else None,
        reward.kl_horizon,
    )


def reward_settings(args: Step3Arguments) -> RewardSettings:
    """How a score becomes token rewards and advantages."""
    return RewardSettings(
        args.reward.clip_reward_value, args.reward.missing_eos_penalty, args.ppo.gamma,
        args.ppo.lam, args.ppo.whiten_advantages,
    )


def is_due(number: int, last: int, interval: int) -> bool:
    """Whether samples are kept of a round: the first, one every `interval`, and the last."""
    return interval > 0 and ((number - 1) % interval == 0 or number == last)


def answers(maker: RolloutMaker, scored: ScoredRollout) -> str:
    """Some rollouts as a table."""
    prompts, replies = maker.texts(scored.rows(range(min(SAMPLES, len(scored)))))
    rows = zip(prompts, replies, scored.score.tolist(), strict=False)
    return table(["prompt", "reply", "score"], [[p, r, f"{s:.2f}"] for p, r, s in rows])


def alarms(args: Step3Arguments) -> Alarms:
    """What the rounds are watched for."""
    fp32 = distributed.resolve_dtype(args.loading.dtype) == torch.float32
    exact = fp32 and distributed.world_size() == 1
    limits = Limits(first_log_ratio=EXACT if exact else CLOSE)
    if args.reward.kl_controller == "adaptive":
        limits = replace(limits, kl=max(limits.kl, 2 * args.reward.kl_target))
    return Alarms(limits)


def load_tokenizers(args: Step3Arguments) -> Any:
    """The tokenizer of all roles.

    Raises:
        UserError: actor and critic have different ones, or the critic is no reward model.
    """
    load = partial(
        load_tokenizer, template=args.data.chat_template,
        trust_remote_code=args.loading.trust_remote_code, fixed=True,
    )
    actor, critic = args.actor.actor_model_name_or_path, args.critic.critic_model_name_or_path
    tokenizer = load(args.loading.tokenizer_name_or_path or actor)
    require_same(tokenizer, load(critic))
    if not is_reward_model(critic, LoadOptions()):
        raise UserError(
            f"--critic_model_name_or_path {critic}: is no reward model (a sequence classifier "
            "with one label); give the folder that step 2 wrote"
        )
    return tokenizer


def score_normalizer(args: Step3Arguments) -> ScoreNormalizer:
    """By the statistics saved with the reward model, or those of the first rollouts, or not."""
    mode = args.reward.reward_normalization
    if args.reward.reward_function and mode == "checkpoint":
        mode = "reference"
        console.say("--reward_function: its scores are normalised by the first rollouts'")
    if mode == "checkpoint":
        return ScoreNormalizer(mode, *load_statistics(args.critic.critic_model_name_or_path))
    return ScoreNormalizer(mode)


def load_data(args: Step3Arguments, form: ChatFormat) -> Prepared:
    """This step's prompts."""
    return prepare.prepare_prompts(
        DataConfig(**asdict(args.data)), seed=args.run.seed,
        max_prompt_seq_len=args.rollout.max_prompt_seq_len, chat=form,
    )


def build(
    args: Step3Arguments, form: ChatFormat, total_steps: int, needs_reward_model: bool
) -> RLHFEngine:
    """The four roles."""
    schedule = Schedule(
        args.ppo.per_device_training_batch_size, args.optimization.gradient_accumulation_steps,
        args.optimization.lr_scheduler_type, args.optimization.num_warmup_steps, total_steps,
    )
    engine = RLHFEngine(
        args.actor.actor_model_name_or_path, actor_settings(args),
        args.critic.critic_model_name_or_path, critic_settings(args),
        schedule, form.tokenizer, needs_reward_model,
    )
    for line in engine.summary:
        console.say(line)
    return engine


# Adam's default of 1e-8 lets the first, tiny gradients of a critic take full steps ("N
# implementation details of RLHF with PPO", 2023).
ADAM_EPS = 1e-5


def actor_settings(args: Step3Arguments) -> ModelSettings:
    """How the actor is loaded and trained."""
    actor, lora = args.actor, args.lora
    return ModelSettings(
        load_options(args, actor.actor_dropout, actor.actor_gradient_checkpointing),
        actor.actor_zero_stage, args.optimization.offload, args.optimization.deepspeed_config,
        actor.actor_learning_rate, actor.actor_lora_learning_rate, actor.actor_weight_decay,
        actor.actor_lora_dim, lora.lora_alpha, lora.lora_dropout, actor.actor_lora_module_name,
        "--actor_lora_module_name", lora.only_optimize_lora, ADAM_EPS, deepspeeds_own(args),
    )


def critic_settings(args: Step3Arguments) -> ModelSettings:
    """How the critic is loaded and trained."""
    critic, lora = args.critic, args.lora
    return ModelSettings(
        load_options(args, critic.critic_dropout, critic.critic_gradient_checkpointing),
        critic.critic_zero_stage, args.optimization.offload, args.optimization.deepspeed_config,
        critic.critic_learning_rate, critic.critic_lora_learning_rate, critic.critic_weight_decay,
        critic.critic_lora_dim, lora.lora_alpha, lora.lora_dropout,
        critic.critic_lora_module_name, "--critic_lora_module_name", lora.only_optimize_lora,
        ADAM_EPS,
    )


def planned(args: Step3Arguments) -> list[Planned]:
    """Actor and critic, with the reference and, unless a function rates, the reward model."""
    actor, critic = args.actor.actor_model_name_or_path, args.critic.critic_model_name_or_path
    rated = args.reward.reward_function is None
    return [
        Planned(actor, actor_settings(args), "actor_", has_twin=True),
        Planned(critic, critic_settings(args), "critic_", scores=True, has_twin=rated),
    ]


def load_options(args: Step3Arguments, dropout: float, checkpointing: bool) -> LoadOptions:
    """Precision and the like, of either role."""
    return LoadOptions(
        distributed.resolve_dtype(args.loading.dtype), args.loading.attn_implementation,
        dropout, checkpointing, args.loading.trust_remote_code,
    )


def sampling(args: Step3Arguments) -> SamplingConfig:
    """How replies are drawn."""
    rollout = args.rollout
    return SamplingConfig(
        rollout.max_answer_seq_len, rollout.temperature, rollout.top_p, rollout.top_k,
        rollout.repetition_penalty,
    )


def hybrid_engine(args: Step3Arguments, engine: RLHFEngine) -> HybridEngine:
    """What takes the actor to generation and back."""
    rollout = args.rollout
    return HybridEngine(
        engine.actor, rollout.enable_hybrid_engine, rollout.per_device_generation_batch_size,
        rollout.unpin_actor_parameters, rollout.release_inference_cache,
        theirs=deepspeed_backend.drives(engine.actor), graphs=graphs(args),
    )


def graphs(args: Step3Arguments) -> bool:
    """Whether CUDA graphs are asked for, and can be had."""
    asked = args.rollout.enable_hybrid_engine and args.rollout.enable_cuda_graph
    if asked and distributed.on_cpu():
        console.say("--enable_cuda_graph: needs CUDA; the compiled step of a CPU is used")
    return asked and not distributed.on_cpu()


def deepspeeds_own(args: Step3Arguments) -> dict[str, Any] | None:
    """The configuration of DeepSpeed's hybrid engine, where it is asked for and can be had."""
    rollout = args.rollout
    if not rollout.enable_hybrid_engine or rollout.hybrid_engine_backend == "native":
        return None
    if distributed.on_cpu():
        console.say(
            "--hybrid_engine_backend deepspeed: needs CUDA; the native backend is used"
        )
        return None
    return deepspeed_backend.config(
        rollout.max_prompt_seq_len + rollout.max_answer_seq_len,
        not rollout.unpin_actor_parameters, rollout.release_inference_cache,
    )


def scoring_tokens(args: Step3Arguments) -> int:
    """What is scored at once: as much as is trained on at once."""
    rollout = args.rollout
    longest = rollout.max_prompt_seq_len + rollout.max_answer_seq_len
    return args.ppo.per_device_training_batch_size * longest


def ppo_settings(args: Step3Arguments) -> PPOSettings:
    """Of the update."""
    return PPOSettings(
        epochs=args.ppo.ppo_epochs,
        micro_batch_size=args.ppo.per_device_training_batch_size,
        accumulation_steps=args.optimization.gradient_accumulation_steps,
        temperature=args.rollout.temperature,
        clip=args.ppo.cliprange,
        clip_value=args.ppo.cliprange_value,
        entropy_coef=args.ppo.entropy_coef,
        unsup_coef=args.ppo.unsup_coef,
        critic_warmup_steps=args.critic.critic_warmup_steps,
        seed=args.run.seed,
    )


def language_model_text(
    args: Step3Arguments, form: ChatFormat, per_round: int, done: int
) -> Iterator[list[TokenBatch] | None]:
    """For each round after the first `done`, a batch of text for each of its micro-batches.

    None when no text is given.
    """
    name = args.ppo.unsupervised_dataset_name
    if name is None:
        while True:
            yield None
    length = args.rollout.max_prompt_seq_len + args.rollout.max_answer_seq_len
    blocks = text_rows(
        name, args.ppo.unsupervised_dataset_config_name, form, length
    )
    size, world = args.ppo.per_device_training_batch_size, distributed.world_size()
    position = distributed.rank() + done * per_round * size * world
    while True:
        batches = []
        for _ in range(per_round):
            rows = [blocks[(position + i * world) % len(blocks)] for i in range(size)]
            position += size * world
            batches.append(collate_tokens(rows, form.pad_id).to(distributed.device()))
        yield batches


def gold_rule(args: Step3Arguments) -> evaluate_policy.Gold | None:
    """The embedded data's own judgement of a reply: watched, never trained on."""

    def gold(row: dict[str, Any], reply: str) -> float:
        return assistant_world.gold_score(json.loads(row["messages"]), reply)

    return None if args.data.data_path else gold


def measure(
    args: Step3Arguments, maker: RolloutMaker, data: Prepared
) -> list[evaluate_policy.Record]:
    """What the policy writes on held-out prompts."""
    rows = data.held_out.select(range(min(args.report.eval_prompts, len(data.held_out))))
    records = evaluate_policy.evaluate(
        maker, rows, args.run.seed + 1, gold_rule(args)
    )
    if args.report.eval_prompts:
        summary = evaluate_policy.summarize(records)
        console.say(f"policy: {evaluate_policy.describe(summary)}")
    return records


def export(
    engine: RLHFEngine, form: ChatFormat, folder: RunFolder, ema: Ema | None,
    records: list[evaluate_policy.Record],
) -> None:
    """Actor, critic and, if there is one, the actor's average."""
    if folder.path is None:
        return
    facts = {"held-out prompts": evaluate_policy.describe(evaluate_policy.summarize(records))}
    actor, critic = engine.actor.module, engine.critic.module.model
    card = checkpoint.model_card("Policy trained with PPO", facts)
    checkpoint.export(actor, form.tokenizer, folder.path / "actor", card)
    card = checkpoint.model_card("Critic (value model) of PPO", {})
    checkpoint.export(critic, form.tokenizer, folder.path / "critic", card)
    if ema is not None:
        with ema.swapped_in():
            card = checkpoint.model_card("Policy trained with PPO, averaged weights", facts)
            checkpoint.export(actor, form.tokenizer, folder.path / "actor_ema", card)


def results(
    data: Prepared, before: list[evaluate_policy.Record], after: list[evaluate_policy.Record]
) -> dict[str, Any]:
    """What the run is remembered by."""
    return {
        "step": 3,
        "before": evaluate_policy.summarize(before),
        "after": evaluate_policy.summarize(after),
        "data": data.report,
        "dialogues": [
            {"prompt": old["prompt"], "before": old, "after": new}
            for old, new in zip(before, after, strict=True)
        ],
    }


if __name__ == "__main__":
    console.run_main(main)
