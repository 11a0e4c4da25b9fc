"""Show what a step would train on: rows in colour, lengths as a picture, and an audit.

    python -m alpaca_rlhf.inspect_data --step 2 --data_path PAIRS.jsonl [flags of that step]

Takes the flags of the step and prepares its data as the step does, which leaves it in the cache.
Trained text is green, the rejected response of a pair red; without colours (NO_COLOR, or no
terminal) both are in «quotes». Ends with a verdict: exit code 0, or 1 if something needs a look.
"""

import os
import re
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import InspectStep1, InspectStep2, InspectStep3
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.prepare import Prepared
from alpaca_rlhf.utils.data.samples import Tally
from alpaca_rlhf.utils.data.sources import Source, open_sources
from alpaca_rlhf.utils.data.split import Split, digest, placed
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, load_chat
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.losses import IGNORE_INDEX

Step = InspectStep1 | InspectStep2 | InspectStep3
_GREEN, _RED, _FAINT, _PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, prepare, show rows and lengths, audit."""
    args = parse(sys.argv[1:] if argv is None else argv)
    data, chat = prepared(args)
    console.say(data.describe())
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    rows = data.train.select(range(min(args.inspect.rows, len(data.train))))
    for number, row in enumerate(rows, 1):
        console.say(f"\n--- row {number}: {row['length']} tokens\n{shown(row, chat, colours)}")
    path = Path(args.inspect.histogram or f"lengths_step{args.step}.png")
    draw_lengths(data, f"Rows of step {args.step}", path)
    console.say(f"\nlengths: {quantiles(data.lengths())}; drawn in {path}")
    split = Split(args.step, args.data.shares, args.run.seed, tuple(args.data.lang))
    sources = (prepare.sft_sources(args.data, args.sft) if isinstance(args, InspectStep1)
               else open_sources(args.data.data_path))
    findings = audit(sources, split, data.report)
    for finding in findings:
        console.say(f"{'ok  ' if finding.passed else 'LOOK'} {finding.name}: {finding.text}")
    line, passed = verdict(findings)
    console.say(line)
    if not passed:
        raise SystemExit(1)


def parse(argv: Sequence[str]) -> Step:
    """Read the flags of the step that --step names, and those of this program."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--step", nargs="?")
    step = first.parse_known_args(argv)[0].step
    steps: dict[str | None, type[Step]] = {"2": InspectStep2, "3": InspectStep3}
    return arguments.parse(steps.get(step, InspectStep1), argv, doc=__doc__)


def prepared(args: Step) -> tuple[Prepared, ChatFormat]:
    """Load the tokenizer and prepare the data as the step does."""
    data, seed, template = args.data, args.run.seed, args.data.chat_template
    if isinstance(args, InspectStep3):
        chat = load_chat(args.actor.model_name_or_path, args.loading, template, fixed=True)
        limit = args.rollout.max_prompt_seq_len
        return prepare.prepare_prompts(data, seed=seed, max_prompt_seq_len=limit, chat=chat), chat
    role = tiny_llama.or_embedded(args.model, prepare.cache_home(data.data_output_path))
    chat = load_chat(role.model_name_or_path, args.loading, template)
    limit = args.batches.max_seq_len
    if isinstance(args, InspectStep2):
        return prepare.prepare_pairs(data, seed=seed, max_seq_len=limit, chat=chat), chat
    return prepare.prepare_sft(data, args.sft, seed=seed, max_seq_len=limit, chat=chat), chat


# --- rows ----------------------------------------------------------------------------------------


def shown(row: dict[str, Any], chat: ChatFormat, colours: bool) -> str:
    """Return the text of a row of any step, with its special tokens."""

    def painted(colour: str, ids: list[int], start: int, end: int) -> str:
        before, both = (chat.tokenizer.decode(ids[:n]) for n in (start, end))
        text = both[len(before) :]
        if colours:
            return f"{colour}{text}{_PLAIN}"
        return text if colour == _FAINT else f"«{text}»"

    if "prompt_ids" in row:
        return painted(_FAINT, row["prompt_ids"], 0, len(row["prompt_ids"]))
    if "labels" in row:
        ids, trained = row["input_ids"], [label != IGNORE_INDEX for label in row["labels"]]
        edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
        return "".join(painted(_GREEN if trained[start] else _FAINT, ids, start, end)
                       for start, end in zip(edges, edges[1:], strict=False))
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    shared = len(os.path.commonprefix([chosen, rejected]))
    return (
        painted(_FAINT, chosen, 0, shared)
        + "\n chosen:   " + painted(_GREEN, chosen, shared, len(chosen))
        + "\n rejected: " + painted(_RED, rejected, shared, len(rejected))
    )


# --- lengths -------------------------------------------------------------------------------------


def quantiles(lengths: Sequence[int]) -> str:
    """Return median, upper quantiles and maximum of lengths in tokens."""
    median, most, nearly_all = np.quantile(lengths, (0.5, 0.9, 0.99), method="higher")
    return f"median {median}, 90 % {most}, 99 % {nearly_all}, longest {max(lengths)} tokens"


def draw_lengths(data: Prepared, title: str, path: Path) -> None:
    """Draw a histogram of the lengths of training rows, for each sequence that they have.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for column in [name for name in data.train.column_names if name.endswith("_ids")]:
        lengths = [len(ids) for ids in data.train[column]]
        axes.hist(lengths, bins=50, alpha=0.6, label=column.removesuffix("_ids"))
    axes.set(xlabel="tokens, after truncation", ylabel="rows", title=title)
    axes.legend()
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"--histogram {path}: cannot be written ({error}); give another") from error


# --- audit ---------------------------------------------------------------------------------------

# The largest share of rows (for length bias: of pairs) that passes; docs/data.md gives the reasons.
LIMITS = {
    "duplicates": 0.01, "leaks": 0.01, "equal": 0.01, "empty": 0.01, "long": 0.1, "unused": 0.1,
    "length bias": 0.65,
}
FEWEST_HELD_OUT = 50
_LANGUAGE_SAMPLES = 500  # of each data set
_SHORTEST_TEXT = 20  # characters, below which a language is a guess
# Reasons that are no fault of the data: another flag asks for them, or another step uses the row.
_NO_FAULTS = ("no rejected response", "no response", "label is false", "kto_tag is false",
              "prompt occurred before", "prompt is held out", "language ", "beyond the share")


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    text: str
    passed: bool = True


def audit(
    sources: Sequence[Source], split: Split, report: dict[str, Any],
    guess: Callable[[str], str] | None = None,
) -> list[Finding]:
    """Check the data of a step: its data sets, and the report of its preparation.

    `guess` returns the language of a text; None uses py3langid.
    """
    return [*_check_report(report), *_check_samples(sources, split, guess or _language)]


def verdict(findings: Iterable[Finding]) -> tuple[str, bool]:
    """Return one line on all findings, and whether all passed."""
    reasons = [finding.name for finding in findings if not finding.passed]
    if not reasons:
        return "verdict: no issues found", True
    return f"verdict: look closer before training: {', '.join(reasons)}", False


def _check(name: str, text: str, part: int, whole: int, limit: str) -> Finding:
    """Compare a share with its limit; the text has places for `part`, `whole` and `share`."""
    share = part / whole if whole else 0.0
    filled = text.format(part=f"{part:,}", whole=f"{whole:,}", share=f"{share:.1%}")
    return Finding(name, filled, share <= LIMITS[limit])


def _check_report(report: dict[str, Any]) -> list[Finding]:
    reasons, samples = report["filtered_out"], sum(one["samples"] for one in report["data_sets"])
    faults = {why: n for why, n in reasons.items() if not why.startswith(_NO_FAULTS)}
    over, empty, equal = (
        sum(n for why, n in reasons.items() if re.match(pattern, why))
        for pattern in ("over --", "empty", "chosen equals rejected|responses are identical")
    )
    unused = sum(faults.values())
    listed = ", ".join(f"{n:,} {why}" for why, n in faults.items()) or "none"
    used, cut = report["train"] + report["held_out"], sum(report["cut"].values())
    flag = next(iter(report["cut"]), "").removeprefix("cut to ") or "the maximum length"
    rows, few = report["held_out"], report["held_out"] < FEWEST_HELD_OUT
    advice = f"; {FEWEST_HELD_OUT} or more tell a good model from a bad one"
    return [
        _check("rows filtered out", f"{{share}} ({listed})", unused, samples + unused, "unused"),
        _check("empty responses or prompts", "{part} ({share}), filtered out", empty,
               samples + empty, "empty"),
        _check("pairs of equal responses", "{part} ({share}), filtered out", equal,
               samples + equal, "equal"),
        _check("rows that are too long", f"{{share}} over {flag}", cut + over, used + over, "long"),
        Finding("held-out rows", f"{rows:,}{advice if few else ''}", not few),
    ]


def _check_samples(
    sources: Sequence[Source], split: Split, guess: Callable[[str], str]
) -> list[Finding]:
    rows: Counter[int] = Counter()  # of the step at hand, by digest
    places: Counter[int] = Counter()  # a bit for each step of a prompt; bit 0: held out
    sizes: list[tuple[int, int]] = []  # characters of the two responses of pairs
    texts: dict[int, list[str]] = {number: [] for number in range(len(sources))}
    for one in placed(sources, split, [Tally() for _ in sources]):
        sample, key = one.sample, one.sample.prompt_key()
        places[digest(" ".join(re.findall(r"\w+", key.casefold())) or key)] |= 1 << one.step
        if one.step not in (0, split.step):
            continue
        rows[digest(f"{key}\0{sample.chosen}\0{sample.rejected}")] += 1
        if sample.rejected is not None:
            sizes.append((len(sample.chosen), len(sample.rejected)))
        if len(texts[one.source]) < _LANGUAGE_SAMPLES:
            texts[one.source].append(f"{sample.messages[-1]['content']}\n{sample.chosen}")
    held_out = [bits for bits in places.values() if bits & 1]
    trained = [bits >> 1 for bits in places.values() if bits > 1]
    loosely = "ignoring case, spaces and punctuation"
    findings = [
        _check("duplicate rows", "{part} ({share}) with prompt and responses of an earlier row",
               rows.total() - len(rows), rows.total(), "duplicates"),
        _check("held-out prompts that leak",
               f"{{part}} of {{whole}} ({{share}}) are trained on by some step, {loosely}",
               sum(bits > 1 for bits in held_out), len(held_out), "leaks"),
        _check("prompts in more than one step", f"{{part}} of {{whole}} ({{share}}), {loosely}",
               sum(bits.bit_count() > 1 for bits in trained), len(trained), "leaks"),
    ]
    if sizes:
        share, limit = sum(a > b for a, b in sizes) / len(sizes), LIMITS["length bias"]
        chosen, rejected = (sum(side) / len(sizes) for side in zip(*sizes, strict=True))
        text = (f"the chosen response is the longer one in {share:.1%} of {len(sizes):,} pairs; "
                f"mean lengths {chosen:,.0f} and {rejected:,.0f} characters")
        findings.append(Finding("length bias", text, 1 - limit <= share <= limit))
    languages = Counter(guess(text) if len(text) >= _SHORTEST_TEXT else "too short"
                        for some in texts.values() for text in some)
    total = languages.total()
    common = [f"{name} {n / total:.0%}" for name, n in languages.most_common() if n * 100 >= total]
    listed = ", ".join(common) or "none"
    return [*findings, Finding("languages", f"{listed} (guessed from {total:,} rows)")]


def _language(text: str) -> str:
    import py3langid

    return py3langid.classify(text[:1000])[0]


if __name__ == "__main__":
    console.run_main(main)
