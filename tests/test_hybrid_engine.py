"""Generation mode: what holds inside, and that everything is as it was on leaving."""

from functools import partial

import pytest
import torch
from conftest import moved, snapshot

from alpaca_rlhf.training_model.step3_rlhf_finetuning import deepspeed_backend
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rlhf_engine import _built_actor
from alpaca_rlhf.utils.generation import decoder
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.decoder import RolloutRequest, SamplingConfig
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import LoadOptions, load_causal_lm


@pytest.fixture(scope="module")
def engine(small):
    """An actor with dropout, gradient checkpointing and an adapter that has learnt something."""
    engine = small.trained(
        "actor", lora=4,
        load=LoadOptions(dropout=0.3, gradient_checkpointing=True), lora_dropout=0.3,
    )
    torch.manual_seed(4)
    for name, parameter in engine.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return engine


def training_flags(model):
    return {name: module.training for name, module in model.named_modules()}


def hooks(model):
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in
            model.named_modules()}


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_on_leaving_everything_is_as_it_was_also_after_an_exception(engine, enabled, fails):
    engine.train()
    model = engine.module
    before, flags, attached = snapshot(model), training_flags(model), hooks(model)
    try:
        with HybridEngine(engine, enabled).generation_mode():
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert moved(before, model) == set()
    assert training_flags(model) == flags
    assert hooks(model) == attached
    assert not any(layer.merged for layer in lora.lora_layers(model))


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_before_comes_back(engine, training):
    engine.train(training)
    with HybridEngine(engine, enabled=True).generation_mode() as model:
        assert not model.training
    assert engine.module.training is training


@pytest.mark.parametrize("enabled", [False, True])
def test_dropout_is_off_inside(small, engine, enabled):
    engine.train()
    batch = small.prompts(2)
    with HybridEngine(engine, enabled).generation_mode() as model, torch.no_grad():
        first, second = (
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for _ in range(2)
        )
    assert first.equal(second)


def test_the_adapter_is_folded_in_only_where_the_hybrid_engine_is_enabled(engine):
    for enabled in (False, True):
        with HybridEngine(engine, enabled).generation_mode() as model:
            merged = [layer.merged for layer in lora.lora_layers(model)]
        assert merged == [enabled] * 14


def test_sampled_replies_are_the_same_with_and_without_the_hybrid_engine(small, engine):
    class Roles:
        actor = engine
        eos_ids = torch.tensor([small.tokenizer.eos_token_id])

    drawn = [
        small.maker(Roles(), hybrid=hybrid, tokens=10).generate(small.prompts(4))
        for hybrid in (False, True)
    ]
    assert drawn[0].input_ids.equal(drawn[1].input_ids)


def test_below_zero_3_no_token_is_a_collective(engine):
    assert not HybridEngine(engine, enabled=False).decodes_in_step
    assert not HybridEngine(engine, enabled=True).decodes_in_step


def test_the_cache_of_the_accelerator_is_given_back_only_if_asked_for(engine, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    calls = []
    monkeypatch.setattr(type(get_accelerator()), "empty_cache", lambda self: calls.append(1))
    for release, expected in ((False, 0), (True, 1)):
        with HybridEngine(engine, True, release_cache=release).generation_mode():
            pass
        assert len(calls) == expected


# ------------------------------------------------------------------- what decodes


def generated(hybrid, small, tokens=8, seed=1, **how):
    prompts = small.prompts(8)
    return hybrid.generate(
        RolloutRequest(prompts.input_ids, prompts.attention_mask), SamplingConfig(tokens, **how),
        torch.arange(0, len(small.tokenizer), 6), 3, torch.Generator().manual_seed(seed),
    )


def test_the_compiled_step_decodes_only_where_the_hybrid_engine_is_enabled(
    small, engine, monkeypatch
):
    """And with the adapter folded in it writes what the forward pass with the adapter writes."""
    by_forward, right = [], decoder.forward_step
    monkeypatch.setattr(
        decoder, "forward_step", lambda *given: by_forward.append(1) or right(*given)
    )
    plain = generated(HybridEngine(engine, enabled=False, slots=3), small)
    steps = len(by_forward)
    hybrid = HybridEngine(engine, enabled=True, slots=3)
    with hybrid.generation_mode():
        by_forward.clear()  # those that it was compared with
    compiled = generated(hybrid, small)
    assert steps > 5
    assert by_forward == []
    assert hybrid._decoder.step is None, "the step outlives its visit"
    assert compiled.input_ids.equal(plain.input_ids)
    torch.testing.assert_close(compiled.logprobs, plain.logprobs, rtol=0, atol=1e-5)


def test_the_next_visit_decodes_with_the_weights_as_they_then_are(small):
    engine = small.trained("actor")
    hybrid = HybridEngine(engine, enabled=True, slots=4)
    first = generated(hybrid, small, temperature=0)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    second = generated(hybrid, small, temperature=0)
    expected = generated(HybridEngine(engine, enabled=False), small, temperature=0)
    assert not second.input_ids.equal(first.input_ids)
    assert second.input_ids.equal(expected.input_ids)


def test_a_step_that_is_wrong_is_not_used_and_that_is_said_once(
    small, engine, monkeypatch, capsys
):
    right = LlamaStep.__call__
    monkeypatch.setattr(LlamaStep, "__call__", lambda self, *given: right(self, *given) + 1)
    hybrid = HybridEngine(engine, enabled=True)
    made = [generated(hybrid, small) for _ in range(2)]
    expected = generated(HybridEngine(engine, enabled=False), small)
    assert all(batch.input_ids.equal(expected.input_ids) for batch in made)
    assert capsys.readouterr().out.splitlines() == [
        "warning: the compiled decoding step does not give the model's own logits; decoding goes "
        "through the model's forward pass"
    ]


def test_a_model_without_a_step_of_its_own_is_decoded_by_its_forward_pass_and_that_is_said_once(
    small, engine, monkeypatch, capsys
):
    monkeypatch.setattr(LlamaStep, "objection", lambda model: "it is for whales")
    hybrid = HybridEngine(engine, enabled=True)
    for _ in range(2):
        generated(hybrid, small)
    assert capsys.readouterr().out.splitlines() == [
        "decoding goes through the model's forward pass: it is for whales"
    ]


@pytest.mark.parametrize("release", [False, True])
def test_the_kv_cache_is_kept_between_rollouts_unless_it_is_to_be_released(
    small, engine, release
):
    hybrid = HybridEngine(engine, enabled=True, slots=3, release_cache=release)
    generated(hybrid, small)
    assert (hybrid._decoder.cache.layers == []) is release
    assert (hybrid._step is None) is release
    kept = None if release else hybrid._decoder.cache.layers[0].keys
    step = hybrid._step
    generated(hybrid, small)
    assert release or hybrid._decoder.cache.layers[0].keys is kept
    assert release or hybrid._step is step


def test_it_is_known_where_the_time_goes(small, engine):
    hybrid = HybridEngine(engine, enabled=True, slots=3)
    generated(hybrid, small)
    assert hybrid.seconds.keys() == {"enter", "prefill", "decode", "sampling", "refill", "leave"}
    assert all(seconds > 0 for seconds in hybrid.seconds.values())


# ------------------------------------------------------------------- DeepSpeed, by a stand-in


@pytest.fixture(scope="module")
def whole(small):
    """An engine without an adapter; its `generate` is that of transformers."""
    return small.trained("actor")


def test_deepspeeds_backend_is_used_while_it_writes_the_same(small, whole, monkeypatch, capsys):
    used, right = [], deepspeed_backend.generate
    monkeypatch.setattr(
        deepspeed_backend, "generate", lambda *given: used.append(len(given)) or right(*given)
    )
    hybrid = HybridEngine(whole, enabled=True, slots=3, theirs=True)
    drawn = generated(hybrid, small)
    assert used == [5, 7]  # the comparison, and the rollout
    assert capsys.readouterr().out == ""
    again, others = generated(hybrid, small), generated(hybrid, small, seed=2)
    assert drawn.input_ids.equal(again.input_ids)
    assert not drawn.input_ids.equal(others.input_ids)
    greedy = generated(hybrid, small, temperature=0)
    native = generated(HybridEngine(whole, enabled=True), small, temperature=0)
    assert greedy.input_ids.equal(native.input_ids)
    assert greedy.response_mask.equal(native.response_mask)
    torch.testing.assert_close(greedy.logprobs, native.logprobs, rtol=0, atol=1e-5)


def wrong_tokens(self, *given, **how):
    made = type(self.module).generate(self.module, *given, **how)
    made.sequences[0, how["input_ids"].shape[1]] += 1
    return made


def raising(self, *given, **how):
    raise KeyError("rotary_dim")


@pytest.mark.parametrize(
    ("generate", "reason"),
    [(wrong_tokens, "its greedy tokens are not those of the model"),
     (raising, "it fails (KeyError: 'rotary_dim')")],
)
def test_a_backend_that_is_wrong_or_fails_is_left_for_ours_with_one_warning(
    small, monkeypatch, capsys, generate, reason
):
    engine = small.trained("actor")
    engine.train()
    monkeypatch.setattr(engine, "generate", generate.__get__(engine), raising=False)
    hybrid = HybridEngine(engine, enabled=True, theirs=True)
    native = generated(HybridEngine(engine, enabled=True), small)
    for _ in range(2):
        assert generated(hybrid, small).input_ids.equal(native.input_ids)
    assert engine.module.training
    assert capsys.readouterr().out.splitlines() == [
        f"warning: --hybrid_engine_backend deepspeed: {reason}; the native backend is used"
    ]


def test_a_backend_that_knows_no_adapter_is_not_used_with_one(small, engine, capsys):
    hybrid = HybridEngine(engine, enabled=True, theirs=True)
    native = generated(HybridEngine(engine, enabled=True), small)
    assert generated(hybrid, small).input_ids.equal(native.input_ids)
    assert "it leaves peft's adapters out; the native backend is used" in capsys.readouterr().out


def test_an_engine_that_cannot_be_made_is_left_for_an_ordinary_one(small, capsys):
    # On a CPU DeepSpeed's hybrid engine cannot be made: that is the failure.
    settings = small.settings(hybrid_engine=deepspeed_backend.config(64, True, False))
    made, _ = _built_actor(
        settings, small.schedule(), partial(load_causal_lm, small.actor, small.tokenizer)
    )
    said = capsys.readouterr().out
    assert "warning: --hybrid_engine_backend deepspeed: its engine cannot be made" in said
    assert generated(HybridEngine(made, enabled=True), small).input_ids.shape[0] == 8
