"""Who trains on which prompt: drawn alike in every step, saved with the model, checked later."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import given as data_set

from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.sources import Tally
from alpaca_rlhf.utils.data.split import Split


def sample(prompt: str, chosen: str = "yes", rejected: str | None = "no", **more) -> Sample:
    return Sample(({"role": "user", "content": prompt},), chosen, rejected, **more)


class Part:
    """What a step gets of some data sets."""

    def __init__(self, *sources, step=1, shares=(2.0, 4.0, 4.0), seed=1234, languages=()) -> None:
        tallies = [Tally() for _ in sources]
        split = Split(step, tuple(map(float, shares)), seed, languages)
        found = list(splitting.for_step(sources, split, tallies))
        self.train = [one.sample for one in found if one.step]
        self.held_out = [one.sample for one in found if not one.step]
        self.counted_out = sum((tally.unused for tally in tallies), Counter())


def prompts(part: list[Sample]) -> list[str]:
    return [one.messages[0]["content"] for one in part]


# --- the split -----------------------------------------------------------------------------------

SAMPLES = [sample(f"prompt {i}") for i in range(5000)]
MANY = data_set(SAMPLES)


def parts(*data, shares=(2, 4, 4), seed: int = 1234) -> list[Part]:
    return [Part(*data, step=step, shares=shares, seed=seed) for step in (1, 2, 3)]


def test_every_prompt_stands_in_one_step_or_is_held_out():
    first, second, third = parts(MANY)
    everything = [*prompts(first.train), *prompts(second.train), *prompts(third.train),
                  *prompts(first.held_out)]
    assert len(everything) == 5000
    assert set(everything) == set(prompts(SAMPLES))


def test_the_same_prompts_are_held_out_of_every_step():
    first, second, third = parts(MANY)
    assert prompts(first.held_out) == prompts(second.held_out) == prompts(third.held_out)


def test_shares_are_kept():
    sizes = [len(part.train) / 5000 for part in parts(MANY)]
    assert sizes == pytest.approx([0.19, 0.38, 0.38], abs=0.02)
    assert len(parts(MANY)[0].held_out) / 5000 == pytest.approx(0.05, abs=0.01)


def test_a_step_with_share_0_gets_nothing():
    first, second, third = parts(MANY, shares=(0, 1, 0))
    assert (len(first.train), len(third.train)) == (0, 0)
    assert len(second.train) == 5000 - len(second.held_out)


def test_shares_count_relative_to_their_sum():
    assert [prompts(part.train) for part in parts(MANY)] == [
        prompts(part.train) for part in parts(MANY, shares=(0.5, 1, 1))]


def test_the_seed_decides():
    first, again, other = Part(MANY), Part(MANY), Part(MANY, seed=1235)
    assert prompts(first.train) == prompts(again.train)
    assert len(set(prompts(first.train)) & set(prompts(other.train))) < 0.5 * len(first.train)


def test_a_prompts_place_does_not_depend_on_the_other_rows():
    few = SAMPLES[::-3]
    expected = set(prompts(Part(MANY).train)) & set(prompts(few))
    assert set(prompts(Part(data_set(few)).train)) == expected


def test_equal_prompts_stand_in_one_part():
    twice = data_set([sample(f"p {i % 300}", f"reply {i}") for i in range(900)])
    found = parts(twice, shares=(1, 1, 1))
    places = [set(prompts(part.train)) for part in found] + [set(prompts(found[0].held_out))]
    assert sum(map(len, places)) == 300
    assert len(Part(twice, shares=(1, 0, 0)).train) % 3 == 0


def test_a_data_sets_own_held_out_part_is_kept_and_its_prompts_taken_from_training():
    data = data_set([sample("a"), sample("b"), sample("a", "other")], [sample("a")], {"tie": 2})
    part = Part(data, shares=(1, 0, 0))
    assert (prompts(part.train), prompts(part.held_out)) == (["b"], ["a"])
    assert part.counted_out == {"tie": 2, "prompt is held out": 2}


def test_a_prompt_held_out_by_one_data_set_is_trained_from_no_other():
    part = Part(data_set([sample("a"), sample("b")]), data_set([sample("c")], [sample("a")]),
                shares=(1, 0, 0))
    assert "a" not in prompts(part.train)
    assert part.counted_out == {"prompt is held out": 1}


def test_beside_a_data_set_without_a_held_out_part_every_one_gives_some():
    own = data_set(SAMPLES, [sample("its own")])
    part = Part(own, data_set([sample("x")]), shares=(1, 0, 0))
    assert len(part.held_out) / 5000 == pytest.approx(0.05, abs=0.01)
    assert len(Part(own, shares=(1, 0, 0)).held_out) == 1


def test_data_for_one_step_goes_there_whole_but_for_what_is_held_out():
    extra = data_set([sample("prompt 7"), sample("e")], [sample("f")], whole=True)
    held = prompts(Part(MANY).held_out)[0]
    more = data_set([sample(held)], whole=True)
    part = Part(MANY, extra, more)
    assert prompts(part.train)[-3:] == ["f", "prompt 7", "e"]
    assert part.counted_out == {"prompt is held out": 1}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=40),
    shares=st.lists(st.floats(0, 100), min_size=3, max_size=3).filter(lambda s: sum(s) > 0.01),
    seed=st.integers(0, 2**40),
)
def test_no_row_is_lost_or_used_twice(texts, shares, seed):
    rows = [sample(text, f"reply {i}") for i, text in enumerate(texts)]
    split = Split(1, tuple(shares), seed)
    found = list(splitting.placed([data_set(rows)], split, [Tally()]))
    assert [one.sample.chosen for one in found] == [row.chosen for row in rows]
    places = {}
    for one in found:
        assert places.setdefault(one.key, one.step) == one.step
        assert one.step == 0 or shares[one.step - 1] > 0


def test_step_2_counts_rows_without_a_rejected_reply():
    data = data_set([sample("a"), sample("b", rejected=None)], [sample("c", rejected=None)],
                    {"tie": 1})
    part = Part(data, step=2, shares=(0, 1, 0))
    assert (prompts(part.train), prompts(part.held_out)) == (["a"], [])
    assert part.counted_out == {"tie": 1, "no rejected reply": 2}


def test_step_3_takes_each_prompt_once():
    data = data_set([sample("a", "1"), sample("b"), sample("a", "2")], [sample("c"), sample("c")])
    part = Part(data, step=3, shares=(0, 0, 1))
    assert [(one.messages[0]["content"], one.chosen) for one in part.train] == [
        ("a", "1"), ("b", "yes")]
    assert prompts(part.held_out) == ["c"]
    assert part.counted_out == {"prompt occurred before": 2}


# --- shares and languages ------------------------------------------------------------------------


def test_a_share_takes_that_part_of_the_prompts_and_leaves_them_where_they_were():
    whole, third = Part(MANY), Part(data_set(SAMPLES, share=0.3))
    assert len(third.train) / len(whole.train) == pytest.approx(0.3, abs=0.05)
    assert set(prompts(third.train)) < set(prompts(whole.train))
    assert third.counted_out["beyond the share of 0.3"] == pytest.approx(3500, abs=150)


def test_a_share_counts_for_its_own_data_set_and_keeps_equal_prompts_together():
    twice = data_set([sample(f"p {i % 300}", f"reply {i}") for i in range(900)], share=0.5)
    part = Part(twice, MANY, shares=(1, 0, 0))
    kept = Counter(prompts(part.train) + prompts(part.held_out))
    assert {kept[f"p {i}"] for i in range(300)} == {0, 3}
    assert sum(kept[f"prompt {i}"] for i in range(5000)) == 5000


@pytest.mark.parametrize(("wanted", "kept"), [
    ((), ["a", "b", "c", "d"]), (("zh",), ["a", "b", "d"]), (("zh-CN",), ["b", "d"]),
    (("en", "zh_cn"), ["b", "c", "d"]), (("ja",), ["d"])])
def test_rows_of_another_stated_language_are_left_out(wanted, kept):
    data = data_set([sample("a", language="zh"), sample("b", language="zh_cn"),
                     sample("c", language="EN"), sample("d")], [])
    part = Part(data, shares=(1, 0, 0), languages=wanted)
    assert prompts(part.train) == kept
    assert sum(part.counted_out.values()) == 4 - len(kept)


# --- the record ----------------------------------------------------------------------------------

REPORT = {"split": {"step": 2, "seed": 1, "shares": [2.0, 4.0, 4.0], "data": []}}


def test_a_record_names_the_split_and_holds_the_prompts_once(tmp_path):
    splitting.save_record(tmp_path, REPORT, [5, -3, 5])
    record = json.loads((tmp_path / "data_split.json").read_text())
    assert record == {**REPORT["split"], "trained_prompts": 2, "digests": "trained_prompts.npy"}
    assert np.load(tmp_path / "trained_prompts.npy").tolist() == [-3, 5]


def test_nothing_is_said_when_nothing_is_shared_or_known(tmp_path):
    assert splitting.check_record(str(tmp_path), "the actor", REPORT, [1], [2]) == []
    splitting.save_record(tmp_path, REPORT, [5, -3])
    assert splitting.check_record(str(tmp_path), "the actor", REPORT, [1], [2]) == []


def test_prompts_that_an_earlier_model_was_trained_on_are_counted(tmp_path):
    splitting.save_record(tmp_path, REPORT, [5, -3, 7])
    said = splitting.check_record(str(tmp_path), "the reward model", REPORT, [5, 5, 7, 1], [-3])
    assert said == [
        f"data: the reward model ({tmp_path}) was trained on 2 of this run's 3 prompts",
        f"data: the reward model ({tmp_path}) was trained on 1 of this run's 1 held-out prompts"]


@pytest.mark.parametrize(("change", "line"), [
    ({"seed": 2}, "data: --seed 1 here, 2 for the actor (FOLDER): the parts of the steps are not "
     "the same; give --seed 2"),
    ({"shares": [1.0, 1.0, 0.5]}, "data: --data_split 2,4,4 here, 1,1,0.5 for the actor (FOLDER): "
     "the parts of the steps are not the same; give --data_split 1,1,0.5"),
])
def test_another_split_is_told(tmp_path, change, line):
    splitting.save_record(tmp_path, {"split": {**REPORT["split"], **change}}, [5])
    assert splitting.check_record(str(tmp_path), "the actor", REPORT, [1], []) == [
        line.replace("FOLDER", str(tmp_path))]
