"""Data sets: the entries of `--data_path`, opened and read as samples, a row at a time.

An entry is `[NAME=]PLACE[:SHARE]`. PLACE is a file (.json, .jsonl, .ndjson or .parquet, also
compressed), a folder of such files, a folder that `datasets` saved, or a data set of the
hub. NAME says which data format it has when its columns do not; SHARE, above 0 and at most 1, takes
that part of it. If the whole text of an entry exists as a path, it is that path, colons and equals
signs included. A fingerprint of a source never parses it.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from alpaca_rlhf.demo import assistant_world
from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.data import formats
from alpaca_rlhf.utils.data.formats import EMBEDDED, LOCAL_JSON, Row
from alpaca_rlhf.utils.data.samples import Sample, Tally
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.files import SUFFIXES, UNREADABLE, opened

TRAIN, HELD_OUT = "train", "held_out"

Parts = dict[str, list[Callable[[], Iterator[Row]]]]
Content = tuple[Parts, Callable[[], str]]  # readers of each part, and the fingerprint


@dataclass(frozen=True)
class Source:
    """One entry of `--data_path`."""

    flag: str  # flag and entry, for messages
    label: str  # the entry
    name: str  # of its data format; "" goes by the columns
    parts: Parts  # "train" and, where the data set has one, "held_out"
    fingerprint: Callable[[], str]  # returns a text that changes whenever the content does
    share: float = 1.0  # part that is used, drawn by prompt
    whole: bool = False  # all of it goes to the step at hand, as with --sft_only_data_path

    def samples(self, part: str, tally: Tally) -> Iterator[Sample]:
        """Yield the samples of a part in order, and count into `tally`.

        Raises:
            UserError: the rows cannot be read, have no known format, or none of them is usable.
        """
        before = tally.samples
        for sample in formats.read(self._counted(part, tally), self.name, tally):
            tally.samples += 1
            yield sample
        if part == TRAIN and tally.rows == 0:
            raise UserError(f"{self.flag}: the file is empty; give one with rows")
        if part == TRAIN and tally.samples == before:
            if tally.unfit:
                raise UserError(f"{self.flag}, {tally.unfit}")
            reasons = "; ".join(f"{n} {reason}" for reason, n in tally.unused.items())
            raise UserError(f"{self.flag}: no usable row ({reasons}); give other data")

    def _counted(self, part: str, tally: Tally) -> Iterator[Row]:
        for read in self.parts[part]:
            for row in read():
                tally.rows += 1
                yield row


def open_sources(
    data_paths: list[str], flag: str = "--data_path", whole: bool = False
) -> list[Source]:
    """Find every data set that is given, without reading it; none is the embedded one.

    Raises:
        UserError: nothing is found at a place, or no data format has the name.
    """
    if not data_paths and not whole:
        console.say("--data_path is not given: using the embedded data set")
        data_paths = [EMBEDDED]
    return [_open(entry, f"{flag} {entry}", whole) for entry in data_paths]


_SHARE = re.compile(r"(.+):(\d*\.?\d+)")


def _open(entry: str, flag: str, whole: bool) -> Source:
    name, place, share = _parts_of(entry)
    if not 0 < share <= 1:
        raise UserError(f"{flag}: the share after the colon must be above 0 and at most 1")
    known = formats.names()
    if name and name not in known:
        raise UserError(f"{flag}: no data format {name}; known are {', '.join(known)}")
    parts, fingerprint = _content(name, place, flag)
    if not name and place in (*known, EMBEDDED):
        name = place
    return Source(
        flag=flag, label=entry, name=name, parts=parts, fingerprint=fingerprint, share=share,
        whole=whole,
    )


def _parts_of(entry: str) -> tuple[str, str, float]:
    """Split an entry into name, place and share; an existing path is not split."""
    entry = re.sub(r"(?:^|(?<==))~[^/:]*", lambda home: os.path.expanduser(home[0]), entry)
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


def _content(name: str, place: str, flag: str) -> Content:
    if place == EMBEDDED:
        embedded: Parts = {TRAIN: [lambda: iter(assistant_world.rows("train"))],
                           HELD_OUT: [lambda: iter(assistant_world.rows("eval"))]}
        return embedded, lambda: f"{EMBEDDED} {assistant_world.FORMAT}"
    if place == LOCAL_JSON:
        place = "data"
        if not Path(place).is_dir():
            raise UserError(
                f"{flag}: there is no folder {Path(place).absolute()}; put train.json and "
                "eval.json there, or give the path of a file"
            )
    path = Path(place)
    if path.is_dir():
        return _folder(path, flag)
    if path.is_file():
        return {TRAIN: [partial(read_rows, path)]}, partial(_hash_of, [path])
    if not name and (place in formats.names() or re.fullmatch(r"[\w.-]+/[\w.-]+", place)):
        if _kind(path) not in _KINDS:
            return _hub(place, flag)
    raise UserError(
        f"{flag}: no such file or folder, and no data set of that name is known; known are "
        f"{', '.join(formats.names())}, owner/name of the hub, and local .json, .jsonl and "
        ".parquet files"
    )


# --- splits --------------------------------------------------------------------------------------

# Names of splits, also as the beginning of the name of a file or folder.
_SPLITS = {"train": TRAIN, "eval": HELD_OUT, "test": HELD_OUT, "validation": HELD_OUT,
           "valid": HELD_OUT, "dev": HELD_OUT}


def _part(split: str) -> str | None:
    """Return the part of a split: train_prefs is "train", test "held_out", other None."""
    return _SPLITS.get(re.split(r"[^a-z]", split.lower())[0])


def _by_part(splits: Iterable[str]) -> dict[str, list[str]]:
    """Group splits by part; where some are made for preferences, these alone.

    (`ultrafeedback_binarized` has each of its rows in train_prefs, train_sft and train_gen.)
    """
    names = [str(split) for split in splits]
    parts: dict[str, list[str]] = {}
    for name in [name for name in names if name.endswith("_prefs")] or names:
        part = _part(name)
        if part:
            parts.setdefault(part, []).append(name)
    return parts


# --- folders and the hub -------------------------------------------------------------------------

_KINDS = (".json", ".jsonl", ".ndjson", ".parquet")


def _folder(folder: Path, flag: str) -> Content:
    """Open a folder of data files in any layout of the hub's, or one that `datasets` saved."""
    saved = _saved_splits(folder)
    splits = saved or _file_splits(folder)
    parts = _by_part(splits)
    if TRAIN not in parts:
        raise UserError(
            f"{flag}: the folder {folder} has no train.json, train.jsonl or train.parquet; add "
            "one, or give the file itself"
        )
    used = {part: [path for name in names for path in splits[name]]
            for part, names in parts.items()}
    read = _saved_rows if saved else read_rows
    files = _files_below(folder) if saved else list(chain.from_iterable(used.values()))
    return ({part: [partial(read, path) for path in paths] for part, paths in used.items()},
            partial(_hash_of, files))


def _files_below(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _file_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of each split, which names the file or a folder that it is in."""
    splits: dict[str, list[Path]] = {}
    for file in _files_below(folder):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or _kind(file) not in _KINDS:
            continue
        names = [file.name.split(".")[0], *(part.name for part in inside.parents if part.name)]
        stems = [re.sub(r"-\d{5}-of-\d{5}.*$", "", name) for name in names]
        split = next((stem for stem in stems if _part(stem)), None)
        if split:
            splits.setdefault(split, []).append(file)
    return splits


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the folder of each split that `datasets` saved; nothing if it did not."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"train": [folder]}
    if not (folder / "dataset_dict.json").is_file():
        return {}
    return {path.name: [path] for path in sorted(folder.iterdir())
            if (path / "state.json").is_file()}


def _saved_rows(folder: Path) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder)).with_format("arrow")
        for batch in saved.iter(batch_size=1000):
            yield from batch.to_pylist()
    except Exception as error:  # whatever a torn or newer folder makes the library raise
        for file in _files_below(folder):
            opened(file).close()  # names a pointer
        raise UserError(
            f"{folder}: datasets cannot read what it saved there ({type(error).__name__}); save it "
            "again"
        ) from error


def _hash_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{os.path.getsize(file)}\0".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _hub(name: str, flag: str) -> Content:
    """Open a data set of the hub, or of the library's cache."""
    found = load_from_hub(name, problem=f"{flag}: the hub did not give it",
                          remedy=f"download it and give {name}=PATH")
    parts = _by_part(found)
    if TRAIN not in parts:
        raise UserError(
            f"{flag}: has no split train, but {', '.join(map(str, found))}; download it and give "
            "the file to train on"
        )
    marks = {str(split): getattr(rows, "_fingerprint", None) for split, rows in found.items()}
    return ({part: [partial(iter, found[split]) for split in splits]
             for part, splits in parts.items()}, lambda: json.dumps(marks))


def load_from_hub(
    name: str, configuration: str | None = None, *, problem: str, remedy: str, **options: Any
) -> Any:
    """Load a data set of the hub, or of the library's cache.

    Raises:
        UserError: the hub did not give it; says problem and remedy.
    """
    import datasets

    failed: Exception | None = None
    # Sets made by a script are on the second branch, as parquet.
    for branch in ({}, {"revision": "refs/convert/parquet"}):
        try:
            return datasets.load_dataset(name, configuration, **options, **branch)
        except Exception as error:  # the library raises a dozen kinds when the hub is out of reach
            failed = failed or error
            if "script" not in str(error):
                break
    raise UserError(f"{problem} ({type(failed).__name__}); {remedy}") from failed


# --- files ---------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a .json, .jsonl, .ndjson or .parquet file, also a compressed one.

    JSON is read in any layout: an object on each line, one list, an object around a list, columns
    instead of rows, and any of them over several lines.

    Raises:
        UserError: the file cannot be read; the message names the line.
    """
    kind = _kind(path)
    if kind not in _KINDS:
        raise UserError(f"{path}: unknown kind of file; known are .json, .jsonl, .parquet, also "
                        f"with {', '.join(SUFFIXES[:-1])}")
    return _parquet(path) if kind == ".parquet" else _json(path)


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in SUFFIXES), "")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with opened(path) as file, pyarrow.parquet.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except UserError:
        raise
    except (pyarrow.ArrowException, ValueError, *UNREADABLE) as error:
        raise UserError(f"{path}: not a parquet file; write it again") from error


def _json(path: Path) -> Iterator[Row]:
    values = _values(path)
    some = list(islice(values, 2))
    if len(some) == 1:
        yield from _rows_in(some[0][1], path)
    else:
        for number, value in chain(some, values):
            yield _object(value, f"{path}, line {number}")


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the JSON values of a file, each with the number of its first line."""
    number, found = 0, False
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                text = _decoded(line, path, number)
                if not text.strip():
                    continue
                try:
                    value = json.loads(text.rstrip())
                except (ValueError, RecursionError) as error:  # broken, or not the whole value
                    text += _decoded(file.read(), path, number + 1)
                    yield from _spread(text, path, number, error if found else None)
                    return
                yield number, value
                found = True
    except UNREADABLE as error:
        where = f", after line {number}" if number else ""
        raise UserError(f"{path}{where}: cannot be read ({error}); write it again") from error


_NOT_SPACE = re.compile(r"\S|\Z")


def _spread(
    text: str, path: Path, number: int, error_of_line: Exception | None
) -> Iterator[tuple[int, Any]]:
    """Yield the JSON values of a text that begins with a line of this number, spread over lines.

    If it holds none, and the values before it were on a line each, the error is that of the line.
    """
    decoder, position, line = json.JSONDecoder(), len(text) - len(text.lstrip()), number
    while position < len(text):
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(text, error_of_line or error, path, number) from error
        yield line, value
        after = _NOT_SPACE.search(text, end)
        start, position, error_of_line = position, after.start() if after else len(text), None
        line += text.count("\n", start, position)


def _not_json(text: str, error: Exception, path: Path, number: int) -> UserError:
    """Say why a text that begins with a line of this number is not JSON."""
    reason = str(error).split(";")[0]  # numbers too long, lists too deep
    if isinstance(error, json.JSONDecodeError):
        reason, number = error.msg, number + error.lineno - 1
    problem = f"not JSON ({reason}); mend or remove the line"
    if text.lstrip().startswith("<"):
        problem = "not JSON but a web page; download the file itself"
    return UserError(f"{path}, line {number}: {problem}")


def _rows_in(value: Any, path: Path) -> Iterator[Row]:
    """Yield the rows in the only JSON value of a file: a list, or an object in a known layout."""
    if isinstance(value, dict):
        several = [name for name, rows in value.items() if _are_rows(rows)]
        if len(several) > 1:
            raise UserError(f"{path}: an object with several lists of rows ({', '.join(several)}); "
                            "write each to a file of that name, and give their folder")
        value = next(filter(_are_rows, _layouts(value)), [value])
    elif not isinstance(value, list):
        value = [value]
    for entry, row in enumerate(value, 1):
        yield _object(row, f"{path}, entry {entry}")


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and any(
        isinstance(row, dict) and formats.fits(row) for row in rows[:10])


def _layouts(value: Row) -> Iterator[Any]:
    """Yield what may be the rows of an object: itself, its columns, or a list somewhere in it."""
    inner = list(value.values())
    yield [value]
    for kind in (list, dict):  # columns, as lists or by the number of the row
        if inner and all(isinstance(one, kind) and len(one) == len(inner[0]) for one in inner):
            columns = [one.values() if kind is dict else one for one in inner]
            yield [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
            yield inner
    if {"columns", "data"} <= value.keys() and all(isinstance(one, list) for one in inner):
        yield [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    for one in inner:
        if isinstance(one, list):
            yield [row.get("row", row) if isinstance(row, dict) else row for row in one]
            yield one
        elif isinstance(one, dict):
            yield from _layouts(one)


def _decoded(data: bytes, path: Path, number: int) -> str:
    """Decode data that begins with a line of this number."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {number}: not UTF-8; convert the file") from error


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object with named columns; mend or remove it")
    return row
