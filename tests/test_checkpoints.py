"""Checkpoints: what one holds, how one is chosen, refused and written, and what goes on from it."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import learn, snapshot
from test_training_loop import Recorder, actor, step, tokens

from alpaca_rlhf.training_model.step3_rlhf_finetuning.ppo_trainer import (
    AdaptiveKLController,
    Round,
)
from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import ScoreNormalizer
from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.configs import CheckpointConfig, Step1Config
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.model.ema import Ema
from alpaca_rlhf.utils.run import checkpoints as module
from alpaca_rlhf.utils.run import engine_state
from alpaca_rlhf.utils.run.checkpoints import (
    Checkpoints,
    StopSignals,
    complete_checkpoints,
    find,
    find_damage,
)
from alpaca_rlhf.utils.run.engine_state import CheckpointFiles
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard
from alpaca_rlhf.utils.run.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("group")
RATE = ("--learning_rate", "0.001")


class Part:
    """Something with a state."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state):
        self.value = state["value"].item()


class Run:
    """A run in a folder; leaving it is what a kill does to its lock."""

    def __init__(self, output, *words):
        args = arguments.parse(Step1Config, ["--output_dir", str(output), *RATE, *words])
        run, self.config = arguments.run_config(args)
        self.how = {"config": self.config, "step": 1, "arguments": arguments.to_config(args)}
        self.folder = RunFolder(
            run.output_dir, overwrite=run.overwrite_output_dir,
            resume=self.config.resume_from_checkpoint is not None,
        )
        self.root = self.folder.path / "checkpoints"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.folder.release()

    def find(self):
        return find(self.folder, **self.how)

    def checkpoints(self, found=None, engines=None, **states):
        return Checkpoints(self.folder, engines or {}, found=found, **self.how, **states)


def save_at(checkpoints, *steps, **how):
    for number in steps:
        checkpoints.progress.step = number
        checkpoints.save(**how)


def written(output, *words, steps=(2, 4), in_round=False):
    """A run without a model that was killed after it had saved some checkpoints."""
    with Run(output, *words) as run:
        checkpoints = run.checkpoints(own={"own": Part(1)}, shared={"all": Part(2)})
        checkpoints.restore("rows")
        save_at(checkpoints, *steps, mid_iteration=in_round)
    return run.root


def found(output, *words, path="latest"):
    """What a resumed run finds."""
    with Run(output, "--resume_from_checkpoint", str(path), *words) as run:
        return run.find()


def refusal(output, *words, path="latest"):
    with pytest.raises(UserError) as error:
        found(output, *words, path=path)
    return str(error.value)


def names(root):
    return sorted(path.name for path in root.iterdir())


def edit(path, **changes):
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


# ------------------------------------------------------------------- what is broken is named


def truncate(folder):
    path = folder / "shared.pt"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return f"shared.pt has {size - 1:,} bytes, not {size:,}"


def tamper(folder):
    path = folder / "rank-00000.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "rank-00000.pt has changed since it was written (SHA-256)"


def take_away(folder):
    (folder / "progress.json").unlink()
    return "progress.json is missing"


def cut_the_manifest(folder):
    os.truncate(folder / "manifest.json", 40)
    return "manifest.json is damaged"


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("[]")
    return "manifest.json is damaged"


def leave_a_file_out(folder):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit(folder / "manifest.json", files={n: f for n, f in files.items() if n != "shared.pt"})
    return "manifest.json is damaged"


def misshape_the_manifest(folder):
    edit(folder / "manifest.json", files={"shared.pt": 5})
    return "manifest.json is damaged"


def come_from_the_future(folder):
    edit(folder / "manifest.json", format=99)
    return "manifest.json has format 99, this version reads 1"


DAMAGES = [truncate, tamper, take_away, cut_the_manifest, empty_the_manifest, leave_a_file_out,
           misshape_the_manifest, come_from_the_future]


def test_a_checkpoint_that_was_written_is_whole(tmp_path):
    for path in complete_checkpoints(written(tmp_path / "run")):
        assert find_damage(path) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_names_what_is_broken_and_takes_the_one_before(tmp_path, capsys, damage):
    root = written(tmp_path / "run")
    problem = damage(root / "step-00000004")
    assert found(tmp_path / "run").folder == root / "step-00000002"
    assert capsys.readouterr().out.splitlines() == [
        f"warning: the checkpoint {root / 'step-00000004'} is broken and is left out: {problem}",
        f"resuming from {root / 'step-00000002'}",
    ]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_that_is_asked_for_is_refused(tmp_path, damage):
    path = written(tmp_path / "run") / "step-00000002"
    problem = damage(path)
    assert refusal(tmp_path / "run", path=path) == (
        f"--resume_from_checkpoint {path}: {problem}; give an earlier one, or latest, which takes "
        "the last one that is intact"
    )


def test_a_run_without_a_checkpoint_starts_at_its_first_step(tmp_path, capsys):
    assert found(tmp_path / "run") is None
    assert capsys.readouterr().out.splitlines()[-1] == (
        "--resume_from_checkpoint latest: there is no checkpoint yet; this run starts at its "
        "first step"
    )


def test_when_all_are_broken_nothing_is_started_over_unasked(tmp_path):
    root = written(tmp_path / "run")
    for path in root.iterdir():
        truncate(path)
    assert refusal(tmp_path / "run") == (
        f"--resume_from_checkpoint latest: none of the 2 checkpoints in {root} is intact; put "
        "one back, or start over with --overwrite_output_dir and without this flag"
    )
    assert len(list(root.iterdir())) == 2


def test_what_was_not_written_to_its_end_is_never_taken(tmp_path):
    root = written(tmp_path / "run", steps=(2, 4, 6))
    (root / "step-00000006").rename(root / ".step-00000006.partial")
    shutil.copytree(root / "step-00000004", root / "step-00000005")
    (root / "step-00000005" / "manifest.json").unlink()
    assert found(tmp_path / "run").folder == root / "step-00000004"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    assert refusal(tmp_path / "run", path=tmp_path) == (
        f"--resume_from_checkpoint {tmp_path}: is not a checkpoint (it has no manifest.json); "
        "give a folder step-… of a run's `checkpoints` folder, or latest"
    )


def test_a_checkpoint_of_another_step_of_rlhf_is_refused(tmp_path):
    path = written(tmp_path / "run") / "step-00000002"
    edit(path / "manifest.json", step_of_rlhf=2)
    assert refusal(tmp_path / "run", path=path) == (
        f"--resume_from_checkpoint {path}: is of step 2, this is step 1"
    )


# ------------------------------------------------------------------- what may have changed


def test_arguments_that_change_the_result_are_listed_and_refused(tmp_path, capsys):
    path = written(tmp_path / "run") / "step-00000004"
    other = ("--learning_rate", "0.002", "--seed", "5")
    lines = ["--learning_rate was 0.001, is 0.002", "--seed was 1234, is 5"]
    said = refusal(tmp_path / "run", *other)
    assert said.startswith(f"--resume_from_checkpoint {path}: arguments that change the result ")
    assert all(line in said for line in lines)
    capsys.readouterr()
    assert found(tmp_path / "run", *other, "--allow_changed_args").folder == path
    assert {f"changed since the checkpoint: {line}" for line in lines} <= set(
        capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("words", [
    "--save_steps 7", "--save_total_limit 9", "--max_skipped_steps 2", "--eval_interval 3",
    "--preprocessing_num_workers 2", "--tracker tensorboard", "--collective_timeout 5",
    "--gradient_checkpointing", "--print_loss", "--per_device_eval_batch_size 1",
])
def test_arguments_that_do_not_change_the_result_are_free(tmp_path, words):
    written(tmp_path / "run")
    assert not found(tmp_path / "run", *words.split()).convert


@pytest.mark.parametrize("words", [
    "--lora_dim 4", "--num_train_epochs 2", "--max_steps 9", "--dropout 0.1", "--max_seq_len 9",
    "--gradient_accumulation_steps 2", "--num_warmup_steps 1", "--data_path other",
])
def test_arguments_of_the_training_are_not_free(tmp_path, words):
    written(tmp_path / "run")
    assert words.split()[0] in refusal(tmp_path / "run", *words.split())


def test_another_number_of_ranks_may_go_on_with_the_same_batch_of_all(tmp_path, capsys):
    batch = "--per_device_train_batch_size"
    path = written(tmp_path / "run", batch, "4") / "step-00000004"
    edit(path / "manifest.json", ranks=2)
    assert f"{batch} was 4 on 2 rank(s), is 4 on 1" in refusal(tmp_path / "run", batch, "4")
    capsys.readouterr()
    going_on = found(tmp_path / "run", batch, "8")
    assert going_on.convert
    assert "is converted" in capsys.readouterr().out


def test_another_zero_stage_is_a_conversion(tmp_path):
    written(tmp_path / "run")
    assert found(tmp_path / "run", "--zero_stage", "3").convert


@pytest.mark.parametrize("how", ["ranks", "stage"])
def test_a_checkpoint_in_a_round_refuses_other_ranks_and_stages(tmp_path, how):
    path = written(tmp_path / "run", in_round=True) / "step-00000004"
    if how == "ranks":
        edit(path / "manifest.json", ranks=2)
    words = ("--zero_stage", "2") if how == "stage" else ()
    assert refusal(tmp_path / "run", *words) == (
        f"--resume_from_checkpoint {path}: was written in the middle of a PPO iteration, by "
        f"{2 if how == 'ranks' else 1} rank(s); resume with as many and the same ZeRO stages, or "
        "from a checkpoint between two iterations"
    )


def test_rows_that_have_changed_are_refused_unless_that_is_allowed(tmp_path):
    written(tmp_path / "run")
    with Run(tmp_path / "run", "--resume_from_checkpoint", "latest") as run:
        with pytest.raises(UserError, match="the rows to train on are not those"):
            run.checkpoints(run.find()).restore("other rows")
    words = ("--resume_from_checkpoint", "latest", "--allow_changed_args")
    with Run(tmp_path / "run", *words) as run:
        progress = run.checkpoints(run.find()).restore("other rows")
        assert (progress.step, progress.data) == (4, "other rows")


# ------------------------------------------------------------------- writing


def test_the_last_checkpoints_are_kept_and_older_ones_go_after_the_new_one_is_complete(
    tmp_path, monkeypatch
):
    seen, rename = [], os.rename

    def recorded(source, target):
        seen.append(names(target.parent))
        rename(source, target)

    monkeypatch.setattr(os, "rename", recorded)
    root = written(tmp_path / "run", "--save_total_limit", "2", steps=(1, 2, 3, 4))
    assert names(root) == ["step-00000003", "step-00000004"]
    assert seen[-1] == [".step-00000004.partial", "step-00000002", "step-00000003"]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    root = written(tmp_path / "run", steps=(4,))
    before = (root / "step-00000004" / "manifest.json").stat().st_ino
    with Run(tmp_path / "run", "--resume_from_checkpoint", "latest") as run:
        checkpoints = run.checkpoints(run.find())
        checkpoints.restore("rows")
        assert checkpoints.save() is None
    assert (root / "step-00000004" / "manifest.json").stat().st_ino == before


def test_a_broken_checkpoint_in_the_way_is_replaced(tmp_path):
    root = written(tmp_path / "run")
    truncate(root / "step-00000004")
    with Run(tmp_path / "run", "--resume_from_checkpoint", "latest") as run:
        checkpoints = run.checkpoints(run.find(), shared={"all": Part()})
        checkpoints.restore("rows")
        save_at(checkpoints, 4)
    assert find_damage(root / "step-00000004") is None
    assert names(root) == ["step-00000002", "step-00000004"]


def test_every_file_is_in_the_manifest_with_its_size_and_sum(tmp_path):
    folder = written(tmp_path / "run") / "step-00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
    assert manifest.pop("files") == {
        name: [len(content), hashlib.sha256(content).hexdigest()]
        for name, content in files.items()
    }
    assert manifest == {
        "format": 1, "step_of_rlhf": 1, "step": 4, "in_round": False, "ranks": 1
    }


def test_parts_and_random_numbers_go_on_from_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    draw()
    np.random.standard_normal()  # an odd number of them: one is cached
    written(tmp_path / "run", steps=(4,))
    expected = draw()
    draw()
    own, shared = Part(), Part()
    with Run(tmp_path / "run", "--resume_from_checkpoint", "latest") as run:
        run.checkpoints(run.find(), own={"own": own}, shared={"all": shared}).restore("rows")
    assert draw() == expected
    assert (own.value, shared.value) == (1, 2)


# ------------------------------------------------------------------- a disk that is full


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["torch.save", "json.dumps", "os.fsync", "os.rename"])
def test_a_full_disk_leaves_the_checkpoint_before_whole_says_so_and_does_not_end_the_run(
    tmp_path, capsys, monkeypatch, place
):
    with Run(tmp_path / "run", "--save_steps", "1") as run:
        checkpoints, tracker = run.checkpoints(), Recorder()
        checkpoints.restore("rows")
        checkpoints.step_boundary(1, tracker)
        with monkeypatch.context() as patched:
            patched.setattr(place, no_space)
            checkpoints.step_boundary(2, tracker)
        said = capsys.readouterr().out
        assert said.startswith("warning: the checkpoint of step 2 could not be saved (")
        assert said.endswith("No space left on device); the last one is step-00000001\n")
        assert names(run.root) == ["step-00000001"]
        assert find_damage(run.root / "step-00000001") is None
        checkpoints.step_boundary(3, tracker)  # there is room again
    assert names(run.root) == ["step-00000001", "step-00000003"]
    assert [event[1] for event in tracker.events] == [1, 3]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(
        mount, check=False, capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_file_system_that_is_full_leaves_the_checkpoint_before_whole(small_disk, capsys):
    with Run(small_disk / "run") as run:
        checkpoints = run.checkpoints(own={"own": Part(1)}, shared={"all": Part(2)})
        checkpoints.restore("rows")
        save_at(checkpoints, 1)
        failed = []
        for number in range(2, 14):
            # A page more each time: it ends in another file of the checkpoint each time.
            free = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(b"x" * (free - (number - 2) * 4096))
            save_at(checkpoints, number)
            (small_disk / "filler").unlink()
            failed.append("could not be saved" in capsys.readouterr().out)
            whole = complete_checkpoints(run.root)
            assert whole
            assert all(find_damage(path) is None for path in whole)
            assert failed[-1] == (whole[-1].name != f"step-{number:08d}")
    assert failed[0]
    assert not failed[-1]
    assert sum(failed) > 3


# ------------------------------------------------------------------- nothing is unpickled


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_converter_is_given_no_file_with_code_whichever_rank_wrote_it(tmp_path):
    folder = tmp_path / "engine"
    folder.mkdir()
    torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save(Evil(tmp_path / "ran"), folder / "zero_pp_rank_1_mp_rank_00_model_states.pt")
    with (
        pytest.raises(UserError, match="rank_1_mp_rank_00_model_states.pt: holds more than data"),
        engine_state._universal(folder, CheckpointFiles()),
    ):
        pass
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(small, tmp_path, stage, elsewhere):
    words = ("--zero_stage", str(stage))
    with Run(tmp_path / "run", *words) as run:
        checkpoints = run.checkpoints(engines={"model": actor(small, stage)})
        checkpoints.restore("rows")
        save_at(checkpoints, 2)
    path = run.root / "step-00000002"
    fresh = actor(small, stage)
    tried = sorted(path.rglob("*.pt"))
    assert len(tried) == 3 + (stage > 0)
    for file in tried:
        if elsewhere and file.name.startswith("rank"):
            continue  # is not read
        content, manifest = file.read_bytes(), (path / "manifest.json").read_text()
        torch.save(Evil(tmp_path / "ran"), file)
        files = json.loads(manifest)["files"]
        files[str(file.relative_to(path))] = [
            file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        edit(path / "manifest.json", files=files, **({"ranks": 2} if elsewhere else {}))
        with Run(tmp_path / "run", "--resume_from_checkpoint", "latest", *words,
                 "--allow_changed_args") as run:
            checkpoints = run.checkpoints(run.find(), engines={"model": fresh})
            with pytest.raises(UserError, match=f"{file.name}: holds more than data"):
                checkpoints.restore("rows")
        assert not (tmp_path / "ran").exists()
        file.write_bytes(content)
        (path / "manifest.json").write_text(manifest)


# ------------------------------------------------------------------- what goes on


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_engine_takes_the_steps_of_one_that_was_never_killed(
    small, tmp_path, stage, lora
):
    words = ("--zero_stage", str(stage))
    torch.manual_seed(0)
    engine = actor(small, stage, lora=lora, adam_eps=1e-8)
    with Run(tmp_path / "run", *words) as run:
        checkpoints = run.checkpoints(engines={"model": engine})
        checkpoints.restore("rows")
        for _ in range(2):
            step(engine, tokens([0, 1], [2]))
        save_at(checkpoints, 2)
        step(engine, tokens([3, 1]))
    torch.manual_seed(1)  # of another adapter
    again = actor(small, stage, lora=lora, adam_eps=1e-8)
    with Run(tmp_path / "run", "--resume_from_checkpoint", "latest", *words) as run:
        checkpoints = run.checkpoints(run.find(), engines={"model": again})
        assert checkpoints.restore("rows").step == 2
    step(again, tokens([3, 1]))
    expected = snapshot(engine.module)
    for name, weight in snapshot(again.module).items():
        assert weight.equal(expected[name]), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_with_an_adapter_a_checkpoint_holds_only_what_trains(small, tmp_path, stage):
    engine = actor(small, stage, lora=4)
    with Run(tmp_path / "run") as run:
        checkpoints = run.checkpoints(engines={"model": engine})
        checkpoints.restore("rows")
        step(engine, tokens([0, 1]))
        save_at(checkpoints, 1)
    files = sorted((run.root / "step-00000001" / "model").rglob("*model_states.pt"))
    held = CheckpointFiles().load(str(files[0]), "cpu")["module"]
    assert held
    assert all("lora_" in name for name in held)
    trains = 4 * sum(
        getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)
    frozen = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()) - trains
    size = sum(path.stat().st_size for path in (run.root / "step-00000001").rglob("*.pt"))
    # Weights, fp32 copies and two moments, and what each of them is called.
    assert size < 4 * trains + frozen / 2


# ------------------------------------------------------------------- step 3


def ppo_run(small, output, *words):
    """What step 3 gives a checkpoint of."""
    torch.manual_seed(0)  # of the adapter
    engine = small.roles(lora=4)
    ema = Ema(engine.actor.module, decay=0.5)
    trainer = small.trainer(engine)
    maker, controller = small.maker(engine), AdaptiveKLController(0.1, target=6.0)
    normalizer = ScoreNormalizer("reference")
    run = Run(output, *words)
    checkpoints = run.checkpoints(
        run.find(), {"actor": engine.actor, "critic": engine.critic},
        own={"trainer": trainer, "sampler": maker},
        shared={"controller": controller, "normalizer": normalizer, "ema": ema},
    )
    checkpoints.restore("rows")
    return run, checkpoints, engine, trainer, maker, controller, normalizer, ema


def test_step_3_goes_on_in_the_middle_of_a_round(small, tmp_path):
    run, checkpoints, engine, trainer, maker, controller, normalizer, ema = ppo_run(
        small, tmp_path / "run")
    experience, metrics = small.experience(maker, count=8)
    normalizer(experience.score)
    controller.update(100.0, episodes=500)
    calls = []

    def between():
        calls.append(trainer.taken)
        if len(calls) == 3:
            save_at(checkpoints, trainer.taken, mid_iteration=True)

    whole = trainer.learn(Round(experience, metrics), 5, None, between)
    assert calls == [0, 1, 2, 3]
    run.__exit__()
    run, checkpoints, engine2, trainer2, maker2, controller2, normalizer2, ema2 = ppo_run(
        small, tmp_path / "run", "--resume_from_checkpoint", "latest")
    run.__exit__()
    assert (trainer2.taken, checkpoints.progress.step) == (2, 2)
    assert controller2.coef == controller.coef
    assert normalizer2.state_dict() == normalizer.state_dict()
    assert not normalizer2.state_dict()["waiting"]
    assert maker2.generator.get_state().equal(maker.generator.get_state())
    rest = trainer2.learn(trainer2.round, 5)
    for name in whole.keys() | rest.keys() - {"time/update"}:
        if name != "time/update":
            assert rest[name] == whole[name], name
    for one, other in ((engine.actor, engine2.actor), (engine.critic, engine2.critic)):
        expected = snapshot(one.module)
        assert all(w.equal(expected[n]) for n, w in snapshot(other.module).items())
    for one, other in zip(ema.state_dict()["average"], ema2.state_dict()["average"], strict=True):
        assert one.equal(other)
    assert trainer2.round is None
    # The alarm for the first update has rung, or not, before.
    assert "policy/first_log_ratio_max" not in learn(trainer2, experience, 6)


# ------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_boundary_and_ends_the_run_with_its_code(
    tmp_path, capfd, number
):
    before = signal.getsignal(number)
    with Run(tmp_path / "run") as run:
        checkpoints, tracker = run.checkpoints(), Recorder()
        checkpoints.restore("rows")
        with checkpoints.deferring_signals():
            checkpoints.step_boundary(1, tracker)
            assert not run.root.exists()
            os.kill(os.getpid(), number)
            # What a launcher makes of one Ctrl-C: both, and one of them twice.
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(TrainingStopped) as stopped:
                checkpoints.step_boundary(2, tracker)
        assert signal.getsignal(number) is before
    path = run.root / "step-00000002"
    assert find_damage(path) is None
    assert stopped.value.code == 128 + number
    assert str(stopped.value) == (
        f"{number.name}: stopped after step 2; --resume_from_checkpoint latest resumes from {path}"
    )
    assert capfd.readouterr().out == (
        f"{number.name}: stopping after this step; Ctrl-C once more stops at once\n")
    assert tracker.events == [("checkpoint", 2, "step-00000002")]


def test_another_ctrl_c_a_moment_later_stops_at_once(monkeypatch):
    monkeypatch.setattr(module, "SAME_CTRL_C", 0.0)
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_without_an_output_dir_says_that_nothing_is_saved(group):
    checkpoints = Checkpoints(
        RunFolder(None), {}, config=CheckpointConfig(), step=1, arguments={}, found=None)
    with checkpoints.deferring_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TrainingStopped) as stopped:
            checkpoints.step_boundary(3, Recorder())
    assert (stopped.value.code, str(stopped.value)) == (
        143, "SIGTERM: stopped after step 3; nothing is saved: no --output_dir was given")


@pytest.mark.parametrize(("every", "due", "steps"), [
    (0, False, []), (2, False, [2, 4]), (3, False, [3]), (0, True, [1, 2, 3, 4])])
def test_a_checkpoint_is_written_when_it_is_due(tmp_path, every, due, steps):
    with Run(tmp_path / "run", "--save_steps", str(every)) as run:
        checkpoints, tracker = run.checkpoints(), Recorder()
        for number in range(1, 5):
            checkpoints.step_boundary(number, tracker, due=due)
    assert [event[1] for event in tracker.events] == steps


def test_faults_are_counted_on(tmp_path):
    with Run(tmp_path / "run") as run:
        faults = NonFiniteGuard(None, 3, "")
        faults.skip(1, [], torch.get_rng_state())
        checkpoints = run.checkpoints(shared={"faults": faults})
        save_at(checkpoints, 1)
    with Run(tmp_path / "run", "--resume_from_checkpoint", "latest") as run:
        again = NonFiniteGuard(None, 3, "")
        run.checkpoints(run.find(), shared={"faults": again}).restore("")
        again.skip(2, [], torch.get_rng_state())
        with pytest.raises(FloatingPointError):
            again.skip(3, [], torch.get_rng_state())
    assert again.skipped == 3
