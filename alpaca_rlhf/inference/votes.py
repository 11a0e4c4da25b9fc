"""Votes of the arena: kept as preference pairs that step 2 trains on, and counted.

A vote is one line of JSON: `prompt` (messages), `chosen`, `rejected`, and beside them who wrote
them. A tie has both replies but no chosen one, and step 2 counts it out. Each line is written with
one append and is on the disk before the vote counts; a line that a crash tore is taken off at the
next start or vote.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from alpaca_rlhf.evaluation.statistics import wilson_interval
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.run.run_folder import sync_folder

if TYPE_CHECKING:
    from alpaca_rlhf.utils.data.tokenizer import Message


@dataclass(frozen=True)
class Written:
    """A reply and the model that wrote it."""

    model: str
    reply: str


@dataclass
class Tally:
    """Votes between two models, seen from the first."""

    wins: int = 0
    ties: int = 0
    losses: int = 0

    @property
    def votes(self) -> int:
        """All of them."""
        return self.wins + self.ties + self.losses

    def describe(self, name: str) -> str:
        """The win rate with its interval, for people."""
        if not self.votes:
            return "no votes yet"
        share = self.wins + self.ties / 2
        low, high = wilson_interval(share, self.votes)
        return (f"{name} wins {share / self.votes:.1%} (95 % from {low:.1%} to {high:.1%}) of "
                f"{self.votes} votes: {self.wins} won, {self.ties} tied, {self.losses} lost; a tie "
                "counts half")


class VoteBook:
    """A file of votes.

    Args:
        path: is made if it is not there.

    Attributes:
        notes: what was mended, for the console.

    Raises:
        UserError: the file cannot be read or written, or holds something else than votes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, path.open("ab+") as file:
                self._mend(file.fileno())
            sync_folder(path.parent)
        except OSError as error:
            raise UserError(f"--votes {path}: cannot be written ({error.strerror}); give another "
                            "file") from error
        self._rows = self._read()

    def add(
        self, prompt: "Sequence[Message]", better: Written, worse: Written, tie: bool = False
    ) -> None:
        """Keep a vote; when this returns it is on the disk. Like replies are a tie."""
        tie = tie or better.reply == worse.reply
        row = {
            "prompt": list(prompt),
            "chosen": None if tie else better.reply,
            "rejected": None if tie else worse.reply,
            "models": [better.model, worse.model],
            "tie": tie,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if tie:
            row["replies"] = [better.reply, worse.reply]
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._lock:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                self._mend(file)
                written = os.write(file, line)
                os.fsync(file)
            finally:
                os.close(file)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written")
        self._rows.append(row)

    def tally(self, first: str, second: str) -> Tally:
        """The votes between two models."""
        found = Tally()
        for row in self._rows:
            if sorted(row["models"]) == sorted([first, second]):
                if row["tie"]:
                    found.ties += 1
                elif row["models"][0] == first:
                    found.wins += 1
                else:
                    found.losses += 1
        return found

    def _mend(self, file: int) -> None:
        """Take off what stands behind the last line feed: a line that was not written whole."""
        size = os.fstat(file).st_size
        end, block = size, b""
        while end > 0 and b"\n" not in block:
            start = max(0, end - 65536)
            block = os.pread(file, end - start, start)
            whole = block.rfind(b"\n") + 1
            end = start + whole if whole else start
        if end < size:
            os.ftruncate(file, end)
            self.notes.append(f"{self.path}: took off a torn last line of {size - end} bytes")

    def _read(self) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                assert {"models", "tie", "prompt", "chosen", "rejected"} <= row.keys()
                rows.append(row)
            except (ValueError, AttributeError, AssertionError) as error:
                raise UserError(f"--votes {self.path}, line {number}: is no vote; give another "
                                "file, or mend it") from error
        return rows
