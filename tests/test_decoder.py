"""Decoding: the replies of a batch that is kept full, and the distribution they are drawn from."""

import json
from itertools import islice

import pytest
import torch
from test_shared_data import ALPACA_EVAL, text_of
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.utils import rl_math
from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.data.batches import collate_prompts
from alpaca_rlhf.utils.generation import kv_cache
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.decoder import Decoder, DecodingSession
from alpaca_rlhf.utils.generation.sampling import sample
from alpaca_rlhf.utils.model.causal_lm import response_logits

GREEDY = SamplingConfig(max_new_tokens=10, temperature=0)
NEVER = torch.tensor([-1])
PAD = 3


@pytest.fixture(scope="module")
def model(small):
    return small.causal_lm()


@pytest.fixture(scope="module")
def ends(small, model):
    """Two ids that the greedy policy writes in the midst of some of its replies."""
    tokens = responses(generate(model, small.prompts(8)))
    return torch.tensor([tokens[0, 3].item(), tokens[3, 5].item()])


def generate(model, prompts, sampling=GREEDY, eos=NEVER, seed=1, **decoder):
    return Decoder(model, **decoder).generate(
        prompts, sampling, eos, PAD, torch.Generator().manual_seed(seed)
    )


def filled(step):
    step.fill()
    return step


def responses(batch):
    return batch.responses


def replies(batch):
    """Each reply up to its end."""
    return [row[mask.bool()].tolist()
            for row, mask in zip(responses(batch), batch.response_mask, strict=True)]


def by_transformers(model, prompts, eos, tokens):
    """Greedy, each reply up to its end."""
    made = model.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, do_sample=False,
        max_new_tokens=tokens, eos_token_id=eos.tolist(), pad_token_id=PAD,
    )[:, prompts.input_ids.shape[1] :]
    kept = rl_math.response_mask(made, eos).bool()
    return [row[mask].tolist() for row, mask in zip(made, kept, strict=True)]


# ------------------------------------------------------------------- greedy, token by token


def embedded_prompts():
    """Two hundred, of unlike length."""
    return [messages for messages, _ in islice(assistant_world.pretraining_texts(3), 200)]


def alpaca_eval_prompts():
    if not ALPACA_EVAL.is_file():
        pytest.skip("no alpaca_eval in ../shared/data")
    rows = sorted(json.loads(text_of(ALPACA_EVAL)), key=lambda row: len(row["instruction"]))[:200]
    return [[{"role": "user", "content": row["instruction"]}] for row in rows]


@pytest.mark.parametrize("prompts", [embedded_prompts, alpaca_eval_prompts])
def test_200_prompts_get_the_tokens_that_transformers_gives_however_they_are_batched(
    small, model, ends, prompts
):
    # Past a last position the tiny model has nothing to say.
    rows = [small.form.prompt_ids(messages)[-90:] for messages in prompts()]
    whole = collate_prompts([{"prompt_ids": row} for row in rows], PAD)
    assert len(rows) == 200
    expected = by_transformers(model, whole, ends, 12)
    assert len({len(reply) for reply in expected}) > 5
    sampling = SamplingConfig(12, temperature=0)
    step = filled(LlamaStep(model))
    for how in ({}, {"slots": 16}, {"slots": 16, "step": step}, {"step": step}):
        assert replies(generate(model, whole, sampling, ends, **how)) == expected
    alone = [
        reply for row in rows[:40]
        for reply in replies(generate(model, collate_prompts([{"prompt_ids": row}], PAD), sampling,
                                      ends))
    ]
    assert alone == expected[:40]


def test_a_model_with_absolute_positions_writes_the_same_in_a_batch_and_alone(small):
    """LLaMA sees distances only; here a position that counts padding would show."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(small.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
        initializer_range=0.5,
    )).eval()
    prompts = small.prompts(6)
    together = responses(generate(model, prompts, slots=2))
    for row, ids, mask in zip(together, prompts.input_ids, prompts.attention_mask, strict=True):
        with torch.no_grad():
            given = response_logits(
                model, torch.cat([ids, row]).unsqueeze(0),
                torch.cat([mask, torch.ones_like(row)]).unsqueeze(0), len(row),
            )
        assert given.argmax(-1)[0].tolist() == row.tolist()


def test_a_model_with_a_sliding_window_writes_what_transformers_writes(small):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(small.tokenizer), hidden_size=32, intermediate_size=48, sliding_window=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )).eval()
    prompts = small.prompts(8)
    assert prompts.input_ids.shape[1] > 8
    expected = by_transformers(model, prompts, NEVER, 10)
    assert replies(generate(model, prompts, slots=3)) == expected


@pytest.mark.parametrize("copies", [1, 3])
def test_the_columns_move_back_when_the_front_comes_to_the_buffers_end(
    small, model, ends, monkeypatch, copies
):
    prompts, sampling = small.prompts(8), SamplingConfig(10, 0, num_generations=copies)
    expected = replies(generate(model, prompts, sampling, ends))
    moves, right = [], kv_cache._Layer.move

    def counted(self, *where):
        moves.append(where)
        right(self, *where)

    monkeypatch.setattr(kv_cache, "SLACK", 1)
    monkeypatch.setattr(kv_cache._Layer, "move", counted)
    assert replies(generate(model, prompts, sampling, ends, slots=3)) == expected
    assert len(set(moves)) > 1


def test_each_of_several_eos_ids_ends_a_reply_and_no_reply_goes_on_after_one(small, model, ends):
    batch = generate(model, small.prompts(8), eos=ends, slots=3)
    lengths = batch.response_mask.sum(-1)
    for end in ends.tolist():
        assert any(row[-1] == end and len(row) < 10 for row in replies(batch))
    for row in replies(batch):
        assert not set(row[:-1]) & set(ends.tolist())
    assert responses(batch)[batch.response_mask == 0].eq(PAD).all()
    assert batch.response_mask.shape[1] == lengths.max()


def test_a_request_in_which_every_first_token_ends_the_reply_takes_no_step(small, model):
    every_id = torch.arange(len(small.tokenizer))
    batch = generate(model, small.prompts(4), SamplingConfig(12), every_id, slots=2)
    assert batch.response_mask.tolist() == [[1]] * 4


# ------------------------------------------------------------------- what is saved


def forward_passes(model, run):
    """Shapes of the ids that went through the model."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return shapes


def test_a_row_that_has_ended_leaves_its_slot_to_the_next_prompt(small, model, ends):
    lengths = [len(reply) for reply in replies(generate(model, small.prompts(8), eos=ends))]
    shapes = forward_passes(
        model, lambda: generate(model, small.prompts(8), eos=ends, slots=2)
    )
    steps = [rows for rows, columns in shapes if columns == 1]
    in_batches = sum(max(lengths[i : i + 2]) - 1 for i in range(0, 8, 2))
    assert sum(length - 1 for length in lengths) <= sum(steps) < 2 * in_batches


def test_prompts_of_like_length_are_prefilled_together_and_replies_share_a_prefill(small, model):
    prompts = small.prompts(8)
    lengths = sorted(prompts.attention_mask.sum(-1).tolist(), reverse=True)
    shapes = forward_passes(
        model, lambda: generate(model, prompts, SamplingConfig(3, num_generations=2), slots=4)
    )
    assert [s for s in shapes if s[1] > 1] == [(2, lengths[i]) for i in range(0, 8, 2)]


def test_the_batch_shrinks_when_nothing_waits_for_the_slots(small, model):
    often = torch.arange(0, len(small.tokenizer), 4)
    shapes = forward_passes(
        model, lambda: generate(model, small.prompts(8), SamplingConfig(12), often)
    )
    rows = [rows for rows, columns in shapes if columns == 1]
    assert rows[0] == 8
    assert rows[-1] <= 4


def test_the_buffers_are_used_again_and_can_be_released(small, model):
    cache = kv_cache.SlotCache()
    generate(model, small.prompts(4), cache=cache)
    keys = cache.layers[0].keys
    generate(model, small.prompts(3), cache=cache)
    assert cache.layers[0].keys is keys
    cache.release()
    assert cache.layers == []
    generate(model, small.prompts(3), cache=cache)
    assert cache.layers[0].keys.shape[0] == 3


# ------------------------------------------------------------------- sampling


def test_a_reply_is_drawn_alike_whatever_it_is_batched_with(small, model, ends):
    sampling = SamplingConfig(10, num_generations=2)
    whole = replies(generate(model, small.prompts(8), sampling, ends))
    assert replies(generate(model, small.prompts(8), sampling, ends, slots=3)) == whole
    step = filled(LlamaStep(model))
    assert replies(generate(model, small.prompts(8), sampling, ends, slots=3, step=step)) == whole


def test_one_seed_gives_one_set_of_replies_and_another_seed_another(small, model):
    def draw(seed):
        return generate(model, small.prompts(4), SamplingConfig(8), seed=seed).input_ids

    assert draw(5).equal(draw(5))
    assert not draw(5).equal(draw(6))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("compiled", [False, True])
def test_logprobs_of_decoding_are_those_of_a_whole_forward_pass(
    small, model, ends, temperature, compiled
):
    sampling = SamplingConfig(10, temperature, top_p=0.9, repetition_penalty=1.3)
    step = filled(LlamaStep(model)) if compiled else None
    batch = generate(model, small.prompts(8), sampling, ends, slots=3, step=step)
    with torch.no_grad():
        logits = response_logits(
            model, batch.input_ids, batch.attention_mask, batch.response_mask.shape[1]
        )
    expected = rl_math.token_logprobs(logits, responses(batch), temperature) * batch.response_mask
    assert_close(batch.decoded_logprobs, expected, rtol=0, atol=1e-5)


def test_the_repetition_penalty_is_that_of_transformers(small, model):
    prompts = small.prompts(1)
    penalised = replies(generate(model, prompts, SamplingConfig(24, 0, repetition_penalty=4.0)))
    expected = model.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, do_sample=False,
        max_new_tokens=24, eos_token_id=None, pad_token_id=PAD, repetition_penalty=4.0,
    )[:, prompts.input_ids.shape[1] :]
    plain = replies(generate(model, prompts, SamplingConfig(24, 0)))
    assert penalised == expected.tolist() != plain


def test_the_repetition_penalty_goes_with_its_row(small, model, ends):
    sampling = SamplingConfig(10, 0, repetition_penalty=1.8, num_generations=2)
    whole = replies(generate(model, small.prompts(8), sampling, ends))
    assert whole != replies(generate(model, small.prompts(8), eos=ends))
    assert replies(generate(model, small.prompts(8), sampling, ends, slots=3)) == whole


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
    # The two likeliest are in the text: their logits, all negative, are doubled.
    "repetition_penalty 2": (SamplingConfig(1, repetition_penalty=2.0),
                             [p / 0.5625 for p in (0.25, 0.0625, 0.15, 0.07, 0.03)]),
    "top_k 99": (SamplingConfig(1, top_k=99), PROBABILITIES),
}
# Chi-square that chance exceeds once in a thousand, by degrees of freedom.
LIMIT = {1: 10.83, 2: 13.82, 4: 18.47}
DRAWS = 200_000


def chi_square(tokens, order, expected):
    """Of tokens whose logits stood in some order; infinite if one was drawn that cannot be."""
    counts = torch.bincount(order[tokens], minlength=5).double()
    hoped = torch.tensor(expected, dtype=torch.float64) * len(tokens)
    assert_close(hoped.sum().item(), float(len(tokens)), rtol=1e-6, atol=0)
    if counts[hoped == 0].sum():
        return float("inf")
    possible = hoped > 0
    return ((counts - hoped)[possible].square() / hoped[possible]).sum().item()


# The likeliest does not stand first, so an order that is lost shows.
ORDER = torch.tensor([3, 0, 4, 2, 1])


@pytest.mark.parametrize("setting", EXPECTED)
def test_frequencies_of_sampled_tokens_fit_the_distribution(setting):
    sampling, expected = EXPECTED[setting]
    logits = torch.tensor(PROBABILITIES)[ORDER].log().expand(DRAWS, 5)
    uniform = torch.rand(
        DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(11)
    )
    seen = None
    if sampling.repetition_penalty != 1:
        seen = (ORDER < 2).expand(DRAWS, 5)
    tokens = sample(logits, sampling, uniform, seen)
    possible = sum(p > 0 for p in expected)
    assert chi_square(tokens, ORDER, expected) < LIMIT.get(possible - 1, 1e-9)


def test_a_distribution_that_is_a_little_off_is_noticed():
    logits = torch.tensor(PROBABILITIES)[ORDER].log().expand(DRAWS, 5)
    uniform = torch.rand(
        DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(11)
    )
    tokens = sample(logits, SamplingConfig(1, temperature=1.03), uniform)
    assert chi_square(tokens, ORDER, PROBABILITIES) > LIMIT[4]


def test_decoding_draws_from_the_distribution_of_the_model(small, model):
    """First and second tokens of 40,000 replies to one prompt, through prefill and steps."""
    prompts, sampling = small.prompts(1), SamplingConfig(2, num_generations=4000)
    step = filled(LlamaStep(model))
    with torch.no_grad():
        first = model(input_ids=prompts.input_ids).logits[0, -1].softmax(-1).double()
        likely = first.argmax()
        ids = torch.cat([prompts.input_ids[0], likely[None]])[None]
        second = model(input_ids=ids).logits[0, -1].softmax(-1).double()
    drawn = torch.cat([
        responses(generate(model, prompts, sampling, seed=seed, step=step)) for seed in range(10)
    ])
    assert len(drawn) == 40_000
    for tokens, probabilities in (
        (drawn[:, 0], first), (drawn[drawn[:, 0] == likely][:, 1], second)
    ):
        # The nine likeliest ids, and all others as one.
        top = probabilities.topk(9).indices
        counts = torch.stack([(tokens == i).sum() for i in top]).double()
        hoped = probabilities[top] * len(tokens)
        counts, hoped = (
            torch.cat([part, len(tokens) - part.sum()[None]]) for part in (counts, hoped)
        )
        assert ((counts - hoped).square() / hoped).sum() < 27.88  # 9 degrees, once in a thousand


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 4.9, 4.8]])
    assert sample(logits, SamplingConfig(1, temperature=0), None).tolist() == [1, 0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible(uniform):
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]])
    token = sample(logits, SamplingConfig(1), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() == (2 if uniform else 1)


@pytest.mark.parametrize("vocabulary", [4096, 4097, 10_000, 12 * 1024])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 4050}])
def test_the_tokens_of_a_large_vocabulary_are_those_of_one_running_sum(vocabulary, cut):
    """Found by blocks, the last of them not full, some of them without a token that can be."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(500, vocabulary, generator=generator)
    logits[::2, 256:1024] = -torch.inf
    logits[::3, -300:] = -torch.inf
    uniform = torch.rand(500, dtype=torch.float64, generator=generator)
    uniform[:6], uniform[6:12] = 0.0, 1 - 2**-53
    tokens = sample(logits, SamplingConfig(1, **cut), uniform)
    probabilities, order = logits.softmax(-1).sort(descending=True) if cut else (
        logits.softmax(-1), torch.arange(vocabulary).expand_as(logits))
    cumulative = probabilities.double().cumsum(-1)
    kept = torch.full((500,), vocabulary)
    if "top_k" in cut:
        kept = kept.clamp(max=cut["top_k"])
    if "top_p" in cut:
        kept = (cumulative - probabilities < cut["top_p"]).sum(-1)
    total = cumulative.gather(-1, kept[:, None] - 1)
    expected = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    # Where the number lies at a border between two tokens, to fp32's rounding, either is right.
    drawn = (order == tokens[:, None]).int().argmax(-1, keepdim=True)
    upper = cumulative.gather(-1, drawn) / total
    lower = upper - probabilities.gather(-1, drawn) / total
    inside = (uniform[:, None] >= lower - 1e-6) & (uniform[:, None] <= upper + 1e-6)
    assert inside.all()
    assert (drawn == expected).float().mean() > 0.99
    assert (probabilities.gather(-1, drawn) > 0).all()


# ------------------------------------------------------------------- keeping step under ZeRO-3


def test_a_rank_that_is_done_goes_on_for_the_others_and_its_replies_stay(
    small, model, ends, monkeypatch
):
    expected = generate(model, small.prompts(4), SamplingConfig(5), ends)
    turns = []

    def others_go_on(flag):
        turns.append(flag.item())
        return torch.tensor(float(len(turns) <= 20))

    monkeypatch.setattr("alpaca_rlhf.utils.distributed.max_over_ranks", others_go_on)
    made = []
    passes = forward_passes(model, lambda: made.append(
        generate(model, small.prompts(4), SamplingConfig(5), ends, in_step=True)
    ))
    assert len(passes) == 20
    assert turns.count(0.0) > 10
    assert made[0].input_ids.equal(expected.input_ids)


# ------------------------------------------------------------------- responses that come and go


def prompt_rows(small, count):
    batch = small.prompts(count)
    return [ids[mask.bool()].tolist()
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def alone(model, ids, sampling, seed, eos):
    session = DecodingSession(Decoder(model), slots=1, eos_ids=eos)
    response = session.add(ids, sampling, seed)
    while session.busy:
        session.step()
    return response.tokens


@pytest.mark.parametrize("compiled", [False, True])
def test_responses_that_join_at_any_step_with_their_own_parameters_are_those_of_each_alone(
    small, model, ends, compiled
):
    samplings = [SamplingConfig(30, 0), SamplingConfig(5), SamplingConfig(20, 0.7, 0.9),
                 SamplingConfig(12, repetition_penalty=1.5), SamplingConfig(1), SamplingConfig(40)]
    rows, eos = prompt_rows(small, 6), ends.tolist()
    # The first prompt is the shortest: later ones make the cache grow to both sides.
    rows.sort(key=len)
    rows[-1] = rows[-1] * 4
    step = filled(LlamaStep(model)) if compiled else None
    session = DecodingSession(Decoder(model, step=step), slots=3, eos_ids=eos)
    responses, streamed = [], {}
    for turn in range(200):
        if turn % 3 == 0 and len(responses) < 6 and session.free:
            i = len(responses)
            responses.append(session.add(rows[i], samplings[i], seed=i))
        for response in session.step():
            streamed.setdefault(id(response), []).append(response.tokens[-1])
            assert response.ended is (
                response.tokens[-1] in eos
                or len(response.tokens) == response.sampling.max_new_tokens)
    assert not session.busy
    assert session.free == 3
    expected = [alone(model, *given, seed, eos)
                for seed, given in enumerate(zip(rows, samplings, strict=True))]
    assert [response.tokens for response in responses] == expected
    assert [streamed[id(response)] for response in responses] == expected


def test_a_cancelled_response_keeps_its_tokens_and_leaves_its_slot_to_the_next(small, model):
    first, second, third = prompt_rows(small, 3)
    session = DecodingSession(Decoder(model), slots=1, eos_ids=[])
    sampling = SamplingConfig(8, 0)
    running, queued, last = (session.add(ids, sampling) for ids in (first, second, third))
    assert session.free == -2
    for _ in range(3):
        assert session.step() == [running]
    session.cancel(running)
    session.cancel(queued)
    while session.busy:
        assert session.step() == [last]
    assert len(running.tokens) == 3
    assert queued.tokens == []
    assert last.tokens == alone(model, third, sampling, None, [])


def test_a_single_response_is_decoded_in_a_single_row_however_many_slots_there_are(small, model):
    session = DecodingSession(Decoder(model), slots=8, eos_ids=[])

    def run(count):
        for ids in prompt_rows(small, count):
            session.add(ids, SamplingConfig(6, 0))
        while session.busy:
            session.step()

    assert forward_passes(model, lambda: run(1))[1:] == [(1, 1)] * 5
    assert forward_passes(model, lambda: run(4))[1:] == [(4, 1)] * 5
    assert forward_passes(model, lambda: run(1))[1:] == [(1, 1)] * 5
