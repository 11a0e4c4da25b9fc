"""The update phase: `ppo_epochs` passes over a round's experience, actor and critic in step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.utils import distributed, losses, rl_math
from alpaca_rlhf.utils.data.batches import TokenBatch, shuffled
from alpaca_rlhf.utils.model.causal_lm import forward_logits, response_logits
from alpaca_rlhf.utils.model.ema import Ema
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
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

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.coef = state["coef"]

    def update(self, kl: float, episodes: int) -> None:
        """After a round of so many episodes with a mean KL."""
        if self._target is not None:
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self._horizon


@dataclass
class Round:
    """A round under way: its experience, and how far learning from it is.

    Attributes:
        experience: of this rank; every rank has as many rows.
        metrics: of the rollout phase.
        records: of the updates taken so far.
    """

    experience: Experience
    metrics: dict[str, float]
    records: list[dict[str, float]] = field(default_factory=list)


class PPOTrainer:
    """Learns from experience.

    Args:
        engine: the four roles.
        settings: of the update.
        guard: counts the non-finite steps.
        ema: average of the actor, moved after each of its steps.
    """

    def __init__(
        self, engine: RLHFEngine, settings: PPOSettings, guard: NonFiniteGuard,
        ema: Ema | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._guard = guard
        self._ema = ema
        self.steps = 0
        self._checked = False
        self.round: Round | None = None

    @property
    def taken(self) -> int:
        """Optimizer steps, those included that were skipped."""
        return self.steps + self._guard.skipped

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the round under way."""
        under_way = self.round and {
            "experience": {f.name: getattr(self.round.experience, f.name).cpu()
                           for f in fields(Experience)},
            "metrics": self.round.metrics,
            "records": self.round.records,
        }
        return {"steps": self.steps, "checked": self._checked, "round": under_way}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps, self._checked, under_way = state["steps"], state["checked"], state["round"]
        if under_way is not None:
            experience = Experience(**under_way["experience"]).to(distributed.device())
            self.round = Round(experience, under_way["metrics"], under_way["records"])

    def learn(
        self, under_way: Round, round_number: int, text: list[TokenBatch] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """All updates of a round that are not taken yet; returns the means of their metrics.

        Args:
            under_way: the round.
            round_number: decides the order of the rows, with the seed.
            text: batches for the language-modelling loss, one for each micro-batch.
            between: is called before each update.

        Raises:
            FloatingPointError: too many updates in a row were not finite.
        """
        settings, start = self._settings, time.perf_counter()
        self.round = under_way
        self._engine.train(True)
        place = 0
        for epoch in range(settings.epochs):
            order = shuffled(
                len(under_way.experience), settings.seed, round_number * settings.epochs + epoch
            )
            batches = under_way.experience.mini_batches(settings.micro_batch_size, order)
            for i in range(0, len(batches), settings.accumulation_steps):
                place += 1
                if place <= len(under_way.records):
                    continue
                j = i + settings.accumulation_steps
                between()
                under_way.records.append(self._step(batches[i:j], text[i:j] if text else None))
        self.round = None
        names = dict.fromkeys(name for record in under_way.records for name in record)
        means = {
            name: _mean_or_max(name, [r[name] for r in under_way.records if name in r])
            for name in names
        }
        return under_way.metrics | means | {
            "time/update": time.perf_counter() - start,
            "policy/skipped_steps": float(self._guard.skipped),
        }

    def _step(
        self, micro_batches: list[Experience], text: list[TokenBatch] | None
    ) -> dict[str, float]:
        """One optimizer step of the critic and (after its warm-up) of the actor."""
        weight, random_state = global_weight(micro_batches), torch.get_rng_state()
        record: dict[str, float] = {}
        value = optimizer_step(self._engine.critic, micro_batches, self._value_objective, weight)
        policy: dict[str, float] | None = {}
        if value is not None and self.steps >= self._settings.critic_warmup_steps:
            policy = self._actor_step(micro_batches, text, weight)
        if value is None or policy is None:
            texts: list[TokenBatch | None] = [*text] if text else [None] * len(micro_batches)
            whole = zip(micro_batches, texts, strict=True)
            self._guard.skip(
                self.taken + 1, [_WithText(batch, t) for batch, t in whole], random_state
            )
            return record
        self._guard.step_taken()
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
        assert pair.text is not None, "the joint loss is for batches with text"
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


@dataclass(frozen=True)
class _WithText:
    """Experience and the text whose language-modelling loss goes with it."""

    experience: Experience
    text: TokenBatch | None


def _mean_or_max(name: str, values: list[float]) -> float:
    return max(values) if name.endswith("_max") else sum(values) / len(values)
