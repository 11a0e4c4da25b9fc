"""What a user gets wrong ends in one line that names flag or file, value and remedy; exit code 2.

Most cases call the step's `main` in this process; a few start the command, to see what is printed.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_models
from tiny_model import word_tokenizer

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = {1: "step1_supervised_finetuning", 2: "step2_reward_model_finetuning",
         3: "step3_rlhf_finetuning"}
PROJECTIONS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(60)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `actor` and `critic`, and `pairs.jsonl`; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    (folder / "pairs.jsonl").write_text(lines(PAIRS))
    return folder


class Command:
    """A step's command line with a small model and small data; a test changes what it is about."""

    def __init__(self, models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models, self.folder, self.monkeypatch = models, folder, monkeypatch
        self.output = folder / "out"

    def words(self, step: int, **changes: object) -> list[str]:
        flags: dict[str, object] = {
            "data_path": self.models / "pairs.jsonl", "data_output_path": self.folder / "cache",
            "output_dir": self.output, "max_steps": 1,
        }
        if step == 3:
            flags |= {
                "actor_model_name_or_path": self.models / "actor",
                "critic_model_name_or_path": self.models / "critic",
                "max_prompt_seq_len": 64, "max_answer_seq_len": 8,
            }
        else:
            flags |= {"model_name_or_path": self.models / "actor", "max_seq_len": 64}
        return [word for name, value in (flags | changes).items() if value is not None
                for word in (f"--{name}", str(value))]

    def refusal(self, step: int, **changes: object) -> str:
        """The line that the step's `main` is refused with; nothing has been made but the cache."""
        main = importlib.import_module(f"alpaca_rlhf.training_model.{STEPS[step]}.main")
        self.monkeypatch.setattr(sys, "argv", ["main.py", *self.words(step, **changes)])
        self.monkeypatch.setattr(distributed, "initialize", lambda *_: None)
        with pytest.raises(UserError) as refused:
            main.main()
        assert not self.output.exists()
        line = str(refused.value)
        assert "\n" not in line
        return line

    def run(self, step: int, **changes: object) -> subprocess.CompletedProcess[str]:
        """What the command prints, started as a user does."""
        script = REPOSITORY / "alpaca_rlhf" / "training_model" / STEPS[step] / "main.py"
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        return subprocess.run(
            [sys.executable, str(script), *self.words(step, **changes)], cwd=self.folder,
            env={**environment, "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True, timeout=200,
        )


@pytest.fixture
def command(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(models, tmp_path, monkeypatch)


# --- data ----------------------------------------------------------------------------------------

BROKEN = lines(PAIRS[:16]) + '{"prompt": "What?", "chosen": "This.",\n' + lines(PAIRS[17:])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_broken_line_17(command, tmp_path, step):
    path = tmp_path / "broken.jsonl"
    path.write_text(BROKEN)
    assert command.refusal(step, data_path=path) == (
        f"{path}, line 17: not JSON (Expecting property name enclosed in double quotes); "
        "mend or remove the line")


def test_missing_columns(command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([{"prompt": "a", "chosen": "b"}]))
    assert command.refusal(2, data_path=path).startswith(
        f"--data_path {path}: the columns prompt, chosen fit no known form; known are "
        "prompt+chosen+rejected; question+chosen+rejected; chosen+rejected; ")


def test_an_empty_file(command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    assert command.refusal(1, data_path=path) == (
        f"--data_path {path}: the file is empty; give one with rows")


def test_an_extra_data_set_that_is_not_there_names_its_own_flag(command, tmp_path):
    assert command.refusal(1, sft_only_data_path=tmp_path / "no.json").startswith(
        f"--sft_only_data_path {tmp_path}/no.json: no such file or folder")


@pytest.mark.parametrize(("step", "flags", "flag"), [
    (1, {"max_seq_len": 8}, "--max_seq_len 8"),
    (2, {"max_seq_len": 8, "overlong": "drop"}, "--max_seq_len 8"),
    (3, {"max_prompt_seq_len": 4}, "--max_prompt_seq_len 4"),
])
def test_prompts_that_are_all_too_long(command, step, flags, flag):
    line = command.refusal(step, data_split="1,1,1", **flags)
    before, _, after = line.partition(" prompts are longer; ")
    assert before.startswith(f"{flag}: all ")
    assert after == "raise it"


def test_a_step_that_no_row_falls_to(command, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(PAIRS[:1]))
    line = command.refusal(1, data_path=path, data_split="0.001,1,1")
    assert line == (
        "--data_path: no row is left to train on (no data); give more data, or this step a larger "
        "share of --data_split")


def test_a_cache_folder_that_cannot_be_made(command, tmp_path):
    (tmp_path / "file").touch()
    assert command.refusal(1, data_output_path=tmp_path / "file" / "cache") == (
        f"--data_output_path {tmp_path}/file/cache: cannot be made (Not a directory); "
        "give a folder that can")


# --- models --------------------------------------------------------------------------------------


def test_a_model_folder_without_a_config(command, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "actor", folder)
    (folder / "config.json").unlink()
    assert command.refusal(1, model_name_or_path=folder) == (
        f"no model can be loaded from {folder}: the folder has no config.json; "
        "give a Hugging Face model folder")


def test_an_empty_model_folder(command, tmp_path):
    (tmp_path / "model").mkdir()
    line = command.refusal(1, model_name_or_path=tmp_path / "model")
    assert line.startswith(f"no tokenizer can be loaded from {tmp_path}/model: ")
    assert line.endswith("; give a folder with tokenizer files")


def test_a_model_that_is_not_there(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = command.refusal(1, model_name_or_path=tmp_path / "nowhere")
    assert line.startswith(f"no tokenizer can be loaded from {tmp_path}/nowhere: ")
    assert line.endswith("; check the name")


@pytest.mark.parametrize(("step", "flag"), [
    (1, "model_name_or_path"), (1, "tokenizer_name_or_path"), (3, "critic_model_name_or_path")])
def test_a_hub_id_that_is_not_cached_when_there_is_no_network(command, monkeypatch, step, flag):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    changes = {"reward_normalization": "none"} if step == 3 else {}
    assert command.refusal(step, **{flag: "nobody/nothing"}, **changes) == (
        "nobody/nothing: no such folder, HF_HUB_OFFLINE is set, and the hub's cache "
        f"({constants.HF_HUB_CACHE}) has nothing of that name; give a folder, unset "
        "HF_HUB_OFFLINE, or fill the cache where there is a network (hf download nobody/nothing)")


def test_broken_weights(command, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "actor", folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    line = command.refusal(1, model_name_or_path=folder)
    assert line.startswith(f"no model can be loaded from {folder}: ")
    assert line.endswith("; copy or train it again")


def test_a_lora_name_that_matches_nothing(command):
    assert command.refusal(1, lora_dim=4, lora_module_name="q_proj,nonesuch") == (
        f"--lora_module_name nonesuch: matches no linear layer; there are {PROJECTIONS}")


def test_an_actors_lora_name_that_matches_nothing(command):
    assert command.refusal(3, actor_lora_dim=4, actor_lora_module_name="attn.c_attn") == (
        f"--actor_lora_module_name attn.c_attn: matches no linear layer; there are {PROJECTIONS}")


def test_actor_and_critic_with_different_tokenizers(command, models, tmp_path):
    critic = tmp_path / "critic"
    shutil.copytree(models / "critic", critic)
    word_tokenizer("Human: Assistant:").save_pretrained(critic)
    assert command.refusal(3, critic_model_name_or_path=critic) == (
        "--actor_model_name_or_path and --critic_model_name_or_path have different vocabularies "
        f"({models}/actor, {critic}); train both from the same model")


def test_a_critic_that_is_no_reward_model(command, models):
    assert command.refusal(3, critic_model_name_or_path=models / "actor",
                           reward_normalization="reference") == (
        f"--critic_model_name_or_path {models}/actor: is no reward model (a sequence classifier "
        "with one label); give the folder that step 2 wrote")


def test_a_reward_model_without_statistics(command, models, tmp_path):
    critic = tmp_path / "critic"
    shutil.copytree(models / "critic", critic)
    (critic / "score_statistics.json").unlink()
    assert command.refusal(3, critic_model_name_or_path=critic) == (
        f"--reward_normalization checkpoint: {critic}/score_statistics.json is missing or broken; "
        "run step 2 again, or take --reward_normalization reference")


# --- flags ---------------------------------------------------------------------------------------


def test_a_zero_stage_that_does_not_exist(command):
    assert command.refusal(2, zero_stage=4) == "--zero_stage 4: must be one of 0, 1, 2, 3"


def test_a_training_batch_that_does_not_divide_the_rollouts(command):
    assert command.refusal(3, per_device_training_batch_size=5) == (
        "--per_device_training_batch_size 5: must divide the 16 rollouts of a PPO iteration "
        "(--per_device_generation_batch_size 16 x --generation_batches 1); try 4 or 8")


@pytest.mark.parametrize(("name", "problem"), [
    ("nowhere:length", "No module named 'nowhere'"),
    ("json:nowhere", "module 'json' has no attribute 'nowhere'"),
])
def test_a_reward_function_that_does_not_exist(command, name, problem):
    assert command.refusal(3, reward_function=name) == (
        f"--reward_function {name}: {problem}; give module:name, with its folder on PYTHONPATH")


def test_a_reward_function_that_is_none(command):
    assert command.refusal(3, reward_function="math:pi") == (
        "--reward_function math:pi: is not callable; name a function")


def test_half_precision_on_a_cpu(command):
    if not distributed.on_cpu():
        pytest.skip("this machine has an accelerator")
    assert command.refusal(1, dtype="fp16") == (
        "--dtype fp16: a CPU does not train in fp16; take fp32 or bf16")


def test_a_deepspeed_config_that_contradicts_a_flag(command, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 3}')
    assert command.refusal(1, deepspeed_config=path) == (
        f"--deepspeed_config {path}: train_micro_batch_size_per_gpu is 3, but the flags give 16; "
        "take train_micro_batch_size_per_gpu out of the file")


# --- the output folder ---------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert command.refusal(1, output_dir=tmp_path / "file" / "out") == (
        f"--output_dir {tmp_path}/file/out: cannot be written (Not a directory); "
        "give a folder that can")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_folder_that_is_a_file(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert command.refusal(1, output_dir=tmp_path / "file") == (
        f"--output_dir {tmp_path}/file: is a file; give a folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_output_folder_that_holds_another_run(command, tmp_path, step):
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text("{}")
    assert command.refusal(step, output_dir=other) == (
        f"--output_dir {other}: is not empty, another run may be in it; give another folder, or "
        "--overwrite_output_dir to replace it")
    assert [path.name for path in other.iterdir()] == ["results.json"]
    assert not (tmp_path / "cache").exists()


def test_a_refused_run_does_not_replace_the_run_it_was_to_overwrite(command, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text("{}")
    line = command.refusal(
        1, output_dir=other, overwrite_output_dir=True, data_path=tmp_path / "no.jsonl")
    assert line.startswith(f"--data_path {tmp_path}/no.jsonl: no such file")
    assert [path.name for path in other.iterdir()] == ["results.json"]


# --- as the user sees it -------------------------------------------------------------------------


def refused(run: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error of a command that ended with exit code 2."""
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), (run.returncode, run.stderr)
    assert run.stderr.startswith("error: ")
    return run.stderr.removeprefix("error: ").rstrip("\n")


def test_a_wrong_flag_on_the_console(command):
    run = command.run(1, zero_stage=4)
    assert refused(run) == "--zero_stage 4: must be one of 0, 1, 2, 3"
    assert run.stdout == ""


def test_a_broken_file_on_the_console(command, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(BROKEN)
    run = command.run(2, data_path=path)
    assert refused(run).startswith(f"{path}, line 17: not JSON (")
    assert [line.split(":")[0] for line in run.stdout.splitlines()] == ["tokenizer"]
    assert not command.output.exists()


def test_a_wrong_module_name_on_the_console(command):
    run = command.run(3, actor_lora_dim=4, actor_lora_module_name="nonesuch")
    assert refused(run) == (
        f"--actor_lora_module_name nonesuch: matches no linear layer; there are {PROJECTIONS}")
    assert run.stdout == "", "refused only after the data was read"
    assert not command.output.exists()


def test_a_model_without_a_config_on_the_console(command, models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "actor", folder)
    (folder / "config.json").unlink()
    run = command.run(1, model_name_or_path=folder)
    assert refused(run).startswith(f"no model can be loaded from {folder}: ")
    assert not command.output.exists()


def test_a_bug_keeps_its_traceback_and_exit_code_1(capsys, monkeypatch):
    def broken() -> None:
        raise KeyError("a bug")

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("RANK", "0")
    console.run_main(broken)
    assert codes == [1]
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def full() -> None:
        raise OSError(28, "No space left on device", "out/model.safetensors")

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("RANK", "0")
    console.run_main(full)
    assert codes == [1]
    assert capsys.readouterr().err == (
        "error: no space left on the disk of out/model.safetensors; free some and start again, "
        "with --resume_from_checkpoint latest if there are checkpoints\n")
