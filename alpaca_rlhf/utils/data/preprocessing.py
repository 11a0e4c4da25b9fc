"""Samples -> ids of one step: split, tokenized, cut to length, counted and cached.

One process writes the cache, the others wait and read it; a cache is complete or not there.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.data import chat_template, collators, raw_datasets, tokenizer
from alpaca_rlhf.utils.data.raw_datasets import RawData, Sample
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.losses import IGNORE_INDEX

HELD_OUT_SHARE = 0.05
STEP_NAMES = ("sft", "reward", "ppo")
Encoder = Callable[[Sample], dict[str, Any]]
DISCARDED = "discarded"  # column of an encoded row: the reason it is not used, or ""


@dataclass(frozen=True)
class Prepared:
    """One step's data, ready to be batched.

    Attributes:
        train: encoded rows of this step's part.
        held_out: encoded rows that no step trains on.
        report: how many rows were used, cut and counted out, by reason.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: dict[str, Any]

    def describe(self) -> str:
        """The report as one line."""
        out = ", ".join(f"{n} {reason}" for reason, n in self.report["counted_out"].items())
        cut = "".join(f"; {n} {what}" for what, n in self.report["cut"].items() if n)
        return (
            f"data: {self.report['train']:,} rows to train on, {self.report['held_out']:,} held "
            f"out{cut}; counted out: {out or 'none'}"
        )


def split(data: RawData, shares: list[float], step: int, seed: int) -> RawData:
    """The part of one step, and what is held out of all three.

    A prompt's place is drawn from its text and the seed alone: equal prompts stand in one part,
    and every step draws alike.

    Args:
        data: all samples.
        shares: of steps 1, 2, 3.
        step: 1, 2 or 3.
        seed: of the split.
    """
    held_keys = {sample.prompt_key() for sample in data.held_out}
    low, high = sum(shares[: step - 1]) / sum(shares), sum(shares[:step]) / sum(shares)
    part = RawData(held_out=list(data.held_out), counted_out=Counter(data.counted_out))
    for sample in data.train:
        key = sample.prompt_key()
        if key in held_keys:
            part.counted_out["prompt is held out"] += 1
        elif not data.held_out and _draw(key, seed, "held out") < HELD_OUT_SHARE:
            part.held_out.append(sample)
        elif low <= _draw(key, seed, "step") < high:
            part.train.append(sample)
    return part


def _draw(key: str, seed: int, purpose: str) -> float:
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def unique_prompts(data: RawData) -> RawData:
    """One sample for each prompt, for step 3, which uses nothing else of it."""
    part = RawData(counted_out=Counter(data.counted_out))
    seen: set[str] = set()
    for samples, kept in ((data.train, part.train), (data.held_out, part.held_out)):
        for sample in samples:
            key = sample.prompt_key()
            if key in seen:
                part.counted_out["prompt occurred before"] += 1
            else:
                kept.append(sample)
                seen.add(key)
    return part


def pairs_only(data: RawData) -> RawData:
    """Samples with a rejected reply, for step 2."""
    part = RawData(counted_out=Counter(data.counted_out))
    for samples, kept in ((data.train, part.train), (data.held_out, part.held_out)):
        kept.extend(sample for sample in samples if sample.rejected is not None)
        if len(samples) > len(kept):
            part.counted_out["no rejected reply"] += len(samples) - len(kept)
    return part


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


def _cut_or_discard(row: dict[str, Any], before: int, after: int, lengths: Lengths) -> None:
    row["cut"] = after < before
    row[DISCARDED] = ""
    if row["cut"] and lengths.overlong != "truncate":
        row[DISCARDED] = f"over {lengths.flag}"


def encode_reply(
    sample: Sample, form: ChatFormat, lengths: Lengths, train_on_prompt: bool = False
) -> dict[str, Any]:
    """Step 1: `input_ids`, and `labels` that are -100 on the prompt unless it is trained too."""
    full = form.prompt_ids(sample.messages), form.response_ids(sample.chosen)
    prompt, (response,) = lengths.fit(*full)
    labels = prompt if train_on_prompt else [IGNORE_INDEX] * len(prompt)
    row: dict[str, Any] = {"input_ids": prompt + response, "labels": labels + response}
    _cut_or_discard(row, sum(map(len, full)), len(prompt) + len(response), lengths)
    row["prompt_cut"] = len(prompt) < len(full[0])
    return row


def encode_pair(sample: Sample, form: ChatFormat, lengths: Lengths) -> dict[str, Any]:
    """Step 2: `chosen_ids` and `rejected_ids`, each the prompt and one reply."""
    assert sample.rejected is not None, "pairs_only comes first"
    full = [form.response_ids(sample.chosen), form.response_ids(sample.rejected)]
    whole = form.prompt_ids(sample.messages)
    prompt, (chosen, rejected) = lengths.fit(whole, *full)
    row: dict[str, Any] = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
    before = sum(map(len, full)) + len(whole)
    _cut_or_discard(row, before, len(chosen) + len(rejected) + len(prompt), lengths)
    row["prompt_cut"] = len(prompt) < len(whole)
    if chosen == rejected:
        row[DISCARDED] = "replies are alike where they were cut"
    return row


def encode_prompt(sample: Sample, form: ChatFormat, lengths: Lengths) -> dict[str, Any]:
    """Step 3: `prompt_ids`, and the `messages` as JSON, for people and for gold rules."""
    whole = form.prompt_ids(sample.messages)
    prompt = whole[-lengths.prompt :]
    row = {"prompt_ids": prompt, "messages": json.dumps(sample.messages, ensure_ascii=False)}
    _cut_or_discard(row, len(whole), len(prompt), lengths)
    row["prompt_cut"] = row["cut"]
    return row


def prepare(
    data: RawData,
    encode: Encoder,
    form: ChatFormat,
    lengths: Lengths,
    cache_home: Path,
    variant: dict[str, Any],
    workers: int | None = None,
) -> Prepared:
    """Encode one step's part, or take it from the cache.

    Args:
        data: from `split`.
        encode: sample -> row.
        form: the tokenizer and its template.
        lengths: budgets.
        cache_home: folder under which prepared data is kept.
        variant: what else decides the result (step, options); part of the cache key.
        workers: processes that encode.

    Raises:
        UserError: nothing is left to train on, or a row is over length with `--overlong error`.
    """
    folder = cache_home / "data" / _cache_key(data, form, lengths, variant)
    with distributed.main_first():
        if not folder.exists():
            _write(data, encode, lengths, folder, workers)
    report = json.loads((folder / "report.json").read_text())
    return Prepared(_read(folder / "train"), _read(folder / "held_out"), report)


def _read(folder: Path) -> datasets.Dataset:
    if not folder.exists():  # the library could not read again what it writes of no rows
        return datasets.Dataset.from_dict({})
    return datasets.load_from_disk(str(folder))


def _write(
    data: RawData, encode: Encoder, lengths: Lengths, folder: Path, workers: int | None
) -> None:
    report: dict[str, Any] = {"counted_out": Counter(data.counted_out), "cut": Counter()}
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        for name, samples in (("train", data.train), ("held_out", data.held_out)):
            rows = _encode_all(samples, encode, workers)
            if name == "train" and samples and all(rows["prompt_cut"]):
                raise UserError(f"{lengths.flag}: all {len(rows)} prompts are longer; raise it")
            rows = _without_discarded(rows, lengths, report)
            report[name] = len(rows)
            if name == "train" and not len(rows):
                reasons = "; ".join(f"{n} {why}" for why, n in report["counted_out"].items())
                raise UserError(
                    f"--data_path: no row is left to train on ({reasons or 'no data'}); give more "
                    "data, or this step a larger share of --data_split"
                )
            if len(rows):
                rows.save_to_disk(str(temporary / name))
        (temporary / "report.json").write_text(json.dumps(report))
        if not folder.exists():  # another node may have been quicker
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode_all(samples: list[Sample], encode: Encoder, workers: int | None) -> datasets.Dataset:
    if not samples:
        return datasets.Dataset.from_dict({})
    texts = datasets.Dataset.from_dict({"sample": [json.dumps(asdict(s)) for s in samples]})
    datasets.disable_progress_bars()
    return texts.map(
        lambda row: encode(_sample(row["sample"])),
        remove_columns=["sample"], num_proc=workers, keep_in_memory=True,
    )


def _without_discarded(
    rows: datasets.Dataset, lengths: Lengths, report: dict[str, Any]
) -> datasets.Dataset:
    """The rows to use; what was cut or is not used is added to the report."""
    if not len(rows):
        return rows
    over = sum(rows["cut"])
    if over and lengths.overlong == "error":
        raise UserError(
            f"--overlong error: {over} rows are over {lengths.flag}; raise it, or take --overlong "
            "truncate or drop"
        )
    report["counted_out"].update(reason for reason in rows[DISCARDED] if reason)
    kept = rows.filter(lambda reason: not reason, input_columns=DISCARDED, keep_in_memory=True)
    report["cut"][f"cut to {lengths.flag}"] += sum(kept["cut"])
    return kept.remove_columns(["cut", "prompt_cut", DISCARDED])


def _sample(text: str) -> Sample:
    record = json.loads(text)
    return Sample(tuple(record["messages"]), record["chosen"], record["rejected"])


def _cache_key(data: RawData, form: ChatFormat, lengths: Lengths, variant: dict[str, Any]) -> str:
    """A hash of everything that decides the result, the code that makes it included."""
    digest = hashlib.sha256()
    for module in (chat_template, collators, raw_datasets, tokenizer):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    backend = form.tokenizer.backend_tokenizer.to_str() if form.tokenizer.is_fast else None
    settings = {
        "vocabulary": backend or sorted(form.tokenizer.get_vocab().items()),
        "template": form.tokenizer.chat_template,
        "special": [form.tokenizer.bos_token_id, form.eos_id, form.pad_id],
        "lengths": asdict(lengths),
        "variant": variant,
        "counted_out": data.counted_out,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for samples in (data.train, data.held_out):
        for sample in samples:
            digest.update(json.dumps(asdict(sample), sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]
