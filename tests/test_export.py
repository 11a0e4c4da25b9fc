"""Exports that other tools read, and the folder of a run, which is complete or not there."""

import json

import pytest
import torch
from conftest import moved, small_config, snapshot, with_adapter
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.run.export import eos_ids, export, model_card
from alpaca_rlhf.utils.run.run_folder import RunFolder, read_json


def adapted(model):
    model = with_adapter(model)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model, small):
    # No row is padded: where a tool puts positions of padding is its own affair.
    batch = small.prompts(1)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


# ------------------------------------------------------------------- exports


def test_an_exported_actor_is_read_by_transformers(small, tmp_path):
    model = small.causal_lm()
    export(model, small.tokenizer, tmp_path, "card")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded, small).equal(logits(model, small))


def test_an_export_with_an_adapter_is_the_merged_model_and_the_adapter_beside_it(small, tmp_path):
    model = adapted(small.causal_lm())
    before, expected = snapshot(model), logits(model, small)
    export(model, small.tokenizer, tmp_path, "card")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(merged, small), expected, rtol=1e-4, atol=1e-4)
    onto_the_base = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small.actor), tmp_path / "adapter"
    )
    assert_close(logits(onto_the_base, small), expected, rtol=1e-6, atol=1e-6)
    assert moved(before, model) == set()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_an_exported_reward_model_is_read_by_transformers(small, tmp_path, with_adapter):
    model = small.reward_model()
    model = adapted(model) if with_adapter else model
    export(model, small.tokenizer, tmp_path, "card")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    assert_close(logits(loaded, small), logits(model, small), rtol=1e-4, atol=1e-4)
    if with_adapter:
        onto_the_base = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(small.critic), tmp_path / "adapter"
        )
        assert_close(logits(onto_the_base, small), logits(model, small), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_tied_embeddings_stay_tied_and_are_written_once(small, tmp_path, with_adapter):
    torch.manual_seed(2)
    model = LlamaForCausalLM(small_config(small.tokenizer, tie_word_embeddings=True)).eval()
    model = adapted(model) if with_adapter else model
    export(model, small.tokenizer, tmp_path, "card")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close(logits(loaded, small), logits(model, small), rtol=1e-4, atol=1e-4)
    size = (tmp_path / "model.safetensors").stat().st_size
    weights = 4 * sum(p.numel() for p in loaded.parameters())
    assert weights <= size < weights + 4 * 420 * 32  # not one embedding more


def test_an_export_keeps_the_precision_of_the_weights(small, tmp_path):
    export(small.causal_lm().bfloat16(), small.tokenizer, tmp_path, "card")
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_an_export_has_tokenizer_template_generation_config_and_card(small, tmp_path):
    export(small.causal_lm(), small.tokenizer, tmp_path, model_card("Policy", {"KL": 1.5}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "Hi."}]
    assert tokenizer.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    ) == "<s>Human: Hi.\n\nAssistant:"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [small.tokenizer.eos_token_id]
    assert generation["pad_token_id"] == small.tokenizer.pad_token_id
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert "| KL | 1.5 |" in (tmp_path / "README.md").read_text()


def test_nothing_is_exported_without_a_folder(small, tmp_path):
    export(small.causal_lm(), small.tokenizer, None, "card")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [2]), (2, [2]), (9, [2, 9]), ([9, 2, 11], [2, 9, 11])]
)
def test_what_ends_a_reply_is_the_tokenizers_eos_and_the_generation_configs(
    small, configured, expected
):
    model = small.causal_lm()
    model.generation_config.eos_token_id = configured
    assert eos_ids(model, small.tokenizer) == expected


# ------------------------------------------------------------------- the folder of a run


def refusal(path, overwrite=False):
    with pytest.raises(UserError) as error:
        RunFolder(str(path), overwrite=overwrite)
    return str(error.value)


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    assert refusal(tmp_path / "run") == (
        f"--output_dir {tmp_path / 'run'}: is not empty, another run may be in it; give another "
        "folder, or --overwrite_output_dir to replace it"
    )
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "old"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    RunFolder(str(tmp_path / "run")).finish({"seed": 7}, {})
    assert read_json(tmp_path / "run" / "training_arguments.json", "") == {"seed": 7}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    for overwrite in (False, True):
        assert refusal(tmp_path / "run", overwrite) == (
            f"--output_dir {tmp_path / 'run'}: is a file; give a folder"
        )


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    assert refusal(path) == (
        f"--output_dir {path}: cannot be written (Not a directory); give a folder that can"
    )


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    path = tmp_path / "run"
    assert refusal(path) == (
        f"--output_dir {path}: cannot be written (Permission denied); give a folder that can"
    )


def test_a_run_that_is_replaced_stays_until_the_new_one_is_complete(group, tmp_path):
    final = tmp_path / "run"
    final.mkdir()
    (final / "old").write_text("old")
    folder = RunFolder(str(final), overwrite=True)
    (folder.path / "new").write_text("new")
    assert (final / "old").read_text() == "old"
    assert not (final / "new").exists()
    folder.finish({"seed": 7}, {"step": 1})
    assert sorted(p.name for p in final.iterdir()) == [
        "new", "results.json", "training_arguments.json"
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_that_fails_leaves_the_old_one_and_its_rest_is_cleared_by_the_next(group, tmp_path):
    final = tmp_path / "run"
    final.mkdir()
    (final / "old").write_text("old")
    first = RunFolder(str(final), overwrite=True)
    (first.path / "half").write_text("half")  # and here it is killed:
    first.release()
    assert (final / "old").read_text() == "old"
    second = RunFolder(str(final), overwrite=True)
    assert list(second.path.iterdir()) == []


def killed_with_a_checkpoint(final):
    """A run that had saved a checkpoint when it was killed."""
    folder = RunFolder(str(final))
    (folder.path / "checkpoints" / "step-00000005").mkdir(parents=True)
    folder.release()
    return folder.path


def test_a_run_that_can_be_resumed_is_not_started_over_by_accident(group, tmp_path):
    path = killed_with_a_checkpoint(tmp_path / "run")
    assert refusal(tmp_path / "run") == (
        f"--output_dir {tmp_path / 'run'}: {path / 'checkpoints'} has checkpoints of an "
        "unfinished run; --resume_from_checkpoint latest resumes it, --overwrite_output_dir starts "
        "over"
    )
    assert (path / "checkpoints" / "step-00000005").is_dir()
    folder = RunFolder(str(tmp_path / "run"), resume=True)
    assert [p.name for p in (folder.path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_run_that_can_be_resumed_is_started_over_on_purpose(group, tmp_path):
    killed_with_a_checkpoint(tmp_path / "run")
    folder = RunFolder(str(tmp_path / "run"), overwrite=True)
    assert list(folder.path.iterdir()) == []


def test_a_run_that_has_finished_is_not_resumed_and_that_is_no_error(group, tmp_path):
    RunFolder(str(tmp_path / "run")).finish({}, {"step": 1})
    with pytest.raises(TrainingStopped) as stopped:
        RunFolder(str(tmp_path / "run"), resume=True)
    assert (stopped.value.code, str(stopped.value)) == (
        0, f"--output_dir {tmp_path / 'run'}: this run has finished, there is nothing to resume")
    RunFolder(str(tmp_path / "run"), overwrite=True, resume=True)  # starts over


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_never_write_in_one_folder(group, tmp_path, resume):
    first = RunFolder(str(tmp_path / "run"))
    (first.path / "kept").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError) as error:
            RunFolder(str(tmp_path / "run"), overwrite=overwrite, resume=resume)
        assert str(error.value) == (
            f"--output_dir {tmp_path / 'run'}: another process is writing there; wait for it, or "
            "give another folder"
        )
    assert (first.path / "kept").exists()


def test_a_run_killed_between_the_two_renames_is_not_lost(group, tmp_path, monkeypatch):
    final = tmp_path / "run"
    final.mkdir()
    (final / "old").write_text("old")
    folder = RunFolder(str(final), overwrite=True)
    (folder.path / "new").write_text("new")
    import os

    rename, calls = os.rename, []

    def once(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("killed")
        rename(source, target)

    monkeypatch.setattr("os.rename", once)
    with pytest.raises(OSError, match="killed"):
        folder.finish({}, {})
    kept = [p.read_text() for p in tmp_path.rglob("*") if p.name in ("old", "new")]
    assert sorted(kept) == ["new", "old"]


def test_without_an_output_dir_nothing_is_written_and_that_is_said(group, tmp_path, capsys):
    folder = RunFolder(None)
    folder.finish({}, {})
    assert folder.path is None
    assert capsys.readouterr().out == "nothing is saved: no --output_dir was given\n"


@pytest.mark.parametrize("content", [None, "{broken"])
def test_a_record_that_is_missing_or_broken_is_one_line(tmp_path, content):
    path = tmp_path / "record.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        read_json(path, "--results")
    assert str(error.value) == f"--results: {path} is missing or broken"
