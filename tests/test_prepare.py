"""The lengths, the counts and the cache: what a step trains on, and what it says."""

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import Given
from loading import given as data_set
from tiny_model import word_tokenizer

from alpaca_rlhf.utils.data import prepare
from alpaca_rlhf.utils.data.prepare import Lengths
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

WORDS = "Human: Assistant: a b c d e"  # ids 4 to 10


def sample(prompt: str, chosen: str = "yes", rejected: str | None = "no") -> Sample:
    return Sample(({"role": "user", "content": prompt},), chosen, rejected)


def encode_reply(one: Sample, *args, **options) -> dict:
    return prepare.encode_replies([one], *args, **options)[0]


def encode_pair(one: Sample, *args) -> dict:
    return prepare.encode_pairs([one], *args)[0]


def encode_prompt(one: Sample, *args) -> dict:
    return prepare.encode_prompts([one], *args)[0]


# --- lengths -------------------------------------------------------------------------------------


def test_a_sequence_is_shared_in_halves():
    lengths = Lengths.of_sequence(7, "drop")
    assert (lengths.prompt, lengths.response) == (3, 4)
    assert (lengths.overlong, lengths.flag) == ("drop", "--max_seq_len 7")


@pytest.mark.parametrize(("prompt", "response", "kept_prompt", "kept_response"), [
    (range(10), range(20, 30), [6, 7, 8, 9], [20, 21, 22, 23]),
    (range(10), [20, 21], [4, 5, 6, 7, 8, 9], [20, 21]),
    ([0, 1], range(20, 30), [0, 1], [20, 21, 22, 23, 24, 25]),
    (range(4), range(20, 24), [0, 1, 2, 3], [20, 21, 22, 23]),
    (range(7), [20], [0, 1, 2, 3, 4, 5, 6], [20]),
])
def test_the_end_of_the_prompt_and_the_start_of_the_reply_are_kept(
    prompt, response, kept_prompt, kept_response
):
    fitted = Lengths(4, 4, "truncate", "").fit(list(prompt), list(response))
    assert fitted == (kept_prompt, [kept_response])


def test_both_replies_of_a_pair_follow_the_same_prompt():
    fitted = Lengths(4, 4, "truncate", "").fit(list(range(10)), [20], [30, 31, 32, 33, 34])
    assert fitted == ([6, 7, 8, 9], [[20], [30, 31, 32, 33]])


def test_a_prompt_without_a_budget_is_cut_whole():
    assert Lengths.of_sequence(1, "truncate").fit([1, 2, 3], [20, 2]) == ([], [[20]])


IDS = st.lists(st.integers(0, 99), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompt=IDS, replies=st.lists(IDS, min_size=1, max_size=2), budget=st.integers(1, 30))
def test_what_fits_is_whole_and_what_does_not_is_cut_to_the_budget(prompt, replies, budget):
    lengths = Lengths.of_sequence(budget, "truncate")
    kept, fitted = lengths.fit(prompt, *replies)
    assert kept == prompt[len(prompt) - len(kept) :]
    for reply, cut in zip(replies, fitted, strict=True):
        assert cut == reply[: len(cut)]
        assert len(cut) >= min(len(reply), lengths.response)
        assert len(kept) + len(cut) <= budget
    longest = max(map(len, replies))
    assert len(kept) + max(map(len, fitted)) == min(budget, len(prompt) + longest)


# --- encoding ------------------------------------------------------------------------------------


def form(words: str = WORDS, template: str = "") -> ChatFormat:
    tokenizer = word_tokenizer(words)
    tokenizer.chat_template = template or tokenizer.chat_template
    return ChatFormat(tokenizer)


def of(size: int, overlong: str = "truncate") -> Lengths:
    return Lengths.of_sequence(size, overlong)


def test_a_reply_that_was_cut_has_no_eos():
    row = encode_reply(sample("a", "b c d e"), form(), of(8))
    assert row["input_ids"] == [1, 4, 6, 5, 7, 8, 9, 10]
    assert row["labels"] == [-100, -100, -100, -100, 7, 8, 9, 10]
    assert (row["cut"], row["prompt_cut"], row["discarded"]) == (True, False, "")


def test_a_prompt_that_was_cut_still_ends_with_the_assistants_turn():
    row = encode_reply(sample("a b c d", "e"), form(), of(6))
    assert row["input_ids"] == [7, 8, 9, 5, 10, 2]
    assert (row["cut"], row["prompt_cut"]) == (True, True)


def test_a_row_of_just_the_length_is_not_cut():
    row = encode_reply(sample("a", "b"), form(), of(6))
    assert row["input_ids"] == [1, 4, 6, 5, 7, 2]
    assert (row["cut"], row["prompt_cut"]) == (False, False)


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_an_overlong_row_is_marked_with_its_reason(overlong):
    row = encode_reply(sample("a", "b c d e"), form(), of(6, overlong))
    assert row["discarded"] == "over --max_seq_len 6"


def test_a_pair_whose_replies_differ_only_in_what_was_cut_is_marked():
    row = encode_pair(sample("a", "b c d e a", "b c d e b"), form(), of(8))
    assert row["discarded"] == "replies are alike where they were cut"


def test_a_prompt_of_step_3_keeps_its_end():
    row = encode_prompt(sample("a b c d"), form(), Lengths(3, 0, "truncate", ""))
    assert row["prompt_ids"] == [8, 9, 5]
    assert (row["cut"], row["prompt_cut"]) == (True, True)


# --- prepare -------------------------------------------------------------------------------------

TRAIN = [sample("a", "b", "c"), sample("a b", "c d e", "e"), sample("b", "a", "c")]
HELD_OUT = [sample("c", "a", "b")]
DATA = data_set(TRAIN, HELD_OUT, {"tie": 2})
ALL_TO_STEP_1 = Split(1, (1.0, 0.0, 0.0), 1234)


def with_another_pad() -> ChatFormat:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = "<unk>"  # leaves the vocabulary as it is
    return ChatFormat(tokenizer)


class Preparation:
    """Prepares step 1 and counts what it encodes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.encoded = 0

    def run(
        self, *data: Given, size: int = 64, overlong: str = "truncate",
        chat: ChatFormat | None = None, workers: int = 1, split: Split = ALL_TO_STEP_1, **variant,
    ) -> prepare.Prepared:
        chat = chat or form()
        lengths = of(size, overlong)
        self.encoded = 0

        def encode(samples: Sequence[Sample]) -> list[dict]:
            self.encoded += len(samples)
            return prepare.encode_replies(samples, chat, lengths)

        return prepare.prepare(
            data or (DATA,), split, encode, chat, lengths, self.home, variant, workers)

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


def test_the_report_counts_what_was_used_cut_and_counted_out(preparation):
    prepared = preparation.run(size=7)
    report = {name: prepared.report[name] for name in
              ("counted_out", "cut", "train", "held_out", "data_sets")}
    assert report == {
        "counted_out": {"tie": 2}, "cut": {"cut to --max_seq_len 7": 1}, "train": 3, "held_out": 1,
        "data_sets": [{"data_set": "given", "rows": 4, "samples": 4, "train": 3, "held_out": 1,
                       "counted_out": {"tie": 2}}]}
    assert prepared.describe() == (
        "data: 3 rows to train on, 1 held out; 1 cut to --max_seq_len 7; counted out: 2 tie")


def test_each_of_several_data_sets_has_a_line_of_its_own(preparation):
    longer = data_set([sample("d", "a b c d"), sample("e", "a")], [], label="other")
    assert preparation.run(DATA, longer, size=7, overlong="drop").describe() == (
        "data: 3 rows to train on, 1 held out; counted out: 2 tie, 2 over --max_seq_len 7\n"
        "  given: 4 rows read, 4 usable samples; 2 rows to train on, 1 held out; counted out: "
        "2 tie, 1 over --max_seq_len 7\n"
        "  other: 2 rows read, 2 usable samples; 1 rows to train on, 0 held out; counted out: "
        "1 over --max_seq_len 7")


def test_nothing_cut_or_counted_out_is_said_so(preparation):
    assert preparation.run(data_set(TRAIN, HELD_OUT)).describe() == (
        "data: 3 rows to train on, 1 held out; counted out: none")


def test_drop_leaves_long_rows_out_and_counts_them(preparation):
    prepared = preparation.run(size=7, overlong="drop")
    assert prepared.train["input_ids"][:] == [[1, 4, 6, 5, 7, 2], [1, 4, 7, 5, 6, 2]]
    assert prepared.describe() == (
        "data: 2 rows to train on, 1 held out; counted out: 2 tie, 1 over --max_seq_len 7")


def refusal(preparation: Preparation, *args, **options) -> str:
    with pytest.raises(UserError) as refused:
        preparation.run(*args, **options)
    assert preparation.folders() == []
    return str(refused.value)


def test_error_refuses_long_rows(preparation):
    assert refusal(preparation, size=7, overlong="error") == (
        "--overlong error: 1 rows are over --max_seq_len 7; raise it, or take --overlong truncate "
        "or drop")


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_prompts_that_are_all_too_long_are_refused(preparation, overlong):
    assert refusal(preparation, size=3, overlong=overlong) == (
        "--max_seq_len 3: all 3 prompts are longer; raise it")


def test_a_held_out_part_of_long_prompts_alone_is_cut_not_refused(preparation):
    data = data_set(TRAIN, [sample("a b c d e a b c d e a b c d e", "a")])
    prepared = preparation.run(data, size=12)
    assert len(prepared.held_out["input_ids"][0]) == 12


def test_nothing_left_to_train_on_is_refused_with_the_reasons(preparation):
    data = data_set([], [sample("a")], {"tie": 2, "empty chosen": 1})
    assert refusal(preparation, data) == (
        "--data_path: no row is left to train on (2 tie; 1 empty chosen); give more data, or this "
        "step a larger share of --data_split")


def test_everything_dropped_is_refused_with_the_reasons(preparation):
    data = data_set([sample("a", "b c d e a b c d e")], [])
    assert refusal(preparation, data, size=8, overlong="drop") == (
        "--data_path: no row is left to train on (1 over --max_seq_len 8); give more data, or "
        "this step a larger share of --data_split")


def test_a_part_without_held_out_rows_is_prepared(preparation):
    prepared = preparation.run(data_set(TRAIN, []))
    assert (len(prepared.train), len(prepared.held_out)) == (3, 0)


def test_several_workers_give_the_same_rows(preparation, tmp_path):
    many = data_set([sample(f"a {i}", "b " * (i % 7), "c") for i in range(4200)], HELD_OUT)
    alone = preparation.run(many)
    together = Preparation(tmp_path / "other").run(many, workers=2)
    assert together.train["input_ids"][:] == alone.train["input_ids"][:]
    assert together.report["data_sets"] == alone.report["data_sets"]


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
    {"chat": form("Human: Assistant: a b c e d")},
    {"chat": with_another_pad()},
    {"chat": form(template=word_tokenizer().chat_template.replace("Human: ", "Human : "))},
], ids=lambda change: next(iter(change)))
def test_what_decides_the_result_is_in_the_key(preparation, change):
    preparation.run()
    change = dict(change)
    preparation.run(*[change.pop("data")] if "data" in change else [], **change)
    assert preparation.encoded > 0
    assert len(preparation.folders()) == 2


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
    assert capsys.readouterr().out == f"data: the cache {folder} is torn; it is made again\n"
    preparation.run()
    assert preparation.encoded == 0


CHILD = """
import sys
from functools import partial
from pathlib import Path
import test_prepare as t
prepared = t.Preparation(Path(sys.argv[1]))
prepared.run()
print(prepared.encoded)
"""


def test_of_processes_that_start_together_one_prepares_and_the_others_wait(tmp_path):
    command, tests = [sys.executable, "-c", CHILD, str(tmp_path)], Path(__file__).parent
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tests) for _ in range(3)
    ]
    encoded = sorted(process.communicate(timeout=240)[0].split()[-1] for process in running)
    assert encoded == ["0", "0", "4"]


def test_a_failed_preparation_leaves_nothing(preparation):
    def broken(samples: Sequence[Sample]) -> list[dict]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        prepare.prepare(
            [DATA], ALL_TO_STEP_1, broken, form(), of(64), preparation.home, {}, 1)
    assert preparation.folders() == []


def test_a_dialogue_that_the_template_refuses_is_counted(preparation):
    template = ("{% if messages[0].content == 'b' %}{{ raise_exception('no') }}{% endif %}"
                "{% for m in messages %}{{ m.content }}"
                "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}")
    prepared = preparation.run(chat=form(template=template))
    assert prepared.report["counted_out"] == {"tie": 2, "refused by the chat template": 1}
    assert len(prepared.train) == 2


def test_step_3_is_prepared_with_its_messages(tmp_path):
    lengths = Lengths(3, 0, "truncate", "--max_prompt_seq_len 3")
    chat = form()
    prepared = prepare.prepare(
        [data_set([sample("a b"), sample("")], [])], Split(3, (0.0, 0.0, 1.0), 1),
        partial(prepare.encode_prompts, form=chat, lengths=lengths), chat, lengths, tmp_path,
        {})
    assert prepared.train["prompt_ids"][:] == [[6, 7, 5], [1, 4, 5]]
    assert json.loads(prepared.train["messages"][0]) == [{"role": "user", "content": "a b"}]


def test_the_cache_is_under_the_users_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepare.cache_home(None) == tmp_path / "alpaca_rlhf"
    assert (tmp_path / "alpaca_rlhf").is_dir()


def test_the_cache_may_be_put_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare.cache_home("a/b") == tmp_path / "a" / "b"


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as refused:
        prepare.cache_home(str(tmp_path / "file" / "cache"))
    assert str(refused.value) == (
        f"--data_output_path {tmp_path}/file/cache: cannot be made (Not a directory); "
        "give a folder that can")
