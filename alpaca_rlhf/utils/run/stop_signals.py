"""SIGTERM and SIGINT, noted when they come and heeded at the next step boundary by all ranks.

A launcher may send both for one Ctrl-C, and one of them twice: only another Ctrl-C, a moment later,
means that it is to be at once.
"""

import os
import signal
import time
from types import FrameType
from typing import Self

import torch

from alpaca_rlhf.utils import distributed

HEEDED = (signal.SIGTERM, signal.SIGINT)
MOMENT = 1.0  # seconds


class StopSignals:
    """While entered, signals are noted; a second Ctrl-C raises KeyboardInterrupt as ever."""

    def __init__(self) -> None:
        self._noted = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in HEEDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._noted:
            if number == signal.SIGINT and time.monotonic() - self._since > MOMENT:
                raise KeyboardInterrupt
            return
        self._noted, self._since = number, time.monotonic()
        if distributed.is_main():
            # Not through Python's buffers: the signal may have come while one was being written.
            os.write(1, (
                f"{signal.Signals(number).name}: stopping after this step; Ctrl-C once more stops "
                "at once\n"
            ).encode())

    def agreed(self) -> signal.Signals | None:
        """The signal that any rank has noted, on every rank; all must ask together."""
        mine = torch.tensor(float(self._noted), device=distributed.device())
        number = int(distributed.max_over_ranks(mine).item())
        return signal.Signals(number) if number else None
