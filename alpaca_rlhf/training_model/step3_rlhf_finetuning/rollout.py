"""The rollout phase: generate responses, score them with the four roles, compute advantages."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience, ScoredRollout
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.utils import console, distributed, rl_math
from alpaca_rlhf.utils.configs import PPOConfig, RewardConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, Rollout
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model.reward_model import load_statistics

RewardFunction = Callable[[list[str], list[str]], list[float]]


def load_reward_function(name: str | None) -> RewardFunction | None:
    """Import `module:name`, a function of prompts and responses (texts) that returns floats.

    Raises:
        UserError: no such module, or nothing callable of that name in it.
    """
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--reward_function {name}: {error}; give module:name, with its folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise UserError(f"--reward_function {name}: is not callable; name a function")
    return function


def apply_reward_function(
    function: RewardFunction, prompts: list[str], responses: list[str]
) -> list[float]:
    """Return the score of each response by a reward function.

    Raises:
        UserError: it does not return one finite number for each response.
    """
    scores = [float(score) for score in function(prompts, responses)]
    if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
        raise UserError(
            f"--reward_function: returned {len(scores)} numbers for {len(responses)} responses, or "
            "a non-finite one; return one finite float for each"
        )
    return scores


class RolloutMaker:
    """Generates and scores rollouts.

    Args:
        engine: the four roles.
        hybrid: takes the actor into generation mode.
        chat: the tokenizer.
        seed: of the sampler; each rank samples its own responses.
        scoring_tokens: most tokens that are scored at once, padding included.
        reward_function: replaces the reward model.
    """

    def __init__(
        self, engine: RLHFEngine, hybrid: HybridEngine, chat: ChatFormat, *,
        sampling: SamplingConfig, seed: int, scoring_tokens: int,
        reward_function: RewardFunction | None = None,
    ) -> None:
        self.engine, self.chat, self.sampling = engine, chat, sampling
        self._hybrid = hybrid
        self._scoring_tokens = scoring_tokens
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
        return self._hybrid.generate(
            prompts, replace(self.sampling, num_generations=num_generations), self.engine.eos_ids,
            self.chat.pad_id, self.generator,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout) -> ScoredRollout:
        """Compute log-probabilities, values and scores of rollouts, in evaluation mode.

        Rows are grouped by length. The log-probabilities come from the layout that is trained, not
        from decoding: at the first update every ratio is then 1, to a precision that sums in
        another order do not have (docs/hybrid_engine.md).
        """
        self.engine.train(False)
        responses = rollout.response_mask.sum(-1)
        prompts = rollout.attention_mask.sum(-1) - responses
        groups = length_groups(prompts.tolist(), responses.tolist(), self._scoring_tokens)
        # Under ZeRO-3 each forward pass is a collective: a rank with fewer groups repeats its last.
        count = torch.tensor(float(len(groups)), device=rollout.input_ids.device)
        most = int(distributed.max_over_ranks(count).item())
        parts = [
            self._score_group(rollout.rows(groups[min(i, len(groups) - 1)])) for i in range(most)
        ]
        order = [row for group in groups for row in group]
        places = sorted(range(len(order)), key=order.__getitem__)
        scored = ScoredRollout.joined(parts[: len(groups)]).rows(places)
        if self._reward_function is not None:
            scores = apply_reward_function(self._reward_function, *self.texts(rollout))
            scored = replace(scored, score=scored.score.new_tensor(scores))
        self.engine.train(True)
        return scored

    def _score_group(self, rollout: Rollout) -> ScoredRollout:
        engine, temperature = self.engine, self.sampling.temperature or 1.0
        ids, mask, tokens = rollout.input_ids, rollout.attention_mask, rollout.responses
        logprobs = engine.logprobs(engine.actor, ids, mask, tokens, temperature)
        with engine.reference() as reference:
            ref_logprobs = engine.logprobs(reference, ids, mask, tokens, temperature)
        response = rollout.response_mask
        by_model = self._reward_function is None
        return ScoredRollout(
            input_ids=ids, attention_mask=mask, response_mask=response,
            decoded_logprobs=rollout.decoded_logprobs,
            logprobs=logprobs * response,
            ref_logprobs=ref_logprobs * response,
            values=engine.values(ids, mask, rollout.response_length) * response,
            score=engine.score(ids, mask) if by_model else ids.new_zeros(len(ids)).float(),
            has_eos=(torch.isin(tokens, engine.eos_ids) & response.bool()).any(-1),
        )

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


def length_groups(
    prompts: Sequence[int], responses: Sequence[int], tokens: int
) -> list[list[int]]:
    """Group rows of similar length, the longest first, up to `tokens` per group with padding.

    Prompts are padded to the longest on the left and responses on the right. A row that is longer
    than `tokens` is a group of its own.

    Args:
        prompts, responses: number of tokens of each row.
        tokens: most tokens of a group.
    """
    groups: list[list[int]] = []
    widths = 0, 0
    for row in sorted(range(len(prompts)), key=lambda i: -(prompts[i] + responses[i])):
        wider = max(widths[0], prompts[row]), max(widths[1], responses[row])
        if groups and (len(groups[-1]) + 1) * sum(wider) <= tokens:
            groups[-1].append(row)
            widths = wider
        else:
            groups.append([row])
            widths = prompts[row], responses[row]
    return groups


class ScoreNormalizer:
    """Computes (score - mean) / std with fixed statistics.

    Args:
        reward: where the statistics come from.
        reward_model: folder of the reward model, which may have them.

    Raises:
        UserError: the reward model was saved without statistics.
    """

    def __init__(self, reward: RewardConfig, reward_model: str) -> None:
        mode = reward.reward_normalization
        if reward.reward_function and mode == "checkpoint":
            mode = "reference"
            console.say("--reward_function: its scores are normalized by those of the first "
                        "rollouts")
        self._unset = mode == "reference"
        mean, std = load_statistics(reward_model) if mode == "checkpoint" else (0.0, 1.0)
        self.mean, self.std = mean, max(std, 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, and whether they are still to be measured."""
        return {"waiting": self._unset, "mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics."""
        self._unset, self.mean, self.std = state["waiting"], state["mean"], state["std"]

    def __call__(self, scores: Tensor) -> Tensor:
        """Normalize scores [B]; every rank must call it with its own."""
        if self._unset:
            mean, std = _moments_over_ranks(scores, torch.ones_like(scores))
            self.mean, self.std, self._unset = mean.item(), max(std.item(), 1e-6), False
        return (scores - self.mean) / self.std


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
    scored: ScoredRollout, normalizer: ScoreNormalizer, reward: RewardConfig, ppo: PPOConfig,
    kl_coef: float,
) -> tuple[Experience, dict[str, float]]:
    """Compute KL rewards, GAE and whitening over all ranks, and the metrics of the rollout phase.

    `scored` holds all rollouts of this rank in a PPO iteration.
    """
    mask = scored.response_mask
    normalized, rewards = token_rewards(scored, normalizer, reward, kl_coef)
    advantages, returns = rl_math.gae(rewards, scored.values, mask, ppo.gamma, ppo.lam)
    if ppo.whiten_advantages:
        moments = distributed.sum_over_ranks(rl_math.masked_moments(advantages, mask))
        advantages = rl_math.whiten(advantages, mask, moments)
    experience = Experience(
        input_ids=scored.input_ids, attention_mask=scored.attention_mask, response_mask=mask,
        decoded_logprobs=scored.decoded_logprobs, logprobs=scored.logprobs,
        ref_logprobs=scored.ref_logprobs, values=scored.values, score=scored.score,
        has_eos=scored.has_eos, advantages=advantages, returns=returns,
    )
    metrics = rollout_metrics(scored)
    metrics["reward/normalized_mean"] = mean_over_ranks(normalized)
    metrics["reward/kl_penalty"] = kl_coef * metrics["kl/k1"]
    metrics["value/explained_variance"] = _explained_variance(scored.values, returns, mask)
    return experience, metrics


def token_rewards(
    scored: ScoredRollout, normalizer: ScoreNormalizer, reward: RewardConfig, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Return normalized, clipped scores [B] and the rewards of the tokens [B, R]."""
    limit = reward.clip_reward_value
    normalized = normalizer(scored.score).clamp(-limit, limit)
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
    difference = (scored.decoded_logprobs - scored.logprobs).abs() * mask
    return {
        "reward/score_mean": mean.item(),
        "reward/score_std": std.item(),
        "kl/k1": mean_over_ranks(k1),
        "kl/k3": mean_over_ranks(k3),
        "response/length_mean": mean_over_ranks(mask.sum(-1).float()),
        "response/eos_rate": mean_over_ranks(scored.has_eos.float()),
        "rollout/decoding_difference_max": distributed.max_over_ranks(difference.max()).item(),
        "response/repetition": mean_over_ranks(rl_math.repetition(scored.responses, mask)),
    }


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
