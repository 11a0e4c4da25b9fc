"""The rollout phase: draw replies, let the four roles speak of them, turn that into experience."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import (
    Experience,
    Rollout,
    ScoredRollout,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import RLHFEngine
from alpaca_rlhf.utils import distributed, rl_math
from alpaca_rlhf.utils.data.batches import PromptBatch
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.generation.decoder import RolloutRequest, SamplingConfig

RewardFunction = Callable[[list[str], list[str]], list[float]]


def load_reward_function(name: str) -> RewardFunction:
    """`module:name` -> function of (prompts, replies), two lists of texts, that gives floats.

    Raises:
        UserError: no such module, or nothing callable of that name in it.
    """
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


def rate(function: RewardFunction, prompts: list[str], replies: list[str]) -> list[float]:
    """What a reward function gives for each reply.

    Raises:
        UserError: it does not give one finite number for each reply.
    """
    given = [float(score) for score in function(prompts, replies)]
    if len(given) != len(replies) or not all(map(math.isfinite, given)):
        raise UserError(
            f"--reward_function: gave {len(given)} numbers for {len(replies)} replies, or one "
            "that is not finite; give one finite float for each"
        )
    return given


@dataclass(frozen=True)
class RewardSettings:
    """How a score becomes token rewards and advantages.

    Attributes:
        clip: normalised scores are held within plus and minus this.
        missing_eos_penalty: taken off a rollout that ran to the limit.
        gamma, lam: of GAE.
        whiten: subtract the advantages' mean and divide by their deviation.
    """

    clip: float
    missing_eos_penalty: float
    gamma: float
    lam: float
    whiten: bool


class RolloutMaker:
    """Draws and scores rollouts.

    Args:
        engine: the four roles.
        hybrid: takes the actor to generation.
        form: the tokenizer.
        sampling: the distribution replies are drawn from.
        seed: of the sampler; each rank draws its own.
        scoring_tokens: rollouts are scored by so many tokens at once, padding included.
        reward_function: stands in for the reward model.
    """

    def __init__(
        self,
        engine: RLHFEngine,
        hybrid: HybridEngine,
        form: ChatFormat,
        sampling: SamplingConfig,
        seed: int,
        scoring_tokens: int,
        reward_function: RewardFunction | None = None,
    ) -> None:
        self.engine = engine
        self._hybrid = hybrid
        self.form = form
        self._sampling = sampling
        self._scoring_tokens = scoring_tokens
        self._reward_function = reward_function
        self.generator = torch.Generator(device=distributed.device())
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the sampler of this rank anew."""
        self.generator.manual_seed(seed * 1_000_003 + distributed.rank())

    def state_dict(self) -> dict[str, Tensor]:
        """Where the sampler of this rank is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"])

    def generate(self, prompts: PromptBatch, replies: int = 1) -> Rollout:
        """Draw replies to prompts; those to one prompt stand in a row."""
        batch = self._hybrid.generate(
            RolloutRequest(prompts.input_ids, prompts.attention_mask),
            replace(self._sampling, n_samples_per_prompt=replies),
            self.engine.eos_ids, self.form.pad_id, self.generator,
        )
        return Rollout(batch.input_ids, batch.attention_mask, batch.response_mask, batch.logprobs)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> ScoredRollout:
        """Log-probabilities, values and scores of rollouts, in evaluation mode.

        Rows of like length go through the models together. The log-probabilities come from the
        layout that trains, not from decoding: at the first update every ratio is then 1, to a
        precision that sums in another order do not have (docs/hybrid_engine.md).
        """
        self.engine.train(False)
        responses = rollout.response_mask.sum(-1)
        prompts = rollout.attention_mask.sum(-1) - responses
        groups = length_groups(prompts.tolist(), responses.tolist(), self._scoring_tokens)
        # Under ZeRO-3 each forward pass is a collective: a rank with fewer groups repeats its last.
        most = torch.tensor(float(len(groups)), device=rollout.input_ids.device)
        turns = int(distributed.max_over_ranks(most).item())
        parts = [
            self._score_group(rollout.rows(groups[min(i, len(groups) - 1)])) for i in range(turns)
        ]
        order = [row for group in groups for row in group]
        places = sorted(range(len(order)), key=order.__getitem__)
        scored = ScoredRollout.joined(parts[: len(groups)]).rows(places)
        if self._reward_function is not None:
            scored = replace(scored, score=self._by_function(rollout))
        self.engine.train(True)
        return scored

    def _score_group(self, rollout: Rollout) -> ScoredRollout:
        engine, temperature = self.engine, self._sampling.temperature or 1.0
        ids, mask, tokens = rollout.input_ids, rollout.attention_mask, rollout.responses
        logprobs = engine.logprobs(engine.actor, ids, mask, tokens, temperature)
        with engine.reference() as reference:
            ref_logprobs = engine.logprobs(reference, ids, mask, tokens, temperature)
        response = rollout.response_mask
        by_model = self._reward_function is None
        return ScoredRollout(
            **{f.name: getattr(rollout, f.name) for f in fields(Rollout)},
            logprobs=logprobs * response,
            ref_logprobs=ref_logprobs * response,
            values=engine.values(ids, mask, rollout.response_length) * response,
            score=engine.score(ids, mask) if by_model else ids.new_zeros(len(ids)).float(),
            has_eos=(torch.isin(tokens, engine.eos_ids) & response.bool()).any(-1),
        )

    def _by_function(self, rollout: Rollout) -> Tensor:
        """What the reward function gives [B]."""
        assert self._reward_function is not None
        given = rate(self._reward_function, *self.texts(rollout))
        return torch.tensor(given, dtype=torch.float32, device=rollout.input_ids.device)

    def texts(self, rollout: Rollout) -> tuple[list[str], list[str]]:
        """Prompts and replies as text."""
        prompts, replies = [], []
        for ids, mask, tokens, kept in zip(
            rollout.input_ids, rollout.attention_mask, rollout.responses, rollout.response_mask,
            strict=True,
        ):
            prompt = ids[: -rollout.response_length][mask[: -rollout.response_length].bool()]
            prompts.append(self.form.decode(prompt.tolist()))
            replies.append(self.form.decode(tokens[kept.bool()].tolist()))
        return prompts, replies


def length_groups(
    prompts: Sequence[int], responses: Sequence[int], tokens: int
) -> list[list[int]]:
    """Rows of like length together, the longest first, so many tokens a group, padding included.

    Prompts are padded to the longest on the left and responses on the right. A row that is longer
    than `tokens` is a group of its own.
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
    """(score - mean) / std, with the statistics of one policy, fixed from then on.

    Args:
        mode: checkpoint (given here), reference (of the first rollouts seen) or none.
        mean, std: for the mode checkpoint.
    """

    def __init__(self, mode: str, mean: float = 0.0, std: float = 1.0) -> None:
        self._waiting = mode == "reference"
        self.mean, self.std = mean, max(std, 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, and whether they are still to be taken."""
        return {"waiting": self._waiting, "mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self._waiting, self.mean, self.std = state["waiting"], state["mean"], state["std"]

    def __call__(self, scores: Tensor) -> Tensor:
        """Normalised scores [B]; every rank must call it alike."""
        if self._waiting:
            moments = rl_math.masked_moments(scores, torch.ones_like(scores))
            mean, std = rl_math.mean_and_std(distributed.sum_over_ranks(moments))
            self.mean, self.std = mean.item(), max(std.item(), 1e-6)
            self._waiting = False
        return (scores - self.mean) / self.std


def make_experience(
    scored: ScoredRollout, normalizer: ScoreNormalizer, settings: RewardSettings, kl_coef: float
) -> tuple[Experience, dict[str, float]]:
    """KL rewards, GAE and whitening over all ranks, and the metrics of the round.

    Args:
        scored: all rollouts of this rank's round.
        normalizer: of the scores.
        settings: of rewards and advantages.
        kl_coef: weight of the KL penalty.
    """
    mask = scored.response_mask
    normalized, rewards = token_rewards(scored, normalizer, settings, kl_coef)
    advantages, returns = rl_math.gae(rewards, scored.values, mask, settings.gamma, settings.lam)
    if settings.whiten:
        moments = distributed.sum_over_ranks(rl_math.masked_moments(advantages, mask))
        advantages = rl_math.whiten(advantages, mask, moments)
    experience = Experience(
        **{f.name: getattr(scored, f.name) for f in fields(ScoredRollout)},
        advantages=advantages, returns=returns,
    )
    metrics = rollout_metrics(scored)
    metrics["reward/normalized_mean"] = mean_over_ranks(normalized)
    metrics["reward/kl_penalty"] = kl_coef * metrics["kl/k1"]
    metrics["value/explained_variance"] = _explained_variance(scored.values, returns, mask)
    return experience, metrics


def token_rewards(
    scored: ScoredRollout, normalizer: ScoreNormalizer, settings: RewardSettings, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Normalised, clipped scores [B], and the reward of each token [B, R]."""
    normalized = normalizer(scored.score).clamp(-settings.clip, settings.clip)
    paid = normalized - settings.missing_eos_penalty * (~scored.has_eos).float()
    rewards = rl_math.token_rewards(
        scored.logprobs, scored.ref_logprobs, paid, scored.response_mask, kl_coef
    )
    return normalized, rewards


def rollout_metrics(scored: ScoredRollout) -> dict[str, float]:
    """Means over the rollouts of all ranks."""
    mask = scored.response_mask
    k1, k3 = rl_math.kl_estimates(scored.logprobs, scored.ref_logprobs, mask)
    moments = rl_math.masked_moments(scored.score, torch.ones_like(scored.score))
    mean, std = rl_math.mean_and_std(distributed.sum_over_ranks(moments))
    return {
        "reward/score_mean": mean.item(),
        "reward/score_std": std.item(),
        "kl/k1": mean_over_ranks(k1),
        "kl/k3": mean_over_ranks(k3),
        "response/length_mean": mean_over_ranks(mask.sum(-1).float()),
        "response/eos_rate": mean_over_ranks(scored.has_eos.float()),
        "rollout/decoding_difference_max": decoding_difference(scored),
        "response/repetition": mean_over_ranks(rl_math.repetition(scored.responses, mask)),
    }


def decoding_difference(scored: ScoredRollout) -> float:
    """Largest distance between log-probabilities of decoding and of a whole forward pass."""
    distance = (scored.decoded_logprobs - scored.logprobs).abs() * scored.response_mask
    return distributed.max_over_ranks(distance.max()).item()


def mean_over_ranks(values: Tensor) -> float:
    """Mean of [B] over all ranks."""
    pair = torch.stack([values.double().sum(), values.new_tensor(len(values)).double()])
    total, count = distributed.sum_over_ranks(pair).tolist()
    return total / count


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask, of all ranks."""
    left = distributed.sum_over_ranks(rl_math.masked_moments(returns - values, mask))
    whole = distributed.sum_over_ranks(rl_math.masked_moments(returns, mask))
    residual, total = rl_math.mean_and_std(left)[1], rl_math.mean_and_std(whole)[1]
    return (1 - (residual / total.clamp(min=1e-8)).square()).item()
