"""The split: the same in every step, saved with the model, and checked by the next step."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import given as data_set

from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.samples import Sample, Tally
from alpaca_rlhf.utils.data.split import Split


def sample(prompt: str, chosen: str = "yes", rejected: str | None = "no", **more) -> Sample:
    return Sample(({"role": "user", "content": prompt},), chosen, rejected, **more)


class Part:
    """The samples that a step gets of some data sets."""

    def __init__(self, *sources, step=1, shares=(2.0, 4.0, 4.0), seed=1234, languages=()) -> None:
        tallies = [Tally() for _ in sources]
        split = Split(step, tuple(map(float, shares)), seed, languages)
        found = list(splitting.for_step(sources, split, tallies))
        self.train = [one.sample for one in found if one.step]
        self.held_out = [one.sample for one in found if not one.step]
        self.unused = sum((tally.unused for tally in tallies), Counter())

    @property
    def prompts(self) -> tuple[list[str], list[str]]:
        """Prompts to train on, and held-out prompts."""
        return prompts(self.train), prompts(self.held_out)


def prompts(part: list[Sample]) -> list[str]:
    return [one.messages[0]["content"] for one in part]


# --- the split -----------------------------------------------------------------------------------

SAMPLES = [sample(f"prompt {i}") for i in range(5000)]
MANY = data_set(SAMPLES)


def parts(*data, shares=(2, 4, 4), seed: int = 1234) -> list[Part]:
    return [Part(*data, step=step, shares=shares, seed=seed) for step in (1, 2, 3)]


def test_every_prompt_belongs_to_one_step_or_is_held_out_of_all():
    found = parts(MANY)
    everything = sum((prompts(part.train) for part in found), prompts(found[0].held_out))
    assert sorted(everything) == sorted(prompts(SAMPLES))
    assert found[0].held_out == found[1].held_out == found[2].held_out
    sizes = [len(part.train) / 5000 for part in found] + [len(found[0].held_out) / 5000]
    assert sizes == pytest.approx([0.19, 0.38, 0.38, 0.05], abs=0.02)


def test_shares_count_relative_to_their_sum_and_0_is_nothing():
    assert [part.prompts for part in parts(MANY)] == [
        part.prompts for part in parts(MANY, shares=(0.5, 1, 1))]
    first, second, third = parts(MANY, shares=(0, 1, 0))
    assert (first.train, third.train) == ([], [])
    assert len(second.train) == 5000 - len(second.held_out)


def test_the_seed_decides():
    first, again, other = Part(MANY), Part(MANY), Part(MANY, seed=1235)
    assert first.prompts == again.prompts
    assert len(set(first.prompts[0]) & set(other.prompts[0])) < 0.5 * len(first.train)


def test_a_prompts_place_does_not_depend_on_the_other_rows():
    few = SAMPLES[::-3]
    expected = set(Part(MANY).prompts[0]) & set(prompts(few))
    assert set(Part(data_set(few)).prompts[0]) == expected


def test_equal_prompts_belong_to_one_part():
    twice = data_set([sample(f"p {i % 300}", f"response {i}") for i in range(900)])
    found = parts(twice, shares=(1, 1, 1))
    places = [set(part.prompts[0]) for part in found] + [set(found[0].prompts[1])]
    assert sum(map(len, places)) == 300
    assert len(Part(twice, shares=(1, 0, 0)).train) % 3 == 0


def test_prompts_that_a_data_set_holds_out_are_trained_on_from_none():
    data = data_set([sample("a"), sample("b"), sample("a", "other")], [sample("a")], {"tie": 2})
    part = Part(data, shares=(1, 0, 0))
    assert part.prompts == (["b"], ["a"])
    assert part.unused == {"tie": 2, "prompt is held out": 2}
    part = Part(data_set([sample("a"), sample("b")]), data_set([sample("c")], [sample("a")]),
                shares=(1, 0, 0))
    assert "a" not in part.prompts[0]
    assert part.unused == {"prompt is held out": 1}


def test_beside_a_data_set_without_a_held_out_part_every_one_gives_some():
    own = data_set(SAMPLES, [sample("its own")])
    part = Part(own, data_set([sample("x")]), shares=(1, 0, 0))
    assert len(part.held_out) / 5000 == pytest.approx(0.05, abs=0.01)
    assert len(Part(own, shares=(1, 0, 0)).held_out) == 1


def test_data_for_one_step_goes_there_whole_except_for_what_is_held_out():
    extra = data_set([sample("prompt 7"), sample("e")], [sample("f")], whole=True)
    held = Part(MANY).prompts[1][0]
    part = Part(MANY, extra, data_set([sample(held)], whole=True))
    assert part.prompts[0][-3:] == ["f", "prompt 7", "e"]
    assert part.unused == {"prompt is held out": 1}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=40),
    shares=st.lists(st.floats(0, 100), min_size=3, max_size=3).filter(lambda s: sum(s) > 0.01),
    seed=st.integers(0, 2**40),
)
def test_no_row_is_lost_or_used_twice(texts, shares, seed):
    rows = [sample(text, f"response {i}") for i, text in enumerate(texts)]
    split = Split(1, tuple(shares), seed)
    found = list(splitting.placed([data_set(rows)], split, [Tally()]))
    assert [one.sample.chosen for one in found] == [row.chosen for row in rows]
    places = {}
    for one in found:
        assert places.setdefault(one.sample.prompt_key(), one.step) == one.step
        assert one.step == 0 or shares[one.step - 1] > 0


@pytest.mark.parametrize(("step", "train", "held_out", "expected", "unused"), [
    (2, [sample("a"), sample("b", rejected=None)], [sample("c", rejected=None)], (["a"], []),
     {"no rejected response": 2}),
    (3, [sample("a", "1"), sample("b"), sample("a", "2")], [sample("c"), sample("c")],
     (["a", "b"], ["c"]), {"prompt occurred before": 2}),
])
def test_step_2_uses_pairs_alone_and_step_3_each_prompt_once(
    step, train, held_out, expected, unused
):
    shares = [float(step == one) for one in (1, 2, 3)]
    part = Part(data_set(train, held_out, {"tie": 1}), step=step, shares=shares)
    assert part.prompts == expected
    assert part.unused == {"tie": 1, **unused}
    assert part.train[0] is train[0]


# --- shares and languages ------------------------------------------------------------------------


def test_a_share_takes_that_part_of_the_prompts_and_leaves_them_where_they_were():
    whole, third = Part(MANY), Part(data_set(SAMPLES, share=0.3))
    assert len(third.train) / len(whole.train) == pytest.approx(0.3, abs=0.05)
    assert set(third.prompts[0]) < set(whole.prompts[0])
    assert third.unused["beyond the share of 0.3"] == pytest.approx(3500, abs=150)


def test_a_share_counts_for_its_own_data_set_and_keeps_equal_prompts_together():
    twice = data_set([sample(f"p {i % 300}", f"response {i}") for i in range(900)], share=0.5)
    part = Part(twice, MANY, shares=(1, 0, 0))
    kept = Counter(sum(part.prompts, []))
    assert {kept[f"p {i}"] for i in range(300)} == {0, 3}
    assert sum(kept[f"prompt {i}"] for i in range(5000)) == 5000


@pytest.mark.parametrize(("wanted", "kept"), [
    ((), ["a", "b", "c", "d"]), (("zh",), ["a", "b", "d"]), (("zh-CN",), ["b", "d"]),
    (("en", "zh_cn"), ["b", "c", "d"]), (("ja",), ["d"])])
def test_rows_of_another_stated_language_are_filtered_out(wanted, kept):
    data = data_set([sample("a", language="zh"), sample("b", language="zh_cn"),
                     sample("c", language="EN"), sample("d")], [])
    part = Part(data, shares=(1, 0, 0), languages=wanted)
    assert part.prompts[0] == kept
    assert sum(part.unused.values()) == 4 - len(kept)


# --- the record ----------------------------------------------------------------------------------

SPLIT = {"step": 2, "seed": 1, "shares": [2.0, 4.0, 4.0], "data": []}


def test_a_record_names_the_split_and_holds_the_prompts_once(tmp_path):
    splitting.save_record(tmp_path, SPLIT, [5, -3, 5])
    record = json.loads((tmp_path / "data_split.json").read_text())
    assert record == {**SPLIT, "trained_prompts": 2, "digests": "trained_prompts.npy"}
    assert np.load(tmp_path / "trained_prompts.npy").tolist() == [-3, 5]


OTHER = "the steps' parts of the data differ; give"


@pytest.mark.parametrize(("recorded", "train", "held_out", "lines"), [
    (None, [1], [2], []),
    (SPLIT, [1], [2], []),
    (SPLIT, [5, 5, 7, 1], [-3], [
        "data: the actor (FOLDER) was trained on 2 of this run's 3 prompts",
        "data: the actor (FOLDER) was trained on 1 of this run's 1 held-out prompts"]),
    ({**SPLIT, "seed": 2}, [1], [],
     [f"data: --seed 1 here, 2 for the actor (FOLDER): {OTHER} --seed 2"]),
    ({**SPLIT, "shares": [1.0, 1.0, 0.5]}, [1], [],
     [f"data: --data_split 2,4,4 here, 1,1,0.5 for the actor (FOLDER): {OTHER} "
      "--data_split 1,1,0.5"]),
    ({**SPLIT, "shares": [1.0, 0.0, 0.0]}, [1], [],
     ["data: --data_split 2,4,4 here, 1,0,0 for the actor (FOLDER): the steps' parts of the data "
      "differ; give each step data of its own, or all of them one --data_split with a share for "
      "each, such as 2,4,4"]),
])
def test_a_run_is_compared_with_the_record_of_an_earlier_model(
    tmp_path, recorded, train, held_out, lines
):
    if recorded:
        splitting.save_record(tmp_path, recorded, [5, -3, 7])
    found = splitting.check_record(str(tmp_path), "the actor", SPLIT, train, held_out)
    assert found == [line.replace("FOLDER", str(tmp_path)) for line in lines]
