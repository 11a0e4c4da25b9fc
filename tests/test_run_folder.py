"""The output folder of a run, which is complete or not there."""

import os

import pytest

from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.run.run_folder import RunFolder, read_json

pytestmark = pytest.mark.usefixtures("group")
WRITTEN = ["results.json", "run_files.json", "training_arguments.json"]


@pytest.fixture
def final(tmp_path):
    """The path of --output_dir."""
    return tmp_path / "run"


@pytest.fixture
def old_run(final):
    """The same path, with another run in it."""
    first = RunFolder(str(final))
    (first.path / "config.json").write_text("old")
    first.finish({}, {"step": 1})
    return final


def refusal(path, **how):
    with pytest.raises(UserError) as error:
        RunFolder(str(path), **how)
    return str(error.value).removeprefix(f"--output_dir {path}: ")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_with_a_run_or_a_model_is_refused_and_left_alone(old_run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    for folder, name in ((old_run, "config.json"), (tmp_path / "model", "model.safetensors")):
        assert refusal(folder) == (
            f"holds a run or a model ({name}); give another folder, or --overwrite_output_dir to "
            "replace it")
    assert names(old_run) == ["config.json", *WRITTEN]
    assert names(tmp_path) == ["model", "run"]


def test_an_empty_folder_is_taken(final):
    final.mkdir()
    RunFolder(str(final)).finish({"seed": 7}, {})
    assert read_json(final / "training_arguments.json", "") == {"seed": 7}


@pytest.mark.parametrize("runs", [1, 2])
def test_logs_notes_and_links_in_the_folder_stay_where_they_are(final, runs):
    (final / "tensorboard").mkdir(parents=True)
    (final / "tensorboard" / "events").write_text("theirs")
    (final / "best").symlink_to(final.parent)
    with (final / "training.log").open("w") as log:
        for number in range(runs):
            folder = RunFolder(str(final), overwrite=number > 0)
            (folder.path / "adapter").mkdir()
            (folder.path / "adapter" / f"{number}.safetensors").touch()
            folder.finish({}, {"step": number})
        log.write("a shell still writes here")
    assert names(final) == sorted(["adapter", "best", "tensorboard", "training.log", *WRITTEN])
    assert names(final / "adapter") == [f"{runs - 1}.safetensors"]
    assert (final / "training.log").read_text() == "a shell still writes here"
    assert (final / "tensorboard" / "events").read_text() == "theirs"
    assert names(final.parent) == ["run"]


def test_a_link_to_a_folder_is_followed(final, tmp_path):
    (tmp_path / "disk").mkdir()
    final.symlink_to(tmp_path / "disk")
    RunFolder(str(final)).finish({}, {})
    assert final.is_symlink()
    assert names(tmp_path / "disk") == WRITTEN


def test_what_the_user_has_set_aside_is_never_removed(old_run):
    for name in ("run.old", "run.old-1"):
        (old_run.parent / name).mkdir()
        (old_run.parent / name / "model.safetensors").write_text("best")
    RunFolder(str(old_run), overwrite=True).finish({}, {})
    kept = [(old_run.parent / name / "model.safetensors").read_text()
            for name in ("run.old", "run.old-1")]
    assert kept == ["best", "best"]
    assert names(old_run.parent) == ["run", "run.old", "run.old-1"]


def test_a_model_that_no_run_has_listed_is_set_aside_and_not_removed(final, capsys):
    final.mkdir()
    (final / "model.safetensors").write_text("theirs")
    RunFolder(str(final), overwrite=True).finish({}, {})
    aside = final.with_name("run.old-1")
    assert (aside / "model.safetensors").read_text() == "theirs"
    assert f"what was in {final} is kept in {aside}" in capsys.readouterr().out


def test_a_file_of_the_user_that_the_run_writes_too_gets_another_name(old_run):
    (old_run / "notes").write_text("theirs")
    folder = RunFolder(str(old_run), overwrite=True)
    (folder.path / "notes").write_text("ours")
    folder.finish({}, {})
    assert (old_run / "notes").read_text() == "ours"
    assert (old_run / "notes.old-1").read_text() == "theirs"


def test_a_folder_of_the_user_under_the_name_to_work_in_is_left_alone(final):
    partial = final.with_name("run.partial")
    partial.mkdir()
    (partial / "thesis.tex").write_text("theirs")
    assert refusal(final, overwrite=True) == (
        f"{partial} is where the run would be written, and holds other files; move them, or give "
        "another folder")
    assert names(partial) == ["thesis.tex"]


def test_a_file_is_refused_and_so_is_a_folder_that_cannot_be_written(final):
    final.write_text("a file")
    for overwrite in (False, True):
        assert refusal(final, overwrite=overwrite) == "is a file; give a folder"
    assert refusal(final / "run") == (
        "cannot be written (Not a directory); give a folder that can")


def test_a_run_that_is_replaced_stays_until_the_new_one_is_complete(old_run):
    folder = RunFolder(str(old_run), overwrite=True)
    (folder.path / "model.safetensors").write_text("new")
    assert names(old_run) == ["config.json", *WRITTEN]
    folder.finish({"seed": 7}, {"step": 1})
    assert names(old_run) == ["model.safetensors", *WRITTEN]
    assert names(old_run.parent) == ["run"]


def test_a_run_that_fails_leaves_the_old_one_and_its_files_are_removed_by_the_next(old_run):
    first = RunFolder(str(old_run), overwrite=True)
    for name in ("run.json", "config.json", "notes"):
        (first.path / name).write_text("half")
    first.release()  # it is killed
    assert (old_run / "config.json").read_text() == "old"
    second = RunFolder(str(old_run), overwrite=True)
    assert names(second.path) == ["notes"]


def test_an_unfinished_run_is_resumed_or_started_over_only_on_purpose(final):
    first = RunFolder(str(final))
    checkpoints = first.path / "checkpoints"
    (checkpoints / "step-00000005").mkdir(parents=True)
    first.release()  # it is killed
    assert refusal(final) == (
        f"{checkpoints} has checkpoints of an unfinished run; --resume_from_checkpoint latest "
        "resumes it, --overwrite_output_dir starts over"
    )
    second = RunFolder(str(final), resume=True)
    assert names(checkpoints) == ["step-00000005"]
    second.release()
    third = RunFolder(str(final), overwrite=True)
    assert names(third.path) == []


def test_resuming_a_finished_run_is_no_error(final):
    RunFolder(str(final)).finish({}, {"step": 1})
    with pytest.raises(TrainingStopped) as stopped:
        RunFolder(str(final), resume=True)
    assert (stopped.value.code, str(stopped.value)) == (
        0, f"--output_dir {final}: this run has finished, there is nothing to resume")
    RunFolder(str(final), overwrite=True, resume=True)  # starts over


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_never_write_to_one_folder(final, resume, overwrite):
    first = RunFolder(str(final))
    (first.path / "run.json").touch()
    assert refusal(final, overwrite=overwrite, resume=resume) == (
        "another process is writing there; wait for it, or give another folder")
    assert names(first.path) == ["run.json"]


def test_a_run_killed_between_the_two_renames_is_not_lost(old_run, monkeypatch):
    folder = RunFolder(str(old_run), overwrite=True)
    (folder.path / "model.safetensors").write_text("new")
    rename, calls = os.rename, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("killed")
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed_at_the_second)
    with pytest.raises(OSError, match="killed"):
        folder.finish({}, {})
    kept = {path.name for path in old_run.parent.rglob("*")}
    assert {"config.json", "model.safetensors"} <= kept


def test_without_an_output_dir_nothing_is_written_and_that_is_said(capsys):
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
