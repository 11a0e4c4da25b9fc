"""The plan of memory and time: its parts against bytes worked out by hand and against real runs."""

from __future__ import annotations

import functools
import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from alpaca_rlhf.utils import (
    arguments,
    losses,
    preflight,
    projection,
)
from alpaca_rlhf.utils.configs import Step1Config, Step2Config, Step3Config
from alpaca_rlhf.utils.data.batches import TokenBatch
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.memory import footprint, memory_plan, planning
from alpaca_rlhf.utils.memory.footprint import Job
from alpaca_rlhf.utils.memory.memory_plan import Place, Speed
from alpaca_rlhf.utils.model.causal_lm import at_labels
from alpaca_rlhf.utils.model.reward_model import ScoreHead
from alpaca_rlhf.utils.training_loop import accumulate, global_weight

GB = 10**9
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 19,
         "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
         "tie_word_embeddings": True}
# 32000 x 2048 + 19 x (attention 9,437,184 + MLP 34,603,008 + norms 4,096) + norm 2,048
BILLION, LAYERS = 902_379_520, 19 * (9_437_184 + 34_603_008)
HEAD = 2048  # of the reward model


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders of a LLaMA of nearly 10^9 parameters and of its reward model, without weights."""
    folder = tmp_path_factory.mktemp("billion")
    for name, kind in (("actor", "LlamaForCausalLM"), ("critic", "LlamaForSequenceClassification")):
        LlamaConfig(**SIZES, architectures=[kind], num_labels=1).save_pretrained(folder / name)
    return folder


def step1(path, *flags, dtype="fp32"):
    return arguments.parse(Step1Config, ["--model_name_or_path", str(path), "--dtype", dtype,
                                         *map(str, flags)])


def step3(folder, *flags, dtype="bf16"):
    return arguments.parse(Step3Config, [
        "--actor_model_name_or_path", str(folder / "actor"), "--critic_model_name_or_path",
        str(folder / "critic"), "--dtype", dtype, *map(str, flags)])


def planned(path, *flags, dtype="fp32"):
    return preflight.planned(step1(path, *flags, dtype=dtype))[0]


def phase(found, name):
    return next(phase for phase in found.phases if phase.name == name)


# --- weights, optimizer, gradients ---------------------------------------------------------------


@pytest.mark.parametrize("scores", [False, True])
def test_the_parameters_counted_are_those_of_the_loaded_model(small, scores):
    path, auto = ((small.critic, AutoModelForSequenceClassification) if scores
                  else (small.actor, AutoModelForCausalLM))
    count = sum(weight.numel() for weight in auto.from_pretrained(path).parameters())
    model = replace(planned(path), scores=scores)
    assert (memory_plan.sizes(model).base, memory_plan.sizes(model).trained) == (count, count)


def test_parameters_by_kind(billion):
    found = memory_plan.sizes(planned(billion / "actor", "--lora_dim", 8))
    assert (found.base, found.linear, found.adapted) == (BILLION, LAYERS, LAYERS)
    assert found.laid_out == LAYERS + 32000 * 2048
    assert found.largest == 2048 * 5632
    per_layer = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 5632)  # q o, k v, MLP
    assert found.adapter == found.trained == 8 * 19 * per_layer


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_adapters_are_counted_as_peft_makes_them(small, name):
    weights = [(n, w) for n, w in small.trained(name, lora=4).module.named_parameters()]
    trained = sum(weight.numel() for _, weight in weights if weight.requires_grad)
    model = replace(planned(getattr(small, name), "--lora_dim", 4), scores=name == "critic")
    found = memory_plan.sizes(model)
    assert found.trained == trained
    assert found.base + found.adapter == sum(weight.numel() for _, weight in weights)


BUCKET = 4 * 5e8 / BILLION  # DeepSpeed's largest, in bytes per parameter


@pytest.mark.parametrize(("flags", "ranks", "dtype", "states", "gradients", "buckets"), [
    ("", 1, "fp32", 8, 4, 0),
    ("", 2, "fp32", 8, 4, BUCKET),
    ("--zero_stage 1", 4, "fp32", 12 / 4, 0, 2 * BUCKET),  # they are in the buckets
    ("--zero_stage 2", 4, "bf16", 12 / 4, 4 / 4, 2 * BUCKET),
    ("", 4, "bf16", 12 / 4, 4 / 4, 2 * BUCKET),  # stage 2
    ("--zero_stage 3", 4, "fp32", 12 / 4, 4 / 4, 3 * BUCKET),
])
def test_bytes_per_parameter_at_the_end_of_a_backward_pass(
    machine, billion, flags, ranks, dtype, states, gradients, buckets
):
    machine(GB, GB, ranks, bf16=True)
    model = memory_plan._Model(
        planned(billion / "actor", *flags.split(), dtype=dtype), Place(ranks, cpu=False))
    end = model.moments(Job(1, 8, 8), False)[-1]
    found = memory_plan._sum(model.states()[0], end)
    wanted = {"optimizer: model": states, "gradients": gradients, "buckets": buckets}
    assert {name: size / BILLION for name, size in found.items()} == pytest.approx(
        {name: size for name, size in wanted.items() if size})
    width, norms = 4 if dtype == "fp32" else 2, 39 * 2048  # whole beside their shards
    shard = width * BILLION / 4 + width * norms
    assert model.base == pytest.approx(shard if "3" in flags else width * BILLION)


@pytest.mark.parametrize(("flags", "actor", "base"), [
    ("--load_in_4bit", 0.5 + 1 / 64 + 4 / 64 / 256, "weights: actor"),
    ("--load_in_8bit", 1.0, "weights: actor"),
    ("--load_in_4bit --share_backbone", 0.5 + 1 / 64 + 4 / 64 / 256, "weights: shared base"),
])
def test_quantized_and_shared_weights(machine, billion, flags, actor, base):
    machine(GB, GB, bf16=True)
    args = step3(billion, *flags.split(), "--actor_lora_dim", 8, "--critic_lora_dim", 8)
    load = phase(memory_plan.plan(args, Place(cpu=False)), "load").device
    rest = 2 * (BILLION - LAYERS)
    assert load[base] == pytest.approx(actor * LAYERS + rest)
    if "share" in flags:
        adapter = memory_plan.sizes(preflight.planned(args)[0]).adapter
        assert load["adapters: actor, reference model"] == 2 * 2 * adapter
        assert not any(name.startswith("weights: critic") for name in load)


def test_one_base_for_four_roles_is_less_than_two_and_four(machine, billion):
    machine(GB, GB, bf16=True)
    lora = ("--actor_lora_dim", 8, "--critic_lora_dim", 8)
    weights = [memory_plan.plan(step3(billion, *flags), Place(cpu=False)).weights / (2 * BILLION)
               for flags in ((*lora, "--share_backbone"), lora, ())]
    assert weights == pytest.approx([1, 2, 4], rel=0.1)
    assert weights[0] < weights[1] < weights[2]


def test_offloading_moves_states_and_under_zero_3_weights_to_the_host(machine, billion):
    machine(GB, GB, bf16=True)
    found = memory_plan.plan(step1(billion / "actor", "--zero_stage", 3, "--offload"),
                             Place(cpu=False))
    assert phase(found, "evaluation").host == {
        "weights: model": 4 * BILLION, "optimizer: model": 12 * BILLION}
    assert "weights: model" not in phase(found, "evaluation").device


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("lora", [0, 4])
def test_what_stands_before_an_optimizer_step_is_what_is_planned(small, stage, lora, dtype):
    """Against all tensors of a real engine."""
    before = living()
    engine = small.trained("actor", stage, lora, dtype=dtype)
    ids = torch.arange(10, 18).unsqueeze(0)
    batch = TokenBatch(ids, torch.ones_like(ids), ids)
    for _ in range(2):  # the optimizer's states are made by the first step
        accumulate(engine, [batch], lambda batch: (
            at_labels(engine, batch.input_ids, batch.labels, losses.token_loss), {}),
            global_weight([batch]))
        held = living() - before
        engine.step()
    flags = ["--zero_stage", stage, "--lora_dim", lora]
    wanted = memory_plan.held(planned(small.actor, *flags, dtype=dtype))
    engine.destroy()
    assert held == pytest.approx(wanted, rel=0.06)  # rotary tables, padding of flat tensors


def living():
    gc.collect()
    storages = [one.untyped_storage() for one in gc.get_objects()
                if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# --- activations, logits, KV cache ---------------------------------------------------------------


def make(depth=2, **changes):
    """A LLaMA's configuration."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": False}
    return LlamaConfig(**{**sizes, "num_hidden_layers": depth, **changes})


def on_meta(config):
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_activations_are_those_that_a_real_run_saves():
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # an address is not used twice
        return tensor

    model = LlamaForCausalLM(make(8))
    ids = torch.arange(96).view(2, 48) % 300
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        at_labels(model, ids, ids, losses.token_loss)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    counted = sum(size for address, size in saved.items() if address not in weights)
    found = footprint.trace(on_meta(make(8)), Job(2, 48, 2 * 47))
    head = 300 * 64 * 4 + 94 * 64 * 4  # the loss computes its gradients at once, and saves nothing
    assert found.saved == pytest.approx(counted + head, rel=0.05)


@pytest.mark.parametrize("job", [Job(2, 48, 96), Job(3, 32, 40, policy=True),
                                 Job(2, 48, 96, checkpointing=True)])
@pytest.mark.parametrize("scores", [False, True])
def test_tensors_without_data_take_what_those_of_a_real_run_do(job, scores):
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    models = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            models.append(auto.from_config(make(3, num_labels=1)))
        if scores:
            models[-1].score = ScoreHead(models[-1].score)
    found, model = footprint.trace(models[0], job), models[1]
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with footprint.Meter(model, 300) as meter:
        ids = torch.zeros(job.rows, job.length, dtype=torch.long)
        loss = (footprint._scores if scores else footprint._language)(model.train(), ids, job)
        assert meter.now == pytest.approx(found.saved, rel=0.01)
        loss.backward()
    assert meter.peaks == [pytest.approx(peak, rel=0.01) for peak in (found.early, found.late)]


def test_logits_are_those_of_a_chunk_in_fp32(monkeypatch):
    words = 5000
    whole = footprint.trace(on_meta(make(vocab_size=words)), Job(2, 48, 96)).inference
    assert whole.logits >= words * 96 * 4
    monkeypatch.setattr(projection, "MOST_LOGITS", words * 10)
    chunks = footprint.trace(on_meta(make(vocab_size=words)), Job(2, 48, 96)).inference
    assert sum(chunks) < sum(whole) - words * (96 - 2 * 10) * 4


def test_checkpointing_keeps_the_layers_inputs_only_and_computes_forward_again():
    plain, less = (footprint.trace(on_meta(make(8)), Job(4, 64, 256, checkpointing=on))
                   for on in (False, True))
    layer_inputs = 8 * 4 * 64 * 64 * 4
    assert layer_inputs <= less.saved < layer_inputs + 0.1 * plain.saved
    assert sum(less.training[:2]) < 0.5 * sum(plain.training[:2])
    assert less.training_flops > plain.training_flops > 2.5 * plain.inference_flops


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
def test_a_deep_model_is_extrapolated_to_what_it_takes(rows, policy):
    job = Job(rows, 64, rows * 32, policy=policy)
    quick, whole = footprint.passes(on_meta(make(12)), job), footprint.trace(
        on_meta(make(12)), job)
    assert quick.training == pytest.approx(whole.training, rel=0.01)
    assert quick[1:2] + quick[4:] == pytest.approx(whole[1:2] + whole[4:], rel=1e-6)


def test_flops_are_two_for_each_weight_and_token_and_attentions_own():
    found = footprint.trace(on_meta(make()), Job(2, 48, 2 * 48))
    model = on_meta(make())
    weights = sum(w.numel() for w in model.parameters() if w.dim() == 2) - 300 * 64
    attention = 2 * 2 * 2 * 48 * 48 * 64 * 2  # layers, products, rows, T, T, width, 2
    assert found.inference_flops == 2 * weights * 96 + attention


def test_kv_cache_of_a_token(billion):
    found = memory_plan.passes(planned(billion / "actor"), Job(1, 8, 8))
    assert found.cache == 19 * 2 * (4 * 64) * 4  # layers, keys and values, heads x size, bytes


def test_rollouts_have_the_cache_of_all_slots_and_folded_weights(machine, billion):
    machine(GB, GB, cpu=True)
    args = step3(billion, "--actor_lora_dim", 8, "--critic_lora_dim", 8, "--enable_hybrid_engine",
                 "--max_prompt_seq_len", 100, "--max_answer_seq_len", 28,
                 "--per_device_generation_batch_size", 4, "--num_generations", 2,
                 "--per_device_training_batch_size", 4, dtype="fp32")
    token = 19 * 2 * 256 * 4
    rollout = phase(memory_plan.plan(args, Place()), "rollout").device
    assert rollout["KV cache"] == token * (4 * (100 + 28 + 64) + 4 / 2 * 100)
    assert rollout["folded weights"] == 4 * LAYERS
    assert rollout["weights for decoding"] == 4 * (LAYERS + 32000 * 2048)
    kept = phase(memory_plan.plan(args, Place()), "update").device
    assert kept["KV cache"] == token * 4 * (100 + 28 + 64)
    freed = replace(args, hybrid=replace(args.hybrid, release_inference_cache=True))
    assert "KV cache" not in phase(memory_plan.plan(freed, Place()), "update").device
    external = replace(args, rollout_engine=replace(args.rollout_engine, rollout_engine="vllm"))
    assert "KV cache" not in phase(memory_plan.plan(external, Place()), "rollout").device


def test_pairs_are_two_sequences_each_and_sequences_no_longer_than_the_data(billion):
    flags = ["--model_name_or_path", str(billion / "actor"), "--dtype", "fp32", "--max_seq_len",
             "64", "--per_device_train_batch_size", "3"]
    args = arguments.parse(Step2Config, flags)
    model = memory_plan._Model(preflight.planned(args)[0], Place())
    assert memory_plan._job(model, args)[:2] == (6, 64)
    model = memory_plan._Model(preflight.planned(args)[0], Place(longest=40))
    assert memory_plan._job(model, args)[:2] == (6, 40)
    tokens = replace(args, schedule=replace(args.schedule, max_tokens_per_micro_batch=128))
    assert memory_plan._job(model, tokens)[:2] == (3, 40)


def test_time_follows_from_speed(billion):
    args = step1(billion / "actor", "--gradient_accumulation_steps", 2, "--max_seq_len", 64)
    seconds = [phase(memory_plan.plan(args, Place(speed=Speed(flops, 1e9))), "update").seconds
               for flops in (1e12, 2e12)]
    tokens = 2 * 16 * 64
    assert seconds[0] == pytest.approx(6 * BILLION * tokens / 1e12, rel=0.05)
    assert seconds[1] == pytest.approx(seconds[0] / 2)


# --- a setting that fits -------------------------------------------------------------------------


def test_what_fits_is_not_mentioned(machine, billion):
    machine(60 * GB, 60 * GB)
    assert planning.memory_warning(step1(billion / "actor", "--max_seq_len", 64)) is None


@pytest.mark.parametrize("flags", [
    (), ("--max_seq_len", 2048), ("--zero_stage", 2), ("--per_device_eval_batch_size", 64),
    ("--attn_implementation", "eager", "--max_seq_len", 2048)])
def test_the_bound_that_spares_a_plan_is_never_below_it(machine, billion, flags):
    machine(60 * GB, 60 * GB)
    for args in (step1(billion / "actor", *flags), step3(billion, dtype="fp32")):
        for place in (Place(), Place(2), Place(1, cpu=False)):
            assert memory_plan.plan(args, place).peak < memory_plan.bound(args, place)


def test_a_run_that_runs_out_by_its_activations_is_warned_of(machine, billion):
    machine(24 * GB, 40 * GB)
    warning = planning.memory_warning(step1(billion / "actor", "--max_seq_len", 1024))
    assert warning.startswith("warning: phase update takes ")
    assert "most of it activations, and 24.0 GB are free on the device and 40.0 GB" in warning
    assert warning.endswith("; try --gradient_accumulation_steps 8 --per_device_train_batch_size 2 "
                            "--per_device_eval_batch_size 2")


def test_weights_that_do_not_fit_are_refused(machine, billion):
    machine(3 * GB, 3 * GB, cpu=True)
    with pytest.raises(UserError) as refused:
        planning.check(step1(billion / "actor"))
    assert str(refused.value) == (
        "the weights alone take 3.6 GB on each rank, and 3.0 GB are free; take a smaller model, "
        "or more ranks and --zero_stage 3")


def test_a_folder_that_is_no_model_is_left_to_its_loader(machine, tmp_path, capsys):
    machine(3 * GB, 3 * GB, cpu=True)
    planning.check(step1(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_model_that_cannot_be_planned_runs_with_a_warning(machine, billion, monkeypatch):
    def choose_experts(*_):
        raise RuntimeError("data-dependent\nshape")

    machine(60 * GB, 60 * GB)
    monkeypatch.setattr(footprint, "passes", choose_experts)
    args = step1(billion / "actor", "--max_seq_len", 77)
    assert planning.memory_warning(args) == (
        f"warning: {billion / 'actor'}: its memory cannot be planned, for its layers do not run on "
        "tensors without data (data-dependent); the run itself needs no plan")


@pytest.mark.parametrize(("limit", "flags"), [(9, ""), (5, "--dtype bf16")])
def test_the_search_gives_the_cheapest_flags_that_fit(machine, billion, limit, flags):
    machine(GB, GB, bf16=True)
    args = step1(billion / "actor", "--max_seq_len", 64, "--lora_dim", 8)
    made, words = planning.fit(args, Place(cpu=False), limit * GB)
    assert words == flags
    assert memory_plan.plan(made, Place(cpu=False)).peak <= limit * GB


@pytest.mark.slow
def test_the_search_takes_back_what_was_not_needed(machine, billion, monkeypatch):
    machine(GB, GB, bf16=True)
    monkeypatch.setattr(planning, "CHANGES", (planning._checkpointing, planning._bf16))
    args, place = step1(billion / "actor", "--max_seq_len", 32, "--lora_dim", 8), Place(cpu=False)
    half = planning._bf16(args, place)
    limit = memory_plan.plan(half, place).peak
    assert memory_plan.plan(planning._checkpointing(args, place), place).peak > limit
    assert planning.fit(args, place, limit) == (half, "--dtype bf16")


@pytest.mark.slow
def test_the_search_gives_up_where_nothing_fits(machine, billion):
    machine(GB, GB, bf16=True)
    args = step3(billion, "--actor_lora_dim", 8, "--critic_lora_dim", 8, "--max_prompt_seq_len",
                 32, "--max_answer_seq_len", 32)
    shared, words = planning.fit(args, Place(cpu=False), 4 * GB)
    assert "--share_backbone" in words
    assert memory_plan.plan(shared, Place(cpu=False)).peak <= 4 * GB
    assert planning.fit(args, Place(cpu=False), 0.6 * GB) is None


def test_savings_are_named_with_what_they_save(machine, billion):
    machine(GB, GB, ranks=2, bf16=True)
    args, place = step1(billion / "actor"), Place(2, cpu=False)
    found = memory_plan.plan(args, place)
    named = dict(planning.savings(args, place, found))
    assert list(named)[0] == "--dtype bf16"
    for words, saved in named.items():
        assert saved > 0.01 * found.peak
        changed = step1(billion / "actor", *words.split()) if "--dtype" not in words else step1(
            billion / "actor", dtype="bf16")
        assert memory_plan.plan(changed, place).peak == pytest.approx(found.peak - saved)


def test_the_report_names_the_phase_that_decides_and_host_and_disk(machine, billion, tmp_path):
    machine(GB, GB, bf16=True)
    args = step3(billion, "--actor_lora_dim", 8, "--critic_lora_dim", 8, "--enable_ema",
                 "--output_dir", tmp_path / "out")
    text = planning.describe(args, Place(cpu=False, speed=Speed(1e14, 1e12)))
    lines = text.splitlines()
    assert lines[1].split() == ["load", "rollout", "scoring", "update", "save"]
    worst = memory_plan.plan(args, Place(cpu=False)).worst
    assert f"{worst.name} decides: {worst.total / 1e9:.2f} GB, most of it activations" in lines
    assert any(line.startswith("disk: 3 checkpoints ") for line in lines)
    assert "estimated time of one PPO iteration" in lines[-1]
    assert "EMA" in text and "in host memory" in text


def test_speed_is_measured(group):
    found = functools.partial(memory_plan.measured_speed.__wrapped__, torch.float32)()
    assert 1e8 < found.flops < 1e16 and 1e8 < found.bandwidth < 1e14


# --- the flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "message"), [
    (["--fit", "24GB"], "--fit 24GB: needs --dry_run; give it or remove the flag"),
    (["--dry_run", "--fit", "much"],
     "--fit much: must be a size of memory above 0, such as 24GB"),
    (["--dry_run", "--fit", "0GB"], "--fit 0GB: must be a size of memory above 0, such as 24GB"),
    (["--dry_run", "--speed", "71"],
     "--speed 71: must be two numbers above 0, TFLOP/s and GB/s, such as 71,936"),
    (["--dry_run", "--speed", "71,0"],
     "--speed 71,0: must be two numbers above 0, TFLOP/s and GB/s, such as 71,936"),
    (["--speed", "71,936"], "--speed 71,936: needs --dry_run; give it or remove the flag"),
])
def test_flags_that_are_refused(flags, message):
    with pytest.raises(UserError) as refused:
        arguments.parse(Step1Config, flags)
    assert str(refused.value) == message


@pytest.mark.parametrize(("text", "size"), [
    ("24GB", 24e9), ("80", 80e9), ("512 mb", 512e6), ("1.5TiB", 1.5e12)])
def test_sizes(text, size):
    args = arguments.parse(Step1Config, ["--dry_run", "--fit", text])
    assert args.run.fit_bytes == size


def test_nothing_that_fits_is_an_error_of_one_line(machine, billion):
    machine(GB, GB, cpu=True)
    args = step1(billion / "actor", "--dry_run", "--fit", "100MB", "--speed", "1,1")
    with pytest.raises(UserError, match="^--fit 100MB: no setting of this model fits; take a sm"):
        planning.report(args, 16)


def test_a_size_to_fit_is_an_accelerators_also_where_there_is_none(machine, billion):
    machine(GB, GB, cpu=True)
    args = step1(billion / "actor", "--dry_run", "--fit", "24GB")
    assert planning.here(args, 40).longest == 40
    assert (planning.here(args).cpu, planning.here(args).speed) == (False, None)
    given = planning.here(step1(billion / "actor", "--dry_run", "--speed", "1,2"))
    assert (given.cpu, given.speed) == (True, Speed(1e12, 2e9))


def without_weights(path, folder):
    return shutil.copytree(path, folder / Path(path).name,
                           ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_dry_run_needs_no_weights_checks_all_and_writes_nothing(small, imported, tmp_path):
    actor, critic = (without_weights(path, tmp_path) for path in (small.actor, small.critic))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {i}?", "chosen": f"It is {i}.",
                                        "rejected": "No."}) + "\n" for i in range(60)))
    shared = ["--data_path", rows, "--data_output_path", tmp_path / "cache", "--dry_run",
              "--output_dir", tmp_path / "out"]
    steps = {
        1: ["--model_name_or_path", actor, "--max_seq_len", 64],
        2: ["--model_name_or_path", actor, "--max_seq_len", 64, "--fit", "2GB"],
        3: ["--actor_model_name_or_path", actor, "--critic_model_name_or_path", critic,
            "--max_answer_seq_len", 8, "--share_backbone",  # adapters are still to come
            "--actor_lora_dim", 4, "--critic_lora_dim", 4],
    }
    for step, flags in steps.items():
        run = imported.run([programs.MAINS[step], *flags, *shared], tmp_path)
        assert (run.returncode, run.stderr) == (0, ""), run.stdout
        assert "data: " in run.stdout and " decides: " in run.stdout
        assert (step == 2) == ("fits into 2 GB with: the flags given" in run.stdout)
    assert not list(tmp_path.glob("*out*"))
    run = imported.run([programs.MAINS[1], *steps[1], *shared, "--lora_dim", "4",
                        "--lora_module_name", "nothing"], tmp_path)
    assert run.returncode == 2 and "nothing: matches no linear layer" in run.stderr
