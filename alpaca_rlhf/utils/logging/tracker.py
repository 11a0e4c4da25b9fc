"""Metrics: one `log(metrics, step)` for console, metrics.jsonl, alarms and external trackers.

On a terminal the console shows a progress bar, elsewhere a line every few seconds. External
trackers (`--tracker tensorboard wandb …`) are accelerate's; none is started by default, and one
that fails during the training is dropped with a warning.
"""

import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from tqdm import tqdm

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.configs import TrackingConfig
from alpaca_rlhf.utils.console import shortened
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.logging import records
from alpaca_rlhf.utils.logging.alarms import Alarms
from alpaca_rlhf.utils.logging.records import EVENTS_FILE, METRICS_FILE, RUN_FILE, SAMPLES_FILE

SECONDS_BETWEEN_LINES = 5.0
PROJECT = "alpaca-rlhf"
LOGS_FOLDER = "logs"
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
SAMPLE_COLUMNS = ("prompt", "reply", "score")


def require_packages(names: Sequence[str]) -> None:
    """Check that the package of each tracker is installed.

    Raises:
        UserError: one is missing; the message says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--tracker {name}: its package is not installed; pip install {name}")


class Tracker:
    """Records metrics; every rank calls it, and only rank 0 writes.

    Args:
        folder: for the files of `records`, or None.
        total_steps: number of steps, for the progress on the console.
        shown: metrics for the console, with their names there; the file has all metrics.
        tracking: trackers besides the files, started with `arguments` as their configuration.
        arguments: resolved flags of the run.
        alarms: check every step's metrics, which must be the same on all ranks.
        stop_on_alarm: whether an alarm ends the training.
        resume_step: last step before the run was resumed: the files' rows up to this one are kept,
            later ones are removed, and progress, time and alarms continue from there.

    Raises:
        UserError: a tracker cannot be started.
    """

    def __init__(
        self, folder: Path | None, total_steps: int, shown: Mapping[str, str], *,
        tracking: TrackingConfig | None = None, arguments: Mapping[str, Any] | None = None,
        alarms: Alarms | None = None, stop_on_alarm: bool = False, resume_step: int = 0,
    ) -> None:
        self._folder, self._total, self._first, self._shown = (
            folder, total_steps, resume_step, shown
        )
        self._alarms, self._stop_on_alarm = alarms, stop_on_alarm
        self._seconds_before = self._continue_files(resume_step)
        self._files: dict[str, TextIO] = {}
        self._sinks: list[_Sink] = []
        if tracking is not None and distributed.is_main():
            self._sinks = _start(tracking, folder, arguments or {})
        self._bar = self._new_bar()
        self._start = time.perf_counter()
        self._last_line = -math.inf

    def _continue_files(self, resume_step: int) -> float:
        """Keep the rows up to a step, and return the seconds of training until then."""
        if self._folder is None:
            return 0.0
        # Every rank reads before rank 0 removes rows.
        rows = records.read_rows(self._folder / METRICS_FILE) if resume_step else []
        rows = [row for row in rows if row["step"] <= resume_step]
        distributed.barrier()
        if distributed.is_main():
            for name in (METRICS_FILE, EVENTS_FILE, SAMPLES_FILE):
                records.keep_until(self._folder / name, resume_step)
            record = records.line(records.start_record())
            (self._folder / RUN_FILE).write_text(record, encoding="utf-8")
        if self._alarms is not None:
            for row in rows:
                self._alarms.check(row)  # reported before
        return rows[-1].get("time/elapsed", 0.0) if rows else 0.0

    def _new_bar(self) -> tqdm | None:
        if not (distributed.is_main() and sys.stdout.isatty()):
            return None
        size = shutil.get_terminal_size()
        return tqdm(total=self._total, initial=self._first, file=sys.stdout, bar_format=BAR,
                    ncols=size.columns - 1, nrows=size.lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        if self._bar is not None:
            self._bar.close()
        for sink in self._sinks:
            sink.call("finish")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record the metrics of an optimizer step (in step 3 a PPO iteration), counted from 1.

        Raises:
            TrainingStopped: an alarm went off, and `stop_on_alarm` is set.
        """
        elapsed = self._seconds_before + time.perf_counter() - self._start
        row = {"step": step, **metrics, "time/elapsed": elapsed}
        self._write(METRICS_FILE, row)
        for sink in self._sinks:
            sink.call("log", metrics, step=step)
        self._show(metrics, step)
        alarms = self._alarms.check(row) if self._alarms else []
        for alarm in alarms:
            self.note(f"alarm at step {step}: {alarm.message}")
            self.event(alarm.kind, step, alarm.message, alarm=True)
        if alarms and self._stop_on_alarm:
            kinds = ", ".join(alarm.kind for alarm in alarms)
            where = f"; metrics are in {self._folder}" if self._folder else ""
            raise TrainingStopped(f"--stop_on_alarm: stopped at step {step} by: {kinds}{where}")

    def event(self, kind: str, step: int, message: str = "", alarm: bool = False) -> None:
        """Record an event: an alarm, or a checkpoint (kind `checkpoint`)."""
        self._write(EVENTS_FILE, {"step": step, "kind": kind, "message": message, "alarm": alarm})

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Record some rollouts; each has at least `prompt`, `reply` and `score`."""
        for row in rows:
            self._write(SAMPLES_FILE, {"step": step, **row})
        cells = [[row["prompt"], row["reply"], f"{row['score']:.2f}"] for row in rows]
        for sink in self._sinks:
            sink.table("samples", SAMPLE_COLUMNS, cells, step)

    def note(self, message: str) -> None:
        """Write a line on the console, above the progress bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stdout)
        else:
            console.say(message)

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if self._folder is None or not distributed.is_main():
            return
        if name not in self._files:
            self._files[name] = (self._folder / name).open("a", encoding="utf-8")
        self._files[name].write(records.line(row))
        self._files[name].flush()

    def _show(self, metrics: dict[str, Any], step: int) -> None:
        values = "  ".join(
            f"{label} {metrics[name]:.4g}" for name, label in self._shown.items()
            if name in metrics
        )
        if self._bar is not None:
            # Without it nothing is shown on a terminal that does not report its size.
            self._bar.ncols = shutil.get_terminal_size().columns - 1
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        first = self._first + 1
        if now - self._last_line < SECONDS_BETWEEN_LINES and step not in (first, self._total):
            return
        self._last_line = now
        left = (now - self._start) / (step - self._first) * (self._total - step)
        console.say(f"step {step}/{self._total}  {values}  ({left:.0f} s left)")


class _Sink:
    """One of accelerate's trackers; it is dropped, with a warning, at its first failure.

    Args:
        name: accelerate's name of it.
        tracker: the started tracker.
    """

    def __init__(self, name: str, tracker: Any) -> None:
        self._name = name
        self._tracker = tracker

    def call(self, method: str, *values: Any, **options: Any) -> None:
        """Call a method of the tracker, unless it has failed before."""
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*values, **options)
        except Exception as error:  # any error of its network or disk
            self._tracker = None
            console.say(f"warning: --tracker {self._name} failed, and is left out from here: "
                            f"{shortened(repr(error), 200)}")

    def table(
        self, title: str, columns: Sequence[str], rows: list[list[str]], step: int
    ) -> None:
        """Log texts as a table, if the tracker has tables."""
        if hasattr(self._tracker, "log_table"):
            self.call("log_table", title, list(columns), rows, step=step)
        elif self._name == "tensorboard":
            lines = [" | ".join(_cell(cell) for cell in row)
                     for row in [list(columns), ["---"] * len(columns), *rows]]
            self.call("log", {title: "\n".join(f"| {line} |" for line in lines)}, step=step)


def _start(
    tracking: TrackingConfig, folder: Path | None, arguments: Mapping[str, Any]
) -> list[_Sink]:
    """Start the trackers.

    Raises:
        UserError: one cannot be started, for instance because it is not logged in.
    """
    if not tracking.trackers:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # Their decorators ask it for the rank. On its own it would set the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    PartialState(cpu=distributed.on_cpu())
    run, where = _run_name(folder), tracking.logging_dir or str((folder or Path()) / LOGS_FOLDER)
    named = {"wandb": {"name": run}, "mlflow": {"run_name": run}}
    config = {name: value if isinstance(value, bool | int | float | str) else str(value)
              for name, value in arguments.items()}
    sinks: list[_Sink] = []
    for name in tracking.trackers:
        make: Any = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = (make(run, where) if make.requires_logging_directory
                       else make(PROJECT, **named.get(name, {})))
            tracker.start()
            tracker.store_init_configuration(config)
        except Exception as error:
            for sink in sinks:
                sink.call("finish")
            raise UserError(f"--tracker {name}: cannot be started: {shortened(repr(error), 300)}; "
                            "solve that, or remove the flag") from error
        sinks.append(_Sink(name, tracker))
    return sinks


def _run_name(folder: Path | None) -> str:
    """Return `tiny-actor` for output/tiny/actor."""
    if folder is None:
        return "run"
    name = folder.name.removesuffix(".partial")
    return f"{folder.parent.name}-{name}" if folder.parent.name else name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
