"""Steps 1 to 3 in bf16 and fp16: they learn what fp32 learns, at every ZeRO stage.

torch computes in fp16 on every CPU, slowly; DeepSpeed's accelerator says so only of some.
"""

import copy
import gc
import re
from functools import partial

import pytest
import torch
from conftest import fill_adapters, learn, snapshot, with_adapter
from deepspeed.accelerator import get_accelerator
from distributed_worker import PAIRS, TOKENS
from safetensors.torch import load_file
from torch import nn

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.training_model.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from alpaca_rlhf.utils import distributed, ds_config, training_loop
from alpaca_rlhf.utils.configs import EngineConfig, LoadingConfig, RoleConfig
from alpaca_rlhf.utils.data.batches import collate_pairs, collate_tokens
from alpaca_rlhf.utils.engine import build_frozen
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
from alpaca_rlhf.utils.model.reward_model import TokenScorer, scores
from alpaca_rlhf.utils.model.weights import whole
from alpaca_rlhf.utils.model.weights.ema import Ema
from alpaca_rlhf.utils.run import engine_state
from alpaca_rlhf.utils.run.engine_state import CheckpointFiles
from alpaca_rlhf.utils.run.export import export

HALF = ("bf16", "fp16")
OBJECTIVES = {"actor": (TOKENS, collate_tokens, step1.loss),
              "critic": (PAIRS, collate_pairs, step2.loss)}


@pytest.fixture(autouse=True)
def fp16_on_any_cpu(group, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def losses(small, role, steps=6, **options):
    """Losses of optimizer steps on eight rows in two micro-batches."""
    torch.manual_seed(0)  # of the adapter
    engine = small.trained(role, learning_rate=3e-3, lora_learning_rate=1e-2, **options)
    rows, collate, loss = OBJECTIVES[role]
    micro = [collate(rows[:4], pad_id=3), collate(rows[4:], pad_id=3)]
    seen = []
    for _ in range(steps):
        weight = training_loop.global_weight(micro)
        metrics = training_loop.optimizer_step(engine, micro, partial(loss, engine), weight)
        seen.append(metrics["loss"])
    return seen, engine


@pytest.fixture(scope="module")
def fp32_losses(small):
    return {(role, rank): losses(small, role, lora=rank)[0]
            for role in OBJECTIVES for rank in (0, 4)}


@pytest.mark.parametrize(("dtype", "stage", "role", "rank"), [  # every pair of values
    ("bf16", 0, "actor", 0), ("bf16", 1, "critic", 4), ("bf16", 2, "actor", 4),
    ("bf16", 3, "critic", 0), ("fp16", 0, "critic", 4), ("fp16", 1, "actor", 0),
    ("fp16", 2, "critic", 0), ("fp16", 3, "actor", 4)])
def test_steps_1_and_2_learn_as_in_fp32(small, fp32_losses, dtype, stage, role, rank):
    seen, engine = losses(small, role, stage=stage, lora=rank, dtype=dtype)
    expected = fp32_losses[role, rank]
    fall = expected[0] - expected[-1]
    assert fall > 0.3
    assert seen[0] - seen[-1] == pytest.approx(fall, rel=0.15)
    assert engine.zero_optimization_stage() == max(stage, 2)
    assert {p.dtype for p in engine.module.parameters()} == {
        torch.bfloat16 if dtype == "bf16" else torch.float16}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("dtype", HALF)
def test_step_3_starts_at_ratio_1_and_learns(small, dtype, stage, rank):
    engine = small.roles(stage, rank, dtype=dtype, eos_every=9)
    trainer = small.trainer(engine)
    experience, metrics = small.experience(
        small.maker(engine, hybrid=True, tokens=8), count=8, trainer=trainer)
    assert metrics["kl/k1"] == 0.0
    record = learn(trainer, experience, 0)
    # Old log-probabilities come from the micro-batches of the update itself.
    assert record["policy/first_log_ratio_max"] == 0.0
    assert record["policy/loss"] == pytest.approx(0.0, abs=0.5)
    assert torch.isfinite(torch.tensor([record["grad_norm/actor"], record["value/loss"]])).all()


@pytest.mark.parametrize("dtype", HALF)
def test_an_adapter_that_has_learned_little_decodes_in_half_precision(small, dtype):
    # Merged into bf16 weights, an update of a thousandth of the weights would be lost by half.
    engine = small.roles(0, 4, dtype=dtype)
    fill_adapters(engine.actor.module)
    for layer in lora.lora_layers(engine.actor.module):
        weight = layer.lora_B["default"].weight
        ratio = layer.get_delta_weight("default").abs().mean() / layer.weight.abs().mean()
        weight.data.mul_(1e-3 / ratio)
    maker = small.maker(engine, hybrid=True)
    inside = []
    with maker.rollout_engine.generation_mode() as decoder:
        held = {p.data_ptr() for p in engine.actor.module.parameters()}
        inside = [layer.merged for layer in lora.lora_layers(decoder.model)]
    assert not any(inside)
    assert held == {p.data_ptr() for p in engine.actor.module.parameters()}


@pytest.mark.parametrize("rank", [0, 4])
def test_the_compiled_step_decodes_bf16_nearer_to_fp32_than_the_forward_pass(small, rank):
    engine = small.roles(0, rank, dtype="bf16", eos_every=9)
    fill_adapters(engine.actor.module)
    found = {}
    for hybrid in (True, False):
        maker = small.maker(engine, hybrid, tokens=20)  # 3 slots: rows come and go
        rollout = maker.generate(small.prompts(8), 2)
        if hybrid:
            assert isinstance(maker.rollout_engine._fast_step, LlamaStep)
        exact = copy.deepcopy(lora.unwrapped(engine.actor.module)).float().eval()
        with torch.no_grad():
            logprobs = rollout.spread(engine.logprobs(exact, rollout, 1.0)[:, 0])
        difference = (rollout.decoded_logprobs - logprobs) * rollout.response_mask
        found[hybrid] = difference.abs().sum() / rollout.response_mask.sum()
    assert found[True] < found[False] < 0.1


@pytest.mark.parametrize("dtype", HALF)
def test_scores_of_a_half_precision_reward_model_are_computed_in_fp32(small, dtype):
    model = small.reward_model(dtype=dtype)
    ids = torch.randint(4, 400, (200, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = scores(TokenScorer(model), ids, torch.ones_like(ids))
    assert found.dtype == torch.float32
    assert len(found.unique()) == 200


def test_gradients_are_summed_and_reduced_in_fp32(small):
    config = ds_config.make(zero_stage=0, dtype=torch.bfloat16)
    assert config["zero_optimization"]["stage"] == 2
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
    assert small.trained("actor", 0, dtype="bf16").get_data_types()[1] == torch.float32


@pytest.mark.parametrize("stage", [2, 3])
def test_an_fp16_overflow_of_one_model_skips_both_with_align_overflow(small, stage):
    engine = small.roles(stage, 4, dtype="fp16", eos_every=9)
    experience, _ = small.experience(small.maker(engine, tokens=8), count=2)
    trainer = small.trainer(engine, align_overflow=True, enable_ema=True)
    # Another average than the weights: an update would move it.
    average = [torch.ones_like(one) for one in trainer.ema.state_dict()["average"]]
    trainer.ema.load_state_dict({"average": average})
    before = [whole.gathered_state_dict(role.module, on_this_rank=True)
              for role in (engine.actor, engine.critic)]
    scaler = engine.critic.optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_hysteresis = 2.0**40, 1
    scale = engine.actor.optimizer.loss_scaler.cur_scale
    record = learn(trainer, experience, 0)
    assert record["overflow/critic"] == 1.0
    assert scaler.cur_scale == 2.0**39
    assert engine.actor.optimizer.loss_scaler.cur_scale == scale
    for role, weights in zip((engine.actor, engine.critic), before, strict=True):
        after = whole.gathered_state_dict(role.module, on_this_rank=True)
        assert all(after[name].equal(weights[name]) for name in weights)
    assert all(map(torch.equal, average, trainer.ema.state_dict()["average"]))
    scaler.cur_scale = 2.0**10
    engine.actor.optimizer.loss_scaler.cur_scale = 2.0**10
    record = learn(trainer, experience, 1)
    assert record["overflow/critic"] == record["overflow/actor"] == 0.0
    assert not all(map(torch.equal, average, trainer.ema.state_dict()["average"]))


def storages():
    """Bytes of all tensors that live, each storage once."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, nn.Parameter):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize(("dtype", "stage", "gathered"), [
    ("bf16", 0, 0), ("fp16", 2, 0), ("bf16", 3, 1), ("fp32", 3, 1)])
def test_a_rollout_with_an_adapter_holds_the_actor_once(
    small, monkeypatch, dtype, stage, gathered
):
    # (fp32 weights without ZeRO-3 are kept beside the merged ones: there is no other copy.)
    monkeypatch.setattr(HybridEngine, "_filled_step", lambda *_: None)  # its layout is a copy
    engine = small.roles(stage, 4, dtype=dtype)
    hybrid, model = small.maker(engine, hybrid=True).rollout_engine, engine.actor.module
    actor = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    before = storages()
    with hybrid.generation_mode():
        merged = [layer.merged for layer in lora.lora_layers(model)]
        grown = storages() - before
    assert set(merged) == {dtype == "fp32"}
    assert grown <= (gathered + 0.1) * actor


def test_a_model_card_says_what_merging_rounds_away_and_the_adapter_is_exact(small, tmp_path):
    model = with_adapter(small.causal_lm(dtype="bf16"))
    for layer in lora.lora_layers(model):
        layer.lora_B["default"].weight.data.mul_(1e-2)
    own = snapshot(model)
    exact = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            a, b = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
            exact[name] = layer.get_base_layer().weight.float() + layer.scaling["default"] * b @ a
    export(model, small.tokenizer, tmp_path, "Policy", {"KL": 1.5})
    card = (tmp_path / "README.md").read_text()
    assert re.search(r"\| adapter \| merged in torch.bfloat16, which rounds away \d+\.\d% of its "
                     r"update \(norm\); exact in adapter/ \|", card)
    merged = load_file(tmp_path / "model.safetensors")
    assert all(merged[f"{name}.weight"].equal(weight.bfloat16()) for name, weight in exact.items())
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(own[name.replace(".weight", ".default.weight")].equal(weight)
               for name, weight in adapter.items())


def test_frozen_models_are_offloaded_with_the_trained_ones(small):
    role = RoleConfig(model_name_or_path=small.actor, zero_stage=3)
    load = partial(load_causal_lm, tokenizer=small.tokenizer)
    frozen = build_frozen(load, role, LoadingConfig(dtype="bf16"), EngineConfig(offload=True))
    assert frozen.zero_offload_param().device == "cpu"
    batch = small.prompts(2)
    with torch.no_grad():
        found = frozen(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = small.causal_lm(dtype="bf16")(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert found.equal(expected)


@pytest.mark.parametrize("flag", ["offload_reference_model", "offload_reward_model"])
def test_one_frozen_model_can_be_offloaded_by_itself_and_scores_as_before(small, flag):
    engine = small.roles(3, places={flag: True})
    held = {"offload_reference_model": engine._reference, "offload_reward_model": engine._reward}
    places = {name: model.zero_offload_param() for name, model in held.items()}
    assert {name for name, place in places.items() if place} == {flag}
    assert places[flag].device == "cpu"
    assert not engine.actor.zero_offload_param() and not engine.critic.zero_offload_param()
    rollout = small.maker(engine).generate(small.prompts(2), 1)
    with engine.reference() as reference, engine.reward_model() as reward, torch.no_grad():
        assert engine.logprobs(reference, rollout, 1.0).equal(
            engine.logprobs(engine.actor, rollout, 1.0))
        given = rollout.input_ids, rollout.attention_mask
        assert scores(reward, *given).equal(scores(engine.critic, *given))


@pytest.mark.parametrize("short", [False, True])
def test_the_kv_cache_is_kept_between_rollouts_unless_memory_is_short(small, monkeypatch, short):
    engine = small.roles(0, 0)
    maker = small.maker(engine, hybrid=True)
    free = 1000 if short else 10**9
    monkeypatch.setattr(distributed, "free_memory", lambda: (free, 10**9))
    maker.generate(small.prompts(2))
    assert (maker.rollout_engine._decoder.cache.size == 0) is short


def masters(engine):
    """Whole fp32 weights of the trainable parameters."""
    return Ema(engine.module, decay=0.5).state_dict()["average"]


@pytest.mark.parametrize(("dtype", "saved", "loaded", "rank"), [
    ("bf16", 0, 3, 0), ("bf16", 3, 0, 4), ("bf16", 0, 2, 4), ("bf16", 3, 1, 0),
    ("fp16", 0, 3, 4), ("fp16", 3, 0, 0), ("fp16", 0, 2, 0), ("fp16", 3, 1, 4)])
def test_a_checkpoint_moves_between_stages_with_its_fp32_masters_and_moments(
    small, tmp_path, dtype, saved, loaded, rank
):
    trained = losses(small, "actor", steps=2, stage=saved, lora=rank, dtype=dtype)[1]
    engine_state.save(trained, tmp_path, CheckpointFiles())
    torch.manual_seed(0)  # of the adapter
    moved = small.trained(
        "actor", loaded, rank, dtype=dtype, learning_rate=3e-3, lora_learning_rate=1e-2)
    engine_state.load(moved, tmp_path, CheckpointFiles(), convert=True)
    assert all(map(torch.equal, masters(trained), masters(moved)))
    rows, collate, loss = OBJECTIVES["actor"]
    batch = [collate(rows, pad_id=3)]
    found = [training_loop.optimizer_step(
        engine, batch, partial(loss, engine), training_loop.global_weight(batch))["loss"]
        for _ in range(2) for engine in (trained, moved)]
    # The second loss follows the moments, which moved too.
    assert found[1::2] == pytest.approx(found[::2], rel=1e-3)
