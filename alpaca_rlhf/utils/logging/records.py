"""Files in a run's folder that record its progress: their names, reading and writing.

    metrics.jsonl      a row of numbers for each optimizer step (step 3: each PPO iteration)
    events.jsonl       alarms and checkpoints: step, kind, message
    samples.jsonl      step 3: a few rollouts, with numbers for each token
    pair_scores.jsonl  step 2: score and length of both responses of each held-out pair
    run.json           start of the run: time, device, ranks, versions

They exist from the start of the run (in OUTPUT_DIR.partial); the report reads them.
"""

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alpaca_rlhf import __version__
from alpaca_rlhf.utils import distributed

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SAMPLES_FILE = "samples.jsonl"
PAIRS_FILE = "pair_scores.jsonl"
RUN_FILE = "run.json"

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "datasets", "accelerate")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; no file gives no rows, and an incomplete last line is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for row in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(row))
        except ValueError:
            break
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file, replacing an old one."""
    path.write_text("".join(map(line, rows)), encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def truncate(path: Path, step: int) -> None:
    """Remove the rows of a JSONL file after `step`, and the file if none are left."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if rows:
        write_rows(path, rows)
    else:
        path.unlink(missing_ok=True)


def start_record() -> dict[str, Any]:
    """Return time, device, number of ranks and versions at the start of a run."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": distributed.describe_devices(),
        "ranks": distributed.world_size(),
        "versions": {
            "Python": platform.python_version(), "alpaca-rlhf": __version__,
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
        },
    }
