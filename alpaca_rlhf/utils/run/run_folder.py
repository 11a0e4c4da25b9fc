"""The output folder of a run, and writing that survives a crash. A run is complete or not there.

A run works in `OUTPUT_DIR.partial`, which is renamed to `OUTPUT_DIR` when everything is written: a
run that fails leaves what stood there before as it was, and its own checkpoints, to resume from, in
`OUTPUT_DIR.partial/checkpoints` (see `checkpoints`).

A finished run lists its files in `run_files.json`, and only files that a run has listed are ever
replaced or removed. What else is in the folder (logs, notes, links) stays: then the files of the
new run are moved in one by one, `results.json` last.
"""

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.logging import records

ARGUMENTS_FILE = "training_arguments.json"
RESULTS_FILE = "results.json"
CHECKPOINTS_FOLDER = "checkpoints"
NONFINITE_FOLDER = "nonfinite"
FILES_FILE = "run_files.json"
REPORT_FILE = "report.html"
# What a run begins with, and what an export and a finished run have besides.
STARTED = (records.RUN_FILE, records.EVENTS_FILE, records.METRICS_FILE, records.SAMPLES_FILE,
           CHECKPOINTS_FOLDER, NONFINITE_FOLDER)
EXPORTED = ("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*",
            "special_tokens_map.json", "chat_template.jinja", "vocab.*", "merges.txt", "README.md",
            "adapter", "actor", "critic", "actor_ema", "data_split.json", "trained_prompts.npy",
            "score_statistics.json", records.PAIRS_FILE, REPORT_FILE, ARGUMENTS_FILE,
            RESULTS_FILE, FILES_FILE)


class RunFolder:
    """The output folder of a run; without `--output_dir`, nothing is saved.

    Args:
        overwrite: whether a finished run in it may be replaced, once this one is complete. A model
            there that no run has listed is set aside.
        resume: whether to keep what an unfinished run has left in it.
        dry: make nothing: the run ends before it writes.

    Attributes:
        final: `output_dir`, links followed, where the run is once it is complete; None saves
            nothing.
        path: folder to write to until then; None saves nothing.

    Raises:
        UserError: the folder holds another run or a model, is not writable, or is in use by another
            process.
        TrainingStopped: the run to resume has finished.
    """

    def __init__(
        self, output_dir: str | None, *, overwrite: bool = False, resume: bool = False,
        dry: bool = False,
    ) -> None:
        self.final = Path(output_dir).resolve() if output_dir else None
        self.path = self.final.with_name(f"{self.final.name}.partial") if self.final else None
        if self.final is None or self.path is None:
            return
        if self.final.exists() and not self.final.is_dir():
            raise UserError(f"--output_dir {output_dir}: is a file; give a folder")
        if resume and not overwrite and (self.final / RESULTS_FILE).exists():
            raise TrainingStopped(
                f"--output_dir {output_dir}: this run has finished, there is nothing to resume",
                code=0,
            )
        there = _names(self.final, *STARTED, *EXPORTED)
        if there and not overwrite:
            raise UserError(
                f"--output_dir {output_dir}: holds a run or a model ({there[0]}); give another "
                "folder, or --overwrite_output_dir to replace it"
            )
        if _names(self.path, "[!.]*") and not _names(self.path, *STARTED):
            raise UserError(f"--output_dir {output_dir}: {self.path} is where the run would be "
                            "written, and holds other files; move them, or give another folder")
        kept = self.path / CHECKPOINTS_FOLDER
        if not (resume or overwrite) and any(kept.glob("step-*")):
            raise UserError(
                f"--output_dir {output_dir}: {kept} has checkpoints of an unfinished run; "
                "--resume_from_checkpoint latest resumes it, --overwrite_output_dir starts over"
            )
        # Every rank has looked before rank 0 changes anything.
        distributed.barrier()
        if distributed.is_main() and not dry:
            self._make(self.path, output_dir, keep=resume)
        distributed.barrier()

    def _make(self, path: Path, output_dir: str | None, keep: bool) -> None:
        """Make the folder to work in, locked against other processes."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            # The system releases it when the process ends, in whatever way.
            self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
            self._lock.acquire()
            for name in [] if keep else _names(path, *STARTED, *EXPORTED):
                _remove(path / name)
            (path / ".writable").touch()
            (path / ".writable").unlink()
        except Timeout:
            raise UserError(f"--output_dir {output_dir}: another process is writing there; wait "
                            "for it, or give another folder") from None
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: cannot be written ({error.strerror}); "
                            "give a folder that can") from error

    def release(self) -> None:
        """Allow other processes to write to the folder."""
        self._lock.release()

    def finish(self, arguments: dict[str, Any], results: dict[str, Any]) -> None:
        """Write the resolved arguments and the results, and give the folder its final name."""
        if self.path is not None and self.final is not None and distributed.is_main():
            write_json(self.path / ARGUMENTS_FILE, arguments)
            write_json(self.path / RESULTS_FILE, results)
            files = [*_files(self.path), FILES_FILE, REPORT_FILE]
            write_json(self.path / FILES_FILE, {"files": sorted(set(files))})
            self._publish(self.path, self.final)
            self.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
            console.say(f"saved to {self.final}")
        elif self.final is None:
            console.say("nothing is saved: no --output_dir was given")
        distributed.barrier()

    def _publish(self, source: Path, target: Path) -> None:
        """Put the run in its place, and leave there what no run has listed."""
        listed, there = _listed(target), _files(target)
        others = [name for name in there if name not in listed]
        if others and not listed and _names(target, *STARTED, *EXPORTED):
            aside = unused(target)
            os.rename(target, aside)
            console.say(f"what was in {target} is kept in {aside}")
            others = []
        if not others:
            replace_folder(source, target)
            return
        for name in (RESULTS_FILE, *listed):
            if name in listed:
                (target / name).unlink(missing_ok=True)
        for name in sorted(_files(source), key=lambda name: name == RESULTS_FILE):
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                os.rename(place, unused(place))
            os.replace(source / name, place)
        sync_folder(target)
        shutil.rmtree(source)  # folders that are empty now


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target`; a folder of that name is removed only after that."""
    old = unused(target)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def unused(path: Path) -> Path:
    """Return a path beside this one that nothing has: `NAME.old-1`, `NAME.old-2`, …"""
    names = (path.with_name(f"{path.name}.old-{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def _names(folder: Path, *patterns: str) -> list[str]:
    """Return the names in a folder that match one of the patterns; none if it does not exist."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _files(folder: Path) -> list[str]:
    """Return the paths of all files and links below a folder, relative to it."""
    return [str(Path(root, name).relative_to(folder)) for root, folders, names in os.walk(folder)
            for name in [*names, *(one for one in folders if Path(root, one).is_symlink())]]


def _listed(folder: Path) -> set[str]:
    """Return the files that the finished run in a folder has listed."""
    try:
        return set(json.loads((folder / FILES_FILE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file and force it to the disk."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk: files just made, renamed or removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as indented JSON."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_durably(path, lambda file: file.write(text.encode()))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON record.

    Raises:
        UserError: `what` and the path, if the file is missing or broken.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {path} is missing or broken") from error
