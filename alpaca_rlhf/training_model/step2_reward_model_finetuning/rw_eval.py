"""Is this reward model good? On any preference pairs, and on what a policy writes.

    python -m alpaca_rlhf.training_model.step2_reward_model_finetuning.rw_eval \\
        --path output/critic --policy output/actor --output reward_model.json

Accuracy with its interval, in all and by the length of the reply; whether its probabilities mean
what they say; whether it just likes length; and with --policy what choosing the best of n replies
gains. Without --data_path it takes the pairs that the run held out. docs/evaluation.md says what
every number means.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from alpaca_rlhf.inference import flags
from alpaca_rlhf.utils.errors import UserError

if TYPE_CHECKING:
    from alpaca_rlhf.evaluation.held_out import Chosen
    from alpaca_rlhf.evaluation.saved import Scorer
    from alpaca_rlhf.utils.data.samples import Sample

Results = dict[str, Any]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of this program."""
    parser = flags.Parser(
        "python -m alpaca_rlhf.training_model.step2_reward_model_finetuning.rw_eval", __doc__
    )
    parser.add("--path", "the reward model: folder of a model or an adapter, or hub id",
               required=True)
    parser.add_data()
    parser.add("--limit", "most pairs; 0: all", type=flags.number(int, low=0), default="0")
    parser.add("--max_seq_len", "longest prompt and reply, in tokens, cut as in training",
               type=flags.number(int, low=2), default="512")
    parser.add("--policy", "a model whose replies the best-of-n curve is drawn with")
    parser.add("--best_of", "replies drawn to each prompt for that curve, which has the powers of "
               "two up to it", type=flags.number(int, low=1), default="16")
    parser.add("--best_of_prompts", "prompts of that curve; 0: all", type=flags.number(int, low=0),
               default="64")
    parser.add_output("the results: .json")
    parser.add_sampling(temperature=1.0, top_p=1.0)
    parser.add_loading()
    args = parser.parse_args(argv)
    flags.check_output(args.output, ".json")
    return args


def main(args: argparse.Namespace) -> None:
    """Score the pairs, then the policy's replies; show and write what comes of it."""
    from alpaca_rlhf.evaluation.saved import open_scorer
    from alpaca_rlhf.utils import console

    chosen = flags.choose_samples(args, [args.path], args.limit, pairs=True)
    scorer = open_scorer(args.path, flags.load_options(args))
    pairs = score_pairs(scorer, chosen.samples, args.max_seq_len)
    results = measure(pairs, chosen.seed)
    console.say(describe(results))
    if args.policy:
        results["best_of_n"] = best_of_n(args, scorer, chosen)
        console.say(describe_best(results["best_of_n"]))
    results |= {"reward_model": args.path, "policy": args.policy, "data": chosen.notes[0],
                "seed": chosen.seed, "max_seq_len": args.max_seq_len}
    flags.write_output(args.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


# --- pairs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """A pair with its scores and lengths in tokens.

    Attributes:
        chosen, rejected: scores.
        chosen_length, rejected_length: length of each response, before truncation.
        length: of the longer sequence that was scored, prompt and response.
    """

    chosen: float
    rejected: float
    chosen_length: int
    rejected_length: int
    length: int


def score_pairs(scorer: "Scorer", samples: "Sequence[Sample]", max_seq_len: int) -> list[Scored]:
    """Scores of pairs, in ids just as step 2 trains on them.

    Raises:
        UserError: no pair is left once they are cut to length.
    """
    from alpaca_rlhf.utils import console
    from alpaca_rlhf.utils.data.prepare import DISCARDED, LENGTH, Lengths, encode_pairs

    rows = encode_pairs(samples, scorer.form, Lengths.of_sequence(max_seq_len, "truncate"))
    kept = [i for i, row in enumerate(rows) if not row[DISCARDED]]
    if not kept:
        raise UserError(f"--max_seq_len {max_seq_len}: no pair is left ({rows[0][DISCARDED]})")
    if len(kept) < len(rows):
        console.say(f"data: {len(rows) - len(kept)} pairs are alike once cut, and left out")
    sides = [rows[i][side] for side in ("chosen_ids", "rejected_ids") for i in kept]
    scores, n = scorer.score(sides), len(kept)
    lengths = [
        [len(reply) for reply in scorer.form.responses(getattr(samples[i], side) for i in kept)]
        for side in ("chosen", "rejected")
    ]
    return [
        Scored(chosen=scores[i], rejected=scores[n + i], chosen_length=lengths[0][i],
               rejected_length=lengths[1][i], length=rows[place][LENGTH])
        for i, place in enumerate(kept)
    ]


def measure(pairs: Sequence[Scored], seed: int) -> Results:
    """All figures of a reward model on pairs; see docs/evaluation.md."""
    import numpy as np

    from alpaca_rlhf.evaluation import statistics

    chosen, rejected = (np.array([getattr(p, side) for p in pairs], dtype=np.float64)
                        for side in ("chosen", "rejected"))
    long, short = (np.array([getattr(p, f"{side}_length") for p in pairs], dtype=np.float64)
                   for side in ("chosen", "rejected"))
    correct = (chosen > rejected).astype(np.float64)
    error, bins = statistics.calibration(chosen - rejected)
    by_length = statistics.accuracy_by_length(correct, np.array([pair.length for pair in pairs]))
    both = np.stack([
        np.concatenate([chosen, rejected]), np.concatenate([long, short])
    ], axis=1)
    # Both replies of a pair are drawn together.
    paired = np.stack([chosen, long, rejected, short], axis=1)
    return {
        "accuracy": asdict(statistics.accuracy(correct)),
        "ties": int((chosen == rejected).sum()),
        "by_length": [{"from": shortest, "to": longest, **asdict(one)}
                      for (shortest, longest), one in by_length.items()],
        "by_which_is_longer": {
            name: asdict(one)
            for name, one in statistics.accuracy_by_longer_response(correct, long - short).items()
        },
        "calibration_error": error,
        "calibration": [asdict(one) for one in bins],
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
            "longer_is_chosen": asdict(
                statistics.accuracy((long > short).astype(np.float64)[long != short])
            ),
        },
    }


def describe(results: Results) -> str:
    """The figures for people."""
    from alpaca_rlhf.utils.console import table

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
        table(["said probability", "mean", "right", "pairs"], bins),
        f"\nscore: chosen {score['chosen_mean']:.3f}, rejected {score['rejected_mean']:.3f}, "
        f"deviation {score['std']:.3f}",
        f"score and length: Pearson {length['pearson']:.3f} (95 % from {low:.3f} to {high:.3f}), "
        f"Spearman {length['spearman']:.3f}; where lengths differ, the longer reply is chosen in "
        f"{_cells(length['longer_is_chosen'])[0]} of pairs",
    ])


def _cells(share: Results) -> list[str]:
    if not share["pairs"]:
        return ["-", "", "0"]
    return [f"{share['share']:.3f}", f"{share['low']:.3f} to {share['high']:.3f}",
            str(share["pairs"])]


# --- the best of n -------------------------------------------------------------------------------


def best_of_n(args: argparse.Namespace, scorer: "Scorer", chosen: "Chosen") -> list[Results]:
    """What taking the best of n of a policy's replies is worth, by the reward model and by gold."""
    import numpy as np

    from alpaca_rlhf.demo import assistant_world
    from alpaca_rlhf.evaluation import statistics
    from alpaca_rlhf.evaluation.saved import open_policy
    from alpaca_rlhf.inference.conversation import fitted

    policy = open_policy(args.policy, flags.load_options(args))
    sampling = flags.sampling(args, policy.context, args.best_of)
    prompts = list({s.prompt_key(): list(s.messages) for s in chosen.samples}.values())
    prompts = prompts[: args.best_of_prompts or None]
    ids = [fitted(policy.form, m, policy.context, sampling.max_new_tokens)[0] for m in prompts]
    drawn = policy.replies(ids, sampling, chosen.seed)
    scores = np.array(scorer.rate(
        [messages for messages in prompts for _ in range(args.best_of)],
        [reply for some in drawn for reply in some],
    )).reshape(len(prompts), args.best_of)
    worth = {"score": scores}
    if chosen.embedded:
        worth["gold"] = np.array([
            [assistant_world.gold_score(messages, reply.text) for reply in some]
            for messages, some in zip(prompts, drawn, strict=True)
        ])
    curve = []
    for n in (2**i for i in range(args.best_of.bit_length())):
        point: Results = {"n": n, "kl": float(np.log(n) - (n - 1) / n), "prompts": len(prompts)}
        for name, values in worth.items():
            means = statistics.best_of_n(scores, values, n)
            point[name] = float(means.mean())
            point[f"{name}_interval"] = statistics.bootstrap_interval(means, np.mean, chosen.seed)
        curve.append(point)
    return curve


def describe_best(curve: Sequence[Results]) -> str:
    """The curve for people."""
    from alpaca_rlhf.utils.console import table

    judges = [name for name in ("score", "gold") if name in curve[0]]
    rows = [
        [str(point["n"]), f"{point['kl']:.2f}", *(
            f"{point[name]:.3f} ({point[f'{name}_interval'][0]:.3f} to "
            f"{point[f'{name}_interval'][1]:.3f})" for name in judges)]
        for point in curve
    ]
    return f"\nbest of n, {curve[0]['prompts']} prompts\n" + table(["n", "KL, nats", *judges], rows)


if __name__ == "__main__":
    flags.run(parse, main)
