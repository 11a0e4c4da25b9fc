"""Learning curves stay in their bands, at every ZeRO stage; see golden_curves.py."""

import json
import subprocess

import golden_curves
import pytest
from programs import REPOSITORY, environment

BANDS = json.loads(golden_curves.FILE.read_text())


def outside(found, bands):
    """Return the figures that are outside their bands."""
    return {name: (found[name], bands[name]) for name in bands
            if not bands[name][0] <= found[name] <= bands[name][1]}


@pytest.mark.parametrize(("seed", "stage"), [
    (1, 0), pytest.param(2, 2, marks=pytest.mark.slow), (3, 3)])
def test_a_short_run_of_all_three_steps_stays_in_its_bands(small, tmp_path, seed, stage):
    found = golden_curves.figures(small.folder, tmp_path, seed, stage)
    assert outside(found, BANDS["short"]) == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_embedded_pipeline_stays_in_its_bands(tmp_path):
    subprocess.run(
        ["bash", "scripts/run_pipeline.sh", "--output-dir", tmp_path, "--", "--seed", "1"],
        cwd=REPOSITORY, env=environment(), check=True)
    assert outside(golden_curves.of_pipeline(tmp_path), BANDS["embedded"]) == {}
