"""The update phase: epochs of optimizer steps of critic and actor over the experience."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience, Forward
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import RewardNormalizer
from alpaca_rlhf.utils import distributed, losses, rl_math
from alpaca_rlhf.utils.configs import (
    PPOConfig,
    ReportConfig,
    RolloutConfig,
    SamplingConfig,
    ScheduleConfig,
)
from alpaca_rlhf.utils.data.batches import Rollout, TokenBatch, micro_batches, shuffled
from alpaca_rlhf.utils.model.causal_lm import at_labels
from alpaca_rlhf.utils.model.weights.ema import Ema
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
from alpaca_rlhf.utils.training_loop import (
    Stats,
    accumulate,
    clear_gradients,
    global_weight,
    gradient_norm,
    optimizer_step,
    step_together,
)


class Plan:
    """PPO iterations of a run on so many prompts, and the prompts of each."""

    def __init__(
        self, schedule: ScheduleConfig, rollout: RolloutConfig, sampling: SamplingConfig,
        ppo: PPOConfig, report: ReportConfig, *, seed: int, prompts: int,
    ) -> None:
        self.rollouts = rollout.per_device_generation_batch_size * rollout.generation_batches
        self._size = self.rollouts // sampling.num_generations * distributed.world_size()
        self._prompts, self._seed = prompts, seed
        self._per_epoch = max(1, prompts // self._size)
        micro_batches = math.ceil(self.rollouts / ppo.per_device_training_batch_size)
        steps = math.ceil(micro_batches / schedule.gradient_accumulation_steps)
        self._steps = ppo.ppo_epochs * steps
        self.count = self._per_epoch * schedule.num_train_epochs
        if schedule.max_steps:
            self.count = min(self.count, math.ceil(schedule.max_steps / self._steps))
        if report.enable_test_mode:
            self.count = min(self.count, report.test_stop_step + 1)
        self.total_steps = self.count * self._steps

    def complete(self, steps: int) -> int:
        """Return the number of iterations that are complete after so many optimizer steps."""
        return steps // self._steps

    def ends_epoch(self, number: int) -> bool:
        """Return whether an iteration, counted from 1, ends an epoch other than the last."""
        return number % self._per_epoch == 0 and number < self.count

    def describe(self) -> str:
        """Return one line for the console."""
        return (
            f"{self.count} PPO iterations of {self.rollouts} rollouts on each of "
            f"{distributed.world_size()} ranks, {self.total_steps} optimizer steps"
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's prompts, by index, for each iteration."""
        order: list[int] = []
        for number in range(self.count):
            epoch, place = divmod(number, self._per_epoch)
            if place == 0:
                # Each epoch has its own order; too few prompts for an iteration are repeated.
                once = shuffled(self._prompts, self._seed, epoch)
                order = once * math.ceil(self._size / len(once))
            start = place * self._size
            yield order[start + distributed.rank() : start + self._size : distributed.world_size()]


@dataclass
class Iteration:
    """A PPO iteration: its experience, and the optimizer steps taken on it so far.

    Attributes:
        experience: of this rank; every rank has the same number of rows.
        metrics: of the rollout phase.
        forward: what the first optimizer step takes over from scoring.
        records: metrics of each optimizer step taken.
    """

    experience: Experience
    metrics: dict[str, float]
    forward: Forward | None = None
    records: list[dict[str, float]] = field(default_factory=list)


class PPOTrainer:
    """Updates actor and critic from experience.

    Args:
        engine: the four roles.
        ppo: hyperparameters.
        normalizer: gives the critic's values the unit of the reward.
        schedule: decides the micro-batches of an optimizer step, which never spans two iterations.
        temperature: of the sampler, for the log-probabilities.
        seed: of the order of rows.
        guard: counts the non-finite optimizer steps.
    """

    def __init__(
        self, engine: RLHFEngine, ppo: PPOConfig, *, normalizer: RewardNormalizer,
        schedule: ScheduleConfig, temperature: float, seed: int, guard: NonFiniteGuard,
    ) -> None:
        self._engine, self._ppo, self._normalizer = engine, ppo, normalizer
        self._schedule, self._temperature, self._seed = schedule, temperature, seed
        self._forward: Forward | None = None  # that the next optimizer step takes over
        self._guard = guard
        self.ema = Ema(engine.actor.module, ppo.ema_decay) if ppo.enable_ema else None
        self.steps = 0
        self._checked = False
        self.iteration: Iteration | None = None

    @property
    def taken(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self.steps + self._guard.skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the unfinished iteration."""
        unfinished = self.iteration and {
            "experience": {f.name: getattr(self.iteration.experience, f.name).cpu()
                           for f in fields(Experience)},
            "metrics": self.iteration.metrics,
            "records": self.iteration.records,
        }
        return {"steps": self.steps, "checked": self._checked, "round": unfinished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts, and the unfinished iteration."""
        self.steps, self._checked, unfinished = state["steps"], state["checked"], state["round"]
        if unfinished is not None:
            experience = Experience(**unfinished["experience"]).to(distributed.device())
            self.iteration = Iteration(
                experience, unfinished["metrics"], records=unfinished["records"])

    def plan(self, rollout: Rollout, number: int, epoch: int = 0) -> list[list[list[int]]]:
        """Return the rows of each micro-batch of each optimizer step in an epoch.

        Iteration and epoch are counted from 0.
        """
        size, lengths = self._ppo.per_device_training_batch_size, rollout.lengths()
        rows = size * self._schedule.gradient_accumulation_steps
        order = shuffled(len(rollout), self._seed, number * self._ppo.ppo_epochs + epoch)
        return [
            micro_batches(order[i : i + rows], lengths, size,
                          self._schedule.max_tokens_per_micro_batch)
            for i in range(0, len(order), rows)
        ]

    def takes_over(self, plan: list[list[list[int]]]) -> bool:
        """Return whether the update needs the forward passes of scoring, and no others."""
        once = self._ppo.ppo_epochs == len(plan) == len(plan[0]) == 1
        return once and self._engine.repeatable and self.steps >= self._ppo.critic_warmup_steps

    def update(
        self, iteration: Iteration, number: int, text: list[TokenBatch] | None = None,
        before_step: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Take all optimizer steps of an iteration that are not taken yet.

        Args:
            iteration: experience and the steps taken on it.
            number: of the iteration from 0; decides the order of the rows, with the seed.
            text: batches for the ptx loss, as many for each optimizer step.
            before_step: is called before each optimizer step.

        Returns:
            Means of the steps' metrics (maxima of `*_max`), and those of the rollout phase.

        Raises:
            FloatingPointError: too many consecutive optimizer steps were non-finite.
        """
        ppo, records, start = self._ppo, iteration.records, time.perf_counter()
        self.iteration = iteration
        self._engine.train(True)
        step, per_step = 0, self._schedule.gradient_accumulation_steps
        for epoch in range(ppo.ppo_epochs):
            for i, cuts in enumerate(self.plan(iteration.experience, number, epoch)):
                step += 1
                if step <= len(records):
                    continue  # taken before the run was resumed
                before_step()
                batches = [iteration.experience.rows(cut) for cut in cuts]
                self._forward, iteration.forward = iteration.forward, None
                some = text[i * per_step : (i + 1) * per_step] if text else []
                records.append(self._step(batches, some))
        self.iteration = None
        names = dict.fromkeys(name for record in records for name in record)
        means = {name: _mean_or_max(name, [r[name] for r in records if name in r])
                 for name in names}
        return iteration.metrics | means | {
            "time/update": time.perf_counter() - start,
            "policy/skipped_steps": float(self._guard.skipped),
        }

    def _step(
        self, batches: list[Experience], text: list[TokenBatch]
    ) -> dict[str, float]:
        """Take an optimizer step of the critic and, after its warm-up, of the actor."""
        engine = self._engine
        weight, random_state = global_weight(batches), torch.get_rng_state()
        trains_actor = self.steps >= self._ppo.critic_warmup_steps
        together = self._ppo.align_overflow and engine.actor.fp16_enabled() and trains_actor
        gradient = accumulate if together else optimizer_step
        value = gradient(engine.critic, batches, self._value_objective, weight)
        policy: dict[str, float] | None = {}
        if value is not None and trains_actor:
            share = weight / global_weight(text) * self._ppo.unsup_coef if text else weight
            policy = gradient(engine.actor, [*batches, *text], partial(
                self._actor_objective, share=share), weight)
            if together and policy is None:
                clear_gradients(engine.critic)
            elif together:
                step_together(engine.critic, engine.actor)
        if value is None or policy is None:
            self._guard.skip(self.taken + 1, [*batches, *text], random_state)
            return {}
        self._guard.step_taken()
        self.steps += 1
        if policy:
            # Before the first update every ratio is 1: an alarm checks this one.
            differences = {kind: policy.pop(f"difference_{kind}") for kind in ("mean", "max")}
            if not self._checked:
                policy |= {f"first_log_ratio_{kind}": x for kind, x in differences.items()}
            self._checked = True
        record: dict[str, float] = {}
        for role, metrics in (("value", value), ("policy", policy)):
            record |= {f"{role}/{name}": number for name, number in metrics.items()}
        for role, trained in (("actor", engine.actor), ("critic", engine.critic)):
            if role == "actor" and not trains_actor:
                continue
            record[f"lr/{role}"] = trained.get_lr()[0]
            if trained.fp16_enabled():
                record[f"overflow/{role}"] = float(not trained.was_step_applied())
            if trained.was_step_applied():
                record[f"grad_norm/{role}"] = gradient_norm(trained)
        if self.ema is not None and trains_actor and engine.actor.was_step_applied():
            self.ema.update()
        return record

    def _actor_objective(
        self, batch: Experience | TokenBatch, share: Tensor
    ) -> tuple[Tensor, Stats]:
        """Return the policy loss, or of text ptx (Ouyang et al. 2022, eq. 2) times its share.

        Each is its own token mean; a backward pass of its own keeps one graph at a time.
        """
        if isinstance(batch, Experience):
            return self._policy_objective(batch)
        ptx = share * at_labels(
            self._engine.actor, batch.input_ids, batch.labels, losses.token_loss)
        return ptx, {"unsup_loss": ptx}

    def _policy_objective(self, batch: Experience) -> tuple[Tensor, Stats]:
        ppo = self._ppo
        found = self._forward.actor if self._forward else self._engine.logprobs(
            self._engine.actor, batch, self._temperature, entropy=True,
            entropy_gradient=ppo.entropy_coef != 0,
        )
        logprobs, entropy = batch.spread(found[:, 0]), found[:, 1].sum()
        weights = None
        if ppo.rollout_is_clip is not None:
            weights = rl_math.importance_weights(
                batch.logprobs, batch.decoded_logprobs, batch.response_mask, ppo.rollout_is_clip)
        loss, stats = losses.policy_loss(
            logprobs, batch.logprobs, batch.advantages, batch.response_mask, ppo.cliprange, weights
        )
        if weights is not None:
            stats["rollout_is_mean"] = weights.sum()
        difference = ((logprobs - batch.logprobs).detach() * batch.response_mask).abs()
        stats |= {"difference_mean": difference.sum(), "difference_max": difference.max()}
        stats["entropy"] = entropy.detach()
        if ppo.entropy_coef:
            loss = loss - ppo.entropy_coef * entropy
        return loss, stats

    def _value_objective(self, batch: Experience) -> tuple[Tensor, Stats]:
        raw = self._forward.values if self._forward else self._engine.values(batch)
        values = batch.spread(self._normalizer.values(raw))
        return losses.value_loss(
            values, batch.values, batch.returns, batch.response_mask, self._ppo.cliprange_value
        )


def _mean_or_max(name: str, values: list[float]) -> float:
    return max(values) if name.endswith("_max") else sum(values) / len(values)
