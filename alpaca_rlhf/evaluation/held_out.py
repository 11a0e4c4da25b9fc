"""Samples to measure on: those that no step was trained on, or all of a test set.

The split of a run is repeated from what the run recorded with its model (data sets, seed, shares,
languages), so a fair evaluation needs no flags; flags override the record.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.evaluation.saved import Response
from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.configs import HeldOutConfig, SeedConfig, SourcesConfig
from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.formats import EMBEDDED
from alpaca_rlhf.utils.data.samples import Sample, Tally
from alpaca_rlhf.utils.data.sources import open_sources
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.data.tokenizer import Message
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.run.run_folder import read_json

_NO_RECORD = "remove the record of the model's data, and give --data_path and --seed"


@dataclass(frozen=True)
class HeldOut:
    """Samples to measure on, in an order fixed by the seed of the split."""

    samples: list[Sample]
    embedded: bool  # all are from the embedded data set, which has a gold rule
    seed: int
    description: str  # number and origin of the samples, in one line


def choose(config: HeldOutConfig, models: Sequence[str], pairs: bool) -> HeldOut:
    """Choose the samples on which models are measured, and say which they are.

    What `config` leaves open is taken from the record of data in the first model's folder that has
    one. With `pairs`, only samples with a rejected response are used; otherwise each prompt is used
    once. A model that was trained on some of the samples is named on the console.

    Raises:
        UserError: the data cannot be read, or none of it can be used.
    """
    folders = [folder for path in models if (folder := record_folder(path)) is not None]
    record = read_json(folders[0] / splitting.RECORD_FILE, _NO_RECORD) if folders else {}
    config = _resolved(config, record)
    split = Split(3, config.shares, config.seed, tuple(config.lang))
    sources = open_sources(config.data_path)
    held_out = config.part == "held_out"
    kept: dict[int, Sample] = {}
    for placed in splitting.placed(sources, split, [Tally() for _ in sources]):
        trained_on = held_out and placed.step != 0
        if not trained_on and not (pairs and placed.sample.rejected is None):
            kept.setdefault(len(kept) if pairs else placed.digest, placed.sample)
    labels = ", ".join(source.label for source in sources)
    if not kept:
        kind = "pair with a chosen and a rejected response" if pairs else "prompt"
        raise UserError(f"--data_path {labels}: " + (
            f"no {kind} is held out; give --part all to measure on all of it, or more data"
            if held_out else f"has no {kind}; give other data"))
    samples = list(kept.values())
    random.Random(f"measure {split.seed}").shuffle(samples)
    samples = samples[: config.limit or None]
    which = "held out of all three steps" if held_out else "all there are"
    description = (
        f"data: {len(samples):,} of {len(kept):,} {'pairs' if pairs else 'prompts'} ({which}) "
        f"of {labels}, seed {split.seed}"
    )
    console.say(description)
    used = {"seed": split.seed, "shares": list(split.shares)}
    digests = [splitting.digest(sample.prompt_key()) for sample in samples]
    for folder in folders:
        for leak in splitting.check_record(str(folder), "the model", used, [], digests):
            console.say(leak)
    embedded = all(source.label == EMBEDDED for source in sources)
    return HeldOut(samples, embedded, split.seed, description)


def gold_scores(
    dialogues: Sequence[Sequence[Message]], responses: Sequence[Sequence[Response]]
) -> list[list[float]]:
    """Score responses by the embedded data set's own rule, in [0, 1]."""
    return [
        [assistant_world.gold_score(list(messages), response.text) for response in some]
        for messages, some in zip(dialogues, responses, strict=True)
    ]


def record_folder(path: str) -> Path | None:
    """Return the folder with a model's record: its own, or the one around an adapter."""
    around = (Path(path), Path(path).absolute().parent)
    return next((p for p in around if (p / splitting.RECORD_FILE).is_file()), None)


def _resolved(config: HeldOutConfig, record: dict[str, Any]) -> HeldOutConfig:
    """Fill in what was not given: from a model's record, else the defaults of the steps."""
    recorded = ",".join(map(str, record.get("shares", []))) or SourcesConfig.data_split
    seed = record.get("seed", SeedConfig.seed)
    paths = [one["data_set"] for one in record.get("data", [])] or [EMBEDDED]
    return replace(
        config, data_path=config.data_path or paths, data_split=config.data_split or recorded,
        seed=seed if config.seed is None else config.seed,
        lang=config.lang or record.get("languages", []),
    )
