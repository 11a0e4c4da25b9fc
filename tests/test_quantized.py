"""Frozen weights in 4 and 8 bits: what they compute, train and export, and what is refused."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import fill_adapters, learn, moved, save_adapted, snapshot
from distributed_worker import two_steps
from golden_curves import run
from safetensors.torch import load_file
from test_backbone import exported, shared
from torch.testing import assert_close

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.training_model.step3_rlhf_finetuning import main as step3
from alpaca_rlhf.utils.configs import LoadingConfig
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.model import lora, quantized
from alpaca_rlhf.utils.run.checkpoints import Checkpoints
from alpaca_rlhf.utils.run.export import export

pytest.importorskip("bitsandbytes")
BITS = pytest.mark.parametrize("bits", [4, 8])
# Mean difference of log-probabilities to the whole weights, in nats. The layers are random and 32
# wide, where 4 bits twice quantized are off by a third; from 64 on by a tenth.
NEAR = {4: 1.0, 8: 0.05}


@torch.no_grad()
def logprobs(model, small):
    batch = small.prompts(1)
    return model(input_ids=batch.input_ids).logits.float().log_softmax(-1)


@BITS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_decoder_layers_are_quantized_and_compute_nearly_the_same(small, bits, dtype):
    model = small.trained("actor", lora=4, bits=bits, dtype=dtype).module
    stored = {name for name, weight in model.named_parameters() if quantized.is_quantized(weight)}
    assert len(stored) == 7 * 2 and all("_proj.base_layer" in name for name in stored)
    kinds = {weight.dtype for name, weight in model.named_parameters() if name not in stored}
    assert kinds == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    whole = small.trained("actor", lora=4, dtype=dtype).module
    found = logprobs(model, small)
    assert 0 < (found - logprobs(whole, small)).abs().mean() < NEAR[bits]
    for layer, same in zip(lora.lora_layers(model), lora.lora_layers(whole), strict=True):
        lora.base_weight(same).data = as_computed(layer.get_base_layer()).to(whole.dtype)
    tolerance = 1e-4 if dtype == "fp32" else 0.1
    assert_close(found, logprobs(whole, small), rtol=0, atol=tolerance)


def as_computed(layer):
    """Return the weight that a quantized layer multiplies by."""
    from bitsandbytes.functional import dequantize_4bit

    if layer.weight.dtype == torch.uint8:
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.state.CB * (layer.state.SCB / 127).unsqueeze(1)


@BITS
def test_training_and_evaluation_mode_compute_the_same(small, bits):
    model = fill_adapters(small.trained("actor", lora=4, bits=bits).module)
    found = [logprobs(model.train(mode), small) for mode in (True, False, True)]
    assert found[0].equal(found[1]) and found[0].equal(found[2])


@BITS
def test_the_head_of_a_reward_model_is_not_quantized(small, bits):
    model = small.trained("critic", lora=4, bits=bits).module.model
    heads = [weight for name, weight in model.named_parameters() if ".score." in name]
    assert len(heads) == 2 and all(weight.dtype == torch.float32 for weight in heads)
    assert sum(map(quantized.is_quantized, model.parameters())) == 14


@BITS
def test_the_line_about_parameters_counts_weights_and_not_bytes(small, bits):
    lines = {kind: small.roles(lora=4, bits=kind).summary for kind in (None, bits)}
    assert lines[None] == lines[bits]


@BITS
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_adapters_learn_and_nothing_else_moves(small, role, stage, bits):
    torch.manual_seed(0)
    before = snapshot(small.trained(role, stage, 4, bits=bits, **small.comparable).module)
    torch.manual_seed(0)
    engine = two_steps(small, role, stage, 4, bits=bits)[0]
    changed = moved(before, engine.module)
    assert changed
    assert all(".lora_" in name or "modules_to_save" in name for name in changed)


@BITS
def test_gradient_checkpointing_gives_the_same_gradient(small, bits):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        engine = small.trained("actor", lora=4, bits=bits, gradient_checkpointing=checkpointing)
        ids = small.prompts(1).input_ids
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        results.append({name: weight.grad.clone() for name, weight in
                        engine.module.named_parameters() if weight.grad is not None})
    assert results[0].keys() == results[1].keys() and results[0]
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


@BITS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ppo_starts_at_ratios_of_1_and_takes_steps(small, bits, dtype):
    torch.manual_seed(0)
    engine = small.roles(2, 4, eos_every=6, bits=bits, dtype=dtype, **small.comparable)
    maker, trainer = small.maker(engine, hybrid=True, tokens=8), small.trainer(engine)
    for number in range(2):
        experience, metrics = small.experience(maker, trainer=trainer, number=number)
        metrics |= learn(trainer, experience, number)
        if number == 0:
            assert metrics["policy/first_log_ratio_max"] < 1e-5
            assert metrics["kl/k1"] == pytest.approx(0, abs=1e-5)
    assert metrics["kl/k3"] > 1e-6


@BITS
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_an_export_is_the_whole_base_with_the_adapter(small, tmp_path, role, bits):
    torch.manual_seed(0)
    engine = small.trained(role, lora=4, bits=bits)
    model = fill_adapters(engine.module if role == "actor" else engine.module.model)
    export(model, small.tokenizer, tmp_path / role, "card", {})
    torch.manual_seed(0)
    whole = small.trained(role, lora=4)
    same = fill_adapters(whole.module if role == "actor" else whole.module.model)
    expected, _ = lora.merged_state_dict(same, True)
    given = load_file(tmp_path / role / "model.safetensors")
    assert given.keys() == expected.keys()
    for name, weight in expected.items():
        assert given[name].equal(weight), name
    assert "quantization_config" not in json.loads((tmp_path / role / "config.json").read_text())


@BITS
def test_folding_leaves_quantized_layers_as_they_are(small, bits):
    engine = small.trained("actor", lora=4, bits=bits)
    fill_adapters(engine.module)
    before, expected = snapshot(engine.module), logprobs(engine.module, small)
    with lora.folded(engine.module):
        assert logprobs(engine.module, small).equal(expected)
    assert moved(before, engine.module) == set()


@BITS
def test_four_roles_share_a_quantized_base(small, tmp_path, bits):
    adapted = save_adapted(small, tmp_path, bits=bits)
    engine = shared(adapted, bits=bits, eos_every=6)
    packed = {weight.data_ptr() for module in (
        engine.actor.module, engine._reference, engine.critic.module, engine._reward)
        for weight in module.parameters() if quantized.is_quantized(weight)}
    assert len(packed) == 14
    maker, trainer = adapted.maker(engine, hybrid=True, tokens=8), adapted.trainer(engine)
    experience, metrics = adapted.experience(maker, trainer=trainer)
    assert metrics["kl/k1"] == pytest.approx(0, abs=1e-5)
    apart = adapted.roles(lora=4)  # the merged models
    scored, _ = adapted.maker(apart).score(experience)
    mask = experience.response_mask.bool()
    difference = (scored.logprobs - experience.logprobs)[mask].abs().mean()
    assert 0 < difference < NEAR[bits]
    learn(trainer, experience)
    export(engine.critic.module.model, small.tokenizer, tmp_path / "again", "card", {})
    found = load_file(tmp_path / "again" / "model.safetensors")
    base = small.causal_lm().state_dict()
    assert_close(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


# --- the steps -----------------------------------------------------------------------------------


SHORT = ["--dtype", "fp32", "--load_in_4bit", "--max_steps", 4, "--seed", 3, "--overlong", "drop"]
PPO = [*SHORT, "--actor_lora_dim", 4, "--critic_lora_dim", 4, "--save_steps", 1,
       "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 2,
       "--max_prompt_seq_len", 96, "--max_answer_seq_len", 8, "--eval_prompts", 2,
       "--enable_hybrid_engine", "--save_total_limit", 9]


def test_the_three_steps_run_and_step_3_resumes_bit_for_bit(small, tmp_path, monkeypatch):
    cache = ["--data_output_path", tmp_path / "cache"]
    for step, name in ((step1, "actor"), (step2, "critic")):
        run(step, tmp_path / name, *SHORT, "--lora_dim", 4, "--per_device_train_batch_size", 4,
            "--max_seq_len", 96, "--eval_iters", 1, *cache, "--model_name_or_path", small.actor)

    def ppo(name, *more):
        run(step3, tmp_path / name, *PPO, *cache, "--share_backbone",
            "--actor_model_name_or_path", tmp_path / "actor",
            "--critic_model_name_or_path", tmp_path / "critic", *more)

    boundary = Checkpoints.step_boundary

    def stopping(self, step, *arguments, **options):
        boundary(self, step, *arguments, **options)
        if step == 2:
            raise TrainingStopped("stopped")

    ppo("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "step_boundary", stopping)
        with pytest.raises(TrainingStopped):
            ppo("stopped")
    ppo("stopped", "--resume_from_checkpoint", "latest")
    whole, resumed = exported(tmp_path, "whole"), exported(tmp_path, "stopped")
    for role, weights in whole.items():
        assert all(resumed[role][name].equal(weight) for name, weight in weights.items())


# --- refused -------------------------------------------------------------------------------------


@BITS
def test_a_device_that_computes_is_accepted(bits):
    for dtype in ("fp32", "bf16"):
        quantized.require_quantizer(
            LoadingConfig(dtype=dtype, load_in_4bit=bits == 4, load_in_8bit=bits == 8))


def test_without_bitsandbytes_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    quantized.require_quantizer(LoadingConfig())
    with pytest.raises(UserError, match=r"--load_in_4bit: needs bitsandbytes; pip install '.*'"):
        quantized.require_quantizer(LoadingConfig(load_in_4bit=True))


@pytest.mark.parametrize(("found", "words"), [
    (lambda x: x * float("nan"), "--load_in_8bit: bitsandbytes gives numbers that are not finite"),
    (lambda x: 1 / 0, "--load_in_8bit: bitsandbytes cannot compute in fp32 on cpu .division"),
])
def test_a_device_that_cannot_compute_is_refused(monkeypatch, found, words):
    class Layer(torch.nn.Module):
        def __init__(self, *sizes, **options):
            super().__init__()

        def forward(self, x):
            return found(x)

    fake = SimpleNamespace(nn=SimpleNamespace(Linear8bitLt=Layer))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match=words):
        quantized.require_quantizer(LoadingConfig(dtype="fp32", load_in_8bit=True))
