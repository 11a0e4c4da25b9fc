"""The output folder of a run, and writing that survives a crash. A run is complete or not there.

A run works in `OUTPUT_DIR.partial`, which is renamed to `OUTPUT_DIR` when everything is written: a
run that fails leaves what stood there before as it was, and its own checkpoints, to resume from, in
`OUTPUT_DIR.partial/checkpoints` (see `checkpoints`).
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.errors import TrainingStopped, UserError

ARGUMENTS_FILE = "training_arguments.json"
RESULTS_FILE = "results.json"
CHECKPOINTS_FOLDER = "checkpoints"
NONFINITE_FOLDER = "nonfinite"


class RunFolder:
    """The output folder of a run; without `--output_dir`, nothing is saved.

    Args:
        overwrite: whether a finished run in it may be replaced, once this one is complete.
        resume: whether to keep what an unfinished run has left in it.

    Attributes:
        final: `output_dir`, where the run is once it is complete; None saves nothing.
        path: folder to write to until then; None saves nothing.

    Raises:
        UserError: the folder is not empty, is not writable, or is in use by another process.
        TrainingStopped: the run to resume has finished.
    """

    def __init__(
        self, output_dir: str | None, *, overwrite: bool = False, resume: bool = False
    ) -> None:
        self.final = Path(output_dir).absolute() if output_dir else None
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
        if self.final.exists() and any(self.final.iterdir()) and not overwrite:
            raise UserError(
                f"--output_dir {output_dir}: is not empty, another run may be in it; give another "
                "folder, or --overwrite_output_dir to replace it"
            )
        kept = self.path / CHECKPOINTS_FOLDER
        if not (resume or overwrite) and any(kept.glob("step-*")):
            raise UserError(
                f"--output_dir {output_dir}: {kept} has checkpoints of an unfinished run; "
                "--resume_from_checkpoint latest resumes it, --overwrite_output_dir starts over"
            )
        # Every rank has looked before rank 0 changes anything.
        distributed.barrier()
        if distributed.is_main():
            self._make(self.path, output_dir, keep=resume)
        distributed.barrier()

    def _make(self, path: Path, output_dir: str | None, keep: bool) -> None:
        """Make the folder to work in, locked against other processes."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            # The system releases it when the process ends, in whatever way.
            self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
            self._lock.acquire()
            if not keep:
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(exist_ok=True)
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
            replace_folder(self.path, self.final)
            self.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
            console.say(f"saved to {self.final}")
        elif self.final is None:
            console.say("nothing is saved: no --output_dir was given")
        distributed.barrier()


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder to `target`; a folder of that name is removed only after that."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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
