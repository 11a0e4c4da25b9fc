"""Which step a prompt belongs to: drawn from its text and the seed, so that every step draws alike.

Equal prompts stand in one part. What a step trained on is saved with its model, and the next step
checks its own prompts against it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alpaca_rlhf.utils.data.reading import HELD_OUT, TRAIN
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.sources import Source, Tally

HELD_OUT_SHARE = 0.05
RECORD_FILE = "data_split.json"
PROMPTS_FILE = "trained_prompts.npy"


@dataclass(frozen=True)
class Split:
    """How prompts are dealt out.

    Attributes:
        step: 1, 2 or 3: the one at hand.
        shares: of steps 1, 2, 3.
        seed: of the draw.
        languages: use only samples stated to be in one of these, or in none; empty uses all.
    """

    step: int
    shares: tuple[float, float, float]
    seed: int
    languages: tuple[str, ...] = ()

    def step_of(self, key: str) -> int:
        """The step that a prompt would train, by its key."""
        point = _draw(key, self.seed, "step") * sum(self.shares)
        for step in (1, 2):
            if point < sum(self.shares[:step]):
                return step
        return 3

    def speaks(self, language: str | None) -> bool:
        """Whether a language is wanted: "zh" wants zh, zh_cn and zh-TW; "zh_cn" only that."""
        if not self.languages or language is None:
            return True
        told = language.lower().replace("-", "_")
        wanted = [one.lower().replace("-", "_") for one in self.languages]
        return told in wanted or told.split("_")[0] in wanted


@dataclass(frozen=True)
class Placed:
    """A sample and its place.

    Attributes:
        sample: itself.
        key: its `prompt_key`.
        source: number of its data set.
        step: the step that it trains; 0 when it is held out of all three.
    """

    sample: Sample
    key: str
    source: int
    step: int


def placed(
    sources: Sequence[Source], split: Split, tallies: Sequence[Tally]
) -> Iterator[Placed]:
    """Every usable sample of all data sets, with its place; those held out by their sets first.

    A prompt that stands in a data set's own held-out part is trained nowhere. Where some data set
    has no such part, prompts of all of them are drawn to be held out.
    """
    drawing = any(HELD_OUT not in source.parts() for source in sources if not source.whole)
    given: set[bytes] = set()  # held out by the data sets themselves
    drawn: set[bytes] = set()
    for part, whole in ((HELD_OUT, False), (TRAIN, False), (HELD_OUT, True), (TRAIN, True)):
        for number, source in enumerate(sources):
            if source.whole is not whole or part not in source.parts():
                continue
            tally = tallies[number]
            for sample in _wanted(source, part, split, tally):
                key = sample.prompt_key()
                mark = digest(key)
                step = split.step if whole else split.step_of(key)
                if part == HELD_OUT and not whole:
                    given.add(mark)
                    step = 0
                elif mark in given or (whole and mark in drawn):
                    tally.unused["prompt is held out"] += 1
                    continue
                elif drawing and not whole and (
                    _draw(key, split.seed, "held out") < HELD_OUT_SHARE
                ):
                    drawn.add(mark)
                    step = 0
                yield Placed(sample, key, number, step)


def _wanted(source: Source, part: str, split: Split, tally: Tally) -> Iterator[Sample]:
    """Samples of the right language within the data set's share."""
    for sample in source.samples(part, tally):
        if not split.speaks(sample.language):
            tally.unused[f"language {sample.language}"] += 1
        elif source.share < 1 and (
            _draw(sample.prompt_key(), split.seed, "share") >= source.share
        ):
            tally.unused[f"beyond the share of {source.share:g}"] += 1
        else:
            yield sample


def for_step(
    sources: Sequence[Source], split: Split, tallies: Sequence[Tally]
) -> Iterator[Placed]:
    """What the step at hand trains on, and what is held out, of the kind that it can use.

    Step 2 uses pairs alone, step 3 each prompt once; the others are counted.
    """
    seen: set[bytes] = set()
    for one in placed(sources, split, tallies):
        if one.step not in (0, split.step):
            continue
        if split.step == 2 and one.sample.rejected is None:
            tallies[one.source].unused["no rejected reply"] += 1
            continue
        if split.step == 3:
            mark = digest(one.key)
            if mark in seen:
                tallies[one.source].unused["prompt occurred before"] += 1
                continue
            seen.add(mark)
        yield one


def digest(key: str) -> bytes:
    """Eight bytes for a prompt's key: among a million prompts two agree with a chance of 3e-8."""
    return hashlib.sha256(key.encode()).digest()[:8]


def _draw(key: str, seed: int, purpose: str) -> float:
    found = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()
    return int.from_bytes(found[:8], "big") / 2**64


# --- what is saved with a model ------------------------------------------------------------------


def save_record(folder: Path | None, report: dict[str, Any], prompts: Sequence[int]) -> None:
    """Write the split of a run, and the digests of the prompts it trained on, into its folder.

    Args:
        folder: of the model; None saves nothing.
        report: of the preparation; its `split` is what is written.
        prompts: digests as whole numbers, in any order.
    """
    if folder is None:
        return
    trained = np.unique(np.asarray(prompts, dtype=np.int64))
    record = {**report["split"], "trained_prompts": len(trained), "digests": PROMPTS_FILE}
    np.save(folder / PROMPTS_FILE, trained, allow_pickle=False)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def check_record(
    folder: str, what: str, report: dict[str, Any], train: Sequence[int], held_out: Sequence[int]
) -> list[str]:
    """What a run should know about the data an earlier model was trained on, a line each.

    Args:
        folder: of the earlier model.
        what: its name for people, such as "the reward model".
        report: of this run's preparation.
        train, held_out: digests of this run's prompts.

    Returns:
        Nothing when the folder has no record, or all is well.
    """
    try:
        record = json.loads((Path(folder) / RECORD_FILE).read_text())
        trained = np.load(Path(folder) / PROMPTS_FILE, allow_pickle=False)
    except (OSError, ValueError):
        return []
    lines = []
    for name, flag in (("seed", "--seed"), ("shares", "--data_split")):
        mine, theirs = report["split"][name], record.get(name)
        if mine != theirs:
            lines.append(
                f"data: {flag} {_shown(mine)} here, {_shown(theirs)} for {what} ({folder}): the "
                f"parts of the steps are not the same; give {flag} {_shown(theirs)}"
            )
    for prompts, kind in ((train, "prompts"), (held_out, "held-out prompts")):
        mine = np.unique(np.asarray(prompts, dtype=np.int64))
        common = int(np.isin(mine, trained).sum())
        if common:
            lines.append(
                f"data: {what} ({folder}) was trained on {common:,} of this run's {len(mine):,} "
                f"{kind}"
            )
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(f"{share:g}" for share in value)
    return str(value)
