"""What a run of the three steps came to: a table, three dialogues, and curves over seeds.

    python -m alpaca_rlhf.pipeline_report output/tiny
    python -m alpaca_rlhf.pipeline_report output/seed1 output/seed2 output/seed3 --plot curves.png

Reads what the steps have written (results.json, metrics.jsonl); trains and changes nothing.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from alpaca_rlhf.utils import checkpoint, distributed
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.tracking import METRICS_FILE, table

DIALOGUES = 3
# Success as design and README define it: score up by this many of the SFT policy's deviations,
# gold up by this much.
SCORE_GAIN, GOLD_GAIN = 0.8, 0.2

# Curves: metric of a round, and its name on the axis. A run without gold has no such curve.
CURVES = {
    "reward/score_mean": "reward-model score",
    "reward/gold_mean": "gold (true quality)",
    "kl/k3": "KL to SFT, nats a reply",
    "response/eos_rate": "share of replies that end",
}


def main() -> None:
    """Print the table of each run; draw the curves of all of them."""
    parser = argparse.ArgumentParser(description="Table and curves of pipeline runs.")
    parser.add_argument("runs", nargs="+", help="output folders of scripts/run_pipeline.sh")
    parser.add_argument("--plot", help="draw the PPO curves of the runs into this PNG")
    args = parser.parse_args()
    folders = [Path(run) for run in args.runs]
    for folder in folders:
        distributed.say(report(folder))
    if args.plot:
        plot(folders, Path(args.plot))
        distributed.say(f"curves of {len(folders)} runs: {args.plot}")


def report(folder: Path) -> str:
    """The table and the dialogues of one run.

    Raises:
        UserError: a step's results are not there.
    """
    sft, reward, ppo = (read_results(folder / name) for name in ("actor", "critic", "final"))
    rows = [
        ["SFT: held-out perplexity", _number(sft["before"], "perplexity"),
         _number(sft["after"], "perplexity"), "base → SFT"],
        ["reward model: held-out accuracy", _number(reward["before"], "accuracy"),
         _number(reward["after"], "accuracy"), _interval(reward["after"])],
    ]
    before, after = ppo["before"], ppo["after"]
    names = {"score": "score", "gold": "gold", "length": "reply length, tokens",
             "eos": "eos rate", "k3": "KL to SFT, nats"}
    for name, title in names.items():
        if name in after:
            rows.append([f"policy: {title}", _number(before, name), _number(after, name),
                         _score_gain(before, after) if name == "score" else "SFT → RLHF"])
    lines = [f"\n{folder}", table(["", "before", "after", ""], rows), ""]
    if after:
        lines.append(verdict(before, after))
    for dialogue in ppo["dialogues"][:DIALOGUES]:
        lines += ["", _dialogue(dialogue)]
    return "\n".join(lines)


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a step.

    Raises:
        UserError: it is missing or broken.
    """
    return checkpoint.read_json(folder / checkpoint.RESULTS_FILE, "no finished step there")


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    """Whether PPO made the replies better, in one line."""
    gain = (after["score"] - before["score"]) / max(before["score_std"], 1e-6)
    if "gold" not in after:
        return f"score up by {gain:.2f} standard deviations; no gold rule for this data"
    gold = after["gold"] - before["gold"]
    if gain >= SCORE_GAIN and gold < GOLD_GAIN / 2:
        return (f"reward hacking: score up by {gain:.2f} standard deviations, but gold by "
                f"{gold:+.3f} only; raise --kl_coef, or train the reward model on more pairs")
    met = gain >= SCORE_GAIN and gold >= GOLD_GAIN
    return (f"score up by {gain:.2f} standard deviations, gold by {gold:+.3f}: "
            f"{'as it should be' if met else 'less than it should be'} "
            f"(at least {SCORE_GAIN} and {GOLD_GAIN})")


def plot(folders: list[Path], target: Path) -> None:
    """Mean and range over runs of the PPO curves, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [_read_metrics(folder / "final" / METRICS_FILE) for folder in folders]
    shown = {name: title for name, title in CURVES.items() if name in runs[0][0]}
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.4 * len(shown), 2.8), squeeze=False)
    for axis, (name, title) in zip(axes[0], shown.items(), strict=True):
        rounds = range(1, min(map(len, runs)) + 1)
        columns = [[run[i - 1][name] for run in runs] for i in rounds]
        means = [sum(column) / len(column) for column in columns]
        axis.fill_between(
            rounds, [min(column) for column in columns], [max(column) for column in columns],
            alpha=0.25, linewidth=0,
        )
        axis.plot(rounds, means)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("round")
    figure.suptitle(f"PPO, mean and range of {len(runs)} runs", fontsize=10)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"no finished step there: {path} is missing or broken") from error


def _number(record: dict[str, float], name: str) -> str:
    return f"{record[name]:.3f}" if name in record else "-"


def _interval(record: dict[str, float]) -> str:
    if not record:
        return "nothing held out"
    low, high = record["accuracy_low"], record["accuracy_high"]
    return f"95 % interval {low:.3f} to {high:.3f}"


def _score_gain(before: dict[str, float], after: dict[str, float]) -> str:
    gain = (after["score"] - before["score"]) / max(before["score_std"], 1e-6)
    return f"{gain:+.2f} standard deviations of SFT"


def _dialogue(dialogue: dict[str, Any]) -> str:
    """One prompt and the two policies' replies, side by side, with what they were worth."""
    columns = []
    for title, record in (("SFT", dialogue["before"]), ("RLHF", dialogue["after"])):
        gold = f", gold {record['gold']:.2f}" if "gold" in record else ""
        heading = f"{title} (score {record['score']:.2f}{gold})"
        columns.append([heading, *textwrap.wrap(record["reply"] or "(nothing)", 44)])
    height = max(map(len, columns))
    left, right = ([*column, *[""] * (height - len(column))] for column in columns)
    side_by_side = (f"  {a:46}{b}".rstrip() for a, b in zip(left, right, strict=True))
    return "\n".join([" ".join(dialogue["prompt"].split()), *side_by_side])


if __name__ == "__main__":
    distributed.run_main(main)
