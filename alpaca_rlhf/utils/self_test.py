"""Whether this machine computes what it should: seconds, on its own device, without a download.

The maths of the losses and of PPO against numbers worked out by hand, and greedy replies of a small
random LLaMA, in a padded batch against each prompt alone. A mismatch is a machine that is broken,
or versions that do not belong together; `python -m alpaca_rlhf.doctor` runs both.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca_rlhf.utils import distributed, losses, rl_math
from alpaca_rlhf.utils.generation.decoder import Decoder, RolloutRequest, SamplingConfig
from alpaca_rlhf.utils.model.causal_lm import forward_logits

TOLERANCE = 1e-5
PROMPTS = ([5, 9, 2, 7, 3, 11, 6], [8, 4], [12, 3, 3, 10, 5])
EOS, PAD, VOCABULARY, NEW_TOKENS = 1, 0, 64, 12


def _rows(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, device=distributed.device())


def _policy(advantage: float) -> Tensor:
    """The policy's loss on one token whose ratio is 1.5, clipped at 1.2."""
    one, zero = _rows([1.0]), _rows([0.0])
    return losses.policy_loss(one * math.log(1.5), zero, one * advantage, one, 0.2)[0]


def _advantages() -> tuple[Tensor, Tensor]:
    """A reply of three tokens, rewarded at its end; what stands behind it must not count."""
    rewards, values = _rows([0.0, 0.0, 1.0, 7.0]), _rows([0.5, 0.5, 0.5, 7.0])
    return rl_math.gae(rewards, values, _rows([1, 1, 1, 0]), 1.0, 0.95)


def _whitened() -> Tensor:
    values, mask = _rows([1.0, 2.0, 3.0, 99.0]), _rows([1, 1, 1, 0])
    return rl_math.whiten(values, mask, rl_math.masked_moments(values, mask))


# What is computed, and what it is by hand.
CASES: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    # Two labels under a uniform distribution over four tokens: 2 log 4.
    "token loss": (lambda: losses.token_loss(
        torch.zeros(1, 3, 4, device=distributed.device()), _rows([-100, 2, 3])), [2.7725887]),
    "pairwise loss": (lambda: losses.pairwise_loss(_rows([0.0, 2.0])[0], _rows([0.0, 0.0])[0]),
                      [0.6931472 + 0.1269280]),  # log 2 + log(1 + e^-2)
    "policy loss, held by the clip": (lambda: _policy(1.0), [-1.2]),
    "policy loss, not held": (lambda: _policy(-1.0), [1.5]),
    # Plain (1 - 2)^2, held at 0.2: (0.2 - 2)^2; half the larger.
    "value loss": (lambda: losses.value_loss(
        _rows([1.0]), _rows([0.0]), _rows([2.0]), _rows([1]), 0.2)[0], [1.62]),
    # Backwards: 1 - 0.5; 0 + 0.95 x 0.5; 0 + 0.95 x 0.475.
    "advantages": (lambda: _advantages()[0], [0.45125, 0.475, 0.5, 0.0]),
    "returns": (lambda: _advantages()[1], [0.95125, 0.975, 1.0, 0.0]),
    "whitening": (_whitened, [-1.2247449, 0.0, 1.2247449, 0.0]),
    "log-probabilities": (lambda: rl_math.token_logprobs(
        _rows([0.0, math.log(3.0)])[None], _rows([1]).long()), [math.log(0.75)]),
    # p = 0.5 against q = 0.25: k1 = log 2, k3 = 1/2 - 1 + log 2.
    "KL": (lambda: torch.stack(rl_math.kl_estimates(
        _rows([math.log(0.5)]), _rows([math.log(0.25)]), _rows([1]))), [0.6931472, 0.1931472]),
}


def maths() -> list[str]:
    """What is not as worked out by hand, each with both numbers; empty when all is well."""
    wrong = []
    for name, (compute, by_hand) in CASES.items():
        numbers = compute().flatten().tolist()
        near = len(numbers) == len(by_hand) and all(
            abs(a - b) < TOLERANCE for a, b in zip(numbers, by_hand, strict=True))
        if not near:
            wrong.append(f"{name}: {numbers}, by hand {by_hand}")
    return wrong


def _left_padded(prompts: tuple[list[int], ...]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = _rows(*([PAD] * n + prompt for n, prompt in zip(pads, prompts, strict=True)))
    mask = _rows(*([0] * n + [1] * (longest - n) for n in pads))
    return ids, mask


def generation() -> list[str]:
    """Which prompts get another greedy reply, or other logits, in a batch than alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Wide weights: where two tokens are nearly as likely, rounding decides between them.
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        )).to(distributed.device()).eval()
    sampling = SamplingConfig(NEW_TOKENS, temperature=0)
    eos = torch.tensor([EOS], device=distributed.device())

    def replies(prompts: tuple[list[int], ...]) -> list[list[int]]:
        request = RolloutRequest(*_left_padded(prompts))
        made = Decoder(model).generate(request, sampling, eos, PAD)
        tokens = made.input_ids[:, -made.response_mask.shape[1] :].tolist()
        kept = made.response_mask.sum(-1).tolist()
        return [row[:n] for row, n in zip(tokens, kept, strict=True)]

    def last_logits(prompts: tuple[list[int], ...]) -> Tensor:
        with torch.no_grad():
            return forward_logits(model, *_left_padded(prompts))[:, -1]

    wrong = []
    together, logits = replies(PROMPTS), last_logits(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        [alone] = replies((prompt,))
        if alone != together[i]:
            wrong.append(f"prompt {i}: {together[i]} in a batch, {alone} alone")
        difference = (last_logits((prompt,))[0] - logits[i]).abs().max().item()
        if difference > 1e-3:
            wrong.append(f"prompt {i}: logits differ by {difference:.2g}")
    return wrong
