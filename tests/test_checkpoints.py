"""Checkpoints: what one holds, how one is chosen, refused and saved, and how a run is resumed."""

import contextlib
import enum
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import learn, snapshot
from test_training_loop import actor, step, tokens
from torch.testing import assert_close

from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import Iteration
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
    AdaptiveKLController,
    RewardNormalizer,
)
from alpaca_rlhf.utils.configs import CheckpointConfig, RewardConfig, RunConfig
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.run import checkpoints as module
from alpaca_rlhf.utils.run import engine_state
from alpaca_rlhf.utils.run.checkpoints import (
    Checkpoints,
    changed_arguments,
    find_damage,
    open_run,
)
from alpaca_rlhf.utils.run.engine_state import CheckpointFiles
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard

pytestmark = pytest.mark.usefixtures("group")
RATES = {"learning_rate": 1e-3, "lora_learning_rate": 1e-3}
BATCH = "per_device_train_batch_size"


class Number:
    """A part of a run whose state is a number."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state):
        self.value = state["value"].item()


class Recorder(list):
    """The events that a tracker is told of."""

    def event(self, *event):
        self.append(event)


@contextlib.contextmanager
def opened(output, engines=None, *, resume=None, arguments=None, own=None, shared=None, **config):
    """The checkpoints of a run in a folder; on leaving, its lock is released, as by a kill."""
    config = CheckpointConfig(resume_from_checkpoint=resume and str(resume), **config)
    how = {"step": 1, "arguments": {"seed": 1234, "zero_stage": 0, BATCH: 4, **(arguments or {})}}
    run = RunConfig(output_dir=output and str(output))
    folder, found = open_run(run, config, **how)
    made = Checkpoints(
        folder, engines or {}, config=config, found=found, own=own, shared=shared, **how)
    made.found, made.root = found, output and folder.path / "checkpoints"
    yield made
    if output:
        folder.release()


def save_at(checkpoints, *steps, **how):
    for number in steps:
        checkpoints.progress.step = number
        checkpoints.save(**how)


def saved(output, *steps, mid_iteration=False, **how):
    """The checkpoints, at step 2 and 4 by default, of a run without a model that was killed."""
    parts = {"own": {"one": Number(1)}, "shared": {"two": Number(2)}}
    with opened(output, **parts, **how) as checkpoints:
        checkpoints.restore("rows")
        save_at(checkpoints, *(steps or (2, 4)), mid_iteration=mid_iteration)
    return checkpoints.root


def found(output, resume="latest", **how):
    """The checkpoint that a resumed run finds."""
    with opened(output, resume=resume, **how) as checkpoints:
        return checkpoints.found


def refusal(output, resume="latest", **how):
    try:
        found(output, resume, **how)
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def names(root):
    return sorted(path.name for path in root.iterdir())


def edit(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


# --- a damaged checkpoint is named ---------------------------------------------------------------


def truncate(folder):
    path = folder / "shared.pt"
    os.truncate(path, path.stat().st_size - 1)


def tamper(folder):
    path = folder / "rank-00000.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def leave_a_file_out(folder):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder / "manifest.json", files={n: f for n, f in files.items() if n != "shared.pt"})


DAMAGED = "manifest.json is damaged"
DAMAGES = [
    (truncate, "shared.pt has {less:,} bytes, not {size:,}"),
    (tamper, "rank-00000.pt has changed since it was written (SHA-256)"),
    (lambda folder: (folder / "progress.json").unlink(), "progress.json is missing"),
    (lambda folder: os.truncate(folder / "manifest.json", 40), DAMAGED),
    (lambda folder: (folder / "manifest.json").write_text("[]"), DAMAGED),
    (lambda folder: edit(folder / "manifest.json", files={"shared.pt": 5}), DAMAGED),
    (leave_a_file_out, DAMAGED),
    (lambda folder: edit(folder / "manifest.json", format=99),
     "manifest.json has format 99, this version reads 2"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_latest_names_what_is_damaged_and_takes_the_one_before(tmp_path, capsys, damage, problem):
    root = saved(tmp_path / "run")
    assert find_damage(root / "step-00000004") is None
    size = (root / "step-00000004" / "shared.pt").stat().st_size
    damage(root / "step-00000004")
    problem = problem.format(less=size - 1, size=size)
    assert found(tmp_path / "run").folder == root / "step-00000002"
    assert capsys.readouterr().out.splitlines() == [
        f"warning: the checkpoint {root / 'step-00000004'} is broken and is left out: {problem}",
        f"resuming from {root / 'step-00000002'}",
    ]


def test_a_checkpoint_that_is_given_is_refused_if_damaged_or_another_thing(tmp_path):
    root = saved(tmp_path / "run")
    truncated, other = root / "step-00000002", root / "step-00000004"
    size = (truncated / "shared.pt").stat().st_size
    truncate(truncated)
    edit(other / "manifest.json", step_of_rlhf=2)
    another = ("; give another folder step-… of a run's `checkpoints` folder, or latest, the last "
               "one that is intact")
    for path, problem in (
        (truncated, f"shared.pt has {size - 1:,} bytes, not {size:,}{another}"),
        (tmp_path, f"is not a checkpoint (it has no manifest.json){another}"),
        (other, "is of step 2, this is step 1"),
    ):
        assert refusal(tmp_path / "run", path) == f"--resume_from_checkpoint {path}: {problem}"


def test_a_run_without_a_checkpoint_starts_at_its_first_step(tmp_path, capsys):
    assert found(tmp_path / "run") is None
    assert capsys.readouterr().out == (
        "--resume_from_checkpoint latest: there is no checkpoint yet; this run starts at its "
        "first step\n"
    )


def test_when_all_are_damaged_nothing_is_started_over_unasked(tmp_path):
    root = saved(tmp_path / "run")
    for path in root.iterdir():
        truncate(path)
    assert refusal(tmp_path / "run") == (
        f"--resume_from_checkpoint latest: none of the 2 checkpoints in {root} is intact; put one "
        "back, or start over with --overwrite_output_dir and without this flag"
    )
    assert names(root) == ["step-00000002", "step-00000004"]


def test_an_incomplete_checkpoint_is_never_taken(tmp_path):
    root = saved(tmp_path / "run", 2, 4, 6)
    (root / "step-00000006").rename(root / ".step-00000006.partial")
    shutil.copytree(root / "step-00000004", root / "step-00000005")
    (root / "step-00000005" / "manifest.json").unlink()
    assert found(tmp_path / "run").folder == root / "step-00000004"


# --- what may have changed -----------------------------------------------------------------------


@pytest.mark.parametrize("flag", [
    "output_dir", "save_steps", "save_total_limit", "max_skipped_steps", "eval_interval",
    "preprocessing_num_workers", "tracker", "collective_timeout", "gradient_checkpointing",
    "critic_gradient_checkpointing", "print_loss", "per_device_eval_batch_size", "zero_stage",
    "actor_zero_stage", "log_samples_steps", "release_inference_cache",
])
def test_arguments_that_do_not_change_the_result_may_change(flag):
    assert changed_arguments({flag: 1}, {flag: 2}, ranks_then=1, ranks_now=1) == []


@pytest.mark.parametrize("flag", [
    "lora_dim", "actor_lora_dim", "num_train_epochs", "max_steps", "dropout", "max_seq_len",
    "gradient_accumulation_steps", "num_warmup_steps", "data_path", "kl_coef", "seed",
    "max_answer_seq_len", "enable_hybrid_engine", BATCH, "a_flag_of_another_version",
])
def test_arguments_that_change_the_result_are_listed(flag):
    assert changed_arguments({flag: 1}, {flag: 2}, ranks_then=1, ranks_now=1) == [
        f"--{flag} was 1, is 2"]
    assert changed_arguments({}, {flag: 2}, ranks_then=2, ranks_now=1) == [
        f"--{flag} was None, is 2"]


@pytest.mark.parametrize("flag", [
    "data_path", "model_name_or_path", "actor_model_name_or_path", "tokenizer_name_or_path"])
@pytest.mark.parametrize(("then", "now"), [
    ("data", "data/"), ("./data", "data"), ("data", "WORK/data"), ("WORK/link", "WORK/data"),
    ("~/data", "WORK/data"), (["ShareGPT=data:0.5", "data"], ["ShareGPT=WORK/data:0.5", "link"]),
])
def test_a_path_may_be_spelled_otherwise(tmp_path, monkeypatch, flag, then, now):
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "link").symlink_to(work / "data")
    monkeypatch.setenv("HOME", str(work))

    def changes(then, now, cwd, started_in=""):
        monkeypatch.chdir(cwd)
        then, now = (json.loads(json.dumps(value).replace("WORK", str(work)))
                     for value in (then, now))
        return changed_arguments(
            {flag: then}, {flag: now}, ranks_then=1, ranks_now=1, started_in=started_in)

    assert changes(then, now, work) == changes(now, then, work) == []
    assert changes(then, "other", work)
    assert changes(["data:0.5"], ["data:0.6"], work)
    assert changes(["ShareGPT=data"], ["data"], work)
    assert changes("data", "WORK/data", tmp_path)  # as of a checkpoint that does not say where
    assert changes("data", "WORK/data", tmp_path, started_in=str(work)) == []


def test_changed_arguments_are_refused_unless_that_is_allowed(tmp_path, capsys):
    path = saved(tmp_path / "run") / "step-00000004"
    assert refusal(tmp_path / "run", arguments={"seed": 5}) == (
        f"--resume_from_checkpoint {path}: arguments that change the result have changed: "
        "--seed was 1234, is 5; give them as they were, or --allow_changed_args"
    )
    capsys.readouterr()
    allowed = found(tmp_path / "run", arguments={"seed": 5}, allow_changed_args=True)
    assert (allowed.folder, allowed.convert) == (path, False)
    assert capsys.readouterr().out.startswith(
        "changed since the checkpoint: --seed was 1234, is 5\nresuming from ")


def test_another_number_of_ranks_resumes_with_the_same_total_batch(tmp_path, capsys):
    path = saved(tmp_path / "run") / "step-00000004"
    edit(path / "manifest.json", ranks=2)
    assert f"--{BATCH} was 4 on 2 rank(s), is 4 on 1" in refusal(tmp_path / "run")
    capsys.readouterr()
    assert found(tmp_path / "run", arguments={BATCH: 8}).convert
    assert "it is converted" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_the_middle_of_an_iteration_other_ranks_and_stages_are_refused(tmp_path, ranks):
    path = saved(tmp_path / "run", mid_iteration=True) / "step-00000004"
    edit(path / "manifest.json", ranks=ranks)
    assert refusal(tmp_path / "run", arguments={"zero_stage": 2} if ranks == 1 else None) == (
        f"--resume_from_checkpoint {path}: was written in the middle of a PPO iteration, by "
        f"{ranks} rank(s); resume with as many and the same ZeRO stages, or from a checkpoint "
        "between two iterations"
    )


def test_other_rows_are_refused_unless_that_is_allowed(tmp_path):
    saved(tmp_path / "run")
    with opened(tmp_path / "run", resume="latest") as checkpoints:
        with pytest.raises(UserError, match="the rows to train on are not those"):
            checkpoints.restore("other rows")
    with opened(tmp_path / "run", resume="latest", allow_changed_args=True) as checkpoints:
        progress = checkpoints.restore("other rows")
    assert (progress.step, progress.data) == (4, "other rows")


# --- saving --------------------------------------------------------------------------------------


def test_older_checkpoints_are_removed_after_the_new_one_is_complete(tmp_path, monkeypatch):
    seen, rename = [], os.rename

    def recorded(source, target):
        seen.append(names(target.parent))
        rename(source, target)

    monkeypatch.setattr(os, "rename", recorded)
    root = saved(tmp_path / "run", 1, 2, 3, 4, save_total_limit=2)
    assert names(root) == ["step-00000003", "step-00000004"]
    assert seen[-1] == [".step-00000004.partial", "step-00000002", "step-00000003"]


def test_a_checkpoint_is_written_once_and_a_damaged_one_in_its_place_replaced(tmp_path):
    root = saved(tmp_path / "run")
    truncate(root / "step-00000004")
    before = (root / "step-00000002" / "manifest.json").stat().st_ino
    with opened(tmp_path / "run", resume="latest", shared={"two": Number()}) as checkpoints:
        checkpoints.restore("rows")
        assert checkpoints.save() is None
        save_at(checkpoints, 4)
    assert (root / "step-00000002" / "manifest.json").stat().st_ino == before
    assert find_damage(root / "step-00000004") is None
    assert names(root) == ["step-00000002", "step-00000004"]


def test_the_manifest_has_size_and_sha_256_of_every_file(tmp_path):
    folder = saved(tmp_path / "run") / "step-00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    assert manifest.pop("files") == {
        name: [len(content), hashlib.sha256(content).hexdigest()]
        for name, content in files.items()
    }
    assert manifest == {
        "format": 2, "step_of_rlhf": 1, "step": 4, "in_round": False, "ranks": 1,
        "started_in": os.getcwd(),
    }


def test_states_and_random_numbers_are_restored(tmp_path):
    def draw():
        return random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    np.random.standard_normal()  # an odd number of them: one is cached
    saved(tmp_path / "run", 4)
    expected = draw()
    draw()
    own, shared = Number(), Number()
    with opened(
        tmp_path / "run", resume="latest", own={"one": own}, shared={"two": shared}
    ) as checkpoints:
        checkpoints.restore("rows")
    assert draw() == expected
    assert (own.value, shared.value) == (1, 2)


@pytest.mark.parametrize(("every", "due", "steps"), [
    (0, False, []), (2, False, [2, 4]), (3, False, [3]), (0, True, [1, 2, 3, 4])])
def test_a_checkpoint_is_saved_when_it_is_due(tmp_path, every, due, steps):
    tracker = Recorder()
    with opened(tmp_path / "run", save_steps=every) as checkpoints:
        for number in range(1, 5):
            checkpoints.step_boundary(number, tracker, due=due)
    assert [event[1] for event in tracker] == steps


def test_consecutive_skipped_steps_are_counted_across_a_resume(tmp_path):
    guards = [NonFiniteGuard(None, 3, "") for _ in range(2)]
    guards[0].skip(1, [], torch.get_rng_state())
    with opened(tmp_path / "run", shared={"faults": guards[0]}) as checkpoints:
        save_at(checkpoints, 1)
    with opened(tmp_path / "run", resume="latest", shared={"faults": guards[1]}) as checkpoints:
        checkpoints.restore("")
    guards[1].skip(2, [], torch.get_rng_state())
    with pytest.raises(FloatingPointError):
        guards[1].skip(3, [], torch.get_rng_state())
    assert guards[1].skipped == 3


# --- a full disk ---------------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """A file that cannot be written."""

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("file", [
    "rank-00000.pt", "shared.pt", "progress.json", "arguments.json", "manifest.json"])
def test_on_a_full_disk_earlier_checkpoints_stay_intact_and_the_run_goes_on(
    tmp_path, capsys, monkeypatch, file
):
    tracker, opening = Recorder(), Path.open
    with opened(tmp_path / "run", own={"one": Number()}, save_steps=1) as checkpoints:
        checkpoints.step_boundary(1, tracker)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", lambda path, mode="r", *more, **how: (
                FullDisk(path, "w") if path.name == file and mode == "wb"
                else opening(path, mode, *more, **how)))
            checkpoints.step_boundary(2, tracker)
        said = capsys.readouterr().out
        assert said.startswith("warning: the checkpoint of step 2 could not be saved (")
        assert said.endswith("No space left on device); the last one is step-00000001\n")
        assert names(checkpoints.root) == ["step-00000001"]
        assert find_damage(checkpoints.root / "step-00000001") is None
        checkpoints.step_boundary(3, tracker)  # there is room again
    assert names(checkpoints.root) == ["step-00000001", "step-00000003"]
    assert [event[1] for event in tracker] == [1, 3]


@pytest.mark.parametrize("place", ["os.fsync", "os.rename", "pathlib.Path.mkdir"])
def test_an_error_outside_the_files_is_a_warning_too(tmp_path, capsys, monkeypatch, place):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path / "run") as checkpoints:
        monkeypatch.setattr(place, fail)
        save_at(checkpoints, 1)
    said = capsys.readouterr().out
    assert said.startswith("warning: the checkpoint of step 1 could not be saved (")
    assert said.endswith("error); there is none\n")


# --- nothing is unpickled ------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_converter_is_given_no_file_with_code_whichever_rank_wrote_it(tmp_path):
    folder = tmp_path / "engine"
    folder.mkdir()
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"global_steps": 1, "skipped_steps": 0},
               folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save(Evil(tmp_path / "ran"), folder / "zero_pp_rank_1_mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="rank_1_mp_rank_00_model_states.pt: holds more than data"):
        engine_state.load(None, tmp_path, CheckpointFiles(), convert=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("convert", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(small, tmp_path, stage, convert):
    arguments = {"zero_stage": stage}
    with opened(
        tmp_path / "run", {"model": actor(small, stage)}, arguments=arguments
    ) as checkpoints:
        save_at(checkpoints, 2)
    path = checkpoints.root / "step-00000002"
    fresh, tried = {"model": actor(small, stage)}, sorted(path.rglob("*.pt"))
    assert len(tried) == 3 + (stage > 0)
    for file in tried:
        if convert and file.name.startswith("rank"):
            continue  # is not read
        content, manifest = file.read_bytes(), (path / "manifest.json").read_text()
        torch.save(Evil(tmp_path / "ran"), file)
        files = json.loads(manifest)["files"]
        files[str(file.relative_to(path))] = [
            file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        edit(path / "manifest.json", files=files, **({"ranks": 2} if convert else {}))
        with opened(
            tmp_path / "run", fresh, resume="latest", arguments=arguments, allow_changed_args=True
        ) as checkpoints:
            with pytest.raises(UserError, match=f"{file.name}: holds more than data"):
                checkpoints.restore("")
        assert not (tmp_path / "ran").exists()
        file.write_bytes(content)
        (path / "manifest.json").write_text(manifest)


# --- engines -------------------------------------------------------------------------------------


def resumed(small, folder, stages, lora, steps=2):
    """Weights after one step more: of a run that went on, and of one resumed at another stage."""
    engines = []
    for seed, stage in enumerate(stages):
        torch.manual_seed(seed)  # of the adapter
        engines.append(actor(small, stage, lora=lora, adam_eps=1e-8, **RATES))
    engine, again = engines
    with opened(folder, {"model": engine}, arguments={"zero_stage": stages[0]}) as checkpoints:
        for _ in range(steps):
            step(engine, tokens([0, 1], [2]))
        save_at(checkpoints, steps)
    with opened(
        folder, {"model": again}, resume="latest", arguments={"zero_stage": stages[1]}
    ) as checkpoints:
        assert checkpoints.restore("").step == steps
    for one in engines:
        step(one, tokens([3, 1]))
    return snapshot(engine.module), snapshot(again.module)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_engine_takes_the_steps_of_one_that_was_never_killed(
    small, tmp_path, stage, lora
):
    expected, weights = resumed(small, tmp_path / "run", (stage, stage), lora)
    for name, weight in weights.items():
        assert weight.equal(expected[name]), name


@pytest.mark.parametrize(("stages", "lora", "steps"), [
    ((0, 2), 0, 2), ((2, 0), 4, 2), ((0, 3), 4, 2), ((3, 0), 0, 2), ((3, 2), 0, 2),
    ((2, 3), 4, 2), ((2, 0), 0, 0), ((0, 2), 0, 0)])
def test_an_engine_resumed_at_another_stage_takes_the_same_step_but_for_rounding(
    small, tmp_path, stages, lora, steps
):
    expected, weights = resumed(small, tmp_path / "run", stages, lora, steps)
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_with_an_adapter_a_checkpoint_holds_only_trainable_parameters(small, tmp_path, stage):
    engine = actor(small, stage, lora=4)
    with opened(tmp_path / "run", {"model": engine}) as checkpoints:
        step(engine, tokens([0, 1]))
        save_at(checkpoints, 1)
    folder = checkpoints.root / "step-00000001"
    files = sorted((folder / "model").rglob("*model_states.pt"))
    held = CheckpointFiles().load(str(files[0]), "cpu")["module"]
    assert held
    assert all("lora_" in name for name in held)
    sizes = [(4 * getattr(p, "ds_numel", p.numel()), p.requires_grad)
             for p in engine.module.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    frozen = sum(size for size, trains in sizes if not trains)
    # Weights, fp32 copies, two moments, and their names.
    size = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    assert size < 4 * trainable + frozen / 2


# --- step 3 --------------------------------------------------------------------------------------


@contextlib.contextmanager
def ppo_run(small, output, resume=None):
    """Everything that step 3 saves, by name."""
    torch.manual_seed(0)  # of the adapter
    engine = small.roles(lora=4)
    trainer = small.trainer(engine, enable_ema=True, ema_decay=0.5)
    own = {"trainer": trainer, "sampler": small.maker(engine)}
    shared = {
        "controller": AdaptiveKLController(RewardConfig(kl_coef=0.1, kl_controller="adaptive")),
        "normalizer": RewardNormalizer(RewardConfig(reward_normalization="reference"), ""),
        "ema": trainer.ema,
    }
    engines = {"actor": engine.actor, "critic": engine.critic}
    with opened(output, engines, resume=resume, own=own, shared=shared) as checkpoints:
        checkpoints.restore("rows")
        yield {"checkpoints": checkpoints, **engines, **own, **shared}


def test_step_3_resumes_in_the_middle_of_an_iteration(small, tmp_path):
    with ppo_run(small, tmp_path / "run") as run:
        trainer, checkpoints = run["trainer"], run["checkpoints"]
        experience, metrics = small.experience(run["sampler"], count=8)
        run["normalizer"].measure(experience)
        run["controller"].update(100.0, episodes=500)
        calls = []

        def between():
            calls.append(trainer.taken)
            if len(calls) == 3:
                save_at(checkpoints, trainer.taken, mid_iteration=True)

        expected = trainer.update(Iteration(experience, metrics), 5, None, between)
        assert calls == [0, 1, 2, 3]
    with ppo_run(small, tmp_path / "run", resume="latest") as again:
        trainer = again["trainer"]
        assert (trainer.taken, again["checkpoints"].progress.step) == (2, 2)
        assert again["controller"].coef == run["controller"].coef
        assert again["normalizer"].state_dict() == run["normalizer"].state_dict()
        assert again["normalizer"].state_dict()["scores"]["statistics"]
        assert again["sampler"].generator.get_state().equal(run["sampler"].generator.get_state())
        result = trainer.update(trainer.iteration, 5)
    for metrics in (expected, result):
        del metrics["time/update"]
    assert result == expected
    for role in ("actor", "critic"):
        weights = snapshot(run[role].module)
        assert all(w.equal(weights[n]) for n, w in snapshot(again[role].module).items())
    averages = (one["ema"].state_dict()["average"] for one in (run, again))
    assert all(one.equal(other) for one, other in zip(*averages, strict=True))
    assert trainer.iteration is None
    # The first update, which the alarm on ratios watches, was before the checkpoint.
    assert "policy/first_log_ratio_max" not in learn(trainer, experience, 6)


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_boundary_and_ends_the_run_with_its_code(
    tmp_path, capfd, number
):
    before, tracker = signal.getsignal(number), Recorder()
    with opened(tmp_path / "run") as checkpoints:
        with checkpoints.deferring_signals():
            checkpoints.step_boundary(1, tracker)
            assert not checkpoints.root.exists()
            os.kill(os.getpid(), number)
            # A launcher makes both of one Ctrl-C, and one of them twice.
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(TrainingStopped) as stopped:
                checkpoints.step_boundary(2, tracker, tracker_step=1)
        assert signal.getsignal(number) is before
    path = checkpoints.root / "step-00000002"
    assert find_damage(path) is None
    assert stopped.value.code == 128 + number
    assert str(stopped.value) == (
        f"{number.name}: stopped after step 2; --resume_from_checkpoint latest resumes from {path}"
    )
    assert capfd.readouterr().out == (
        f"{number.name}: stopping after this step; Ctrl-C once more stops at once\n")
    assert tracker == [("checkpoint", 1, "step-00000002")]


def test_another_ctrl_c_a_moment_later_stops_at_once(monkeypatch):
    monkeypatch.setattr(module, "SAME_CTRL_C", 0.0)
    with opened(None) as checkpoints, checkpoints.deferring_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_without_an_output_dir_says_that_nothing_is_saved():
    with opened(None) as checkpoints, checkpoints.deferring_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TrainingStopped) as stopped:
            checkpoints.step_boundary(3, Recorder())
    assert (stopped.value.code, str(stopped.value)) == (
        143, "SIGTERM: stopped after step 3; nothing is saved: no --output_dir was given")


def test_enums_are_saved_as_plain_values_which_every_python_reads(tmp_path):
    class Stage(int, enum.Enum):
        two = 2

    files = CheckpointFiles()
    files.save({"zero": {"stage": Stage.two}, "groups": [1]}, str(tmp_path / "state.pt"))
    state = files.load(str(tmp_path / "state.pt"))
    assert state == {"zero": {"stage": 2}, "groups": [1]}
    assert type(state["zero"]["stage"]) is int
