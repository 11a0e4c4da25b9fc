"""SIGTERM and SIGINT, noted when they come and heeded at the next step boundary by all ranks."""

import os
import signal
import sys
from types import FrameType
from typing import Self

import torch

from alpaca_rlhf.utils import distributed

HEEDED = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, the first signal is noted; a second one ends the process as ever."""

    def __init__(self) -> None:
        self._noted = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in HEEDED}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = number
        self._restore()
        if distributed.is_main():
            # Not through Python's buffers: the signal may have come while one was being written.
            os.write(sys.stdout.fileno(), (
                f"{signal.Signals(number).name}: stopping after this step; a second one stops at "
                "once\n"
            ).encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def agreed(self) -> signal.Signals | None:
        """The signal that any rank has noted, on every rank; all must ask together."""
        mine = torch.tensor(float(self._noted), device=distributed.device())
        number = int(distributed.max_over_ranks(mine).item())
        return signal.Signals(number) if number else None
