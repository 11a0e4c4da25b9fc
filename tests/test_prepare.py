"""Encoded rows: maximum lengths, counts and the cache of what a step trains on."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import Given
from loading import given as data_set
from tiny_model import word_tokenizer

from alpaca_rlhf.utils.configs import DataConfig, SFTConfig
from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.encode import (
    Lengths,
    encode_pairs,
    encode_prompts,
    encode_sft,
)
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

WORDS = "Human: Assistant: a b c d e"  # ids 4 to 10


def sample(prompt: str, chosen: str = "yes", rejected: str | None = "no") -> Sample:
    return Sample(({"role": "user", "content": prompt},), chosen, rejected)


def chat_format(words: str = WORDS, template: str = "", pad: str = "<pad>") -> ChatFormat:
    tokenizer = word_tokenizer(words)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.pad_token = pad
    return ChatFormat(tokenizer)


# --- lengths -------------------------------------------------------------------------------------


def test_prompt_and_response_have_half_of_a_sequence_each():
    assert Lengths.of_sequence(7, "drop") == Lengths(3, 4, "drop", "--max_seq_len 7")


@pytest.mark.parametrize(("prompt", "responses", "kept_prompt", "kept_responses"), [
    (range(10), [range(20, 30)], [6, 7, 8, 9], [[20, 21, 22, 23]]),
    (range(10), [[20, 21]], [4, 5, 6, 7, 8, 9], [[20, 21]]),
    ([0, 1], [range(20, 30)], [0, 1], [[20, 21, 22, 23, 24, 25]]),
    (range(4), [range(20, 24)], [0, 1, 2, 3], [[20, 21, 22, 23]]),
    (range(7), [[20]], [0, 1, 2, 3, 4, 5, 6], [[20]]),
    # Both responses of a pair follow the same prompt.
    (range(10), [[20], [30, 31, 32, 33, 34]], [6, 7, 8, 9], [[20], [30, 31, 32, 33]]),
])
def test_the_end_of_a_prompt_and_the_start_of_a_response_are_kept(
    prompt, responses, kept_prompt, kept_responses
):
    fitted = Lengths(4, 4, "truncate", "").fit(list(prompt), *map(list, responses))
    assert fitted == (kept_prompt, kept_responses)


def test_a_prompt_without_room_is_cut_whole():
    assert Lengths.of_sequence(1, "truncate").fit([1, 2, 3], [20, 2]) == ([], [[20]])


IDS = st.lists(st.integers(0, 99), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompt=IDS, responses=st.lists(IDS, min_size=1, max_size=2), maximum=st.integers(1, 30))
def test_what_fits_is_whole_and_what_does_not_is_cut_to_the_maximum(prompt, responses, maximum):
    lengths = Lengths.of_sequence(maximum, "truncate")
    kept, fitted = lengths.fit(prompt, *responses)
    assert kept == prompt[len(prompt) - len(kept) :]
    for response, cut in zip(responses, fitted, strict=True):
        assert cut == response[: len(cut)]
        assert len(cut) >= min(len(response), lengths.response)
        assert len(kept) + len(cut) <= maximum
    longest = max(map(len, responses))
    assert len(kept) + max(map(len, fitted)) == min(maximum, len(prompt) + longest)


@pytest.mark.parametrize(("encode", "one", "lengths", "expected"), [
    # A response that was cut has no eos.
    (encode_sft, sample("a", "b c d e"), Lengths.of_sequence(8, "truncate"),
     {"input_ids": [1, 4, 6, 5, 7, 8, 9, 10], "labels": [-100, -100, -100, -100, 7, 8, 9, 10],
      "cut": True, "prompt_cut": False, "filtered_out": "", "length": 8}),
    # A prompt that was cut still begins with bos and ends with the generation prompt.
    (encode_sft, sample("a b c d", "e"), Lengths.of_sequence(6, "truncate"),
     {"input_ids": [1, 8, 9, 5, 10, 2], "cut": True, "prompt_cut": True, "length": 6}),
    (encode_sft, sample("a", "b"), Lengths.of_sequence(6, "truncate"),
     {"input_ids": [1, 4, 6, 5, 7, 2], "cut": False, "prompt_cut": False}),
    (encode_sft, sample("a", "b c d e"), Lengths.of_sequence(6, "drop"),
     {"filtered_out": "over --max_seq_len 6"}),
    (encode_sft, sample("a", "b c d e"), Lengths.of_sequence(6, "error"),
     {"filtered_out": "over --max_seq_len 6"}),
    (encode_pairs, sample("a", "b c d e a", "b c d e b"), Lengths.of_sequence(8, "truncate"),
     {"filtered_out": "responses are identical after truncation"}),
    (encode_pairs, sample("a", "b", "c d e"), Lengths.of_sequence(8, "truncate"), {"length": 8}),
    (encode_prompts, sample("a b c d"), Lengths.of_prompt(3, "truncate"),
     {"prompt_ids": [1, 9, 5], "cut": True, "prompt_cut": True, "length": 3}),
])
def test_a_row_that_is_too_long_is_cut_or_marked(encode, one, lengths, expected):
    (row,) = encode([one], chat_format(), lengths)
    assert {name: row[name] for name in expected} == expected


# --- prepare -------------------------------------------------------------------------------------

TRAIN = [sample("a", "b", "c"), sample("a b", "c d e", "e"), sample("b", "a", "c")]
HELD_OUT = [sample("c", "a", "b")]
DATA = data_set(TRAIN, HELD_OUT, {"tie": 2})
ALL_TO_STEP_1 = Split(1, (1.0, 0.0, 0.0), 1234)


class Preparation:
    """Prepares step 1 and counts what it encodes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.encoded = 0

    def run(
        self, *data: Given, size: int = 64, overlong: str = "truncate",
        chat: ChatFormat | None = None, workers: int = 1, split: Split = ALL_TO_STEP_1, **options,
    ) -> prepare.Prepared:
        self.encoded = 0

        def encode(samples, *args, **options):
            self.encoded += len(samples)
            return encode_sft(samples, *args, **options)

        return prepare.prepare(
            sources=data or (DATA,), split=split, encode=encode, chat=chat or chat_format(),
            lengths=Lengths.of_sequence(size, overlong), **options,
            data=DataConfig(
                data_output_path=str(self.home), preprocessing_num_workers=workers),
        )

    def folders(self) -> list[str]:
        found = (self.home / "data").iterdir()
        return sorted(path.name for path in found if path.suffix != ".lock")


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    return Preparation(tmp_path)


def test_rows_are_prepared_in_order(preparation):
    prepared = preparation.run()
    assert prepared.train["input_ids"][:] == [
        [1, 4, 6, 5, 7, 2], [1, 4, 6, 7, 5, 8, 9, 10, 2], [1, 4, 7, 5, 6, 2]]
    assert prepared.held_out["labels"][:] == [[-100, -100, -100, -100, 6, 2]]
    assert prepared.train.column_names == ["prompt", "input_ids", "labels", "length"]
    assert prepared.lengths() == [6, 9, 6]


def test_the_fingerprint_follows_the_training_rows_and_their_order(preparation):
    fingerprints = [preparation.run(data_set(rows, HELD_OUT)).fingerprint() for rows in (
        TRAIN, TRAIN[::-1],  # of the same lengths in the same order
        [sample("a", "b c", "c"), *TRAIN[1:]],  # of the same prompts
    )]
    assert len(set(fingerprints)) == 3
    assert preparation.run(data_set(TRAIN, []), size=63).fingerprint() == fingerprints[0]


def test_the_next_step_is_told_what_the_model_was_trained_on(preparation, tmp_path, capsys):
    prepared = preparation.run()
    prepared.save_record(tmp_path)
    prepared.check_against(str(tmp_path), "the actor")
    assert capsys.readouterr().out == (
        f"data: the actor ({tmp_path}) was trained on 3 of this run's 3 prompts\n")


def test_the_report_counts_what_was_used_cut_and_filtered_out(preparation):
    prepared = preparation.run(size=7)
    report = {name: prepared.report[name] for name in
              ("filtered_out", "cut", "train", "held_out", "data_sets")}
    assert report == {
        "filtered_out": {"tie": 2}, "cut": {"cut to --max_seq_len 7": 1}, "train": 3,
        "held_out": 1, "data_sets": [{"data_set": "given", "rows": 4, "samples": 4, "train": 3,
                                      "held_out": 1, "filtered_out": {"tie": 2},
                                      "unread": {}}]}


LONGER = data_set([sample("d", "a b c d"), sample("e", "a")], [], label="other")


@pytest.mark.parametrize(("data", "options", "text"), [
    ([data_set(TRAIN, HELD_OUT)], {},
     "data: 3 rows to train on, 1 held out; filtered out: none"),
    ([DATA], {"size": 7},
     "data: 3 rows to train on, 1 held out; 1 cut to --max_seq_len 7; filtered out: 2 tie"),
    ([DATA], {"size": 7, "overlong": "drop"}, "data: 2 rows to train on, 1 held out; filtered "
     "out: 2 tie, 1 over --max_seq_len 7"),
    ([DATA, LONGER], {"size": 7, "overlong": "drop"},
     "data: 3 rows to train on, 1 held out; filtered out: 2 tie, 2 over --max_seq_len 7\n"
     "  given: 4 rows read, 4 usable samples; 2 rows to train on, 1 held out; filtered out: "
     "2 tie, 1 over --max_seq_len 7\n"
     "  other: 2 rows read, 2 usable samples; 1 rows to train on, 0 held out; filtered out: "
     "1 over --max_seq_len 7"),
    # A held-out part of long prompts alone is cut, not refused; and there may be none.
    ([data_set(TRAIN, [sample("a b c d e a b c d e a b c d e", "a")])], {"size": 12},
     "data: 3 rows to train on, 1 held out; 1 cut to --max_seq_len 12; filtered out: none"),
    ([data_set(TRAIN, [])], {}, "data: 3 rows to train on, 0 held out; filtered out: none"),
])
def test_the_console_is_told_the_counts(preparation, data, options, text):
    assert preparation.run(*data, **options).describe() == text


@pytest.mark.parametrize(("data", "options", "line"), [
    (DATA, {"size": 7, "overlong": "error"}, "--overlong error: 1 rows are over --max_seq_len 7; "
     "raise it, or take --overlong truncate or drop"),
    (DATA, {"size": 3}, "--max_seq_len 3: all 3 prompts are longer; raise it"),
    (DATA, {"size": 3, "overlong": "drop"},
     "--max_seq_len 3: all 3 prompts are longer; raise it"),
    (data_set([], [sample("a")], {"tie": 2, "empty chosen": 1}), {},
     "--data_path: no row is left to train on (2 tie; 1 empty chosen); give more data, or this "
     "step a larger share of --data_split"),
    (data_set([sample("a", "b c d e a b c d e")], []), {"size": 8, "overlong": "drop"},
     "--data_path: no row is left to train on (1 over --max_seq_len 8); give more data, or this "
     "step a larger share of --data_split"),
])
def test_data_that_cannot_be_trained_on_is_refused_and_nothing_is_kept(
    preparation, data, options, line
):
    with pytest.raises(UserError) as refused:
        preparation.run(data, **options)
    assert str(refused.value) == line
    assert preparation.folders() == []


def test_several_workers_give_the_same_rows(preparation, tmp_path):
    many = data_set([sample(f"a {i}", "b " * (i % 7), "c") for i in range(4200)], HELD_OUT)
    alone = preparation.run(many)
    together = Preparation(tmp_path / "other").run(many, workers=2)
    assert together.train["input_ids"][:] == alone.train["input_ids"][:]
    assert together.report["data_sets"] == alone.report["data_sets"]


def test_a_dialogue_that_the_template_refuses_is_counted(preparation):
    template = ("{% if messages[0].content == 'b' %}{{ raise_exception('no') }}{% endif %}"
                "{% for m in messages %}{{ m.content }}"
                "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}")
    prepared = preparation.run(chat=chat_format(template=template))
    assert prepared.report["filtered_out"] == {"tie": 2, "refused by the chat template": 1}
    assert len(prepared.train) == 2


def test_each_step_prepares_its_own_rows_from_the_options(tmp_path):
    rows = [{"prompt": "a b", "chosen": "c", "rejected": "d"}, {"prompt": "e", "chosen": "a",
                                                                 "rejected": "b"}]
    for name, kept in (("shared", rows[:1]), ("shared/test", rows[1:]), ("own", rows[1:])):
        path = tmp_path / f"{name}.jsonl" if "/" in name else tmp_path / name / "train.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def data(shares: str) -> DataConfig:
        return DataConfig(data_path=[str(tmp_path / "shared")], data_split=shares,
                          data_output_path=str(tmp_path / "cache"), preprocessing_num_workers=1)

    chat, own = chat_format(), [str(tmp_path / "own")]
    sft = prepare.prepare_sft(
        data("1,0,0"), SFTConfig(train_on_prompt=True), seed=1, max_seq_len=64, chat=chat)
    assert sft.train["labels"][:] == sft.train["input_ids"][:] == [[1, 4, 6, 7, 5, 8, 2]]
    both = prepare.sft_sources(data("1,0,0"), SFTConfig(sft_only_data_path=own))
    assert [(one.label, one.whole) for one in both] == [(str(tmp_path / "shared"), False),
                                                        (own[0], True)]
    pairs = prepare.prepare_pairs(data("0,1,0"), seed=1, max_seq_len=64, chat=chat)
    assert pairs.train["rejected_ids"][:] == [[1, 4, 6, 7, 5, 9, 2]]
    assert pairs.report["split"]["shares"] == [0.0, 1.0, 0.0]
    prompts = prepare.prepare_prompts(data("0,0,1"), seed=1, max_prompt_seq_len=5, chat=chat)
    assert prompts.train["prompt_ids"][:] == [[1, 4, 6, 7, 5]]
    assert json.loads(prompts.train["messages"][0]) == [{"role": "user", "content": "a b"}]
    assert prompts.held_out["prompt_ids"][:] == [[1, 4, 10, 5]]


# --- the cache -----------------------------------------------------------------------------------


def test_the_second_time_nothing_is_encoded(preparation):
    first = preparation.run()
    assert preparation.encoded == 4
    second = preparation.run()
    assert preparation.encoded == 0
    assert second.train["input_ids"][:] == first.train["input_ids"][:]
    assert second.report == first.report
    assert len(preparation.folders()) == 1


@pytest.mark.parametrize("change", [
    {"size": 63},
    {"overlong": "drop"},
    {"train_on_prompt": True},
    {"train_on": "last"},
    {"data": data_set(TRAIN[::-1], HELD_OUT, {"tie": 2})},
    {"data": data_set(TRAIN, HELD_OUT, {"tie": 2}, name="seed_tasks")},
    {"data": data_set(TRAIN, HELD_OUT, {"tie": 2}, share=0.999)},
    {"data": data_set(TRAIN, HELD_OUT, {"tie": 2}, whole=True)},
    {"split": Split(1, (2.0, 0.0, 0.0), 1234)},
    {"split": Split(1, (1.0, 0.0, 0.0), 1235)},
    {"split": Split(1, (1.0, 0.0, 0.0), 1234, ("en",))},
    {"chat": chat_format("Human: Assistant: a b c e d")},
    {"chat": chat_format(pad="<unk>")},  # leaves the vocabulary as it is
    {"chat": chat_format(template=word_tokenizer().chat_template.replace("Human: ", "Human : "))},
    {"FORMAT": prepare.FORMAT + 1},
], ids=lambda change: next(iter(change)))
def test_what_decides_the_rows_is_in_the_key(preparation, monkeypatch, change):
    preparation.run()
    change = dict(change)
    if "FORMAT" in change:
        monkeypatch.setattr(prepare, "FORMAT", change.pop("FORMAT"))
    preparation.run(*[change.pop("data")] if "data" in change else [], **change)
    assert preparation.encoded > 0
    assert len(preparation.folders()) == 2


def test_the_rows_are_those_of_their_format(preparation):
    """If this fails, caches are out of date: raise FORMAT, then change the digest."""
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c d"})
    found = []
    for encode, lengths in (
        (encode_sft, Lengths.of_sequence(12, "truncate")),
        (encode_pairs, Lengths.of_sequence(12, "truncate")),
        (encode_prompts, Lengths.of_prompt(4, "truncate")),
    ):
        found += encode([Sample(turns, "e a", "b"), *TRAIN], chat_format(), lengths)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    assert (prepare.FORMAT, digest[:16]) == (4, "8fb3c1afbfdf50e2")


def test_an_unfinished_cache_is_not_taken(preparation):
    preparation.run()
    (name,) = preparation.folders()
    complete = preparation.home / "data" / name
    torn = complete.with_name(f"{name}.0a1b2c3d.partial")
    complete.rename(torn)
    (torn / "report.json").unlink()
    assert len(preparation.run().train) == 3
    assert preparation.encoded == 4
    assert preparation.folders() == [name, torn.name]


@pytest.mark.parametrize("tear", ["missing", "shorter", "no report", "half a report"])
def test_a_torn_cache_is_made_again(preparation, capsys, tear):
    whole = preparation.run()
    ids = whole.train["input_ids"][:]
    (name,) = preparation.folders()
    folder = preparation.home / "data" / name
    arrow, report = folder / "train" / "data-00000-of-00001.arrow", folder / "report.json"
    if tear == "missing":
        arrow.unlink()
    elif tear == "shorter":
        arrow.write_bytes(arrow.read_bytes()[:-8])
    elif tear == "no report":
        report.unlink()
    else:
        report.write_bytes(report.read_bytes()[:40])
    again = preparation.run()
    assert again.train["input_ids"][:] == ids
    assert preparation.encoded == 4
    assert capsys.readouterr().out == f"data: the cache {folder} is incomplete; it is made again\n"
    preparation.run()
    assert preparation.encoded == 0


CHILD = """
import sys
from pathlib import Path
import test_prepare as t
prepared = t.Preparation(Path(sys.argv[1]))
prepared.run()
print(prepared.encoded)
"""


def test_of_processes_that_start_together_one_prepares_and_the_others_wait(tmp_path, imported):
    (tmp_path / "child.py").write_text(CHILD)
    running = [imported.start(["child.py", "made"], tmp_path) for _ in range(3)]
    encoded = sorted(imported.end(process).stdout.split()[-1] for process in running)
    assert encoded == ["0", "0", "4"]


def test_a_failed_preparation_leaves_nothing(preparation, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules[__name__], "encode_sft", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        preparation.run()
    assert preparation.folders() == []


def test_the_cache_is_under_the_users_cache_home_or_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert prepare.cache_home(None) == tmp_path / "alpaca_rlhf"
    assert (tmp_path / "alpaca_rlhf").is_dir()
    assert prepare.cache_home("a/b") == tmp_path / "a" / "b"


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as refused:
        prepare.cache_home(str(tmp_path / "file" / "cache"))
    assert str(refused.value) == (
        f"--data_output_path {tmp_path}/file/cache: cannot be made (Not a directory); "
        "give a folder that can")
