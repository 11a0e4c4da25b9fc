"""Interface of the engines that generate in step 3; DeepSpeed's interface has the same names."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, Rollout


class RolloutEngine(ABC):
    """Generates responses with the actor's weights; all ranks call its methods together.

    An engine that keeps no weights of its own needs `generate` alone.
    """

    @abstractmethod
    def generate(
        self, prompts: PromptBatch, sampling: SamplingConfig, eos_ids: Tensor, pad_id: int,
        generator: torch.Generator | None = None,
    ) -> Rollout:
        """Generate responses; the arguments are those of `Decoder.generate`."""

    def sync_weights(self, step: int) -> None:
        """Take over the actor's weights after `step` optimizer steps, before `generate`."""
        return

    def verify(self, difference: float) -> None:
        """Refuse rollouts whose log-probabilities differ too much, in nats, from the actor's."""
        return

    def shutdown(self) -> None:
        """Release what it holds."""
        return
