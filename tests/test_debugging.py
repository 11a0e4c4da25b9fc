"""Debuggers: pdb in the one process of `--debug`, debugpy in a worker named by `--debug_ranks`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pexpect
import pytest
from programs import BOOTSTRAP, TRAINING, environment

from alpaca_rlhf.training_model import launching, my_deepspeed
from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.errors import UserError

STEP3 = TRAINING / "step3_rlhf_finetuning"
TRAINER = STEP3 / "ppo_trainer.py"


def line_of(path: Path, text: str) -> int:
    """Return the number of the only line that contains `text`."""
    [number] = [i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return number


# --- pdb and --debug -----------------------------------------------------------------------------


def test_a_breakpoint_that_pdb_sets_in_ppo_trainer_is_hit_under_debug(small, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({
        "prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}) + "\n"
        for i in range(80)))
    words = [
        "-m", "pdb", BOOTSTRAP, "--num_gpus", 1, "--debug", STEP3 / "main.py",
        "--actor_model_name_or_path", small.actor, "--critic_model_name_or_path", small.critic,
        "--data_path", rows, "--data_output_path", tmp_path / "cache",
        "--max_steps", 1, "--max_answer_seq_len", 4, "--eval_prompts", 0,
        "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4,
    ]
    line = line_of(TRAINER, "weight, random_state = global_weight(batches)")
    pdb = pexpect.spawn(sys.executable, list(map(str, words)), cwd=str(tmp_path),
                        env=environment(), encoding="utf-8", timeout=200)
    try:
        pdb.expect_exact("(Pdb) ")
        pdb.sendline(f"b step3_rlhf_finetuning/ppo_trainer.py:{line}")
        pdb.expect_exact(f"Breakpoint 1 at {TRAINER}:{line}")
        pdb.sendline("c")
        pdb.expect_exact(f"{TRAINER}({line})_step()")
        pdb.expect_exact("(Pdb) ")
        pdb.sendline("p 'rows', len(batches[0])")
        pdb.expect_exact("('rows', 4)")
        pdb.sendline("c")
        pdb.expect(r"1/1 \[.*nothing is saved")  # a terminal gets a bar
    finally:
        pdb.close(force=True)


WORKER = """
import os, sys
import beside
print("words", sys.argv[1:], "name", __name__, "rank", os.environ["RANK"], "process", os.getpid())
if "--break" in sys.argv:
    raise RuntimeError("for the debugger")
sys.exit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script with a module beside it, in a folder with a space in its name."""
    folder = tmp_path / "my scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("")
    (folder / "train it.py").write_text(WORKER)
    return folder / "train it.py"


def test_debug_runs_the_script_in_the_same_process_as_python_would(imported, script):
    started = imported.start([BOOTSTRAP, "--num_gpus", 2, "--debug", "my scripts/train it.py",
                              "--debug", "of the script"], script.parents[1])
    run = imported.end(started)
    assert (run.returncode, run.stderr) == (3, "")
    assert run.stdout.splitlines() == [
        "my_deepspeed: my scripts/train it.py: one rank in this process; without effect here: "
        "--num_gpus 2",
        f"words ['--debug', 'of the script'] name __main__ rank 0 process {started[0]}",
    ]


def test_under_debug_an_exception_keeps_its_way_to_the_debugger(imported, script):
    run = imported.run([BOOTSTRAP, "--debug", "my scripts/train it.py", "--break"],
                       script.parents[1])
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("RuntimeError: for the debugger")
    assert "my_deepspeed: " not in run.stderr


# --- debugpy and --debug_ranks -------------------------------------------------------------------

MEETING = """
import sys
import torch
from alpaca_rlhf.utils import console, distributed
def meet():
    distributed.initialize(0)
    mine = torch.tensor(float(distributed.rank() + 1))
    total = distributed.sum_over_ranks(mine)  # the breakpoint
    console.say(f"total {total.item()}")
console.run_main(meet)
"""


class Client:
    """A client of the debug adapter protocol: numbered requests, answers and events, as JSON."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=100)
        self.stream = self.socket.makefile("rb")
        self.seen: list[dict[str, Any]] = []
        self.number = 0

    def send(self, command: str, **arguments: Any) -> int:
        self.number += 1
        body = json.dumps({"seq": self.number, "type": "request", "command": command,
                           "arguments": arguments}).encode()
        self.socket.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return self.number

    def wait(self, **facts: Any) -> dict[str, Any]:
        """The next message with these facts, received already or not."""
        while True:
            for message in self.seen:
                if facts.items() <= message.items():
                    self.seen.remove(message)
                    return message
            length = 0
            while (line := self.stream.readline()) != b"\r\n":
                assert line, "the adapter is gone"
                if line.lower().startswith(b"content-length"):
                    length = int(line.split(b":")[1])
            self.seen.append(json.loads(self.stream.read(length)))

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        answer = self.wait(type="response", request_seq=self.send(command, **arguments))
        assert answer["success"], answer
        return answer.get("body", {})


def test_a_debugpy_client_attaches_to_rank_1_of_2_and_stops_it_at_a_line(tmp_path: Path):
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    port = launching.choose_port(0)
    run = subprocess.Popen(
        [sys.executable, str(BOOTSTRAP), "--num_gpus", "2", "--debug_ranks", "1",
         "--debug_port", str(port - 1), str(script)],
        cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    try:
        assert run.stdout is not None
        assert run.stdout.readline().endswith(f", debugger awaited on port {port} (rank 1)\n")
        assert run.stdout.readline() == f"rank 1 waits for a debugger on 127.0.0.1:{port}\n"
        client = Client(port)
        client.ask("initialize", adapterID="test", pathFormat="path")
        attached = client.send("attach", justMyCode=False)
        client.wait(type="event", event="initialized")
        line = line_of(script, "# the breakpoint")
        client.ask("setBreakpoints", source={"path": str(script)}, breakpoints=[{"line": line}])
        room = Path(str(distributed.__file__)).resolve()
        waited = line_of(room, "    wait_for_debugger()") + 1
        client.ask("setBreakpoints", source={"path": str(room)}, breakpoints=[{"line": waited}])
        client.ask("configurationDone")
        client.wait(type="response", request_seq=attached)
        # The very next line after the wait: it did wait.
        stop = client.wait(type="event", event="stopped")["body"]
        top = client.ask("stackTrace", threadId=stop["threadId"], levels=1)["stackFrames"][0]
        assert (Path(top["source"]["path"]).name, top["line"]) == ("distributed.py", waited)
        client.ask("continue", threadId=stop["threadId"])
        stop = client.wait(type="event", event="stopped")["body"]
        assert stop["reason"] == "breakpoint"
        top = client.ask("stackTrace", threadId=stop["threadId"], levels=1)["stackFrames"][0]
        assert (Path(top["source"]["path"]).name, top["line"]) == ("meeting.py", line)
        rank = client.ask("evaluate", expression="distributed.rank(), mine.item()",
                          frameId=top["id"])
        assert rank["result"] == "(1, 2.0)"
        client.ask("continue", threadId=stop["threadId"])
        client.ask("disconnect", terminateDebuggee=False)
        stdout, stderr = run.communicate(timeout=100)
    finally:
        run.terminate()
    assert (run.returncode, stdout) == (0, "total 3.0\n"), stderr


def test_without_debugpy_there_is_one_line_and_nothing_starts(monkeypatch, capsys, tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "debugpy" else found(name))
    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert my_deepspeed.main(["--debug_ranks", "0", str(script)]) == 2
    assert capsys.readouterr().err == (
        "my_deepspeed: --debug_ranks needs debugpy: pip install debugpy\n")


def test_the_other_ranks_wait_a_week_for_the_one_at_a_breakpoint(monkeypatch):
    for name in (distributed.DEBUG_RANKS, distributed.DEBUG_PORT, "TORCH_NCCL_ENABLE_MONITORING"):
        monkeypatch.setenv(name, "")
    timeouts = []
    monkeypatch.setattr(deepspeed, "init_distributed",
                        lambda verbose, timeout: timeouts.append(timeout))
    monkeypatch.setenv("RANK", "2")
    distributed.initialize(0, timeout=60)
    own, _ = take(["--debug_ranks", "0,1", "--debug_port=7000", "train.py"])
    assert my_deepspeed.prepare_debugging(own) == (
        ", debugger awaited on port 7000 (rank 0) and 7001 (rank 1)")
    distributed.initialize(0, timeout=60)
    assert timeouts == [timedelta(seconds=60), timedelta(days=7)]


def test_a_debug_port_that_is_taken_is_one_line(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv(distributed.DEBUG_RANKS, "0,2")
        monkeypatch.setenv(distributed.DEBUG_PORT, str(port - 2))
        with pytest.raises(UserError, match=rf"^--debug_port {port - 2}: rank 2 cannot listen on "
                                            rf"port {port} \(.*\); give another$"):
            distributed.wait_for_debugger()


# --- our flags among DeepSpeed's -----------------------------------------------------------------


def take(argv: list[str]) -> tuple[Any, list[str]]:
    from deepspeed.launcher import runner

    return my_deepspeed.OwnFlags().take(argv, runner.parse_args)


def test_our_flags_may_stand_anywhere_before_the_script_and_only_there():
    own, others = take(["--debug_port", "7000", "--num_gpus", "2", "--debug_ranks=1", "train.py",
                        "--debug", "--debug_ranks", "5"])
    assert (own.debug, own.debug_port, own.debug_ranks) == (False, 7000, "1")
    assert others == ["--num_gpus", "2", "train.py", "--debug", "--debug_ranks", "5"]


@pytest.mark.parametrize(("words", "message"), [
    (["--debug_ranks", "one"], "--debug_ranks one: must be numbers of ranks, such as 0,1"),
    (["--debug_port", "x"], "argument --debug_port: invalid int value: 'x'"),
])
def test_wrong_flags_of_ours_are_one_line(words, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        take([*words, "train.py"])
