"""Plots of a report, drawn with matplotlib: each is an SVG element of the page.

Text stays text, and ids are unique across the page, since all plots are in one document.
"""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from alpaca_rlhf.evaluation import statistics
from alpaca_rlhf.evaluation.report.runs import Rows, Run, Step, groups
from alpaca_rlhf.evaluation.statistics import Array, Figures
from alpaca_rlhf.utils.errors import UserError

SFT_COLOUR, RLHF_COLOUR, ALARM_COLOUR = "#64748b", "#0f766e", "#b91c1c"
INK, GREY = "#0f172a", "#94a3b8"
COLOURS = (RLHF_COLOUR, "#c2410c", "#1d4ed8", "#7e22ce", "#a16207", "#be185d")
POINTS = 300  # of a curve; more are averaged
SMOOTHED_FROM = 30  # points


# Curves of each step, by title: metric -> its label in the legend, of those metrics a run has.
CURVES: dict[int, dict[str, dict[str, str]]] = {
    1: {
        "loss, nats per token": {"loss": "training", "eval/loss": "held out"},
        "gradient norm": {"grad_norm": ""},
        "learning rate": {"lr": ""},
    },
    2: {
        "loss, nats per pair": {"loss": ""},
        "accuracy": {"accuracy": "training", "eval/accuracy": "held out"},
        "gradient norm": {"grad_norm": ""},
    },
    3: {
        "reward-model score": {"reward/score_mean": ""},
        "gold (true quality)": {"reward/gold_mean": ""},
        "KL to SFT, nats per response": {"kl/k1": "k1", "kl/k3": "k3"},
        "response length, tokens": {"response/length_mean": ""},
        "eos rate": {"response/eos_rate": ""},
        "repeated token pairs": {"response/repetition": ""},
        "entropy, nats per token": {"policy/entropy": ""},
        "critic: explained variance": {"value/explained_variance": ""},
        "policy loss": {"policy/loss": ""},
        "value loss": {"value/loss": ""},
        "clip fraction": {"policy/clip_fraction": "policy", "value/clip_fraction": "value"},
        "mean ratio": {"policy/ratio_mean": ""},
        "gradient norm": {"grad_norm/actor": "actor", "grad_norm/critic": "critic"},
        "seconds per iteration": {"time/rollout": "rollout", "time/scoring": "scoring",
                                  "time/update": "update"},
    },
}
# Lowest and highest value shown, where not those of the data.
LIMITS = {"response/eos_rate": (-0.03, 1.03), "value/explained_variance": (-1.0, None)}
# Metrics that README shows for several runs.
OVERVIEW = ("reward/score_mean", "reward/gold_mean", "kl/k3", "response/eos_rate")

Line = tuple[str, list[Array]]  # a metric, and (step, value) [N, 2] of each run of a setting


class Plot(NamedTuple):
    """A drawn plot: its title, the SVG, and a sentence below it."""

    title: str
    svg: Markup
    note: str


class Sheet:
    """Plots in the order in which they are drawn; `name` makes their ids unique in the page."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.plots: list[Plot] = []

    @contextmanager
    def plot(self, title: str, note: str = "") -> Iterator[Any]:
        """Provide axes to draw on, and keep the drawing as the next plot."""
        with _figure((4.2, 2.5)) as figure:
            yield figure.subplots()
            figure.subplots_adjust(left=0.13, right=0.97, top=0.93, bottom=0.2)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = _inline(buffer.getvalue(), f"{self._name}-{len(self.plots)}", title)
        self.plots.append(Plot(title, svg, note))


def of_step(settings: list[list[Step]]) -> list[Plot]:
    """Draw the same step of several runs, grouped by setting; of a single run all it has data for.

    Several runs are compared by the first metric of each curve, where all of them have it.
    """
    runs = list(chain.from_iterable(settings))
    alone, number = len(runs) == 1, runs[0].number
    sheet = Sheet(f"step{number}")
    for title, labels in CURVES[number].items():
        metrics = list(labels) if alone else list(labels)[:1]
        lines = [line for metric in metrics for line in _lines(metric, settings)]
        if lines:
            with sheet.plot(title) as axis:
                draw_curves(axis, lines, labels)
                axis.set_xlabel("PPO iteration" if number == 3 else "optimizer step")
                for event in runs[0].alarms if alone else []:
                    axis.axvline(event["step"], color=ALARM_COLOUR, linestyle=":", linewidth=1)
    if alone and runs[0].pairs:
        _draw_reward_model(sheet, runs[0].pairs)
    if alone and number == 3 and runs[0].metrics:
        _draw_frontier(sheet, runs[0])
    if alone and runs[0].dialogues:
        _draw_policies(sheet, runs[0].dialogues)
    return sheet.plots


def curves_png(runs: list[Run], target: Path) -> None:
    """Draw a few PPO curves into a PNG: mean and range over runs.

    Raises:
        UserError: a run has no step 3.
    """
    for run in runs:
        if 3 not in run.steps or not run.steps[3].metrics:
            raise UserError(f"{run.folder}: has no metrics of step 3")
    settings = [[run.steps[3] for run in members] for members in groups(runs).values()]
    shown = [(title, _lines(metric, settings)) for title, labels in CURVES[3].items()
             for metric in labels if metric in OVERVIEW and _lines(metric, settings)]
    with _figure((3.4 * len(shown), 2.8)) as figure:
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, (title, lines) in zip(axes, shown, strict=True):
            draw_curves(axis, lines, {})
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("PPO iteration")
        figure.suptitle(f"PPO, mean and range of {len(runs)} runs", fontsize=10)
        figure.tight_layout()
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)


def _lines(metric: str, settings: list[list[Step]]) -> list[Line]:
    """Return a line for each setting; none where a run does not have the metric."""
    lines = [
        (metric, [np.array([(row["step"], row[metric]) for row in step.metrics if metric in row],
                           dtype=float) for step in steps])
        for steps in settings
    ]
    return lines if all(len(run) for _, runs in lines for run in runs) else []


def draw_curves(axis: Any, lines: list[Line], labels: dict[str, str]) -> None:
    """Draw each line: the mean over its runs, smoothed, and their range from lowest to highest.

    Runs are drawn up to the end of the shortest. Held-out metrics and the learning rate are not
    smoothed; of a single run the values are drawn behind the smoothed line.
    """
    for colour, (metric, runs) in zip(cycle(COLOURS), lines, strict=False):
        shortest = min(map(len, runs))
        points = np.stack([run[:shortest] for run in runs])  # [runs, N, 2]
        if shortest > POINTS:
            parts = np.array_split(points, POINTS, axis=1)
            points = np.stack([part.mean(1) for part in parts], axis=1)
        x, values = points[0, :, 0], points[:, :, 1]
        held_out = metric.startswith("eval/")
        if len(x) > SMOOTHED_FROM and metric != "lr" and not held_out:
            if len(runs) == 1:
                axis.plot(x, values[0], color=colour, alpha=0.25, linewidth=0.8)
            half = max(1, len(x) // 20)  # of a window of a tenth of all points, less at the ends
            values = np.stack([values[:, max(0, i - half) : i + half + 1].mean(1)
                               for i in range(len(x))], axis=1)
        if len(runs) > 1:
            axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.25,
                              linewidth=0)
        axis.plot(x, values.mean(0), "o-" if held_out else "-", color=colour, markersize=3,
                  label=labels.get(metric))
    axis.set_ylim(*LIMITS.get(lines[0][0], ()))
    if len({metric for metric, _ in lines}) > 1:
        axis.legend(fontsize=8, frameon=False)


def _draw_policies(sheet: Sheet, dialogues: Rows) -> None:
    """Draw scores and lengths of both policies' responses to held-out prompts."""
    note = f"{len(dialogues)} held-out prompts; the dashed lines are means."
    for name, title in (("score", "score"), ("length", "response length in tokens")):
        before, after = ([row[when][name] for row in dialogues] for when in ("before", "after"))
        _draw_histograms(sheet, f"{title}, before and after",
                         {"SFT": np.array(before), "RLHF": np.array(after)}, note)


def _draw_reward_model(sheet: Sheet, pairs: Rows) -> None:
    """Draw scores, calibration and accuracies of a reward model on held-out pairs."""
    chosen, rejected, chosen_tokens, rejected_tokens = (
        np.array([pair[name] for pair in pairs], dtype=float)
        for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens"))
    correct = (chosen > rejected).astype(float)
    _draw_histograms(sheet, "held-out scores", {"rejected": rejected, "chosen": chosen})
    _draw_calibration(sheet, chosen - rejected)
    by_length = statistics.accuracy_by_length(correct, np.maximum(chosen_tokens, rejected_tokens))
    with sheet.plot("accuracy by length", "Tokens of the pair's longer sequence, prompt and "
                    "response, in quarters of the pairs; the lines are 95 % intervals.") as axis:
        _draw_accuracies(axis, {f"{low}–{high}" if low < high else f"{low}": accuracy
                                for (low, high), accuracy in by_length.items()})
    with sheet.plot("accuracy by which response is longer", "A reward model that only counts "
                    "tokens is right where the chosen response is longer and wrong where the "
                    "rejected one is.") as axis:
        _draw_accuracies(axis, statistics.accuracy_by_longer_response(
            correct, chosen_tokens - rejected_tokens))


def _draw_calibration(sheet: Sheet, margins: Array) -> None:
    error, bins = statistics.calibration(margins)
    note = (f"Expected calibration error {error:.3f}; on the dashed line it would be 0. A larger "
            "dot is more pairs; the lines are 95 % intervals.")
    with sheet.plot("calibration", note) as axis:
        axis.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1)
        x, y, counts = ([b[name] for b in bins] for name in ("confidence", "accuracy", "count"))
        axis.plot(x, y, color=RLHF_COLOUR)
        axis.scatter(x, y, color=RLHF_COLOUR, s=[10 + 120 * n / len(margins) for n in counts])
        intervals = [statistics.wilson_interval(share * n, n)
                     for share, n in zip(y, counts, strict=True)]
        axis.vlines(x, *zip(*intervals, strict=True), color=RLHF_COLOUR, alpha=0.4, linewidth=1.2)
        axis.set_xlabel("confidence")
        axis.set_ylabel("accuracy")


def _draw_accuracies(axis: Any, parts: dict[str, Figures]) -> None:
    """Draw a bar and an interval for each part that has pairs."""
    parts = {f"{name}\nn={one['pairs']}": one for name, one in parts.items() if one["pairs"]}
    share, low, high = ([one[name] for one in parts.values()] for name in ("share", "low", "high"))
    axis.bar(list(parts), share, color=RLHF_COLOUR, alpha=0.75, width=0.7)
    axis.vlines(list(parts), low, high, color=INK, linewidth=1.2)
    axis.tick_params(axis="x", labelsize=8)
    axis.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axis.set_ylim(0, 1)


def _draw_frontier(sheet: Sheet, step: Step) -> None:
    """Draw score against KL, one dot per PPO iteration."""
    rows = step.metrics
    x, y = (np.array([row[name] for row in rows]) for name in ("kl/k1", "reward/score_mean"))
    checkpoints = {event["step"] for event in step.events if event["kind"] == "checkpoint"}
    saved = [i for i, row in enumerate(rows) if row["step"] in checkpoints]
    thin = slice(None, None, max(1, len(rows) // POINTS))
    with sheet.plot("score against KL", "Each dot is a PPO iteration, darker is later; rings are "
                    "checkpoints, the square is the model that was saved.") as axis:
        axis.plot(x, y, color=GREY, linewidth=0.7, zorder=1)
        axis.scatter(x[thin], y[thin], c=np.arange(len(rows))[thin], cmap="viridis_r", s=12,
                     zorder=2)
        axis.scatter(x[saved], y[saved], facecolors="none", edgecolors=INK, s=60, zorder=3)
        axis.annotate("SFT", (x[0], y[0]), textcoords="offset points", xytext=(6, -4), fontsize=8)
        if step.finished:
            axis.scatter(x[-1:], y[-1:], marker="s", color=ALARM_COLOUR, s=36, zorder=4)
        axis.set_xlabel("KL to SFT (k1), nats per response")
        axis.set_ylabel("score")


def _draw_histograms(
    sheet: Sheet, title: str, values: dict[str, Array], note: str = ""
) -> None:
    """Draw two distributions over each other, non-finite values filtered out."""
    finite = {name: column[np.isfinite(column)] for name, column in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(finite.values())), bins=24)
    with sheet.plot(title, note) as axis:
        for colour, (name, column) in zip((SFT_COLOUR, RLHF_COLOUR), finite.items(), strict=True):
            axis.hist(column, bins=edges, alpha=0.5, color=colour, label=name)
            if len(column):
                axis.axvline(column.mean(), color=colour, linestyle="--", linewidth=1.2)
        axis.legend(fontsize=8, frameon=False)
        axis.set_yticks([])


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Any]:
    import matplotlib
    from matplotlib.figure import Figure

    # It warns when its cache cannot be written, or is built for the first time.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False,
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 4), "lines.linewidth": 1.5,
    }):
        yield Figure(figsize=size)


def _inline(text: str, key: str, title: str) -> Markup:
    """Return the text of an SVG file as an element of a page: ids of its own, no fixed size."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(title)}"', 1))
