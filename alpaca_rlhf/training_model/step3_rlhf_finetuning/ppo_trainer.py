"""The update phase: `ppo_epochs` passes over a round's experience, actor and critic in step."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.utils import losses, rl_math
from alpaca_rlhf.utils.data import samplers
from alpaca_rlhf.utils.data.collators import TokenBatch
from alpaca_rlhf.utils.model.causal_lm import forward_logits, response_logits
from alpaca_rlhf.utils.model.ema import Ema
from alpaca_rlhf.utils.training_loop import (
    Stats,
    global_weight,
    gradient_norm,
    optimizer_step,
)


@dataclass(frozen=True)
class PPOSettings:
    """Of the update.

    Attributes:
        epochs: passes over a round's experience.
        micro_batch_size: rollouts of a backward pass.
        accumulation_steps: backward passes of an optimizer step; a step never spans two rounds.
        temperature: of the sampler, so that ratios compare like with like.
        clip, clip_value: of the policy's ratio and of the value.
        entropy_coef: weight of the entropy bonus.
        unsup_coef: weight of the language-modelling loss (ptx), when there is text for it.
        critic_warmup_steps: optimizer steps at the beginning that train the critic alone.
        max_skipped_steps: so many updates in a row that are not finite end the run.
        seed: of the order of the mini-batches.
    """

    epochs: int
    micro_batch_size: int
    accumulation_steps: int
    temperature: float
    clip: float
    clip_value: float
    entropy_coef: float
    unsup_coef: float
    critic_warmup_steps: int
    max_skipped_steps: int
    seed: int


def steps_per_round(rollouts: int, settings: PPOSettings) -> int:
    """Optimizer steps that a round with so many rollouts on each rank takes."""
    micro_batches = math.ceil(rollouts / settings.micro_batch_size)
    return settings.epochs * math.ceil(micro_batches / settings.accumulation_steps)


class AdaptiveKLController:
    """Moves the KL coefficient toward a target (Ziegler et al. 2019, section 2.2).

    Args:
        coef: at the start.
        target: KL to aim at, nats a sequence; None keeps the coefficient fixed.
        horizon: episodes over which it moves.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.coef = coef
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """After a round of so many episodes with a mean KL."""
        if self._target is not None:
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self._horizon


class PPOTrainer:
    """Learns from experience.

    Args:
        engine: the four roles.
        settings: of the update.
        ema: average of the actor, moved after each of its steps.
    """

    def __init__(self, engine: RLHFEngine, settings: PPOSettings, ema: Ema | None = None) -> None:
        self._engine = engine
        self._settings = settings
        self._ema = ema
        self.steps = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._checked = False

    def learn(
        self, experience: Experience, round_number: int, text: list[TokenBatch] | None = None
    ) -> dict[str, float]:
        """All updates of a round; returns the means of their metrics.

        Args:
            experience: of this rank; every rank has as many rows.
            round_number: decides the order of the rows, with the seed.
            text: batches for the language-modelling loss, one for each micro-batch.

        Raises:
            FloatingPointError: too many updates in a row were not finite.
        """
        settings, start = self._settings, time.perf_counter()
        records: list[dict[str, float]] = []
        for epoch in range(settings.epochs):
            order = samplers.shuffled(
                len(experience), settings.seed, round_number * settings.epochs + epoch
            )
            batches = experience.mini_batches(settings.micro_batch_size, order)
            for i in range(0, len(batches), settings.accumulation_steps):
                j = i + settings.accumulation_steps
                records.append(self._step(batches[i:j], text[i:j] if text else None))
        names = dict.fromkeys(name for record in records for name in record)
        means = {
            name: _mean_or_max(name, [record[name] for record in records if name in record])
            for name in names
        }
        return means | {
            "time/update": time.perf_counter() - start,
            "policy/skipped_steps": float(self.skipped),
        }

    def _step(
        self, micro_batches: list[Experience], text: list[TokenBatch] | None
    ) -> dict[str, float]:
        """One optimizer step of the critic and (after its warm-up) of the actor."""
        weight = global_weight(micro_batches)
        record: dict[str, float] = {}
        value = optimizer_step(self._engine.critic, micro_batches, self._value_objective, weight)
        policy: dict[str, float] | None = {}
        if value is not None and self.steps >= self._settings.critic_warmup_steps:
            policy = self._actor_step(micro_batches, text, weight)
        if value is None or policy is None:
            self._count_skipped()
            return record
        self._skipped_in_a_row = 0
        self.steps += 1
        for role, stats in (("value", value), ("policy", policy)):
            record |= {f"{role}/{name}": number for name, number in stats.items()}
        for role, engine in (("actor", self._engine.actor), ("critic", self._engine.critic)):
            if role == "critic" or policy:
                record[f"grad_norm/{role}"] = gradient_norm(engine)
                record[f"lr/{role}"] = engine.get_lr()[0]
        return record

    def _actor_step(
        self, micro_batches: list[Experience], text: list[TokenBatch] | None, weight: Tensor
    ) -> dict[str, float] | None:
        if text:
            share = weight / global_weight(text) * self._settings.unsup_coef
            joint = [_WithText(batch, t) for batch, t in zip(micro_batches, text, strict=True)]
            policy = optimizer_step(
                self._engine.actor, joint, lambda b: self._joint_objective(b, share), weight
            )
        else:
            policy = optimizer_step(
                self._engine.actor, micro_batches, self._policy_objective, weight
            )
        if policy is not None:
            # Before the first update every ratio is 1: an alarm watches this one.
            difference = policy.pop("difference_max")
            if not self._checked:
                policy["first_log_ratio_max"] = difference
            self._checked = True
            if self._ema is not None:
                self._ema.update()
        return policy

    def _policy_objective(self, batch: Experience) -> tuple[Tensor, Stats]:
        settings = self._settings
        logits = response_logits(
            self._engine.actor, batch.input_ids, batch.attention_mask, batch.response_length
        )
        logprobs = rl_math.token_logprobs(logits, batch.responses, settings.temperature)
        loss, stats = losses.policy_loss(
            logprobs, batch.logprobs, batch.advantages, batch.response_mask, settings.clip
        )
        difference = (logprobs - batch.logprobs).detach() * batch.response_mask
        stats["difference_max"] = difference.abs().max()
        with torch.set_grad_enabled(settings.entropy_coef != 0):
            entropy = rl_math.entropy(logits, settings.temperature) * batch.response_mask
        stats["entropy"] = entropy.sum()
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * entropy.sum()
        return loss, stats

    def _joint_objective(self, pair: "_WithText", share: Tensor) -> tuple[Tensor, Stats]:
        """The policy loss plus ptx (Ouyang et al. 2022, eq. 2), each a token mean of its own."""
        loss, stats = self._policy_objective(pair.experience)
        logits = forward_logits(
            self._engine.actor, pair.text.input_ids, pair.text.attention_mask
        )
        ptx = losses.token_loss(logits, pair.text.labels) * share
        return loss + ptx, {**stats, "unsup_loss": ptx.detach()}

    def _value_objective(self, batch: Experience) -> tuple[Tensor, Stats]:
        values = self._engine.values(
            batch.input_ids, batch.attention_mask, batch.response_length
        )
        return losses.value_loss(
            values, batch.values, batch.returns, batch.response_mask, self._settings.clip_value
        )

    def _count_skipped(self) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._settings.max_skipped_steps:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} updates in a row were not finite; lower "
                "--actor_learning_rate and --critic_learning_rate, or take --dtype bf16"
            )


@dataclass(frozen=True)
class _WithText:
    """Experience and the text whose language-modelling loss goes with it."""

    experience: Experience
    text: TokenBatch


def _mean_or_max(name: str, values: list[float]) -> float:
    return max(values) if name.endswith("_max") else sum(values) / len(values)
