"""The small files beside a run's weights that tell what happened: their names and their form.

    metrics.jsonl      a row of numbers for each optimizer step (step 3: each round)
    events.jsonl       alarms and checkpoints: step, kind, message
    samples.jsonl      step 3: a few rollouts, with a number for each token
    pair_scores.jsonl  step 2: score and length of both replies of each held-out pair
    run.json           when and on what the run started: versions, device, ranks

All are there while the run goes on (in OUTPUT_DIR.partial); `report` reads them.
"""

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alpaca_rlhf.utils import distributed

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SAMPLES_FILE = "samples.jsonl"
PAIRS_FILE = "pair_scores.jsonl"
RUN_FILE = "run.json"

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "datasets", "accelerate")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none if there is no file. A last line cut short is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSONL file, anew."""
    path.write_text("".join(line(row) for row in rows), encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """A row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def keep_until(path: Path, step: int) -> None:
    """Cut a JSONL file to its rows up to `step`; where that leaves none, there is no file."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if rows:
        write_rows(path, rows)
    else:
        path.unlink(missing_ok=True)


def start_record() -> dict[str, Any]:
    """When this run started, and on what."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": distributed.describe_devices(),
        "ranks": distributed.world_size(),
        "versions": {"Python": platform.python_version(),
                     **{name: _version(name) for name in ("alpaca-rlhf", *LIBRARIES)}},
    }


def _version(name: str) -> str:
    if name == "alpaca-rlhf":
        from alpaca_rlhf import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
