"""The arena's votes: on the disk at once, whole after any crash, and pairs for step 2."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from loading import load

from alpaca_rlhf.inference.votes import VoteBook, Written
from alpaca_rlhf.utils.errors import UserError

PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is ice?"}]
GOOD, BAD = Written("rlhf", "Frozen water 🙂."), Written("sft", "Ice.\nIce.")


def test_a_vote_is_a_pair_and_a_tie_is_counted_out(tmp_path):
    book = VoteBook(tmp_path / "votes.jsonl")
    book.add(PROMPT, GOOD, BAD)
    book.add(PROMPT, GOOD, BAD, tie=True)
    book.add(PROMPT, GOOD, Written("sft", GOOD.reply))
    data = load([str(tmp_path / "votes.jsonl")])
    (sample,) = data.train
    assert (list(sample.messages), sample.chosen, sample.rejected) == (
        PROMPT, GOOD.reply, BAD.reply)
    assert data.counted_out == {"rejected is not text": 2}


def test_the_win_rate_goes_on_where_it_was(tmp_path):
    path = tmp_path / "new folder" / "votes.jsonl"
    for better, worse, tie in ((GOOD, BAD, False), (BAD, GOOD, False), (GOOD, BAD, True)):
        VoteBook(path).add(PROMPT, better, worse, tie)
    VoteBook(path).add(PROMPT, GOOD, Written("another", "Ice."))
    book = VoteBook(path)
    tally = book.tally("rlhf", "sft")
    assert (tally.wins, tally.ties, tally.losses) == (1, 1, 1)
    assert tally.describe("rlhf").startswith("rlhf wins 50.0% (95 % from 12.5% to 87.5%) of 3 vot")
    assert book.tally("sft", "rlhf").losses == 1
    assert book.tally("sft", "nobody").describe("sft") == "no votes yet"


@pytest.mark.parametrize("torn", [b'{"prompt": [', b'{"prompt": []}', b"x" * 200_000])
def test_a_torn_last_line_is_taken_off_at_the_start_and_before_a_vote(tmp_path, torn):
    path = tmp_path / "votes.jsonl"
    VoteBook(path).add(PROMPT, GOOD, BAD)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    book = VoteBook(path)
    assert path.read_bytes() == whole
    assert book.notes == [f"{path}: took off a torn last line of {len(torn)} bytes"]
    path.write_bytes(whole + torn)
    book.add(PROMPT, BAD, GOOD)
    assert len(load([str(path)]).train) == 2
    path.write_bytes(torn)
    assert VoteBook(path).tally("rlhf", "sft").votes == 0


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="line 1: is no vote"):
        VoteBook(path)
    assert path.read_text().count("\n") == 1
    with pytest.raises(UserError, match="--votes .*: cannot be written"):
        VoteBook(tmp_path)


def test_a_vote_that_was_given_outlives_a_kill(tmp_path):
    path = tmp_path / "votes.jsonl"
    code = textwrap.dedent(f"""
        from pathlib import Path
        from alpaca_rlhf.inference.votes import VoteBook, Written
        book = VoteBook(Path({str(path)!r}))
        for number in range(10**6):
            book.add([{{"role": "user", "content": str(number)}}],
                     Written("a", "yes" * 3000), Written("b", "no"))
            print(number, flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).resolve().parents[1],
    ) as voter:
        given = [int(voter.stdout.readline()) for _ in range(20)]
        os.kill(voter.pid, signal.SIGKILL)
        given += [int(line) for line in voter.stdout.read().splitlines() if line.isdigit()]
    VoteBook(path)
    kept = [json.loads(line)["prompt"][0]["content"] for line in path.read_text().splitlines()]
    assert kept[: len(given)] == [str(number) for number in given]
