"""Step 3 with one base for the four roles: the numbers of four models, and what is refused."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import golden_curves
import pytest
import torch
from conftest import learn, moved, save_adapted, snapshot
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.training_model.step2_reward_model_finetuning import main as step2
from alpaca_rlhf.training_model.step3_rlhf_finetuning import main as step3
from alpaca_rlhf.utils.configs import AdapterConfig, LoadingConfig, RoleConfig
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.model.reward_model import TokenScorer, scores
from alpaca_rlhf.utils.model.weights.backbone import SAMPLE_FILE, Backbone, require_shareable
from alpaca_rlhf.utils.model.weights.whole import merged_state_dict
from alpaca_rlhf.utils.run.checkpoints import Checkpoints
from alpaca_rlhf.utils.run.export import export


@pytest.fixture(scope="module")
def adapted(small, tmp_path_factory):
    return save_adapted(small, tmp_path_factory.mktemp("adapted"))


def shared(adapted, **options):
    return adapted.roles(lora=4, places={"share_backbone": True}, **options)


def weights_of(engine):
    """Return the storages of the base, and the elements of all other weights."""
    modules = [engine.actor.module, engine._reference, engine.critic.module, engine._reward]
    base, own = set(), 0
    for module in modules:
        for name, weight in module.named_parameters():
            if ".lora_" in name or ".score." in name:
                own += weight.numel()
            else:
                base.add(weight.data_ptr())
    return base, own


def test_the_base_stands_in_memory_once(adapted, small):
    engine = shared(adapted)
    base, own = weights_of(engine)
    assert len(base) == len(list(small.causal_lm().parameters()))
    assert own < sum(p.numel() for p in small.causal_lm().parameters()) / 2
    assert "reference model: an adapter of its own" in engine.summary[0]
    assert "reward model: an adapter of its own" in engine.summary[1]


def test_the_roles_give_the_numbers_of_the_four_merged_models(adapted, small):
    engine = shared(adapted)
    policy, scorer = adapted.causal_lm(), adapted.reward_model()
    rollout = adapted.maker(engine, tokens=8).generate(adapted.prompts(4))
    scored, _ = adapted.maker(engine).score(rollout)
    batch = rollout.input_ids, rollout.attention_mask
    logits = policy(input_ids=batch[0], attention_mask=batch[1],
                    position_ids=(batch[1].cumsum(-1) - 1).clamp(min=0)).logits
    found = logits.log_softmax(-1)[:, -rollout.response_length - 1 : -1].gather(
        -1, rollout.responses.unsqueeze(-1)).squeeze(-1) * rollout.response_mask
    for name in ("logprobs", "ref_logprobs"):
        assert_close(getattr(scored, name) * rollout.response_mask, found.detach(),
                     rtol=1e-4, atol=1e-4)
    expected = scores(TokenScorer(scorer), *batch)
    assert_close(scored.score, expected.detach(), rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01
    last = scored.values.gather(1, scored.response_mask.long().sum(-1, keepdim=True) - 1)
    assert last.std() > 1e-3 and not torch.equal(last[:, 0], scored.score)


def iterations(adapted, stage, count=2, **options):
    """Return the engine after some PPO iterations, and their metrics."""
    torch.manual_seed(0)
    engine = shared(adapted, stage=stage, eos_every=6, **{**adapted.comparable, **options})
    maker, trainer = adapted.maker(engine, hybrid=True, tokens=8), adapted.trainer(engine)
    records = []
    for number in range(count):
        experience, metrics = adapted.experience(maker, trainer=trainer, number=number)
        records.append(metrics | learn(trainer, experience, number))
    return engine, records


@pytest.mark.parametrize(("stage", "options"), [
    (0, {}), (1, {}), (2, {"gradient_checkpointing": True}), (2, {"dtype": "bf16"})])
def test_it_learns_bit_for_bit_like_roles_that_share_nothing(
    adapted, monkeypatch, stage, options
):
    engine, records = iterations(adapted, stage, **options)
    before = {"actor": adapted.actor, "critic": adapted.critic}
    assert len(weights_of(engine)[0]) < 100
    monkeypatch.setattr(Backbone, "_twin", staticmethod(copy.deepcopy))
    apart, expected = iterations(adapted, stage, **options)
    assert len(weights_of(apart)[0]) > 1.9 * len(weights_of(engine)[0])
    for one, other in zip(records, expected, strict=True):
        timeless = {name for name in one if not name.startswith("time/")}
        assert {n: one[n] for n in timeless} == {n: other[n] for n in timeless}
    for role in before:
        given, same = getattr(engine, role).module, getattr(apart, role).module
        assert snapshot(given).keys() == snapshot(same).keys()
        assert moved(snapshot(given), same) == set()
        started = load_file(Path(before[role]) / "adapter" / "adapter_model.safetensors")
        trained = snapshot(given)
        learned = [name for name in started
                   for full in trained if full.replace(".default", "").removeprefix("model.")
                   == name and not torch.equal(trained[full].float(), started[name].float())]
        assert learned


def test_only_the_own_adapter_of_actor_and_critic_learns(adapted):
    fresh, trained = shared(adapted), iterations(adapted, 0, count=1)[0]
    for name in ("_reference", "_reward"):
        assert moved(snapshot(getattr(fresh, name)), getattr(trained, name)) == set()
    for role in ("actor", "critic"):
        changed = moved(snapshot(getattr(fresh, role).module), getattr(trained, role).module)
        assert changed and all(".lora_" in name or "modules_to_save" in name for name in changed)


def test_an_export_is_base_and_adapter_and_can_be_shared_again(adapted, small, tmp_path):
    engine, _ = iterations(adapted, 0)
    export(engine.actor.module, adapted.tokenizer, tmp_path / "actor", "card", {})
    export(engine.critic.module.model, adapted.tokenizer, tmp_path / "critic", "card", {})
    again = shared(replace(adapted, folder=tmp_path))
    for role in ("actor", "critic"):
        given, expected = getattr(again, role).module, getattr(engine, role).module
        assert moved(snapshot(expected), given) == set()
    merged = load_file(tmp_path / "actor" / "model.safetensors")
    expected, _ = merged_state_dict(engine.actor.module, True)
    assert all(merged[name].equal(expected[name]) for name in merged)
    assert not merged["model.layers.0.mlp.up_proj.weight"].equal(
        small.causal_lm().state_dict()["model.layers.0.mlp.up_proj.weight"])


# --- refused -------------------------------------------------------------------------------------


def roles(adapted, lora=4):
    return (RoleConfig(adapted.actor, lora_dim=lora, prefix="actor_"),
            RoleConfig(adapted.critic, lora_dim=lora, prefix="critic_"))


def copied(adapted, folder):
    shutil.copytree(adapted.folder / "actor", folder / "actor")
    shutil.copytree(adapted.folder / "critic", folder / "critic")
    return replace(adapted, folder=folder)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapters_of_one_base_are_shareable(adapted):
    require_shareable(roles(adapted), AdapterConfig())


@pytest.mark.parametrize(("change", "lora", "alpha", "words"), [
    (lambda f: shutil.rmtree(f / "actor" / "adapter"), 4, None,
     "--actor_model_name_or_path .*has no adapter .*run steps 1 and 2 with --lora_dim"),
    (lambda f: None, 8, None, "--actor_lora_dim 8: .*has rank 4; give --actor_lora_dim 4"),
    (lambda f: None, 4, 3.0, "--lora_alpha 3.0: .*has 8; leave the flag out"),
    (lambda f: (f / "critic" / "adapter" / "adapter_config.json").write_text("{"), 4, None,
     "adapter_config.json: .*train the adapter again"),
    (lambda f: edit(f / "critic" / "adapter" / "adapter_config.json", peft_type="IA3"), 4, None,
     "is no LoRA adapter"),
    (lambda f: edit(f / "critic" / "adapter" / "adapter_config.json", modules_to_save=None), 4,
     None, "has no score head"),
    (lambda f: (f / "critic" / "adapter" / SAMPLE_FILE).write_bytes(b"broken"), 4, None,
     f"{SAMPLE_FILE}: .*train the adapter again"),
])
def test_what_cannot_be_shared_is_refused_in_a_line(
    adapted, tmp_path, change, lora, alpha, words
):
    given = copied(adapted, tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words) as refused:
        require_shareable(roles(given, lora), AdapterConfig(lora_alpha=alpha))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_is_found_by_its_content(adapted, tmp_path, dtype):
    given = copied(adapted, tmp_path)
    path = tmp_path / "critic" / "adapter" / SAMPLE_FILE
    sample = {name: x.to(dtype) for name, x in load_file(path).items()}
    save_file(sample, path)
    require_shareable(roles(given), AdapterConfig())  # another precision is the same base
    name = "model.layers.1.mlp.up_proj.weight"
    sample[name][3] *= 1.05
    save_file(sample, path)
    with pytest.raises(UserError, match=f"different bases .{name} differs"):
        require_shareable(roles(given), AdapterConfig())


def test_quantized_weights_are_compared_as_they_are_stored(adapted, tmp_path):
    given, name = copied(adapted, tmp_path), "model.layers.1.mlp.up_proj.weight"

    def store(role, number):
        path = tmp_path / role / "adapter" / SAMPLE_FILE
        save_file(load_file(path) | {name: torch.tensor([7, number], dtype=torch.uint8)}, path)

    store("actor", 1)
    require_shareable(roles(given), AdapterConfig())  # only one of the two is quantized
    store("critic", 1)
    require_shareable(roles(given), AdapterConfig())
    store("critic", 2)
    with pytest.raises(UserError, match=f"different bases .{name} differs"):
        require_shareable(roles(given), AdapterConfig())


def test_a_base_that_was_replaced_is_refused(adapted, small, tmp_path):
    given = copied(adapted, tmp_path)
    for role in ("actor", "critic"):
        edit(tmp_path / role / "adapter" / "adapter_config.json",
             base_model_name_or_path=adapted.actor)  # merged: with the adapter in it already
    with pytest.raises(UserError, match="is not the model that the adapter in .* was trained on"):
        Backbone(roles(given), LoadingConfig(dtype="fp32"), AdapterConfig(), small.tokenizer)


def test_an_adapter_without_a_sample_is_taken_with_a_line(adapted, tmp_path, capsys):
    given = copied(adapted, tmp_path)
    (tmp_path / "critic" / "adapter" / SAMPLE_FILE).unlink()
    require_shareable(roles(given), AdapterConfig())
    assert "cannot be checked" in capsys.readouterr().out


# --- the steps -----------------------------------------------------------------------------------


SHORT = ["--dtype", "fp32", "--max_steps", 4, "--seed", 3, "--overlong", "drop"]
SUPERVISED = [*SHORT, "--lora_dim", 4, "--per_device_train_batch_size", 4, "--max_seq_len", 96,
              "--eval_iters", 1]
PPO = [*SHORT, "--share_backbone", "--actor_lora_dim", 4, "--critic_lora_dim", 4,
       "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 2,
       "--max_prompt_seq_len", 96, "--max_answer_seq_len", 8, "--eval_prompts", 2,
       "--enable_hybrid_engine", "--save_steps", 1, "--save_total_limit", 9]


@pytest.fixture(scope="module")
def steps(small, tmp_path_factory):
    """The folder in which steps 1 and 2 have run from one base, and step 3 on what they wrote."""
    folder = tmp_path_factory.mktemp("steps")
    cache = ["--data_output_path", folder / "cache"]
    for step, name in ((step1, "actor"), (step2, "critic")):
        golden_curves.run(step, folder / name, *SUPERVISED, *cache,
                          "--model_name_or_path", small.actor)
    run_step3(folder, "whole")
    return folder


def run_step3(folder, name, *more):
    return golden_curves.run(
        step3, folder / name, *PPO, "--data_output_path", folder / "cache",
        "--actor_model_name_or_path", folder / "actor",
        "--critic_model_name_or_path", folder / "critic", *more)


def exported(folder, name):
    return {role: load_file(folder / name / role / "model.safetensors")
            for role in ("actor", "critic")}


def test_the_three_steps_run_and_leave_whole_models(steps):
    whole, start = exported(steps, "whole"), load_file(steps / "actor" / "model.safetensors")
    assert whole["actor"].keys() == start.keys()
    assert any(not whole["actor"][name].equal(start[name]) for name in start)
    metrics = [json.loads(line) for line in (steps / "whole" / "metrics.jsonl").read_text()
               .splitlines()]
    assert metrics[0]["policy/first_log_ratio_max"] < 1e-5
    assert metrics[0]["kl/k1"] == pytest.approx(0, abs=1e-5)  # the actor is the reference
    assert metrics[-1]["kl/k3"] > 1e-9


def test_a_run_that_was_stopped_is_resumed_bit_for_bit(steps, monkeypatch):
    boundary = Checkpoints.step_boundary

    def stopping(self, step, *arguments, **options):
        boundary(self, step, *arguments, **options)
        if step == 2:
            raise TrainingStopped("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "step_boundary", stopping)
        with pytest.raises(TrainingStopped):
            run_step3(steps, "stopped")
    run_step3(steps, "stopped", "--resume_from_checkpoint", "latest")
    whole, resumed = exported(steps, "whole"), exported(steps, "stopped")
    for role, weights in whole.items():
        assert all(resumed[role][name].equal(weight) for name, weight in weights.items())
