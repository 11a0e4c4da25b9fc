"""Results of a run as text: a table, a verdict and a few dialogues."""

import textwrap
from itertools import zip_longest
from typing import Any, NamedTuple

from alpaca_rlhf.evaluation.report.runs import Run, Step
from alpaca_rlhf.utils.console import table

DIALOGUES = 3
# Success as README defines it: score up by this many standard deviations of the SFT policy's
# scores, gold up by this much.
SCORE_GAIN, GOLD_GAIN = 0.8, 0.2

HEAD = ["", "before", "after", ""]  # of the table
MEASURES = {
    1: {"perplexity": "SFT: held-out perplexity"},
    2: {"accuracy": "reward model: held-out accuracy"},
    3: {"score": "policy: score", "gold": "policy: gold",
        "length": "policy: response length, tokens", "eos": "policy: eos rate",
        "k3": "policy: KL to SFT, nats"},
}


class Measure(NamedTuple):
    """A quantity before and after a step; None where it was not measured."""

    title: str
    before: float | None = None
    after: float | None = None
    remark: str = ""


def measures(run: Run) -> list[Measure]:
    """Return what each step measured on held-out data; a line for a step that measured nothing."""
    found = []
    for number, step in run.steps.items():
        titles = MEASURES[number]
        names = [name for name in titles if name in step.after]
        found += [Measure(titles[name], step.before.get(name), step.after[name],
                          _remark(step, name)) for name in names]
        if not names:
            reason = ("nothing held out" if step.finished
                      else f"not finished: step {len(step.metrics)}")
            found.append(Measure(next(iter(titles.values())), remark=reason))
    return found


def rows(run: Run) -> list[list[str]]:
    """Return the measures of a run as rows of a table."""
    return [[one.title, decimal(one.before), decimal(one.after), one.remark]
            for one in measures(run)]


def as_text(run: Run) -> str:
    """Return the table, the verdict and a few dialogues of one run, for a console."""
    dialogues = run.steps[3].dialogues[:DIALOGUES] if 3 in run.steps else []
    parts = [f"\n{run.folder}\n" + table(HEAD, rows(run)), verdict(run), *map(_dialogue, dialogues)]
    return "\n\n".join(filter(None, parts))


def decimal(value: float | None) -> str:
    """Return a number with three decimals, or a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def _remark(step: Step, name: str) -> str:
    if name == "perplexity":
        return "base → SFT"
    if name == "accuracy":
        low, high = step.after["accuracy_low"], step.after["accuracy_high"]
        return f"95 % interval {low:.3f} to {high:.3f}"
    if name == "score":
        return f"{_score_gain(step):+.2f} standard deviations of SFT"
    return "SFT → RLHF"


def _score_gain(step: Step) -> float:
    """Return the rise of the mean score in standard deviations of the SFT policy's scores."""
    gain = step.after["score"] - step.before["score"]
    return gain / max(step.before["score_std"], 1e-6)


def verdict(run: Run) -> str:
    """Return one line on whether PPO improved the responses; empty if that was not measured."""
    step = run.steps.get(3)
    if step is None or not step.after:
        return ""
    gain = _score_gain(step)
    if "gold" not in step.after:
        return f"score up by {gain:.2f} standard deviations; no gold rule for this data"
    gold = step.after["gold"] - step.before["gold"]
    if gain >= SCORE_GAIN and gold < GOLD_GAIN / 2:
        return (f"reward hacking: score up by {gain:.2f} standard deviations, but gold by "
                f"{gold:+.3f} only; raise --kl_coef, or train the reward model on more pairs")
    met = gain >= SCORE_GAIN and gold >= GOLD_GAIN
    return (f"score up by {gain:.2f} standard deviations, gold by {gold:+.3f}: "
            f"{'target met' if met else 'below target'} (at least {SCORE_GAIN} and {GOLD_GAIN})")


def _dialogue(dialogue: dict[str, Any]) -> str:
    """Return a prompt and the responses of both policies, side by side, with their scores."""
    columns = []
    for title, record in (("SFT", dialogue["before"]), ("RLHF", dialogue["after"])):
        gold = f", gold {record['gold']:.2f}" if "gold" in record else ""
        heading = f"{title} (score {record['score']:.2f}{gold})"
        columns.append([heading, *textwrap.wrap(record["reply"] or "(nothing)", 44)])
    side_by_side = (f"  {a:46}{b}".rstrip() for a, b in zip_longest(*columns, fillvalue=""))
    return "\n".join([" ".join(dialogue["prompt"].split()), *side_by_side])
