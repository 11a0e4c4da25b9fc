"""Checkpoints: everything that a killed run needs to resume to the same result, bit for bit.

    OUTPUT_DIR.partial/checkpoints/step-00000050/
        model/engine/      DeepSpeed's checkpoint of an engine (in step 3 `actor/` and `critic/`):
                           weights, optimizer, learning-rate schedule; trainable parameters only
        rank-00000.pt      state that each rank has of its own: random numbers, experience, …
        shared.pt          state that is the same on all ranks
        progress.json      optimizer steps taken, and the metrics before the first
        arguments.json     resolved arguments of the run
        manifest.json      step, ranks, and of every other file its size and SHA-256

A checkpoint is written under a temporary name, forced to the disk, described by its manifest and
then renamed: one that has its name is complete. Older ones are removed only after that. The number
of the step is the position in the data: the order of rows is a function of seed and epoch.

Only tensors and plain values are unpickled (`weights_only`), and no file before its SHA-256 has
been compared: a checkpoint may come from somebody else.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed.checkpoint.stateful import Stateful

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.configs import CheckpointConfig, RunConfig, on_resume
from alpaca_rlhf.utils.engine import Engine
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.logging.tracker import Tracker
from alpaca_rlhf.utils.run import engine_state
from alpaca_rlhf.utils.run.engine_state import CheckpointFiles
from alpaca_rlhf.utils.run.run_folder import (
    CHECKPOINTS_FOLDER,
    RunFolder,
    replace_folder,
    write_json,
)

FORMAT = 2
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
ARGUMENTS = "arguments.json"
SHARED = "shared.pt"
NAME = re.compile(r"step-\d{8}")
NEEDED_KEYS = {"step_of_rlhf", "step", "in_round", "ranks"}
NEEDED_FILES = {PROGRESS, ARGUMENTS, SHARED, "rank-00000.pt"}


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps so far, skipped ones included."""
    before: Any = None
    """Metrics before the first step, for JSON; None: not measured yet."""
    data: str = ""
    """Fingerprint of the rows to train on."""


@dataclass(frozen=True)
class Found:
    """Checkpoint to resume from, verified."""

    folder: Path
    convert: bool
    """True if another number of ranks or another ZeRO stage wrote it."""


# --- finding a checkpoint ------------------------------------------------------------------------


def open_run(
    run: RunConfig, checkpoint: CheckpointConfig, *, step: int, arguments: dict[str, Any]
) -> tuple[RunFolder, Found | None]:
    """Open the output folder of a run of step 1, 2 or 3, and find the checkpoint to resume from.

    Raises:
        UserError: the folder cannot be used; the path is not a checkpoint; it is damaged, or was
            written with other arguments.
        TrainingStopped: the run has finished.
    """
    wanted = checkpoint.resume_from_checkpoint
    folder = RunFolder(
        run.output_dir, overwrite=run.overwrite_output_dir, resume=wanted is not None,
        dry=run.dry_run,
    )
    if wanted is None:
        return folder, None
    path = _latest_intact(folder.path) if wanted == "latest" else Path(wanted)
    if path is None:
        console.say("--resume_from_checkpoint latest: there is no checkpoint yet; "
                    "this run starts at its first step")
        return folder, None
    if wanted != "latest" and (damage := find_damage(path)):
        raise UserError(f"--resume_from_checkpoint {path}: {damage}; give another folder step-… of "
                        "a run's `checkpoints` folder, or latest, the last one that is intact")
    convert = _check_fit(path, checkpoint.allow_changed_args, step, arguments)
    console.say(f"resuming from {path}")
    return folder, Found(path, convert)


def _latest_intact(run: Path | None) -> Path | None:
    """Return the last intact checkpoint of a run; name those that are not on the console.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    complete = complete_checkpoints(run / CHECKPOINTS_FOLDER) if run else []
    for path in reversed(complete):
        if (damage := find_damage(path)) is None:
            return path
        console.say(f"warning: the checkpoint {path} is broken and is left out: {damage}")
    if complete:
        raise UserError(
            f"--resume_from_checkpoint latest: none of the {len(complete)} checkpoints in "
            f"{complete[0].parent} is intact; put one back, or start over with "
            "--overwrite_output_dir and without this flag"
        )
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder whose writing was completed, by step."""
    return sorted(path for path in folder.glob("step-*")
                  if NAME.fullmatch(path.name) and (path / MANIFEST).is_file())


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest, and return what is wrong with it.

    All ranks must call it together: they share the work.
    """
    if not (folder / MANIFEST).is_file():
        return f"is not a checkpoint (it has no {MANIFEST})"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        files = sorted((name, size, digest) for name, (size, digest) in manifest["files"].items())
        whole = NEEDED_KEYS <= manifest.keys() and NEEDED_FILES <= manifest["files"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        return f"{MANIFEST} is damaged"
    damages = []
    for name, size, digest in files[distributed.rank() :: distributed.world_size()]:
        path = folder / name
        if not path.is_file():
            damages.append(f"{name} is missing")
        elif path.stat().st_size != size:
            damages.append(f"{name} has {path.stat().st_size:,} bytes, not {size:,}")
        elif _sha256(path) != digest:
            damages.append(f"{name} has changed since it was written (SHA-256)")
    found = sorted(distributed.gather_rows(damages))
    return found[0] if found else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what may have changed -----------------------------------------------------------------------


def _check_fit(path: Path, allow_changed: bool, step: int, arguments: dict[str, Any]) -> bool:
    """Refuse a checkpoint of another step or with other arguments; whether to convert it."""
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["step_of_rlhf"] != step:
        raise UserError(f"--resume_from_checkpoint {path}: is of step {manifest['step_of_rlhf']}, "
                        f"this is step {step}")
    then, ranks = json.loads((path / ARGUMENTS).read_text()), manifest["ranks"]
    convert = ranks != distributed.world_size() or any(
        then.get(flag) != arguments.get(flag)
        for flag, kind in on_resume().items() if kind == "place"
    )
    if convert and manifest["in_round"]:
        raise UserError(
            f"--resume_from_checkpoint {path}: was written in the middle of a PPO iteration, by "
            f"{ranks} rank(s); resume with as many and the same ZeRO stages, or from a checkpoint "
            "between two iterations"
        )
    changed = changed_arguments(
        then, arguments, ranks_then=ranks, ranks_now=distributed.world_size(),
        started_in=manifest.get("started_in", ""),
    )
    if changed and not allow_changed:
        raise UserError(
            f"--resume_from_checkpoint {path}: arguments that change the result have changed: "
            f"{'; '.join(changed)}; give them as they were, or --allow_changed_args"
        )
    for line in changed:
        console.say(f"changed since the checkpoint: {line}")
    if convert:
        console.say("the checkpoint is of another number of ranks or ZeRO stage: it is "
                    "converted, and the results agree to fp32's rounding, not bit for bit")
    return convert


def changed_arguments(
    then: dict[str, Any], now: dict[str, Any], *, ranks_then: int, ranks_now: int,
    started_in: str = "",
) -> list[str]:
    """Return a line for each argument that differs between two runs and changes the result.

    Paths that lead to one place are equal; those of then were relative to `started_in`.
    """
    kinds, lines = on_resume(), []
    for flag in dict.fromkeys([*now, *then]):
        kind, old, new = kinds.get(flag, "result"), then.get(flag), now.get(flag)
        if kind in ("free", "place"):
            continue
        if kind == "per_rank" and old and new and ranks_then != ranks_now:
            if old * ranks_then != new * ranks_now:
                lines.append(f"--{flag} was {old} on {ranks_then} rank(s), is {new} on "
                             f"{ranks_now}")
        elif old != new and _places(old, started_in) != _places(new, ""):
            lines.append(f"--{flag} was {old}, is {new}")
    return lines


def _places(value: Any, folder: str) -> Any:
    """Return where a path leads, also one of `NAME=PATH:SHARE` or in a list; else the value."""
    if isinstance(value, list):
        return [_places(one, folder) for one in value]
    parts = re.fullmatch(r"([^/=]*=)?(.*?)(:[\d.]+)?", value) if isinstance(value, str) else None
    if parts is None:
        return value
    path = os.path.realpath(os.path.join(folder, os.path.expanduser(parts[2])))
    return parts[1], path, parts[3]


# --- writing and restoring -----------------------------------------------------------------------


class Checkpoints:
    """Saves the checkpoints of a run, and restores one.

    Args:
        engines: that are trained, by role.
        step: of RLHF: 1, 2 or 3.
        own: other parts with a state, of which each rank has its own.
        shared: other parts with a state, which is the same on all ranks.
    """

    def __init__(
        self, folder: RunFolder, engines: Mapping[str, Engine], *, config: CheckpointConfig,
        step: int, arguments: dict[str, Any], found: Found | None,
        own: Mapping[str, Stateful] | None = None, shared: Mapping[str, Stateful] | None = None,
    ) -> None:
        self._root = folder.path and folder.path / CHECKPOINTS_FOLDER
        self._engines, self._own, self._shared = engines, own or {}, shared or {}
        self._config, self._step, self._arguments, self._found = config, step, arguments, found
        self._saved: set[str] = set()
        self._signals = StopSignals()
        self.progress = Progress()

    @contextlib.contextmanager
    def deferring_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT wait for the next `step_boundary`."""
        before = {number: signal.signal(number, self._signals.note) for number in HANDLED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def restore(self, data: str) -> Progress:
        """Restore the checkpoint that was found, if any; all ranks together.

        `data` is the fingerprint of the rows to train on.

        Raises:
            UserError: it does not fit the models, or the rows have changed.
        """
        self.progress.data = data
        if self._found is None:
            return self.progress
        folder, convert = self._found.folder, self._found.convert
        then = Progress(**json.loads((folder / PROGRESS).read_text()))
        if then.data != data and not self._config.allow_changed_args:
            raise UserError(
                f"--resume_from_checkpoint {folder}: the rows to train on are not those of the "
                "checkpoint: the files of --data_path have changed; put back what they were, or "
                "give --allow_changed_args"
            )
        files = CheckpointFiles()
        for role, engine in self._engines.items():
            engine_state.load(engine, folder / role, files, convert=convert)
        shared = files.load(str(folder / SHARED), "cpu")
        own = {} if convert else files.load(str(_rank_file(folder)), "cpu")
        for parts, states in ((self._shared, shared), (self._own, own)):
            for name, part in parts.items():
                if name in states:
                    part.load_state_dict(states[name])
        if "random" in own:
            _set_random_state(own["random"])
        self.progress = dataclasses.replace(then, data=data)
        self._saved.add(folder.name)
        return self.progress

    def step_boundary(
        self, step: int, tracker: Tracker, *, due: bool = False, tracker_step: int | None = None,
        mid_iteration: bool = False,
    ) -> None:
        """Save a checkpoint if one is due, and stop if a signal has come; all ranks together.

        Args:
            step: optimizer steps so far.
            due: whether one is due for another reason than `--save_steps`.
            tracker_step: what the tracker counts, where that is not optimizer steps.
            mid_iteration: in step 3, whether it is in the middle of a PPO iteration.

        Raises:
            TrainingStopped: SIGTERM or SIGINT has come.
        """
        self.progress.step = step
        every = self._config.save_steps
        due = due or (every > 0 and step > 0 and step % every == 0)
        stop = self._signals.agreed()
        saved = self.save(mid_iteration=mid_iteration) if due or stop else None
        if saved:
            tracker.event("checkpoint", step if tracker_step is None else tracker_step, saved)
        if stop is not None:
            raise TrainingStopped(self._last_words(stop), code=128 + stop)

    @contextlib.contextmanager
    def saving_on_failure(self) -> Iterator[None]:
        """Save a checkpoint if the export inside fails, on all ranks: the training is not lost.

        Raises:
            TrainingStopped: why it failed, and how to export again.
        """
        try:
            yield
        except Exception as error:
            self.save()
            if isinstance(error, OSError | TrainingStopped):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingStopped(
                f"error: the model could not be exported: {reason}{self._remedy()}") from error

    @contextlib.contextmanager
    def saving_on_stop(self) -> Iterator[None]:
        """Save a checkpoint if the body ends the run on purpose, which it does on all ranks.

        Raises:
            TrainingStopped: the body's, with the way to go on.
        """
        try:
            yield
        except TrainingStopped as stop:
            self.save()
            raise TrainingStopped(f"{stop}{self._remedy()}", stop.code) from stop

    def _remedy(self) -> str:
        saved = complete_checkpoints(self._root) if self._root else []
        if not saved:
            return "; no checkpoint could be saved"
        return f"; --resume_from_checkpoint latest resumes from {saved[-1]}"

    def _last_words(self, stop: signal.Signals) -> str:
        text = f"{stop.name}: stopped after step {self.progress.step}"
        if self._root is None:
            return f"{text}; nothing is saved: no --output_dir was given"
        return text + self._remedy()

    def save(self, *, mid_iteration: bool = False) -> str | None:
        """Save a checkpoint, unless there is no folder for it or it is there; return its name.

        An error, such as a full disk, ends in a warning: earlier checkpoints stay intact.
        """
        name = f"step-{self.progress.step:08d}"
        if self._root is None or name in self._saved:
            return None
        temporary = self._root / f".{name}.partial"
        errors = self._write(temporary, self._root / name, mid_iteration)
        if errors:
            if distributed.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            distributed.barrier()
            kept = [path.name for path in complete_checkpoints(self._root)]
            console.say(
                f"warning: the checkpoint of step {self.progress.step} could not be saved "
                f"({errors[0]}); {f'the last one is {kept[-1]}' if kept else 'there is none'}"
            )
            return None
        self._saved.add(name)
        return name

    def _write(self, temporary: Path, final: Path, mid_iteration: bool) -> list[str]:
        """Write a checkpoint, give it its name, and return the errors of all ranks."""
        files = CheckpointFiles()
        if distributed.is_main():
            with files.noting_errors(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        if errors := files.errors():
            return errors
        for role, engine in self._engines.items():
            engine_state.save(engine, temporary / role, files)
        own: dict[str, Any] = {name: part.state_dict() for name, part in self._own.items()}
        own["random"] = _random_state()
        files.save(own, str(_rank_file(temporary)))
        shared = {name: part.state_dict() for name, part in self._shared.items()}
        if distributed.is_main():
            files.save(shared, str(temporary / SHARED))
            with files.noting_errors(temporary):
                write_json(temporary / PROGRESS, dataclasses.asdict(self.progress))
                write_json(temporary / ARGUMENTS, self._arguments)
        if errors := files.errors():
            return errors
        manifest = {
            "format": FORMAT, "step_of_rlhf": self._step, "step": self.progress.step,
            "in_round": mid_iteration, "ranks": distributed.world_size(),
            "started_in": os.getcwd(),
            "files": _described(temporary),
        }
        if distributed.is_main():
            with files.noting_errors(temporary):
                write_json(temporary / MANIFEST, manifest)
                replace_folder(temporary, final)
                self._remove_older(final)
        return files.errors()

    def _remove_older(self, newest: Path) -> None:
        older = [p for p in complete_checkpoints(newest.parent) if p.name < newest.name]
        for path in older[: max(0, len(older) + 1 - self._config.save_total_limit)]:
            # Without its manifest it no longer counts, should this be cut short.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _rank_file(folder: Path) -> Path:
    return folder / f"rank-{distributed.rank():05d}.pt"


def _described(folder: Path) -> dict[str, tuple[int, str]]:
    """Return {name: (size in bytes, SHA-256)} of all files; the ranks share the work."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    mine = names[distributed.rank() :: distributed.world_size()]
    rows = [(name, ((folder / name).stat().st_size, _sha256(folder / name))) for name in mine]
    return dict(distributed.gather_rows(rows))


def _random_state() -> dict[str, Any]:
    """Return the states of all random number generators of this rank."""
    algorithm, keys, *others = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (algorithm, np.asarray(keys).tolist(), *others),
        "torch": torch.get_rng_state(),
    }
    if not distributed.on_cpu():
        state["device"] = get_accelerator().get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    algorithm, keys, *others = state["numpy"]
    np.random.set_state((algorithm, np.asarray(keys, dtype=np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if "device" in state and not distributed.on_cpu():
        get_accelerator().set_rng_state(state["device"])


# --- signals -------------------------------------------------------------------------------------

HANDLED = (signal.SIGTERM, signal.SIGINT)
SAME_CTRL_C = 1.0  # seconds within which a launcher sends several signals for one Ctrl-C


class StopSignals:
    """Notes SIGTERM and SIGINT, for all ranks to stop at the next step boundary.

    A launcher may send both for one Ctrl-C, and one of them twice. Only another Ctrl-C, more than
    `SAME_CTRL_C` later, raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self._noted, self._since = 0, 0.0

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        if self._noted:
            if number == signal.SIGINT and time.monotonic() - self._since > SAME_CTRL_C:
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
        """Return the signal that any rank has noted, on every rank; all must call it together."""
        mine = torch.tensor(float(self._noted), device=distributed.device())
        number = int(distributed.max_over_ranks(mine).item())
        return signal.Signals(number) if number else None
