"""Metrics behind one `log(metrics, step)`: console, metrics.jsonl, alarms, other people's trackers.

On a terminal the console shows a progress bar, elsewhere a line now and then. Trackers beside the
run's own files (`--tracker tensorboard wandb …`) are accelerate's; none is started unasked, and one
that fails on the way is left behind with a line that says so: it never ends a training.
"""

import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from tqdm import tqdm

from alpaca_rlhf.utils import console, distributed
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


@dataclass(frozen=True)
class Outside:
    """The trackers beside the run's own files.

    Attributes:
        names: as accelerate has them: tensorboard, wandb, mlflow, …
        folder: for those that write files; by default `logs` in the run's folder.
        config: the run's arguments.
    """

    names: Sequence[str] = ()
    folder: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def require_packages(names: Sequence[str]) -> None:
    """See to it that the package of each tracker is installed.

    Raises:
        UserError: one is not; says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--tracker {name}: its package is not installed; pip install {name}")


class Tracker:
    """Every rank logs; only rank 0 has somewhere to write.

    Args:
        folder: where the files of `records` go, or None.
        total_steps: for the progress on the console.
        shown: metrics that the console shows, and what it calls them; the file holds all.
        outside: trackers beside the files.
        alarms: looks at every step's metrics; all ranks must log the same of what it looks at.
        stop_on_alarm: whether an alarm ends the training.
        resume_step: the step that an earlier, killed run is resumed after: what its files in
            `folder` say of steps up to this one is kept, the rest is cut off, and progress, time
            and alarms go on from there.

    Raises:
        UserError: a tracker can not be started.
    """

    def __init__(
        self, folder: Path | None, total_steps: int, shown: Mapping[str, str],
        outside: Outside | None = None, alarms: Alarms | None = None, stop_on_alarm: bool = False,
        resume_step: int = 0,
    ) -> None:
        self._folder = folder
        self._total = total_steps
        self._first = resume_step
        self._shown = shown
        self._alarms = alarms
        self._stop_on_alarm = stop_on_alarm
        self._seconds_before = self._take_up(resume_step)
        self._files: dict[str, TextIO] = {}
        self._outside = _start(outside, folder) if outside and distributed.is_main() else []
        self._bar = self._new_bar()
        self._start = time.perf_counter()
        self._last_line = -math.inf

    def _take_up(self, resume_step: int) -> float:
        """Keep what was recorded up to a step; gives the seconds of training until then."""
        if self._folder is None:
            return 0.0
        # Every rank reads before rank 0 cuts.
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
                self._alarms.check(row)  # has been told
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
        for sink in self._outside:
            sink.call("finish")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Record the metrics of an optimizer step (or of a round, in step 3), counted from 1.

        Raises:
            TrainingStopped: an alarm went off, and was to end the training.
        """
        elapsed = self._seconds_before + time.perf_counter() - self._start
        row = {"step": step, **metrics, "time/elapsed": elapsed}
        self._write(METRICS_FILE, row)
        for sink in self._outside:
            sink.call("log", metrics, step=step)
        self._show(metrics, step)
        alarms = self._alarms.check(row) if self._alarms else []
        for alarm in alarms:
            self.note(f"alarm at step {step}: {alarm.message}")
            self.event(alarm.kind, step, alarm.message, alarm=True)
        if alarms and self._stop_on_alarm:
            kinds = ", ".join(alarm.kind for alarm in alarms)
            where = f"; what was recorded is in {self._folder}" if self._folder else ""
            raise TrainingStopped(f"--stop_on_alarm: stopped at step {step} by: {kinds}{where}")

    def event(self, kind: str, step: int, message: str = "", alarm: bool = False) -> None:
        """Record that something happened: an alarm, a checkpoint (kind `checkpoint`)."""
        self._write(EVENTS_FILE, {"step": step, "kind": kind, "message": message, "alarm": alarm})

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Record some rollouts; each has at least `prompt`, `reply` and `score`."""
        for row in rows:
            self._write(SAMPLES_FILE, {"step": step, **row})
        cells = [[row["prompt"], row["reply"], f"{row['score']:.2f}"] for row in rows]
        for sink in self._outside:
            sink.table("samples", SAMPLE_COLUMNS, cells, step)

    def note(self, message: str) -> None:
        """A line on the console that is no metric."""
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
            # By itself it shows nothing on a terminal that does not say its size.
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
    """One of accelerate's trackers, left behind with a line at its first failure.

    Args:
        name: accelerate's.
        tracker: has been started.
    """

    def __init__(self, name: str, tracker: Any) -> None:
        self._name = name
        self._tracker = tracker

    def call(self, method: str, *values: Any, **options: Any) -> None:
        """Pass on, as long as it works."""
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*values, **options)
        except Exception as error:  # whatever a tracker's network or disk comes up with
            self._tracker = None
            console.say(f"warning: --tracker {self._name} failed, and is left out from here: "
                            f"{shortened(repr(error), 200)}")

    def table(
        self, title: str, columns: Sequence[str], rows: list[list[str]], step: int
    ) -> None:
        """Texts, where the tracker has a place for them."""
        if hasattr(self._tracker, "log_table"):
            self.call("log_table", title, list(columns), rows, step=step)
        elif self._name == "tensorboard":
            lines = [" | ".join(_cell(cell) for cell in row)
                     for row in [list(columns), ["---"] * len(columns), *rows]]
            self.call("log", {title: "\n".join(f"| {line} |" for line in lines)}, step=step)


def _start(outside: Outside, folder: Path | None) -> list[_Sink]:
    """The trackers, started and told the arguments.

    Raises:
        UserError: one can not be started: it is not logged in, say.
    """
    if not outside.names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # Their decorators ask this for the rank. Left to itself it would set the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    PartialState(cpu=distributed.on_cpu())
    run, where = _run_name(folder), outside.folder or str((folder or Path()) / LOGS_FOLDER)
    named = {"wandb": {"name": run}, "mlflow": {"run_name": run}}
    config = {name: value if isinstance(value, bool | int | float | str) else str(value)
              for name, value in outside.config.items()}
    sinks: list[_Sink] = []
    for name in outside.names:
        make: Any = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = (make(run, where) if make.requires_logging_directory
                       else make(PROJECT, **named.get(name, {})))
            tracker.start()
            tracker.store_init_configuration(config)
        except Exception as error:
            for sink in sinks:
                sink.call("finish")
            raise UserError(f"--tracker {name}: can not be started: {shortened(repr(error), 300)}; "
                            "see to it, or leave the flag out") from error
        sinks.append(_Sink(name, tracker))
    return sinks


def _run_name(folder: Path | None) -> str:
    """`tiny-actor` for output/tiny/actor."""
    if folder is None:
        return "run"
    name = folder.name.removesuffix(".partial")
    return f"{folder.parent.name}-{name}" if folder.parent.name else name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
