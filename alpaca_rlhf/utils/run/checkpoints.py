"""Checkpoints: all that a killed run needs to go on to the same result, bit for bit.

    OUTPUT_DIR.partial/checkpoints/step-00000050/
        model/engine/      DeepSpeed's checkpoint of an engine (in step 3 `actor/` and `critic/`):
                           weights, optimizer, learning-rate schedule; with LoRA what trains only
        rank-00000.pt      what each rank has of its own: random numbers, experience, …
        shared.pt          what all ranks hold alike
        progress.json      how far the run was, and what it had measured
        arguments.json     its resolved arguments
        manifest.json      step, ranks, and of every other file its size and SHA-256

A checkpoint is written under a name of its own, forced to the disk, described by its manifest and
then renamed: what has the name is complete. Older ones go only after that. The position in the data
needs no more than the number of the step: the order of rows is a function of seed and epoch.

Nothing is unpickled but tensors and plain values (`weights_only`), and no file before its SHA-256
has been compared: a checkpoint may come from somebody else.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.engine import Engine
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.logging.tracker import Tracker
from alpaca_rlhf.utils.resuming import Resuming
from alpaca_rlhf.utils.run import export, nonfinite, reshard
from alpaca_rlhf.utils.run.durable import sync_folder
from alpaca_rlhf.utils.run.stop_signals import StopSignals

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
ARGUMENTS = "arguments.json"
SHARED = "shared.pt"
TAG = "engine"
NAME = re.compile(r"step-(\d{8})")
NEEDED_KEYS = {"step_of_rlhf", "step", "in_round", "ranks"}
NEEDED_FILES = {PROGRESS, ARGUMENTS, SHARED, "rank-00000.pt"}


class Stateful(Protocol):
    """A part of a run that has a state: plain values and tensors, in dicts and lists."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as it is now."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state up."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps taken, those included that were skipped.
        before: what was measured before the first, for JSON; None: not yet.
        data: fingerprint of the rows to train on.
    """

    step: int = 0
    before: Any = None
    data: str = ""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from, verified.

    Attributes:
        folder: where it is.
        ranks: that wrote it.
        arguments: of the run that wrote it.
        elsewhere: other ranks or ZeRO stages wrote it than are to read it.
    """

    folder: Path
    ranks: int
    arguments: dict[str, Any]
    elsewhere: bool


# ------------------------------------------------------------------------- finding one


def open_run(how: Resuming) -> tuple[export.RunFolder, Found | None]:
    """The folder to work in, and the checkpoint to go on from; None starts at the first step.

    Raises:
        UserError: the folder cannot be had; there is no checkpoint at the path, or it is broken, or
            was written with other arguments.
        TrainingStopped: the run has finished.
    """
    folder = export.RunFolder(how.output_dir, how.overwrite, how.origin is not None)
    return folder, find(folder, how)


def find(folder: export.RunFolder, how: Resuming) -> Found | None:
    """The checkpoint to go on from, verified; see `open_run`."""
    asked = how.origin
    if asked is None and how.replay:
        kept = nonfinite.checkpoint_of(how.replay)
        if kept is None:
            console.say("--replay: the checkpoint of that step is not there; it is taken on "
                            "the weights that a run starts from")
        asked = None if kept is None else str(kept)
    if asked is None:
        return None
    if asked != "latest":
        path = Path(asked)
        if not (path / MANIFEST).is_file():
            raise UserError(
                f"--resume_from_checkpoint {asked}: is no checkpoint (it has no {MANIFEST}); give "
                "a folder step-… out of `checkpoints`, or latest"
            )
        if problem := broken(path):
            raise UserError(f"--resume_from_checkpoint {asked}: {problem}; give an earlier one, "
                            "or latest, which looks for one that is whole")
    elif (latest := _latest(folder.path)) is None:
        console.say("--resume_from_checkpoint latest: there is no checkpoint yet; "
                        "this run starts at its first step")
        return None
    else:
        path = latest
    found = _read(path, how)
    _refuse_changes(found, how)
    console.say(f"going on from {path}")
    return found


def _latest(run: Path | None) -> Path | None:
    """The last checkpoint that is whole; those that are not are named on the console.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    there = complete_ones(run / export.CHECKPOINTS_FOLDER) if run else []
    for path in reversed(there):
        problem = broken(path)
        if problem is None:
            return path
        console.say(f"warning: the checkpoint {path} is broken and is left out: {problem}")
    if there:
        raise UserError(
            f"--resume_from_checkpoint latest: none of the {len(there)} checkpoints in "
            f"{there[0].parent} is whole; put one back, or start over with --overwrite_output_dir "
            "and without this flag"
        )
    return None


def complete_ones(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, by step."""
    names = sorted(p for p in folder.glob("step-*") if NAME.fullmatch(p.name))
    return [p for p in names if (p / MANIFEST).is_file()]


def broken(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; all ranks share the work and must ask."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = sorted((name, size, digest) for name, (size, digest) in manifest["files"].items())
        known = manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if not known:
        return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
    if not (NEEDED_KEYS <= manifest.keys() and NEEDED_FILES <= manifest["files"].keys()):
        return f"{MANIFEST} is damaged"
    problems = []
    for name, size, digest in files[distributed.rank() :: distributed.world_size()]:
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size:,} bytes, not {size:,}")
        elif _sha256(path) != digest:
            problems.append(f"{name} has changed since it was written (SHA-256)")
    found = sorted(distributed.gather_rows(problems))
    return found[0] if found else None


def _read(path: Path, how: Resuming) -> Found:
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["step_of_rlhf"] != how.step:
        raise UserError(f"--resume_from_checkpoint {path}: is of step {manifest['step_of_rlhf']}, "
                        f"this is step {how.step}")
    written = json.loads((path / ARGUMENTS).read_text())
    same = manifest["ranks"] == distributed.world_size() and not how.moved(written)
    if not same and manifest["in_round"]:
        raise UserError(
            f"--resume_from_checkpoint {path}: was written in the middle of a round, by "
            f"{manifest['ranks']} rank(s); go on with as many and the same ZeRO stages, or from "
            "a checkpoint between two rounds"
        )
    return Found(path, manifest["ranks"], written, not same)


def _refuse_changes(found: Found, how: Resuming) -> None:
    changed = how.changed(found.arguments, found.ranks, distributed.world_size())
    if changed and not how.allow_changes:
        raise UserError(
            f"--resume_from_checkpoint {found.folder}: arguments that change the result are not "
            f"what they were: {'; '.join(changed)}; give them as they were, or "
            "--allow_changed_args"
        )
    for line in changed:
        console.say(f"changed since the checkpoint: {line}")
    if found.elsewhere:
        console.say("the checkpoint is of other ranks or ZeRO stages: it is converted, and "
                        "the run goes on to fp32's rounding, not bit for bit")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------- writing and reading


class DurableFiles(CheckpointEngine):
    """How DeepSpeed writes and reads files: forced to the disk, and nothing unpickled but data.

    An error while writing is kept in `error`, not raised: between DeepSpeed's barriers a rank that
    raised would leave the others waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error: str | None = None

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file."""
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        # torch's archive writer turns what its file raises into a RuntimeError of its own.
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            self.error = self.error or f"{path}: {getattr(cause, 'strerror', None) or error}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file.

        Raises:
            UserError: it holds more than tensors and plain values.
        """
        try:
            with torch.serialization.safe_globals(reshard.deepspeeds_classes()):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(f"{path}: holds more than data, or is damaged, and is not read; give "
                            "a checkpoint that a run has written") from None

    def commit(self, info: Any) -> bool:
        """The manifest is written by us."""
        return True


class Checkpoints:
    """Writes a run's checkpoints, and takes one up.

    Args:
        folder: of the run.
        engines: that are trained, by role.
        how: when to save, and how many to keep.
        found: the checkpoint to go on from, if any.
        parts: what else has a state: each rank has its own.
        shared: what else has a state that is alike on all ranks.
    """

    def __init__(
        self, folder: export.RunFolder, engines: Mapping[str, Engine], how: Resuming,
        found: Found | None, parts: Mapping[str, Stateful] | None = None,
        shared: Mapping[str, Stateful] | None = None,
    ) -> None:
        self._root = folder.path and folder.path / export.CHECKPOINTS_FOLDER
        self._engines, self._how, self._found = dict(engines), how, found
        self._parts, self._shared = dict(parts or {}), dict(shared or {})
        self._written: set[str] = set()
        self._signals = StopSignals()
        self.progress = Progress()

    @contextlib.contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT wait for the next `boundary`."""
        with self._signals:
            yield

    # --------------------------------------------------------------- going on

    def restore(self, data: str) -> Progress:
        """Take the checkpoint up, if there is one; all ranks together.

        Args:
            data: fingerprint of the rows to train on.

        Raises:
            UserError: it does not fit the models, or the data are not what they were.
        """
        self.progress.data = data
        if self._found is None:
            return self.progress
        folder = self._found.folder
        written = Progress(**json.loads((folder / PROGRESS).read_text()))
        if written.data != data and not self._how.allow_changes:
            raise UserError(
                f"--resume_from_checkpoint {folder}: the rows to train on are not those of the "
                "checkpoint: the files of --data_path have changed; put back what they were, or "
                "give --allow_changed_args"
            )
        files = DurableFiles()
        for role, engine in self._engines.items():
            if self._found.elsewhere:
                reshard.load(engine, folder / role, TAG, files.load)
            else:
                _load_engine(engine, folder / role, files)
        shared = files.load(str(folder / SHARED), "cpu")
        own = {} if self._found.elsewhere else files.load(str(_rank_file(folder)), "cpu")
        for parts, states in ((self._shared, shared), (self._parts, own)):
            for name, part in parts.items():
                if name in states:
                    part.load_state_dict(states[name])
        if "random" in own:
            _set_random_state(own["random"])
        self.progress = dataclasses.replace(written, data=data)
        self._written.add(folder.name)
        return self.progress

    # --------------------------------------------------------------- at a step boundary

    def boundary(
        self, step: int, tracker: Tracker, due: bool = False, place: int = 0,
        in_round: bool = False,
    ) -> None:
        """Save what is due, and end the training if a signal asks for it; all ranks together.

        Args:
            step: optimizer steps taken so far.
            tracker: is told of a checkpoint.
            due: whether one is due, `--save_steps` apart.
            place: what the tracker counts, where that is not optimizer steps.
            in_round: step 3: whether a round is under way.

        Raises:
            TrainingStopped: SIGTERM or SIGINT had come.
        """
        self.progress.step = step
        every = self._how.save_steps
        due = due or (every > 0 and step > 0 and step % every == 0)
        stop = self._signals.agreed()
        saved = self.save(in_round) if due or stop else None
        if saved:
            tracker.event("checkpoint", place or step, saved)
        if stop is not None:
            raise TrainingStopped(self._last_words(stop), code=128 + stop)

    def _last_words(self, stop: signal.Signals) -> str:
        text = f"{stop.name}: stopped after step {self.progress.step}"
        if self._root is None:
            return f"{text}; nothing is saved: no --output_dir was given"
        saved = complete_ones(self._root)
        if not saved:
            return f"{text}; no checkpoint could be saved"
        return f"{text}; --resume_from_checkpoint latest goes on from {saved[-1]}"

    def save(self, in_round: bool = False) -> str | None:
        """Write a checkpoint, unless there is nowhere to, or it is there already.

        A disk that is full, say, ends in a warning: the checkpoints before this one are whole.

        Returns:
            Its name, if one was written.
        """
        name = f"step-{self.progress.step:08d}"
        if self._root is None or name in self._written:
            return None
        temporary = self._root / f".{name}.partial"
        problems = self._write(temporary, in_round)
        if distributed.is_main() and not problems:
            try:
                self._complete(temporary, self._root / name)
            except OSError as error:
                problems = [f"{error.filename}: {error.strerror}"]
        problems = distributed.gather_rows(problems if distributed.is_main() else [])
        if problems:
            if distributed.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            kept = [path.name for path in complete_ones(self._root)]
            console.say(
                f"warning: the checkpoint of step {self.progress.step} could not be saved "
                f"({problems[0]}); {f'the last one is {kept[-1]}' if kept else 'there is none'}"
            )
            return None
        self._written.add(name)
        return name

    def _write(self, folder: Path, in_round: bool) -> list[str]:
        """All files of a checkpoint; what went wrong, on every rank."""
        files = DurableFiles()
        if distributed.is_main():
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            except OSError as error:
                files.error = f"{folder}: {error.strerror}"
        if problems := _of_all_ranks(files):
            return problems
        for role, engine in self._engines.items():
            _save_engine(engine, folder / role, files)
        own: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        own["random"] = _random_state()
        files.save(own, str(_rank_file(folder)))
        if distributed.is_main():
            shared = {name: part.state_dict() for name, part in self._shared.items()}
            files.save(shared, str(folder / SHARED))
            try:
                export.write_json(folder / PROGRESS, dataclasses.asdict(self.progress))
                export.write_json(folder / ARGUMENTS, self._how.config)
            except OSError as error:
                files.error = files.error or f"{folder}: {error.strerror}"
        return _of_all_ranks(files) or self._describe(folder, in_round)

    def _describe(self, folder: Path, in_round: bool) -> list[str]:
        """The manifest; the ranks share the work of reading what was written."""
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        mine = names[distributed.rank() :: distributed.world_size()]
        rows = [
            [name, ((folder / name).stat().st_size, _sha256(folder / name))] for name in mine
        ]
        files = dict(distributed.gather_rows(rows))
        error = DurableFiles()
        if distributed.is_main():
            manifest = {
                "format": FORMAT, "step_of_rlhf": self._how.step, "step": self.progress.step,
                "in_round": in_round, "ranks": distributed.world_size(), "files": files,
            }
            try:
                with (folder / MANIFEST).open("w") as file:
                    json.dump(manifest, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as problem:
                error.error = f"{folder / MANIFEST}: {problem.strerror}"
        return _of_all_ranks(error)

    def _complete(self, temporary: Path, final: Path) -> None:
        """Give a checkpoint its name, and take away those beyond the limit."""
        aside = final.with_name(f".{final.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
        sync_folder(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
        limit = self._how.limit
        older = [path for path in complete_ones(final.parent) if path.name < final.name]
        for path in older[: max(0, len(older) + 1 - limit)]:
            # Without its manifest it counts no more, should this be cut short.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _of_all_ranks(files: DurableFiles) -> list[str]:
    return distributed.gather_rows([files.error] if files.error else [])


def _rank_file(folder: Path) -> Path:
    return folder / f"rank-{distributed.rank():05d}.pt"


def _partly_frozen(engine: Engine) -> bool:
    return not all(p.requires_grad for p in engine.module.parameters())


def _save_engine(engine: Engine, folder: Path, files: DurableFiles) -> None:
    engine.checkpoint_engine = files
    # Scripts that turn shards into weights: exports and `universal` do that here.
    engine._copy_recovery_script = lambda _: None
    engine.save_checkpoint(
        str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=_partly_frozen(engine)
    )


def _load_engine(engine: Engine, folder: Path, files: DurableFiles) -> None:
    engine.checkpoint_engine = files
    loaded, _ = engine.load_checkpoint(
        str(folder), tag=TAG, load_module_strict=not _partly_frozen(engine)
    )
    if loaded is None:
        raise UserError(f"{folder}: this checkpoint is of another kind of model or of ZeRO; give "
                        "the arguments it was written with")


def _random_state() -> dict[str, Any]:
    """The states of every generator of this rank."""
    version, numbers, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), position,
                  has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if not distributed.on_cpu():
        state["device"] = get_accelerator().get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "device" in state and not distributed.on_cpu():
        get_accelerator().set_rng_state(state["device"])
