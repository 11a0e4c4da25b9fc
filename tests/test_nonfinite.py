"""Updates that are not finite: skipped, counted, kept, and taken again to see what is wrong."""

import errno
import math
import os

import pytest
import torch
from conftest import learn, moved, snapshot
from test_training_loop import actor, token_objective, tokens

from alpaca_rlhf.utils.data.batches import TokenBatch, collate_tokens
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.run import nonfinite
from alpaca_rlhf.utils.run.nonfinite import Faults
from alpaca_rlhf.utils.training_loop import global_weight, optimizer_step

pytestmark = pytest.mark.usefixtures("group")


def skip(counter, *steps, batches=()):
    for number in steps:
        counter.skip(number, batches, torch.get_rng_state())


def kept(folder):
    return sorted(path.name for path in (folder / "nonfinite").glob("*"))


# ------------------------------------------------------------------- counting and keeping


def test_a_skipped_step_is_said_counted_and_kept(tmp_path, capsys):
    counter = Faults(tmp_path, 3, "")
    skip(counter, 7, batches=tokens([0], [1]))
    path = tmp_path / "nonfinite" / "step-00000007.pt"
    assert capsys.readouterr().out == (
        "warning: the loss or the gradient of step 7 is not finite; the step is skipped; "
        f"--replay {path} takes it again\n"
    )
    assert counter.skipped == 1
    record = torch.load(path, weights_only=True)
    assert record["step"] == 7
    (mine,) = record["ranks"]
    for held, batch in zip(mine["micro_batches"], tokens([0], [1]), strict=True):
        assert held.keys() == vars(batch).keys()
        assert all(held[name].equal(value) for name, value in vars(batch).items())


def test_only_so_many_in_a_row_end_the_run(tmp_path):
    counter = Faults(None, 3, "lower the learning rate")
    skip(counter, 1, 2)
    counter.none()
    skip(counter, 4, 5)
    with pytest.raises(FloatingPointError) as error:
        skip(counter, 6)
    assert str(error.value) == (
        "3 updates in a row were not finite (--max_skipped_steps 3); lower the learning rate")
    assert counter.skipped == 5


def test_a_checkpoint_is_due_once_after_the_first(tmp_path):
    counter = Faults(None, 9, "")
    assert not counter.was_first()
    skip(counter, 1)
    assert counter.was_first()
    assert not counter.was_first()
    skip(counter, 2)
    assert not counter.was_first()


def test_no_more_than_ten_are_kept(tmp_path, capsys):
    counter = Faults(tmp_path, 99, "")
    skip(counter, *range(1, 13))
    assert kept(tmp_path) == [f"step-{i:08d}.pt" for i in range(1, 11)]
    assert "--replay" not in capsys.readouterr().out.splitlines()[-1]


def test_a_full_disk_is_a_warning_and_no_file_is_promised(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    skip(Faults(tmp_path, 3, ""), 1)
    warning, said = capsys.readouterr().out.splitlines()
    assert warning.endswith("can not be written: [Errno 28] No space left on device")
    assert "--replay" not in said


# ------------------------------------------------------------------- taking one again


def broken_run(small, folder):
    """An engine with a weight that is not finite, and the file that its step left."""
    engine = actor(small)
    with torch.no_grad():
        engine.module.lm_head.weight[85] = math.inf  # an id of the third row
    batches, state = tokens([0, 1], [2]), torch.get_rng_state()
    assert optimizer_step(engine, batches, token_objective(engine), global_weight(batches)) is None
    Faults(folder, 9, "").skip(3, batches, state)
    return engine, str(folder / "nonfinite" / "step-00000003.pt")


def take_again(engine, path):
    loss = token_objective(engine)
    nonfinite.replay(path, TokenBatch, {"model": loss}, lambda batches: optimizer_step(
        engine, batches, loss, global_weight(batches)))


def test_a_replay_says_what_is_not_finite_and_changes_nothing(small, tmp_path, capsys):
    engine, path = broken_run(small, tmp_path)
    before = snapshot(engine.module)
    capsys.readouterr()
    take_again(engine, path)
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "replay: step 3, 2 micro-batch(es) of 1 rank(s)"
    assert [line.split(" losses ")[0] for line in lines] == [
        f"replay: micro-batch {i}: model: sum of" for i in (0, 1)]
    assert [line.split()[-1] for line in lines] == ["nan", "nan"]
    assert last == "replay: the update: not finite again, skipped"
    assert moved(before, engine.module) == set()


def test_a_replay_on_sound_weights_gives_the_loss_of_the_step(small, tmp_path, capsys):
    _, path = broken_run(small, tmp_path)
    engine, again, batches = actor(small), actor(small), tokens([0, 1], [2])
    expected = optimizer_step(engine, batches, token_objective(engine), global_weight(batches))
    capsys.readouterr()
    take_again(again, path)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"replay: the update: loss {expected['loss']:.6g}, ")
    total = sum(float(line.split()[-1]) for line in lines[1:])
    assert total == pytest.approx(expected["loss"] * int(global_weight(batches)), rel=1e-4)
    assert moved(snapshot(engine.module), again.module) == set()


def test_a_replay_draws_the_random_numbers_of_the_step(small, tmp_path, capsys):
    counter, batches = Faults(tmp_path, 9, ""), tokens([0])
    torch.manual_seed(11)
    counter.skip(1, batches, torch.get_rng_state())
    expected = torch.rand(1).item()
    drawn = []

    def loss(batch):
        drawn.append(torch.rand(1).item())
        return torch.tensor(1.0), {}

    nonfinite.replay(str(tmp_path / "nonfinite" / "step-00000001.pt"), TokenBatch, {"model": loss},
                  lambda given: loss(given[0]) and {"loss": 1.0})
    assert drawn == [expected, expected]


def test_step_3_takes_an_update_again(small, tmp_path, capsys):
    engine = small.roles()
    experience, _ = small.experience(small.maker(engine), count=4)
    trainer = small.trainer(engine, small.ppo(micro_batch_size=4, unsup_coef=0.5))
    trainer._faults = Faults(tmp_path, 9, "")
    with torch.no_grad():
        engine.critic.module.model.score.weight[0, 0] = math.inf
    text = [collate_tokens([{"input_ids": [1, 50, 51], "labels": [1, 50, 51]}], pad_id=3)]
    learn(trainer, experience, 0, text)
    assert kept(tmp_path) == ["step-00000001.pt"]
    capsys.readouterr()
    trainer.replay(str(tmp_path / "nonfinite" / "step-00000001.pt"))
    first, policy, value, *_, last = capsys.readouterr().out.splitlines()
    assert first == "replay: step 1, 1 micro-batch(es) of 1 rank(s)"
    assert policy.startswith("replay: micro-batch 0: policy: sum of losses ")
    assert math.isfinite(float(policy.split()[-1]))
    assert value.startswith("replay: micro-batch 0: value: sum of losses ")
    assert not math.isfinite(float(value.split()[-1]))
    assert last == "replay: the update: not finite again, skipped"


# ------------------------------------------------------------------- what is no such file


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refusal(path):
    with pytest.raises(UserError) as error:
        nonfinite.replay(str(path), TokenBatch, {}, lambda batches: None)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"--replay {path}: ")


def test_a_file_that_is_missing_is_refused(tmp_path):
    assert refusal(tmp_path / "none.pt") == "no such file"


def test_a_file_with_code_is_refused_and_the_code_not_run(tmp_path):
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    assert refusal(tmp_path / "evil.pt").startswith("holds more than data, or is damaged")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half of an archive", b"\x80\x02"])
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    assert refusal(tmp_path / "x.pt")


def test_an_update_of_another_step_of_rlhf_is_refused(tmp_path):
    torch.save({"step": 1, "ranks": [{
        "micro_batches": [{"experience": {}}], "random_state": torch.get_rng_state()}]},
        tmp_path / "x.pt")
    assert refusal(tmp_path / "x.pt").startswith("is no update of this step (")


def test_the_checkpoint_with_the_weights_of_a_skipped_step_is_found_beside_it(tmp_path):
    file = tmp_path / "nonfinite" / "step-00000003.pt"
    assert nonfinite.checkpoint_of(str(file)) is None
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert nonfinite.checkpoint_of(str(file)) == tmp_path / "checkpoints" / "step-00000003"
