"""One `log`: every step into metrics.jsonl, a line now and then on the console, from rank 0."""

import json

import pytest

from alpaca_rlhf.utils import distributed, tracking
from alpaca_rlhf.utils.tracking import Tracker, table


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])
    return now


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_a_row_with_every_metric(tmp_path, clock):
    with Tracker(tmp_path, 3, ["loss"]) as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss": step / 2, "hidden": 7}, step)
    assert rows(tmp_path) == [
        {"step": 1, "loss": 0.5, "hidden": 7}, {"step": 2, "loss": 1.0, "hidden": 7},
        {"step": 3, "loss": 1.5, "hidden": 7}]


def test_a_row_is_on_the_disk_at_once(tmp_path, clock):
    with Tracker(tmp_path, 3, []) as tracker:
        tracker.log({"loss": 1.0}, 1)
        assert len(rows(tmp_path)) == 1


def test_the_console_shows_the_first_the_last_and_one_every_five_seconds(clock, capsys):
    with Tracker(None, 5, ["loss"]) as tracker:
        for step, moment in ((1, 101.0), (2, 103.0), (3, 106.5), (4, 107.0), (5, 108.0)):
            clock[0] = moment
            tracker.log({"loss": 0.123456, "hidden": 1}, step)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/5  loss 0.1235  (4 s left)",
        "step 3/5  loss 0.1235  (4 s left)",
        "step 5/5  loss 0.1235  (0 s left)",
    ]


def test_a_metric_that_is_not_there_is_not_shown(clock, capsys):
    with Tracker(None, 1, ["lr", "loss"]) as tracker:
        tracker.log({"loss": 2.0}, 1)
    assert capsys.readouterr().out == "step 1/1  loss 2  (0 s left)\n"


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, clock):
    monkeypatch.chdir(tmp_path)
    with Tracker(None, 1, []) as tracker:
        tracker.log({"loss": 2.0}, 1)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_and_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with Tracker(tmp_path, 1, ["loss"]) as tracker:
        tracker.log({"loss": 2.0}, 1)
        tracker.note("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_file_is_closed_after_an_exception(tmp_path):
    tracker = Tracker(tmp_path, 1, [])
    with pytest.raises(RuntimeError), tracker:
        raise RuntimeError
    assert tracker._file.closed


def test_a_table_is_aligned_and_long_cells_are_cut():
    assert table(["prompt", "score"], [["a\n b", "0.5"], ["abcdefghij", "-1"]], width=6) == (
        "prompt  score\n"
        "------  -----\n"
        "a b     0.5\n"
        "abcde…  -1")
