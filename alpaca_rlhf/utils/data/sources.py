"""What stands behind `--data_path`: each entry's place, its form and its share, read as samples.

An entry is `[NAME=]PLACE[:SHARE]`. PLACE is a file, a folder or a data set of the hub; NAME says
which form it has when its columns do not; SHARE, from 0 to 1, takes so much of it. Whatever exists
under the whole text of an entry is what is meant, colons and equals signs included.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.data import formats, reading
from alpaca_rlhf.utils.data.formats import EMBEDDED, LOCAL_JSON, Adaptor
from alpaca_rlhf.utils.data.reading import HELD_OUT, TRAIN, Row, Rows
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.errors import UserError


@dataclass
class Tally:
    """What became of the rows of one data set.

    Attributes:
        rows: how many were read (an Open Assistant tree is one, and so is a message of a flat one).
        samples: how many samples an adaptor made of them.
        unused: how many rows or samples were counted out, by reason.
    """

    rows: int = 0
    samples: int = 0
    unused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Source:
    """One entry of `--data_path`.

    Attributes:
        given: the flag and the entry, for messages.
        label: the entry.
        name: of the form, or "" to go by the columns.
        rows: where its rows are.
        share: how much of it is used, by groups of equal prompts.
        whole: whether all of it goes to the step at hand, as --sft_only_data_path does.
    """

    given: str
    label: str
    name: str
    rows: Rows
    share: float = 1.0
    whole: bool = False

    def parts(self) -> list[str]:
        """Those it has, of "held_out" and "train"."""
        return [part for part in (HELD_OUT, TRAIN) if part in self.rows.parts]

    def samples(self, part: str, tally: Tally) -> Iterator[Sample]:
        """The samples of a part, in order; counts into `tally`.

        Raises:
            UserError: the rows cannot be read, have no known form, or none of them is usable.
        """
        rows = self._counted(self.rows.parts[part](), tally)
        first = next(rows, None)
        before = tally.samples
        if first is not None:
            for sample in self._adaptor(first).read(chain([first], rows), tally.unused):
                tally.samples += 1
                yield sample
        if part == TRAIN and tally.rows == 0:
            raise UserError(f"{self.given}: the file is empty; give one with rows")
        if part == TRAIN and tally.samples == before:
            reasons = "; ".join(f"{n} {reason}" for reason, n in tally.unused.items())
            raise UserError(f"{self.given}: no usable row ({reasons}); give other data")

    @staticmethod
    def _counted(rows: Iterator[Row], tally: Tally) -> Iterator[Row]:
        for row in rows:
            tally.rows += 1
            yield row

    def _adaptor(self, first: Row) -> Adaptor:
        """The form of this source, by its name or by the columns of a row."""
        candidates = formats.named(self.name) if self.name else list(formats.ADAPTORS)
        for adaptor in candidates:
            if adaptor.fits(first):
                return adaptor
        columns = ", ".join(first) or "(none)"
        if not self.name:
            raise UserError(
                f"{self.given}: the columns {columns} fit no known form; known are "
                f"{formats.forms()}"
            )
        missing = [column for column in candidates[0].columns if column not in first]
        raise UserError(
            f"{self.given}: no column {', '.join(missing)}; the columns found are {columns}"
        )


def open_sources(
    data_paths: list[str], flag: str = "--data_path", whole: bool = False
) -> list[Source]:
    """Find every data set that is given; nothing of them is read yet.

    Args:
        data_paths: entries of the flag.
        flag: the flag they came from, for messages.
        whole: whether they go to one step whole.

    Raises:
        UserError: a place where nothing is, or a name that no form has.
    """
    if not data_paths and not whole:
        console.say("--data_path is not given: using the embedded data set")
        data_paths = [EMBEDDED]
    return [_open(entry, f"{flag} {entry}", whole) for entry in data_paths]


_SHARE = re.compile(r"(.+):(\d*\.?\d+)")


def _open(entry: str, given: str, whole: bool) -> Source:
    name, place, share = _parts(entry)
    if not 0 < share <= 1:
        raise UserError(f"{given}: the share after the colon must be above 0 and at most 1")
    known = formats.names()
    if name and name not in known:
        raise UserError(f"{given}: no adaptor {name}; known are {', '.join(known)}")
    rows = _rows(name, place, given)
    if not name and place in (*known, EMBEDDED):
        name = place
    return Source(given, entry, name, rows, share, whole)


def _parts(entry: str) -> tuple[str, str, float]:
    """Name, place and share; what exists under a longer text is not cut."""
    shared = _SHARE.fullmatch(entry)
    candidates = [(entry, 1.0), *([(shared[1], float(shared[2]))] if shared else [])]
    for text, share in candidates:
        if Path(text).exists():
            return "", text, share
        name, equals, place = text.partition("=")
        if equals and place and Path(place).exists():
            return name, place, share
    text, share = candidates[-1]
    name, equals, place = text.partition("=")
    return (name, place, share) if equals else ("", text, share)


def _rows(name: str, place: str, given: str) -> Rows:
    if place == EMBEDDED:
        parts = {TRAIN: lambda: iter(assistant_world.rows("train")),
                 HELD_OUT: lambda: iter(assistant_world.rows("eval"))}
        return Rows(parts, lambda: f"{EMBEDDED} {assistant_world.FORMAT}")
    if place == LOCAL_JSON:
        place = "data"
        if not Path(place).is_dir():
            raise UserError(
                f"{given}: there is no folder {Path(place).absolute()}; put "
                "train.json and eval.json there, or give the path of a file"
            )
    if Path(place).is_dir():
        return reading.open_folder(Path(place), given)
    if Path(place).is_file():
        return reading.open_file(Path(place))
    if not name and (place in formats.names() or re.fullmatch(r"[\w.-]+/[\w.-]+", place)):
        if re.search(r"\.(jsonl?|parquet)(\.gz)?$", place) is None:
            return reading.open_hub(place, given)
    raise UserError(
        f"{given}: no such file or folder, and no data set of that name is "
        f"known; known are {', '.join(formats.names())}, owner/name of the hub, and local .json, "
        ".jsonl and .parquet files"
    )
