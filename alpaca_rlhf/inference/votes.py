"""Votes of the arena, kept as preference pairs that step 2 can train on.

A vote is one line of JSON: `prompt` (messages), `chosen` and `rejected`, and the models they came
from. A tie has both responses under `replies` and no chosen one, so step 2 filters it out. Each
line is written by one append and is on disk before the vote counts; an incomplete last line, left
by a crash, is removed at the next start or vote.
"""

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import filelock

from alpaca_rlhf.evaluation.statistics import wilson_interval
from alpaca_rlhf.utils.console import say
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.run.run_folder import sync_folder

_KEYS = {"models", "tie", "prompt", "chosen", "rejected"}


class VoteFile:
    """A file of votes, which is created if it does not exist.

    Raises:
        UserError: the file cannot be read or written, or holds something other than votes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, FileIO(path, "a+") as file:
                self._rows = self._parse(self._repaired(file))
            sync_folder(path.parent)
        except OSError as error:
            raise UserError(f"--votes {path}: cannot be written ({error.strerror}); give another "
                            "file") from error

    def add(
        self, prompt: Sequence[Message], models: Sequence[str], responses: Sequence[str],
        tie: bool = False,
    ) -> None:
        """Append a vote, which is on disk on return.

        `models` and `responses` are those of the better side and then of the worse one. Equal
        responses are a tie.
        """
        tie = tie or responses[0] == responses[1]
        row = {
            "prompt": list(prompt),
            "chosen": None if tie else responses[0],
            "rejected": None if tie else responses[1],
            "models": list(models),
            "tie": tie,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **({"replies": list(responses)} if tie else {}),
        }
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._lock, FileIO(self.path, "a+") as file:
            self._repaired(file)
            written = file.write(line)
            os.fsync(file.fileno())
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written")
        self._rows.append(row)

    def tally(self, first: str, second: str, name: str) -> str:
        """Return the win rate of the first model over the second with its 95 % interval, in a line.

        `name` is what the line calls the first model.
        """
        outcomes = [0.5 if row["tie"] else float(row["models"][0] == first) for row in self._rows
                    if sorted(row["models"]) == sorted([first, second])]
        if not outcomes:
            return "no votes yet"
        votes = len(outcomes)
        low, high = wilson_interval(sum(outcomes), votes)
        return (f"{name} wins {sum(outcomes) / votes:.1%} (95 % from {low:.1%} to {high:.1%}) of "
                f"{votes} votes: {outcomes.count(1)} won, {outcomes.count(0.5)} tied, "
                f"{outcomes.count(0)} lost; a tie counts half")

    def _repaired(self, file: FileIO) -> bytes:
        """Remove an incomplete last line; return the content."""
        file.seek(0)
        content = file.readall()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
            say(f"{self.path}: removed an incomplete last line of {len(content) - end} bytes")
        return content[:end]

    def _parse(self, content: bytes) -> list[dict[str, Any]]:
        rows = []
        for number, line in enumerate(content.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not _KEYS <= row.keys():
                raise UserError(f"--votes {self.path}, line {number}: is no vote; correct it, or "
                                "give another file")
            rows.append(row)
        return rows
