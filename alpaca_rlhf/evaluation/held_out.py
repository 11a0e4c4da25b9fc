"""Samples to measure on: those that no step trained on, or all of a data set that is a test set.

What a run held out is drawn anew from what it has recorded with its model (data sets, seed, shares,
languages), so an evaluation needs no flags to be fair; flags win over the record.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.formats import EMBEDDED
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.sources import Source, Tally, open_sources
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.errors import UserError


@dataclass(frozen=True)
class Wanted:
    """What to measure on.

    Attributes:
        data_path: entries as of --data_path; empty takes those that the model's record names.
        seed, shares, languages: of the split; None, or no language, takes the record's.
        part: "held_out", or "all" of the data.
        limit: most samples; drawn by the seed. 0 is no limit.
        pairs: whether only samples with a rejected reply are of use; else each prompt counts once.
    """

    data_path: tuple[str, ...]
    seed: int | None
    shares: tuple[float, float, float] | None
    languages: tuple[str, ...]
    part: str
    limit: int
    pairs: bool


@dataclass(frozen=True)
class Chosen:
    """Samples, and what should be known about them.

    Attributes:
        samples: in an order drawn by the seed.
        embedded: whether all of them are of the embedded data set, which has a gold rule.
        seed: the seed of the split.
        notes: lines for the console: where they come from, and what was trained on nevertheless.
    """

    samples: list[Sample]
    embedded: bool
    seed: int
    notes: list[str]


def choose(wanted: Wanted, models: Sequence[str], default: Split) -> Chosen:
    """Samples for measuring models.

    Args:
        wanted: which.
        models: folders; the first that has a record says what was held out, and each is asked
            whether it was trained on any of the samples.
        default: the split where no model has a record.

    Raises:
        UserError: the data cannot be read, or nothing in it is of use.
    """
    folders = [folder for path in models if (folder := record_folder(path)) is not None]
    record = _record(folders[0]) if folders else {}
    split = _split(record, default, wanted)
    entries = list(wanted.data_path) or [one["data_set"] for one in record.get("data", [])]
    sources = open_sources(entries or [EMBEDDED])
    tallies = [Tally() for _ in sources]
    kept: dict[str, Sample] = {}
    for one in splitting.placed(sources, split, tallies):
        unwanted = wanted.part == "held_out" and one.step != 0
        if unwanted or (wanted.pairs and one.sample.rejected is None):
            continue
        mark = f"{len(kept)}" if wanted.pairs else one.key
        kept.setdefault(mark, one.sample)
    if not kept:
        raise UserError(_nothing(sources, wanted))
    samples = list(kept.values())
    random.Random(f"measure {split.seed}").shuffle(samples)
    samples = samples[: wanted.limit or None]
    what = "pairs" if wanted.pairs else "prompts"
    which = "held out of all three steps" if wanted.part == "held_out" else "all there are"
    notes = [f"data: {len(samples):,} of {len(kept):,} {what} ({which}) of "
             f"{', '.join(source.label for source in sources)}, seed {split.seed}"]
    for folder in folders:
        notes += _leaks(folder, samples, split)
    return Chosen(samples, all(s.label == EMBEDDED for s in sources), split.seed, notes)


def record_folder(path: str) -> Path | None:
    """The folder that holds the record of a model: its own, or the one around an adapter."""
    around = (Path(path), Path(path).absolute().parent)
    return next((p for p in around if (p / splitting.RECORD_FILE).is_file()), None)


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / splitting.RECORD_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / splitting.RECORD_FILE}: is broken; give --data_path and --seed "
                        "and take the file away") from error


def _split(record: dict[str, Any], default: Split, wanted: Wanted) -> Split:
    if record:
        default = replace(
            default, shares=tuple(record["shares"]), seed=record["seed"],
            languages=tuple(record["languages"]),
        )
    seed = default.seed if wanted.seed is None else wanted.seed
    return replace(
        default, seed=seed, shares=wanted.shares or default.shares,
        languages=wanted.languages or default.languages,
    )


def _nothing(sources: Sequence[Source], wanted: Wanted) -> str:
    where = ", ".join(source.label for source in sources)
    kind = "pair with a chosen and a rejected reply" if wanted.pairs else "prompt"
    if wanted.part == "held_out":
        return (f"--data_path {where}: no {kind} is held out; take --part all to measure on all of "
                "it, or give more data")
    return f"--data_path {where}: has no {kind}; give other data"


def _leaks(folder: Path, samples: Sequence[Sample], split: Split) -> list[str]:
    """What the model in `folder` should not have seen, a line each."""
    report = {"split": {"seed": split.seed, "shares": list(split.shares)}}
    digests = [
        int.from_bytes(splitting.digest(sample.prompt_key()), "big", signed=True)
        for sample in samples
    ]
    return splitting.check_record(str(folder), "the model", report, [], digests)
