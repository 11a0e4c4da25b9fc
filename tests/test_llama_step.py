"""The decoding step of our own: for which models there is one, and that it gives their logits."""

import pytest
import torch
from conftest import small_config
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


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
FAMILY = {
    "LLaMA": llama,
    "tied embeddings": lambda small: llama(small, tie_word_embeddings=True),
    "no grouped queries": lambda small: llama(small, num_key_value_heads=4),
    "biases": lambda small: llama(small, attention_bias=True, mlp_bias=True),
    "LLaMA 3 positions": lambda small: llama(small, **LLAMA3),
    "yarn": lambda small: llama(small, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=32)),
    "Mistral": lambda small: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "Qwen 2": lambda small: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}
OTHERS = {
    "norms of queries and keys": (
        lambda small: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)), "LLaMA's modules"),
    "GPT-2": (lambda small: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1,
                                                       n_head=2)), "LLaMA's modules"),
    "sliding window": (
        lambda small: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
        "sliding window"),
    "bf16": (lambda small: llama(small).bfloat16(), "fp32"),
}


def made(make, small):
    torch.manual_seed(0)
    model = make(small).eval()
    for name, parameter in model.named_parameters():  # biases and norms that do something
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5 if "norm" in name else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("kind", FAMILY)
def test_a_step_gives_the_logits_of_the_models_own_forward_pass(small, kind):
    model = made(FAMILY[kind], small)
    assert LlamaStep.objection(model) is None
    step = LlamaStep(model)
    step.fill()
    assert agrees(model, step)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_is_made_otherwise_has_no_step_and_it_is_said_why(small, kind):
    make, reason = OTHERS[kind]
    assert reason in LlamaStep.objection(made(make, small))


def test_without_a_compiler_there_is_no_step_and_it_is_said_why(small, monkeypatch):
    def missing():
        raise kernels.KernelsMissing("nothing compiles")

    monkeypatch.setattr("alpaca_rlhf.utils.generation.cpu.llama_step.library", missing)
    assert LlamaStep.objection(made(llama, small)) == "nothing compiles"


def half_the_scale(layer):
    layer.self_attn.scaling /= 2


def another_activation(layer):
    layer.mlp.act_fn = torch.nn.GELU()


def a_multiplier(layer):
    layer.mlp.register_forward_hook(lambda _, __, out: out * 1.1)


@pytest.mark.parametrize("mistake", [half_the_scale, another_activation, a_multiplier])
def test_parts_of_the_same_names_that_mean_something_else_are_noticed(small, mistake):
    model = made(llama, small)
    step = LlamaStep(model)
    step.fill()
    for layer in model.model.layers:
        mistake(layer)
    assert LlamaStep.objection(model) is None
    assert not agrees(model, step)


def test_the_weights_laid_out_are_a_copy(small):
    """What an update changes later shows in the next visit to generation mode, not in this one."""
    model = made(llama, small)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step = LlamaStep(model)
    step.fill()
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert not agrees(model, step)
    step.fill()
    assert agrees(model, step)
