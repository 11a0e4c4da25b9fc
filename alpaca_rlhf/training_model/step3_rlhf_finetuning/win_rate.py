"""How often does a policy answer better than the one it came from?

    python -m alpaca_rlhf.training_model.step3_rlhf_finetuning.win_rate \\
        --path output/final/actor --baseline output/actor --reward_model output/critic

Both answer the prompts that the run held out, with the same numbers to draw with. Judges: the
reward model, a Python function (--reward_function), and for the embedded data its gold rule,
whichever there are. Ties count half; intervals are over prompts. `--run OUT` stands for the three
folders of a run of scripts/run_pipeline.sh.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca_rlhf.inference import flags
from alpaca_rlhf.utils.errors import UserError

if TYPE_CHECKING:
    from alpaca_rlhf.evaluation.saved import Reply
    from alpaca_rlhf.utils.configs import LoadingConfig
    from alpaca_rlhf.utils.data.samples import Sample
    from alpaca_rlhf.utils.data.tokenizer import ChatFormat

Judged = dict[str, list[float]]  # for each judge, a number for each prompt
Results = dict[str, Any]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of this program."""
    parser = flags.Parser(
        "python -m alpaca_rlhf.training_model.step3_rlhf_finetuning.win_rate", __doc__
    )
    parser.add("--run", "folder of a whole run: its final/actor against its actor, by its critic")
    parser.add("--path", "the policy: folder of a model or an adapter, or hub id")
    parser.add("--baseline", "the policy it is compared with, such as step 1's")
    parser.add("--reward_model", "a judge: folder of a reward model or its adapter, or hub id")
    parser.add("--reward_function", "a judge: module:name of a Python function, as in step 3")
    parser.add_data()
    parser.add("--limit", "most prompts; 0: all", type=flags.number(int, low=0), default="256")
    parser.add("--max_prompt_seq_len", "longest prompt, in tokens, cut as in step 3",
               type=flags.number(int, low=1), default="256")
    parser.add_output("the results and every reply: .json")
    parser.add_sampling(temperature=1.0, top_p=1.0)
    parser.add_loading()
    args = parser.parse_args(argv)
    if args.run:
        places = {"path": "final/actor", "baseline": "actor", "reward_model": "critic"}
        for name, place in places.items():
            setattr(args, name, getattr(args, name) or str(Path(args.run) / place))
    if not (args.path and args.baseline):
        raise UserError("--path and --baseline are required (or --run): which policies to compare")
    flags.check_output(args.output, ".json")
    return args


def main(args: argparse.Namespace) -> None:
    """Draw both policies' replies, let the judges compare them, show and write the outcome."""
    from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import load_reward_function
    from alpaca_rlhf.utils import console

    function = load_reward_function(args.reward_function) if args.reward_function else None
    options = flags.load_options(args)
    models = [args.path, args.baseline, *([args.reward_model] if args.reward_model else [])]
    chosen = flags.choose_samples(args, models, args.limit, pairs=False)
    if not (args.reward_model or function or chosen.embedded):
        raise UserError("--reward_model or --reward_function is required: something must judge the "
                        "replies, and this data has no gold rule")
    sides, form = [], None
    for path in (args.path, args.baseline):
        replies, form = draw(path, options, chosen.samples, chosen.seed, args)
        sides.append(replies)
    assert form is not None
    judged = [
        judge(args, options, chosen.samples, replies, function, chosen.embedded, form)
        for replies in sides
    ]
    results = compare(judged, [[len(r.ids) for r in replies] for replies in sides], chosen.seed)
    results |= {
        "path": args.path, "baseline": args.baseline, "reward_model": args.reward_model,
        "data": chosen.notes[0], "seed": chosen.seed,
        "ended": [sum(r.ended for r in replies) / len(replies) for replies in sides],
    }
    console.say(describe(results))
    records = list(record(chosen.samples, sides, judged))
    report = json.dumps({**results, "replies": records}, indent=2, ensure_ascii=False)
    flags.write_output(args.output, report + "\n")


def draw(
    path: str, options: "LoadingConfig", samples: "Sequence[Sample]", seed: int,
    args: argparse.Namespace,
) -> "tuple[list[Reply], ChatFormat]":
    """A reply of one policy to each prompt, and its tokenizer; the model is let go."""
    from alpaca_rlhf.evaluation.saved import open_policy
    from alpaca_rlhf.utils.data.prepare import Lengths, encode_prompts

    policy = open_policy(path, options)
    sampling = flags.sampling(args, policy.context)
    limit = min(args.max_prompt_seq_len, policy.context - sampling.max_new_tokens)
    lengths = Lengths(limit, 0, "truncate", "--max_prompt_seq_len")
    rows = encode_prompts(samples, policy.form, lengths)
    if not all(row["prompt_ids"] for row in rows):
        raise UserError(f"{path}: its chat template refuses some of the prompts; give other data")
    replies = policy.replies([row["prompt_ids"] for row in rows], sampling, seed)
    return [some[0] for some in replies], policy.form


def judge(
    args: argparse.Namespace, options: "LoadingConfig", samples: "Sequence[Sample]",
    replies: "Sequence[Reply]", function: Any, embedded: bool, form: "ChatFormat",
) -> Judged:
    """What each judge thinks of replies."""
    from alpaca_rlhf.demo import assistant_world
    from alpaca_rlhf.evaluation.saved import open_scorer
    from alpaca_rlhf.training_model.step3_rlhf_finetuning.rollout import (
        apply_reward_function as rate,
    )

    found: Judged = {}
    if args.reward_model:
        scorer = open_scorer(args.reward_model, options)
        found["reward model"] = scorer.rate([sample.messages for sample in samples], replies)
    if function is not None:
        prompts = [form.decode(form.prompt_ids(sample.messages)) for sample in samples]
        found["reward function"] = rate(function, prompts, [reply.text for reply in replies])
    if embedded:
        found["gold"] = [
            assistant_world.gold_score(list(sample.messages), reply.text)
            for sample, reply in zip(samples, replies, strict=True)
        ]
    return found


# --- outcome -------------------------------------------------------------------------------------


def compare(judged: Sequence[Judged], lengths: Sequence[Sequence[int]], seed: int) -> Results:
    """Win rates of the first side over the second, by each judge; see docs/evaluation.md.

    Args:
        judged: of either side.
        lengths: of either side's replies, in tokens.
        seed: of the bootstrap.
    """
    import numpy as np

    from alpaca_rlhf.evaluation import statistics

    longer_by = np.array(lengths[0], dtype=np.float64) - np.array(lengths[1], dtype=np.float64)
    judges = {}
    for name in judged[0]:
        mine, theirs = (np.array(side[name], dtype=np.float64) for side in judged)
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
    return {"prompts": len(longer_by), "judges": judges,
            "tokens": [float(np.mean(side)) for side in lengths]}


def describe(results: Results) -> str:
    """The outcome for people."""
    from alpaca_rlhf.utils.console import table

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
        f"reply length, tokens: {tokens[1]:.1f} → {tokens[0]:.1f}; share that ended: "
        f"{ended[1]:.3f} → {ended[0]:.3f}",
    ])


def _rate(share: float, interval: Sequence[float]) -> str:
    return f"{share:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def record(
    samples: "Sequence[Sample]", sides: "Sequence[Sequence[Reply]]", judged: Sequence[Judged]
) -> list[Results]:
    """Every prompt with both replies and what was thought of them."""
    return [
        {
            "prompt": list(sample.messages),
            **{who: {"reply": side[i].text, "tokens": len(side[i].ids), "ended": side[i].ended,
                     **{name: values[i] for name, values in thought.items()}}
               for who, side, thought in zip(("policy", "baseline"), sides, judged, strict=True)},
        }
        for i, sample in enumerate(samples)
    ]


if __name__ == "__main__":
    flags.run(parse, main)
