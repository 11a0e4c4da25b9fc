"""Two hosts: network namespaces joined by a cable, or two names of a local ssh server.

    python -m pytest tests/test_multi_node.py -m ""      with the slow ones

Traffic stays in the namespaces made here or on the loopback; everything made is taken down again.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from deepspeed.launcher import multinode_runner, runner
from programs import (
    DISTRIBUTED,
    REPOSITORY,
    SLEEPER,
    TRAINING,
    WORKER,
    environment,
    is_alive,
    process_numbers,
    wait_until,
)

from alpaca_rlhf.training_model import launching, my_deepspeed
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.errors import UserError

STEP1 = TRAINING / "step1_supervised_finetuning" / "main.py"
SCRIPTS = REPOSITORY / "scripts" / "multi_node"
STEPS = 5
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the scripts run `python`


def begin(folder: Path, words: list[Any], **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, words)), cwd=folder, text=True, start_new_session=True,
        env=environment(**{"PYTHONPATH": None, "PATH": PATH, **changes}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Return the output of processes that must succeed."""
    try:
        said = [process.communicate(timeout=250) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [stdout for stdout, _ in said]


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a data set."""
    folder = tmp_path_factory.mktemp("two hosts")
    (folder / "rows.jsonl").write_text("".join(json.dumps({
        "prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}) + "\n"
        for i in range(300)))
    return folder


def step1(model: str, folder: Path, name: str) -> list[Any]:
    return [STEP1, "--model_name_or_path", model, "--data_path", folder / "rows.jsonl",
            "--data_output_path", folder / f"cache of {name}", "--max_steps", STEPS,
            "--learning_rate", "1e-3", "--per_device_train_batch_size", 4, "--max_seq_len", 64,
            "--eval_iters", 1, "--output_dir", folder / name]


@pytest.fixture(scope="module")
def one_host(small: Any, data: Path, imported: programs.Imported) -> list[float]:
    """Return the losses of two ranks on one host."""
    done = imported.run([programs.__file__, *step1(small.actor, data, "one host")], data)
    assert done.returncode == 0, done.stderr
    return losses(data / "one host")


# --- two network namespaces, --no_ssh ------------------------------------------------------------


class Cable:
    """Two network namespaces, each with one end of a virtual cable."""

    addresses = ("10.87.0.1", "10.87.0.2")

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.names = [f"alpaca-{tag}-{i}" for i in (0, 1)]
        self.ends = [f"al{tag}{i}" for i in (0, 1)]

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def plug_in(self) -> None:
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", self.ends[0], "netns", self.names[0], "type", "veth",
                "peer", "name", self.ends[1], "netns", self.names[1])
        for name, end, address in zip(self.names, self.ends, self.addresses, strict=True):
            self.ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            self.ip("-n", name, "link", "set", end, "up")
            self.ip("-n", name, "link", "set", "lo", "up")

    def pull_out(self) -> None:
        for name in self.names:  # with a namespace its end goes, and with that the other end
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def on(self, host: int, words: list[Any]) -> list[Any]:
        return ["ip", "netns", "exec", self.names[host], *words]


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (Debian: iproute2)")
    cable = Cable()
    try:
        try:
            cable.plug_in()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield cable
    finally:
        cable.pull_out()


def test_two_hosts_train_step_1_to_the_losses_of_two_ranks_on_one(small, data, one_host, cable):
    hostfile = data / "two.hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in cable.addresses))
    ended([
        begin(data, cable.on(host, [
            "bash", SCRIPTS / "no_ssh.sh", hostfile, cable.addresses[0], host,
            *step1(small.actor, data, f"host {host}"),  # each host has its own caches and output
        ]), GLOO_SOCKET_IFNAME=cable.ends[host])
        for host in (0, 1)
    ])
    assert losses(data / "host 0") == pytest.approx(one_host, rel=1e-6)
    assert len(set(one_host)) == STEPS
    for host in (0, 1):
        assert list((data / f"cache of host {host}" / "data").iterdir()), "no cache of its own"


# --- two names of a local ssh server -------------------------------------------------------------

SSHD_CONFIG = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""
SSH_CONFIG = """
Host node-a node-b
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known
    StrictHostKeyChecking no
    LogLevel ERROR
"""

@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[str]:
    """Run a server of this user on the loopback, with its own keys.

    Yields:
        The PATH with an `ssh` that knows the server as node-a and as node-b.
    """
    missing = [name for name in ("ssh", "ssh-keygen", "sshd", "pdsh")
               if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: openssh-server, pdsh)")
    real_ssh, sshd = shutil.which("ssh"), shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    port = launching.choose_port(0)
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key],
                       check=True)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(port=port, folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(port=port, folder=folder))
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {real_ssh} -F "{folder}/ssh_config" "$@"\n')
    wrapper.chmod(0o755)
    separation = Path("/run/sshd")  # where sshd, as root, keeps what it has not yet let in
    made = getpass.getuser() == "root" and not separation.exists()
    if made:
        separation.mkdir(mode=0o755)
    server = subprocess.Popen([str(sshd), "-D", "-e", "-f", folder / "sshd_config"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path = f"{folder}/bin:{os.environ['PATH']}"
    try:
        for _ in range(100):
            if server.poll() is not None:
                pytest.fail(f"sshd does not start: {server.communicate()[1].strip()}")
            answer = subprocess.run(["ssh", "node-a", "true"], env={**os.environ, "PATH": path},
                                    check=False, capture_output=True, text=True)
            if answer.returncode == 0:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"no login by ssh here: {answer.stderr.strip()}")
        yield path
    finally:
        server.kill()
        server.wait()
        if made:
            separation.rmdir()


@pytest.fixture(scope="module")
def ssh_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ssh_server(tmp_path_factory.mktemp("ssh")) as path:
        yield path


def on_two_nodes(folder: Path, path: str, words: list[Any], **changes: str) -> Any:
    """Start a launch on both."""
    (folder / "nodes").write_text("node-a slots=1\nnode-b slots=1\n")
    return begin(folder, ["bash", SCRIPTS / "pdsh.sh", "nodes", "--master_addr", "127.0.0.1",
                          *words], PATH=f"{Path(sys.executable).parent}:{path}", **changes)


# What a shell, pdsh or a splitting at spaces would change.
WORDS = ["two words", "it's", 'a "b"', "$HOME", "100%h", "*", "a;b", ""]


@pytest.fixture(scope="module")
def over_ssh(
    ssh_path: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Return what both workers of a launch from a folder with spaces in its name have seen."""
    folder = tmp_path_factory.mktemp("shared folder with spaces")
    (folder / "my scripts").mkdir()
    (folder / "my scripts" / "train it.py").write_text(WORKER)
    [said] = ended([on_two_nodes(folder, ssh_path, ["my scripts/train it.py", *WORDS, "run"],
                                 PYTHONPATH="/somewhere else", OMP_NUM_THREADS="3")])
    assert said.count("\n") == 1, "more than the bootstrap's line on the console"
    return folder, [json.loads((folder / f"run{rank}.json").read_text()) for rank in (0, 1)]


def test_over_ssh_each_node_has_its_rank(over_ssh):
    _, seen = over_ssh
    assert [worker["env"]["RANK"] for worker in seen] == ["0", "1"]
    assert [worker["env"]["LOCAL_RANK"] for worker in seen] == ["0", "0"]
    assert [worker["env"]["CROSS_RANK"] for worker in seen] == ["0", "1"]
    assert {worker["env"]["WORLD_SIZE"] for worker in seen} == {"2"}
    assert len({worker["env"]["MASTER_PORT"] for worker in seen}) == 1


def test_over_ssh_folder_script_and_every_word_arrive_unchanged(over_ssh):
    folder, seen = over_ssh
    for worker in seen:
        assert worker["cwd"] == str(folder)
        assert worker["argv"] == ["my scripts/train it.py", "--local_rank=0", *WORDS, "run"]


def test_over_ssh_every_node_has_the_search_paths_and_settings(over_ssh):
    folder, seen = over_ssh
    for worker in seen:
        env = worker["env"]
        # DeepSpeed puts the folder it is started in first.
        assert env["PYTHONPATH"].split(":") == [str(folder), str(REPOSITORY), "/somewhere else"]
        assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)
        assert (env["OMP_NUM_THREADS"], env["HF_HUB_OFFLINE"]) == ("3", "1")
        assert env["DS_ACCELERATOR"] == "cpu"


@pytest.mark.slow
def test_over_ssh_ending_the_bootstrap_ends_its_workers_and_no_others(ssh_path, tmp_path):
    (tmp_path / "sleep.py").write_text(SLEEPER)
    launches = [on_two_nodes(tmp_path, ssh_path, ["sleep.py", name])
                for name in ("ended", "other")]
    try:
        first, second, *others = process_numbers([
            tmp_path / f"{name}{rank}.pid" for name in ("ended", "other") for rank in (0, 1)])
        launches[0].send_signal(signal.SIGINT)
        launches[0].communicate(timeout=100)
        wait_until(lambda: not is_alive(first) and not is_alive(second))
        assert all(map(is_alive, others))
        launches[1].send_signal(signal.SIGINT)
        wait_until(lambda: not any(map(is_alive, others)))
    finally:
        for launch in launches:
            launch.terminate()
            launch.communicate(timeout=100)


@pytest.mark.slow
def test_over_ssh_step_1_comes_to_the_losses_of_two_ranks_on_one_host(
    small, data, one_host, ssh_path
):
    ended([on_two_nodes(data, ssh_path, step1(small.actor, data, "by ssh"))])
    assert losses(data / "by ssh") == pytest.approx(one_host, rel=1e-6)


# --- mpirun and srun -----------------------------------------------------------------------------

# Writes its place and what the ranks come to together to <last argument><rank>.json.
MEETING = """
import json, os, sys
import torch
from alpaca_rlhf.utils import console, distributed
def meet():
    distributed.initialize(0)
    total = distributed.sum_over_ranks(torch.tensor(distributed.rank() + 1)).item()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH", "OMP_NUM_THREADS")
    seen = {"total": total, "argv": sys.argv[1:], **{name: os.environ[name] for name in names}}
    with open(sys.argv[-1] + os.environ["RANK"] + ".json", "w") as file:
        json.dump(seen, file)
console.run_main(meet)
"""

# Starts the tasks here, numbered as slurm's srun numbers them.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
words = sys.argv[1:]
start = words.index({sys.executable!r})
with open(os.environ["SRUN_LOG"], "w") as log:
    log.write(" ".join(words[:start]))
count = words[words.index("-n") + 1]
tasks = [subprocess.Popen(words[start:], env={{**os.environ, "SLURM_PROCID": str(i),
                          "SLURM_NTASKS": count, "SLURM_LOCALID": str(i)}})
         for i in range(int(count))]
sys.exit(max(task.wait() for task in tasks))
"""


def meet(folder: Path, words: list[Any], **changes: str) -> None:
    """Check that two ranks of another launcher meet, and each sees all words and settings."""
    (folder / "meet here.py").write_text(MEETING)
    ended([begin(folder, ["bash", *words, "meet here.py", *WORDS, "run"], PYTHONPATH="/a, b",
                 **changes)])
    for rank in (0, 1):
        assert json.loads((folder / f"run{rank}.json").read_text()) == {
            "total": 3, "argv": [*WORDS, "run"], "RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank), "PYTHONPATH": f"{folder}:{REPOSITORY}:/a, b",
            "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_by_openmpi_the_ranks_meet_and_see_every_word(tmp_path):
    if not shutil.which("mpirun") or not shutil.which("ompi_info"):
        pytest.skip("Open MPI is not installed (Debian: openmpi-bin)")
    (tmp_path / "nodes").write_text("127.0.0.1 slots=2\n")
    meet(tmp_path, [SCRIPTS / "openmpi.sh", "nodes", "--force_multi"], INTERFACE="lo",
         OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


@pytest.mark.slow
def test_by_slurm_the_ranks_meet_and_see_every_word(tmp_path):
    """An `srun` that starts tasks here and records its options takes the place of slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("sinfo", "#!/bin/sh\n"),
                       ("scontrol", '#!/bin/sh\necho 127.0.0.1\necho "$@" > "$SRUN_LOG.hosts"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "alpaca_rlhf").symlink_to(REPOSITORY / "alpaca_rlhf")
    meet(tmp_path, [SCRIPTS / "slurm.sh"],
         PATH=f"{folder}:{PATH}",
         SRUN_LOG=str(tmp_path / "log"), SLURM_JOB_ID="7", SLURM_JOB_NODELIST="host[0]",
         SLURM_NTASKS_PER_NODE="2", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (tmp_path / "log.hosts").read_text() == "show hostnames host[0]\n"
    assert (tmp_path / "log").read_text() == "-n 2 --ntasks-per-node=2 --export=ALL"
    assert not list(tmp_path.glob("hostfile*"))


@pytest.mark.parametrize("name", ["pdsh", "no_ssh", "openmpi", "slurm"])
def test_each_script_shows_how_to_call_it(name):
    for words, code in ((["--help"], 0), ([], 1)):
        done = subprocess.run(["bash", SCRIPTS / f"{name}.sh", *words], check=False,
                              capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")
        assert f"scripts/multi_node/{name}.sh " in done.stdout
        assert done.stdout.endswith("See docs/launching.md.\n")


# --- where a process finds its place -------------------------------------------------------------


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that gives the rank that `set_rank` sets for some variables."""
    kept = {name: value for name, value in os.environ.items()
            if name not in DISTRIBUTED and not name.startswith(("OMPI_", "SLURM_"))}

    def take(**given: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", {**kept, **given})
        distributed.set_rank()
        return {name: os.environ[name] for name in DISTRIBUTED}

    return take


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
OMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize("given", [SLURM, OMPI])
def test_below_srun_and_mpirun_the_place_is_the_one_they_give(place, given):
    assert place(**given, MASTER_ADDR="node-a", MASTER_PORT="1234") == {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a",
        "MASTER_PORT": "1234"}


def test_plain_python_in_a_slurm_job_waits_for_nobody(place):
    alone = place(**SLURM)
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_mpirun_without_a_meeting_place_is_one_line(place):
    with pytest.raises(UserError, match="MASTER_ADDR is not set; start them with my_deepspeed.py"):
        place(**OMPI)


# --- the launchers -------------------------------------------------------------------------------


def test_several_hosts_take_our_launchers_and_deepspeeds_runner_stays_as_it_is():
    before = dict(vars(runner))
    ours = launching.runner_for_hosts()
    assert (ours.PDSHRunner, ours.OpenMPIRunner, ours.SlurmRunner) == (
        launching.Pdsh, launching.OpenMpi, launching.Slurm)
    assert vars(runner) == before
    assert runner.PDSHRunner is multinode_runner.PDSHRunner


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "program", "package"), [
    ("pdsh", "pdsh", "pdsh"), ("openmpi", "mpirun", "openmpi-bin"),
    ("slurm", "srun", "slurm-client")])
def test_a_launcher_that_is_not_installed_is_one_line(
    tmp_path, monkeypatch, launcher, program, package
):
    (tmp_path / "nodes").write_text("node-a slots=1\nnode-b slots=1\n")
    monkeypatch.setattr(launching.shutil, "which", lambda name: None)
    words = ["--hostfile", str(tmp_path / "nodes"), "--launcher", launcher, "train.py"]
    with pytest.raises(ValueError) as refused:
        launching.choose_hosts(runner.parse_args(words))
    assert str(refused.value) == (
        f"--launcher {launcher}: there is no {program} here; install it (Debian and Ubuntu: "
        f"apt-get install {package}), or start each node by itself with --no_ssh")


@pytest.mark.parametrize(("words", "message"), [
    (["--hostfile", "none"], "--hostfile none: no such file"),
    (["--no_ssh", "--node_rank", "1"], "--no_ssh: needs --hostfile FILE, the same on every node"),
    (["--hostfile", "nodes", "--no_ssh", "--node_rank", "1"],
     "--no_ssh: start it on every node, with --master_addr ADDRESS (of the first host) and "
     "--node_rank N (0 to 1, its place in nodes)"),
    (["--hostfile", "nodes", "--no_ssh", "--node_rank", "2", "--master_addr", "a"],
     "--no_ssh: start it on every node, with --master_addr ADDRESS (of the first host) and "
     "--node_rank N (0 to 1, its place in nodes)"),
    (["--hostfile", "broken"],
     "Hostfile contains a bad entry: node-a, unable to proceed with launching"),
    (["nowhere/main.py"], "no training script nowhere/main.py (seen from {folder})"),
])
def test_what_cannot_be_launched_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name, value in os.environ.items():  # put back what the bootstrap sets
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", "")
    Path("nodes").write_text("node-a slots=1\nnode-b slots=1\n")
    Path("broken").write_text("node-a\n")
    Path("train.py").touch()
    assert my_deepspeed.main([*words, "train.py"]) == 2
    assert capsys.readouterr() == ("", f"my_deepspeed: {message.format(folder=tmp_path)}\n")
