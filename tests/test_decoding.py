"""Sampling: the tokens of a batch, and the distribution they are drawn from."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from alpaca_rlhf.utils import rl_math
from alpaca_rlhf.utils.model.causal_lm import response_logits
from alpaca_rlhf.utils.model.decoding import SamplingConfig, generate, sample

GREEDY = SamplingConfig(max_new_tokens=10, temperature=0)
NEVER = torch.tensor([-1])


@pytest.fixture(scope="module")
def model(small):
    return small.causal_lm()


@pytest.fixture(scope="module")
def ends(small, model):
    """Two ids that the greedy policy writes in the midst of some of its replies."""
    batch = small.prompts(8)
    tokens = generate(model, batch.input_ids, batch.attention_mask, GREEDY, NEVER, pad_id=0)
    return tokens[0, 3].item(), tokens[3, 5].item()


def real(tokens, ends):
    """Each row up to its end."""
    kept = rl_math.response_mask(tokens, torch.tensor(ends)).bool()
    return [row[mask].tolist() for row, mask in zip(tokens, kept, strict=True)]


def test_a_greedy_batch_gives_the_tokens_that_each_prompt_alone_gives(small, model, ends):
    batch = small.prompts(8)
    assert not batch.attention_mask.all(), "no row is padded"
    together = generate(
        model, batch.input_ids, batch.attention_mask, GREEDY, torch.tensor(ends), pad_id=3
    )
    alone = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        prompt = ids[mask.bool()].unsqueeze(0)
        reply = generate(
            model, prompt, torch.ones_like(prompt), GREEDY, torch.tensor(ends), pad_id=3
        )
        alone += real(reply, ends)
    assert real(together, ends) == alone
    assert len({len(row) for row in alone}) > 2, "the replies are of one length"


def test_a_model_with_absolute_positions_writes_the_same_in_a_batch_and_alone(small):
    """LLaMA sees distances only; here a position that counts padding would show."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(small.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
        initializer_range=0.5,
    )).eval()
    batch = small.prompts(6)
    together = generate(model, batch.input_ids, batch.attention_mask, GREEDY, NEVER, pad_id=3)
    for row, ids, mask in zip(together, batch.input_ids, batch.attention_mask, strict=True):
        prompt = ids[mask.bool()].unsqueeze(0)
        alone = generate(model, prompt, torch.ones_like(prompt), GREEDY, NEVER, pad_id=3)
        assert row.tolist() == alone[0].tolist()
        with torch.no_grad():
            given = response_logits(
                model, torch.cat([ids, row]).unsqueeze(0),
                torch.cat([mask, torch.ones_like(row)]).unsqueeze(0), len(row),
            )
        assert given.argmax(-1)[0].tolist() == row.tolist()


def test_a_greedy_batch_gives_what_transformers_gives(small, model, ends):
    batch = small.prompts(8)
    ours = generate(
        model, batch.input_ids, batch.attention_mask, GREEDY, torch.tensor(ends), pad_id=3
    )
    theirs = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
        max_new_tokens=10, eos_token_id=list(ends), pad_token_id=3,
    )[:, batch.input_ids.shape[1] :]
    assert ours.tolist() == theirs.tolist()


def test_each_of_several_eos_ids_ends_a_reply(small, model, ends):
    batch = small.prompts(8)
    for end in ends:
        tokens = generate(
            model, batch.input_ids, batch.attention_mask, GREEDY, torch.tensor(ends), pad_id=3
        )
        assert any(row[-1] == end and len(row) < 10 for row in real(tokens, ends))


def test_a_row_that_has_stopped_is_never_extended(small, model):
    batch = small.prompts(8)
    eos = torch.arange(0, len(small.tokenizer), 4)
    tokens = generate(
        model, batch.input_ids, batch.attention_mask, SamplingConfig(12), eos, pad_id=3,
        generator=torch.Generator().manual_seed(1),
    )
    after = rl_math.response_mask(tokens, eos) == 0
    assert after.any()
    assert tokens[after].eq(3).all()


def test_decoding_stops_when_the_last_row_has_stopped(small, model):
    batch = small.prompts(4)
    every_id = torch.arange(len(small.tokenizer))
    tokens = generate(
        model, batch.input_ids, batch.attention_mask, SamplingConfig(12), every_id, pad_id=3
    )
    assert tokens.shape == (4, 1)


def test_one_seed_gives_one_set_of_replies_and_another_seed_another(small, model):
    batch = small.prompts(4)

    def draw(seed):
        return generate(
            model, batch.input_ids, batch.attention_mask, SamplingConfig(8), NEVER, pad_id=3,
            generator=torch.Generator().manual_seed(seed),
        )

    assert draw(5).equal(draw(5))
    assert not draw(5).equal(draw(6))


PROBABILITIES = [0.5, 0.25, 0.15, 0.07, 0.03]
# What each setting makes of them, by hand.
EXPECTED = {
    "plain": (SamplingConfig(1), PROBABILITIES),
    "temperature 0.5": (SamplingConfig(1, temperature=0.5),
                        [p * p / 0.3408 for p in PROBABILITIES]),
    "temperature 2": (SamplingConfig(1, temperature=2.0),
                      [p**0.5 / 2.0321853 for p in PROBABILITIES]),
    "top_k 3": (SamplingConfig(1, top_k=3), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
    "top_p 0.7": (SamplingConfig(1, top_p=0.7), [2 / 3, 1 / 3, 0, 0, 0]),
    "top_p 0.8": (SamplingConfig(1, top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
    "top_p 0.01": (SamplingConfig(1, top_p=0.01), [1, 0, 0, 0, 0]),
    "top_k 4, then top_p 0.75": (SamplingConfig(1, top_p=0.75, top_k=4),
                                 # 0.5 / 0.97 + 0.25 / 0.97 is over 0.75 already
                                 [2 / 3, 1 / 3, 0, 0, 0]),
    "top_k 99": (SamplingConfig(1, top_k=99), PROBABILITIES),
}
# Chi-square that chance exceeds once in a thousand, by degrees of freedom.
LIMIT = {1: 10.83, 2: 13.82, 4: 18.47}


@pytest.mark.parametrize("setting", EXPECTED)
def test_frequencies_of_sampled_tokens_fit_the_distribution(setting):
    sampling, expected = EXPECTED[setting]
    # The likeliest does not stand first, so an order that is lost shows.
    order = torch.tensor([3, 0, 4, 2, 1])
    draws = 20_000
    logits = torch.tensor(PROBABILITIES)[order].log().expand(draws, 5)
    tokens = sample(logits, sampling, torch.Generator().manual_seed(11))
    counts = torch.bincount(order[tokens], minlength=5).double()
    hoped = torch.tensor(expected, dtype=torch.float64) * draws
    assert_close(hoped.sum().item(), float(draws), rtol=1e-6, atol=0)
    assert counts[hoped == 0].sum() == 0
    possible = hoped > 0
    if possible.sum() > 1:
        chi_square = ((counts - hoped)[possible].square() / hoped[possible]).sum()
        assert chi_square < LIMIT[int(possible.sum()) - 1]


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.9, 4.8]])
    assert sample(logits, SamplingConfig(1, temperature=0), None).tolist() == [1, 0]


def test_keeping_step_with_other_ranks_draws_nothing(small, model, monkeypatch):
    """A rank whose replies have ended goes on for the others, and its generator stands still."""
    batch = small.prompts(4)
    every_id = torch.arange(len(small.tokenizer))
    after = []
    for in_step in (False, True):
        monkeypatch.setattr(
            "alpaca_rlhf.utils.distributed.max_over_ranks", lambda flag: torch.ones_like(flag)
        )
        generator = torch.Generator().manual_seed(1)
        tokens = generate(
            model, batch.input_ids, batch.attention_mask, SamplingConfig(5), every_id, pad_id=3,
            generator=generator, in_step=in_step,
        )
        assert tokens.shape == (4, 5 if in_step else 1)
        assert tokens[:, 1:].eq(3).all()
        after.append(generator.get_state())
    assert after[0].equal(after[1])
