"""What is worth knowing of a step's data before it is trained on: one pass over all samples.

Each check gives a line and says whether it is a reason to look closer. Where the bounds are drawn
is a matter of judgement; they stand together in `LIMITS`, and docs/data.md says why.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.sources import Source, Tally
from alpaca_rlhf.utils.data.split import Placed, Split

# The largest share of rows (of pairs, for the last) that passes without a remark.
LIMITS = {
    "duplicates": 0.01, "leaks": 0.01, "equal": 0.01, "empty": 0.01, "cut": 0.1, "unused": 0.1,
    "longer": 0.65,
}
FEWEST_HELD_OUT = 50
_LANGUAGE_SAMPLES = 500  # of each data set
_SHORTEST_TEXT = 20  # characters, below which a language is a guess


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        name: of the check.
        text: what was found.
        passed: whether it is as it should be.
    """

    name: str
    text: str
    passed: bool = True


@dataclass
class _Seen:
    """What one pass over the samples leaves behind."""

    samples: int = 0
    rows: set[bytes] = field(default_factory=set)
    duplicates: int = 0
    places: dict[bytes, int] = field(default_factory=dict)  # prompt -> bits of its places
    pairs: int = 0
    longer: int = 0
    characters: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    asked: Counter[int] = field(default_factory=Counter)

    def add(self, one: Placed, split: Split, language: Callable[[str], str]) -> None:
        """Note a sample of any step; most of it only for the step at hand."""
        loose = _loosely(one.key)
        self.places[loose] = self.places.get(loose, 0) | 1 << one.step
        if one.step not in (0, split.step):
            return
        sample = one.sample
        self.samples += 1
        row = _digest(f"{one.key}\0{sample.chosen}\0{sample.rejected}")
        self.duplicates += row in self.rows
        self.rows.add(row)
        if sample.rejected is not None:
            self.pairs += 1
            self.longer += len(sample.chosen) > len(sample.rejected)
            self.characters["chosen"] += len(sample.chosen)
            self.characters["rejected"] += len(sample.rejected)
        if self.asked[one.source] < _LANGUAGE_SAMPLES:
            self.asked[one.source] += 1
            text = f"{sample.messages[-1]['content']}\n{sample.chosen}"
            self.languages[language(text) if len(text) >= _SHORTEST_TEXT else "too short"] += 1


def audit(
    sources: Sequence[Source], split: Split, report: dict[str, Any],
    language: Callable[[str], str] | None = None,
) -> list[Finding]:
    """Check the data of a step.

    Args:
        sources: data sets.
        split: of the step.
        report: of its preparation.
        language: text -> code; None asks py3langid.
    """
    seen = _Seen()
    for one in splitting.placed(sources, split, [Tally() for _ in sources]):
        seen.add(one, split, language or _language)
    return [
        _counted_out(report), _of_reasons(report, "empty", "replies or prompts that are empty"),
        _of_reasons(report, "equal", "pairs whose two replies are equal"), _cut(report),
        _duplicates(seen), _leaks(seen), _steps(seen), *_length_bias(seen), _held_out(report),
        _languages(seen),
    ]


def verdict(findings: Iterable[Finding]) -> tuple[str, bool]:
    """One line on all findings, and whether the data passed."""
    reasons = [finding.name for finding in findings if not finding.passed]
    if not reasons:
        return "verdict: nothing here speaks against training on it", True
    return f"verdict: look closer before training: {', '.join(reasons)}", False


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _used(report: dict[str, Any]) -> int:
    return report["train"] + report["held_out"]


def _counted_out(report: dict[str, Any]) -> Finding:
    # What another flag asked for, or another step serves, is no fault of the data.
    meant = ("no rejected reply", "prompt occurred before", "prompt is held out", "language ",
             "beyond the share")
    faults = {reason: n for reason, n in report["counted_out"].items()
              if not reason.startswith(meant)}
    samples = sum(one["samples"] for one in report["data_sets"])
    share = _share(sum(faults.values()), samples + sum(faults.values()))
    shown = ", ".join(f"{n:,} {reason}" for reason, n in faults.items()) or "none"
    return Finding("rows counted out", f"{share:.1%} ({shown})", share <= LIMITS["unused"])


_REASONS = {
    "empty": re.compile("empty"),
    "equal": re.compile("chosen equals rejected|replies are alike"),
}


def _of_reasons(report: dict[str, Any], kind: str, what: str) -> Finding:
    found = sum(n for reason, n in report["counted_out"].items() if _REASONS[kind].match(reason))
    share = _share(found, found + sum(one["samples"] for one in report["data_sets"]))
    text = f"{found:,} ({share:.1%}), counted out"
    return Finding(what, text, share <= LIMITS[kind])


def _cut(report: dict[str, Any]) -> Finding:
    over = sum(n for reason, n in report["counted_out"].items() if reason.startswith("over --"))
    cut = sum(report["cut"].values()) + over
    share = _share(cut, _used(report) + over)
    flag = next(iter(report["cut"]), "").removeprefix("cut to ") or "the budget"
    return Finding("rows that are too long", f"{share:.1%} over {flag}", share <= LIMITS["cut"])


def _duplicates(seen: _Seen) -> Finding:
    share = _share(seen.duplicates, seen.samples)
    text = f"{seen.duplicates:,} ({share:.1%}) with the same prompt and replies as an earlier one"
    return Finding("duplicate rows", text, share <= LIMITS["duplicates"])


def _leaks(seen: _Seen) -> Finding:
    held = [bits for bits in seen.places.values() if bits & 1]
    leaks = sum(bits > 1 for bits in held)
    share = _share(leaks, len(held))
    text = (f"{leaks:,} of {len(held):,} ({share:.1%}) are trained on by some step, but for case, "
            "spaces and punctuation")
    return Finding("held-out prompts that leak", text, share <= LIMITS["leaks"])


def _steps(seen: _Seen) -> Finding:
    trained = [bits >> 1 for bits in seen.places.values() if bits > 1]
    shared = sum(bits.bit_count() > 1 for bits in trained)
    share = _share(shared, len(trained))
    text = f"{shared:,} of {len(trained):,} ({share:.1%}), but for case, spaces and punctuation"
    return Finding("prompts in more than one step", text, share <= LIMITS["leaks"])


def _length_bias(seen: _Seen) -> list[Finding]:
    if not seen.pairs:
        return []
    share = seen.longer / seen.pairs
    means = [seen.characters[side] / seen.pairs for side in ("chosen", "rejected")]
    text = (f"the chosen reply is the longer one in {share:.1%} of {seen.pairs:,} pairs; on "
            f"average {means[0]:,.0f} and {means[1]:,.0f} characters")
    return [Finding("length bias", text, 1 - LIMITS["longer"] <= share <= LIMITS["longer"])]


def _held_out(report: dict[str, Any]) -> Finding:
    rows = report["held_out"]
    enough = rows >= FEWEST_HELD_OUT
    return Finding("rows to measure on", f"{rows:,} held out" + (
        "" if enough else f"; {FEWEST_HELD_OUT} or more tell a good model from a bad one"), enough)


def _languages(seen: _Seen) -> Finding:
    total = sum(seen.languages.values())
    common = [(name, n / total) for name, n in seen.languages.most_common() if n >= 0.01 * total]
    shown = ", ".join(f"{name} {share:.0%}" for name, share in common)
    return Finding("languages", f"{shown or 'none'} (guessed from {total:,} rows)")


def _loosely(key: str) -> bytes:
    return _digest(" ".join(re.findall(r"\w+", key.casefold())) or key)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _language(text: str) -> str:
    import py3langid

    return py3langid.classify(text[:1000])[0]
