"""Frozen weights in 4 and 8 bits: what is quantized, computed, trained, resumed and exported."""

import json
from dataclasses import replace

import golden_curves
import pytest
import torch
from conftest import Small, fill_adapters, learn, moved, save_adapted, save_models, snapshot
from families import FAMILIES, save
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.training_model.step3_rlhf_finetuning import main as step3
from alpaca_rlhf.utils import arguments, preflight
from alpaca_rlhf.utils.configs import (
    AdapterConfig,
    LoadingConfig,
    RoleConfig,
    Step1Config,
    Step3Config,
)
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.generation.cpu.llama_step import LlamaStep
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
from alpaca_rlhf.utils.model.weights import quantized
from alpaca_rlhf.utils.preflight import Planned
from alpaca_rlhf.utils.run import engine_state
from alpaca_rlhf.utils.run.checkpoints import Checkpoints
from alpaca_rlhf.utils.run.engine_state import CheckpointFiles
from alpaca_rlhf.utils.run.export import export

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
BITS = pytest.mark.parametrize("bits", [4, 8])
# Mean difference of log-probabilities to whole weights, in nats; of weights that are random.
NEAR = {4: 0.2, 8: 0.02}
PROJECTIONS = 7 * 2


def stored(model):
    """The names of the quantized weights."""
    return {name for name, weight in model.named_parameters() if quantized.is_quantized(weight)}


@torch.no_grad()
def logprobs(model, small):
    return model(input_ids=small.prompts(1).input_ids).logits.float().log_softmax(-1)


def seeded(model):
    """The model with adapter matrices A that do not depend on what was drawn before."""
    torch.manual_seed(6)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def small(group, tmp_path_factory):
    """Models whose layers have multiples of 64 inputs: for others a CPU has no right 4 bits."""
    folder = tmp_path_factory.mktemp("wide")
    save_models(folder, hidden_size=64, intermediate_size=128, initializer_range=0.1)
    return Small(folder)


# --- what is quantized, and what it computes -----------------------------------------------------


@BITS
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_projections_are_quantized_and_compute_nearly_the_same(small, bits, stage, dtype):
    torch.manual_seed(0)
    model = small.trained("actor", stage, lora=4, bits=bits, dtype=dtype).module
    assert len(stored(model)) == PROJECTIONS
    assert all("_proj.base_layer.weight" in name for name in stored(model))
    rest = {weight.dtype for name, weight in model.named_parameters() if name not in stored(model)}
    assert rest == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    assert "quantization_config" not in model.config.to_dict()
    expected = logprobs(small.causal_lm(dtype=dtype), small)
    difference = (logprobs(model, small) - expected).abs().mean()
    assert NEAR[bits] / 8 < difference < NEAR[bits]


@BITS
def test_no_head_is_quantized(small, bits):
    model = small.trained("critic", lora=4, bits=bits).module
    heads = [weight for name, weight in model.named_parameters() if ".score." in name]
    assert [weight.dtype for weight in heads] == [torch.float32] * 2
    assert len(stored(model)) == PROJECTIONS


@BITS
def test_training_evaluation_and_no_gradient_give_the_same_bits(small, bits):
    model, ids = small.trained("actor", lora=4, bits=bits).module, small.prompts(4).input_ids
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = True  # on such a CPU evaluation lays weights out anew
    before = snapshot(model)
    trained = model.train()(input_ids=ids).logits
    with torch.no_grad():
        assert model.eval()(input_ids=ids).logits.equal(trained)
    assert moved(before, model) == set()


@BITS
def test_weights_are_counted_and_not_bytes(small, bits):
    for found, whole in zip(small.roles(lora=4, bits=bits).summary, small.roles(lora=4).summary,
                            strict=True):
        assert found == whole.replace(
            "); reference", f"); frozen linear layers in {bits} bits; reference").replace(
            "); reward", f"); frozen linear layers in {bits} bits; reward")


@BITS
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_only_adapters_and_heads_learn_and_the_loss_goes_down(small, role, stage, bits):
    engine = small.trained(role, stage, 4, bits=bits, learning_rate=1e-2, lora_learning_rate=1e-2)
    before, ids, found = snapshot(engine.module), small.prompts(4).input_ids, []
    for _ in range(6):
        if role == "actor":
            loss = engine(input_ids=ids, labels=ids).loss
        else:
            loss = (engine(ids) - 3).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    assert found[-1] < 0.9 * found[0]
    changed = moved(before, engine.module)
    assert len(changed) == 2 * PROJECTIONS + (role == "critic")
    assert all(".lora_" in name or "modules_to_save" in name for name in changed)


@BITS
def test_gradient_checkpointing_gives_the_same_gradient(small, bits):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        engine = small.trained("actor", lora=4, bits=bits, gradient_checkpointing=checkpointing)
        ids = fill_adapters(engine.module) and small.prompts(1).input_ids
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        found.append([weight.grad for weight in engine.module.parameters()
                      if weight.requires_grad])
    assert len(found[0]) == 2 * PROJECTIONS
    assert all(torch.equal(one, other) and one.abs().max() > 0
               for one, other in zip(*found, strict=True))


@BITS
def test_decoding_folds_nothing_and_leaves_the_compiled_step(small, bits):
    model = fill_adapters(small.trained("actor", lora=4, bits=bits).module)
    before, expected = snapshot(model), logprobs(model, small)
    with lora.folded(model):
        assert logprobs(model, small).equal(expected)
        assert moved(before, model) == set()
    assert LlamaStep.objection(lora.unwrapped(model)) == "it is for weights in fp32 and bf16"


@BITS
@pytest.mark.parametrize("shared", [False, True])
def test_ppo_starts_at_ratios_of_1_and_a_kl_of_0(small, tmp_path, bits, shared):
    made = save_adapted(small, tmp_path) if shared else small
    engine = made.roles(2, 4, bits=bits, eos_every=6, places={"share_backbone": shared},
                        **small.comparable)
    maker, trainer = made.maker(engine, hybrid=True, tokens=8), made.trainer(engine)
    experience, metrics = made.experience(maker, trainer=trainer)
    assert metrics["kl/k1"] == 0
    assert metrics["rollout/decoding_difference_max"] < 1e-4
    metrics = learn(trainer, experience)
    assert metrics["policy/first_log_ratio_max"] == 0
    layers = [layer for module in (engine.actor.module, engine.critic.module)
              for layer in module.modules() if isinstance(layer, quantized._Frozen)]
    weights = {layer.weight.data_ptr() for layer in layers}
    scales = {(layer.quant_state.absmax if bits == 4 else layer.state.SCB).data_ptr()
              for layer in layers}
    assert len(weights) == len(scales) == (1 if shared else 2) * PROJECTIONS
    whole = made.roles(2, 4, places={"share_backbone": shared})
    expected, _ = made.maker(whole).score(experience)
    found, mask = made.maker(made.roles(
        2, 4, bits=bits, places={"share_backbone": shared})).score(experience)[0], (
            experience.response_mask.bool())
    assert (found.logprobs - expected.logprobs)[mask].abs().mean() < NEAR[bits]
    assert (found.score - expected.score).abs().mean() < 4 * NEAR[bits]


# --- export --------------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_an_export_is_the_base_as_it_was_with_the_adapter_bit_for_bit(small, tmp_path, role, bits):
    base = load_file(small.folder / role / "model.safetensors")
    model = small.trained(role, lora=4, bits=bits).module
    model = fill_adapters(model if role == "actor" else model.model)
    before = snapshot(model)
    export(model, small.tokenizer, tmp_path, "card", {})
    given = load_file(tmp_path / "model.safetensors")
    assert given.keys() == base.keys()
    for name, weight in base.items():
        if "_proj" in name:
            adapter = [before[f"base_model.model.{name[:-7]}.lora_{part}.default.weight"]
                       for part in "AB"]
            weight = weight + 2.0 * (adapter[1] @ adapter[0])  # alpha is twice the rank
        elif name == "score.weight":
            weight = before["base_model.model.score.modules_to_save.default.weight"]
        assert given[name].equal(weight), name
    assert moved(before, model) == set()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    auto = AutoModelForCausalLM if role == "actor" else AutoModelForSequenceClassification
    loaded, ids = auto.from_pretrained(tmp_path), small.prompts(1).input_ids
    with torch.no_grad():
        difference = (loaded(ids).logits - model(input_ids=ids).logits).abs().mean()
    assert difference < 2 * NEAR[bits]


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3"])
def test_other_families_are_exported_whole(tmp_path, name):
    """GPT-2 holds its weights transposed, Qwen 2 has biases, and to Llama 3 a token is added."""
    from alpaca_rlhf.utils.data.tokenizer import load_tokenizer

    path = save(FAMILIES[name], tmp_path / "base")
    tokenizer = load_tokenizer(path)
    found = []
    for bits in (None, 4):
        role = RoleConfig(model_name_or_path=path, lora_dim=4)
        model = load_causal_lm(role, LoadingConfig(dtype="fp32", bits=bits),
                               {"zero_optimization": {"stage": 0}}, tokenizer)
        model = lora.add_lora(model, lora.match_modules(model, role), role,
                              AdapterConfig(only_optimize_lora=True))
        assert (len(stored(model)) > 0) == (bits is not None)
        folder = tmp_path / str(bits)
        export(fill_adapters(seeded(model)), tokenizer, folder, "card", {})
        found.append(load_file(folder / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(found[0][key].equal(found[1][key]) for key in found[0])


# --- the steps -----------------------------------------------------------------------------------

SHORT = ["--dtype", "fp32", "--max_steps", 4, "--seed", 3, "--load_in_4bit", "--data_path"]
PPO = ["--share_backbone", "--actor_lora_dim", 4, "--critic_lora_dim", 4, "--save_steps", 1,
       "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 2,
       "--max_prompt_seq_len", 96, "--max_answer_seq_len", 8, "--eval_prompts", 2,
       "--enable_hybrid_engine", "--enable_ema", "--save_total_limit", 9]


def test_the_steps_run_and_step_3_resumes_bit_for_bit(small, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(
        {"prompt": f"What is {n}?", "chosen": "A number.", "rejected": f"No {n}."}) + "\n"
        for n in range(60)))
    cache = [data, "--preprocessing_num_workers", 1, "--data_output_path", tmp_path / "cache"]
    for step, name in ((step1, "actor"), (step2, "critic")):
        golden_curves.run(
            step, tmp_path / name, *SHORT, *cache, "--lora_dim", 4, "--eval_iters", 1,
            "--per_device_train_batch_size", 4, "--max_seq_len", 96,
            "--model_name_or_path", small.actor)

    def run(name, *more):
        golden_curves.run(
            step3, tmp_path / name, *SHORT, *cache, *PPO, *more,
            "--actor_model_name_or_path", tmp_path / "actor",
            "--critic_model_name_or_path", tmp_path / "critic")

    boundary = Checkpoints.step_boundary

    def stopping(self, step, *given, **options):
        boundary(self, step, *given, **options)
        if step == 2:
            raise TrainingStopped("stopped")

    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "step_boundary", stopping)
        with pytest.raises(TrainingStopped):
            run("stopped")
    run("stopped", "--resume_from_checkpoint", "latest")
    base = load_file(f"{small.actor}/model.safetensors")
    for role in ("actor", "critic", "actor_ema"):
        adapter = load_file(tmp_path / "whole" / role / "adapter" / "adapter_model.safetensors")
        one, other = (load_file(tmp_path / name / role / "model.safetensors")
                      for name in ("whole", "stopped"))
        for name, weight in one.items():
            assert other[name].equal(weight)
            if "_proj" in name:
                a, b = (adapter[f"base_model.model.{name[:-7]}.lora_{part}.weight"]
                        for part in "AB")
                assert weight.equal(base[name] + 2.0 * (b @ a))
                assert not weight.equal(base[name])


@BITS
@pytest.mark.parametrize("stage", [0, 2])
def test_a_checkpoint_holds_no_base_and_is_resumed_bit_for_bit(small, tmp_path, bits, stage):
    ids = small.prompts(2).input_ids

    def step(engine):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    engine, resumed = (small.trained("actor", stage, 4, bits=bits) for _ in range(2))
    for one in (engine, resumed):
        step(one)
    assert moved(snapshot(engine.module), resumed.module)  # adapters were drawn otherwise
    engine_state.save(engine, tmp_path, CheckpointFiles())
    expected = step(engine), step(engine)
    saved = torch.load(next(tmp_path.rglob("*model_states.pt")), weights_only=False)["module"]
    assert {name.split(".")[-3] for name in saved} == {"lora_A", "lora_B"}
    engine_state.load(resumed, tmp_path, CheckpointFiles(), convert=False)
    assert (step(resumed), step(resumed)) == expected
    assert moved(snapshot(engine.module), resumed.module) == set()


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "words", "message"), [
    (1, "--load_in_4bit", "--load_in_4bit: needs LoRA; give --lora_dim, or remove the flag"),
    (3, "--load_in_8bit", "--load_in_8bit: needs LoRA; give --actor_lora_dim or "
        "--critic_lora_dim, or remove the flag"),
    (1, "--lora_dim 4 --load_in_4bit --load_in_8bit",
     "--load_in_8bit: contradicts --load_in_4bit; remove one of the two"),
    (1, "--lora_dim 4 --load_in_4bit --only_optimize_lora false",
     "--only_optimize_lora False: does not go with --load_in_4bit: quantized weights cannot be "
     "trained; remove one of the two"),
    (1, "--lora_dim 4 --load_in_8bit --zero_stage 3 --offload",
     "--zero_stage 3: does not go with --load_in_8bit: ZeRO-3 cannot shard quantized weights, nor "
     "--offload move them; take 2"),
    (3, "--critic_lora_dim 4 --load_in_4bit --critic_zero_stage 3",
     "--critic_zero_stage 3: does not go with --load_in_4bit: ZeRO-3 cannot shard quantized "
     "weights, nor --offload move them; take 2"),
    (3, "--actor_lora_dim 4 --load_in_4bit --rollout_engine vllm --vllm_url http://a:1",
     "--rollout_engine vllm: does not go with --load_in_4bit: the servers would compute with "
     "weights that are not quantized; take native"),
])
def test_flags_that_do_not_go_together_are_refused(step, words, message):
    record, paths = (Step1Config, "") if step == 1 else (
        Step3Config, "--actor_model_name_or_path a --critic_model_name_or_path c ")
    with pytest.raises(UserError) as refused:
        arguments.parse(record, (paths + words).split())
    assert str(refused.value) == message


def planned(path, bits, **role):
    return Planned(
        RoleConfig(model_name_or_path=str(path), lora_dim=4, **role), LoadingConfig(dtype="fp32"),
        AdapterConfig(only_optimize_lora=True, load_in_4bit=bits == 4, load_in_8bit=bits == 8))


def refusal(model):
    with pytest.raises(UserError) as refused:
        preflight.check([model])
    assert "\n" not in str(refused.value)
    return str(refused.value)


@BITS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_device_that_computes_is_accepted(small, bits, dtype):
    model = planned(small.actor, bits)
    preflight.check([replace(model, loading=LoadingConfig(dtype=dtype))])


def test_a_missing_package_is_named_before_anything_is_loaded(small, monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    preflight.check([planned(small.actor, None)])
    assert refusal(planned(small.actor, 4)) == (
        "--load_in_4bit: bitsandbytes is not installed; pip install bitsandbytes")


@BITS
@pytest.mark.parametrize(("change", "reason"), [
    (lambda y: y * 1.2, "(a product of 64 inputs is wrong by 2"),
    (lambda y: y * float("nan"), "(a product of 64 inputs is wrong by nan%)"),
    (lambda y: 1 // 0, "(integer division or modulo by zero)")])
def test_a_device_that_does_not_compute_is_refused(small, monkeypatch, bits, change, reason):
    kind = getattr(bitsandbytes.nn, {4: "Linear4bit", 8: "Linear8bitLt"}[bits])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: change(forward(self, x)))
    said = refusal(planned(small.actor, bits))
    assert said.startswith(f"--load_in_{bits}bit: bitsandbytes cannot compute in torch.float32 on "
                           "cpu (")
    assert reason in said
    assert said.endswith("; take the other of 4 and 8 bits, or remove the flag")


def test_a_cpu_is_refused_the_widths_that_it_computes_wrongly(tmp_path):
    """bitsandbytes 0.50 takes a neighbour's scale where rows are not whole blocks of 64."""
    save_models(tmp_path, intermediate_size=96, hidden_size=64)
    preflight.check([planned(tmp_path / "actor", 8)])
    assert "of 96 inputs is wrong by 2" in refusal(planned(tmp_path / "actor", 4))


@pytest.mark.parametrize(("kind", "sizes", "weight"), [
    ("mixtral", {"intermediate_size": 64, "num_local_experts": 2, "num_key_value_heads": 1},
     "model.layers.0.mlp.gate.weight"),
    ("falcon", {}, "transformer.h.0.self_attention.query_key_value.weight"),  # a class of its own
])
def test_a_model_that_would_stay_whole_is_refused(tmp_path, kind, sizes, weight):
    AutoConfig.for_model(kind, vocab_size=64, hidden_size=64, num_hidden_layers=1,
                         num_attention_heads=2, **sizes).save_pretrained(tmp_path)
    assert refusal(planned(tmp_path, 8)) == (
        f"--load_in_8bit: only plain linear layers are quantized, and the larger part of {tmp_path}"
        f" is in others, such as {weight}; remove the flag, or give another model")


def test_a_role_without_lora_is_not_quantized_and_a_line_says_so(small):
    args = arguments.parse(Step3Config, [
        "--actor_model_name_or_path", small.actor, "--critic_model_name_or_path", small.critic,
        "--actor_lora_dim", "4", "--load_in_4bit"])
    assert arguments.notices(args) == [
        "--load_in_4bit has no effect on the critic: --critic_lora_dim is 0"]
    assert [model.bits for model in preflight.planned(args)] == [4, None]
    assert not stored(small.trained("critic", bits=4, only_lora=False).module)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_that_is_quantized_already_is_refused(small, tmp_path, bits):
    settings = quantized.config(4, torch.float32)
    AutoModelForCausalLM.from_pretrained(
        small.actor, quantization_config=settings).save_pretrained(tmp_path)
    assert refusal(planned(tmp_path, bits)) == (
        f"{tmp_path}: its weights are quantized already (bitsandbytes), and what is exported would "
        "not be whole; give the model that they were made from")
