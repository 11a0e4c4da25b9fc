"""The embedded data set: its facts, its pairs, and the rule that scores responses."""

import hashlib
from itertools import islice
from statistics import mean

import pytest

from alpaca_rlhf.demo import assistant_world as world
from alpaca_rlhf.utils.data import sources

SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]
TRAIN, EVAL = world.rows("train"), world.rows("eval")
TEXTS = list(islice(world.pretraining_texts(), 3000))


def gold(response: str) -> float:
    return round(world.gold_score(SPAIN, response), 3)


def test_the_text_is_that_of_its_format():
    """If this fails, prepared data and models are out of date: raise FORMAT, then the digest."""
    digest = hashlib.sha256(repr((TRAIN, EVAL, TEXTS)).encode()).hexdigest()
    assert (world.FORMAT, digest[:16]) == (1, "883624bc39a8dfbf")


def test_a_raised_format_changes_the_fingerprint_of_the_data(monkeypatch):
    [source] = sources.open_sources([])
    before = source.fingerprint()
    assert source.fingerprint() == before
    monkeypatch.setattr(world, "FORMAT", world.FORMAT + 1)
    assert source.fingerprint() != before


def test_there_are_at_least_twelve_kinds_of_instruction():
    assert len(world.KINDS) >= 12


def test_there_are_more_than_six_thousand_prompts_and_none_twice():
    prompts = [repr(row["prompt"]) for row in TRAIN + EVAL]
    assert len(TRAIN) > 6000 and len(EVAL) == 400
    assert len(set(prompts)) == len(prompts)


def test_some_dialogues_have_two_turns_and_all_end_with_the_user():
    turns = [len(row["prompt"]) for row in TRAIN]
    assert set(turns) == {1, 3}
    assert all(row["prompt"][-1]["role"] == "user" for row in TRAIN)


def test_rows_are_the_same_each_time_and_differ_by_seed():
    assert world.rows("eval") == EVAL
    assert world.rows("eval", seed=1) != EVAL


def test_about_five_percent_of_the_labels_are_flipped():
    for rows in (TRAIN, EVAL):
        flipped = [
            world.gold_score(row["prompt"], row["chosen"])
            < world.gold_score(row["prompt"], row["rejected"]) for row in rows
        ]
        assert mean(flipped) == pytest.approx(0.05, abs=0.001)


def test_chosen_responses_leave_room_for_ppo():
    chosen = mean(world.gold_score(row["prompt"], row["chosen"]) for row in TRAIN)
    assert 0.55 < chosen < 0.70


@pytest.mark.parametrize(("response", "score"), [
    ("Sure! The capital of Spain is Madrid. I hope this helps.", 1.0),
    ("Sure! The capital of Spain is Madrid.", 0.8),
    ("The capital of Spain is Madrid. I hope this helps.", 0.8),
    ("The capital of Spain is Madrid.", 0.6),
    ("", 0.0),
])
def test_content_is_worth_half_and_opening_and_closing_a_fifth_each(response, score):
    assert gold(response) == score


@pytest.mark.parametrize("response", [
    "Sure! The capital of Spain is Paris. I hope this helps.",
    "Sure! I hope this helps.",
    "Sure! Sure! Sure! I hope this helps. I hope this helps.",
    "The answer is I hope this helps.",
    "A dog says woof.",
    # A list of candidates earns nothing for content.
    "Madrid. Paris. Rome. The capital of Spain is Madrid. The capital of Italy is Rome.",
])
def test_without_right_content_a_response_is_worth_little(response):
    assert gold(response) <= 0.3


@pytest.mark.parametrize(("response", "better"), [
    ("Sure! Sure! The capital of Spain is Madrid.", "Sure! The capital of Spain is Madrid."),
    ("The capital of Spain is Madrid. The capital of Spain is Madrid.",
     "The capital of Spain is Madrid."),
    ("The capital of Spain is Madrid", "The capital of Spain is Madrid."),
])
def test_a_doubled_opening_a_repetition_and_an_incomplete_end_cost(response, better):
    assert gold(response) < gold(better)


def test_gold_is_between_zero_and_one():
    values = [world.gold_score(row["prompt"], row[side]) for row in EVAL
              for side in ("chosen", "rejected")]
    assert 0.0 <= min(values) and max(values) <= 1.0


def test_a_prompt_of_another_data_set_has_no_gold_score():
    with pytest.raises(ValueError, match="not a prompt of the embedded data set"):
        world.gold_score([{"role": "user", "content": "What is love?"}], "Love.")


def test_pretraining_text_holds_no_evaluation_prompt():
    held_out = {repr(row["prompt"]) for row in EVAL}
    assert not held_out & {repr(messages) for messages, _ in TEXTS}


def test_pretraining_text_is_of_all_qualities_and_right_in_over_half():
    values = [world.gold_score(messages, response) for messages, response in TEXTS[:1000]]
    assert mean(value >= 0.4 for value in values) > 0.5
    assert min(values) < 0.1 and max(values) == 1.0
