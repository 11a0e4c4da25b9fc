"""A user's mistake ends in one line that names flag or file, value and remedy; exit code 2.

Most cases call the step's `main` in this process; a few run its script, to see what is printed.
"""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import save_models
from programs import MAINS, STEPS, Imported
from tiny_model import word_tokenizer
from transformers import AutoConfig

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.errors import UserError

PROJECTIONS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(60)]
FILES = {
    "pairs.jsonl": lines(PAIRS), "one.jsonl": lines(PAIRS[:1]), "empty.jsonl": "", "file": "mine",
    "broken.jsonl": lines(PAIRS[:16]) + '{"prompt": "What?", "chosen": "This.",\n' + lines(PAIRS),
    "columns.jsonl": lines([{"prompt": "a", "chosen": "b"}]), "other/results.json": "{}",
    "ds.json": '{"train_micro_batch_size_per_gpu": 3}',
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models `actor` and `critic`, broken copies of them, and files; tests leave all as it is.
    """
    folder = tmp_path_factory.mktemp("given")
    save_models(folder)
    (folder / "empty").mkdir()
    for copy, model in (("no_config", "actor"), ("torn", "actor"), ("other_words", "critic"),
                        ("no_statistics", "critic"), ("actor_of_other_words", "actor"),
                        ("pointer", "actor"), ("pointed_words", "actor")):
        shutil.copytree(folder / model, folder / copy)
    (folder / "no_config" / "config.json").unlink()
    (folder / "torn" / "model.safetensors").write_bytes(b"torn")
    (folder / "no_statistics" / "score_statistics.json").unlink()
    for name in ("other_words", "actor_of_other_words"):
        word_tokenizer("Human: Assistant:").save_pretrained(folder / name)
    for name in ("pointer/model.safetensors", "pointed_words/tokenizer.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "pointer" / "pytorch_model.bin").write_bytes(b"PK")
    AutoConfig.for_model("cohere", hidden_size=16, num_hidden_layers=1).save_pretrained(
        folder / "cohere")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").touch()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[Path, int]:
    """When each file was written; lock files, which stay, are left out."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


class Command:
    """A step's command line with a small model and small data, and the changes of a test."""

    def __init__(self, given: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given, self.folder, self.monkeypatch = given, folder, monkeypatch
        self.output = folder / "out"

    def words(self, step: int, **changes: object) -> list[str]:
        flags: dict[str, object] = {
            "data_path": self.given / "pairs.jsonl", "data_output_path": self.folder / "cache",
            "output_dir": self.output, "max_steps": 1, "dtype": "fp32",
        }
        if step == 3:
            flags |= {
                "actor_model_name_or_path": self.given / "actor",
                "critic_model_name_or_path": self.given / "critic",
                "max_prompt_seq_len": 64, "max_answer_seq_len": 8,
            }
        else:
            flags |= {"model_name_or_path": self.given / "actor", "max_seq_len": 64}
        return [word for name, value in (flags | changes).items()
                for word in (f"--{name}", str(value).replace("GIVEN", str(self.given)))]

    def refusal(self, step: int, **changes: object) -> str:
        """The line that the step's `main` ends in; only the cache may have been written."""
        main = importlib.import_module(f"alpaca_rlhf.training_model.{STEPS[step]}.main")
        self.monkeypatch.setattr(sys, "argv", ["main.py", *self.words(step, **changes)])
        self.monkeypatch.setattr(distributed, "initialize", lambda *_: None)
        before = contents(self.given)
        with pytest.raises(UserError) as refused:
            main.main()
        assert contents(self.given) == before
        assert not self.output.exists()
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def run(self, imported: Imported, step: int, **changes: object) -> tuple[str, str]:
        """The line on standard error of a script that exits with code 2, and standard output."""
        run = imported.run([MAINS[step], *self.words(step, **changes)], self.folder)
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), (run.returncode, run.stderr)
        assert run.stderr.startswith("error: ")
        assert not self.output.exists()
        return run.stderr.removeprefix("error: ").rstrip("\n"), run.stdout


@pytest.fixture
def command(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(given, tmp_path, monkeypatch)


BROKEN_LINE = ("GIVEN/broken.jsonl, line 17: not JSON (Expecting property name enclosed in double "
               "quotes); mend or remove the line")
ANOTHER_RUN = ("--output_dir GIVEN/other: holds a run or a model (config.json); give another "
               "folder, or --overwrite_output_dir to replace it")


@pytest.mark.parametrize(("step", "changes", "line"), [
    # Data; … stands for the words of a library, or a number.
    (1, {"data_path": "GIVEN/broken.jsonl"}, BROKEN_LINE),
    (2, {"data_path": "GIVEN/broken.jsonl"}, BROKEN_LINE),
    (3, {"data_path": "GIVEN/broken.jsonl"}, BROKEN_LINE),
    (2, {"data_path": "GIVEN/columns.jsonl"},
     "--data_path GIVEN/columns.jsonl, row 1: the columns prompt (text), chosen (text) fit no "
     "known data format; the nearest is prompt + chosen + rejected (missing: rejected); …"),
    (1, {"data_path": "GIVEN/empty.jsonl"},
     "--data_path GIVEN/empty.jsonl: the file is empty; give one with rows"),
    (1, {"sft_only_data_path": "GIVEN/no.json"},
     "--sft_only_data_path GIVEN/no.json: no such file or folder…"),
    (1, {"max_seq_len": 8, "data_split": "1,1,1"},
     "--max_seq_len 8: all … prompts are longer; raise it"),
    (2, {"max_seq_len": 8, "data_split": "1,1,1", "overlong": "drop"},
     "--max_seq_len 8: all … prompts are longer; raise it"),
    (3, {"max_prompt_seq_len": 4, "data_split": "1,1,1"},
     "--max_prompt_seq_len 4: all … prompts are longer; raise it"),
    (1, {"data_path": "GIVEN/one.jsonl", "data_split": "0.001,1,1"},
     "--data_path: no row is left to train on (no data); give more data, or this step a larger "
     "share of --data_split"),
    (1, {"data_output_path": "GIVEN/file/cache"},
     "--data_output_path GIVEN/file/cache: cannot be made (Not a directory); give a folder that "
     "can"),
    # Models
    (1, {"model_name_or_path": "GIVEN/no_config"},
     "no model can be loaded from GIVEN/no_config: the folder has no config.json; give a Hugging "
     "Face model folder"),
    (1, {"model_name_or_path": "GIVEN/empty"},
     "no tokenizer can be loaded from GIVEN/empty: …; give a folder with tokenizer files"),
    (1, {"model_name_or_path": "GIVEN/nowhere"},
     "no tokenizer can be loaded from GIVEN/nowhere: …; check the name"),
    (1, {"model_name_or_path": "GIVEN/torn"},
     "no model can be loaded from GIVEN/torn: …; copy or train it again"),
    (1, {"lora_dim": 4, "lora_module_name": "q_proj,nonesuch"},
     f"--lora_module_name nonesuch: matches no linear layer; there are {PROJECTIONS}"),
    (3, {"actor_lora_dim": 4, "actor_lora_module_name": "attn.c_attn"},
     f"--actor_lora_module_name attn.c_attn: matches no linear layer; there are {PROJECTIONS}"),
    (3, {"critic_model_name_or_path": "GIVEN/other_words"},
     "--actor_model_name_or_path and --critic_model_name_or_path have different vocabularies "
     "(GIVEN/actor, GIVEN/other_words); train both from the same model"),
    *[(3, {"critic_model_name_or_path": f"GIVEN/{folder}"},
       f"--critic_model_name_or_path GIVEN/{folder}: is no reward model (a sequence classifier "
       "with one label); give the folder that step 2 wrote")
      for folder in ("actor", "actor_of_other_words", "cohere")],
    (3, {"critic_model_name_or_path": "GIVEN/nowhere"},
     "no model can be loaded from GIVEN/nowhere: no such folder…; check the name"),
    *[(step, {f"{role}model_name_or_path": "GIVEN/pointer"},
       "no model can be loaded from GIVEN/pointer: its model.safetensors is a pointer of git LFS, "
       "not the data itself; run git lfs pull, or download the file")
      for step, role in ((1, ""), (2, ""), (3, "actor_"))],
    (1, {"model_name_or_path": "GIVEN/pointed_words"},
     "no tokenizer can be loaded from GIVEN/pointed_words: its tokenizer.json is a pointer of git "
     "LFS, not the data itself; run git lfs pull, or download the file"),
    (3, {"critic_model_name_or_path": "GIVEN/no_statistics"},
     "--critic_model_name_or_path GIVEN/no_statistics: the mean and standard deviation of its "
     "scores, which step 2 saves, are missing or broken; run step 2 again, or take "
     "--reward_normalization reference"),
    # Flags that need more than the command line to be checked
    (3, {"reward_function": "nowhere:length"},
     "--reward_function nowhere:length: No module named 'nowhere'; give module:name, with its "
     "folder on PYTHONPATH"),
    (3, {"reward_function": "json:nowhere"},
     "--reward_function json:nowhere: module 'json' has no attribute 'nowhere'; give module:name, "
     "with its folder on PYTHONPATH"),
    (3, {"reward_function": "math:pi"},
     "--reward_function math:pi: is not callable; name a function"),
    (1, {"deepspeed_config": "GIVEN/ds.json"},
     "--deepspeed_config GIVEN/ds.json: train_micro_batch_size_per_gpu is 3, but the flags give "
     "16; take train_micro_batch_size_per_gpu out of the file"),
    # The output folder
    (1, {"output_dir": "GIVEN/file/out"},
     "--output_dir GIVEN/file/out: cannot be written (Not a directory); give a folder that can"),
    (1, {"output_dir": "GIVEN/file"}, "--output_dir GIVEN/file: is a file; give a folder"),
    (1, {"output_dir": "GIVEN/other"}, ANOTHER_RUN),
    (2, {"output_dir": "GIVEN/other"}, ANOTHER_RUN),
    (3, {"output_dir": "GIVEN/other"}, ANOTHER_RUN),
    (1, {"output_dir": "GIVEN/other", "overwrite_output_dir": True, "data_path": "GIVEN/no.jsonl"},
     "--data_path GIVEN/no.jsonl: no such file…"),
])
def test_a_mistake_is_one_line_and_leaves_everything_as_it_was(command, step, changes, line):
    expected = line.replace("GIVEN", str(command.given))
    pattern = ".*".join(re.escape(part) for part in expected.split("…"))
    refused = command.refusal(step, **changes)
    assert re.fullmatch(pattern, refused), refused
    if line == ANOTHER_RUN:
        assert not (command.folder / "cache").exists(), "refused only after the data was read"


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


def test_half_precision_on_a_cpu(command):
    if not distributed.on_cpu():
        pytest.skip("this machine has an accelerator")
    assert command.refusal(1, dtype="fp16") == (
        "--dtype fp16: this CPU does not train in fp16; take fp32 or bf16")


# --- as the user sees it -------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "changes", "line", "printed"), [
    (1, {"zero_stage": 4}, "--zero_stage 4: must be one of 0, 1, 2, 3", []),
    (2, {"data_path": "GIVEN/broken.jsonl"}, BROKEN_LINE, ["tokenizer"]),
    (3, {"actor_lora_dim": 4, "actor_lora_module_name": "nonesuch"},
     f"--actor_lora_module_name nonesuch: matches no linear layer; there are {PROJECTIONS}", []),
])
def test_a_mistake_on_the_console_is_one_line_as_early_as_it_can_be(
    command, imported, step, changes, line, printed
):
    refused, output = command.run(imported, step, **changes)
    assert refused == line.replace("GIVEN", str(command.given))
    assert [text.split(":")[0] for text in output.splitlines()] == printed


@pytest.mark.parametrize(("error", "printed"), [
    (KeyError("a bug"), "Traceback (most recent call last):\n"),
    (OSError(28, "No space left on device", "out/model.safetensors"),
     "error: no space left on the disk of out/model.safetensors; free some and start again, with "
     "--resume_from_checkpoint latest if there are checkpoints\n"),
])
def test_a_bug_keeps_its_traceback_and_a_full_disk_is_one_line_both_with_exit_code_1(
    capsys, monkeypatch, error, printed
):
    def fail() -> None:
        raise error

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("RANK", "0")
    console.run_main(fail)
    assert codes == [1]
    text = capsys.readouterr().err
    assert text == printed if "error" in printed else printed in text
