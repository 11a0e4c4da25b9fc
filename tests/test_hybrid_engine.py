"""Generation mode: what holds inside it, and that everything is as it was after leaving."""

import pytest
import torch
from conftest import fill_adapters, hybrid_engine, moved, snapshot

from alpaca_rlhf.utils.configs import SamplingConfig
from alpaca_rlhf.utils.generation import steps
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.model import lora


@pytest.fixture(scope="module")
def engine(small):
    """An actor with dropout, gradient checkpointing and an adapter with trained weights."""
    engine = small.trained(
        "actor", lora=4, dropout=0.3, gradient_checkpointing=True, lora_dropout=0.3
    )
    fill_adapters(engine.module)
    return engine


def generated(hybrid, small, tokens=8, seed=1, **sampling):
    return hybrid.generate(
        small.prompts(8), SamplingConfig(tokens, **sampling),
        torch.arange(0, len(small.tokenizer), 6), 3, torch.Generator().manual_seed(seed),
    )


def state(model):
    return {
        name: (module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_everything_also_after_an_exception(engine, training, enabled, fails):
    engine.train(training)
    model = engine.module
    before, modules = snapshot(model), state(model)
    try:
        with hybrid_engine(engine, enabled).generation_mode():
            assert not model.training
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert moved(before, model) == set()
    assert state(model) == modules
    assert not any(layer.merged for layer in lora.lora_layers(model))


def test_one_rank_whose_gathered_weights_are_its_shards_restores_them_bit_for_bit(small):
    engine = small.trained("actor", stage=3, lora=4)
    model = fill_adapters(engine.module)
    before = snapshot(model)
    with hybrid_engine(engine).generation_mode():
        pass
    assert moved(before, model) == set()


@pytest.mark.parametrize("enabled", [False, True])
def test_inside_dropout_is_off_and_the_adapter_is_merged_if_the_engine_is_enabled(
    small, engine, enabled
):
    engine.train()
    batch = small.prompts(2)
    with hybrid_engine(engine, enabled).generation_mode(), torch.no_grad():
        first, second = (
            engine.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for _ in range(2)
        )
        merged = [layer.merged for layer in lora.lora_layers(engine.module)]
    assert first.equal(second)
    assert merged == [enabled] * 14


@pytest.mark.parametrize("enabled", [False, True])
def test_below_zero_3_no_forward_pass_is_a_collective(engine, enabled):
    assert not hybrid_engine(engine, enabled).decodes_in_step


def test_the_compiled_step_decodes_only_if_the_hybrid_engine_is_enabled(
    small, engine, monkeypatch
):
    """With the adapter merged it generates what the forward pass with the adapter generates."""
    by_forward, right = [], steps.ForwardStep.__call__
    monkeypatch.setattr(
        steps.ForwardStep, "__call__",
        lambda *given: by_forward.append(1) or right(*given),
    )
    plain = generated(hybrid_engine(engine, enabled=False, slots=3), small)
    assert len(by_forward) > 5
    hybrid = hybrid_engine(engine, slots=3)
    with hybrid.generation_mode() as decoder:
        assert isinstance(decoder.step, LlamaStep)
        by_forward.clear()  # those that the step was compared with
    assert decoder.step is None, "it knows the weights of a visit only"
    compiled = generated(hybrid, small)
    assert by_forward == []
    assert compiled.input_ids.equal(plain.input_ids)
    torch.testing.assert_close(
        compiled.decoded_logprobs, plain.decoded_logprobs, rtol=0, atol=1e-5)


def test_each_visit_decodes_with_the_weights_as_they_are_then(small):
    engine = small.trained("actor")
    hybrid = hybrid_engine(engine, slots=4)
    first = generated(hybrid, small, temperature=0)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    second = generated(hybrid, small, temperature=0)
    expected = generated(hybrid_engine(engine, enabled=False), small, temperature=0)
    assert not second.input_ids.equal(first.input_ids)
    assert second.input_ids.equal(expected.input_ids)


def off_by_one(monkeypatch):
    right = LlamaStep.__call__
    monkeypatch.setattr(LlamaStep, "__call__", lambda self, *given: right(self, *given) + 1)


def inapplicable(monkeypatch):
    monkeypatch.setattr(LlamaStep, "objection", lambda model: "it is for whales")


@pytest.mark.parametrize(("fault", "line"), [
    (off_by_one, "warning: the compiled decoding step is not used: it does not give the logits of "
                 "the model's forward pass"),
    (inapplicable, "the compiled decoding step is not used: it is for whales"),
])
def test_a_step_that_is_wrong_or_inapplicable_is_not_used_and_one_line_says_why(
    small, engine, monkeypatch, capsys, fault, line
):
    expected = generated(hybrid_engine(engine, enabled=False), small)
    fault(monkeypatch)
    hybrid = hybrid_engine(engine)
    for _ in range(2):
        assert generated(hybrid, small).input_ids.equal(expected.input_ids)
    assert capsys.readouterr().out.splitlines() == [line]


@pytest.mark.parametrize("release", [False, True])
def test_buffers_are_kept_between_rollouts_unless_they_are_to_be_released(
    small, engine, monkeypatch, release
):
    from deepspeed.accelerator import get_accelerator

    emptied, released, release_step = [], [], LlamaStep.release
    monkeypatch.setattr(type(get_accelerator()), "empty_cache", lambda self: emptied.append(1))
    monkeypatch.setattr(
        LlamaStep, "release", lambda step: released.append(1) or release_step(step))
    hybrid = hybrid_engine(engine, slots=3, release_inference_cache=release)
    made, kept = [], []
    for _ in range(2):
        made.append(generated(hybrid, small))
        with hybrid.generation_mode() as decoder:
            kept.append(decoder.cache.layers)
    assert made[0].input_ids.equal(made[1].input_ids)
    assert [layers == [] for layers in kept] == [release] * 2
    assert release or kept[0] is kept[1]
    assert bool(emptied) is bool(released) is release
    hybrid.shutdown()  # before the export
    assert emptied and released and hybrid._decoder.cache.layers == []


def test_the_time_of_every_part_is_measured(small, engine):
    hybrid = hybrid_engine(engine, slots=3)
    generated(hybrid, small)
    assert hybrid.seconds.keys() == {"enter", "prefill", "decode", "sampling", "refill", "leave"}
    assert all(seconds > 0 for seconds in hybrid.seconds.values())


def test_flash_attention_is_replaced_by_sdpa_while_generating(small):
    engine = small.trained("actor")
    config, seen = engine.module.config, []
    config._attn_implementation = "flash_attention_2"  # not installed: only the name is changed
    engine.module.set_attn_implementation = lambda name: (
        seen.append(name), setattr(config, "_attn_implementation", name))
    with hybrid_engine(engine, enabled=False).generation_mode():
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "flash_attention_2"
    assert seen == ["sdpa", "flash_attention_2"]
