"""Optimizer steps with a non-finite loss or gradient: skipped, counted, their batches saved."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.run.run_folder import NONFINITE_FOLDER, write_durably

MAX_FILES = 10  # of a run: more would show nothing new, and fill the disk


class NonFiniteGuard:
    """Count the skipped optimizer steps, and abort after too many consecutive ones.

    The batches go to `nonfinite/` in `folder`, that of the run; None saves none. `remedy` is advice
    for the error line.
    """

    def __init__(self, folder: Path | None, max_consecutive: int, remedy: str) -> None:
        self._folder = folder and folder / NONFINITE_FOLDER
        self._max = max_consecutive
        self._remedy = remedy
        self.skipped = 0
        self._consecutive = 0

    def state_dict(self) -> dict[str, int]:
        """Return the counts."""
        return {"skipped": self.skipped, "in_a_row": self._consecutive}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the counts."""
        self.skipped, self._consecutive = state["skipped"], state["in_a_row"]

    @property
    def at_first_skip(self) -> bool:
        """True if the last step was the first of the run to be skipped: a checkpoint is due."""
        return self.skipped == self._consecutive == 1

    def step_taken(self) -> None:
        """Note that a step was finite."""
        self._consecutive = 0

    def skip(self, step: int, micro_batches: Sequence[Any], random_state: Tensor) -> None:
        """Count a skipped step and save its batch; all ranks must call it together.

        Args:
            step: optimizer steps so far, this one included.
            micro_batches: dataclasses of tensors, of this rank.
            random_state: torch's, before the step.

        Raises:
            FloatingPointError: too many consecutive steps were skipped.
        """
        self.skipped += 1
        self._consecutive += 1
        path = self._save(step, micro_batches, random_state)
        console.say(
            f"warning: non-finite loss or gradient in step {step}, which is skipped"
            + (f"; its batch is saved in {path}" if path else "")
        )
        if self._consecutive >= self._max:
            raise FloatingPointError(
                f"non-finite loss or gradient in {self._consecutive} consecutive optimizer steps "
                f"(--max_skipped_steps {self._max}); {self._remedy}"
            )

    def _save(self, step: int, micro_batches: Sequence[Any], random_state: Tensor) -> Path | None:
        if self._folder is None or self.skipped > MAX_FILES:
            return None
        tensors = [_tensors(batch) for batch in micro_batches]
        ranks = distributed.gather_rows([{"micro_batches": tensors, "random_state": random_state}])
        path, written = self._folder / f"step-{step:08d}.pt", True
        if distributed.is_main():
            try:
                path.parent.mkdir(exist_ok=True)
                write_durably(path, lambda file: torch.save({"step": step, "ranks": ranks}, file))
            except (OSError, RuntimeError) as error:
                console.say(f"warning: {path} cannot be written: {error}")
                written = False
        distributed.barrier()
        return path if written else None


def _tensors(batch: Any) -> dict[str, Any]:
    """Return a dataclass of tensors, and of such dataclasses, as plain dicts on the CPU."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {
        name: value.cpu() if isinstance(value, Tensor) else _tensors(value)
        for name, value in values.items() if value is not None
    }
