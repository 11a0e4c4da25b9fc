"""The plain formulation that losses and log-probabilities are compared with: all logits at once."""

import torch.nn.functional as F
from torch import Tensor, nn

from alpaca_rlhf.utils import rl_math


def forward_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return logits [B, T, V] of ids and mask [B, T], padded on either side."""
    return model(
        input_ids=input_ids, attention_mask=attention_mask,
        position_ids=rl_math.position_ids(attention_mask), use_cache=False,
    ).logits


def response_logits(model: nn.Module, ids: Tensor, mask: Tensor, response_length: int) -> Tensor:
    """Return logits [B, R, V] that predict the last R tokens of ids and mask [B, P + R]."""
    return forward_logits(model, ids, mask)[:, -response_length - 1 : -1]


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihood of labels [B, T] that are not -100."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy [...], nats, of the distributions of logits [..., V] / temperature."""
    logprobs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)
