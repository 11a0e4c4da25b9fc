"""The split, the lengths, the counts and the cache: what a step trains on, and what it says."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import word_tokenizer

from alpaca_rlhf.utils.data import preprocessing
from alpaca_rlhf.utils.data.preprocessing import Lengths, encode_pair, encode_prompt, encode_reply
from alpaca_rlhf.utils.data.raw_datasets import RawData, Sample
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

WORDS = "Human: Assistant: a b c d e"  # ids 4 to 10


def sample(prompt: str, chosen: str = "yes", rejected: str | None = "no") -> Sample:
    return Sample(({"role": "user", "content": prompt},), chosen, rejected)


def prompts(part: list[Sample]) -> list[str]:
    return [one.messages[0]["content"] for one in part]


# --- the split -----------------------------------------------------------------------------------

MANY = RawData(train=[sample(f"prompt {i}") for i in range(5000)])


def parts(data: RawData, shares: list[float], seed: int = 1234) -> list[RawData]:
    return [preprocessing.split(data, shares, step, seed) for step in (1, 2, 3)]


def test_every_prompt_stands_in_one_step_or_is_held_out():
    first, second, third = parts(MANY, [2, 4, 4])
    everything = [*prompts(first.train), *prompts(second.train), *prompts(third.train),
                  *prompts(first.held_out)]
    assert len(everything) == 5000
    assert set(everything) == set(prompts(MANY.train))


def test_the_same_prompts_are_held_out_of_every_step():
    first, second, third = parts(MANY, [2, 4, 4])
    assert prompts(first.held_out) == prompts(second.held_out) == prompts(third.held_out)


def test_shares_are_kept():
    sizes = [len(part.train) / 5000 for part in parts(MANY, [2, 4, 4])]
    assert sizes == pytest.approx([0.19, 0.38, 0.38], abs=0.02)
    assert len(parts(MANY, [2, 4, 4])[0].held_out) / 5000 == pytest.approx(0.05, abs=0.01)


def test_a_step_with_share_0_gets_nothing():
    first, second, third = parts(MANY, [0, 1, 0])
    assert (len(first.train), len(third.train)) == (0, 0)
    assert len(second.train) == 5000 - len(second.held_out)


def test_shares_count_relative_to_their_sum():
    assert [prompts(part.train) for part in parts(MANY, [2, 4, 4])] == [
        prompts(part.train) for part in parts(MANY, [0.5, 1, 1])]


def test_the_seed_decides():
    again = preprocessing.split(MANY, [2, 4, 4], 1, 1234)
    other = preprocessing.split(MANY, [2, 4, 4], 1, 1235)
    first = preprocessing.split(MANY, [2, 4, 4], 1, 1234)
    assert prompts(first.train) == prompts(again.train)
    assert len(set(prompts(first.train)) & set(prompts(other.train))) < 0.5 * len(first.train)


def test_a_prompts_place_does_not_depend_on_the_other_rows():
    few = RawData(train=MANY.train[::-3])
    first, _, _ = parts(MANY, [2, 4, 4])
    expected = set(prompts(first.train)) & set(prompts(few.train))
    assert set(prompts(preprocessing.split(few, [2, 4, 4], 1, 1234).train)) == expected


def test_equal_prompts_stand_in_one_part():
    twice = RawData(train=[sample(f"p {i % 300}", f"reply {i}") for i in range(900)])
    places = [set(prompts(part.train)) for part in parts(twice, [1, 1, 1])]
    places.append(set(prompts(parts(twice, [1, 1, 1])[0].held_out)))
    assert sum(map(len, places)) == 300
    assert len(preprocessing.split(twice, [1, 0, 0], 1, 0).train) % 3 == 0


def test_a_data_sets_own_held_out_part_is_kept_and_its_prompts_taken_from_training():
    data = RawData(train=[sample("a"), sample("b"), sample("a", "other")], held_out=[sample("a")],
                   counted_out=Counter({"tie": 2}))
    part = preprocessing.split(data, [1, 0, 0], 1, 0)
    assert (prompts(part.train), prompts(part.held_out)) == (["b"], ["a"])
    assert part.counted_out == {"tie": 2, "prompt is held out": 2}
    assert data.counted_out == {"tie": 2}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=40),
    shares=st.lists(st.floats(0, 100), min_size=3, max_size=3).filter(lambda s: sum(s) > 0.01),
    seed=st.integers(0, 2**40),
)
def test_no_row_is_lost_or_used_twice(texts, shares, seed):
    data = RawData(train=[sample(text, f"reply {i}") for i, text in enumerate(texts)])
    split = parts(data, shares, seed)
    used = [one.chosen for part in split for one in part.train]
    used += [one.chosen for one in split[0].held_out]
    assert sorted(used) == sorted(one.chosen for one in data.train)
    assert not set(prompts(split[0].train)) & set(prompts(split[1].train))


def test_step_2_counts_rows_without_a_rejected_reply():
    data = RawData([sample("a"), sample("b", rejected=None)], [sample("c", rejected=None)],
                   Counter({"tie": 1}))
    part = preprocessing.pairs_only(data)
    assert (prompts(part.train), prompts(part.held_out)) == (["a"], [])
    assert part.counted_out == {"tie": 1, "no rejected reply": 2}


def test_step_3_takes_each_prompt_once():
    data = RawData([sample("a", "1"), sample("b"), sample("a", "2")], [sample("c"), sample("c")])
    part = preprocessing.unique_prompts(data)
    assert [(one.messages[0]["content"], one.chosen) for one in part.train] == [
        ("a", "1"), ("b", "yes")]
    assert prompts(part.held_out) == ["c"]
    assert part.counted_out == {"prompt occurred before": 2}


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

DATA = RawData(
    train=[sample("a", "b", "c"), sample("a b", "c d e", "e"), sample("b", "a", "c")],
    held_out=[sample("c", "a", "b")], counted_out=Counter({"tie": 2}),
)


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
        self, data: RawData = DATA, size: int = 64, overlong: str = "truncate",
        chat: ChatFormat | None = None, workers: int | None = None, **variant,
    ) -> preprocessing.Prepared:
        chat = chat or form()
        lengths = of(size, overlong)
        self.encoded = 0

        def encode(one: Sample) -> dict:
            self.encoded += 1
            return encode_reply(one, chat, lengths)

        return preprocessing.prepare(
            data, encode, chat, lengths, self.home, {"step": 1, **variant}, workers)

    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.home / "data").iterdir())


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    return Preparation(tmp_path)


def test_rows_are_prepared_in_order(preparation):
    prepared = preparation.run()
    assert prepared.train["input_ids"][:] == [
        [1, 4, 6, 5, 7, 2], [1, 4, 6, 7, 5, 8, 9, 10, 2], [1, 4, 7, 5, 6, 2]]
    assert prepared.held_out["labels"][:] == [[-100, -100, -100, -100, 6, 2]]
    assert prepared.train.column_names == ["input_ids", "labels"]


def test_the_report_counts_what_was_used_cut_and_counted_out(preparation):
    prepared = preparation.run(size=7)
    assert prepared.report == {
        "counted_out": {"tie": 2}, "cut": {"cut to --max_seq_len 7": 1}, "train": 3, "held_out": 1}
    assert prepared.describe() == (
        "data: 3 rows to train on, 1 held out; 1 cut to --max_seq_len 7; counted out: 2 tie")


def test_nothing_cut_or_counted_out_is_said_so(preparation):
    data = RawData(DATA.train, DATA.held_out)
    assert preparation.run(data).describe() == (
        "data: 3 rows to train on, 1 held out; counted out: none")


def test_drop_leaves_long_rows_out_and_counts_them(preparation):
    prepared = preparation.run(size=7, overlong="drop")
    assert prepared.train["input_ids"][:] == [[1, 4, 6, 5, 7, 2], [1, 4, 7, 5, 6, 2]]
    assert prepared.describe() == (
        "data: 2 rows to train on, 1 held out; counted out: 2 tie, 1 over --max_seq_len 7")


def refusal(preparation: Preparation, *args, **options) -> str:
    with pytest.raises(UserError) as refused:
        preparation.run(*args, **options)
    assert not (preparation.home / "data").exists() or preparation.folders() == []
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
    data = RawData(DATA.train, [sample("a b c d e a b c d e a b c d e", "a")])
    prepared = preparation.run(data, size=12)
    assert len(prepared.held_out["input_ids"][0]) == 12


def test_nothing_left_to_train_on_is_refused_with_the_reasons(preparation):
    data = RawData([], [sample("a")], Counter({"tie": 2, "empty chosen": 1}))
    assert refusal(preparation, data) == (
        "--data_path: no row is left to train on (2 tie; 1 empty chosen); give more data, or this "
        "step a larger share of --data_split")


def test_everything_dropped_is_refused_with_the_reasons(preparation):
    data = RawData([sample("a", "b c d e a b c d e")])
    assert refusal(preparation, data, size=8, overlong="drop") == (
        "--data_path: no row is left to train on (1 over --max_seq_len 8); give more data, or "
        "this step a larger share of --data_split")


def test_a_part_without_held_out_rows_is_prepared(preparation):
    prepared = preparation.run(RawData(DATA.train))
    assert (len(prepared.train), len(prepared.held_out)) == (3, 0)


def test_several_workers_give_the_same_rows(preparation, tmp_path):
    alone = preparation.run()
    together = Preparation(tmp_path / "other").run(workers=2)
    assert together.train["input_ids"][:] == alone.train["input_ids"][:]
    assert together.report == alone.report


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
    {"step": 2},
    {"data": RawData(DATA.train[::-1], DATA.held_out, DATA.counted_out)},
    {"data": RawData([*DATA.train, *DATA.held_out], [], DATA.counted_out)},
    {"data": RawData(DATA.train, DATA.held_out)},
    {"chat": form("Human: Assistant: a b c e d")},
    {"chat": with_another_pad()},
    {"chat": form(template=word_tokenizer().chat_template.replace("Human: ", "Human : "))},
], ids=lambda change: next(iter(change)))
def test_what_decides_the_result_is_in_the_key(preparation, change):
    preparation.run()
    preparation.run(**change)
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


def test_a_failed_preparation_leaves_nothing(preparation):
    def broken(one: Sample) -> dict:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        preprocessing.prepare(DATA, broken, form(), of(64), preparation.home, {"step": 1})
    assert not (preparation.home / "data").exists() or preparation.folders() == []


def test_step_3_is_prepared_with_its_messages(tmp_path):
    lengths = Lengths(3, 0, "truncate", "--max_prompt_seq_len 3")
    chat = form()
    data = RawData([sample("a b"), sample("")], [])
    prepared = preprocessing.prepare(
        data, partial(encode_prompt, form=chat, lengths=lengths), chat, lengths, tmp_path, {})
    assert prepared.train["prompt_ids"][:] == [[6, 7, 5], [1, 4, 5]]
    assert json.loads(prepared.train["messages"][0]) == [{"role": "user", "content": "a b"}]


def test_the_cache_is_under_the_users_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert preprocessing.cache_home(None) == tmp_path / "alpaca_rlhf"
    assert (tmp_path / "alpaca_rlhf").is_dir()


def test_the_cache_may_be_put_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert preprocessing.cache_home("a/b") == tmp_path / "a" / "b"


def test_a_cache_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as refused:
        preprocessing.cache_home(str(tmp_path / "file" / "cache"))
    assert str(refused.value) == (
        f"--data_output_path {tmp_path}/file/cache: cannot be made (Not a directory); "
        "give a folder that can")
