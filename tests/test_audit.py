"""The audit: each fault of a data set is found, and one without faults passes."""

from collections import Counter

import pytest
from loading import given

from alpaca_rlhf.utils.data import audit
from alpaca_rlhf.utils.data.audit import Finding, verdict
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.split import Split

GOOD = [Sample(({"role": "user", "content": f"question {i}"},), f"answer {i}" + "!" * (i % 2),
               f"other {i}" + "?" * 3 * ((i + 1) % 2)) for i in range(2000)]
SPLIT = Split(2, (2.0, 4.0, 4.0), 1234)


def report(**changes) -> dict:
    made = {"train": 1000, "held_out": 60, "cut": {"cut to --max_seq_len 512": 3},
            "counted_out": {}, "data_sets": [{"samples": 2000}]}
    return made | changes


def findings(samples=GOOD, own=None, language=lambda text: "en", **changes) -> dict:
    """`own` is what the data set holds out itself; `changes` are of the report."""
    found = audit.audit([given(samples, own)], SPLIT, report(**changes), language)
    return {one.name: one for one in found}


def failing(found: dict) -> dict[str, str]:
    return {name: one.text for name, one in found.items() if not one.passed}


def test_data_without_faults_passes():
    assert failing(findings()) == {}
    assert verdict(findings().values()) == (
        "verdict: nothing here speaks against training on it", True)


def test_the_verdict_names_what_failed():
    found = [Finding("a", "x"), Finding("b", "y", False), Finding("c", "z", False)]
    assert verdict(found) == ("verdict: look closer before training: b, c", False)


@pytest.mark.parametrize(("changes", "name", "text"), [
    ({"counted_out": {"roles out of order": 300, "tie": 1}}, "rows counted out",
     "13.1% (300 roles out of order, 1 tie)"),
    ({"counted_out": {"empty chosen": 30}}, "replies or prompts that are empty",
     "30 (1.5%), counted out"),
    ({"counted_out": {"chosen equals rejected": 20, "replies are alike where they were cut": 10}},
     "pairs whose two replies are equal", "30 (1.5%), counted out"),
    ({"cut": {"cut to --max_seq_len 64": 200}}, "rows that are too long",
     "18.9% over --max_seq_len 64"),
    ({"cut": {}, "counted_out": {"over --max_seq_len 64": 200}}, "rows that are too long",
     "15.9% over the budget"),
    ({"held_out": 49}, "rows to measure on",
     "49 held out; 50 or more tell a good model from a bad one"),
])
def test_a_fault_in_the_counts_is_found(changes, name, text):
    assert failing(findings(**changes))[name] == text


def test_what_was_asked_for_is_no_fault():
    counts = {"no rejected reply": 900, "beyond the share of 0.3": 900, "language de": 900,
              "prompt is held out": 900, "prompt occurred before": 900}
    assert failing(findings(counted_out=counts)) == {}


def test_duplicate_rows_are_found():
    assert failing(findings(GOOD + GOOD[:100]))["duplicate rows"].endswith(
        "with the same prompt and replies as an earlier one")


def test_a_held_out_prompt_that_differs_by_case_alone_leaks():
    held = [Sample(({"role": "user", "content": f"QUESTION   {i}?"},), "a", "b")
            for i in range(100)]
    found = failing(findings(GOOD, held))
    assert found["held-out prompts that leak"] == (
        "100 of 100 (100.0%) are trained on by some step, but for case, spaces and punctuation")


def test_prompts_that_are_nearly_the_same_in_two_steps_are_found():
    doubled = [Sample(({"role": "user", "content": f"Question {i}."},), "a", "b")
               for i in range(2000)]
    assert "prompts in more than one step" in failing(findings(GOOD + doubled))


def test_a_chosen_reply_that_is_the_longer_one_too_often_is_found():
    biased = [Sample(one.messages, one.chosen + " and so on", one.rejected) for one in GOOD]
    assert failing(findings(biased))["length bias"].startswith(
        "the chosen reply is the longer one in 100.0% of ")


def test_languages_are_told_by_share():
    mixed = Counter({"text": 0})

    def language(text):
        mixed["text"] += 1
        return "de" if mixed["text"] % 4 == 0 else "en"

    samples = [Sample(one.messages, one.chosen + " and some more words", one.rejected)
               for one in GOOD]
    assert findings(samples, language=language)["languages"].text == (
        "en 75%, de 25% (guessed from 500 rows)")


def test_a_language_is_guessed_without_a_network():
    assert audit._language("Das ist ein ganz gewöhnlicher deutscher Satz.") == "de"
    assert audit._language("これは日本語の文です。") == "ja"
