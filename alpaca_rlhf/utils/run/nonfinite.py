"""Updates whose loss or gradient is not finite: skipped, counted, and kept to be taken again."""

import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.errors import UserError

FOLDER = "nonfinite"
MOST_FILES = 10  # of a run: those after it tell nothing new, and fill the disk

Update = Callable[[list[Any]], dict[str, float] | None]
Loss = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


class Faults:
    """Counts the updates that were skipped, and ends the run when there are too many in a row.

    Args:
        folder: of the run; the batches go to its `nonfinite/`. None keeps none.
        most_in_a_row: so many skipped updates in a row end the run.
        remedy: what the user can do about it.
    """

    def __init__(self, folder: Path | None, most_in_a_row: int, remedy: str) -> None:
        self._folder = folder and folder / FOLDER
        self._most = most_in_a_row
        self._remedy = remedy
        self.skipped = 0
        self._in_a_row = 0
        self._first = False

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def was_first(self) -> bool:
        """Once after the first skipped update of a run: a checkpoint for its replay is due."""
        first, self._first = self._first, False
        return first

    def none(self) -> None:
        """An update was taken."""
        self._in_a_row = 0

    def skip(self, step: int, micro_batches: Sequence[Any], random_state: Tensor) -> None:
        """An update was skipped; all ranks must call it together.

        Args:
            step: optimizer steps taken, this one included.
            micro_batches: of this rank: dataclasses of tensors.
            random_state: torch's, before the update.

        Raises:
            FloatingPointError: too many in a row.
        """
        self.skipped += 1
        self._in_a_row += 1
        self._first = self.skipped == 1
        kept = self._keep(step, micro_batches, random_state)
        console.say(
            f"warning: the loss or the gradient of step {step} is not finite; the step is skipped"
            + (f"; --replay {kept} takes it again" if kept else "")
        )
        if self._in_a_row >= self._most:
            raise FloatingPointError(
                f"{self._in_a_row} updates in a row were not finite "
                f"(--max_skipped_steps {self._most}); {self._remedy}"
            )

    def _keep(
        self, step: int, micro_batches: Sequence[Any], random_state: Tensor
    ) -> Path | None:
        if self._folder is None or self.skipped > MOST_FILES:
            return None
        record = {
            "micro_batches": [_tensors(batch) for batch in micro_batches],
            "random_state": random_state,
        }
        ranks = distributed.gather_rows([record])
        path = self._folder / f"step-{step:08d}.pt"
        if distributed.is_main():
            try:
                path.parent.mkdir(exist_ok=True)
                with path.open("wb") as file:
                    torch.save({"step": step, "ranks": ranks}, file)
            except (OSError, RuntimeError) as error:
                console.say(f"warning: {path} can not be written: {error}")
                return None
        return path


def _tensors(batch: Any) -> dict[str, Any]:
    """A dataclass of tensors, and of such dataclasses, as plain dicts on the CPU."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {
        name: value.cpu() if isinstance(value, Tensor) else _tensors(value)
        for name, value in values.items() if value is not None
    }


def _on_device(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _on_device(value) if isinstance(value, dict) else value.to(distributed.device())
        for name, value in tensors.items()
    }


def checkpoint_of(path: str) -> Path | None:
    """The checkpoint with the weights of a skipped update, if there is one.

    A skipped update leaves the weights as they were, and the run saves them after its first.
    """
    file = Path(path)
    folder = file.parent.parent / "checkpoints" / file.stem
    return folder if folder.is_dir() else None


def replay(
    path: str, made: Callable[..., Any], losses: dict[str, Loss], update: Update
) -> None:
    """Take a skipped update again, saying what of it is not finite.

    Args:
        path: the file that `Faults.skip` wrote.
        made: fields of a micro-batch -> the micro-batch.
        losses: of each trained model: what is computed from a micro-batch.
        update: takes the step.

    Raises:
        UserError: no such file, or it is of another step.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        rank, world, ranks = distributed.rank(), distributed.world_size(), record["ranks"]
        mine = [ranks[rank]] if world == len(ranks) else ranks
        batches = [made(**_on_device(one)) for part in mine for one in part["micro_batches"]]
    except FileNotFoundError:
        raise UserError(f"--replay {path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(f"--replay {path}: holds more than data, or is damaged, and is not "
                        "read; give a file of nonfinite/") from None
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--replay {path}: is no update of this step ({reason})") from error
    console.say(f"replay: step {record['step']}, {len(batches)} micro-batch(es) of "
                    f"{len(ranks)} rank(s)")
    torch.set_rng_state(mine[0]["random_state"])
    for number, batch in enumerate(batches):
        for name, loss in losses.items():
            with torch.no_grad():
                value = loss(batch)[0].item()
            console.say(f"replay: micro-batch {number}: {name}: sum of losses {value:.6g}")
    torch.set_rng_state(mine[0]["random_state"])
    result = update(batches)
    said = "not finite again, skipped" if result is None else ", ".join(
        f"{name} {value:.6g}" for name, value in result.items()
    )
    console.say(f"replay: the update: {said}")
