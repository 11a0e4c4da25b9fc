"""Work of rank 0 on the host that takes longer than `--collective_timeout` does not end a run."""

import json
import subprocess
import sys

import pytest
from killed_worker import TIMEOUT
from programs import REPOSITORY, environment
from test_my_deepspeed import start

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Return the end of each pair of ranks, by the name of its work."""
    folder = tmp_path_factory.mktemp("slow")
    worker = REPOSITORY / "tests" / "slow_worker.py"
    subprocess.run([sys.executable, str(worker), str(folder)], env=environment(), check=True,
                   timeout=250)
    return json.loads((folder / "ends.json").read_text())


@pytest.mark.parametrize("work", [
    "first", "exporting", "saving_plain", "saving_whole", "saving_shards", "cleaning", "noting",
    "starting", "finishing", "reporting"])
def test_the_others_wait_for_rank_0s_work_and_collectives_follow_it(ends, work):
    assert ends[work]["codes"] == [0, 0], ends[work]["said"]
    assert ends[work]["seconds"] > TIMEOUT


def test_deepspeeds_own_groups_have_the_collective_timeout(ends):
    assert ends["hangs_in_zero"]["codes"] == [124, 7]
    assert "until --collective_timeout was over" in ends["hangs_in_zero"]["said"]


def test_a_rank_that_dies_ends_those_that_wait_for_its_work_on_the_host(ends):
    died = ends["dies_while_others_wait"]
    assert died["codes"] == [-9, 1], died["said"]
    assert "another rank has ended" in died["said"]


HANGS = """
import time, torch
from alpaca_rlhf.utils import console, distributed
def main():
    distributed.initialize(0, 4)
    if distributed.rank() == 1:
        time.sleep(120)
    distributed.sum_over_ranks(torch.ones(1))
console.run_main(main)
"""


def test_the_last_line_of_a_launch_whose_rank_hangs_names_the_flag(tmp_path):
    (tmp_path / "train.py").write_text(HANGS)
    launch = start(tmp_path, "--num_gpus", "2", "--no_local_rank", "train.py")
    said = launch.communicate(timeout=110)[1].splitlines()
    assert launch.returncode == 124
    assert said[-1] == ("my_deepspeed: a rank waited for another one for longer than "
                        "--collective_timeout; the lines above name the place")
    assert "until --collective_timeout was over (in _reduced" in said[-2]
