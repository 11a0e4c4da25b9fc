"""Data sets read into lists, for tests that look at every sample."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from alpaca_rlhf.utils.data.samples import Sample, Tally
from alpaca_rlhf.utils.data.sources import HELD_OUT, TRAIN, Source, open_sources


@dataclass
class Loaded:
    """Samples by part, and what was filtered out."""

    train: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    filtered_out: Counter[str] = field(default_factory=Counter)


def load(data_paths: list[str]) -> Loaded:
    """Read every sample of every data set, in order."""
    loaded = Loaded()
    for source in open_sources(data_paths):
        tally = Tally()
        for part in source.parts:
            getattr(loaded, part).extend(source.samples(part, tally))
        loaded.filtered_out += tally.unused
    return loaded


@dataclass(frozen=True, kw_only=True)
class Given(Source):
    """A data set of samples that a test made."""

    given: dict[str, list[Sample]]
    unused: dict[str, int]

    def samples(self, part: str, tally: Tally) -> Iterator[Sample]:
        """Yield the samples, counted as those of a file."""
        if part == TRAIN:
            tally.unused.update(self.unused)
        for sample in self.given[part]:
            tally.rows += 1
            tally.samples += 1
            yield sample


def given(
    train: list[Sample], held_out: list[Sample] | None = None, unused: dict[str, int] | None = None,
    label: str = "given", name: str = "", **changes: Any,
) -> Given:
    """Make a data set of samples; `held_out` None is one without such a part."""
    samples = {TRAIN: train} | ({} if held_out is None else {HELD_OUT: held_out})
    return Given(
        flag=f"--data_path {label}", label=label, name=name, parts=dict.fromkeys(samples, []),
        fingerprint=lambda: repr((samples, unused)), given=samples, unused=unused or {}, **changes,
    )
