"""Which step a prompt belongs to: drawn from its text and the seed, the same way in every step.

Equal prompts belong to one part. The prompts that a step trained on are saved with its model, and
the next step checks its own against them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alpaca_rlhf.utils.data.samples import Sample, Tally
from alpaca_rlhf.utils.data.sources import HELD_OUT, TRAIN, Source

HELD_OUT_SHARE = 0.05
RECORD_FILE = "data_split.json"
PROMPTS_FILE = "trained_prompts.npy"


@dataclass(frozen=True)
class Split:
    """Division of the prompts among the steps."""

    step: int  # the one at hand
    shares: tuple[float, float, float]
    seed: int
    # Use only samples stated to be in one of these languages, or in none; () uses all.
    languages: tuple[str, ...] = ()

    def step_of(self, key: str) -> int:
        """Return the step whose training a prompt belongs to."""
        point = _uniform(key, self.seed, "step") * sum(self.shares)
        for step in (1, 2):
            if point < sum(self.shares[:step]):
                return step
        return 3

    def includes(self, language: str | None) -> bool:
        """Return whether a language is used: zh includes zh_cn and zh-TW, zh_cn only itself."""
        if not self.languages or language is None:
            return True
        stated = language.lower().replace("-", "_")
        wanted = [one.lower().replace("-", "_") for one in self.languages]
        return stated in wanted or stated.split("_")[0] in wanted


@dataclass(frozen=True)
class Placed:
    """A sample and where it belongs."""

    sample: Sample
    digest: int  # of its prompt
    source: int  # number of its data set
    step: int  # the step that trains on it; 0 when it is held out of all three


def placed(
    sources: Sequence[Source], split: Split, tallies: Sequence[Tally]
) -> Iterator[Placed]:
    """Yield every usable sample of all data sets; those that the data sets hold out come first.

    A prompt in a data set's own held-out part is trained on nowhere. Where some data set has no
    such part, prompts of all of them are drawn to be held out. The tallies, one for each source,
    count what is filtered out.
    """
    drawing = any(HELD_OUT not in source.parts for source in sources if not source.whole)
    given: set[int] = set()  # held out by the data sets themselves
    drawn: set[int] = set()
    for part, whole in ((HELD_OUT, False), (TRAIN, False), (HELD_OUT, True), (TRAIN, True)):
        for number, source in enumerate(sources):
            if source.whole is not whole or part not in source.parts:
                continue
            for sample, key in _wanted(source, part, split, tallies[number]):
                prompt = digest(key)
                step = split.step if whole else split.step_of(key)
                if part == HELD_OUT and not whole:
                    given.add(prompt)
                    step = 0
                elif prompt in given or (whole and prompt in drawn):
                    tallies[number].unused["prompt is held out"] += 1
                    continue
                elif drawing and not whole and (
                    _uniform(key, split.seed, "held out") < HELD_OUT_SHARE
                ):
                    drawn.add(prompt)
                    step = 0
                yield Placed(sample, prompt, number, step)


def _wanted(
    source: Source, part: str, split: Split, tally: Tally
) -> Iterator[tuple[Sample, str]]:
    """Yield samples, with the keys of their prompts, in a wanted language and within the share."""
    for sample in source.samples(part, tally):
        if not split.includes(sample.language):
            tally.unused[f"language {sample.language}"] += 1
            continue
        key = sample.prompt_key()
        if source.share < 1 and _uniform(key, split.seed, "share") >= source.share:
            tally.unused[f"beyond the share of {source.share:g}"] += 1
        else:
            yield sample, key


def for_step(
    sources: Sequence[Source], split: Split, tallies: Sequence[Tally]
) -> Iterator[Placed]:
    """Yield the samples that the step at hand trains on or measures on.

    Steps 1 and 2 need a response, step 2 pairs; step 3 uses each prompt once. The others are
    counted.
    """
    seen: set[int] = set()
    for one in placed(sources, split, tallies):
        if one.step not in (0, split.step):
            continue
        unused = tallies[one.source].unused
        if split.step < 3 and one.sample.lacking:
            unused[one.sample.lacking] += 1
        elif split.step == 2 and one.sample.rejected is None:
            unused["no rejected response"] += 1
        elif split.step == 3 and one.digest in seen:
            unused["prompt occurred before"] += 1
        else:
            seen.add(one.digest)
            yield one


def digest(key: str) -> int:
    """Return 64 bits for a prompt: of a million prompts two are equal with probability 3e-8."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)


def _uniform(key: str, seed: int, purpose: str) -> float:
    """Return a number in [0, 1) that is fixed by prompt, seed and purpose."""
    drawn = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") / 2**64


# --- saved with a model --------------------------------------------------------------------------


def save_record(folder: Path, split: dict[str, Any], prompts: Sequence[int]) -> None:
    """Save the split of a run, and the digests of the prompts it trained on, with its model."""
    trained = np.unique(np.asarray(prompts, dtype=np.int64))
    record = {**split, "trained_prompts": len(trained), "digests": PROMPTS_FILE}
    np.save(folder / PROMPTS_FILE, trained, allow_pickle=False)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def check_record(
    folder: str, what: str, split: dict[str, Any], train: Sequence[int], held_out: Sequence[int]
) -> list[str]:
    """Compare a run's data with those that an earlier model was trained on.

    Args:
        folder: of the earlier model.
        what: name of that model in messages, such as "the reward model".
        split: of this run: `seed` and `shares`.
        train, held_out: digests of this run's prompts.

    Returns:
        One line for each finding; none when the folder has no record.
    """
    try:
        record = json.loads((Path(folder) / RECORD_FILE).read_text())
        trained = np.load(Path(folder) / PROMPTS_FILE, allow_pickle=False)
    except (OSError, ValueError):
        return []
    lines = []
    for name, flag in (("seed", "--seed"), ("shares", "--data_split")):
        mine, theirs = _shown(split[name]), _shown(record.get(name))
        if mine != theirs:
            remedy = f"give {flag} {theirs}"
            if name == "shares" and not record[name][split["step"] - 1]:
                remedy = ("give each step data of its own, or all of them one --data_split with a "
                          "share for each, such as 2,4,4")
            lines.append(
                f"data: {flag} {mine} here, {theirs} for {what} ({folder}): the steps' parts of "
                f"the data differ; {remedy}"
            )
    for prompts, kind in ((train, "prompts"), (held_out, "held-out prompts")):
        unique = np.unique(np.asarray(prompts, dtype=np.int64))
        common = int(np.isin(unique, trained).sum())
        if common:
            lines.append(
                f"data: {what} ({folder}) was trained on {common:,} of this run's {len(unique):,} "
                f"{kind}"
            )
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(f"{share:g}" for share in value)
    return str(value)
