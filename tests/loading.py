"""Data sets read into lists, for tests that look at every sample."""

from collections import Counter
from dataclasses import dataclass, field

from alpaca_rlhf.utils.data.adaptors import Sample
from alpaca_rlhf.utils.data.raw_datasets import Tally, open_sources


@dataclass
class Loaded:
    """Samples by part, and what was counted out."""

    train: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    counted_out: Counter[str] = field(default_factory=Counter)


def load(data_paths: list[str]) -> Loaded:
    """Every sample of every data set, in order."""
    loaded = Loaded()
    for source in open_sources(data_paths):
        tally = Tally()
        for part in source.parts():
            getattr(loaded, part).extend(source.samples(part, tally))
        loaded.counted_out += tally.unused
    return loaded
