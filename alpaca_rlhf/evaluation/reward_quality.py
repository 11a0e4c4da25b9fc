"""Measure a reward model: on preference pairs, and on responses that a policy generates."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from alpaca_rlhf.evaluation import held_out, statistics
from alpaca_rlhf.evaluation.held_out import HeldOut
from alpaca_rlhf.evaluation.results import write_output
from alpaca_rlhf.evaluation.saved import Policy, Scorer, open_policy, open_scorer
from alpaca_rlhf.evaluation.statistics import Array, Figures
from alpaca_rlhf.utils.configs import (
    HeldOutConfig,
    LoadingConfig,
    RewardEvalConfig,
    SamplingConfig,
)
from alpaca_rlhf.utils.console import say, table
from alpaca_rlhf.utils.data.encode import FILTERED_OUT, LENGTH, Lengths, encode_pairs
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.errors import UserError


def run(
    scoring: RewardEvalConfig, *, data: HeldOutConfig, sampling: SamplingConfig,
    loading: LoadingConfig,
) -> None:
    """Score the pairs, then the policy's responses; show and write the results.

    Raises:
        UserError: a model or the data cannot be used.
    """
    chosen = held_out.choose(data, [scoring.path], pairs=True)
    scorer = open_scorer(scoring.path, loading)
    results = measure(score_pairs(scorer, chosen.samples, scoring.max_seq_len), chosen.seed)
    say(describe(results))
    if scoring.policy is not None:
        policy = open_policy(scoring.policy, loading)
        sampling = replace(sampling, num_generations=scoring.best_of)
        results["best_of_n"] = best_of_n(
            policy, scorer, chosen, sampling, max_prompts=scoring.best_of_prompts)
        say(describe_best_of_n(results["best_of_n"]))
    results |= {"reward_model": scoring.path, "policy": scoring.policy, "data": chosen.description,
                "seed": chosen.seed, "max_seq_len": scoring.max_seq_len}
    write_output(scoring.output, results)


# --- pairs ---------------------------------------------------------------------------------------


def score_pairs(scorer: Scorer, samples: Sequence[Sample], max_seq_len: int) -> Array:
    """Score pairs, tokenized and truncated exactly as step 2 trains on them.

    Returns:
        For each pair [N, 5]: score of the chosen response and its tokens, before truncation; the
        same of the rejected one; and the tokens of the longer sequence that was scored, prompt and
        response.

    Raises:
        UserError: no pair is left after truncation.
    """
    rows = encode_pairs(samples, scorer.chat, Lengths.of_sequence(max_seq_len, "truncate"))
    kept = [i for i, row in enumerate(rows) if not row[FILTERED_OUT]]
    if not kept:
        raise UserError(f"--max_seq_len {max_seq_len}: no pair is left ({rows[0][FILTERED_OUT]})")
    if len(kept) < len(rows):
        say(f"data: {len(rows) - len(kept)} pairs are identical after truncation and filtered out")
    columns: list[Sequence[float]] = []
    for side in ("chosen", "rejected"):
        columns.append(scorer.score([rows[i][f"{side}_ids"] for i in kept]))
        responses = scorer.chat.responses(getattr(samples[i], side) for i in kept)
        columns.append([len(response) for response in responses])
    return np.array([*columns, [rows[i][LENGTH] for i in kept]], dtype=np.float64).T


def measure(pairs: Array, seed: int) -> Figures:
    """Compute all figures of a reward model on pairs, defined in docs/evaluation.md.

    `pairs` [N, 5] are those of `score_pairs`, `seed` is the bootstrap's.
    """
    chosen, chosen_length, rejected, rejected_length, length = pairs.T
    correct = (chosen > rejected).astype(np.float64)
    longer_by = chosen_length - rejected_length
    error, bins = statistics.calibration(chosen - rejected)
    by_length = statistics.accuracy_by_length(correct, length)
    # The bootstrap resamples pairs, so both sides of one stay together.
    paired = pairs[:, :4]
    both = paired.reshape(-1, 2)
    longer_is_chosen = (longer_by > 0).astype(np.float64)[longer_by != 0]
    return {
        "accuracy": statistics.accuracy(correct),
        "ties": int((chosen == rejected).sum()),
        "by_length": [{"from": shortest, "to": longest, **one}
                      for (shortest, longest), one in by_length.items()],
        "by_which_is_longer": statistics.accuracy_by_longer_response(correct, longer_by),
        "calibration_error": error,
        "calibration": bins,
        "score": {
            "chosen_mean": float(chosen.mean()), "rejected_mean": float(rejected.mean()),
            "std": float(both[:, 0].std()), "margin_mean": float((chosen - rejected).mean()),
        },
        "length_correlation": {
            "pearson": statistics.pearson(both),
            "pearson_interval": statistics.bootstrap_interval(
                paired, lambda rows: statistics.pearson(rows.reshape(-1, 2)), seed
            ),
            "spearman": statistics.spearman(both),
            "longer_is_chosen": statistics.accuracy(longer_is_chosen),
        },
    }


def describe(results: Figures) -> str:
    """Format the results on pairs as tables."""
    rows = [["all pairs", *_cells(results["accuracy"])]]
    rows += [[f"{bucket['from']} to {bucket['to']} tokens", *_cells(bucket)]
             for bucket in results["by_length"]]
    rows += [[f"{name} is longer", *_cells(share)]
             for name, share in results["by_which_is_longer"].items()]
    length, score = results["length_correlation"], results["score"]
    low, high = length["pearson_interval"]
    bins = [[f"{b['low']:.2f} to {b['high']:.2f}", f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}",
             str(b["count"])] for b in results["calibration"]]
    ties = f"; {results['ties']} ties, counted as wrong" if results["ties"] else ""
    return "\n".join([
        "", table(["accuracy", "share", "95 %", "pairs"], rows),
        f"\nexpected calibration error {results['calibration_error']:.3f}{ties}",
        table(["predicted probability", "mean", "accuracy", "pairs"], bins),
        f"\nscore: chosen {score['chosen_mean']:.3f}, rejected {score['rejected_mean']:.3f}, "
        f"std {score['std']:.3f}",
        f"score and length: Pearson {length['pearson']:.3f} (95 % from {low:.3f} to {high:.3f}), "
        f"Spearman {length['spearman']:.3f}; the longer response is the chosen one in "
        f"{_cells(length['longer_is_chosen'])[0]} of the pairs whose lengths differ",
    ])


def _cells(accuracy: Figures) -> list[str]:
    if not accuracy["pairs"]:
        return ["-", "", "0"]
    return [f"{accuracy['share']:.3f}", f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
            str(accuracy["pairs"])]


# --- best of n -----------------------------------------------------------------------------------


def best_of_n(
    policy: Policy, scorer: Scorer, chosen: HeldOut, sampling: SamplingConfig, max_prompts: int
) -> list[Figures]:
    """Measure the best-scored of n responses by score and gold rule, for n = 1, 2, 4, ….

    The largest n is at most `sampling.num_generations`; `max_prompts` 0 is no limit.
    """
    dialogues = list({sample.prompt_key(): sample.messages for sample in chosen.samples}.values())
    dialogues = dialogues[: max_prompts or None]
    responses = policy.respond(dialogues, sampling, chosen.seed)
    scores = np.array(scorer.rate(dialogues, responses))
    worth = {"score": scores}
    if chosen.embedded:
        worth["gold"] = np.array(held_out.gold_scores(dialogues, responses))
    curve = []
    for n in (2**i for i in range(sampling.num_generations.bit_length())):
        # The KL of best-of-n sampling from the policy is at most log n - (n - 1) / n.
        point: Figures = {"n": n, "kl": float(np.log(n) - (n - 1) / n), "prompts": len(dialogues)}
        for name, values in worth.items():
            means = statistics.best_of_n(scores, values, n)
            point[name] = float(means.mean())
            point[f"{name}_interval"] = statistics.bootstrap_interval(means, np.mean, chosen.seed)
        curve.append(point)
    return curve


def describe_best_of_n(curve: Sequence[Figures]) -> str:
    """Format the curve as a table."""
    judges = [name for name in ("score", "gold") if name in curve[0]]
    rows = [
        [str(point["n"]), f"{point['kl']:.2f}",
         *(statistics.with_interval(point[name], point[f"{name}_interval"]) for name in judges)]
        for point in curve
    ]
    return f"\nbest of n, {curve[0]['prompts']} prompts\n" + table(["n", "KL, nats", *judges], rows)
