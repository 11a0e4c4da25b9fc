"""The sampling distribution, by frequencies, at its ends and in a large vocabulary."""

import pytest
import torch
from torch.testing import assert_close

from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.generation.sampling import draw, sample

PROBABILITIES = [0.5, 0.25, 0.15, 0.07, 0.03]
# Sampling parameters, and the probabilities that follow from them, computed by hand.
EXPECTED = {
    "plain": (SamplingConfig(), PROBABILITIES),
    "temperature 0.5": (SamplingConfig(temperature=0.5), [p * p / 0.3408 for p in PROBABILITIES]),
    "temperature 2": (SamplingConfig(temperature=2.0),
                      [p**0.5 / 2.0321853 for p in PROBABILITIES]),
    "top_k 3": (SamplingConfig(top_k=3), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
    "top_p 0.7": (SamplingConfig(top_p=0.7), [2 / 3, 1 / 3, 0, 0, 0]),
    "top_p 0.8": (SamplingConfig(top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
    "top_p 0.01": (SamplingConfig(top_p=0.01), [1, 0, 0, 0, 0]),
    # 0.5 / 0.97 + 0.25 / 0.97 is over 0.75 already.
    "top_k 4, then top_p 0.75": (SamplingConfig(top_p=0.75, top_k=4), [2 / 3, 1 / 3, 0, 0, 0]),
    # The two most likely tokens occur in the text: their logits, all negative, are doubled.
    "repetition_penalty 2": (SamplingConfig(repetition_penalty=2.0),
                             [p / 0.5625 for p in (0.25, 0.0625, 0.15, 0.07, 0.03)]),
    "top_k 99": (SamplingConfig(top_k=99), PROBABILITIES),
}
# Chi-square that chance exceeds once in a thousand, by degrees of freedom.
LIMIT = {1: 10.83, 2: 13.82, 4: 18.47}
DRAWS = 200_000
# The most likely token is not the first, so an order that is lost shows.
ORDER = torch.tensor([3, 0, 4, 2, 1])


def drawn(sampling):
    logits = torch.tensor(PROBABILITIES)[ORDER].log().expand(DRAWS, 5)
    uniform = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    seen = (ORDER < 2).expand(DRAWS, 5) if sampling.repetition_penalty != 1 else None
    return ORDER[sample(logits, sampling, uniform, seen)]


def chi_square(tokens, probabilities):
    """Return infinity if an impossible token was drawn."""
    counts = torch.bincount(tokens, minlength=5).double()
    expected = torch.tensor(probabilities, dtype=torch.float64) * len(tokens)
    assert_close(expected.sum().item(), float(len(tokens)), rtol=1e-6, atol=0)
    possible = expected > 0
    if counts[~possible].sum():
        return float("inf")
    return ((counts - expected)[possible].square() / expected[possible]).sum().item()


@pytest.mark.parametrize("parameters", EXPECTED)
def test_frequencies_of_sampled_tokens_fit_the_distribution(parameters):
    sampling, probabilities = EXPECTED[parameters]
    freedom = sum(p > 0 for p in probabilities) - 1
    assert chi_square(drawn(sampling), probabilities) < LIMIT.get(freedom, 1e-9)


def test_a_distribution_that_is_slightly_wrong_is_noticed():
    assert chi_square(drawn(SamplingConfig(temperature=1.03)), PROBABILITIES) > LIMIT[4]


def test_temperature_0_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.9, 4.8]])
    assert sample(logits, SamplingConfig(temperature=0), None).tolist() == [1, 0]


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 2)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(uniform, token):
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]])
    numbers = torch.tensor([uniform], dtype=torch.float64)
    assert sample(logits, SamplingConfig(), numbers).item() == token


def test_rows_with_parameters_of_their_own_are_drawn_as_each_alone():
    samplings = 9 * [SamplingConfig(), SamplingConfig(temperature=0), SamplingConfig(top_k=3),
                     SamplingConfig(top_p=0.5), SamplingConfig(repetition_penalty=3.0)]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(samplings), 9, generator=generator)
    uniform = torch.rand(len(samplings), generator=generator).tolist()
    even = torch.arange(9) % 2 == 0
    seen = [even if s.repetition_penalty != 1 else None for s in samplings]
    tokens, logprobs = draw(logits, samplings, uniform, seen)
    for i in range(len(tokens)):
        mine = slice(i, i + 1)
        assert draw(logits[mine], samplings[mine], uniform[mine], seen[mine])[0].equal(tokens[mine])
    assert_close(logprobs, logits.log_softmax(-1)[range(len(tokens)), tokens])


@pytest.mark.parametrize("vocabulary", [4096, 4097, 10_000, 12 * 1024])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 4050}])
def test_the_tokens_of_a_large_vocabulary_are_those_of_one_running_sum(vocabulary, cut):
    """They are searched by blocks, the last of which is not full, some without possible tokens."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(500, vocabulary, generator=generator)
    logits[::2, 256:1024] = -torch.inf
    logits[::3, -300:] = -torch.inf
    uniform = torch.rand(500, dtype=torch.float64, generator=generator)
    uniform[:6], uniform[6:12] = 0.0, 1 - 2**-53
    tokens = sample(logits, SamplingConfig(**cut), uniform)
    probabilities, order = logits.softmax(-1).sort(descending=True) if cut else (
        logits.softmax(-1), torch.arange(vocabulary).expand_as(logits))
    cumulative = probabilities.double().cumsum(-1)
    kept = torch.full((500,), cut.get("top_k", vocabulary)).clamp(max=vocabulary)
    if "top_p" in cut:
        kept = (cumulative - probabilities < cut["top_p"]).sum(-1)
    total = cumulative.gather(-1, kept[:, None] - 1)
    expected = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    # Where the number is at the border of two tokens, up to fp32 rounding, either is right.
    place = (order == tokens[:, None]).int().argmax(-1, keepdim=True)
    upper = cumulative.gather(-1, place) / total
    lower = upper - probabilities.gather(-1, place) / total
    inside = (uniform[:, None] >= lower - 1e-6) & (uniform[:, None] <= upper + 1e-6)
    assert inside.all()
    assert (place == expected).float().mean() > 0.99
    assert (probabilities.gather(-1, place) > 0).all()
