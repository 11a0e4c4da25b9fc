"""The four roles: actor and critic as DeepSpeed engines, reference and reward model frozen.

With LoRA on the actor the reference model is the actor with its adapter disabled, and with LoRA on
the critic the reward model is the critic with its adapter disabled and its saved head: no second
copy of the weights. With a shared backbone the four are adapters on one frozen base. Models are
loaded one after the other.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alpaca_rlhf.utils import distributed, losses
from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    EngineConfig,
    LoadingConfig,
    RoleConfig,
    RolesConfig,
    ScheduleConfig,
)
from alpaca_rlhf.utils.data.batches import Rollout
from alpaca_rlhf.utils.data.tokenizer import eos_ids
from alpaca_rlhf.utils.engine import Load, build_frozen, build_trained
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import at_labels, load_causal_lm
from alpaca_rlhf.utils.model.reward_model import TokenScorer, load_reward_model
from alpaca_rlhf.utils.model.weights.backbone import Backbone

# Adam's default of 1e-8 lets the first, tiny gradients of a critic take full steps ("N
# implementation details of RLHF with PPO", 2023).
ADAM_EPS = 1e-5


class RLHFEngine:
    """Actor, reference model, critic and reward model.

    Args:
        actor: the SFT model, which is trained.
        critic: the reward model, from which the critic starts.
        tokenizer: of all four roles.
        loading, adapters, engine, schedule, micro_batch_size, total_steps, adam_eps: as for
            `build_trained`, of actor and critic alike.
        critic_warmup_steps: of `total_steps`, those that do not train the actor.
        needs_reward_model: False if a function replaces the reward model.
        roles: where the frozen models keep their weights.
    """

    def __init__(
        self, actor: RoleConfig, critic: RoleConfig, tokenizer: PreTrainedTokenizerBase, *,
        loading: LoadingConfig, adapters: AdapterConfig, engine: EngineConfig, roles: RolesConfig,
        schedule: ScheduleConfig, micro_batch_size: int, total_steps: int,
        critic_warmup_steps: int = 0, needs_reward_model: bool = True, adam_eps: float = ADAM_EPS,
    ) -> None:
        build = partial(
            build_trained, loading=loading, adapters=adapters, engine=engine, schedule=schedule,
            micro_batch_size=micro_batch_size, adam_eps=adam_eps,
        )
        # Without dropout a forward pass in training mode is that of evaluation, and below ZeRO-3
        # its graph outlives the passes of other models.
        self.repeatable = not (actor.dropout or critic.dropout or adapters.lora_dropout) and (
            max(actor.zero_stage, critic.zero_stage) < 3)
        backbone = Backbone(
            (actor, critic), loading, adapters, tokenizer) if roles.share_backbone else None
        copied = "an adapter of its own" if backbone else "a frozen copy"
        load: Load = backbone.policy if backbone else partial(load_causal_lm, tokenizer=tokenizer)
        self.actor, trained = build(load, actor, total_steps=total_steps - critic_warmup_steps)
        self._reference, source = None, "the actor with its adapter disabled"
        if backbone or not lora.base_is_frozen(actor, adapters):
            place = replace(engine, offload=engine.offload or roles.offload_reference_model)
            self._reference, source = build_frozen(load, actor, loading, place), copied
        self.summary = [f"actor: {trained}; reference model: {source}"]
        config = lora.unwrapped(self.actor.module).generation_config
        ends = eos_ids(tokenizer, config.eos_token_id)
        self.eos_ids = torch.tensor(ends, device=distributed.device())

        load = backbone.reward_model if backbone else partial(
            load_reward_model, tokenizer=tokenizer)
        self.critic, trained = build(load, critic, total_steps=total_steps, wrap=TokenScorer)
        self._reward, source = None, "the critic with its adapter disabled"
        if not needs_reward_model:
            source = "a function"
        elif backbone or not lora.base_is_frozen(critic, adapters):
            place = replace(engine, offload=engine.offload or roles.offload_reward_model)
            self._reward = build_frozen(
                lambda *how: TokenScorer(load(*how)), critic, loading, place)
            source = copied
        self.summary.append(f"critic: {trained}; reward model: {source}")

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """Give the frozen policy that the KL divergence is measured against."""
        if self._reference is not None:
            yield self._reference
            return
        with lora.adapter_disabled(self.actor.module):
            yield self.actor

    @contextlib.contextmanager
    def reward_model(self) -> Iterator[nn.Module]:
        """Give the frozen reward model, which computes a score for every position."""
        if self._reward is not None:
            yield self._reward
            return
        with lora.adapter_disabled(self.critic.module.model):
            yield self.critic

    def logprobs(
        self, model: nn.Module, rollout: Rollout, temperature: float, *, entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> Tensor:
        """Return log-probabilities [N, 1], in nats, of the response tokens under a model.

        `entropy` and `entropy_gradient` are those of `losses.chosen_logprobs`.
        """
        return at_labels(model, *rollout.aligned(), partial(
            losses.chosen_logprobs, temperature=temperature, entropy=entropy,
            entropy_gradient=entropy_gradient))

    def values(self, rollout: Rollout) -> Tensor:
        """Return the critic's values [N] of the state before each response token."""
        ids, labels = rollout.aligned()
        values = self.critic(ids)[:, :-1]
        return values[labels[:, 1:] != losses.IGNORE_INDEX]

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode of actor and critic."""
        self.actor.module.train(mode)
        self.critic.module.train(mode)
