"""What a run came to, in a table, a verdict and a few dialogues, as text."""

import textwrap
from typing import Any

from alpaca_rlhf.evaluation.report.runs import Run, Step
from alpaca_rlhf.utils.console import table

DIALOGUES = 3
# Success as design and README define it: score up by this many of the SFT policy's deviations,
# gold up by this much.
SCORE_GAIN, GOLD_GAIN = 0.8, 0.2

POLICY = {"score": "score", "gold": "gold", "length": "reply length, tokens",
          "eos": "eos rate", "k3": "KL to SFT, nats"}


def as_text(run: Run) -> str:
    """The table and the dialogues of one run, for a console."""
    lines = [f"\n{run.folder}", table(["", "before", "after", ""], rows(run)), ""]
    ppo = run.steps.get(3)
    if ppo and ppo.after:
        lines.append(verdict(ppo))
    for dialogue in ppo.dialogues[:DIALOGUES] if ppo else []:
        lines += ["", _dialogue(dialogue)]
    return "\n".join(lines)


def rows(run: Run) -> list[list[str]]:
    """What was measured, before, after, and a remark, for each step that is there."""
    made = {1: _sft_rows, 2: _reward_rows, 3: _policy_rows}
    return [row for number, step in run.steps.items() for row in made[number](step)]


def _sft_rows(step: Step) -> list[list[str]]:
    return [["SFT: held-out perplexity", number(step.before, "perplexity"),
             number(step.after, "perplexity"), _remark(step, "base → SFT")]]


def _reward_rows(step: Step) -> list[list[str]]:
    return [["reward model: held-out accuracy", number(step.before, "accuracy"),
             number(step.after, "accuracy"), _remark(step, _interval(step.after))]]


def _policy_rows(step: Step) -> list[list[str]]:
    if not step.after:
        return [["policy", "-", "-", _remark(step, "nothing held out")]]
    return [
        [f"policy: {title}", number(step.before, name), number(step.after, name),
         f"{score_gain(step):+.2f} standard deviations of SFT" if name == "score"
         else "SFT → RLHF"]
        for name, title in POLICY.items() if name in step.after
    ]


def _remark(step: Step, text: str) -> str:
    return text if step.results else f"not finished: step {len(step.metrics)}"


def score_gain(step: Step) -> float:
    """How far the score rose, in deviations of the SFT policy's scores."""
    gain = step.after["score"] - step.before["score"]
    return gain / max(step.before["score_std"], 1e-6)


def verdict(step: Step) -> str:
    """Whether PPO made the replies better, in one line."""
    gain = score_gain(step)
    if "gold" not in step.after:
        return f"score up by {gain:.2f} standard deviations; no gold rule for this data"
    gold = step.after["gold"] - step.before["gold"]
    if gain >= SCORE_GAIN and gold < GOLD_GAIN / 2:
        return (f"reward hacking: score up by {gain:.2f} standard deviations, but gold by "
                f"{gold:+.3f} only; raise --kl_coef, or train the reward model on more pairs")
    met = gain >= SCORE_GAIN and gold >= GOLD_GAIN
    return (f"score up by {gain:.2f} standard deviations, gold by {gold:+.3f}: "
            f"{'as it should be' if met else 'less than it should be'} "
            f"(at least {SCORE_GAIN} and {GOLD_GAIN})")


def number(record: dict[str, float], name: str) -> str:
    """To three places; a dash where there is none."""
    return f"{record[name]:.3f}" if name in record else "-"


def _interval(record: dict[str, float]) -> str:
    if not record:
        return "nothing held out"
    low, high = record["accuracy_low"], record["accuracy_high"]
    return f"95 % interval {low:.3f} to {high:.3f}"


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
