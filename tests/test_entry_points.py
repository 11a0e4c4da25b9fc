"""Each step as a command: plain `python`, `my_deepspeed.py`, the `deepspeed` command.

Two chains of the three steps are run once, and the tests look at what they have printed and
written. A start takes ten seconds, nearly all of them imports; so only some are started so, and
the others are forks of a process that has imported the libraries.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import save_models
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from alpaca_rlhf.training_model import launching

NUMBERS = {"actor": 1, "critic": 2, "final": 3}
PYTHON = [sys.executable]
BOOTSTRAP = [sys.executable, programs.BOOTSTRAP, "--num_gpus", 1]
SMALL = ["--max_seq_len", 64, "--per_device_train_batch_size", 4, "--learning_rate", "1e-3"]
SMALL_PPO = ["--max_answer_seq_len", 8, "--per_device_generation_batch_size", 4,
             "--per_device_training_batch_size", 4]


def start(
    folder: Path, name: str, words: Sequence[Any], by: Sequence[Any] | programs.Imported,
    code: int = 0, error: str = "",
) -> list[str]:
    """Run a step that must end with this code and standard error; return what it printed."""
    # Not another XDG_CACHE_HOME: torch would build DeepSpeed's extensions there once more.
    words = [programs.MAINS[NUMBERS[name]], *words, "--data_output_path", folder / "cache"]
    if isinstance(by, programs.Imported):
        run = by.run(words, folder)
    else:
        run = subprocess.run(
            list(map(str, [*by, *words])), cwd=folder, env=programs.environment(), text=True,
            capture_output=True, timeout=280)
    assert (run.returncode, run.stderr) == (code, error), (run.returncode, run.stdout, run.stderr)
    return run.stdout.splitlines()


def record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Chain:
    """A folder with `actor`, `critic` and `final`, and what each run printed."""

    folder: Path
    base: Path
    printed: dict[str, list[str]]


def data(folder: Path) -> list[Any]:
    """Flags of a small data set, which is written to the folder, and of two steps."""
    path = folder / "rows.jsonl"
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
            for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data_path", path, "--max_steps", 2]


def step_3_models(folder: Path) -> list[Any]:
    return ["--actor_model_name_or_path", folder / "actor",
            "--critic_model_name_or_path", folder / "critic"]


# --- plain python --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, imported: programs.Imported) -> Chain:
    """The three steps, two optimizer steps each, on small data."""
    folder = tmp_path_factory.mktemp("plain python")
    base = folder / "base"
    save_models(base)
    shared = data(folder)
    small = ["--model_name_or_path", base / "actor", *SMALL, *shared]
    flags = {
        "actor": small, "critic": small,
        "final": [*step_3_models(folder), *SMALL_PPO, *shared, "--eval_prompts", 4,
                  "--enable_ema", "--print_answers"],
    }
    printed = {name: start(folder, name, [*words, "--output_dir", folder / name],
                           PYTHON if name == "final" else imported)
               for name, words in flags.items()}
    return Chain(folder, base, printed)


def test_a_plain_run_prints_our_lines_and_nothing_else(plain):
    printed = plain.printed["actor"]
    assert [line.split(":")[0].split("  ")[0] for line in printed] == [
        "tokenizer", "data", "model", "before", "step 1/2", "step 2/2", "after",
        f"saved to {plain.folder}/actor", "report"]
    assert printed[2].startswith("model: LoRA off; trains ")
    assert printed[3].startswith("before: perplexity ")


@pytest.mark.parametrize(("name", "auto", "kind"), [
    ("actor", AutoModelForCausalLM, "LlamaForCausalLM"),
    ("critic", AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
    ("final/actor", AutoModelForCausalLM, "LlamaForCausalLM"),
    ("final/actor_ema", AutoModelForCausalLM, "LlamaForCausalLM"),
    ("final/critic", AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
])
def test_transformers_loads_every_export_with_its_tokenizer_and_chat_template(
    plain, name, auto, kind
):
    model = auto.from_pretrained(plain.folder / name)
    assert type(model).__name__ == kind
    assert "Causal" in kind or model.config.num_labels == 1
    text = AutoTokenizer.from_pretrained(plain.folder / name).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<s>Human: Hi\n\nAssistant:"


def test_step_1_moves_every_weight(plain):
    new, old = (load_file(folder / "actor" / "model.safetensors")
                for folder in (plain.folder, plain.base))
    assert new.keys() == old.keys()
    assert not any(torch.equal(new[name], old[name]) for name in new)


def test_step_2_saves_the_score_statistics_and_the_scores_of_every_held_out_pair(plain):
    folder = plain.folder / "critic"
    after, pairs = record(folder / "results.json")["after"], rows_of(folder / "pair_scores.jsonl")
    assert record(folder / "score_statistics.json") == {
        "mean": after["score_mean"], "std": after["score_std"], "count": after["pairs"]}
    assert len(pairs) == after["pairs"]
    right = sum(pair["chosen"] > pair["rejected"] for pair in pairs)
    assert right / len(pairs) == after["accuracy"]
    assert all(pair["chosen_tokens"] > pair["rejected_tokens"] > 4 for pair in pairs)


@pytest.mark.parametrize(("name", "number", "keys"), [
    ("actor", 1, {"step", "loss", "lr", "grad_norm", "epoch"}),
    ("critic", 2, {"step", "loss", "accuracy", "lr", "grad_norm", "epoch"}),
    ("final", 3, {"step", "reward/score_mean", "kl/k1", "kl/k3", "response/eos_rate",
                  "policy/loss", "value/loss", "time/rollout"}),
])
def test_metrics_have_a_row_for_each_step_and_results_are_of_before_and_after(
    plain, name, number, keys
):
    rows = rows_of(plain.folder / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(keys <= row.keys() for row in rows)
    results = record(plain.folder / name / "results.json")
    assert results["step"] == number
    assert results["before"].keys() == results["after"].keys() != set()


def test_the_steps_train_on_different_prompts_and_share_the_held_out_ones(plain):
    used = [record(plain.folder / name / "results.json")["data"] for name in plain.printed]
    assert all(data["train"] > 0 for data in used)
    assert sum(data["train"] for data in used) + used[0]["held_out"] == 120
    assert len({data["held_out"] for data in used}) == 1


def test_responses_are_printed_when_asked_for(plain):
    printed = plain.printed["final"]
    assert sum(line.startswith("prompt ") and line.endswith("score") for line in printed) == 2


@pytest.mark.parametrize(("name", "plots"), [("actor", 3), ("critic", 7), ("final", 16)])
def test_every_step_leaves_a_report_of_what_it_has_recorded(plain, name, plots):
    html = (plain.folder / name / "report.html").read_text()
    assert html.count("<figure") == plots
    assert "not finished" not in html
    assert plain.printed[name][-1] == f"report: {plain.folder}/{name}/report.html"


def test_step_3_records_samples_token_by_token(plain):
    samples = rows_of(plain.folder / "final" / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 4 + [2] * 4
    for row in samples:
        tokens = row["tokens"]
        assert "".join(tokens["text"]).startswith("<s>Human: What is")
        if row["step"] == 1:  # the policy still is the reference: all reward is on the last token
            assert set(tokens["kl"]) == set(tokens["reward"][:-1]) | {0.0} == {0.0}
            assert tokens["reward"][-1] != 0


def test_an_alarm_ends_step_3_with_one_line_and_leaves_what_it_recorded(plain, imported):
    partial = plain.folder / "stopped.partial"
    printed = start(
        plain.folder, "final",
        [*step_3_models(plain.folder), *SMALL_PPO, *data(plain.folder), "--eval_prompts", 0,
         "--actor_dropout", 0.5, "--stop_on_alarm", "--output_dir", plain.folder / "stopped"],
        imported, code=1,
        error=f"--stop_on_alarm: stopped at step 1 by: ratio; metrics are in {partial}\n",
    )
    assert any(line.startswith("alarm at step 1: before the first update the log-ratios are ")
               for line in printed)
    assert [row["kind"] for row in rows_of(partial / "events.jsonl")] == ["ratio"]
    assert not (plain.folder / "stopped").exists()


def test_saved_arguments_reproduce_the_run(plain, imported):
    first, again = plain.folder / "actor", plain.folder / "again"
    start(plain.folder, "actor",
          ["--config", first / "training_arguments.json", "--output_dir", again], imported)
    assert not list(plain.folder.glob("again.*"))
    one, other = (load_file(folder / "model.safetensors") for folder in (first, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[row["loss"] for row in rows_of(folder / "metrics.jsonl")]
              for folder in (first, again)]
    assert losses[0] == losses[1]


# --- my_deepspeed.py and `deepspeed`, with the command lines of old scripts -----------------------


def deepspeed_command() -> list[Any]:
    """DeepSpeed's own launcher."""
    return [Path(sys.executable).with_name("deepspeed"), "--master_port", launching.choose_port(0),
            "--num_gpus", 1]


@pytest.fixture(scope="module")
def old_scripts(tmp_path_factory: pytest.TempPathFactory, imported: programs.Imported) -> Chain:
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
    by = {"actor": deepspeed_command(), "critic": imported, "final": BOOTSTRAP}
    printed = {name: start(folder, name, [*words, "--output_dir", folder / name], by[name])
               for name, words in flags.items()}
    return Chain(folder, base, printed)


LORA = "LoRA matched 14 modules (*) with 15,360 parameters; trains 118,784 of "


@pytest.mark.parametrize(("name", "line"), [
    ("actor", f"model: {LORA}*"),
    ("critic", "model: LoRA off; trains *"),
    ("final", f"actor: {LORA}*; reference model: the actor with its adapter disabled"),
    ("final", "critic: LoRA off; trains *; reward model: a frozen copy"),
    ("critic", "--num_padding_at_beginning has no effect: *"),
    *((name, line) for name in NUMBERS for line in (
        "--deepspeed has no effect: *", "--data_path is not given: using the embedded data set")),
])
def test_old_scripts_print_their_models_data_and_flags_without_effect_once(
    old_scripts, name, line
):
    assert sum(fnmatch(printed, line) for printed in old_scripts.printed[name]) == 1


@pytest.mark.parametrize("name", ["actor", "final/actor"])
def test_an_adapter_is_saved_beside_the_merged_model(old_scripts, name):
    assert (old_scripts.folder / name / "adapter" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(old_scripts.folder / name)


def test_the_embedded_data_has_a_gold_rule(old_scripts):
    results = record(old_scripts.folder / "final" / "results.json")
    assert 0 <= results["after"]["gold"] <= 1
    assert len(results["dialogues"]) == 16


# --- the deepspeed command -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_the_deepspeed_command_starts_each_step(tmp_path, name):
    save_models(tmp_path / "base")
    words = (["--model_name_or_path", tmp_path / "base" / "actor", *SMALL] if name != "final" else
             [*step_3_models(tmp_path / "base"), *SMALL_PPO, "--eval_prompts", 0])
    printed = start(
        tmp_path, name, [*words, *data(tmp_path), "--output_dir", tmp_path / name],
        deepspeed_command())
    assert f"saved to {tmp_path}/{name}" in printed
    assert [row["step"] for row in rows_of(tmp_path / name / "metrics.jsonl")] == [1, 2]
