"""Continuous batching: responses do not depend on how they are batched, and no work is wasted."""

import json
from itertools import islice

import pytest
import torch
from plain import response_logits
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

GREEDY = SamplingConfig(10, temperature=0)
NEVER = torch.tensor([-1])
PAD = 3


@pytest.fixture(scope="module")
def model(small):
    return small.causal_lm()


@pytest.fixture(scope="module")
def compiled(model):
    step = LlamaStep(model)
    step.fill()
    return step


@pytest.fixture(scope="module")
def ends(small, model):
    """Two ids that the greedy policy generates in the middle of some responses."""
    tokens = generate(model, small.prompts(8)).responses
    return torch.tensor([tokens[0, 3].item(), tokens[3, 5].item()])


def generate(model, prompts, sampling=GREEDY, eos=NEVER, seed=1, **decoder):
    return Decoder(model, **decoder).generate(
        prompts, sampling, eos, PAD, torch.Generator().manual_seed(seed)
    )


def cut(tokens, masks):
    return [row[mask.bool()].tolist() for row, mask in zip(tokens, masks, strict=True)]


def responses(*given, **changes):
    """Return the tokens of each response up to its end."""
    rollout = generate(*given, **changes)
    return cut(rollout.responses, rollout.response_mask)


def by_transformers(model, prompts, eos, tokens, **options):
    """Return greedy responses up to their ends."""
    made = model.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, do_sample=False,
        max_new_tokens=tokens, eos_token_id=eos.tolist(), pad_token_id=PAD, **options,
    )[:, prompts.input_ids.shape[1] :]
    return cut(made, rl_math.response_mask(made, eos))


# ------------------------------------------------------------------- greedy, token by token


def embedded_prompts():
    """Return 200 prompts of different lengths."""
    return [messages for messages, _ in islice(assistant_world.pretraining_texts(3), 200)]


def alpaca_eval_prompts():
    if not ALPACA_EVAL.is_file():
        pytest.skip("no alpaca_eval in ../shared/data")
    rows = sorted(json.loads(text_of(ALPACA_EVAL)), key=lambda row: len(row["instruction"]))[:200]
    return [[{"role": "user", "content": row["instruction"]}] for row in rows]


@pytest.mark.parametrize("prompts", [embedded_prompts, alpaca_eval_prompts])
def test_200_prompts_get_the_tokens_that_transformers_gives_however_they_are_batched(
    small, model, compiled, ends, prompts
):
    # The tiny model has a last position.
    rows = [{"prompt_ids": small.chat.prompt_ids(messages)[-90:]} for messages in prompts()]
    whole, sampling = collate_prompts(rows, PAD), SamplingConfig(12, temperature=0)
    expected = by_transformers(model, whole, ends, 12)
    assert len(expected) == 200
    assert len({len(response) for response in expected}) > 5
    for how in ({}, {"slots": 16}, {"slots": 16, "step": compiled}, {"step": compiled},
                {"slots": 16, "step": compiled, "look_every": 5}):
        assert responses(model, whole, sampling, ends, **how) == expected
    for row, response in islice(zip(rows, expected, strict=True), 40):
        assert responses(model, collate_prompts([row], PAD), sampling, ends) == [response]


def test_a_model_with_absolute_positions_generates_the_same_in_a_batch_and_alone(small):
    """In LLaMA only distances count; here positions that count padding would show."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(small.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
        initializer_range=0.5,
    )).eval()
    rollout = generate(model, small.prompts(6), slots=2)
    with torch.no_grad():
        given = response_logits(model, rollout.input_ids, rollout.attention_mask, 10)
    assert given.argmax(-1).equal(rollout.responses)


def test_a_model_with_a_sliding_window_generates_what_transformers_generates(small):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=len(small.tokenizer), hidden_size=32, intermediate_size=48, sliding_window=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )).eval()
    prompts = small.prompts(8)
    assert prompts.input_ids.shape[1] > 8
    assert responses(model, prompts, slots=3) == by_transformers(model, prompts, NEVER, 10)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_how_often_the_tokens_are_looked_at_changes_transfers_only(
    small, model, ends, monkeypatch, penalty
):
    looks, right = [], DecodingSession._append
    monkeypatch.setattr(DecodingSession, "_append",
                        lambda *given: looks.append(1) or right(*given))
    sampling = SamplingConfig(20, num_generations=2, repetition_penalty=penalty)
    expected = generate(model, small.prompts(8), sampling, ends, slots=5)
    often, found = len(looks), []
    for every in (2, 7, 100):
        looks.clear()
        rollout = generate(model, small.prompts(8), sampling, ends, slots=5, look_every=every)
        assert rollout.input_ids.equal(expected.input_ids)
        torch.testing.assert_close(
            rollout.decoded_logprobs, expected.decoded_logprobs, rtol=0, atol=1e-5)
        found.append(len(looks))
    assert often > 1.5 * found[0] > 1.5 * found[1] > 1.5 * found[2]


@pytest.mark.parametrize("copies", [1, 3])
def test_columns_move_back_when_the_front_reaches_the_end_of_the_buffers(
    small, model, ends, monkeypatch, copies
):
    prompts, sampling = small.prompts(8), SamplingConfig(10, 0, num_generations=copies)
    expected = responses(model, prompts, sampling, ends)
    shifts, right = [], kv_cache.SlotCache.make_room

    def watched(self, width=0):
        before = self.front
        right(self, width)
        shifts.append(self.front - before)

    monkeypatch.setattr(kv_cache, "SLACK", 1)
    monkeypatch.setattr(kv_cache.SlotCache, "make_room", watched)
    assert responses(model, prompts, sampling, ends, slots=3) == expected
    assert sum(shift < 0 for shift in shifts) > 1


def test_each_of_several_eos_ids_ends_a_response_and_nothing_follows_it(small, model, ends):
    rollout = generate(model, small.prompts(8), eos=ends, slots=3)
    rows = cut(rollout.responses, rollout.response_mask)
    for end in ends.tolist():
        assert any(row[-1] == end and len(row) < 10 for row in rows)
    for row in rows:
        assert not set(row[:-1]) & set(ends.tolist())
    assert rollout.responses[rollout.response_mask == 0].eq(PAD).all()
    assert rollout.response_length == max(map(len, rows))


def test_no_step_is_made_if_every_first_token_ends_its_response(small, model):
    every_id = torch.arange(len(small.tokenizer))
    rollout = generate(model, small.prompts(4), SamplingConfig(12), every_id, slots=2)
    assert rollout.response_mask.tolist() == [[1]] * 4


# ------------------------------------------------------------------- no work is wasted


def forward_passes(model, run):
    """Return the shapes of the ids that went through the model."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return shapes


def test_a_response_that_has_ended_leaves_its_slot_to_the_next(small, model, ends):
    lengths = [len(row) for row in responses(model, small.prompts(8), eos=ends)]
    shapes = forward_passes(model, lambda: generate(model, small.prompts(8), eos=ends, slots=2))
    steps = [rows for rows, columns in shapes if columns == 1]
    in_batches = sum(max(lengths[i : i + 2]) - 1 for i in range(0, 8, 2))
    assert sum(length - 1 for length in lengths) <= sum(steps) < 2 * in_batches


def test_prompts_of_similar_length_are_prefilled_together_and_responses_share_a_prefill(
    small, model
):
    prompts = small.prompts(8)
    lengths = sorted(prompts.attention_mask.sum(-1).tolist(), reverse=True)
    shapes = forward_passes(
        model, lambda: generate(model, prompts, SamplingConfig(3, num_generations=2), slots=4)
    )
    assert [s for s in shapes if s[1] > 1] == [(2, lengths[i]) for i in range(0, 8, 2)]


def test_the_batch_shrinks_when_no_response_is_left_for_the_slots(small, model):
    often = torch.arange(0, len(small.tokenizer), 4)
    shapes = forward_passes(
        model, lambda: generate(model, small.prompts(8), SamplingConfig(12), often)
    )
    rows = [rows for rows, columns in shapes if columns == 1]
    assert rows[0] == 8
    assert rows[-1] <= 4


def test_buffers_are_used_again_and_can_be_released(small, model):
    cache = kv_cache.SlotCache()
    generate(model, small.prompts(4), cache=cache)
    keys = cache.layers[0].keys
    generate(model, small.prompts(3), cache=cache)
    assert cache.layers[0].keys is keys
    cache.release()
    assert cache.layers == []
    generate(model, small.prompts(3), cache=cache)
    assert cache.layers[0].keys.shape[0] == 3


# ------------------------------------------------------------------- sampled


@pytest.mark.parametrize("sampling", [
    SamplingConfig(10, num_generations=2),
    SamplingConfig(10, 0, repetition_penalty=1.8, num_generations=2),
])
def test_a_response_does_not_depend_on_the_responses_it_is_batched_with(
    small, model, compiled, ends, sampling
):
    whole = responses(model, small.prompts(8), sampling, ends)
    assert whole[::2] != responses(model, small.prompts(8), GREEDY, ends)
    for how in ({"slots": 3}, {"slots": 3, "step": compiled}):
        assert responses(model, small.prompts(8), sampling, ends, **how) == whole


def test_a_seed_fixes_the_responses_and_how_many_numbers_are_taken(small, model):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        rollout = Decoder(model).generate(
            small.prompts(4), SamplingConfig(8), NEVER, PAD, generator)
        return rollout.input_ids, generator.get_state()

    ids, state = run(5)
    again, other = run(5)[0], run(6)[0]
    assert ids.equal(again)
    assert not ids.equal(other)
    expected = torch.Generator().manual_seed(5)
    torch.rand(4 + 1, 8, dtype=torch.float64, generator=expected)
    assert state.equal(expected.get_state())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_logprobs_of_decoding_are_those_of_a_whole_forward_pass(
    small, model, compiled, ends, temperature, is_compiled
):
    sampling = SamplingConfig(10, temperature, top_p=0.9, repetition_penalty=1.3)
    step = compiled if is_compiled else None
    rollout = generate(model, small.prompts(8), sampling, ends, slots=3, step=step)
    with torch.no_grad():
        logits = response_logits(
            model, rollout.input_ids, rollout.attention_mask, rollout.response_length)
    expected = rl_math.token_logprobs(logits, rollout.responses, temperature)
    assert_close(
        rollout.decoded_logprobs, expected * rollout.response_mask, rtol=0, atol=1e-5)


def test_the_repetition_penalty_is_that_of_transformers(small, model):
    prompts = small.prompts(1)
    penalized = responses(model, prompts, SamplingConfig(24, 0, repetition_penalty=4.0))
    assert penalized == by_transformers(model, prompts, NEVER, 24, repetition_penalty=4.0)
    assert penalized != responses(model, prompts, SamplingConfig(24, 0))


def test_tokens_are_drawn_from_the_distribution_of_the_model(small, model, compiled):
    """First and second tokens of 40,000 responses to one prompt, by prefill and by steps."""
    prompts, sampling = small.prompts(1), SamplingConfig(2, num_generations=4000)
    with torch.no_grad():
        first = model(input_ids=prompts.input_ids).logits[0, -1].softmax(-1).double()
        likely = first.argmax()
        ids = torch.cat([prompts.input_ids[0], likely[None]])[None]
        second = model(input_ids=ids).logits[0, -1].softmax(-1).double()
    drawn = torch.cat([
        generate(model, prompts, sampling, seed=seed, step=compiled).responses
        for seed in range(10)
    ])
    assert len(drawn) == 40_000
    after_likely = drawn[drawn[:, 0] == likely][:, 1]
    for tokens, probabilities in ((drawn[:, 0], first), (after_likely, second)):
        # The nine most likely ids, and all others as one.
        top = probabilities.topk(9).indices
        counts = torch.stack([(tokens == i).sum() for i in top]).double()
        counts = torch.cat([counts, len(tokens) - counts.sum()[None]])
        expected = torch.cat([probabilities[top], 1 - probabilities[top].sum()[None]]) * len(tokens)
        # Chance exceeds this once in a thousand, with 9 degrees of freedom.
        assert ((counts - expected).square() / expected).sum() < 27.88


# ------------------------------------------------------------------- in step under ZeRO-3


def test_a_rank_that_is_done_makes_forward_passes_for_the_others_and_keeps_its_responses(
    small, model, ends, monkeypatch
):
    expected = generate(model, small.prompts(4), SamplingConfig(5), ends)
    turns = []

    def others_are_busy(flag):
        turns.append(flag.item())
        return torch.tensor(float(len(turns) <= 20))

    monkeypatch.setattr("alpaca_rlhf.utils.distributed.max_over_ranks", others_are_busy)
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
    return cut(batch.input_ids, batch.attention_mask)


def alone(model, prompt, sampling, seed, eos):
    session = DecodingSession(Decoder(model), slots=1, eos_ids=eos)
    response = session.add(prompt, sampling, seed)
    while session.busy:
        session.step()
    return response.tokens


@pytest.mark.parametrize("is_compiled", [False, True])
def test_responses_that_join_at_any_step_with_their_own_parameters_are_those_of_each_alone(
    small, model, compiled, ends, is_compiled
):
    samplings = [SamplingConfig(30, 0), SamplingConfig(5), SamplingConfig(20, 0.7, 0.9),
                 SamplingConfig(12, repetition_penalty=1.5), SamplingConfig(1), SamplingConfig(40)]
    # The shortest prompt comes first and a long one last, so the cache grows in both directions.
    rows, eos = sorted(prompt_rows(small, 6), key=len), ends.tolist()
    rows[-1] = rows[-1] * 4
    decoder = Decoder(model, step=compiled if is_compiled else None)
    session = DecodingSession(decoder, slots=3, eos_ids=eos)
    added, streamed = [], {}
    for turn in range(200):
        if turn % 3 == 0 and len(added) < 6 and session.free:
            added.append(session.add(rows[len(added)], samplings[len(added)], seed=len(added)))
        for response in session.step():
            streamed.setdefault(response, []).append(response.tokens[-1])
            full = len(response.tokens) == response.sampling.max_new_tokens
            assert response.ended is (full or response.tokens[-1] in eos)
    assert not session.busy
    assert session.free == 3
    expected = [alone(model, *given, seed, eos)
                for seed, given in enumerate(zip(rows, samplings, strict=True))]
    assert [response.tokens for response in added] == expected
    assert [streamed[response] for response in added] == expected


def test_a_cancelled_response_keeps_its_tokens_and_leaves_its_slot_to_the_next(small, model):
    session = DecodingSession(Decoder(model), slots=1, eos_ids=[])
    running, queued, last = (session.add(row, GREEDY) for row in prompt_rows(small, 3))
    assert session.free == -2
    for _ in range(3):
        assert session.step() == [running]
    session.cancel(running)
    session.cancel(queued)
    while session.busy:
        assert session.step() == [last]
    assert len(running.tokens) == 3
    assert queued.tokens == []
    assert last.tokens == alone(model, prompt_rows(small, 3)[2], GREEDY, None, [])


def test_only_as_many_rows_are_decoded_as_there_are_responses(small, model):
    session = DecodingSession(Decoder(model), slots=8, eos_ids=[])

    def run(count):
        for row in prompt_rows(small, count):
            session.add(row, GREEDY)
        while session.busy:
            session.step()

    for count in (1, 4, 1):
        passes = forward_passes(model, lambda count=count: run(count))
        assert passes[1:] == [(count, 1)] * 9
