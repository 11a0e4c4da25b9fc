"""Sources -> ids of one step: split, tokenized, cut to length, counted and cached.

The rows are read once, one at a time; what a step needs of them goes to an Arrow file, and from
there in batches through the tokenizer to the rows that are trained on. One process writes the
cache, the others wait and read it. A cache is found by what decides it, the bytes of the data
included, so a second start parses nothing; one that is torn is made again.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
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
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.sources import Source, Tally, open_sources
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.losses import IGNORE_INDEX

Encoder = Callable[[Sequence[Sample]], list[dict[str, Any]]]
DISCARDED = "discarded"  # column of an encoded row: the reason it is not used, or ""
PROMPT = "prompt"  # column of an encoded row: the digest of its prompt
LENGTH = "length"  # column of an encoded row: tokens of it, of the longer one of a pair
_THREADS = "TOKENIZERS_PARALLELISM"
_BATCH = 256  # samples that are tokenized at once


@dataclass(frozen=True)
class Prepared:
    """One step's data, ready to be batched.

    Attributes:
        train: encoded rows of this step's part.
        held_out: encoded rows that no step trains on.
        report: how many rows were used, cut and counted out, by reason and data set.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: dict[str, Any]

    def describe(self) -> str:
        """The report: a line of all, and where there are several data sets one of each."""
        cut = "".join(f"; {n:,} {what}" for what, n in self.report["cut"].items() if n)
        lines = [f"data: {_counts(self.report, cut)}"]
        if len(self.report["data_sets"]) > 1:
            lines += [
                f"  {one['data_set']}: {one['rows']:,} rows read, {one['samples']:,} usable "
                f"samples; {_counts(one)}"
                for one in self.report["data_sets"]
            ]
        return "\n".join(lines)

    def lengths(self) -> list[int]:
        """Tokens of each row to train on."""
        return self.train[LENGTH][:]

    def fingerprint(self) -> str:
        """Of the rows to train on, in their order: what tells that a resumed run has the same."""
        prompts = np.asarray(self.train[PROMPT][:])
        lengths = np.asarray(self.lengths())
        return hashlib.sha256(prompts.tobytes() + lengths.tobytes()).hexdigest()

    def check_against(self, folder: str, what: str) -> None:
        """Say on the console what of this data an earlier model was trained on already."""
        prompts = [rows[PROMPT][:] if len(rows) else [] for rows in (self.train, self.held_out)]
        for line in splitting.check_record(folder, what, self.report, *prompts):
            console.say(line)

    def save_record(self, folder: Path | None) -> None:
        """Leave what was trained on in a model's folder, for the next step to check."""
        if distributed.is_main():
            splitting.save_record(folder, self.report, self.train[PROMPT][:])


def _counts(report: dict[str, Any], cut: str = "") -> str:
    out = ", ".join(f"{n:,} {reason}" for reason, n in report["counted_out"].items())
    return (
        f"{report['train']:,} rows to train on, {report['held_out']:,} held out{cut}; counted out: "
        f"{out or 'none'}"
    )


def cache_home(data_output_path: str | None) -> Path:
    """`--data_output_path`, or the folder of this project under the user's cache home.

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


# --- lengths -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Budgets in tokens and what happens to a row that is over them.

    Attributes:
        prompt: most tokens of a prompt; the end of a longer one is kept.
        response: most tokens of a reply, eos included; the start of a longer one is kept.
        overlong: truncate, drop or error.
        flag: the flag the budgets come from, for messages.
    """

    prompt: int
    response: int
    overlong: str
    flag: str

    @classmethod
    def of_sequence(cls, max_seq_len: int, overlong: str) -> "Lengths":
        """Steps 1 and 2: one half of the sequence each; what one leaves the other takes."""
        half = max_seq_len // 2
        return cls(half, max_seq_len - half, overlong, f"--max_seq_len {max_seq_len}")

    def fit(self, prompt: list[int], *responses: list[int]) -> tuple[list[int], list[list[int]]]:
        """Cut a prompt and its replies so that each pair of them fits; a cut reply has no eos."""
        total = self.prompt + self.response
        longest = max((len(response) for response in responses), default=self.response)
        for_prompt = max(self.prompt, total - longest)
        prompt = prompt[max(0, len(prompt) - for_prompt) :]
        return prompt, [response[: total - len(prompt)] for response in responses]


# --- encoding ------------------------------------------------------------------------------------


def encode_replies(
    samples: Sequence[Sample], form: ChatFormat, lengths: Lengths, train_on: str = "all",
    train_on_prompt: bool = False,
) -> list[dict[str, Any]]:
    """Step 1: `input_ids`, and `labels` that are -100 where nothing is trained.

    Args:
        samples: of which `chosen` is learnt.
        form: the tokenizer.
        lengths: budgets.
        train_on: "last" trains the reply alone, "all" the assistant's earlier turns too, unless
            they are the replies of rows of their own.
        train_on_prompt: every token is trained.
    """
    dialogues = form.segments([sample.messages for sample in samples])
    replies = form.responses(sample.chosen for sample in samples)
    rows = []
    for sample, segments, reply in zip(samples, dialogues, replies, strict=True):
        whole = list(chain.from_iterable(segments))
        prompt, (response,) = lengths.fit(whole, reply)
        trained = train_on == "all" and sample.history_is_trained
        labels = whole if train_on_prompt else _labels(segments, trained)
        labels = labels[len(whole) - len(prompt) :]
        row = {"input_ids": prompt + response, "labels": labels + response}
        before, after = len(whole) + len(reply), len(row["input_ids"])
        rows.append(row | _fate(segments, before, after, len(whole) - len(prompt), lengths))
    return rows


def _labels(segments: list[list[int]], trained: bool) -> list[int]:
    """The ids of earlier replies (every second segment) where they are trained, -100 elsewhere.

    A reply that is nothing but its eos is not learnt.
    """
    return [
        token if trained and number % 2 and len(segment) > 1 else IGNORE_INDEX
        for number, segment in enumerate(segments) for token in segment
    ]


def encode_pairs(
    samples: Sequence[Sample], form: ChatFormat, lengths: Lengths
) -> list[dict[str, Any]]:
    """Step 2: `chosen_ids` and `rejected_ids`, each the prompt and one reply."""
    dialogues = form.segments([sample.messages for sample in samples])
    better = form.responses(sample.chosen for sample in samples)
    worse = form.responses(sample.rejected or "" for sample in samples)
    rows = []
    for segments, *full in zip(dialogues, better, worse, strict=True):
        whole = list(chain.from_iterable(segments))
        prompt, (chosen, rejected) = lengths.fit(whole, *full)
        row: dict[str, Any] = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        before = sum(map(len, full)) + len(whole)
        after = len(chosen) + len(rejected) + len(prompt)
        row |= _fate(segments, before, after, len(whole) - len(prompt), lengths)
        row[LENGTH] = len(prompt) + max(len(chosen), len(rejected))
        if chosen == rejected:
            row[DISCARDED] = "replies are alike where they were cut"
        rows.append(row)
    return rows


def encode_prompts(
    samples: Sequence[Sample], form: ChatFormat, lengths: Lengths
) -> list[dict[str, Any]]:
    """Step 3: `prompt_ids`, and the `messages` as JSON, for people and for gold rules."""
    rows = []
    dialogues = form.segments([sample.messages for sample in samples])
    for sample, segments in zip(samples, dialogues, strict=True):
        whole = list(chain.from_iterable(segments))
        prompt = whole[-lengths.prompt :]
        row = {"prompt_ids": prompt, "messages": json.dumps(sample.messages, ensure_ascii=False)}
        cut = len(whole) - len(prompt)
        rows.append(row | _fate(segments, len(whole), len(prompt), cut, lengths))
    return rows


def _fate(
    segments: list[list[int]], before: int, after: int, prompt_cut: int, lengths: Lengths
) -> dict[str, Any]:
    """What all rows have: whether they were cut, why they are not used, and their length."""
    cut = after < before
    reason = f"over {lengths.flag}" if cut and lengths.overlong != "truncate" else ""
    if not segments:
        reason = "refused by the chat template"
    return {"cut": cut, "prompt_cut": prompt_cut > 0, DISCARDED: reason, LENGTH: after}


# --- the steps -----------------------------------------------------------------------------------


def prepare_sft(
    data: DataConfig, sft: SFTConfig, *, seed: int, max_seq_len: int, chat: ChatFormat
) -> Prepared:
    """Prepare step 1: its share of the data, and the data sets that only step 1 uses.

    Args:
        data: data sets and their split.
        sft: which tokens are trained, and the data sets of step 1 alone.
        seed: of the split.
        max_seq_len: maximum length of a sequence in tokens.
        chat: tokenizer and chat template.

    Raises:
        UserError: rows that cannot be read, nothing left to train on, or a row over length with
            `--overlong error`.
    """
    lengths = Lengths.of_sequence(max_seq_len, data.overlong)
    options: dict[str, Any] = {"train_on": sft.train_on, "train_on_prompt": sft.train_on_prompt}
    return prepare(
        sft_sources(data, sft), Split(1, data.shares, seed, tuple(data.lang)),
        partial(encode_replies, form=chat, lengths=lengths, **options), chat, lengths,
        cache_home(data.data_output_path), options, data.preprocessing_num_workers,
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
    """Prepare step 2: its share of the pairs. Arguments and errors are those of `prepare_sft`."""
    lengths = Lengths.of_sequence(max_seq_len, data.overlong)
    return prepare(
        open_sources(data.data_path), Split(2, data.shares, seed, tuple(data.lang)),
        partial(encode_pairs, form=chat, lengths=lengths), chat, lengths,
        cache_home(data.data_output_path), {}, data.preprocessing_num_workers,
    )


def prepare_prompts(
    data: DataConfig, *, seed: int, max_prompt_seq_len: int, chat: ChatFormat
) -> Prepared:
    """Prepare step 3: its share of the prompts, cut to `max_prompt_seq_len` tokens.

    The other arguments and the errors are those of `prepare_sft`.
    """
    lengths = Lengths(
        max_prompt_seq_len, 0, data.overlong, f"--max_prompt_seq_len {max_prompt_seq_len}"
    )
    return prepare(
        open_sources(data.data_path), Split(3, data.shares, seed, tuple(data.lang)),
        partial(encode_prompts, form=chat, lengths=lengths), chat, lengths,
        cache_home(data.data_output_path), {}, data.preprocessing_num_workers,
    )


# --- the cache -----------------------------------------------------------------------------------


def prepare(
    sources: Sequence[Source],
    split: Split,
    encode: Encoder,
    form: ChatFormat,
    lengths: Lengths,
    cache_home: Path,
    variant: dict[str, Any],
    workers: int | None = None,
) -> Prepared:
    """Encode one step's part, or take it from the cache.

    Args:
        sources: data sets.
        split: which of their samples the step uses.
        encode: samples -> rows.
        form: the tokenizer and its template.
        lengths: budgets.
        cache_home: folder under which prepared data is kept.
        variant: what else decides the result (options of the encoder); part of the cache key.
        workers: processes that encode; None takes one for each core, up to eight.

    Raises:
        UserError: rows that cannot be read, nothing left to train on, or a row over length with
            `--overlong error`.
    """
    folder = cache_home / "data" / _cache_key(sources, split, form, lengths, variant)
    with distributed.main_first():
        if not _is_whole(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Runs that start together prepare once. (The lock goes with the process that holds it.)
            with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
                if not _is_whole(folder):
                    _write(sources, split, encode, lengths, folder, workers)
    report = json.loads((folder / "report.json").read_text())
    del report["files"]
    return Prepared(_read(folder / "train"), _read(folder / "held_out"), report)


def _is_whole(folder: Path) -> bool:
    """Whether a cache has every file it was written with, none of them shorter or longer."""
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
    sources: Sequence[Source], split: Split, encode: Encoder, lengths: Lengths, folder: Path,
    workers: int | None,
) -> None:
    if folder.exists():
        console.say(f"data: the cache {folder} is torn; it is made again")
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    tallies = [Tally() for _ in sources]
    datasets.disable_progress_bars()
    try:
        temporary.mkdir(parents=True)
        parts = _collect(splitting.for_step(sources, split, tallies), temporary)
        report = _encode_parts(parts, encode, lengths, tallies, temporary, workers)
        for tally, one, source in zip(tallies, report["data_sets"], sources, strict=True):
            one |= {"data_set": source.label, "rows": tally.rows, "samples": tally.samples,
                    "counted_out": tally.unused}
        report["split"] = _split_record(sources, split)
        for name in parts:
            shutil.rmtree(temporary / f"{name}.samples", ignore_errors=True)
        report["files"] = {
            str(file.relative_to(temporary)): file.stat().st_size
            for file in sorted(temporary.rglob("*")) if file.is_file()
        }
        (temporary / "report.json").write_text(json.dumps(report))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split_record(sources: Sequence[Source], split: Split) -> dict[str, Any]:
    return {
        "step": split.step, "seed": split.seed, "shares": list(split.shares),
        "held_out_share": splitting.HELD_OUT_SHARE, "languages": list(split.languages),
        "data": [{"data_set": source.label, "share": source.share,
                  "fingerprint": source.rows.fingerprint()} for source in sources],
    }


_SAMPLES = datasets.Features({
    "sample": datasets.Value("string"), "source": datasets.Value("int32"),
    PROMPT: datasets.Value("int64"),
})


def _collect(samples: Iterable[splitting.Placed], folder: Path) -> dict[str, datasets.Dataset]:
    """Samples as Arrow files on disk: those to train on, and those held out."""
    from datasets.arrow_writer import ArrowWriter

    writers = {}
    for name in ("train", "held_out"):
        (folder / f"{name}.samples").mkdir()
        path = folder / f"{name}.samples" / "samples.arrow"
        writers[name] = (path, ArrowWriter(features=_SAMPLES, path=str(path)))
    for one in samples:
        _, writer = writers["train" if one.step else "held_out"]
        writer.write({
            "sample": json.dumps(asdict(one.sample), ensure_ascii=False), "source": one.source,
            PROMPT: int.from_bytes(splitting.digest(one.key), "big", signed=True),
        })
    found = {}
    for name, (path, writer) in writers.items():
        rows, _ = writer.finalize()
        writer.close()
        empty = datasets.Dataset.from_dict({})
        found[name] = datasets.Dataset.from_file(str(path)) if rows else empty
    return found


def _encode_parts(
    parts: dict[str, datasets.Dataset], encode: Encoder, lengths: Lengths,
    tallies: Sequence[Tally], folder: Path, workers: int | None,
) -> dict[str, Any]:
    """Encode both parts into `folder`; gives back the report."""
    report: dict[str, Any] = {"cut": Counter(), "data_sets": [{} for _ in tallies]}
    for name, samples in parts.items():
        rows = _encode_all(samples, encode, folder / f"{name}.samples", workers)
        if name == "train" and len(rows) and all(rows["prompt_cut"]):
            raise UserError(f"{lengths.flag}: all {len(rows)} prompts are longer; raise it")
        rows = _without_discarded(rows, lengths, report, tallies)
        used = Counter(rows["source"][:] if len(rows) else [])
        for number, one in enumerate(report["data_sets"]):
            one[name] = used[number]
        report[name] = len(rows)
        if name == "train" and not len(rows):
            out = sum((tally.unused for tally in tallies), Counter[str]())
            reasons = "; ".join(f"{n} {why}" for why, n in out.items())
            raise UserError(
                f"--data_path: no row is left to train on ({reasons or 'no data'}); give more "
                "data, or this step a larger share of --data_split"
            )
        if len(rows):
            rows.remove_columns(["source"]).save_to_disk(str(folder / name))
    report["counted_out"] = sum((tally.unused for tally in tallies), Counter[str]())
    return report


def _encode_all(
    samples: datasets.Dataset, encode: Encoder, folder: Path, workers: int | None
) -> datasets.Dataset:
    if not len(samples):
        return samples
    workers = workers or min(8, distributed.usable_cores())
    # A worker for fewer than a few batches takes longer to start than to work.
    workers = min(workers, max(1, len(samples) // (8 * _BATCH)))
    with _threads_of_tokenizer(workers == 1):
        return samples.map(
            partial(_encode_batch, encode), batched=True, batch_size=_BATCH,
            remove_columns=["sample"], num_proc=workers if workers > 1 else None,
            cache_file_name=str(folder / "rows.arrow"), load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,
        )


@contextmanager
def _threads_of_tokenizer(wanted: bool) -> Iterator[None]:
    """Whether the tokenizer may use threads: beside other processes they would only compete."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = str(wanted).lower() if before is None else before
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]


def _encode_batch(encode: Encoder, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = encode([_sample(text) for text in batch["sample"]])
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    ids = [name for name in columns if name.endswith("ids") or name == "labels"]
    return columns | {name: [np.asarray(row, np.int32) for row in columns[name]] for name in ids}


def _without_discarded(
    rows: datasets.Dataset, lengths: Lengths, report: dict[str, Any], tallies: Sequence[Tally]
) -> datasets.Dataset:
    """The rows to use; what was cut or is not used is counted."""
    if not len(rows):
        return rows
    over = sum(rows["cut"])
    if over and lengths.overlong == "error":
        raise UserError(
            f"--overlong error: {over} rows are over {lengths.flag}; raise it, or take --overlong "
            "truncate or drop"
        )
    reasons = rows[DISCARDED][:]
    for reason, source in zip(reasons, rows["source"][:], strict=True):
        if reason:
            tallies[source].unused[reason] += 1
    kept = rows.select([number for number, reason in enumerate(reasons) if not reason])
    report["cut"][f"cut to {lengths.flag}"] += sum(kept["cut"]) if len(kept) else 0
    return kept.remove_columns(["cut", "prompt_cut", DISCARDED])


def _sample(text: str) -> Sample:
    record = json.loads(text)
    return Sample(**{**record, "messages": tuple(record["messages"])})


def _cache_key(
    sources: Sequence[Source], split: Split, form: ChatFormat, lengths: Lengths,
    variant: dict[str, Any],
) -> str:
    """A hash of everything that decides the result, the code that makes it included."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    backend = form.tokenizer.backend_tokenizer.to_str() if form.tokenizer.is_fast else None
    settings = {
        "libraries": [tokenizers.__version__, transformers.__version__],
        "vocabulary": backend or sorted(form.tokenizer.get_vocab().items()),
        "template": form.tokenizer.chat_template,
        "special": [form.tokenizer.bos_token_id, form.eos_id, form.pad_id],
        "lengths": asdict(lengths),
        "split": asdict(split),
        "variant": variant,
        "data": [[source.label, source.name, source.share, source.whole, source.rows.fingerprint()]
                 for source in sources],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:24]
