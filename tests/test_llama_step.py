"""The compiled decoding step: for which models there is one, and that it gives their logits."""

import copy

import pytest
import torch
from conftest import small_config, with_adapter
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alpaca_rlhf.utils.generation.cpu import kernels
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.generation.steps import agrees

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}


def llama(small, **changes):
    return LlamaForCausalLM(small_config(small.tokenizer, **changes))


def partly_bf16(model):
    model.lm_head.bfloat16()
    return model


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
# Each kind of model with the reason why it has no step; None if it has one.
MODELS = {
    "LLaMA": (llama, None),
    "tied embeddings": (lambda small: llama(small, tie_word_embeddings=True), None),
    "no grouped queries": (lambda small: llama(small, num_key_value_heads=4), None),
    "biases": (lambda small: llama(small, attention_bias=True, mlp_bias=True), None),
    "LLaMA 3 positions": (lambda small: llama(small, **LLAMA3), None),
    "yarn": (lambda small: llama(small, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=32)), None),
    "GELU": (lambda small: llama(small, hidden_act="gelu"), None),
    "Mistral": (lambda small: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
                None),
    "Qwen 2": (lambda small: Qwen2ForCausalLM(Qwen2Config(**SIZES)), None),
    "norms of queries and keys": (
        lambda small: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)), "LLaMA's modules"),
    "GPT-2": (lambda small: GPT2LMHeadModel(GPT2Config(
        vocab_size=60, n_embd=32, n_layer=1, n_head=2)), "LLaMA's modules"),
    "sliding window": (
        lambda small: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
        "sliding window"),
    "fp16": (lambda small: llama(small).half(), "fp32 and bf16"),
    "two precisions": (lambda small: partly_bf16(llama(small)), "fp32 and bf16"),
}


def made(small, kind="LLaMA"):
    torch.manual_seed(0)
    model = MODELS[kind][0](small).eval()
    for name, parameter in model.named_parameters():  # biases and norms with an effect
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5 if "norm" in name else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_gives_the_models_logits_or_there_is_a_reason_why_there_is_none(small, kind):
    model, reason = made(small, kind), MODELS[kind][1]
    if reason is not None:
        assert reason in LlamaStep.objection(model)
        return
    assert LlamaStep.objection(model) is None
    step = LlamaStep(model)
    for _ in range(2):
        step.fill()
        assert agrees(model, step)
        step.release()


def test_without_a_compiler_there_is_no_step_and_the_reason_is_that(small, monkeypatch):
    def missing():
        raise kernels.KernelsMissing("nothing compiles")

    monkeypatch.setattr("alpaca_rlhf.utils.generation.cpu.llama_step.library", missing)
    assert LlamaStep.objection(made(small)) == "nothing compiles"


def assert_agrees_in_bf16(model):
    """The weights are exact, and so are the logits with an fp32 cache; not with one in bf16."""
    assert LlamaStep.objection(model) is None
    step = LlamaStep(model)
    step.fill()
    assert agrees(copy.deepcopy(model).float(), step)
    assert agrees(model, step)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if MODELS[kind][1] is None])
def test_a_step_in_bf16_gives_the_logits_of_these_weights_in_fp32(small, kind):
    assert_agrees_in_bf16(made(small, kind).bfloat16())


@pytest.mark.parametrize("names", [None, "q_proj,v_proj,down_proj", "up_proj"])
def test_adapters_that_are_not_merged_are_added(small, names):
    model = with_adapter(made(small).bfloat16(), names)
    assert_agrees_in_bf16(model.get_base_model())
    step = LlamaStep(model.get_base_model())
    step.fill()
    with model.disable_adapter():
        assert not agrees(model.get_base_model(), step), "they make a difference"


@pytest.mark.parametrize("part", ["mlp", "self_attn.o_proj", "input_layernorm"])
def test_a_module_of_the_same_name_that_computes_something_else_is_noticed(small, part):
    model = made(small)
    for layer in model.model.layers:
        layer.get_submodule(part).register_forward_hook(lambda _, __, out: out * 1.1)
    assert LlamaStep.objection(model) is None
    step = LlamaStep(model)
    step.fill()
    assert not agrees(model, step)


def test_the_weights_are_a_copy_that_follows_the_model_when_it_is_filled_again(small):
    model = made(small)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step = LlamaStep(model)
    step.fill()
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert not agrees(model, step)
    step.fill()
    assert agrees(model, step)
