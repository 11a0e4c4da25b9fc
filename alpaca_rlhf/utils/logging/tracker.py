"""Tracker of a run: `log(metrics, step)` to the console, metrics.jsonl, alarms and other trackers.

A terminal shows a progress bar, any other output a line every few seconds. Other trackers
(`--tracker tensorboard wandb ...`) are Accelerate's; none is started unless asked for, and one that
fails during the run is dropped with a warning, so that it never ends a training.
"""

import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

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
        UserError: one is not; says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--tracker {name}: its package is not installed; pip install {name}")


class Tracker:
    """Every rank logs; only rank 0 writes.

    Args:
        folder: folder of the files that `records` names, or None.
        total_steps: number of steps of the whole run.
        shown: metrics for the console and their names there; the file has all metrics.
        arguments: resolved flags of the run, for the other trackers.
        alarms: checks the metrics of every step, which must be the same on all ranks.
        resume_step: last step before a resumed run continues. Rows up to it are kept, later ones
            are removed; progress, time and alarms continue from there.

    Raises:
        UserError: another tracker cannot be started.
    """

    def __init__(
        self, folder: Path | None, total_steps: int, shown: Mapping[str, str], *,
        tracking: TrackingConfig | None = None, arguments: Mapping[str, Any] | None = None,
        alarms: Alarms | None = None, stop_on_alarm: bool = False, resume_step: int = 0,
    ) -> None:
        self._alarms, self._stop_on_alarm, self._seconds_before = alarms, stop_on_alarm, 0.0
        if folder is not None:
            self._resume(folder, resume_step)
        writes = distributed.is_main()
        self._folder = folder if writes else None
        self._sinks = _started(tracking, arguments or {}, folder) if tracking and writes else []
        distributed.barrier()
        self._progress = _Progress(total_steps, resume_step, shown)
        self._start = time.perf_counter()

    def _resume(self, folder: Path, step: int) -> None:
        # Every rank reads before rank 0 writes.
        rows = records.read_rows(folder / METRICS_FILE) if step else []
        rows = [row for row in rows if row["step"] <= step]
        distributed.barrier()
        if distributed.is_main():
            for name in (METRICS_FILE, EVENTS_FILE, SAMPLES_FILE):
                records.truncate(folder / name, step)
            start = records.line(records.start_record())
            (folder / RUN_FILE).write_text(start, encoding="utf-8")
        for row in rows:
            if self._alarms is not None:
                self._alarms.check(row)  # these alarms were reported before
            self._seconds_before = row.get("time/elapsed", 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.close()
        for sink in self._sinks:
            sink.call("finish")
        if kind is None:
            distributed.barrier()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record the metrics of an optimizer step (step 3: PPO iteration), counted from 1.

        Raises:
            TrainingStopped: an alarm went off, and `stop_on_alarm` is set.
        """
        elapsed = self._seconds_before + time.perf_counter() - self._start
        row = {"step": step, **metrics, "time/elapsed": elapsed}
        self._append(METRICS_FILE, row)
        for sink in self._sinks:
            sink.call("log", metrics, step=step)
        self._progress.show(metrics, step)
        alarms = self._alarms.check(row) if self._alarms else {}
        for kind, message in alarms.items():
            self.note(f"alarm at step {step}: {message}")
            self.event(kind, step, message, alarm=True)
        if alarms and self._stop_on_alarm:
            kinds = ", ".join(alarms)
            where = f"; metrics are in {self._folder}" if self._folder else ""
            raise TrainingStopped(f"--stop_on_alarm: stopped at step {step} by: {kinds}{where}")

    def event(self, kind: str, step: int, message: str = "", alarm: bool = False) -> None:
        """Record an alarm, or a checkpoint (kind `checkpoint`)."""
        self._append(EVENTS_FILE, {"step": step, "kind": kind, "message": message, "alarm": alarm})

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Record some rollouts; each has at least `prompt`, `reply` and `score`."""
        for row in rows:
            self._append(SAMPLES_FILE, {"step": step, **row})
        cells = [[row["prompt"], row["reply"], f"{row['score']:.2f}"] for row in rows]
        for sink in self._sinks:
            sink.samples(cells, step)

    def note(self, message: str) -> None:
        """Write a line to the console that is no metric."""
        if distributed.is_main():
            tqdm.write(message)  # above the progress bar, if there is one
            sys.stdout.flush()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self._folder is not None:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(records.line(row))


class _Progress:
    """Progress bar on a terminal, else a line now and then; rank 0 only."""

    def __init__(self, total: int, first: int, shown: Mapping[str, str]) -> None:
        self._total, self._first, self._shown = total, first, shown
        self._start, self._last_line = time.perf_counter(), -math.inf
        self._bar = None
        if distributed.is_main() and sys.stdout.isatty():
            size = shutil.get_terminal_size()
            self._bar = tqdm(total=total, initial=first, file=sys.stdout, bar_format=BAR,
                             ncols=size.columns - 1, nrows=size.lines)

    def show(self, metrics: dict[str, Any], step: int) -> None:
        values = "  ".join(f"{label} {metrics[name]:.4g}" for name, label in self._shown.items()
                           if name in metrics)
        if self._bar is not None:
            # Else tqdm shows nothing on a terminal that does not report its size.
            self._bar.ncols = shutil.get_terminal_size().columns - 1
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        due = now - self._last_line >= SECONDS_BETWEEN_LINES
        if due or step in (self._first + 1, self._total):
            self._last_line = now
            left = (now - self._start) / (step - self._first) * (self._total - step)
            console.say(f"step {step}/{self._total}  {values}  ({left:.0f} s left)")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Sink:
    """One of Accelerate's trackers, already started; dropped with a warning when it fails."""

    def __init__(self, name: str, tracker: Any) -> None:
        self._name, self._tracker = name, tracker

    def call(self, method: str, *values: Any, **options: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*values, **options)
        except Exception as error:  # of the tracker's network or disk: any type
            self._tracker = None
            console.say(f"warning: --tracker {self._name} failed, and is left out from here: "
                        f"{shortened(repr(error), 200)}")

    def samples(self, rows: list[list[str]], step: int) -> None:
        """Log prompt, response and score of samples as a table, if the tracker has tables."""
        if hasattr(self._tracker, "log_table"):
            self.call("log_table", "samples", list(SAMPLE_COLUMNS), rows, step=step)
        elif self._name == "tensorboard":
            cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row]
                     for row in [SAMPLE_COLUMNS, ["---"] * len(SAMPLE_COLUMNS), *rows]]
            text = "\n".join(f"| {' | '.join(row)} |" for row in cells)
            self.call("log", {"samples": text}, step=step)


def _started(
    tracking: TrackingConfig, arguments: Mapping[str, Any], folder: Path | None
) -> list[_Sink]:
    """Start the trackers that were asked for, and log the arguments to them.

    Raises:
        UserError: one cannot be started, for example because nobody is logged in.
    """
    if not tracking.trackers:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # The trackers ask this for the rank. Without the variable it would set the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    PartialState(cpu=distributed.on_cpu())
    run, where = "run", tracking.logging_dir or str((folder or Path()) / LOGS_FOLDER)
    if folder is not None:  # tiny-actor for output/tiny/actor
        run = "-".join(filter(None, (folder.parent.name, folder.name.removesuffix(".partial"))))
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
                            "fix it, or leave the flag out") from error
        sinks.append(_Sink(name, tracker))
    return sinks
