"""Compare the responses of two policies: win rates by each judge, with intervals over prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alpaca_rlhf.evaluation import held_out, statistics
from alpaca_rlhf.evaluation.results import write_output
from alpaca_rlhf.evaluation.saved import open_policy, open_scorer
from alpaca_rlhf.evaluation.statistics import Array, Figures, with_interval
from alpaca_rlhf.utils.configs import HeldOutConfig, LoadingConfig, SamplingConfig, WinRateConfig
from alpaca_rlhf.utils.console import say, table
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.reward_function import apply_reward_function, load_reward_function

Record = dict[str, Any]  # a response as it stands in the results, with a score from each judge


def run(
    models: WinRateConfig, *, data: HeldOutConfig, sampling: SamplingConfig,
    loading: LoadingConfig,
) -> None:
    """Generate with both policies, judge the responses, compare; show and write the results.

    Raises:
        UserError: a model or the data cannot be used, or there is no judge.
    """
    function = load_reward_function(models.reward_function)
    paths = [models.path, models.baseline, models.reward_model]
    chosen = held_out.choose(data, [path for path in paths if path], pairs=False)
    if not (models.reward_model or function or chosen.embedded):
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
    scorer = open_scorer(models.reward_model, loading) if models.reward_model else None
    texts = [chat.decode(chat.prompt_ids(messages)) for messages in dialogues]
    records: list[list[Record]] = []
    for side in sides:
        judges = {}
        if scorer is not None:
            judges["reward model"] = [score for score, in scorer.rate(dialogues, side)]
        if function is not None:
            judges["reward function"] = apply_reward_function(
                function, texts, [one.text for one, in side])
        if chosen.embedded:
            judges["gold"] = [score for score, in held_out.gold_scores(dialogues, side)]
        records.append([
            response.record() | {name: scores[i] for name, scores in judges.items()}
            for i, (response,) in enumerate(side)])
    results = compare(records[0], records[1], list(judges), seed=chosen.seed)
    results |= {
        "path": models.path, "baseline": models.baseline, "reward_model": models.reward_model,
        "data": chosen.description, "seed": chosen.seed,
    }
    say(describe(results))
    results["replies"] = [
        {"prompt": list(messages), "policy": mine, "baseline": theirs}
        for messages, mine, theirs in zip(dialogues, *records, strict=True)
    ]
    write_output(models.output, results)


def compare(
    policy: Sequence[Record], baseline: Sequence[Record], judges: Sequence[str], seed: int
) -> Figures:
    """Compute win rates of the policy over the baseline; docs/evaluation.md defines each figure.

    The records are of the responses to the same prompts; `seed` is the bootstrap's.
    """
    def columns(name: str) -> Array:
        return np.array([[record[name] for record in side] for side in (policy, baseline)], float)

    tokens = columns("tokens")
    longer_by = tokens[0] - tokens[1]
    figures = {}
    for name in judges:
        mine, theirs = columns(name)
        outcomes = (np.sign(mine - theirs) + 1) / 2
        rows = np.stack([outcomes, longer_by], axis=1)
        figures[name] = {
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
        "prompts": len(longer_by), "judges": figures,
        "tokens": tokens.mean(1).tolist(), "ended": columns("ended").mean(1).tolist(),
    }


def describe(results: Figures) -> str:
    """Format the results as a table and a line on the responses' length."""
    rows = []
    for name, one in results["judges"].items():
        mine, theirs = one["mean"]
        rows.append([
            name, with_interval(one["win_rate"], one["win_rate_interval"]),
            f"{one['wins']} / {one['ties']} / {one['losses']}",
            with_interval(one["length_controlled"], one["length_controlled_interval"]),
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
