"""The plots of a report: matplotlib's, each an SVG that stands in the page: light, and offline.

Text stays text, and ids are made unique, since all of them share one document.
"""

import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from alpaca_rlhf.evaluation import statistics
from alpaca_rlhf.evaluation.report.runs import Rows, Run, Step, groups
from alpaca_rlhf.evaluation.statistics import Accuracy, Array
from alpaca_rlhf.utils.errors import UserError

SFT_COLOUR, RLHF_COLOUR, ALARM_COLOUR = "#64748b", "#0f766e", "#b91c1c"
COLOURS = (RLHF_COLOUR, "#c2410c", "#1d4ed8", "#7e22ce", "#a16207", "#be185d")
POINTS = 300  # of a curve; more are averaged
SMOOTHED_FROM = 30  # points
SIZE = (4.2, 2.5)  # inches


@dataclass(frozen=True)
class Curve:
    """One plot of metrics over steps.

    Attributes:
        title: of the plot.
        series: metric -> what the legend calls it; metrics that a run has not are left out.
        low: values below are not shown, for a measure that starts far off.
        share: from 0 to 1, and shown so.
        noisy: drawn faint, with a running mean over it.
    """

    title: str
    series: Mapping[str, str]
    low: float | None = None
    share: bool = False
    noisy: bool = True


CURVES: dict[int, list[Curve]] = {
    1: [
        Curve("loss, nats a token", {"loss": "training", "eval/loss": "held out"}),
        Curve("gradient norm", {"grad_norm": ""}),
        Curve("learning rate", {"lr": ""}, noisy=False),
    ],
    2: [
        Curve("loss, nats a pair", {"loss": ""}),
        Curve("share of pairs in order", {"accuracy": "training", "eval/accuracy": "held out"}),
        Curve("gradient norm", {"grad_norm": ""}),
    ],
    3: [
        Curve("reward-model score", {"reward/score_mean": ""}),
        Curve("gold (true quality)", {"reward/gold_mean": ""}),
        Curve("KL to SFT, nats a reply", {"kl/k1": "k1", "kl/k3": "k3"}),
        Curve("reply length, tokens", {"response/length_mean": ""}),
        Curve("share of replies that end", {"response/eos_rate": ""}, share=True),
        Curve("repeated token pairs", {"response/repetition": ""}),
        Curve("entropy, nats a token", {"policy/entropy": ""}),
        Curve("critic: explained variance", {"value/explained_variance": ""}, low=-1.0),
        Curve("policy loss", {"policy/loss": ""}),
        Curve("value loss", {"value/loss": ""}),
        Curve("clipped share", {"policy/clip_fraction": "policy", "value/clip_fraction": "value"}),
        Curve("mean ratio", {"policy/ratio_mean": ""}),
        Curve("gradient norm", {"grad_norm/actor": "actor", "grad_norm/critic": "critic"}),
        Curve("seconds of a round", {"time/rollout": "rollout", "time/scoring": "scoring",
                                     "time/update": "update"}),
    ],
}
# What README shows of several runs.
OVERVIEW = ("reward/score_mean", "reward/gold_mean", "kl/k3", "response/eos_rate")


@dataclass(frozen=True)
class Plot:
    """A drawn plot: its title, the SVG, and a sentence below it."""

    title: str
    svg: Markup
    note: str = ""


def of_step(step: Step, prefix: str) -> list[Plot]:
    """Every plot that one step has data for; `prefix` sets its ids apart from other steps'."""
    plots = [_plot(f"{prefix}-{i}", curve.title, partial(_curve, step=step, curve=curve))
             for i, curve in enumerate(CURVES[step.number]) if _present(step.metrics, curve)]
    more: dict[int, Callable[[Step, str], Iterator[Plot]]] = {2: _reward_plots, 3: _policy_plots}
    if step.number in more:
        plots += more[step.number](step, prefix)
    return plots


def of_runs(runs: list[Run], number: int) -> list[Plot]:
    """The curves of one step of several runs: a mean and a band for each setting."""
    grouped = _metrics_by_group(runs, number)
    plots = []
    for i, curve in enumerate(CURVES[number]):
        name = next(iter(curve.series))
        if all(all(name in rows[0] for rows in members) for members in grouped.values()):
            draw = partial(_bands, grouped=grouped, name=name, curve=curve)
            plots.append(_plot(f"all{number}-{i}", curve.title, draw))
    return plots


def curves_png(runs: list[Run], target: Path) -> None:
    """Mean and range over runs of a few curves of PPO, as a PNG.

    Raises:
        UserError: a run has no step 3.
    """
    grouped = _metrics_by_group(runs, 3)
    curves = {name: curve for curve in CURVES[3] for name in curve.series}
    first = next(iter(grouped.values()))[0][0]
    shown = [name for name in OVERVIEW if name in first]
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.4 * len(shown), 2.8))
        for axis, name in zip(
            figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
        ):
            _bands(axis, grouped, name, curves[name], smooth=False)
            axis.set_title(curves[name].title, fontsize=10)
            axis.set_xlabel("round")
        figure.suptitle(f"PPO, mean and range of {len(runs)} runs", fontsize=10)
        figure.tight_layout()
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)


# --- curves --------------------------------------------------------------------------------------


def _present(metrics: Rows, curve: Curve) -> bool:
    return any(name in row for row in metrics for name in curve.series)


def _curve(axis: Any, step: Step, curve: Curve) -> None:
    for colour, (name, label) in zip(COLOURS, curve.series.items(), strict=False):
        points = [(row["step"], row[name]) for row in step.metrics if name in row]
        if not points:
            continue
        x, y = _thinned(*np.array(points, dtype=float).T)
        if name.startswith("eval/"):
            axis.plot(x, y, "o-", color=colour, markersize=3, label=label)
        elif curve.noisy and len(y) > SMOOTHED_FROM:
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(x, _smoothed(y), color=colour, label=label)
        else:
            axis.plot(x, y, color=colour, label=label)
    for event in step.alarms:
        axis.axvline(event["step"], color=ALARM_COLOUR, linestyle=":", linewidth=1)
    _finish(axis, curve)
    axis.set_xlabel("round" if step.number == 3 else "optimizer step")


def _finish(axis: Any, curve: Curve) -> None:
    if curve.low is not None and axis.get_ylim()[0] < curve.low:
        axis.set_ylim(bottom=curve.low)
    if curve.share:
        axis.set_ylim(-0.03, 1.03)
    if len([label for label in axis.get_legend_handles_labels()[1] if label]) > 1:
        axis.legend(fontsize=8, frameon=False)


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """At most POINTS points, each the mean of a stretch."""
    if len(x) <= POINTS:
        return x, y
    cuts = np.array_split(np.arange(len(x)), POINTS)
    return (np.array([x[cut].mean() for cut in cuts]), np.array([y[cut].mean() for cut in cuts]))


def _smoothed(y: Array) -> Array:
    """Mean over a window around each point, of a tenth of all, shorter at both ends."""
    half = max(1, len(y) // 20)
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _metrics_by_group(runs: list[Run], number: int) -> dict[str, list[Rows]]:
    for run in runs:
        if number not in run.steps or not run.steps[number].metrics:
            raise UserError(f"{run.folder}: has no metrics of step {number}")
    return {label: [run.steps[number].metrics for run in members]
            for label, members in groups(runs).items()}


def _bands(
    axis: Any, grouped: dict[str, list[Rows]], name: str, curve: Curve, smooth: bool = True
) -> None:
    """A mean over the runs of each group, and the range from the lowest to the highest."""
    for i, members in enumerate(grouped.values()):
        length = min(map(len, members))
        lines = [_thinned(*np.array(
            [(row["step"], row.get(name, math.nan)) for row in rows[:length]], dtype=float).T)
            for rows in members]
        smoothed = smooth and curve.noisy and len(lines[0][0]) > SMOOTHED_FROM
        values = np.array([_smoothed(y) if smoothed else y for _, y in lines])
        colour = COLOURS[i % len(COLOURS)]
        axis.fill_between(lines[0][0], values.min(0), values.max(0), color=colour, alpha=0.25,
                          linewidth=0)
        axis.plot(lines[0][0], values.mean(0), color=colour)
    _finish(axis, curve)


# --- the reward model ----------------------------------------------------------------------------


def _reward_plots(step: Step, prefix: str) -> Iterator[Plot]:
    if not step.pairs:
        return
    columns = {name: np.array([pair[name] for pair in step.pairs], dtype=float)
               for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")}
    margin = columns["chosen"] - columns["rejected"]
    correct = (margin > 0).astype(float)
    yield _plot(
        f"{prefix}-scores", "held-out scores",
        partial(_histograms, values={name: columns[name] for name in ("rejected", "chosen")}))
    error, bins = statistics.calibration(margin)

    def reliability(axis: Any) -> None:
        axis.plot([0.5, 1], [0.5, 1], color="#94a3b8", linestyle="--", linewidth=1)
        axis.plot([b.confidence for b in bins], [b.accuracy for b in bins], color=RLHF_COLOUR)
        axis.scatter([b.confidence for b in bins], [b.accuracy for b in bins], color=RLHF_COLOUR,
                     s=[10 + 120 * b.count / len(margin) for b in bins])
        for b in bins:
            interval = statistics.wilson_interval(b.accuracy * b.count, b.count)
            axis.plot([b.confidence] * 2, interval, color=RLHF_COLOUR, alpha=0.4, linewidth=1.2)
        axis.set_xlabel("how sure the model is")
        axis.set_ylabel("how often it is right")

    yield _plot(f"{prefix}-calibration", "calibration", reliability,
                f"Expected calibration error {error:.3f}; on the dashed line it would be 0. "
                "A larger dot is more pairs; the lines are 95 % intervals.")
    longest = np.maximum(columns["chosen_tokens"], columns["rejected_tokens"])
    by_length = {f"{a}–{b}" if a < b else f"{a}": accuracy for (a, b), accuracy
                 in statistics.accuracy_by_length(correct, longest).items()}
    yield _plot(
        f"{prefix}-length", "accuracy by length", partial(_accuracies, parts=by_length),
        "Tokens of the pair's longer sequence, prompt and response, in quarters of the pairs; the "
        "lines are 95 % intervals.")
    by_longer = statistics.accuracy_by_longer_response(
        correct, columns["chosen_tokens"] - columns["rejected_tokens"])
    yield _plot(
        f"{prefix}-longer", "accuracy by which response is longer",
        partial(_accuracies, parts=by_longer),
        "A reward model that only counts tokens is right where the chosen response is longer and "
        "wrong where the rejected one is.")


def _accuracies(axis: Any, parts: dict[str, Accuracy]) -> None:
    """A bar for each part that has pairs, with its interval."""
    parts = {name: accuracy for name, accuracy in parts.items() if accuracy.pairs}
    for i, accuracy in enumerate(parts.values()):
        axis.bar(i, accuracy.share, color=RLHF_COLOUR, alpha=0.75, width=0.7)
        axis.plot([i, i], [accuracy.low, accuracy.high], color="#0f172a", linewidth=1.2)
    axis.set_xticks(range(len(parts)),
                    [f"{name}\nn={accuracy.pairs}" for name, accuracy in parts.items()], fontsize=8)
    axis.axhline(0.5, color="#94a3b8", linestyle="--", linewidth=1)
    axis.set_ylim(0, 1)


# --- the policy ----------------------------------------------------------------------------------


def _policy_plots(step: Step, prefix: str) -> Iterator[Plot]:
    if step.metrics:
        yield _plot(
            f"{prefix}-frontier", "reward against KL", partial(_frontier, step=step),
            "Each dot is a round, darker is later; rings are checkpoints, the square is the model "
            "that was saved.")
    for name, title in (("score", "score, before and after"),
                        ("length", "reply length in tokens, before and after")):
        values = {label: np.array([d[when][name] for d in step.dialogues], dtype=float)
                  for label, when in (("SFT", "before"), ("RLHF", "after"))}
        if step.dialogues:
            yield _plot(f"{prefix}-{name}", title, partial(_histograms, values=values),
                        f"{len(step.dialogues)} held-out prompts; the dashed lines are means.")


def _frontier(axis: Any, step: Step) -> None:
    rows = step.metrics
    x, y = (np.array([row[name] for row in rows]) for name in ("kl/k1", "reward/score_mean"))
    axis.plot(x, y, color="#94a3b8", linewidth=0.7, zorder=1)
    thin = slice(None, None, max(1, len(rows) // POINTS))
    axis.scatter(x[thin], y[thin], c=np.arange(len(rows))[thin], cmap="viridis_r", s=12, zorder=2)
    place = {row["step"]: i for i, row in enumerate(rows)}
    saved = [place[event["step"]] for event in step.events
             if event["kind"] == "checkpoint" and event["step"] in place]
    axis.scatter(x[saved], y[saved], facecolors="none", edgecolors="#0f172a", s=60, zorder=3)
    axis.annotate("SFT", (x[0], y[0]), textcoords="offset points", xytext=(6, -4), fontsize=8)
    if step.results:
        axis.scatter(x[-1:], y[-1:], marker="s", color=ALARM_COLOUR, s=36, zorder=4)
    axis.set_xlabel("KL to SFT (k1), nats a reply")
    axis.set_ylabel("score")


def _histograms(axis: Any, values: dict[str, Array]) -> None:
    finite = {name: column[np.isfinite(column)] for name, column in values.items()}
    everything = np.concatenate(list(finite.values()))
    if not len(everything):
        return
    edges = np.histogram_bin_edges(everything, bins=24)
    for colour, (name, column) in zip((SFT_COLOUR, RLHF_COLOUR), finite.items(), strict=True):
        axis.hist(column, bins=edges, alpha=0.5, color=colour, label=name)
        if len(column):
            axis.axvline(column.mean(), color=colour, linestyle="--", linewidth=1.2)
    axis.legend(fontsize=8, frameon=False)
    axis.set_yticks([])


# --- drawing -------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    # Where its cache can not be written, or is built for the first time, it would say so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False,
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.axisbelow": True,
        "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 4), "lines.linewidth": 1.5,
    }):
        yield


def _plot(key: str, title: str, draw: Callable[[Any], None], note: str = "") -> Plot:
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE)
        axis = figure.subplots()
        draw(axis)
        figure.subplots_adjust(left=0.13, right=0.97, top=0.93, bottom=0.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, _inline(buffer.getvalue(), key, title), note)


def _inline(text: str, key: str, title: str) -> Markup:
    """An SVG file's text as an element of a page: ids of its own, no size of its own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    label = Markup.escape(title)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
