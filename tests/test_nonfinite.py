"""Optimizer steps with a non-finite loss or gradient: skipped, counted, their batches saved."""

import errno
import math
import os

import pytest
import torch
from conftest import learn, moved, snapshot
from test_training_loop import actor, step, tokens

from alpaca_rlhf.utils.data.batches import TokenBatch, collate_tokens
from alpaca_rlhf.utils.run.nonfinite import NonFiniteGuard

pytestmark = pytest.mark.usefixtures("group")


def skip(guard, *steps, batches=()):
    for number in steps:
        guard.skip(number, batches, torch.get_rng_state())


def saved(folder):
    return sorted(path.name for path in (folder / "nonfinite").glob("*"))


def test_a_skipped_step_is_reported_and_counted_and_its_batch_saved(tmp_path, capsys):
    guard = NonFiniteGuard(tmp_path, 3, "")
    skip(guard, 7)
    assert capsys.readouterr().out == (
        "warning: non-finite loss or gradient in step 7, which is skipped; its batch is saved in "
        f"{tmp_path / 'nonfinite' / 'step-00000007.pt'}\n"
    )
    assert guard.skipped == 1
    assert saved(tmp_path) == ["step-00000007.pt"]


def test_the_run_is_aborted_after_consecutive_steps_only():
    guard = NonFiniteGuard(None, 3, "lower the learning rate")
    skip(guard, 1, 2)
    guard.step_taken()
    skip(guard, 4, 5)
    with pytest.raises(FloatingPointError) as error:
        skip(guard, 6)
    assert str(error.value) == (
        "non-finite loss or gradient in 3 consecutive optimizer steps (--max_skipped_steps 3); "
        "lower the learning rate"
    )
    assert guard.skipped == 5


def test_only_the_first_skip_of_a_run_is_the_first():
    guard, firsts = NonFiniteGuard(None, 9, ""), []
    for is_finite in (True, False, True, False, False):
        guard.step_taken() if is_finite else skip(guard, 1)
        firsts.append(guard.at_first_skip)
    assert firsts == [False, True, False, False, False]


def test_no_more_than_ten_batches_are_saved(tmp_path, capsys):
    skip(NonFiniteGuard(tmp_path, 99, ""), *range(1, 13))
    assert saved(tmp_path) == [f"step-{i:08d}.pt" for i in range(1, 11)]
    assert capsys.readouterr().out.endswith("non-finite loss or gradient in step 12, which is "
                                            "skipped\n")


def test_a_full_disk_is_a_warning_and_no_file_is_promised(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    skip(NonFiniteGuard(tmp_path, 3, ""), 1)
    warning, said = capsys.readouterr().out.splitlines()
    assert warning.endswith("cannot be written: [Errno 28] No space left on device")
    assert said.endswith("step 1, which is skipped")


def test_a_saved_batch_gives_the_step_again(small, tmp_path):
    """Follow docs/checkpoints.md: load the file, and take the step with the sound weights."""
    broken, expected, again = actor(small), actor(small), actor(small)
    with torch.no_grad():
        broken.module.lm_head.weight[85] = math.inf  # an id of the third row
    batches = tokens([0, 1], [2])
    torch.manual_seed(11)
    state = torch.get_rng_state()
    assert step(broken, batches) is None
    NonFiniteGuard(tmp_path, 9, "").skip(3, batches, state)

    record = torch.load(tmp_path / "nonfinite" / "step-00000003.pt", weights_only=True)
    assert record["step"] == 3
    (mine,) = record["ranks"]
    assert mine["random_state"].equal(state)
    loaded = [TokenBatch(**tensors) for tensors in mine["micro_batches"]]
    assert step(broken, loaded) is None
    assert step(again, loaded) == step(expected, batches)
    assert moved(snapshot(expected.module), again.module) == set()


def test_in_step_3_experience_and_text_are_saved(small, tmp_path):
    engine = small.roles()
    experience, _ = small.experience(small.maker(engine), count=4)
    trainer = small.trainer(engine, micro=4, unsup_coef=0.5, folder=tmp_path)
    with torch.no_grad():
        engine.critic.module.model.score.weight[0, 0] = math.inf
    text = collate_tokens([{"input_ids": [1, 50, 51], "labels": [1, 50, 51]}], pad_id=3)
    learn(trainer, experience, 0, [text])
    record = torch.load(tmp_path / "nonfinite" / "step-00000001.pt", weights_only=True)
    saved, saved_text = record["ranks"][0]["micro_batches"]
    assert saved_text.keys() == vars(text).keys()
    assert saved.keys() == vars(experience).keys()
    assert saved["score"].sort().values.equal(experience.score.sort().values)
