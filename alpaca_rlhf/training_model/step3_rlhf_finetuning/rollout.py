"""The rollout phase: generate responses, score them with the four roles, compute advantages."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import (
    Experience,
    Forward,
    ScoredRollout,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.utils import console, distributed, rl_math
from alpaca_rlhf.utils.configs import PPOConfig, RewardConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, Rollout, micro_batches
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import TrainingStopped
from alpaca_rlhf.utils.generation.rollout_engine import RolloutEngine
from alpaca_rlhf.utils.model.reward_model import load_statistics, scores
from alpaca_rlhf.utils.reward_function import RewardFunction, apply_reward_function


class RolloutMaker:
    """Generates and scores rollouts.

    Args:
        engine: the four roles.
        rollout_engine: generates.
        chat: the tokenizer.
        seed: of the sampler; each rank samples its own responses.
        micro_batch_size, max_tokens: rows of a micro-batch, or tokens; see `micro_batches`.
        reward_function: replaces the reward model.

    Attributes:
        sync_seconds: of the last rollout, until the engine had the weights.
    """

    def __init__(
        self, engine: RLHFEngine, rollout_engine: RolloutEngine, chat: ChatFormat, *,
        sampling: SamplingConfig, seed: int, micro_batch_size: int,
        max_tokens: int | None = None,
        reward_function: RewardFunction | None = None,
    ) -> None:
        self.engine, self.chat, self.sampling = engine, chat, sampling
        chat.hide(engine.eos_ids.tolist())
        self.rollout_engine, self.sync_seconds = rollout_engine, 0.0
        self._micro_batch = micro_batch_size, max_tokens
        self._reward_function = reward_function
        self.generator = torch.Generator(device=distributed.device())
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Seed the sampler of this rank."""
        self.generator.manual_seed(seed * 1_000_003 + distributed.rank())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of this rank's sampler."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state of this rank's sampler."""
        self.generator.set_state(state["generator"])

    def generate(self, prompts: PromptBatch, num_generations: int = 1) -> Rollout:
        """Sample responses; those to one prompt are consecutive rows."""
        start = time.perf_counter()
        self.rollout_engine.sync_weights(self.engine.actor.global_steps)
        self.sync_seconds = time.perf_counter() - start
        self._before = self.generator.get_state()
        with self._sampling_again():
            return self.rollout_engine.generate(
                prompts, replace(self.sampling, num_generations=num_generations),
                self.engine.eos_ids, self.chat.pad_id, self.generator,
            )

    def verify(self, scored: ScoredRollout) -> None:
        """Refuse the rollouts generated last if they come from other weights than the actor's."""
        with self._sampling_again():
            self.rollout_engine.verify(decoding_difference(scored)[0])

    @contextlib.contextmanager
    def _sampling_again(self) -> Iterator[None]:
        """Put the sampler back if the run is stopped inside: a resumed run samples the same."""
        try:
            yield
        except TrainingStopped:
            self.generator.set_state(self._before)
            raise

    def score(
        self, rollout: Rollout, cuts: Sequence[Sequence[int]] | None = None,
        keep_for: PPOConfig | None = None,
    ) -> tuple[ScoredRollout, Forward | None]:
        """Compute log-probabilities, values and scores of rollouts.

        The log-probabilities do not come from decoding but from the very micro-batches of the first
        epoch: at the first update every ratio is then 1, in every precision, since sums are taken
        in the same order (docs/hybrid_engine.md). Each model scores all micro-batches before the
        next one does: ZeRO-3 prefetches in the order of the last pass.

        Args:
            rollout: of this rank; every rank has the same number of rows.
            cuts: rows of the micro-batches of the first epoch; by default of similar length.
            keep_for: of an update whose only micro-batch this is: it needs no other forward pass
                of actor and critic.
        """
        engine, temperature = self.engine, self.sampling.temperature or 1.0
        if cuts is None:
            cuts = micro_batches(range(len(rollout)), rollout.lengths(), *self._micro_batch)
        keep = keep_for is not None
        engine.train(keep)
        parts = [rollout.rows(cut) for cut in cuts]
        with torch.set_grad_enabled(keep):
            actor = [engine.logprobs(
                engine.actor, part, temperature, entropy=keep,
                entropy_gradient=keep_for is not None and keep_for.entropy_coef != 0)
                for part in parts]
            values = [engine.values(part) for part in parts]
        kept = Forward(*actor, *values) if keep else None
        engine.train(False)
        with torch.no_grad():
            with engine.reference() as reference:
                ref_logprobs = [engine.logprobs(reference, part, temperature) for part in parts]
            score = self._scores(rollout, parts, cuts)
        engine.train(True)
        scored = ScoredRollout.joined([
            ScoredRollout(
                input_ids=part.input_ids, attention_mask=part.attention_mask,
                response_mask=part.response_mask, decoded_logprobs=part.decoded_logprobs,
                logprobs=part.spread(actor[i].detach()[:, 0]),
                ref_logprobs=part.spread(ref_logprobs[i][:, 0]),
                values=part.spread(values[i].detach()), score=score[i],
                has_eos=(torch.isin(part.responses, engine.eos_ids) & part.response_mask.bool()
                         ).any(-1),
            ) for i, part in enumerate(parts)
        ])
        order = list(chain.from_iterable(cuts))
        return scored.rows(sorted(range(len(order)), key=order.__getitem__)), kept

    def _scores(
        self, rollout: Rollout, parts: Sequence[Rollout], cuts: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return the scores of the rows of each micro-batch."""
        if self._reward_function is None:
            with self.engine.reward_model() as reward_model:
                return [scores(reward_model, part.input_ids, part.attention_mask) for part in parts]
        numbers = apply_reward_function(self._reward_function, *self.texts(rollout))
        return [torch.tensor([numbers[row] for row in cut], device=distributed.device())
                for cut in cuts]

    def texts(self, rollout: Rollout) -> tuple[list[str], list[str]]:
        """Return prompts and responses as text."""
        prompts, responses = [], []
        for ids, mask, tokens, kept in zip(
            rollout.input_ids, rollout.attention_mask, rollout.responses, rollout.response_mask,
            strict=True,
        ):
            prompt = ids[: -rollout.response_length][mask[: -rollout.response_length].bool()]
            prompts.append(self.chat.decode(prompt.tolist()))
            responses.append(self.chat.decode(tokens[kept.bool()].tolist()))
        return prompts, responses


class Normalizer:
    """Computes (x - mean) / std with fixed statistics, or with those of the first values it gets.

    Args:
        statistics: mean and standard deviation; None measures them.
    """

    def __init__(self, statistics: tuple[float, float] | None) -> None:
        self._statistics = statistics

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics."""
        return {"statistics": self._statistics and list(self._statistics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics."""
        self._statistics = state["statistics"] and tuple(state["statistics"])

    def measure(self, values: Tensor) -> None:
        """Take the statistics of values [B] of all ranks, unless there are some already."""
        if self._statistics is None:
            mean, std = _moments_over_ranks(values, torch.ones_like(values))
            self._statistics = mean.item(), std.item()

    def __call__(self, values: Tensor) -> Tensor:
        """Normalize values of any shape."""
        assert self._statistics is not None, "statistics are measured before they are used"
        mean, std = self._statistics
        return (values - mean) / max(std, 1e-6)


class RewardNormalizer:
    """Gives scores and values the unit of the reward.

    The critic starts as the reward model, so one pair of statistics normalizes the scores of the
    one and the output of the other; the critic's weights keep the reward model's unit. A reward
    function has another unit than the critic, hence two pairs.

    Args:
        reward: where the statistics come from.
        critic: folder of the reward model that the critic starts from.

    Attributes:
        scores, values: the normalizers.

    Raises:
        UserError: the reward model was saved without statistics.
    """

    def __init__(self, reward: RewardConfig, critic: str) -> None:
        mode = reward.reward_normalization
        if mode == "none":
            self.scores = self.values = Normalizer((0.0, 1.0))
        elif reward.reward_function is None:
            saved = load_statistics(critic) if mode == "checkpoint" else None
            self.scores = self.values = Normalizer(saved)
        else:
            if mode == "checkpoint":
                console.say("--reward_function: its scores are normalized by those of the first "
                            "rollouts")
            self.scores, self.values = Normalizer(None), Normalizer(None)

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics."""
        return {"scores": self.scores.state_dict(), "values": self.values.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics."""
        self.scores.load_state_dict(state["scores"])
        self.values.load_state_dict(state["values"])

    def measure(self, scored: ScoredRollout) -> None:
        """Take the statistics that are not known yet from rollouts of all ranks."""
        self.scores.measure(scored.score)
        self.values.measure(rl_math.gather_last(scored.values, scored.response_mask))


class AdaptiveKLController:
    """Moves the KL coefficient toward a target (Ziegler et al. 2019, section 2.2).

    Args:
        reward: `kl_coef` at the start; `kl_controller` adaptive: target in nats per sequence and
            horizon in episodes.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self._reward = reward
        self.coef = reward.kl_coef

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the coefficient."""
        self.coef = state["coef"]

    def update(self, kl: float, episodes: int) -> None:
        """Adapt the coefficient to the mean KL, in nats per sequence, of these episodes."""
        if self._reward.kl_controller == "adaptive":
            error = min(max(kl / self._reward.kl_target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self._reward.kl_horizon


def make_experience(
    scored: ScoredRollout, normalizer: RewardNormalizer, reward: RewardConfig, ppo: PPOConfig,
    kl_coef: float,
) -> tuple[Experience, dict[str, float]]:
    """Compute KL rewards, GAE and whitening over all ranks, and the metrics of the rollout phase.

    `scored` holds all rollouts of this rank in a PPO iteration; the values of the experience are
    normalized.
    """
    mask = scored.response_mask
    normalizer.measure(scored)
    normalized, rewards = token_rewards(scored, normalizer, reward, kl_coef)
    values = normalizer.values(scored.values) * mask
    advantages, returns = rl_math.gae(rewards, values, mask, ppo.gamma, ppo.lam)
    if ppo.whiten_advantages:
        moments = distributed.sum_over_ranks(rl_math.masked_moments(advantages, mask))
        advantages = rl_math.whiten(advantages, mask, moments)
    experience = Experience(
        input_ids=scored.input_ids, attention_mask=scored.attention_mask, response_mask=mask,
        decoded_logprobs=scored.decoded_logprobs, logprobs=scored.logprobs,
        ref_logprobs=scored.ref_logprobs, values=values, score=scored.score,
        has_eos=scored.has_eos, advantages=advantages, returns=returns,
    )
    metrics = rollout_metrics(scored)
    metrics["reward/normalized_mean"] = mean_over_ranks(normalized)
    metrics["reward/kl_penalty"] = kl_coef * metrics["kl/k1"]
    metrics["value/explained_variance"] = _explained_variance(values, returns, mask)
    return experience, metrics


def token_rewards(
    scored: ScoredRollout, normalizer: RewardNormalizer, reward: RewardConfig, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Return normalized, clipped scores [B] and the rewards of the tokens [B, R]."""
    limit = reward.clip_reward_value
    normalized = normalizer.scores(scored.score).clamp(-limit, limit)
    at_end = normalized - reward.missing_eos_penalty * (~scored.has_eos).float()
    rewards = rl_math.token_rewards(
        scored.logprobs, scored.ref_logprobs, at_end, scored.response_mask, kl_coef
    )
    return normalized, rewards


def rollout_metrics(scored: ScoredRollout) -> dict[str, float]:
    """Return means over the rollouts of all ranks."""
    mask = scored.response_mask
    k1, k3 = rl_math.kl_estimates(scored.logprobs, scored.ref_logprobs, mask)
    mean, std = _moments_over_ranks(scored.score, torch.ones_like(scored.score))
    difference = zip(("mean", "max"), decoding_difference(scored), strict=True)
    return {
        "reward/score_mean": mean.item(),
        "reward/score_std": std.item(),
        "kl/k1": mean_over_ranks(k1),
        "kl/k3": mean_over_ranks(k3),
        "response/length_mean": mean_over_ranks(mask.sum(-1).float()),
        "response/eos_rate": mean_over_ranks(scored.has_eos.float()),
        "response/repetition": mean_over_ranks(rl_math.repetition(scored.responses, mask)),
        **{f"rollout/decoding_difference_{kind}": value for kind, value in difference
           if not math.isnan(value)},  # of an engine that does not know them
    }


def decoding_difference(scored: ScoredRollout) -> tuple[float, float]:
    """Return mean and maximum, over all ranks, of decoding's difference to scoring, in nats."""
    mask = scored.response_mask
    difference = (scored.decoded_logprobs - scored.logprobs).abs() * mask
    return (_moments_over_ranks(difference, mask)[0].item(),
            distributed.max_over_ranks(difference.max()).item())


def mean_over_ranks(values: Tensor) -> float:
    """Return the mean of values [B] over all ranks."""
    pair = torch.stack([values.double().sum(), values.new_tensor(len(values)).double()])
    total, count = distributed.sum_over_ranks(pair).tolist()
    return total / count


def _moments_over_ranks(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of values over the mask, of all ranks."""
    moments = distributed.sum_over_ranks(rl_math.masked_moments(values, mask))
    return rl_math.mean_and_std(moments)


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over masks [B, R] of all ranks."""
    residual = _moments_over_ranks(returns - values, mask)[1]
    total = _moments_over_ranks(returns, mask)[1]
    return (1 - (residual / total.clamp(min=1e-8)).square()).item()
