"""The embedded data set: its facts, its pairs, and the rule that judges replies."""

from itertools import islice
from statistics import mean

import pytest

from alpaca_rlhf.demo import assistant_world as world

SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]
TRAIN, EVAL = world.rows("train"), world.rows("eval")


def gold(reply: str) -> float:
    return round(world.gold_score(SPAIN, reply), 3)


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


def test_chosen_replies_leave_room_for_ppo():
    chosen = mean(world.gold_score(row["prompt"], row["chosen"]) for row in TRAIN)
    assert 0.55 < chosen < 0.70


def test_a_right_polite_whole_reply_is_worth_one():
    assert gold("Sure! The capital of Spain is Madrid. I hope this helps.") == 1.0


def test_right_content_alone_is_worth_more_than_half():
    assert gold("The capital of Spain is Madrid.") == 0.6


def test_an_opening_and_a_closing_are_worth_a_fifth_each():
    assert gold("Sure! The capital of Spain is Madrid.") == 0.8
    assert gold("The capital of Spain is Madrid. I hope this helps.") == 0.8


@pytest.mark.parametrize("reply", [
    "Sure! The capital of Spain is Paris. I hope this helps.",
    "Sure! I hope this helps.",
    "Sure! Sure! Sure! I hope this helps. I hope this helps.",
    "The answer is I hope this helps.",
    "A dog says woof.",
])
def test_without_right_content_a_reply_is_worth_little(reply):
    assert gold(reply) <= 0.3


def test_listing_every_candidate_earns_no_content():
    reply = "Madrid. Paris. Rome. The capital of Spain is Madrid. The capital of Italy is Rome."
    assert gold(reply) <= 0.3


def test_a_doubled_opening_costs():
    once = gold("Sure! The capital of Spain is Madrid. I hope this helps.")
    assert gold("Sure! Sure! The capital of Spain is Madrid. I hope this helps.") < once


def test_a_repeated_statement_costs():
    once = gold("The capital of Spain is Madrid.")
    assert gold("The capital of Spain is Madrid. The capital of Spain is Madrid.") < once


def test_a_reply_that_breaks_off_is_worth_less():
    assert gold("The capital of Spain is Madrid") < gold("The capital of Spain is Madrid.")


def test_an_empty_reply_is_worth_nothing():
    assert gold("") == 0.0


def test_gold_is_between_zero_and_one():
    values = [world.gold_score(row["prompt"], row[side]) for row in EVAL
              for side in ("chosen", "rejected")]
    assert 0.0 <= min(values) and max(values) <= 1.0


def test_a_prompt_of_another_world_has_no_gold():
    with pytest.raises(ValueError):
        world.gold_score([{"role": "user", "content": "What is love?"}], "Love.")


def test_pretraining_text_holds_no_evaluation_prompt():
    held_out = {repr(row["prompt"]) for row in EVAL}
    texts = islice(world.pretraining_texts(), 3000)
    assert not held_out & {repr(messages) for messages, _ in texts}


def test_pretraining_text_is_of_all_qualities_and_right_in_over_half():
    values = [world.gold_score(m, reply) for m, reply in islice(world.pretraining_texts(), 1000)]
    assert mean(value >= 0.4 for value in values) > 0.5
    assert min(values) < 0.1 and max(values) == 1.0
