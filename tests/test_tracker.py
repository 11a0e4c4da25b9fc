"""One `log` for files, console, alarms and other trackers, on rank 0 only."""

import contextlib
import io
import json
import re
import sys

import pytest

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import TrackingConfig
from alpaca_rlhf.utils.console import table
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.logging import tracker as tracking
from alpaca_rlhf.utils.logging.alarms import Alarms
from alpaca_rlhf.utils.logging.tracker import Tracker

LOSS = {"loss": "loss"}


@pytest.fixture
def clock(monkeypatch):
    """Return the time, which stands still until a test changes it."""
    now = [100.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])
    return now


def rows(folder, name="metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_every_step_is_at_once_a_row_with_every_metric(tmp_path, clock):
    with Tracker(tmp_path, 3, LOSS) as tracker:
        for step in (1, 2, 3):
            clock[0] += 2
            tracker.log({"loss": step / 2, "hidden": 7}, step)
            assert len(rows(tmp_path)) == step
    assert rows(tmp_path) == [
        {"step": 1, "loss": 0.5, "hidden": 7, "time/elapsed": 2.0},
        {"step": 2, "loss": 1.0, "hidden": 7, "time/elapsed": 4.0},
        {"step": 3, "loss": 1.5, "hidden": 7, "time/elapsed": 6.0}]


def test_the_console_shows_the_first_the_last_and_one_every_five_seconds(clock, capsys):
    with Tracker(None, 5, LOSS) as tracker:
        for step, moment in ((1, 101.0), (2, 103.0), (3, 106.5), (4, 107.0), (5, 108.0)):
            clock[0] = moment
            tracker.log({"loss": 0.123456, "hidden": 1}, step)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/5  loss 0.1235  (4 s left)",
        "step 3/5  loss 0.1235  (4 s left)",
        "step 5/5  loss 0.1235  (0 s left)",
    ]


def test_a_metric_that_is_not_there_is_not_shown(clock, capsys):
    with Tracker(None, 1, {"lr": "lr", "loss": "loss"}) as tracker:
        tracker.log({"loss": 2.0}, 1)
    assert capsys.readouterr().out == "step 1/1  loss 2  (0 s left)\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_folder_and_on_other_ranks_nothing_is_written(
    tmp_path, monkeypatch, capsys, rank
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setenv("RANK", str(rank))
    with Tracker(tmp_path if rank else None, 1, LOSS) as tracker:
        tracker.log({"loss": 2.0}, 1)
        tracker.note("hello")
    assert list(tmp_path.iterdir()) == []
    assert bool(capsys.readouterr().out) == (rank == 0)


def test_a_new_run_removes_old_rows_and_records_on_what_it_started(tmp_path, clock):
    for name in ("metrics", "events", "samples"):
        (tmp_path / f"{name}.jsonl").write_text('{"step": 1}\n')
    with Tracker(tmp_path, 1, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record.keys() == {"started", "device", "ranks", "versions"}
    assert record["versions"]["torch"].startswith("2.")


# ------------------------------------------------------------------------------ resuming


def interrupted(folder, clock, steps=4):
    """Record a run that is killed: steps of two seconds, each with samples and an event."""
    with Tracker(folder, 6, {}) as tracker:
        for step in range(1, steps + 1):
            clock[0] += 2
            tracker.log({"kl/k1": float(step)}, step)
            tracker.event("checkpoint", step)
            tracker.samples([{"prompt": "p", "reply": "r", "score": 1.0}], step)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "kl/')


def test_a_resumed_run_keeps_rows_and_time_up_to_its_step_and_continues(tmp_path, clock, capsys):
    interrupted(tmp_path, clock)
    capsys.readouterr()
    with Tracker(tmp_path, 6, {"kl/k1": "KL"}, resume_step=3) as tracker:
        clock[0] += 5
        tracker.log({"kl/k1": 40.0}, 4)
    assert [(row["step"], row["kl/k1"]) for row in rows(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    for name in ("events", "samples"):
        assert [row["step"] for row in rows(tmp_path, name)] == [1, 2, 3]
    assert rows(tmp_path)[-1]["time/elapsed"] == 6 + 5
    # The time left is estimated from the resumed run's own steps.
    assert capsys.readouterr().out == "step 4/6  KL 40  (10 s left)\n"


def test_an_alarm_is_not_repeated_after_resuming(tmp_path, clock, capsys):
    def tracker(resume_step):
        return Tracker(tmp_path, 9, {}, alarms=Alarms(), resume_step=resume_step)

    with tracker(0) as first:
        for step in range(1, 6):
            first.log({"kl/k1": 50.0}, step)
    assert capsys.readouterr().out.count("alarm") == 1
    with tracker(5) as second:
        second.log({"kl/k1": 50.0}, 6)
        second.log({"kl/k1": 50.0}, 7)
    assert "alarm" not in capsys.readouterr().out
    assert [row["kind"] for row in rows(tmp_path, "events")] == ["kl"]


# ------------------------------------------------------------------------------ alarms


@pytest.mark.parametrize("stop", [False, True])
def test_an_alarm_is_written_and_recorded_and_may_end_the_training(tmp_path, clock, capsys, stop):
    expected = pytest.raises(
        TrainingStopped, match="^--stop_on_alarm: stopped at step 1 by: ratio; "
    ) if stop else contextlib.nullcontext()
    tracker = Tracker(tmp_path, 2, {}, alarms=Alarms(), stop_on_alarm=stop)
    with expected, tracker:
        tracker.log({"policy/first_log_ratio_max": 0.5}, 1)
        tracker.log({}, 2)
    [event] = rows(tmp_path, "events")
    assert (event["step"], event["kind"], event["alarm"]) == (1, "ratio", True)
    assert f"\nalarm at step 1: {event['message']}\n" in capsys.readouterr().out
    assert len(rows(tmp_path)) == (1 if stop else 2)


# ------------------------------------------------------------------------------ the terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_with_step_time_left_and_metrics(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with Tracker(tmp_path, 4, {"loss": "loss"}) as tracker:
        for step in (1, 2, 3, 4):
            tracker.log({"loss": step / 2}, step)
            tracker.note(f"note {step}")
    last = screen.getvalue().rstrip().split("\r")[-1]
    assert re.fullmatch(r"100%\|[█#]+\| 4/4 \[00:0\d<00:0\d, loss 2\]", last)
    assert [f"note {step}\n" in screen.getvalue() for step in (1, 2, 3, 4)] == [True] * 4
    assert "s left" not in screen.getvalue()


# ------------------------------------------------------------------------------ other trackers


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)]
             for name in events.Tags()["scalars"]}
    texts = [e.tensor_proto.string_val[0].decode() for name in events.Tags()["tensors"]
             if name.startswith("samples") for e in events.Tensors(name)]
    return found, texts


def test_tensorboard_gets_every_metric_and_the_samples(tmp_path, group):
    tracking = TrackingConfig(tracker=["tensorboard"], logging_dir=str(tmp_path / "tb"))
    arguments = {"seed": 1, "lang": ["en"]}
    with Tracker(None, 2, {}, tracking=tracking, arguments=arguments) as tracker:
        tracker.log({"reward/score_mean": 0.5}, 1)
        tracker.log({"reward/score_mean": 1.5}, 2)
        tracker.samples([{"prompt": "a|b", "reply": "c\nd", "score": 1.0}], 2)
    found, texts = scalars(tmp_path / "tb" / "run")
    assert found["reward/score_mean"] == [(1, 0.5), (2, 1.5)]
    assert texts == [
        "| prompt | reply | score |\n| --- | --- | --- |\n| a\\|b | c d | 1.00 |"]


def test_the_files_of_a_tracker_go_to_the_run_by_default(tmp_path, group):
    folder = tmp_path / "tiny" / "actor.partial"
    folder.mkdir(parents=True)
    with Tracker(folder, 1, {}, tracking=TrackingConfig(enable_tensorboard=True)) as tracker:
        tracker.log({"loss": 0.5}, 1)
    found, _ = scalars(folder / "logs" / "tiny-actor")
    assert found["loss"] == [(1, 0.5)]


def test_none_is_started_unasked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)  # its import would fail
    with Tracker(tmp_path, 1, {}, tracking=TrackingConfig()) as tracker:
        tracker.log({"loss": 0.5}, 1)


WANDB = TrackingConfig(tracker=["wandb"])


class Failing:
    """A tracker without network from the second step on."""

    requires_logging_directory = False
    finished = 0

    def __init__(self, project, **named):
        self.seen = []

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        if step == 2:
            raise ConnectionError("no route")
        assert step == 1

    def finish(self):
        Failing.finished += 1


@pytest.fixture
def failing(monkeypatch, group):
    from accelerate import tracking as theirs

    monkeypatch.setattr(Failing, "finished", 0)
    monkeypatch.setitem(theirs.LOGGER_TYPE_TO_CLASS, "wandb", Failing)


def test_a_tracker_that_fails_is_left_out_with_one_line_and_the_training_goes_on(
    tmp_path, failing, capsys
):
    with Tracker(tmp_path, 3, {}, tracking=WANDB) as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss": 1.0}, step)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == ["warning: --tracker wandb failed, and is left out from here: "
                        "ConnectionError('no route')"]
    assert len(rows(tmp_path)) == 3


def test_a_tracker_is_closed_when_the_training_fails(tmp_path, failing):
    tracker = Tracker(tmp_path, 3, {}, tracking=WANDB)
    with pytest.raises(RuntimeError), tracker:
        raise RuntimeError
    assert Failing.finished == 1


def test_a_tracker_that_cannot_start_is_a_users_error(tmp_path, failing, monkeypatch):
    def refuse(self):
        raise ValueError("not logged in")

    monkeypatch.setattr(Failing, "start", refuse)
    with pytest.raises(UserError, match="^--tracker wandb: cannot be started: .*not logged in"):
        Tracker(tmp_path, 1, {}, tracking=WANDB)


def test_a_table_is_aligned_and_long_cells_are_cut():
    assert table(["prompt", "score"], [["a\n b", "0.5"], ["abcdefghij", "-1"]], width=6) == (
        "prompt  score\n"
        "------  -----\n"
        "a b     0.5\n"
        "abcde…  -1")
