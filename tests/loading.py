"""Data sets read into lists, for tests that look at every sample."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from alpaca_rlhf.utils.data.reading import HELD_OUT, TRAIN, Rows
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.sources import Source, Tally, open_sources


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


@dataclass(frozen=True)
class Given(Source):
    """A data set of samples that a test made."""

    given_samples: dict[str, list[Sample]] = field(default_factory=dict)
    given_unused: Counter[str] = field(default_factory=Counter)

    def samples(self, part: str, tally: Tally) -> Iterator[Sample]:
        """As those of a file."""
        if part == TRAIN:
            tally.unused.update(self.given_unused)
        for sample in self.given_samples[part]:
            tally.rows += 1
            tally.samples += 1
            yield sample


def given(
    train: list[Sample], held_out: list[Sample] | None = None, unused: dict[str, int] | None = None,
    label: str = "given", name: str = "", **changes: Any,
) -> Given:
    """A data set of these samples; `held_out` None is one without such a part."""
    samples = {TRAIN: train} | ({} if held_out is None else {HELD_OUT: held_out})
    rows = Rows(dict.fromkeys(samples, partial(iter, [])), lambda: repr((samples, unused)))
    return Given(
        f"--data_path {label}", label, name, rows, given_samples=samples,
        given_unused=Counter(unused or {}), **changes,
    )
