"""report.html: one file that opens offline, on a phone too, with nothing to load.

What models wrote is untrusted: the template escapes all of it, and the page's policy lets no script
run but its own.
"""

import base64
import hashlib
import statistics
import time
from datetime import timedelta
from itertools import chain, cycle
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alpaca_rlhf.evaluation.report import plots, summary
from alpaca_rlhf.evaluation.report.runs import TITLES, Rows, Run, Step, groups, read_run
from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.run.run_folder import REPORT_FILE

# Shown at most: dialogues, rollouts of an iteration, tokens of a rollout, characters of a text.
LIMITS = {"dialogues": 24, "samples": 2, "tokens": 400, "characters": 3000}
CHANNELS = ("logprob", "kl", "value", "advantage", "reward")  # numbers of a response token


class Table(NamedTuple):
    """A table; of several settings, with the arguments and the colour of one."""

    head: list[str]
    rows: list[list[Any]]
    setting: str = ""
    colour: str = ""


def write_beside(folder: Path | None) -> None:
    """Write the report of a finished step into its folder; on failure print a warning.

    All ranks must call it.
    """
    if folder is not None and distributed.is_main():
        try:
            console.say(f"report: {write([read_run(folder)], folder / REPORT_FILE)}")
        except Exception as error:  # the training is done and saved: nothing may spoil that
            console.say(f"warning: no report.html was written ({type(error).__name__}: {error})")
    distributed.barrier()


def write(runs: list[Run], target: Path) -> Path:
    """Write the report of one run, or the comparison of several, as one file."""
    environment = Environment(
        loader=PackageLoader("alpaca_rlhf.evaluation.report", "."), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    script, style = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                     for name in ("report.js", "report.css"))
    html = environment.get_template("report.html.j2").render(
        _content(runs), script=Markup(script), style=Markup(style),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        created=time.strftime("%Y-%m-%d %H:%M"), channels=CHANNELS, most=LIMITS,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    return target


def _content(runs: list[Run]) -> dict[str, Any]:
    """Return what the template shows of one run, or of several runs side by side."""
    settings, alone = groups(runs), len(runs) == 1
    steps = [(TITLES[number] if alone else f"{run.name}, {TITLES[number]}", step)
             for run in runs for number, step in run.steps.items()]
    if alone:
        tables = [Table(summary.HEAD, summary.rows(runs[0]))]
    else:
        tables = [_comparison(members, setting, colour) for (setting, members), colour
                  in zip(settings.items(), cycle(plots.COLOURS), strict=False)]
    note = "" if alone else ": mean and range of each setting"
    single = steps if alone else []
    ppo = runs[0].steps.get(3) if alone else None
    return {
        "title": runs[0].name if alone else f"{len(runs)} runs",
        "verdict": summary.verdict(runs[0]) if alone else "",
        "tables": tables,
        "alarms": [(name, event) for name, step in steps for event in step.alarms],
        "sections": [
            (TITLES[number] + note, plots.of_step([[run.steps[number] for run in members]
                                                   for members in settings.values()]))
            for number in TITLES if all(number in run.steps for run in runs)],
        "samples": _samples(ppo.samples) if ppo else [],
        "dialogues": ppo.dialogues if ppo else [],
        "costs": [[name, *_cost(step)] for name, step in steps if step.metrics],
        "environment": _environment({name: step.start for name, step in single if step.start}),
        "arguments": {name: step.arguments for name, step in single if step.arguments},
    }


def _comparison(runs: list[Run], setting: str, colour: str) -> Table:
    """Return a row for each measure and a column for each run of a setting, and their mean."""
    measured = [{one.title: one for one in summary.measures(run)} for run in runs]
    several = len(runs) > 1
    rows = []
    for title in dict.fromkeys(chain.from_iterable(measured)):
        found = [column.get(title, summary.Measure(title)) for column in measured]
        row = [title, *(f"{summary.decimal(one.before)} → {summary.decimal(one.after)}"
                        for one in found)]
        after = [one.after for one in found if one.after is not None]
        if several:
            row.append(f"{statistics.mean(after):.3f} ± {statistics.stdev(after):.3f}"
                       if len(after) == len(runs) else "-")
        rows.append(row)
    head = ["", *(run.name for run in runs), *["after, mean ± std"] * several]
    return Table(head, rows, setting, colour)


def _cost(step: Step) -> list[str]:
    """Return time, peak memory, amount and speed of a step."""
    unit, amount_of, memory_of = {
        1: ("tokens trained on", "weight", "memory_gb"),
        2: ("pairs", "weight", "memory_gb"),
        3: ("tokens generated", "throughput/tokens", "memory/peak_gb"),
    }[step.number]
    seconds = step.metrics[-1].get("time/elapsed", 0.0)
    amount = sum(row.get(amount_of, 0) for row in step.metrics)
    memory = max(row.get(memory_of, 0.0) for row in step.metrics)
    return [str(timedelta(seconds=round(seconds))), f"{memory:.2f} GB", f"{amount:,.0f} {unit}",
            f"{amount / seconds:,.0f} per second" if seconds else "-"]


def _environment(starts: dict[str, dict[str, Any]]) -> Table:
    """Return when and on what each step ran, a column per step."""
    facts = [{**start, **start["versions"]} for start in starts.values()]
    names = [name for name in dict.fromkeys(chain.from_iterable(facts)) if name != "versions"]
    return Table(["", *starts], [[name, *(one.get(name, "-") for one in facts)] for name in names])


def _samples(rows: Rows) -> Rows:
    """Return a few rollouts of the first recorded PPO iteration and of the last."""
    iterations = sorted({row["step"] for row in rows})
    shown = [[row for row in rows if row["step"] == number][: LIMITS["samples"]]
             for number in dict.fromkeys([*iterations[:1], *iterations[-1:]])]
    return list(chain.from_iterable(shown))
