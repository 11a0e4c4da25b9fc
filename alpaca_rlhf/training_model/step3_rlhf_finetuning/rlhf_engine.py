"""The four roles: actor and critic as DeepSpeed engines, reference and reward model frozen.

With LoRA on the actor the reference is the actor with its adapter off, and with LoRA on the critic
the reward model is the critic with its adapter off and the saved head: no second copy. Models are
loaded one after the other, and partitioned as they load under ZeRO-3.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alpaca_rlhf.utils import console, distributed, rl_math
from alpaca_rlhf.utils.engine import (
    Engine,
    Load,
    ModelSettings,
    Schedule,
    build_frozen,
    build_trained,
)
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm, response_logits
from alpaca_rlhf.utils.model.reward_model import TokenScorer, load_reward_model, scores
from alpaca_rlhf.utils.run.export import eos_ids


class RLHFEngine:
    """Actor, reference, critic and reward model.

    Args:
        actor_path, actor: the SFT model and how it is trained.
        critic_path, critic: the reward model and how the critic, which starts as it, is trained.
        schedule: of both optimizers.
        tokenizer: of all four roles.
        needs_reward_model: False when a function stands in for it.
    """

    def __init__(
        self,
        actor_path: str,
        actor: ModelSettings,
        critic_path: str,
        critic: ModelSettings,
        schedule: Schedule,
        tokenizer: PreTrainedTokenizerBase,
        needs_reward_model: bool = True,
    ) -> None:
        load = partial(load_causal_lm, actor_path, tokenizer)
        self.actor, trains = _built_actor(actor, schedule, load)
        self._reference = None if actor.adapter_off_is_frozen else build_frozen(actor, load)
        says = "the actor, adapter off" if self._reference is None else "a frozen copy"
        self.summary = [f"actor: {trains}; reference: {says}"]
        ends = eos_ids(lora.unwrapped(self.actor.module), tokenizer)
        self.eos_ids = torch.tensor(ends, device=distributed.device())

        load = partial(load_reward_model, critic_path, tokenizer)
        self.critic, trains = build_trained(critic, schedule, load, wrap=TokenScorer)
        self._reward = None
        says = "the critic, adapter off" if needs_reward_model else "a function"
        if needs_reward_model and not critic.adapter_off_is_frozen:
            self._reward = build_frozen(critic, lambda *how: TokenScorer(load(*how)))
            says = "a frozen copy"
        self.summary.append(f"critic: {trains}; reward model: {says}")

    def logprobs(
        self, model: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor, temperature: float
    ) -> Tensor:
        """Log-probabilities [B, R] of tokens [B, R], the end of ids [B, P + R]."""
        logits = response_logits(model, ids, mask, tokens.shape[1])
        return rl_math.token_logprobs(logits, tokens, temperature)

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The frozen policy that KL is measured against."""
        if self._reference is not None:
            yield self._reference
            return
        with lora.adapter_off(self.actor.module):
            yield self.actor

    def values(self, ids: Tensor, mask: Tensor, response_length: int) -> Tensor:
        """The critic's values [B, R] of the state before each response token."""
        return self.critic(ids, mask)[:, -response_length - 1 : -1]

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The reward model's score [B] of whole sequences [B, P + R]."""
        if self._reward is not None:
            return scores(self._reward, ids, mask)
        with lora.adapter_off(self.critic.module.model):
            return scores(self.critic, ids, mask)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode, of the roles that train.

        Of the modules: DeepSpeed's own hybrid engine would put its kernels in on `eval`.
        """
        self.actor.module.train(mode)
        self.critic.module.train(mode)


def _built_actor(settings: ModelSettings, schedule: Schedule, load: Load) -> tuple[Engine, str]:
    """The actor's engine; an ordinary one when DeepSpeed's hybrid engine cannot be made of it."""
    if settings.hybrid_engine is not None:
        try:
            return build_trained(settings, schedule, load)
        except Exception as error:  # it follows transformers late, and fails in many ways
            console.say(
                "warning: --hybrid_engine_backend deepspeed: its engine cannot be made "
                f"({type(error).__name__}: {error}); the native backend is used"
            )
    return build_trained(replace(settings, hybrid_engine=None), schedule, load)
