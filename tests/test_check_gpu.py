"""benchmarks/check_gpu.py: its table and JSON file, broken rows, options; some real rows."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import REPOSITORY

# Checks that end in every way.
FAKES = """
import os, signal, subprocess, sys, time
from check_gpu import Skip, Wrong

def passes(folder, *words):
    print("noise")
    with open(folder / "order", "a") as file:
        file.write("".join(words) + " ")
    return f"fine {words}", {"n": 1.5}

def skips(folder):
    raise Skip("needs a GPU")

def is_wrong(folder):
    raise Wrong("3 is not 4")

def raises(folder):
    raise ValueError("bad value\\nand more")

def exits(folder):
    sys.exit(3)

def dies(folder):
    print("CUDA error: out of memory", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(folder):
    child = subprocess.Popen(["sleep", "100"])
    (folder / "child").write_text(str(child.pid))
    print("waiting for rank 1", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def check_gpu(monkeypatch, tmp_path):
    """The module, with the fake checks where its workers find them."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    return importlib.import_module("check_gpu")


@pytest.fixture
def results(check_gpu, tmp_path):
    """Run fake checks, each followed by one that passes."""

    def run(*names, limit=20.0, total=60.0):
        rows = {}
        for name in names:
            rows[name] = check_gpu.Row(f"fakes:{name}", limit=limit)
            rows[f"after {name}"] = check_gpu.Row("fakes:passes", (name,), limit=20.0)
        folder = tmp_path / "rows"
        folder.mkdir()
        found = {result.name: result for result in check_gpu.run(rows, folder, total)}
        assert list(found) == list(rows)
        return found, folder

    return run


@pytest.mark.parametrize(("name", "message", "log"), [
    ("is_wrong", "3 is not 4", "check_gpu.Wrong: 3 is not 4"),
    ("raises", "ValueError: bad value", "and more"),
    ("exits", "SystemExit: 3", "SystemExit: 3"),
    ("dies", "the process ended with SIGKILL; last line: CUDA error: out of memory",
     "CUDA error: out of memory"),
])
def test_a_row_that_breaks_is_a_fail_with_its_line_and_the_next_row_runs(
    results, name, message, log
):
    found, folder = results("passes", name, "skips")
    assert (found[name].status, found[name].message) == ("FAIL", message)
    assert found[name].log[-1] == log
    assert (found["skips"].status, found["skips"].message) == ("SKIP", "needs a GPU")
    assert (found["passes"].status, found["passes"].figures) == ("PASS", {"n": 1.5})
    assert {found[f"after {other}"].status for other in ("passes", name, "skips")} == {"PASS"}
    assert (folder / "order").read_text().split() == ["passes", name, "skips"]


def test_a_row_that_hangs_is_ended_with_its_processes_after_its_time_limit(results):
    found, folder = results("hangs", limit=2.0)  # of 100 seconds
    assert found["hangs"].message == "no result after 2 s; last line: waiting for rank 1"
    assert found["hangs"].status == "FAIL"
    assert found["after hangs"].status == "PASS"
    state = Path(f"/proc/{(folder / 'child').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_rows_that_have_not_begun_in_time_are_skipped_and_say_so(results):
    found, _ = results("hangs", "passes", limit=20.0, total=1.0)
    assert found["hangs"].status == "FAIL"
    assert {found[name].status for name in ("passes", "after passes")} == {"SKIP"}
    assert found["passes"].message == "not run, 1 s are over: run it with --only 'passes'"


def test_a_check_that_cannot_be_imported_is_a_fail(check_gpu, tmp_path):
    rows = {"missing": check_gpu.Row("no_such_module:check")}
    (result,) = check_gpu.run(rows, tmp_path)
    assert result.status == "FAIL"
    assert "exit code 1; last line: ModuleNotFoundError" in result.message


@pytest.mark.parametrize(("check", "code"), [("passes", 0), ("skips", 0), ("is_wrong", 1)])
def test_the_exit_code_the_table_and_the_file(
    check_gpu, monkeypatch, tmp_path, capsys, check, code
):
    monkeypatch.setattr(check_gpu, "ROWS", {
        "machine": check_gpu.Row("fakes:passes", ("first",)),
        "some row": check_gpu.Row(f"fakes:{check}"), "other": check_gpu.Row("fakes:passes")})
    output = tmp_path / "found.json"
    assert check_gpu.main(["--output", str(output), "--only", "s?me*"]) == code
    lines = capsys.readouterr().out.splitlines()
    status = {"passes": "PASS", "skips": "SKIP", "is_wrong": "FAIL"}[check]
    assert [line.split()[0] for line in lines[:2]] == ["PASS", status]
    assert lines[2].endswith(f"; written to {output}")
    written = json.loads(output.read_text())
    assert written["machine"] == {"n": 1.5}
    assert written["counts"] == {kind: [line.split()[0] for line in lines[:2]].count(kind)
                                 for kind in ("PASS", "FAIL", "SKIP")}
    machine, row = written["rows"]
    assert (machine["name"], machine["figures"]) == ("machine", {})
    assert (row["name"], row["status"]) == ("some row", status)
    assert row.keys() == {"name", "status", "seconds", "message", "figures", "log"}


@pytest.mark.parametrize(("words", "error"), [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--only", "quantum"], "--only 'quantum': no row has this name; --list shows all names"),
    (["--output", "/no/such/folder/file.json"], "No such file or directory"),
])
def test_a_wrong_option_is_exit_code_2_and_says_what_is_wrong(check_gpu, capsys, words, error):
    with pytest.raises(SystemExit) as end:
        check_gpu.main(words)
    assert end.value.code == 2
    assert error in capsys.readouterr().err


def test_list_prints_every_row_and_runs_none(check_gpu, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_gpu.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == list(check_gpu.ROWS)
    assert {"doctor", "step 3 bf16", "curve fp16", "decoding graph", "two ranks"} < set(names)
    assert not (tmp_path / "check_gpu.json").exists()
    assert check_gpu.main(["--list", "--only", "step ? bf16", "memory"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "machine", "step 1 bf16", "step 2 bf16", "step 3 bf16", "memory"]


def test_every_row_names_a_function_and_its_arguments(check_gpu):
    # Read, not imported: importing the checks takes seconds.
    source = (REPOSITORY / "benchmarks" / "gpu_checks.py").read_text()
    for row in check_gpu.ROWS.values():
        module, _, name = row.check.partition(":")
        assert module == "gpu_checks"
        assert f"\ndef {name}(folder: Path" in source


@pytest.mark.timeout(300)
def test_real_rows_on_a_cpu(check_gpu, tmp_path, capsys):
    output = tmp_path / "cpu.json"
    rows = ["logprobs fp32", "decoding compiled", "decoding graph", "visible"]
    assert check_gpu.main(["--output", str(output), "--only", *rows]) == 0, capsys.readouterr().out
    written = json.loads(output.read_text())
    found = {row["name"]: row for row in written["rows"]}
    assert {name: row["status"] for name, row in found.items()} == {
        "machine": "PASS", "logprobs fp32": "PASS", "decoding compiled": "PASS",
        "decoding graph": "SKIP", "one visible device": "SKIP"}
    assert found["decoding graph"]["message"] == "a CUDA graph needs a GPU"
    assert found["logprobs fp32"]["figures"]["first_log_ratio_max"] == 0.0
    assert {"torch", "deepspeed", "transformers", "peft"} <= written["machine"]["libraries"].keys()
    assert "fp32" in written["machine"]["precisions"]


def test_the_script_prepares_the_environment_and_passes_its_options_on(tmp_path):
    root = tmp_path / "the tree"
    for folder in ("scripts", "benchmarks"):
        (root / folder).mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts" / "check_gpu.sh", root / "scripts")
    (root / "scripts" / "environment.sh").write_text('prepare_environment() { echo "$*"; }\n')
    (root / "benchmarks" / "check_gpu.py").write_text(
        "import os, sys\nprint(os.getcwd(), sys.argv[1:], os.environ['HF_HUB_OFFLINE'])\n"
        "sys.exit(1)\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(root / "scripts" / "check_gpu.sh"), "--only", "step ? bf16"], cwd=tmp_path,
        env={**os.environ, "PATH": path}, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "requirements.txt", f"{tmp_path} ['--only', 'step ? bf16'] 1"]
