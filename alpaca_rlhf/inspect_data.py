"""What a step would train on, before it does: rows in colour, lengths as a picture, an audit.

    python -m alpaca_rlhf.inspect_data --step 2 --data_path PAIRS.jsonl [flags of that step]

Takes the flags of the step and prepares its data just as the step does (and leaves it in the cache
for it). What is trained is green, the worse reply of a pair red; without colours (NO_COLOR, or no
terminal) it stands in «quotes». Ends with a verdict: exit code 0, or 1 when something should be
looked at first.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import Step1Config, Step2Config, Step3Config
from alpaca_rlhf.utils.data import audit, prepare, sources
from alpaca_rlhf.utils.data.prepare import Prepared
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, describe, load_tokenizer
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.losses import IGNORE_INDEX

STEPS = {1: Step1Config, 2: Step2Config, 3: Step3Config}
_GREEN, _RED, _FAINT, _PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


def main() -> None:
    """Parse, prepare, show rows and lengths, audit."""
    own, rest = parse(sys.argv[1:])
    args: Any = arguments.parse(STEPS[own.step], rest)
    form = ChatFormat(tokenizer_of(args))
    console.say(describe(form.tokenizer))
    data = prepared(args, form)
    console.say(data.describe())
    paint = Paint(sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    for number, row in enumerate(data.train.select(range(min(own.rows, len(data.train))))):
        console.say(f"\n--- row {number + 1}: {row['length']} tokens")
        console.say(shown(row, form, paint))
    path = Path(own.histogram or f"lengths_step{own.step}.png")
    draw_lengths(data, own.step, path)
    console.say(f"\nlengths: {quantiles(data.lengths())}; drawn in {path}")
    findings = audit.audit(sources_of(args), split_of(args), data.report)
    for finding in findings:
        mark = "ok  " if finding.passed else "LOOK"
        console.say(f"{mark} {finding.name}: {finding.text}")
    line, passed = audit.verdict(findings)
    console.say(line)
    if not passed:
        raise SystemExit(1)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this program, and those of the step.

    Raises:
        UserError: no step, or one that there is not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m alpaca_rlhf.inspect_data", description=(__doc__ or "").split("\n")[0],
        epilog="All other flags are those of the step.", allow_abbrev=False, exit_on_error=False,
    )
    parser.add_argument("--step", type=int, choices=[1, 2, 3], help="whose data: 1, 2 or 3")
    parser.add_argument("--rows", type=int, default=3, help="rows to show (default: 3)")
    parser.add_argument("--histogram", help="picture of lengths (default: lengths_stepN.png)")
    try:
        own, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    if own.step is None:
        raise UserError("--step is required: 1, 2 or 3, whose data is to be looked at")
    if own.rows < 0:
        raise UserError(f"--rows {own.rows}: must be 0 or more")
    return own, rest


def tokenizer_of(args: Any) -> Any:
    """The tokenizer that the step would use."""
    third = isinstance(args, Step3Config)
    path = args.actor.model_name_or_path if third else args.model.model_name_or_path
    path = path or tiny_llama.shared(prepare.cache_home(args.data.data_output_path))
    return load_tokenizer(
        args.loading.tokenizer_name_or_path or path, args.data.chat_template,
        args.loading.trust_remote_code, fixed=third,
    )


def prepared(args: Any, chat: ChatFormat) -> Prepared:
    """The data of the step, prepared just as the step does."""
    data, seed = args.data, args.run.seed
    if args.step == 3:
        limit = args.rollout.max_prompt_seq_len
        return prepare.prepare_prompts(data, seed=seed, max_prompt_seq_len=limit, chat=chat)
    limit = args.batches.max_seq_len
    if args.step == 2:
        return prepare.prepare_pairs(data, seed=seed, max_seq_len=limit, chat=chat)
    sft = args.sft
    return prepare.prepare_sft(data, sft, seed=seed, max_seq_len=limit, chat=chat)


def sources_of(args: Any) -> list[sources.Source]:
    """The data sets of the step."""
    data = args.data
    if args.step == 1:
        return prepare.sft_sources(data, args.sft)
    return sources.open_sources(data.data_path)


def split_of(args: Any) -> Split:
    """How the step shares out its prompts."""
    data = args.data
    return Split(args.step, data.shares, args.run.seed, tuple(data.lang))


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paint:
    """Marks a text by colour, or in plain characters."""

    colours: bool

    def better(self, text: str) -> str:
        """What is trained, or the chosen reply."""
        return f"{_GREEN}{text}{_PLAIN}" if self.colours else f"«{text}»"

    def worse(self, text: str) -> str:
        """The rejected reply."""
        return f"{_RED}{text}{_PLAIN}" if self.colours else f"«{text}»"

    def context(self, text: str) -> str:
        """What is only read."""
        return f"{_FAINT}{text}{_PLAIN}" if self.colours else text


def shown(row: dict[str, Any], form: ChatFormat, paint: Paint) -> str:
    """A row of any step, special tokens and all."""
    if "prompt_ids" in row:
        return paint.context(text_of(form, row["prompt_ids"], 0, len(row["prompt_ids"])))
    if "labels" in row:
        ids = row["input_ids"]
        trained = [label != IGNORE_INDEX for label in row["labels"]]
        edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
        return "".join(
            (paint.better if trained[start] else paint.context)(text_of(form, ids, start, end))
            for start, end in zip(edges, edges[1:], strict=False)
        )
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    pairs = zip(chosen, rejected, strict=False)
    common = next((i for i, (one, other) in enumerate(pairs) if one != other), min(
        len(chosen), len(rejected)))
    return (
        paint.context(text_of(form, chosen, 0, common))
        + "\n chosen:   " + paint.better(text_of(form, chosen, common, len(chosen)))
        + "\n rejected: " + paint.worse(text_of(form, rejected, common, len(rejected)))
    )


def text_of(form: ChatFormat, ids: Sequence[int], start: int, end: int) -> str:
    """The text that some of the ids add to those before them."""
    before, all_of_it = (form.tokenizer.decode(ids[:n]) for n in (start, end))
    return all_of_it[len(before) :]


# --- lengths -------------------------------------------------------------------------------------


def quantiles(lengths: Sequence[int]) -> str:
    """A few numbers for a distribution."""
    ordered = sorted(lengths)
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
          for name, share in (("median", 0.5), ("90 %", 0.9), ("99 %", 0.99))}
    return ", ".join(f"{name} {n}" for name, n in at.items()) + f", longest {ordered[-1]} tokens"


def draw_lengths(data: Prepared, step: int, path: Path) -> None:
    """Histogram of the tokens of rows, of each kind of sequence that the step has.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    columns = {1: ["input_ids"], 2: ["chosen_ids", "rejected_ids"], 3: ["prompt_ids"]}[step]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for column in columns:
        lengths = [len(ids) for ids in data.train[column]]
        axes.hist(lengths, bins=50, alpha=0.6, label=column.removesuffix("_ids"))
    axes.set(xlabel="tokens, after cutting", ylabel="rows", title=f"Rows of step {step}")
    axes.legend()
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"--histogram {path}: cannot be written ({error}); give another") from error


if __name__ == "__main__":
    console.run_main(main)
