"""Run folders, read for a report: finished steps, and steps that still run or failed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from alpaca_rlhf.utils import configs
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.logging import records
from alpaca_rlhf.utils.run import run_folder

Rows = list[dict[str, Any]]
# Runs of one setting may differ in these arguments, and in those that do not change a result.
OWN_TO_A_RUN = ("seed", "actor_model_name_or_path", "critic_model_name_or_path")
TITLES = {1: "Supervised fine-tuning", 2: "Reward model", 3: "PPO"}


class Step:
    """One step of a run: all that its folder holds so far, and nothing where it holds nothing.

    Attributes:
        metrics, events, samples, pairs: rows of the files of `records`; alarms are events.
        start: when and on what the step started.
        before, after: measured on held-out data before and after the training.
        dialogues: held-out prompts, each with a response of both policies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = records.read_rows(folder / records.METRICS_FILE)
        self.events = records.read_rows(folder / records.EVENTS_FILE)
        self.alarms = [event for event in self.events if event["alarm"]]
        self.samples = records.read_rows(folder / records.SAMPLES_FILE)
        self.pairs = records.read_rows(folder / records.PAIRS_FILE)
        self.arguments = _read_object(folder / run_folder.ARGUMENTS_FILE)
        self.start = _read_object(folder / records.RUN_FILE)
        results = _read_object(folder / run_folder.RESULTS_FILE)
        self.finished = bool(results)
        self.before: dict[str, float] = results.get("before", {})
        self.after: dict[str, float] = results.get("after", {})
        self.dialogues: Rows = results.get("dialogues", [])
        measured = self.metrics[0] if self.metrics else {}
        unfinished = 3 if "kl/k1" in measured else 2 if "accuracy" in measured else 1
        self.number: int = results.get("step", unfinished)


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file, or it is not fully written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class Run(NamedTuple):
    """A folder and the steps found in it, by number."""

    folder: Path
    steps: dict[int, Step]

    @property
    def name(self) -> str:
        """Name of the folder; for the folder of a single step, with its parent's."""
        alone = any(step.folder == self.folder for step in self.steps.values())
        return f"{self.folder.parent.name}/{self.folder.name}" if alone else self.folder.name

    def setting(self) -> dict[str, Any]:
        """Return the arguments of all steps but for those in which runs of a setting may differ."""
        kinds = configs.on_resume()
        return {
            f"step {number}: {name}": value for number, step in self.steps.items()
            for name, value in step.arguments.items()
            if kinds.get(name) != "free" and name not in OWN_TO_A_RUN
        }


def read_run(folder: Path) -> Run:
    """Read the folder of a step, or one that holds folders of steps, as run_pipeline.sh writes it.

    Raises:
        UserError: there is neither.
    """
    folder = folder.absolute()
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in (folder, *inside) if (path / records.METRICS_FILE).is_file()]
    if not found:
        raise UserError(f"{folder}: no run found (no {records.METRICS_FILE}, here or in a folder "
                        "below); give the --output_dir of a step, or of run_pipeline.sh")
    if folder in found:
        found = [folder]
    # Finished folders come last, so that they replace an unfinished one of the same step.
    found.sort(key=lambda path: path.suffix != ".partial")
    steps = {step.number: step for step in map(Step, found)}
    return Run(folder, dict(sorted(steps.items())))


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Group runs by setting; the name of a group lists the arguments in which settings differ."""
    settings = [run.setting() for run in runs]
    # An argument that a run does not have (an older version's, say) does not set it apart.
    shared = [name for name in settings[0] if all(name in setting for setting in settings)]
    differing = [name for name in shared if len({_text(s[name]) for s in settings}) > 1]
    found: dict[str, list[Run]] = {}
    for run, setting in zip(runs, settings, strict=True):
        parts = [f"{name.split(': ')[1]} {_text(setting[name])}" for name in differing]
        found.setdefault(", ".join(dict.fromkeys(parts)), []).append(run)
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
