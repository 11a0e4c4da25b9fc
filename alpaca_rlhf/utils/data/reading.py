"""Rows of files, folders and hub data sets, one at a time, whatever they are kept in.

Known are .json (one list, or lines) and .jsonl, both also .gz, .parquet, folders of such files in
any layout of the hub's, and folders that `datasets` saved. Nothing is held in memory but the row at
hand (and the text of a .json list), and a fingerprint of a source never parses it.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from alpaca_rlhf.utils.errors import UserError

Row = dict[str, Any]
TRAIN, HELD_OUT = "train", "held_out"
# What a split may be called, the beginning of a file's or folder's name included.
_SPLITS = {"train": TRAIN, "eval": HELD_OUT, "test": HELD_OUT, "validation": HELD_OUT,
           "valid": HELD_OUT, "dev": HELD_OUT}
_KINDS = (".json", ".jsonl", ".parquet")
_PARQUET_BRANCH = "refs/convert/parquet"  # where the hub keeps script-based sets as parquet
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Rows:
    """What a data set is kept in.

    Attributes:
        parts: for "train" and, where the data set has one, "held_out": reads the rows.
        fingerprint: changes whenever the content does; computed without parsing.
    """

    parts: dict[str, Callable[[], Iterator[Row]]]
    fingerprint: Callable[[], str]


def open_file(path: Path) -> Rows:
    """One file, all of it for training."""
    return Rows({TRAIN: lambda: read_rows(path)}, lambda: _hash_of([path]))


def open_folder(folder: Path, given: str) -> Rows:
    """A folder of data files, or one that `datasets` saved.

    Args:
        folder: may hold its files in folders of its own, as the hub's repositories do.
        given: the flag and its value, for messages.

    Raises:
        UserError: there is nothing to train on in it.
    """
    saved = _saved_parts(folder)
    files = [file for file in sorted(folder.rglob("*")) if _is_data(file, folder)]
    if saved:
        parts = {part: _joined([partial(_saved_rows, path) for path in paths])
                 for part, paths in saved.items()}
        return Rows(parts, lambda: _hash_of(_files_below(folder)))
    by_split: dict[str, list[Path]] = {}
    for file in files:
        split = _split_of(file, folder)
        if split:
            by_split.setdefault(split, []).append(file)
    grouped = by_part(by_split)
    if TRAIN not in grouped:
        raise UserError(
            f"{given}: the folder {folder} has no train.json, train.jsonl or "
            "train.parquet; add one, or give the file itself"
        )
    chosen = {part: [file for split in splits for file in by_split[split]]
              for part, splits in grouped.items()}
    parts = {part: _joined([partial(read_rows, file) for file in files])
             for part, files in chosen.items()}
    return Rows(parts, lambda: _hash_of([file for files in chosen.values() for file in files]))


def open_hub(name: str, given: str) -> Rows:
    """A data set of the hub (or of the library's cache).

    Raises:
        UserError: the hub did not give it.
    """
    found = _from_hub(name, given)
    parts = {part: _joined([partial(iter, found[split]) for split in splits])
             for part, splits in by_part(list(found)).items()}
    if TRAIN not in parts:
        raise UserError(
            f"{given}: has no split train, but {', '.join(map(str, found))}; download it and give "
            "the file to train on"
        )
    marks = {str(split): getattr(rows, "_fingerprint", None) for split, rows in found.items()}
    return Rows(parts, lambda: json.dumps(marks))


def by_part(splits: Iterable[str]) -> dict[str, list[str]]:
    """Splits by what they are for; where some are made for preferences, those alone.

    (`ultrafeedback_binarized` has each of its rows in train_prefs, train_sft and train_gen.)
    """
    names = [str(split) for split in splits]
    preferred = [name for name in names if name.endswith("_prefs")]
    parts: dict[str, list[str]] = {}
    for name in preferred or names:
        part = _part(name)
        if part:
            parts.setdefault(part, []).append(name)
    return parts


def _part(name: str) -> str | None:
    """train_prefs -> train, test -> held_out, other -> None."""
    return _SPLITS.get(re.split(r"[^a-z]", name.lower())[0])


def _joined(readers: list[Callable[[], Iterator[Row]]]) -> Callable[[], Iterator[Row]]:
    def rows() -> Iterator[Row]:
        for reader in readers:
            yield from reader()

    return rows


def _from_hub(name: str, given: str) -> Any:
    import datasets

    failed: Exception | None = None
    for options in ({}, {"revision": _PARQUET_BRANCH}):
        try:
            return datasets.load_dataset(name, **options)
        except Exception as error:  # the library raises a dozen kinds when the hub is out of reach
            failed = failed or error
            if "script" not in str(error):
                break
    raise UserError(
        f"{given}: the hub did not give it ({type(failed).__name__}); download it and give "
        f"{name}=PATH"
    ) from failed


# --- folders -------------------------------------------------------------------------------------


def _suffixes(file: Path) -> list[str]:
    return [suffix for suffix in file.suffixes if suffix != ".gz"]


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and _suffixes(file)[-1:] in ([kind] for kind in _KINDS) and file.is_file()


def _split_of(file: Path, folder: Path) -> str | None:
    """The split named by the file (train-00000-of-00002.parquet) or by the folder it is in."""
    inner = [part.name for part in file.relative_to(folder).parents if part.name]
    for name in (file.name.split(".")[0], *inner):
        stem = re.sub(r"-\d{5}-of-\d{5}.*$", "", name)
        if _part(stem):
            return stem
    return None


def _files_below(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _saved_parts(folder: Path) -> dict[str, list[Path]]:
    """Folders of what `datasets` saved, by part; empty when it did not save this one."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {TRAIN: [folder]}
    if not (folder / "dataset_dict.json").is_file():
        return {}
    splits = sorted(path.name for path in folder.iterdir() if (path / "state.json").is_file())
    return {part: [folder / name for name in names] for part, names in by_part(splits).items()}


def _saved_rows(folder: Path) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        for start in range(0, len(saved), _ROWS_AT_ONCE):
            yield from saved.select(range(start, min(start + _ROWS_AT_ONCE, len(saved)))).to_list()
    except Exception as error:  # whatever a torn or newer folder makes the library raise
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


# --- files ---------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a .json (one list, or lines), .jsonl or .parquet file; .json and .jsonl also .gz.

    Raises:
        UserError: the file is not of its form; the message names the line.
    """
    kind = (_suffixes(path) or [""])[-1]
    if kind not in _KINDS:
        raise UserError(f"{path}: unknown kind of file; known are .json, .jsonl (.gz), .parquet")
    return _parquet(path) if kind == ".parquet" else _json(path, kind == ".json")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a parquet file; write it again") from error


def _json(path: Path, may_be_list: bool) -> Iterator[Row]:
    number = 0
    try:
        with _opened(path) as file:
            first = True
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if first and may_be_list and line.lstrip().startswith(b"["):
                    # A list is parsed from its whole text; its lines count from the first.
                    blank = b"\n" * (number - 1)
                    yield from _one_list(_decoded(blank + line + file.read(), path, 1), path)
                    return
                first = False
                yield _object(_parsed(_decoded(line, path, number), path, number), path, number)
    except (OSError, EOFError, zlib.error) as error:
        where = f", after line {number}" if number else ""
        raise UserError(f"{path}{where}: cannot be read ({error}); write it again") from error


def _opened(path: Path) -> IO[bytes]:
    if path.suffix != ".gz":
        return path.open("rb")
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        number += line.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {number}: not UTF-8; convert the file") from error


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, numbers too long, lists too deep
        if text.lstrip().startswith("<"):
            problem = "not JSON but a web page; download the file itself"
        else:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problem = f"not JSON ({reason.split(';')[0]}); mend or remove the line"
        raise UserError(f"{path}, line {line}: {problem}") from error


def _object(row: Any, path: Path, line: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{path}, line {line}: not an object with named columns; mend or remove the line"
        )
    return row


def _one_list(text: str, path: Path) -> Iterator[Row]:
    """Entries of a JSON list, parsed one by one."""
    position, number = _skip_space(text, text.index("[") + 1), 0
    more = not text.startswith("]", position)
    while more:
        row, position = _entry(text, position, path)
        number += 1
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, entry {number}: not an object with named columns; mend or remove it"
            )
        yield row
        more = text.startswith(",", position)
        if not more and not text.startswith("]", position):
            raise _broken_list("Expecting ',' delimiter", text, position, path)
        position += more
    if text[position + 1 :].strip():
        raise _broken_list("something follows the list", text, position, path)


def _entry(text: str, position: int, path: Path) -> tuple[Any, int]:
    """The value that begins at `position`, and where the text goes on behind it."""
    position = _skip_space(text, position)
    try:
        row, position = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _broken_list(error.msg, text, error.pos, path) from error
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise _broken_list(str(error).split(";")[0], text, position, path) from error
    return row, _skip_space(text, position)


def _broken_list(reason: str, text: str, position: int, path: Path) -> UserError:
    line = text.count("\n", 0, position) + 1
    return UserError(f"{path}, line {line}: not JSON ({reason}); mend or remove the line")


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None, "an empty match always is one"
    return found.end()
