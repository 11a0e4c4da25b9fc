"""Ranks that are killed, hang, fail or are told to stop: how all end, and what is resumed.

The cases run in one process and forks of it (`killed_worker.py`); `soak.py` does more of them.
Those that resume with other ranks take a minute more: `pytest tests/test_killed_runs.py -m slow`.
"""

import json
import os
import signal

import pytest
from programs import BOOTSTRAP, REPOSITORY, wait_until

pytestmark = pytest.mark.timeout(600)


def report(imported, folder, *words):
    """Run the cases in a folder, and return the lines of their report."""
    done = imported.run([REPOSITORY / "tests" / "killed_worker.py", folder, *words], REPOSITORY)
    assert done.returncode == 0, done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line[:6] in ("ok    ", "FAILED")]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, imported):
    """The lines of the report, and how the cases of two ranks have ended."""
    folder = tmp_path_factory.mktemp("killed")
    return report(imported, folder), json.loads((folder / "ends.json").read_text())


# ------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("case", [
    "step 3, 1 rank(s), ZeRO 0, LoRA 4", "step 1, 2 rank(s), ZeRO 3, LoRA 4"])
def test_a_run_that_was_killed_and_resumed_ends_like_one_that_was_not(outcome, case):
    (line,) = [line for line in outcome[0] if case in line]
    assert line.startswith(f"ok      {case}: 1 kills, ")
    assert "the weights are the same, bit for bit; 0 broken checkpoints" in line


def test_a_signal_to_one_rank_stops_all_and_saves(outcome):
    """The case with two ranks above is resumed from here."""
    stopped = outcome[1]["stopped"]
    assert stopped["codes"] == [143, 143]
    assert stopped["said"].count("SIGTERM: stopped after step 3; --resume_from_checkpoint") == 2
    assert stopped["saved"] == ["step-00000002", "step-00000003"]


@pytest.mark.slow
def test_a_run_is_resumed_with_other_ranks_and_another_stage(imported, tmp_path):
    alone, together = "1 rank(s), ZeRO 0", "2 rank(s), ZeRO 3"
    for line, (origin, goal) in zip(
        report(imported, tmp_path, "move"), [(alone, together), (together, alone)], strict=True
    ):
        assert line.startswith(f"ok      step 1, {origin}, all weights: to step 1, {goal}, all "
                               "weights: weights differ by at most ")


# ------------------------------------------------------------------- one rank goes wrong


def test_a_rank_that_hangs_ends_the_others_after_the_timeout_with_a_message(outcome):
    hangs = outcome[1]["hangs"]
    assert hangs["codes"] == [124, 7]  # 7: it came back and found nobody
    assert hangs["said"].startswith(
        "error: rank 0 waited for another rank until --collective_timeout was over (in _reduced, ")
    assert hangs["said"].count("\n") == 1


def test_a_rank_that_fails_ends_all_and_its_cause_is_on_the_console_once(outcome):
    raises = outcome[1]["raises"]
    assert raises["codes"] == [1, 1]
    said = raises["said"]
    assert said.count("Traceback") == said.count("ZeroDivisionError: the cause") == 1
    assert said.splitlines()[-1].startswith("error: another rank has ended (in barrier, ")


def test_a_rank_that_is_killed_ends_the_others_before_the_timeout(outcome):
    dies = outcome[1]["dies"]
    assert dies["codes"] == [1, -signal.SIGKILL]
    assert dies["said"].startswith("error: another rank has ended")


# ------------------------------------------------------------------- below the launcher

# These import no torch, so that a launch is short.
ENDS = """
import os, sys, time
if os.environ["RANK"] == "1":
    {how}
time.sleep(1000)
"""
SAVING = """
import os, signal, sys, time
noted = []
signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
path = sys.argv[-1] + os.environ["RANK"]
open(path + ".started", "w").close()
while not noted:
    time.sleep(0.05)
time.sleep(1)  # a checkpoint takes its time
open(path + ".saved", "w").close()
sys.exit(143)
"""


@pytest.mark.parametrize(("how", "line"), [
    ("os.kill(os.getpid(), 9)", "a worker was ended by SIGKILL (out of memory?)"),
    ("sys.exit(124)", "a rank waited for another one for longer than --collective_timeout; the "
                      "lines above name the place"),
])
def test_a_rank_that_ends_below_the_launcher_ends_all_and_the_last_line_says_how(
    imported, tmp_path, how, line
):
    (tmp_path / "train.py").write_text(ENDS.format(how=how))
    launch = imported.run([BOOTSTRAP, "--num_gpus", 2, "train.py"], tmp_path)
    assert launch.returncode != 0
    assert launch.stderr.splitlines()[-1] == f"my_deepspeed: {line}"


def test_the_launcher_passes_sigterm_on_and_lets_every_rank_save(imported, tmp_path):
    (tmp_path / "train.py").write_text(SAVING)
    launch = imported.start([BOOTSTRAP, "--num_gpus", 2, "train.py", "rank"], tmp_path)
    wait_until(lambda: all((tmp_path / f"rank{i}.started").exists() for i in (0, 1)))
    os.kill(launch[0], signal.SIGTERM)
    assert imported.end(launch).returncode == 143
    assert all((tmp_path / f"rank{i}.saved").exists() for i in (0, 1))
