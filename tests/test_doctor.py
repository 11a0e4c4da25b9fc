"""The doctor: findings on a machine that lacks something, or that computes wrong results."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from programs import REPOSITORY, environment

from alpaca_rlhf import doctor
from alpaca_rlhf.training_model import launching
from alpaca_rlhf.utils import distributed, losses, optimizer, rl_math
from alpaca_rlhf.utils.data import batches

Usage = namedtuple("Usage", "total used free")


NAMES = ["versions", "devices", "memory", "compiler", "port", "shared memory", "output", "cache",
         "hub", "maths", "generation"]


def test_every_check_has_its_row(group, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "initialize", lambda seed: None)  # there is a group
    rows = doctor.examine({"output": tmp_path, "cache": tmp_path / "new"})
    assert [row.name for row in rows if row.name in NAMES] == NAMES
    found = {row.name: (row.status, row.found) for row in rows}
    assert found["maths"] == ("OK", "4 results as by hand")
    assert found["generation"] == ("OK", "3 responses in a batch as alone")


@pytest.mark.slow
def test_the_ranks_of_a_launch_meet_and_each_machine_has_its_table(tmp_path):
    done = subprocess.run(
        [sys.executable, "alpaca_rlhf/training_model/my_deepspeed.py", "--num_gpus", "2",
         "--module", "alpaca_rlhf.doctor", "--output_dir", tmp_path, "--data_output_path",
         tmp_path / "new"],
        env=environment(), cwd=REPOSITORY, text=True, capture_output=True,
        timeout=200, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    rows = re.findall(r"^(?:OK|WARN)\s+(\w+(?: \w+)?)  +(.*)$", done.stdout, re.MULTILINE)
    found = dict(rows)
    assert [name for name in found if name in (*NAMES, "ranks")] == [*NAMES, "ranks"]
    assert len(rows) == len(found), "one table per machine, not one per rank"
    assert found["ranks"].startswith("2 ranks add up to 3, ")


def test_an_error_is_exit_code_1_and_shows_its_remedy(monkeypatch, capsys):
    rows = [doctor.Row("disk", "FAIL", "full", "free some"), doctor.Row("hub", "OK", "x", "free")]
    monkeypatch.setattr(doctor, "examine", lambda places: rows)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1:4] == ["FAIL  disk           full", "                     -> free some",
                         "OK    hub            x"]
    assert said[-1].startswith("1 OK, 0 WARN, 1 FAIL (")
    monkeypatch.setattr(doctor, "examine", lambda places: rows[1:])
    assert doctor.main([]) == 0


# --- versions ------------------------------------------------------------------------------------


def test_the_tested_versions_are_those_of_requirements_txt():
    pins = doctor.tested_versions()
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert [f"{name}=={version}" for name, version in pins.items()] == [
        line for line in lines if not line.startswith("#")]


def test_an_installed_package_knows_the_tested_versions_too(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "none")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [
        "torch<3,>=2.9", 'torch==2.13.0; extra == "tested"', 'debugpy<2,>=1.8; extra == "debug"'])
    assert doctor.tested_versions() == {"torch": "2.13.0"}


def test_setup_py_offers_the_pins_as_an_extra():
    code = "import setuptools, json; setuptools.setup = lambda **given: print(json.dumps(" \
           "given['extras_require']['tested'])); exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", f"__file__ = 'setup.py'\n{code}"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=True)
    assert '"torch==' in done.stdout


def test_missing_and_untested_versions_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "tested_versions",
                        lambda: {"torch": "0.1", "nonesuch": "1.0", "pytest": pytest.__version__})
    first, *rows = doctor.versions()
    assert (first.status, first.found.split("; ")[1]) == ("OK", "1 of 3 libraries as tested")
    assert [(row.name, row.status) for row in rows] == [("torch", "WARN"), ("nonesuch", "FAIL")]
    assert rows[0].found == f"{importlib.metadata.version('torch')}, tested with 0.1"
    assert {row.remedy for row in rows} == {"pip install -r requirements.txt"}


# --- the machine ---------------------------------------------------------------------------------


def test_a_machine_without_compiler(monkeypatch):
    monkeypatch.setattr(optimizer.shutil, "which", lambda name, path=None: None)
    [row] = doctor.compiler()
    assert row.status == "WARN"
    assert row.remedy == "needed for --offload, and on a CPU the compiler for fast decoding"
    assert row.found.startswith("no C++ compiler (")
    assert row.found.endswith(" and no ninja (pip install ninja)")


@pytest.mark.parametrize(("free", "status"), [(64 * 10**6, "WARN"), (2 * 10**9, "OK")])
def test_shared_memory_of_a_container(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free, 0, free))
    [row] = doctor.shared_memory(tmp_path)
    assert (row.status, row.found) == (status, f"{free / 10**9:.2f} GB free in {tmp_path}")


def test_a_disk_with_little_space_and_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 5 * 10**9))
    [full] = doctor.disk("output", tmp_path / "not" / "yet")
    assert full[:3] == ("output", "WARN", f"{tmp_path}/not/yet: 5.0 GB free")
    assert not (tmp_path / "not").exists()
    [impossible] = doctor.disk("cache", tmp_path / "file" / "x")
    assert impossible[:2] == ("cache", "FAIL")


def test_a_taken_port_and_a_host_name_without_an_address(monkeypatch):
    def unknown(name: str) -> str:
        raise OSError("no such host")

    monkeypatch.setattr(launching, "is_free", lambda port: False)
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert [(row.name, row.status) for row in doctor.ports()] == [
        ("port", "WARN"), ("host name", "WARN")]


def test_a_network_that_is_not_there(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    [row] = doctor.hub()
    assert row.status == "WARN"
    assert row.found.startswith("http://127.0.0.1:9 cannot be reached (")
    assert "HF_HUB_OFFLINE=1" in row.remedy


def test_a_check_that_raises_is_a_finding_and_the_others_are_still_made(monkeypatch, group):
    def broken() -> list[doctor.Row]:
        raise ImportError("libcudart.so: cannot\nopen")

    for name in ("versions", "devices", "maths", "generation"):
        monkeypatch.setattr(doctor, name, broken if name == "devices" else list)
    rows = doctor.examine({})
    assert rows[0] == doctor.Row(
        "devices", "FAIL", "ImportError: libcudart.so: cannot open", "see docs/launching.md")
    assert [row.name for row in rows[1:3]] == ["compiler", "port"]


def test_reading_the_doctor_needs_none_of_the_libraries():
    code = "import sys, alpaca_rlhf.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


# --- wrong results -------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name", "wrong", "finding"), [
    # The pad behind a response is counted.
    (rl_math, "gae", lambda rewards, values, mask, gamma, lam, gae=rl_math.gae: gae(
        rewards, values, torch.ones_like(mask), gamma, lam), "advantages"),
    (losses, "pairwise_loss", lambda chosen, rejected: (rejected - chosen).sum(), "pairwise loss"),
    (losses, "policy_loss", lambda *_: (torch.tensor(-1.5), {}), "policy loss"),
])
def test_wrong_maths_is_a_finding(group, monkeypatch, module, name, wrong, finding):
    monkeypatch.setattr(module, name, wrong)
    [row] = doctor.maths()
    assert row.status == "FAIL"
    assert f"{finding}: [" in row.found


def test_a_response_that_depends_on_its_batch_is_a_finding(group, monkeypatch):
    def without_mask(*given, pad=batches.pad, **options):
        ids, mask = pad(*given, **options)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(batches, "pad", without_mask)
    [row] = doctor.generation()
    assert row.status == "FAIL"
    assert "in a batch, [" in row.found
