"""The arena's votes: on disk at once, complete after any crash, and pairs for step 2."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from loading import load

from alpaca_rlhf.inference.votes import VoteFile
from alpaca_rlhf.utils.errors import UserError

PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is ice?"}]
MODELS, RESPONSES = ("rlhf", "sft"), ("Frozen water 🙂.", "Ice.\nIce.")


def test_a_vote_is_a_pair_and_a_tie_is_a_prompt(tmp_path):
    votes = VoteFile(tmp_path / "votes.jsonl")
    votes.add(PROMPT, MODELS, RESPONSES)
    votes.add(PROMPT, MODELS, RESPONSES, tie=True)
    votes.add(PROMPT, MODELS, ("Ice.", "Ice."))
    data = load([str(tmp_path / "votes.jsonl")])
    sample, *ties = data.train
    assert (list(sample.messages), sample.chosen, sample.rejected) == (PROMPT, *RESPONSES)
    assert [tie.lacking for tie in ties] == ["no response"] * 2
    assert data.filtered_out == {}


def test_votes_of_earlier_sessions_count(tmp_path):
    path = tmp_path / "new folder" / "votes.jsonl"
    for models, tie in ((MODELS, False), (MODELS[::-1], False), (MODELS, True), (MODELS, False)):
        VoteFile(path).add(PROMPT, models, RESPONSES, tie)
    VoteFile(path).add(PROMPT, ("rlhf", "another"), RESPONSES)
    votes = VoteFile(path)
    assert votes.tally("rlhf", "sft", "new") == (
        "new wins 62.5% (95 % from 21.9% to 90.8%) of 4 votes: 2 won, 1 tied, 1 lost; a tie counts "
        "half")
    assert "1 won, 1 tied, 2 lost" in votes.tally("sft", "rlhf", "sft")
    assert votes.tally("sft", "nobody", "sft") == "no votes yet"


@pytest.mark.parametrize("torn", [b'{"prompt": [', b'{"prompt": []}', b"x" * 200_000])
def test_an_incomplete_last_line_is_removed_at_the_start_and_before_a_vote(
    tmp_path, torn, capsys
):
    path = tmp_path / "votes.jsonl"
    VoteFile(path).add(PROMPT, MODELS, RESPONSES)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    votes = VoteFile(path)
    assert path.read_bytes() == whole
    line = f"{path}: removed an incomplete last line of {len(torn)} bytes\n"
    assert capsys.readouterr().out == line
    path.write_bytes(whole + torn)
    votes.add(PROMPT, MODELS, RESPONSES)
    assert len(load([str(path)]).train) == 2
    path.write_bytes(torn)
    assert VoteFile(path).tally(*MODELS, "rlhf") == "no votes yet"


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="line 1: is no vote"):
        VoteFile(path)
    assert path.read_text().count("\n") == 1
    with pytest.raises(UserError, match="--votes .*: cannot be written"):
        VoteFile(tmp_path)


def test_a_vote_survives_a_kill(tmp_path):
    path = tmp_path / "votes.jsonl"
    code = textwrap.dedent(f"""
        from pathlib import Path
        from alpaca_rlhf.inference.votes import VoteFile
        votes = VoteFile(Path({str(path)!r}))
        for number in range(10**6):
            votes.add([{{"role": "user", "content": str(number)}}],
                      ("a", "b"), ("yes" * 3000, "no"))
            print(number, flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).resolve().parents[1],
    ) as voter:
        given = [int(voter.stdout.readline()) for _ in range(20)]
        os.kill(voter.pid, signal.SIGKILL)
        given += [int(line) for line in voter.stdout.read().splitlines() if line.isdigit()]
    VoteFile(path)
    kept = [json.loads(line)["prompt"][0]["content"] for line in path.read_text().splitlines()]
    assert kept[: len(given)] == [str(number) for number in given]
