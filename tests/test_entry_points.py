"""Each step as a command: plain `python`, `my_deepspeed.py`, the `deepspeed` command.

A start takes some seconds, nearly all of them imports; so two chains of the three steps are run
once, and the tests look at what they have printed and written.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_models
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from alpaca_rlhf.training_model import my_deepspeed

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING = REPOSITORY / "alpaca_rlhf" / "training_model"
MAINS = {name: TRAINING / folder / "main.py" for name, folder in (
    ("actor", "step1_supervised_finetuning"), ("critic", "step2_reward_model_finetuning"),
    ("final", "step3_rlhf_finetuning"))}
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start(folder: Path, words: list[Any]) -> list[str]:
    """Run a command that must succeed in silence on standard error; gives what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    environment = {
        **kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]]),
    }
    # Not another XDG_CACHE_HOME: torch would build DeepSpeed's extensions there once more.
    words = [*words, "--data_output_path", folder / "cache"]
    run = subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, text=True, capture_output=True,
        timeout=280,
    )
    assert (run.returncode, run.stderr) == (0, ""), (run.returncode, run.stdout, run.stderr)
    return run.stdout.splitlines()


def record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return rows_of(folder / "metrics.jsonl")


@dataclass
class Chain:
    """A folder with `actor`, `critic` and `final`, and what each run printed."""

    folder: Path
    base: Path
    printed: dict[str, list[str]]


def rows_file(path: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
            for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def step_3_models(folder: Path) -> list[Any]:
    return ["--actor_model_name_or_path", folder / "actor",
            "--critic_model_name_or_path", folder / "critic"]


# --- plain python --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The three steps, one process each, two optimizer steps each, on small data."""
    folder = tmp_path_factory.mktemp("plain python")
    base = folder / "base"
    save_models(base)
    shared = ["--data_path", rows_file(folder / "rows.jsonl"), "--max_steps", 2]
    small = ["--model_name_or_path", base / "actor", "--max_seq_len", 64,
             "--per_device_train_batch_size", 4, *shared]
    flags = {
        "actor": [*small, "--learning_rate", "1e-3"],
        "critic": [*small, "--learning_rate", "1e-3"],
        "final": [*step_3_models(folder), *shared, "--max_answer_seq_len", 8, "--eval_prompts", 4,
                  "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4,
                  "--enable_ema", "--print_answers"],
    }
    printed = {name: start(folder, [sys.executable, MAINS[name], *words,
                                    "--output_dir", folder / name])
               for name, words in flags.items()}
    return Chain(folder, base, printed)


def test_a_plain_run_prints_our_lines_and_nothing_else(plain):
    assert [line.split(":")[0].split("  ")[0] for line in plain.printed["actor"]] == [
        "tokenizer", "data", "model", "before", "step 1/2", "step 2/2", "after",
        f"saved to {plain.folder}/actor", "report"]


def test_step_1_says_what_it_trains_and_measures(plain):
    said = plain.printed["actor"]
    assert any(line.startswith("model: LoRA off; trains ") for line in said)
    assert any(line.startswith("before: perplexity ") for line in said)


def test_step_1_writes_a_causal_lm_that_transformers_reads(plain):
    model = AutoModelForCausalLM.from_pretrained(plain.folder / "actor")
    base = AutoModelForCausalLM.from_pretrained(plain.base / "actor")
    assert type(model).__name__ == "LlamaForCausalLM"
    moved = [name for (name, new), old in zip(model.named_parameters(), base.parameters(),
                                              strict=True) if not torch.equal(new, old)]
    assert len(moved) == len(list(base.parameters()))


def test_step_2_writes_a_sequence_classifier_and_its_statistics(plain):
    model = AutoModelForSequenceClassification.from_pretrained(plain.folder / "critic")
    assert (type(model).__name__, model.config.num_labels) == ("LlamaForSequenceClassification", 1)
    statistics = record(plain.folder / "critic" / "score_statistics.json")
    after = record(plain.folder / "critic" / "results.json")["after"]
    assert statistics == {
        "mean": after["score_mean"], "std": after["score_std"], "count": after["pairs"]}


def test_step_3_writes_actor_critic_and_average(plain):
    final = plain.folder / "final"
    for name in ("actor", "actor_ema"):
        assert type(AutoModelForCausalLM.from_pretrained(final / name)).__name__ == (
            "LlamaForCausalLM")
    critic = AutoModelForSequenceClassification.from_pretrained(final / "critic")
    assert critic.config.num_labels == 1


def test_every_export_has_its_tokenizer_and_template(plain):
    question = [{"role": "user", "content": "Hi"}]
    for name in ("actor", "critic", "final/actor", "final/critic", "final/actor_ema"):
        tokenizer = AutoTokenizer.from_pretrained(plain.folder / name)
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        assert text == "<s>Human: Hi\n\nAssistant:"


@pytest.mark.parametrize(("name", "keys"), [
    ("actor", {"step", "loss", "lr", "grad_norm", "epoch"}),
    ("critic", {"step", "loss", "accuracy", "lr", "grad_norm", "epoch"}),
    ("final", {"step", "reward/score_mean", "kl/k1", "kl/k3", "response/eos_rate", "policy/loss",
               "value/loss", "time/rollout"}),
])
def test_metrics_have_a_row_for_each_of_two_steps(plain, name, keys):
    rows = metrics(plain.folder / name)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(keys <= row.keys() for row in rows)


@pytest.mark.parametrize(("name", "number"), [("actor", 1), ("critic", 2), ("final", 3)])
def test_results_hold_before_and_after_and_the_data_used(plain, name, number):
    results = record(plain.folder / name / "results.json")
    assert results["step"] == number
    assert results["before"].keys() == results["after"].keys() != set()
    assert results["data"]["train"] > 0
    assert results["data"]["held_out"] > 0


def test_the_steps_trained_on_different_prompts(plain):
    used = [record(plain.folder / name / "results.json")["data"] for name in plain.printed]
    assert sum(data["train"] for data in used) + used[0]["held_out"] == 120
    assert len({data["held_out"] for data in used}) == 1


def test_answers_are_shown_when_asked_for(plain):
    said = plain.printed["final"]
    assert sum(line.startswith("prompt ") and line.endswith("score") for line in said) == 2


def test_every_step_leaves_a_report_of_what_it_has_recorded(plain):
    plots = {"actor": 3, "critic": 3 + 4, "final": 13 + 3}  # no gold rule for this data
    for name, count in plots.items():
        html = (plain.folder / name / "report.html").read_text()
        assert html.count("<figure") == count, name
        assert "not finished" not in html
        assert plain.printed[name][-1] == f"report: {plain.folder}/{name}/report.html"


def test_step_2_records_the_scores_of_every_held_out_pair(plain):
    pairs = rows_of(plain.folder / "critic" / "pair_scores.jsonl")
    after = record(plain.folder / "critic" / "results.json")["after"]
    assert len(pairs) == after["pairs"]
    right = sum(pair["chosen"] > pair["rejected"] for pair in pairs)
    assert right / len(pairs) == after["accuracy"]
    assert all(pair["chosen_tokens"] > pair["rejected_tokens"] > 4 for pair in pairs)


def test_step_3_records_samples_token_by_token(plain):
    samples = rows_of(plain.folder / "final" / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 4 + [2] * 4
    for row in samples:
        tokens = row["tokens"]
        trained = sum(tokens["mask"])
        assert len(tokens["text"]) == len(tokens["mask"]) > trained > 0
        assert "".join(tokens["text"]).startswith("<s>Human: What is")
        for name in ("logprob", "kl", "value", "advantage", "reward"):
            assert len(tokens[name]) == trained
        if row["step"] == 1:  # the policy still is the reference: all reward stands on the last
            assert set(tokens["kl"]) == set(tokens["reward"][:-1]) | {0.0} == {0.0}
            assert tokens["reward"][-1] != 0


def test_an_alarm_ends_step_3_with_one_line_and_leaves_what_it_recorded(plain):
    words = [sys.executable, MAINS["final"], *step_3_models(plain.folder), "--data_path",
             plain.folder / "rows.jsonl", "--max_steps", 2, "--max_answer_seq_len", 8,
             "--eval_prompts", 0, "--per_device_generation_batch_size", 4,
             "--per_device_training_batch_size", 4, "--data_output_path", plain.folder / "cache",
             "--actor_dropout", 0.5, "--stop_on_alarm", "--output_dir", plain.folder / "stopped"]
    kept = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    run = subprocess.run(list(map(str, words)), cwd=plain.folder, env=kept, text=True,
                         capture_output=True, timeout=280)
    partial = plain.folder / "stopped.partial"
    assert (run.returncode, run.stderr) == (1, (
        f"--stop_on_alarm: stopped at step 1 by: ratio; what was recorded is in {partial}\n"))
    assert "alarm at step 1: at the first update a log-ratio is " in run.stdout
    assert [row["kind"] for row in rows_of(partial / "events.jsonl")] == ["ratio"]
    assert not (plain.folder / "stopped").exists()
    shutil.rmtree(partial)


def test_no_unfinished_folder_is_left(plain):
    assert {path.name for path in plain.folder.iterdir()} >= {"actor", "critic", "final"}
    assert not list(plain.folder.glob("*.partial")) + list(plain.folder.glob("*.old"))


def test_saved_arguments_reproduce_the_run(plain):
    again = plain.folder / "again"
    start(plain.folder, [
        sys.executable, MAINS["actor"], "--config",
        plain.folder / "actor" / "training_arguments.json", "--output_dir", again])
    first = load_file(plain.folder / "actor" / "model.safetensors")
    second = load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["loss"] for row in metrics(again)] == [
        row["loss"] for row in metrics(plain.folder / "actor")]


# --- my_deepspeed.py, with the command lines of old scripts --------------------------------------


@pytest.fixture(scope="module")
def old_scripts(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The three command lines of alpaca-rlhf's first version, on the embedded data.

    Added are a small model, where the embedded one would first be built, and limits.
    """
    folder = tmp_path_factory.mktemp("old scripts")
    base = folder / "base"
    save_models(base)
    model = ["--model_name_or_path", base / "actor", "--max_steps", 2, "--eval_iters", 2]
    flags = {
        "actor": ["--gradient_accumulation_steps", 2, "--lora_dim", 128, "--zero_stage", 0,
                  "--deepspeed", *model],
        "critic": ["--num_padding_at_beginning", 0, "--gradient_accumulation_steps", 2,
                   "--zero_stage", 0, "--deepspeed", *model],
        "final": [*step_3_models(folder), "--actor_zero_stage", 0, "--critic_zero_stage", 0,
                  "--num_padding_at_beginning", 0, "--gradient_accumulation_steps", 2,
                  "--deepspeed", "--actor_lora_dim", 128, "--enable_hybrid_engine",
                  "--actor_gradient_checkpointing", "--max_steps", 2, "--max_answer_seq_len", 8,
                  "--eval_prompts", 16],
    }
    printed = {name: start(folder, [sys.executable, TRAINING / "my_deepspeed.py", "--num_gpus", 1,
                                    MAINS[name], *words, "--output_dir", folder / name])
               for name, words in flags.items()}
    return Chain(folder, base, printed)


LORA = "LoRA matched 14 modules with 15,360 parameters; trains 118,784 of "


@pytest.mark.parametrize(("name", "line"), [
    ("actor", f"model: {LORA}"),
    ("critic", "model: LoRA off; trains "),
    ("final", f"actor: {LORA}"),
    ("final", "critic: LoRA off; trains "),
])
def test_old_scripts_print_what_lora_matched_and_trains(old_scripts, name, line):
    assert sum(said.startswith(line) for said in old_scripts.printed[name]) == 1


def test_old_scripts_print_whose_model_is_whose(old_scripts):
    said = "\n".join(old_scripts.printed["final"])
    assert "; reference: the actor, adapter off\n" in said
    assert "; reward model: a frozen copy\n" in said


def test_flags_without_effect_are_said_once(old_scripts):
    for said in old_scripts.printed.values():
        assert sum(line.startswith("--deepspeed") for line in said) == 1
    assert sum(line.startswith("--num_padding_at_beginning")
               for line in old_scripts.printed["critic"]) == 1


def test_the_embedded_data_is_announced(old_scripts):
    for said in old_scripts.printed.values():
        assert said.count("--data_path is not given: using the embedded data set") == 1


def test_an_adapter_is_saved_beside_the_merged_model(old_scripts):
    for name in ("actor", "final/actor"):
        assert (old_scripts.folder / name / "adapter" / "adapter_model.safetensors").is_file()
        AutoModelForCausalLM.from_pretrained(old_scripts.folder / name)


def test_the_gold_rule_measures_the_embedded_data(old_scripts):
    results = record(old_scripts.folder / "final" / "results.json")
    assert 0 <= results["after"]["gold"] <= 1
    assert len(results["dialogues"]) == 16


# --- the deepspeed command -----------------------------------------------------------------------


def by_deepspeed(folder: Path, name: str, *words: Any) -> list[str]:
    port = my_deepspeed.choose_port(0)
    return start(folder, [
        Path(sys.executable).with_name("deepspeed"), "--master_port", port, "--num_gpus", 1,
        MAINS[name], "--data_path", rows_file(folder / "rows.jsonl"), "--max_steps", 2,
        "--output_dir", folder / name, *words])


def test_the_deepspeed_command_starts_step_3(tmp_path):
    save_models(tmp_path / "base")
    said = by_deepspeed(
        tmp_path, "final", *step_3_models(tmp_path / "base"), "--max_answer_seq_len", 8,
        "--eval_prompts", 0, "--per_device_generation_batch_size", 4,
        "--per_device_training_batch_size", 4)
    assert f"saved to {tmp_path}/final" in said
    assert [row["step"] for row in metrics(tmp_path / "final")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_the_deepspeed_command_starts_steps_1_and_2(tmp_path, name):
    save_models(tmp_path / "base")
    said = by_deepspeed(
        tmp_path, name, "--model_name_or_path", tmp_path / "base" / "actor", "--max_seq_len", 64,
        "--per_device_train_batch_size", 4)
    assert f"saved to {tmp_path}/{name}" in said
    assert [row["step"] for row in metrics(tmp_path / name)] == [1, 2]
