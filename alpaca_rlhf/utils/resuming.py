"""How a run saves checkpoints and what it goes on from, as the flags have it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Resuming:
    """What `resume` is to do.

    Attributes:
        step: of RLHF: 1, 2 or 3.
        config: the resolved arguments.
        output_dir: of the run; None saves nothing.
        overwrite: whether what stands there may be replaced.
        save_steps: optimizer steps between checkpoints; 0: none by number.
        limit: checkpoints that are kept.
        origin: `latest`, the folder of a checkpoint, or None.
        replay: a file of an update to take again, or None.
        allow_changes: whether arguments that change the result may have changed.
        moved: a checkpoint's arguments -> whether its ZeRO stages were others.
        changed: a checkpoint's arguments, its ranks, ranks now -> lines on what has changed.
    """

    step: int
    config: dict[str, Any]
    output_dir: str | None
    overwrite: bool
    save_steps: int
    limit: int
    origin: str | None
    replay: str | None
    allow_changes: bool
    moved: Callable[[dict[str, Any]], bool]
    changed: Callable[[dict[str, Any], int, int], list[str]]
