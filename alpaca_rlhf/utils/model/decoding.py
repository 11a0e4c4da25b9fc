"""Sampling replies from a causal LM: the distribution, one token at a time with a KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alpaca_rlhf.utils import distributed, rl_math


@dataclass(frozen=True)
class SamplingConfig:
    """How replies are drawn.

    Attributes:
        max_new_tokens: most tokens of a reply, eos included.
        temperature: divides the logits; 0 is greedy.
        top_p: smallest set of tokens with at least this probability; 1 is all.
        top_k: only the k likeliest tokens; 0 is all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits [B, V] -> [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k > 0:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token is kept while those before it do not reach top_p: the likeliest always is.
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: SamplingConfig,
    eos_ids: Tensor,
    pad_id: int,
    generator: torch.Generator | None = None,
    in_step: bool = False,
) -> Tensor:
    """Draw a reply to each prompt.

    Args:
        model: a causal LM, in evaluation mode.
        input_ids: [B, P], padded left.
        attention_mask: [B, P].
        sampling: the distribution.
        eos_ids: [E] ids that end a reply.
        pad_id: stands behind a reply that has ended; such a row is never extended.
        generator: of this rank, on the model's device.
        in_step: under ZeRO-3 without gathered weights each forward pass is a collective, so every
            rank goes on until the last is done.

    Returns:
        Tokens [B, R], R the longest reply (of all ranks, if in step).
    """
    cache = DynamicCache(config=model.config)
    positions = rl_math.position_ids(attention_mask)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    new = input_ids
    tokens: list[Tensor] = []
    drawing = True
    while len(tokens) < sampling.max_new_tokens:
        logits = model(
            input_ids=new, attention_mask=attention_mask, position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]
        if drawing:
            token = sample(logits, sampling, generator).masked_fill(ended, pad_id)
        else:
            # Only keeping step: with nothing drawn, a seed gives the same replies at every stage.
            token = torch.full_like(tokens[-1], pad_id)
        tokens.append(token)
        ended = ended | torch.isin(token, eos_ids)
        going_on = (~ended).any()
        drawing = bool(going_on.item())
        if not (distributed.max_over_ranks(going_on.float()).item() if in_step else drawing):
            break
        new = token.unsqueeze(-1)
        positions = positions[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=-1)
    return torch.stack(tokens, dim=-1)
