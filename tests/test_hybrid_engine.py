"""Generation mode: what holds inside, and that everything is as it was on leaving."""

import pytest
import torch
from conftest import moved, snapshot

from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import LoadOptions


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
