"""The output folder of a run, which is complete or not there."""

import os

import pytest

from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.run.run_folder import RunFolder, read_json

pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture
def final(tmp_path):
    """The path of --output_dir."""
    return tmp_path / "run"


@pytest.fixture
def old_run(final):
    """The same path, with another run in it."""
    final.mkdir()
    (final / "old").write_text("old")
    return final


def refusal(path, **how):
    with pytest.raises(UserError) as error:
        RunFolder(str(path), **how)
    return str(error.value).removeprefix(f"--output_dir {path}: ")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(old_run):
    assert refusal(old_run) == (
        "is not empty, another run may be in it; give another folder, or --overwrite_output_dir "
        "to replace it"
    )
    assert names(old_run) == ["old"]
    assert names(old_run.parent) == ["run"]


def test_an_empty_folder_is_taken(final):
    final.mkdir()
    RunFolder(str(final)).finish({"seed": 7}, {})
    assert read_json(final / "training_arguments.json", "") == {"seed": 7}


def test_a_file_is_refused_and_so_is_a_folder_that_cannot_be_written(final):
    final.write_text("a file")
    for overwrite in (False, True):
        assert refusal(final, overwrite=overwrite) == "is a file; give a folder"
    assert refusal(final / "run") == (
        "cannot be written (Not a directory); give a folder that can")


def test_a_run_that_is_replaced_stays_until_the_new_one_is_complete(old_run):
    folder = RunFolder(str(old_run), overwrite=True)
    (folder.path / "new").write_text("new")
    assert names(old_run) == ["old"]
    folder.finish({"seed": 7}, {"step": 1})
    assert names(old_run) == ["new", "results.json", "training_arguments.json"]
    assert names(old_run.parent) == ["run"]


def test_a_run_that_fails_leaves_the_old_one_and_its_files_are_removed_by_the_next(old_run):
    first = RunFolder(str(old_run), overwrite=True)
    (first.path / "half").write_text("half")
    first.release()  # it is killed
    assert names(old_run) == ["old"]
    second = RunFolder(str(old_run), overwrite=True)
    assert names(second.path) == []


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
    (first.path / "kept").touch()
    assert refusal(final, overwrite=overwrite, resume=resume) == (
        "another process is writing there; wait for it, or give another folder")
    assert names(first.path) == ["kept"]


def test_a_run_killed_between_the_two_renames_is_not_lost(old_run, monkeypatch):
    folder = RunFolder(str(old_run), overwrite=True)
    (folder.path / "new").write_text("new")
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
    assert {"old", "new"} <= kept


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
