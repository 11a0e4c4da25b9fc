"""Data sets to the encoded rows of one step: split, tokenized, truncated, counted and cached.

The data is read once, a row at a time; the samples of the step go to an Arrow file, and from there
in batches through the tokenizer. One process writes the cache, the others wait and read it. A cache
is found by all that decides its content, the bytes of the data included, so a second start parses
nothing; one with a file missing or cut short is made again.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import filelock
import numpy as np
import tokenizers
import transformers

from alpaca_rlhf.utils import console, distributed
from alpaca_rlhf.utils.configs import DataConfig, SFTConfig
from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.encode import (
    FILTERED_OUT,
    LENGTH,
    Lengths,
    Rows,
    encode_pairs,
    encode_prompts,
    encode_sft,
)
from alpaca_rlhf.utils.data.samples import Sample, Tally
from alpaca_rlhf.utils.data.sources import Source, open_sources
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

FORMAT = 4
"""Part of the cache key: raise it when this package makes other rows from the same data."""

PROMPT = "prompt"  # column of a row: the digest of its prompt
_BATCH = 256  # samples that are tokenized at once


@dataclass(frozen=True)
class Prepared:
    """Encoded rows of one step."""

    train: datasets.Dataset
    held_out: datasets.Dataset  # rows on which no step trains
    # Number of rows used, cut and filtered out, by reason and data set; and the split.
    report: dict[str, Any]

    def describe(self) -> str:
        """Return the report: one line, one for each of several data sets, and what is not read."""
        cut = "".join(f"; {n:,} {what}" for what, n in self.report["cut"].items() if n)
        lines = [f"data: {_counts(self.report, cut)}"]
        if len(self.report["data_sets"]) > 1:
            lines += [
                f"  {one['data_set']}: {one['rows']:,} rows read, {one['samples']:,} usable "
                f"samples; {_counts(one)}"
                for one in self.report["data_sets"]
            ]
        for one in self.report["data_sets"]:
            if unread := ", ".join(f"{what} ({n:,} rows)" for what, n in one["unread"].items()):
                lines.append(f"warning: {one['data_set']}: nothing reads {unread}")
        return "\n".join(lines)

    def lengths(self, sequences: int = 1) -> list[int]:
        """Return the tokens of each training row, all its sequences padded to the longest."""
        return [sequences * length for length in self.train[LENGTH][:]]

    def fingerprint(self) -> str:
        """Return a hash of the training rows in their order, which a resumed run must have too."""
        prompts = np.asarray(self.train[PROMPT][:])
        lengths = np.asarray(self.lengths())
        return hashlib.sha256(prompts.tobytes() + lengths.tobytes()).hexdigest()

    def check_against(self, folder: str, what: str) -> None:
        """Say on the console which of this data an earlier model was trained on."""
        prompts = [rows[PROMPT][:] if len(rows) else [] for rows in (self.train, self.held_out)]
        for line in splitting.check_record(folder, what, self.report["split"], *prompts):
            console.say(line)

    def save_record(self, folder: Path | None) -> None:
        """Save split and prompts with the model in `folder`, for the next step to check."""
        if folder is not None and distributed.is_main():
            splitting.save_record(folder, self.report["split"], self.train[PROMPT][:])


def _counts(report: dict[str, Any], cut: str = "") -> str:
    out = ", ".join(f"{n:,} {reason}" for reason, n in report["filtered_out"].items())
    return (
        f"{report['train']:,} rows to train on, {report['held_out']:,} held out{cut}; filtered "
        f"out: {out or 'none'}"
    )


# --- the steps -----------------------------------------------------------------------------------


def prepare_sft(
    data: DataConfig, sft: SFTConfig, *, seed: int, max_seq_len: int, chat: ChatFormat
) -> Prepared:
    """Prepare step 1, its share of the data and data sets of its own, as `input_ids` and `labels`.

    Raises:
        UserError: rows that cannot be read, nothing left to train on, or a row over length with
            `--overlong error`.
    """
    return prepare(
        sources=sft_sources(data, sft), split=Split(1, data.shares, seed, tuple(data.lang)),
        encode=encode_sft, chat=chat, lengths=Lengths.of_sequence(max_seq_len, data.overlong),
        data=data, train_on=sft.train_on, train_on_prompt=sft.train_on_prompt,
    )


def sft_sources(data: DataConfig, sft: SFTConfig) -> list[Source]:
    """Open the data sets of step 1: those all steps share, and those only it uses.

    Raises:
        UserError: one of them cannot be found.
    """
    return open_sources(data.data_path) + open_sources(
        sft.sft_only_data_path, "--sft_only_data_path", whole=True
    )


def prepare_pairs(
    data: DataConfig, *, seed: int, max_seq_len: int, chat: ChatFormat
) -> Prepared:
    """Prepare step 2: its share of the pairs, as `chosen_ids` and `rejected_ids`.

    Errors are those of `prepare_sft`.
    """
    return prepare(
        sources=open_sources(data.data_path), split=Split(2, data.shares, seed, tuple(data.lang)),
        encode=encode_pairs, chat=chat, lengths=Lengths.of_sequence(max_seq_len, data.overlong),
        data=data,
    )


def prepare_prompts(
    data: DataConfig, *, seed: int, max_prompt_seq_len: int, chat: ChatFormat
) -> Prepared:
    """Prepare step 3: its share of the prompts, as `prompt_ids` and `messages`.

    Errors are those of `prepare_sft`.
    """
    return prepare(
        sources=open_sources(data.data_path), split=Split(3, data.shares, seed, tuple(data.lang)),
        encode=encode_prompts, chat=chat,
        lengths=Lengths.of_prompt(max_prompt_seq_len, data.overlong), data=data,
    )


# --- the cache -----------------------------------------------------------------------------------


def cache_home(data_output_path: str | None) -> Path:
    """Return `--data_output_path`, or this project's folder under the user's cache home.

    Raises:
        UserError: the folder cannot be made or written.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alpaca_rlhf"
    home = Path(data_output_path).absolute() if data_output_path else default
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--data_output_path {home}: cannot be made ({error.strerror}); give a folder that can"
        ) from error
    if not os.access(home, os.W_OK):
        raise UserError(f"--data_output_path {home}: cannot be written; give a folder that can")
    return home


def prepare(
    *, sources: Sequence[Source], split: Split, encode: Callable[..., Rows], chat: ChatFormat,
    lengths: Lengths, data: DataConfig, **options: Any,
) -> Prepared:
    """Encode one step's part of the data, or read it from the cache.

    `encode` makes rows of samples; it is given `chat`, `lengths` and `options` too. Errors are
    those of `prepare_sft`.
    """
    home = cache_home(data.data_output_path) / "data"
    folder = home / _cache_key(sources, split, chat, lengths, options)
    with distributed.main_first():
        if not _is_whole(folder):
            home.mkdir(exist_ok=True)
            # Runs that start together prepare once. (The lock goes with the process that holds it.)
            with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
                if not _is_whole(folder):
                    arguments = {"encode": encode, "chat": chat, "lengths": lengths, **options}
                    _write(folder, sources, split, arguments, data.preprocessing_num_workers)
    report = json.loads((folder / "report.json").read_text())
    del report["files"]
    return Prepared(_read(folder / "train"), _read(folder / "held_out"), report)


def _cache_key(
    sources: Sequence[Source], split: Split, chat: ChatFormat, lengths: Lengths,
    options: dict[str, Any],
) -> str:
    """Return a hash of everything that decides the rows."""
    tokenizer = chat.tokenizer
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    settings = {
        "format": FORMAT,
        "libraries": [tokenizers.__version__, transformers.__version__],
        "vocabulary": backend or sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "special": [tokenizer.bos_token_id, chat.eos_id, chat.pad_id],
        "lengths": asdict(lengths),
        "split": asdict(split),
        "options": options,
        "data": [[source.label, source.name, source.share, source.whole, source.fingerprint()]
                 for source in sources],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _is_whole(folder: Path) -> bool:
    """Return whether a cache has every file it was written with, each of its size."""
    try:
        files = json.loads((folder / "report.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _read(folder: Path) -> datasets.Dataset:
    if not folder.exists():  # the library could not read again what it writes of no rows
        return datasets.Dataset.from_dict({})
    return datasets.load_from_disk(str(folder))


def _write(
    folder: Path, sources: Sequence[Source], split: Split, arguments: dict[str, Any],
    workers: int | None,
) -> None:
    if folder.exists():
        console.say(f"data: the cache {folder} is incomplete; it is made again")
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    tallies = [Tally() for _ in sources]
    datasets.disable_progress_bars()
    try:
        temporary.mkdir(parents=True)
        samples = _collect(splitting.for_step(sources, split, tallies), temporary / "samples")
        rows = _encode(samples, arguments, temporary / "samples", workers)
        report: dict[str, Any] = {"cut": Counter(), "data_sets": [
            {"data_set": source.label, "rows": tally.rows, "samples": tally.samples,
             "filtered_out": tally.unused, "unread": tally.unread}
            for source, tally in zip(sources, tallies, strict=True)]}
        for name in ("train", "held_out"):
            _save_part(name, rows, arguments["lengths"], report, temporary)
        report["split"] = {
            "step": split.step, "seed": split.seed, "shares": list(split.shares),
            "held_out_share": splitting.HELD_OUT_SHARE, "languages": list(split.languages),
            "data": [{"data_set": source.label, "share": source.share,
                      "fingerprint": source.fingerprint()} for source in sources],
        }
        shutil.rmtree(temporary / "samples")
        report["files"] = {
            str(file.relative_to(temporary)): file.stat().st_size
            for file in sorted(temporary.rglob("*")) if file.is_file()
        }
        (temporary / "report.json").write_text(json.dumps(report))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_SAMPLES = datasets.Features({
    "sample": datasets.Value("string"), "source": datasets.Value("int32"),
    PROMPT: datasets.Value("int64"), "part": datasets.Value("string"),
})


def _collect(samples: Iterable[splitting.Placed], folder: Path) -> datasets.Dataset:
    """Write samples to an Arrow file, so that they need not fit in memory."""
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    path = str(folder / "samples.arrow")
    with ArrowWriter(features=_SAMPLES, path=path) as writer:
        for one in samples:
            text = json.dumps(vars(one.sample), ensure_ascii=False)
            writer.write({"sample": text, "source": one.source, PROMPT: one.digest,
                          "part": "train" if one.step else "held_out"})
        count, _ = writer.finalize()
    return datasets.Dataset.from_file(path) if count else datasets.Dataset.from_dict({})


def _encode(
    samples: datasets.Dataset, arguments: dict[str, Any], folder: Path, workers: int | None
) -> datasets.Dataset:
    if not len(samples):
        return samples
    workers = workers or min(8, distributed.usable_cores())
    # A worker for fewer than a few batches takes longer to start than to work.
    workers = min(workers, max(1, len(samples) // (8 * _BATCH)))
    if workers > 1:  # threads of each worker's tokenizer would only compete
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return samples.map(
        _encode_batch, fn_kwargs=arguments, batched=True, batch_size=_BATCH,
        remove_columns=["sample"], num_proc=workers if workers > 1 else None,
        cache_file_name=str(folder / "rows.arrow"), load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,
    )


def _encode_batch(
    batch: dict[str, list[Any]], encode: Callable[..., Rows], **arguments: Any
) -> dict[str, list[Any]]:
    records = [json.loads(text) for text in batch["sample"]]
    samples = [Sample(**{**one, "messages": tuple(one["messages"])}) for one in records]
    rows = encode(samples, **arguments)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    ids = [name for name in columns if name.endswith("ids") or name == "labels"]
    return columns | {name: [np.asarray(row, np.int32) for row in columns[name]] for name in ids}


def _save_part(
    name: str, rows: datasets.Dataset, lengths: Lengths, report: dict[str, Any], folder: Path
) -> None:
    """Save the usable rows of a part, and count them and the others in the report."""
    parts = rows["part"][:] if len(rows) else []
    rows = rows.select([number for number, part in enumerate(parts) if part == name])
    columns = {column: rows[column][:] if len(rows) else []
               for column in ("cut", "prompt_cut", "source", FILTERED_OUT)}
    if name == "train" and len(rows) and all(columns["prompt_cut"]):
        raise UserError(f"{lengths.flag}: all {len(rows)} prompts are longer; raise it")
    if any(columns["cut"]) and lengths.overlong == "error":
        raise UserError(
            f"--overlong error: {sum(columns['cut'])} rows are over {lengths.flag}; raise it, or "
            "take --overlong truncate or drop"
        )
    kept = [number for number, reason in enumerate(columns[FILTERED_OUT]) if not reason]
    used = Counter(columns["source"][number] for number in kept)
    for number, one in enumerate(report["data_sets"]):
        one[name] = used[number]
    for source, reason in zip(columns["source"], columns[FILTERED_OUT], strict=True):
        if reason:
            report["data_sets"][source]["filtered_out"][reason] += 1
    report[name] = len(kept)
    report["cut"][f"cut to {lengths.flag}"] += sum(columns["cut"][number] for number in kept)
    report["filtered_out"] = out = sum(
        (one["filtered_out"] for one in report["data_sets"]), Counter[str]())
    if name == "train" and not kept:
        reasons = "; ".join(f"{n} {reason}" for reason, n in out.items())
        raise UserError(
            f"--data_path: no row is left to train on ({reasons or 'no data'}); give more data, or "
            "this step a larger share of --data_split"
        )
    if kept:
        unused = ["cut", "prompt_cut", FILTERED_OUT, "source", "part"]
        rows.select(kept).remove_columns(unused).save_to_disk(str(folder / name))
