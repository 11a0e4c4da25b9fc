"""Step 3, PPO: the actor writes responses, the reward model scores them, the actor learns.

    python alpaca_rlhf/training_model/my_deepspeed.py \\
        alpaca_rlhf/training_model/step3_rlhf_finetuning/main.py \\
        --actor_model_name_or_path output/actor --critic_model_name_or_path output/critic \\
        --enable_hybrid_engine --output_dir output/final
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import torch

from alpaca_rlhf.evaluation.report import page
from alpaca_rlhf.training_model.step3_rlhf_finetuning import evaluate_policy
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import (
    Iteration,
    Plan,
    PPOTrainer,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
    AdaptiveKLController,
    RewardNormalizer,
    RolloutMaker,
    make_experience,
    mean_over_ranks,
    token_rewards,
)
from alpaca_rlhf.utils import arguments, console, distributed
from alpaca_rlhf.utils.configs import Step3Config
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.batches import collate_prompts, text_batches
from alpaca_rlhf.utils.data.prepare import Prepared
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, load_chat, load_tokenizer, require_same
from alpaca_rlhf.utils.generation.rollout_engine import RolloutEngine
from alpaca_rlhf.utils.generation.vllm_engine import PROBES, VLLMEngine, connect
from alpaca_rlhf.utils.generation.vllm_server import VLLMServer
from alpaca_rlhf.utils.logging.alarms import CLOSE, EXACT, HALF, MAX_KL, Alarms
from alpaca_rlhf.utils.logging.tracker import Tracker
from alpaca_rlhf.utils.memory import planning
from alpaca_rlhf.utils.reward_function import RewardFunction, load_reward_function
from alpaca_rlhf.utils.run import export
from alpaca_rlhf.utils.run.checkpoints import Checkpoints, Found, open_run
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
from alpaca_rlhf.utils.run.run_folder import RunFolder

SHOWN = {
    "reward/score_mean": "reward", "kl/k1": "KL", "throughput/tokens_per_second": "tokens/s",
    "response/length_mean": "length", "response/eos_rate": "eos", "policy/loss": "policy loss",
    "value/loss": "value loss",
}


def main() -> None:
    """Parse, set up, build, then rollout phase and update phase in turn, export."""
    args = arguments.parse(Step3Config)
    config = arguments.to_config(args)
    distributed.initialize(args.run.seed, args.run.collective_timeout)
    for notice in arguments.notices(args):
        console.say(notice)
    folder, found = open_run(args.run, args.checkpoint, step=3, arguments=config)
    planning.check(args)
    servers = connect(args.rollout_engine, args.actor, args.loading, args.sampling, args.ppo,
                      args.rollout.max_prompt_seq_len)
    reward_function = load_reward_function(args.reward.reward_function)
    normalizer = RewardNormalizer(args.reward, args.critic.model_name_or_path)

    chat = load_shared_chat(args)
    data = prepare.prepare_prompts(args.data, seed=args.run.seed, chat=chat,
                                   max_prompt_seq_len=args.rollout.max_prompt_seq_len)
    console.say(data.describe())
    data.check_against(args.actor.model_name_or_path, "the actor")
    data.check_against(args.critic.model_name_or_path, "the reward model")
    if args.run.dry_run:
        return planning.report(args, max(data.lengths()))

    ppo = PPO(args, chat, data, folder, found, normalizer, reward_function, servers)
    progress = ppo.checkpoints.restore(data.fingerprint())
    if progress.before is None:
        progress.before = ppo.evaluate()
        ppo.maker.reseed(args.run.seed)
    tracker = Tracker(
        folder.path, ppo.plan.count, SHOWN, tracking=args.tracking, arguments=config,
        alarms=alarms(args), stop_on_alarm=args.report.stop_on_alarm,
        resume_step=ppo.plan.complete(progress.step),
    )
    with tracker, ppo.checkpoints.deferring_signals():
        ppo.train(tracker)
    after = ppo.evaluate_last()
    with ppo.checkpoints.saving_on_failure():
        ppo.export(after)
    folder.finish(config, evaluate_policy.results(data.report, progress.before, after))
    page.write_beside(folder.final)


def load_shared_chat(args: Step3Config) -> ChatFormat:
    """Load the tokenizer of all four roles.

    Raises:
        UserError: actor and critic have different ones.
    """
    template, critic = args.data.chat_template, args.critic.model_name_or_path
    chat = load_chat(args.actor.model_name_or_path, args.loading, template, fixed=True)
    require_same(chat.tokenizer, load_tokenizer(
        critic, template, args.loading.trust_remote_code, fixed=True
    ))
    return chat


def alarms(args: Step3Config) -> Alarms:
    """Return the alarms that check every iteration's metrics."""
    fp32 = distributed.resolve_dtype(args.loading.dtype) == torch.float32
    exact = EXACT if distributed.world_size() == 1 else CLOSE
    adaptive = args.reward.kl_controller == "adaptive"
    max_kl = max(MAX_KL, 2 * args.reward.kl_target) if adaptive else MAX_KL
    return Alarms(exact if fp32 else HALF, max_kl)


class PPO:
    """The parts of a PPO run, built from its options; `found` is the checkpoint to resume from."""

    def __init__(
        self, args: Step3Config, chat: ChatFormat, data: Prepared, folder: RunFolder,
        found: Found | None, normalizer: RewardNormalizer, reward_function: RewardFunction | None,
        servers: Sequence[VLLMServer] = (),
    ) -> None:
        self._args, self._data, self._folder = args, data, folder
        self._longest = args.rollout.max_prompt_seq_len + args.sampling.max_new_tokens
        self._gold = evaluate_policy.gold_rule(args.data.data_path)
        self.plan = Plan(
            args.schedule, args.rollout, args.sampling, args.ppo, args.report,
            seed=args.run.seed, prompts=len(data.train),
        )
        micro_batch_size = args.ppo.per_device_training_batch_size
        self.engine = engine = RLHFEngine(
            args.actor, args.critic, chat.tokenizer, loading=args.loading, adapters=args.lora,
            engine=args.engine, schedule=args.schedule, micro_batch_size=micro_batch_size,
            total_steps=self.plan.total_steps,
            critic_warmup_steps=args.ppo.critic_warmup_steps,
            needs_reward_model=reward_function is None,
            roles=args.roles,
        )
        console.say("\n".join(engine.summary))
        for model in (engine.actor.module, engine.critic.module.model):
            export.rehearse(model, chat.tokenizer, folder.path)
        slots = args.rollout.per_device_generation_batch_size
        rollout_engine: RolloutEngine = VLLMEngine(
            engine.actor, servers, args.rollout_engine, data.train[:PROBES]["prompt_ids"],
        ) if servers else HybridEngine(engine.actor, args.hybrid, slots)
        self.maker = RolloutMaker(
            engine, rollout_engine, chat, sampling=args.sampling, seed=args.run.seed,
            micro_batch_size=micro_batch_size,
            max_tokens=args.schedule.max_tokens_per_micro_batch, reward_function=reward_function,
        )
        self._guard = NonFiniteGuard(
            folder.path, args.schedule.max_skipped_steps,
            "lower --actor_learning_rate and --critic_learning_rate, or take --dtype bf16",
        )
        self.trainer = PPOTrainer(
            engine, args.ppo, normalizer=normalizer, schedule=args.schedule,
            temperature=args.sampling.temperature, seed=args.run.seed, guard=self._guard,
        )
        self._normalizer, self._controller = normalizer, AdaptiveKLController(args.reward)
        own: dict[str, Any] = {"trainer": self.trainer, "sampler": self.maker}
        shared: dict[str, Any] = {"faults": self._guard, "controller": self._controller,
                                  "normalizer": self._normalizer}
        if self.trainer.ema is not None:
            shared["ema"] = self.trainer.ema
        self.checkpoints = Checkpoints(
            folder, {"actor": engine.actor, "critic": engine.critic}, config=args.checkpoint,
            step=3, arguments=arguments.to_config(args), found=found, own=own, shared=shared,
        )

    def train(self, tracker: Tracker) -> None:
        """Run the PPO iterations: rollout phase and update phase in turn."""
        args, plan, trainer = self._args, self.plan, self.trainer
        tracker.note(plan.describe())
        micro_batches = plan.rollouts // args.ppo.per_device_training_batch_size
        accumulation = args.schedule.gradient_accumulation_steps
        if accumulation > micro_batches:
            tracker.note(
                f"--gradient_accumulation_steps {accumulation}: a PPO iteration has "
                f"{micro_batches} micro-batches, and an optimizer step never spans two iterations"
            )
        complete = plan.complete(self.checkpoints.progress.step)
        texts = text_batches(
            args.ppo, self.maker.chat, length=self._longest, count=micro_batches, skip=complete
        )
        for number, prompts in islice(enumerate(plan, 1), complete, None):
            start = time.perf_counter()
            with self.checkpoints.saving_on_stop():
                iteration = trainer.iteration or self._roll_out(prompts, number - 1)
            metrics = trainer.update(
                iteration, number - 1, next(texts),
                before_step=partial(self._boundary, tracker, number, mid_iteration=True),
            )
            episodes = plan.rollouts * distributed.world_size()
            metrics |= _throughput(metrics, episodes, time.perf_counter() - start)
            self._report(number, iteration, metrics, tracker)
            self._controller.update(metrics["kl/k1"], episodes)
            self._boundary(tracker, number, due=plan.ends_epoch(number))

    def _roll_out(self, prompts: list[int], number: int) -> Iteration:
        """Generate and score responses, and compute the experience of iteration `number` from 0."""
        args, start = self._args, time.perf_counter()
        rows = [self._data.train[i] for i in prompts]
        batch = collate_prompts(rows, self.maker.chat.pad_id).to(distributed.device())
        rollout = self.maker.generate(batch, args.sampling.num_generations)
        generated = time.perf_counter()
        plan = self.trainer.plan(rollout, number)
        scored, forward = self.maker.score(
            rollout, list(chain.from_iterable(plan)),
            keep_for=args.ppo if self.trainer.takes_over(plan) else None)
        self.maker.verify(scored)
        experience, metrics = make_experience(
            scored, self._normalizer, args.reward, args.ppo, self._controller.coef
        )
        metrics["time/rollout"] = generated - start
        metrics["time/weight_sync"] = self.maker.sync_seconds
        metrics["time/scoring"] = time.perf_counter() - generated
        metrics["kl/coef"] = self._controller.coef
        if self._gold is not None:
            copies = [row for row in rows for _ in range(args.sampling.num_generations)]
            pairs = zip(copies, self.maker.texts(scored)[1], strict=True)
            gold = torch.tensor([self._gold(*pair) for pair in pairs], device=distributed.device())
            metrics["reward/gold_mean"] = mean_over_ranks(gold)
        return Iteration(experience, metrics, forward)

    def _boundary(
        self, tracker: Tracker, number: int, due: bool = False, mid_iteration: bool = False
    ) -> None:
        """Save a checkpoint if one is due, or stop if a signal asks for it."""
        self.checkpoints.step_boundary(
            self.trainer.taken, tracker, due=due or self._guard.at_first_skip, tracker_step=number,
            mid_iteration=mid_iteration,
        )

    def _report(
        self, number: int, iteration: Iteration, metrics: dict[str, float], tracker: Tracker
    ) -> None:
        """Log metrics and samples of an iteration."""
        report, reward, experience = self._args.report, self._args.reward, iteration.experience
        interval = report.log_samples_steps
        if interval and ((number - 1) % interval == 0 or number == self.plan.count):
            _, rewards = token_rewards(experience, self._normalizer, reward, metrics["kl/coef"])
            tracker.samples(
                evaluate_policy.token_records(experience, rewards, self.maker.chat), number
            )
        if report.print_answers and (number - 1) % report.print_answers_interval == 0:
            tracker.note(evaluate_policy.table(self.maker, experience))
        tracker.log(metrics, number)

    def evaluate(self) -> list[evaluate_policy.Record]:
        """Evaluate the policy on held-out prompts, with a seed that no rollout has."""
        held_out = self._data.held_out
        rows = held_out.select(range(min(self._args.report.eval_prompts, len(held_out))))
        return evaluate_policy.evaluate(self.maker, rows, self._args.run.seed + 1, self._gold)

    def evaluate_last(self) -> list[evaluate_policy.Record]:
        """Evaluate the policy, after which nothing is generated any more."""
        with self.checkpoints.saving_on_stop():
            after = self.evaluate()
        self.maker.rollout_engine.shutdown()
        return after

    def export(self, after: list[evaluate_policy.Record]) -> None:
        """Export actor, critic and, if there is one, the actor's average."""
        if self._folder.path is None:
            return
        tokenizer, folder = self.maker.chat.tokenizer, self._folder.path
        actor, critic = self.engine.actor.module, self.engine.critic.module.model
        facts = {"held-out prompts": evaluate_policy.describe(evaluate_policy.summarize(after))}
        export.export(actor, tokenizer, folder / "actor", "Policy trained with PPO", facts)
        export.export(critic, tokenizer, folder / "critic", "Critic (value model) of PPO", {})
        if self.trainer.ema is not None:
            title = "Policy trained with PPO, averaged weights"
            with self.trainer.ema.swapped_in():
                export.export(actor, tokenizer, folder / "actor_ema", title, facts)
        for role in ("actor", "critic"):
            self._data.save_record(folder / role)


def _throughput(metrics: dict[str, float], episodes: int, seconds: float) -> dict[str, float]:
    """Return throughput of an iteration with so many episodes on all ranks, and peak memory."""
    tokens = metrics["response/length_mean"] * episodes
    return {
        "throughput/episodes_per_second": episodes / seconds,
        "throughput/tokens_per_second": tokens / seconds,
        "throughput/tokens": round(tokens),
        "memory/peak_gb": distributed.memory_gb(),
    }


if __name__ == "__main__":
    console.run_main(main)
