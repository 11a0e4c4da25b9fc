"""my_deepspeed.py: what its workers get, and how a launch ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from programs import (
    BOOTSTRAP,
    REPOSITORY,
    SLEEPER,
    WORKER,
    environment,
    is_alive,
    process_numbers,
    wait_until,
)

from alpaca_rlhf.training_model import launching, my_deepspeed
from alpaca_rlhf.utils import distributed


def start(folder: Path, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    """Start the bootstrap in `folder`, with a line waiting on standard input."""
    process = subprocess.Popen(
        [sys.executable, str(BOOTSTRAP), *arguments],
        cwd=folder, env=environment(**{"PYTHONPATH": None, "OMP_NUM_THREADS": None, **changes}),
        text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write("typed by the user\n")
    process.stdin.flush()
    return process


@pytest.fixture(scope="module")
def two_launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[dict]]]:
    """Start two launches at the same time, of a script with spaces in its path.

    Returns:
        What each launch printed, and what each of its workers saw.
    """
    folder = tmp_path_factory.mktemp("a folder with spaces")
    (folder / "my scripts").mkdir()
    (folder / "my scripts" / "train it.py").write_text(WORKER)
    launches = {
        "two": start(folder, "--num_gpus", "2", "my scripts/train it.py", "--read", "--master_port",
                     "mine", "two", PYTHONPATH="/somewhere else"),
        "fails": start(folder, "my scripts/train it.py", "--read", "--fail", "fails",
                       OMP_NUM_THREADS="7"),
    }
    found = {}
    for name, launch in launches.items():
        stdout, stderr = launch.communicate(timeout=200)
        assert (launch.returncode, stderr) == (2 if name == "fails" else 0, "")
        files = sorted(folder.glob(f"{name}*.json"))
        found[name] = stdout, [json.loads(file.read_text()) for file in files]
        assert {worker["cwd"] for worker in found[name][1]} == {str(folder)}
    return found


def test_num_gpus_starts_that_many_ranks_on_a_cpu_each_with_its_share_of_the_cores(two_launches):
    _, workers = two_launches["two"]
    share = str(max(1, distributed.usable_cores() // 2))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    assert [[worker["env"][name] for name in names] for worker in workers] == [
        ["0", "0", "2", "cpu", share], ["1", "1", "2", "cpu", share]]


def test_without_num_gpus_there_is_one_rank_and_what_the_user_set_stays(two_launches):
    _, [worker] = two_launches["fails"]
    assert (worker["env"]["WORLD_SIZE"], worker["env"]["OMP_NUM_THREADS"]) == ("1", "7")
    assert worker["stdin"] == "typed by the user\n"


def test_search_paths_start_with_interpreter_and_repository(two_launches):
    env = two_launches["two"][1][1]["env"]
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["PYTHONPATH"].split(os.pathsep) == [str(REPOSITORY), "/somewhere else"]


def test_script_arguments_arrive_unchanged(two_launches):
    assert two_launches["two"][1][0]["argv"] == [
        "my scripts/train it.py", "--local_rank=0", "--read", "--master_port", "mine", "two"
    ]


def test_two_launches_at_once_use_different_ports(two_launches):
    ports = [{worker["env"]["MASTER_PORT"] for worker in workers}
             for _, workers in two_launches.values()]
    assert list(map(len, ports)) == [1, 1]
    assert ports[0] != ports[1]


def test_console_holds_one_line_of_ours_and_the_workers_own(two_launches):
    output, [worker, _] = two_launches["two"]
    env = worker["env"]
    assert output.splitlines() == [
        "my_deepspeed: my scripts/train it.py: 2 rank(s) on the CPU, "
        f"OMP_NUM_THREADS={env['OMP_NUM_THREADS']}, port {env['MASTER_PORT']}",
        *["printed by the worker"] * 2,
    ]


def test_devices_may_be_named(imported, tmp_path: Path):
    (tmp_path / "train.py").write_text(WORKER)
    launch = imported.run(
        [BOOTSTRAP, "--include", "localhost:GPU-8a,GPU-8b", "train.py", "run"], tmp_path)
    assert (launch.stderr, launch.returncode) == ("", 0)
    for rank in "01":
        seen = json.loads((tmp_path / f"run{rank}.json").read_text())["env"]
        assert (seen["CUDA_VISIBLE_DEVICES"], seen["LOCAL_RANK"], seen["WORLD_SIZE"]) == (
            "GPU-8a,GPU-8b", rank, "2")


@pytest.mark.parametrize(("flags", "visible", "message"), [
    ([], "GPU-8a", "CUDA_VISIBLE_DEVICES=GPU-8a: there is no such device here"),
    (["--include", "node-a:GPU-8a"], "", "--include node-a:GPU-8a: takes hosts of localhost"),
])
def test_named_devices_that_are_not_here_are_one_line(
    imported, tmp_path: Path, flags, visible, message
):
    (tmp_path / "train.py").write_text(WORKER)
    launch = imported.run(
        [BOOTSTRAP, *flags, "train.py", "run"], tmp_path, CUDA_VISIBLE_DEVICES=visible)
    assert (launch.returncode, launch.stderr.count("\n")) == (2, 1)
    assert launch.stderr.startswith(f"my_deepspeed: {message}")


ABORTED = ("a worker was ended by SIGABRT (a collective that took longer than "
           "--collective_timeout?)")


@pytest.mark.parametrize(("code", "line"), [
    (256 - 9, "a worker was ended by SIGKILL (out of memory?)"),
    (256 - 6, ABORTED),
    (128 + 6, ABORTED),
    (124, "a rank waited for another one for longer than --collective_timeout; the lines above "
          "name the place"),
])
def test_the_end_of_a_worker_that_could_not_tell_is_named(monkeypatch, capsys, code, line):
    monkeypatch.setattr(my_deepspeed, "launch", lambda argv: sys.exit(code))
    monkeypatch.setattr(my_deepspeed, "stop_workers", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        my_deepspeed.main(["train.py"])
    assert ended.value.code == code
    assert capsys.readouterr().err == f"my_deepspeed: {line}\n"


@pytest.mark.parametrize("to_all", [False, True])
def test_ending_the_bootstrap_ends_every_worker(imported, tmp_path: Path, to_all: bool):
    """Stopped by an IDE's stop button, to it alone, or by Ctrl-C, to workers and all."""
    (tmp_path / "sleep.py").write_text(SLEEPER)
    launch = imported.start([BOOTSTRAP, "--num_gpus", 2, "sleep.py", "run"], tmp_path)
    workers = process_numbers([tmp_path / "run0.pid", tmp_path / "run1.pid"])
    (os.killpg if to_all else os.kill)(launch[0], signal.SIGINT)
    assert imported.end(launch).returncode == 130
    wait_until(lambda: not any(map(is_alive, workers)))


def test_a_taken_port_is_replaced_and_a_free_one_kept():
    port = launching.choose_port(0)  # that no other program is given meanwhile
    with socket.socket() as listener:
        listener.bind(("", port))
        listener.listen()
        assert launching.choose_port(port) in set(launching.PORTS) - {port}
    assert launching.choose_port(port) == port


def chosen(number: int, available: int, include: str = "") -> tuple[list[str], str]:
    options = Namespace(num_gpus=number, include=include, exclude="")
    return launching.choose_devices(options, available)


@pytest.mark.parametrize(("visible", "number", "available", "include", "flags", "text"), [
    ("5,3,2", 2, 3, "", ["--include=localhost:5,3"], "devices localhost:5,3"),
    ("5,3", -1, 2, "", ["--include=localhost:5,3"], "devices localhost:5,3"),
    ("5,3", -1, 2, "localhost:1", [], "devices localhost:1"),
    ("", 2, 8, "", [], "2 of 8 devices"),
    ("GPU-8a,GPU-8b", -1, 2, "", ["--include=localhost:GPU-8a,GPU-8b"],
     "devices localhost:GPU-8a,GPU-8b"),
    ("GPU-8a,GPU-8b", 1, 2, "", ["--include=localhost:GPU-8a"], "devices localhost:GPU-8a"),
    ("MIG-8a", -1, 1, "", ["--include=localhost:MIG-8a"], "devices localhost:MIG-8a"),
])
def test_devices_are_the_first_visible_ones_unless_named(
    monkeypatch, visible, number, available, include, flags, text
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert chosen(number, available, include) == (
        flags and ["--num_gpus=-1", "--num_nodes=-1", *flags], text)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == (None if flags else visible)


@pytest.mark.parametrize(("visible", "number", "message"), [
    ("5,3", 4, r"--num_gpus 4: there are 2 devices here \(CUDA_VISIBLE_DEVICES=5,3\)"),
    ("GPU-8a,b", 2, "CUDA_VISIBLE_DEVICES=GPU-8a,b: must be numbers of devices, or names "),
    ("MIG-8a,MIG-8b,MIG-8c", 1, "CUDA_VISIBLE_DEVICES=.*: CUDA finds only 2 of them"),
])
def test_impossible_devices_are_refused(monkeypatch, visible, number, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=message):
        chosen(number, 2)


@pytest.mark.parametrize(("flags", "message"), [
    (["--hostfile=~/hosts", "~/worker.py"], "--hostfile HOME/hosts: no such file"),
    (["-H", "~/hosts", "~/worker.py"], "--hostfile HOME/hosts: no such file"),
    (["~/other.py", "--path=~/x"], "no training script HOME/other.py (seen from HOME)"),
])
def test_a_home_folder_in_the_launchers_own_paths_is_replaced(tmp_path, flags, message):
    (tmp_path / "worker.py").touch()
    process = start(tmp_path, *flags, HOME=str(tmp_path))
    assert process.communicate()[1] == f"my_deepspeed: {message}\n".replace("HOME", str(tmp_path))
    assert process.returncode == 2


HOSTS = {"node-a": 2, "node-b": 2}


def named(monkeypatch, visible: str, **changes) -> list[str]:
    monkeypatch.setattr(distributed, "on_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    options = {"num_gpus": -1, "num_nodes": -1, "include": "", "exclude": "", "no_ssh": False,
               "node_rank": -1, "launcher": "pdsh", "force_multi": False, "hostfile": "hosts"}
    return launching.named_devices(Namespace(**options | changes), HOSTS)


def test_each_host_started_by_itself_takes_the_devices_that_are_named_there(monkeypatch):
    flags = named(monkeypatch, "GPU-1,GPU-2,GPU-3", no_ssh=True, node_rank=1)
    assert flags == ["--num_gpus=-1", "--num_nodes=-1", "--include=node-a:0,1@node-b:GPU-1,GPU-2"]
    include = flags[-1].removeprefix("--include=")
    assert launching.parse_inclusion_exclusion(HOSTS, include, "") == {
        "node-a": ["0", "1"], "node-b": ["GPU-1", "GPU-2"]}
    assert named(monkeypatch, "0,1", no_ssh=True, node_rank=1) == []
    assert named(monkeypatch, "GPU-1", launcher="slurm") == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"no_ssh": True, "node_rank": 0}, r"1 device\(s\) for the 2 ranks of node-a"),
    ({}, "are devices of this host; name those of each with --include HOST:GPU-1"),
])
def test_names_that_cannot_be_followed_on_several_hosts_are_refused(monkeypatch, changes, message):
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES=GPU-1: {message}"):
        named(monkeypatch, "GPU-1", **changes)
