"""What run folders hold, read for a report: finished steps, and those that still run or failed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.logging import records
from alpaca_rlhf.utils.run import run_folder

Rows = list[dict[str, Any]]
# Arguments in which runs of one setting may differ: seed, folders, what is shown and kept.
OWN_TO_A_RUN = {
    "seed", "output_dir", "overwrite_output_dir", "data_output_path", "logging_dir", "tracker",
    "actor_model_name_or_path", "critic_model_name_or_path", "preprocessing_num_workers",
    "enable_tensorboard", "print_answers", "print_answers_interval", "log_samples_steps",
    "stop_on_alarm", "save_steps", "save_total_limit", "resume_from_checkpoint",
}
TITLES = {1: "Supervised fine-tuning", 2: "Reward model", 3: "PPO"}


@dataclass(frozen=True)
class Step:
    """One step of a run: everything its folder says, empty where it says nothing.

    Attributes:
        number: 1, 2 or 3.
        folder: of the step.
        metrics, events, samples, pairs: rows of the files of `records`.
        results, arguments, start: records; `results` is empty while the step is not finished.
    """

    number: int
    folder: Path
    metrics: Rows = field(default_factory=list)
    events: Rows = field(default_factory=list)
    samples: Rows = field(default_factory=list)
    pairs: Rows = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> dict[str, float]:
        """Measured before the training."""
        return self.results.get("before", {})

    @property
    def after(self) -> dict[str, float]:
        """Measured after the training."""
        return self.results.get("after", {})

    @property
    def dialogues(self) -> Rows:
        """Held-out prompts, with the records of both policies' replies."""
        return self.results.get("dialogues", [])

    @property
    def alarms(self) -> Rows:
        """The events that are alarms."""
        return [event for event in self.events if event.get("alarm")]


@dataclass(frozen=True)
class Run:
    """A folder and the steps found in it, by number."""

    folder: Path
    steps: dict[int, Step]

    @property
    def name(self) -> str:
        """What it is called in tables: of a single step, with the folder above."""
        alone = any(step.folder == self.folder for step in self.steps.values())
        return f"{self.folder.parent.name}/{self.folder.name}" if alone else self.folder.name

    def setting(self) -> dict[str, Any]:
        """Arguments of all steps, without what is a run's own."""
        return {
            f"step {number}: {name}": value for number, step in self.steps.items()
            for name, value in step.arguments.items() if name not in OWN_TO_A_RUN
        }


def read_run(folder: Path) -> Run:
    """A step's folder, or one that holds folders of steps, as run_pipeline.sh leaves it.

    Raises:
        UserError: there is neither.
    """
    folder = folder.absolute()
    if _is_step(folder):
        step = read_step(folder)
        return Run(folder, {step.number: step})
    steps: dict[int, Step] = {}
    inside = folder.iterdir() if folder.is_dir() else iter(())
    # A folder in the making comes last: what is finished is shown in its place.
    for path in sorted(filter(_is_step, inside), key=lambda p: (p.suffix == ".partial", p)):
        step = read_step(path)
        steps.setdefault(step.number, step)
    if not steps:
        raise UserError(f"{folder}: no run is there (no {records.METRICS_FILE}, here or in a "
                        "folder below); give the --output_dir of a step, or of run_pipeline.sh")
    return Run(folder, dict(sorted(steps.items())))


def _is_step(path: Path) -> bool:
    return (path / records.METRICS_FILE).is_file()


def read_step(folder: Path) -> Step:
    """What one step has left in its folder, or left so far."""
    metrics = records.read_rows(folder / records.METRICS_FILE)
    results = _record(folder / run_folder.RESULTS_FILE)
    return Step(
        number=results.get("step") or _number(metrics),
        folder=folder,
        metrics=metrics,
        events=records.read_rows(folder / records.EVENTS_FILE),
        samples=records.read_rows(folder / records.SAMPLES_FILE),
        pairs=records.read_rows(folder / records.PAIRS_FILE),
        results=results,
        arguments=_record(folder / run_folder.ARGUMENTS_FILE),
        start=_record(folder / records.RUN_FILE),
    )


def _number(metrics: Rows) -> int:
    """Which step it is, told by what it measures."""
    names = set(metrics[0]) if metrics else set()
    return 3 if "kl/k1" in names else 2 if "accuracy" in names else 1


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of one setting together; each group is named by what sets it apart."""
    settings = [run.setting() for run in runs]
    # An argument that a run does not know (of an older version, say) does not set it apart.
    known = [name for name in settings[0] if all(name in setting for setting in settings)]
    telling = [name for name in known if len({_text(s[name]) for s in settings}) > 1]
    found: dict[str, list[Run]] = {}
    for run, setting in zip(runs, settings, strict=True):
        parts = [f"{name.split(': ')[1]} {_text(setting[name])}" for name in telling]
        found.setdefault(", ".join(dict.fromkeys(parts)), []).append(run)
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
