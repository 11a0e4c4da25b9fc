"""Compare the responses of two policies: win rates by each judge, with intervals over prompts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from alpaca_rlhf.evaluation import held_out, statistics
from alpaca_rlhf.evaluation.results import write_output
from alpaca_rlhf.evaluation.saved import Dialogue, Response, open_policy, open_scorer
from alpaca_rlhf.utils.configs import HeldOutConfig, LoadingConfig, SamplingConfig, WinRateConfig
from alpaca_rlhf.utils.console import say, table
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

RewardFunction = Callable[[list[str], list[str]], list[float]]  # of prompts and responses
# Dialogues and N responses to each -> a score of each response; higher is better.
Judge = Callable[[Sequence[Dialogue], Sequence[Sequence[Response]]], list[list[float]]]
Scores = dict[str, list[float]]  # of each judge, for each prompt
Results = dict[str, Any]


def run(
    models: WinRateConfig, *, data: HeldOutConfig, sampling: SamplingConfig,
    loading: LoadingConfig, reward_function: RewardFunction | None,
) -> None:
    """Generate with both policies, judge the responses, compare; show and write the results.

    Raises:
        UserError: a model or the data cannot be used, or there is no judge.
    """
    paths = [models.path, models.baseline, models.reward_model]
    chosen = held_out.choose(data, [path for path in paths if path], pairs=False)
    if not (models.reward_model or reward_function or chosen.embedded):
        raise UserError("--reward_model or --reward_function is required: this data has no gold "
                        "rule to judge the responses")
    dialogues = [sample.messages for sample in chosen.samples]
    sides = []
    for path in filter(None, paths[:2]):
        policy = open_policy(path, loading)
        sides.append(
            policy.respond(dialogues, sampling, chosen.seed, models.max_prompt_seq_len))
        chat = policy.chat
        del policy  # only one model is in memory at a time
    judges: dict[str, Judge] = {}
    if models.reward_model:
        judges["reward model"] = open_scorer(models.reward_model, loading).rate
    if reward_function is not None:
        judges["reward function"] = partial(rate_texts, function=reward_function, chat=chat)
    if chosen.embedded:
        judges["gold"] = held_out.gold_scores
    judged = [{name: [scores[0] for scores in judge(dialogues, side)]
               for name, judge in judges.items()} for side in sides]
    first = [[responses[0] for responses in side] for side in sides]
    results = compare(first, judged, chosen.seed)
    results |= {
        "path": models.path, "baseline": models.baseline, "reward_model": models.reward_model,
        "data": chosen.description, "seed": chosen.seed,
    }
    say(describe(results))
    write_output(models.output, {**results, "replies": records(dialogues, first, judged)})


def rate_texts(
    dialogues: Sequence[Dialogue], responses: Sequence[Sequence[Response]],
    function: RewardFunction, chat: ChatFormat,
) -> list[list[float]]:
    """Rate the only response to each dialogue with a reward function, which takes texts."""
    prompts = [chat.decode(chat.prompt_ids(messages)) for messages in dialogues]
    return [[score] for score in function(prompts, [some[0].text for some in responses])]


def compare(sides: Sequence[Sequence[Response]], judged: Sequence[Scores], seed: int) -> Results:
    """Compute win rates of the first side over the second; docs/evaluation.md defines each figure.

    Args:
        sides: the policy's and the baseline's response to each prompt.
        judged: scores of either side.
        seed: of the bootstrap.
    """
    lengths = [np.array([len(response.ids) for response in side], dtype=np.float64)
               for side in sides]
    longer_by = lengths[0] - lengths[1]
    judges = {}
    for name in judged[0]:
        mine, theirs = (np.array(scores[name], dtype=np.float64) for scores in judged)
        outcomes = (np.sign(mine - theirs) + 1) / 2
        rows = np.stack([outcomes, longer_by], axis=1)
        judges[name] = {
            "wins": int((outcomes == 1).sum()), "ties": int((outcomes == 0.5).sum()),
            "losses": int((outcomes == 0).sum()), "win_rate": float(outcomes.mean()),
            "win_rate_interval": statistics.bootstrap_interval(outcomes, np.mean, seed),
            "length_controlled": statistics.length_controlled_rate(outcomes, longer_by),
            "length_controlled_interval": statistics.bootstrap_interval(
                rows, lambda drawn: statistics.length_controlled_rate(*drawn.T), seed
            ),
            "mean": [float(mine.mean()), float(theirs.mean())],
            "gain_interval": statistics.bootstrap_interval(mine - theirs, np.mean, seed),
        }
    return {
        "prompts": len(longer_by), "judges": judges,
        "tokens": [float(side.mean()) for side in lengths],
        "ended": [sum(response.ended for response in side) / len(side) for side in sides],
    }


def describe(results: Results) -> str:
    """Format the results as a table and a line on the responses' length."""
    rows = []
    for name, one in results["judges"].items():
        mine, theirs = one["mean"]
        rows.append([
            name, _rate(one["win_rate"], one["win_rate_interval"]),
            f"{one['wins']} / {one['ties']} / {one['losses']}",
            _rate(one["length_controlled"], one["length_controlled_interval"]),
            f"{theirs:.3f} → {mine:.3f}",
        ])
    headers = ["judge", "win rate (95 %)", "won / tied / lost", "at equal length (95 %)",
               "mean, baseline → policy"]
    tokens, ended = results["tokens"], results["ended"]
    return "\n".join([
        f"\n{results['path']} against {results['baseline']}, {results['prompts']} prompts",
        table(headers, rows),
        f"response length in tokens: {tokens[1]:.1f} → {tokens[0]:.1f}; share with eos: "
        f"{ended[1]:.3f} → {ended[0]:.3f}",
    ])


def _rate(share: float, interval: Sequence[float]) -> str:
    return f"{share:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def records(
    dialogues: Sequence[Dialogue], sides: Sequence[Sequence[Response]], judged: Sequence[Scores]
) -> list[Results]:
    """Return each prompt with both responses and their scores."""
    return [
        {
            "prompt": list(messages),
            **{who: side[i].record() | {name: values[i] for name, values in scores.items()}
               for who, side, scores in zip(("policy", "baseline"), sides, judged, strict=True)},
        }
        for i, messages in enumerate(dialogues)
    ]
