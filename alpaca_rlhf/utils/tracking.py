"""Metrics behind one `log(metrics, step)`: a line on the console and a row of metrics.jsonl."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from alpaca_rlhf.utils import distributed

SECONDS_BETWEEN_LINES = 5.0
METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Every rank logs; only rank 0 has somewhere to write.

    Args:
        folder: where metrics.jsonl goes, or None.
        total_steps: for the progress on the console.
        shown: names of the metrics that the console shows; the file holds all.
    """

    def __init__(self, folder: Path | None, total_steps: int, shown: list[str]) -> None:
        self._file: TextIO | None = None
        if folder is not None and distributed.is_main():
            self._file = (folder / METRICS_FILE).open("w", encoding="utf-8")
        self._total = total_steps
        self._shown = shown
        self._start = time.perf_counter()
        self._last_line = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record the metrics of an optimizer step (or of a round, in step 3), counted from 1."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        now = time.perf_counter()
        if now - self._last_line < SECONDS_BETWEEN_LINES and step not in (1, self._total):
            return
        self._last_line = now
        left = (now - self._start) / step * (self._total - step)
        values = "  ".join(
            f"{name} {metrics[name]:.4g}" for name in self._shown
            if name in metrics
        )
        distributed.say(f"step {step}/{self._total}  {values}  ({left:.0f} s left)")

    def note(self, message: str) -> None:
        """A line on the console that is no metric."""
        distributed.say(message)


def table(headers: list[str], rows: list[list[str]], width: int = 48) -> str:
    """Rows as aligned text; longer cells are cut to `width` characters and marked with …"""
    cells = [[_short(str(cell), width) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
