"""Work of rank 0 on the host that takes longer than `--collective_timeout` does not end a run."""

import json

import pytest
from killed_worker import TIMEOUT
from programs import REPOSITORY

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ends(tmp_path_factory, imported):
    """Return the end of each pair of ranks, by the name of its work."""
    folder = tmp_path_factory.mktemp("slow")
    done = imported.run([REPOSITORY / "tests" / "slow_worker.py", folder], REPOSITORY)
    assert done.returncode == 0, done.stderr
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
