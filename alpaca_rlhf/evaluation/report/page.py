"""report.html: one file that opens offline, on a phone too, with nothing to load.

What models wrote is untrusted: the template escapes all of it, and the page's policy lets no script
run but its own.
"""

import base64
import hashlib
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alpaca_rlhf.evaluation.report import plots, summary
from alpaca_rlhf.evaluation.report.runs import TITLES, Run, Step, groups, read_run
from alpaca_rlhf.utils import console, distributed

REPORT_FILE = "report.html"
DIALOGUES = 24
SAMPLES = 2  # shown of the first recorded round, and of the last
TOKENS, CHARACTERS = 400, 3000  # shown of a sample and of a text, at most
CHANNELS = ("mask", "logprob", "kl", "value", "advantage", "reward")


def write_beside(folder: Path | None) -> None:
    """The report of a finished step, into its folder; a report that fails costs one line."""
    if folder is None or not distributed.is_main():
        return
    try:
        target = write([read_run(folder)], folder / REPORT_FILE)
    except Exception as error:  # the training is done and saved: nothing may spoil that
        console.say(f"warning: no report.html was written ({type(error).__name__}: {error})")
    else:
        console.say(f"report: {target}")


def write(runs: list[Run], target: Path) -> Path:
    """Write the report of one run, or the comparison of several.

    Raises:
        UserError: runs that are compared have no step in common.
    """
    context = _one(runs[0]) if len(runs) == 1 else _several(runs)
    environment = Environment(
        loader=PackageLoader("alpaca_rlhf.evaluation.report", "."), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    script, style = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                     for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = environment.get_template("report.html.j2").render(
        script=Markup(script), style=Markup(style), digest=digest,
        characters=CHARACTERS, created=time.strftime("%Y-%m-%d %H:%M"), **context,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    return target


def _one(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    ppo = run.steps.get(3)
    return {
        "title": run.name,
        "verdict": summary.verdict(ppo) if ppo and ppo.after else "",
        "head": ["", "before", "after", ""],
        "rows": summary.rows(run),
        "comparisons": [],
        "alarms": list(_alarms([run])),
        "sections": [
            {"id": f"step{number}", "title": TITLES[number],
             "plots": plots.of_step(step, f"s{number}")}
            for number, step in run.steps.items()
        ],
        "samples": _samples(ppo) if ppo else [],
        "channels": CHANNELS,
        "dialogues": ppo.dialogues[:DIALOGUES] if ppo else [],
        "dialogues_in_all": len(ppo.dialogues) if ppo else 0,
        "cost": _cost([run]),
        "arguments": [(TITLES[number], sorted(step.arguments.items()))
                      for number, step in run.steps.items() if step.arguments],
        "versions": _versions(run),
    }


def _several(runs: list[Run]) -> dict[str, Any]:
    """What the template shows of several runs side by side."""
    common = [number for number in TITLES if all(number in run.steps for run in runs)]
    grouped = groups(runs)
    return {
        "title": f"{len(runs)} runs",
        "verdict": "",
        "head": [],
        "rows": [],
        "comparisons": [
            {"label": label, "colour": plots.COLOURS[i % len(plots.COLOURS)],
             **_comparison(members)}
            for i, (label, members) in enumerate(grouped.items())
        ],
        "alarms": list(_alarms(runs)),
        "sections": [
            {"id": f"step{number}", "title": f"{TITLES[number]}: mean and range of the runs"
             + (" of each setting" if len(grouped) > 1 else ""),
             "plots": plots.of_runs(runs, number)}
            for number in common
        ],
        "samples": [], "channels": CHANNELS, "dialogues": [], "dialogues_in_all": 0,
        "cost": _cost(runs),
        "arguments": [], "versions": [],
    }


def _comparison(runs: list[Run]) -> dict[str, Any]:
    """A row for each measure and a column for each run; of several also mean and deviation."""
    tables = [{row[0]: row[1:3] for row in summary.rows(run)} for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    several = len(runs) > 1
    rows = []
    for name in names:
        cells = [table.get(name, ["-", "-"]) for table in tables]
        mean = [_mean_and_deviation([after for _, after in cells])] if several else []
        rows.append([name, *(f"{before} → {after}" for before, after in cells), *mean])
    return {"head": ["", *(run.name for run in runs), *["after, mean ± deviation"] * several],
            "rows": rows}


def _mean_and_deviation(cells: list[str]) -> str:
    if "-" in cells:
        return "-"
    values = [float(cell) for cell in cells]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def _alarms(runs: list[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        for number, step in run.steps.items():
            for event in step.alarms:
                where = f"{TITLES[number]}, step {event['step']}"
                yield {"where": where if len(runs) == 1 else f"{run.name}, {where}",
                       "kind": event["kind"], "message": event["message"]}


def _cost(runs: list[Run]) -> list[list[str]]:
    """Name, time, memory, amount and speed of each step."""
    return [
        [TITLES[number] if len(runs) == 1 else f"{run.name}: {TITLES[number]}", *_step_cost(step)]
        for run in runs for number, step in run.steps.items() if step.metrics
    ]


def _step_cost(step: Step) -> list[str]:
    def column(*names: str) -> list[float]:
        return [row[name] for row in step.metrics for name in names if name in row]

    seconds = max(column("time/elapsed"), default=0.0)
    memory = max(column("memory_gb", "memory/peak_gb"), default=0.0)
    amount = sum(column("weight", "throughput/tokens"))
    unit = {1: "tokens trained on", 2: "pairs", 3: "tokens generated"}[step.number]
    return [
        _duration(seconds) if seconds else "-", f"{memory:.2f} GB",
        f"{amount:,.0f} {unit}" if amount else "-",
        f"{amount / seconds:,.0f} a second" if amount and seconds else "-",
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _versions(run: Run) -> list[tuple[str, dict[str, str]]]:
    """On what each step ran; steps that ran on the same are named together."""
    found: dict[str, tuple[list[str], dict[str, str]]] = {}
    for number, step in run.steps.items():
        if step.start:
            facts = {"device": step.start["device"], "ranks": str(step.start["ranks"]),
                     **step.start["versions"]}
            found.setdefault(str(facts), ([], facts))[0].append(
                f"{TITLES[number]} (started {step.start['started']})")
    return [(", ".join(titles), facts) for titles, facts in found.values()]


def _samples(step: Step) -> list[dict[str, Any]]:
    """Some rollouts of the first recorded round and of the last, token by token."""
    rounds = sorted({row["step"] for row in step.samples})
    shown = []
    for number in dict.fromkeys([*rounds[:1], *rounds[-1:]]):
        rows = [row for row in step.samples if row["step"] == number]
        shown += [{**row, "cells": list(islice(_cells(row["tokens"]), TOKENS)),
                   "more": max(0, len(row["tokens"]["text"]) - TOKENS)} for row in rows[:SAMPLES]]
    return shown


def _cells(tokens: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Each token: what is shown for it, and its numbers (of a token of the prompt, the mask)."""
    first = tokens["mask"].index(1) if 1 in tokens["mask"] else len(tokens["mask"])
    for i, (text, mask) in enumerate(zip(tokens["text"], tokens["mask"], strict=True)):
        numbers = {"mask": mask}
        if mask:
            numbers |= {name: tokens[name][i - first] for name in CHANNELS[1:]}
        said = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        yield {"text": _visible(text), "numbers": numbers, "said": said}


def _visible(text: str) -> str:
    """A token's text with what can not be seen made visible."""
    return text.replace("\n", "⏎\n") if text else "∅"
