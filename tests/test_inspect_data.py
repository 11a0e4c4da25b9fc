"""The inspector: rows, picture, audit, verdict and exit code."""

import json
from itertools import count

import pytest
from loading import given
from tiny_model import word_tokenizer

from alpaca_rlhf import inspect_data
from alpaca_rlhf.inspect_data import Finding, audit, shown, verdict
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

CHAT = ChatFormat(word_tokenizer("Human: Assistant: hi you yes no"))
TURNS = {"input_ids": [1, 4, 6, 5, 8, 2, 4, 7, 5, 9, 2],
         "labels": [-100, -100, -100, -100, 8, 2, -100, -100, -100, 9, 2]}
PAIR = {"chosen_ids": [1, 4, 6, 5, 8, 2], "rejected_ids": [1, 4, 6, 5, 9, 9, 2]}


@pytest.mark.parametrize(("row", "text"), [
    (TURNS, "<s> Human: hi Assistant:« yes </s>» Human: you Assistant:« no </s>»"),
    (PAIR, "<s> Human: hi Assistant:\n chosen:   « yes </s>»\n rejected: « no no </s>»"),
    ({"prompt_ids": [1, 4, 6, 5]}, "<s> Human: hi Assistant:"),
])
def test_trained_text_is_in_quotes_without_colours(row, text):
    assert shown(row, CHAT, colours=False) == text


def test_trained_text_is_green_and_the_rejected_response_red():
    green, red, faint, plain = "\033[32m", "\033[31m", "\033[2m", "\033[0m"
    assert shown(TURNS, CHAT, colours=True).startswith(
        f"{faint}<s> Human: hi Assistant:{plain}{green} yes </s>{plain}{faint} Human: you")
    assert f"rejected: {red} no no </s>{plain}" in shown(PAIR, CHAT, colours=True)


# --- the program ---------------------------------------------------------------------------------


def inspect(*argv) -> int:
    try:
        inspect_data.main(list(map(str, argv)))
    except SystemExit as left:
        return left.code
    return 0


@pytest.fixture
def flags(small, tmp_path):
    """Data with 1,600 plain pairs, and a model to read them."""
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes {i}" + "!" * (i % 2),
             "rejected": f"No {i}" + "." * (2 * ((i + 1) % 2))} for i in range(1600)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--data_path", tmp_path / "rows.jsonl", "--data_output_path", tmp_path / "cache",
              "--histogram", tmp_path / "lengths.png"]
    one = ["--model_name_or_path", small.actor]
    both = ["--actor_model_name_or_path", small.actor, "--critic_model_name_or_path", small.critic]
    return {step: ["--step", step, *common, *models]
            for step, models in ((1, one), (2, one), (3, both))}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_sound_data_is_shown_drawn_and_passed(step, flags, tmp_path, capsys):
    assert inspect("--rows", 2, *flags[step]) == 0
    said = capsys.readouterr().out
    assert said.endswith("verdict: no issues found\n")
    assert "--- row 2: " in said and "--- row 3: " not in said
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_data_that_needs_a_look_ends_with_exit_code_1(flags, tmp_path, capsys):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "", "chosen": "", "rejected": ""}\n' * 99)
    assert inspect(*flags[1]) == 1
    said = capsys.readouterr().out
    assert said.endswith("verdict: look closer before training: empty responses or prompts\n")
    assert "LOOK empty responses or prompts: 99 (5.8%), filtered out" in said


@pytest.mark.parametrize(("argv", "line"), [
    ([], "--step is required: step whose data is inspected, 1, 2 or 3; all other flags are those "
     "of the step"),
    (["--step", "4"], "--step 4: must be one of 1, 2, 3"),
    (["--step", "1", "--rows", "-1"], "--rows -1: must be 0 or more"),
    (["--step", "2", "--train_on", "all"],
     "unknown flag --train_on (did you mean --num_train_epochs?); see --help"),
])
def test_a_wrong_flag_is_refused_in_one_line(argv, line):
    with pytest.raises(UserError) as refused:
        inspect_data.main(argv)
    assert str(refused.value) == line


# --- the audit -----------------------------------------------------------------------------------


def pairs(prompt: str, n: int, more: str = "") -> list[Sample]:
    """Make n pairs, in half of which the chosen response is the longer one."""
    return [Sample(({"role": "user", "content": prompt.format(i)},),
                   f"answer {i}{more}" + "!" * (i % 2), f"other {i}" + "?" * 3 * ((i + 1) % 2))
            for i in range(n)]


GOOD = pairs("question {}", 2000)
REPORT = {"train": 1000, "held_out": 60, "cut": {"cut to --max_seq_len 512": 3},
          "filtered_out": {}, "data_sets": [{"samples": 2000}]}


def findings(samples=GOOD, own=None, guess=lambda text: "en", **changes) -> dict[str, Finding]:
    """Audit samples; `own` is what the data set holds out itself, `changes` are of the report."""
    split = Split(2, (2.0, 4.0, 4.0), 1234)
    found = audit([given(samples, own)], split, {**REPORT, **changes}, guess)
    return {one.name: one for one in found}


def failing(found: dict[str, Finding]) -> dict[str, str]:
    return {name: one.text for name, one in found.items() if not one.passed}


def test_data_without_faults_passes():
    assert failing(findings()) == {}
    assert verdict(findings().values()) == ("verdict: no issues found", True)


def test_the_verdict_names_what_failed():
    found = [Finding("a", "x"), Finding("b", "y", False), Finding("c", "z", False)]
    assert verdict(found) == ("verdict: look closer before training: b, c", False)


TWIN = "100 of 100 (100.0%) are trained on by some step, ignoring case, spaces and punctuation"


@pytest.mark.parametrize(("changes", "name", "text"), [
    ({"filtered_out": {"roles out of order": 300, "tie": 1}}, "rows filtered out",
     "13.1% (300 roles out of order, 1 tie)"),
    ({"filtered_out": {"empty chosen": 30}}, "empty responses or prompts",
     "30 (1.5%), filtered out"),
    ({"filtered_out": {"chosen equals rejected": 20,
                       "responses are identical after truncation": 10}},
     "pairs of equal responses", "30 (1.5%), filtered out"),
    ({"cut": {"cut to --max_seq_len 64": 200}}, "rows that are too long",
     "18.9% over --max_seq_len 64"),
    ({"cut": {}, "filtered_out": {"over --max_seq_len 64": 200}}, "rows that are too long",
     "15.9% over the maximum length"),
    ({"held_out": 49}, "held-out rows", "49; 50 or more tell a good model from a bad one"),
    ({"samples": GOOD + GOOD[:100]}, "duplicate rows",
     "with prompt and responses of an earlier row"),
    ({"own": pairs("QUESTION   {}?", 100)}, "held-out prompts that leak", TWIN),
    ({"samples": GOOD + pairs("Question {}.", 2000)}, "prompts in more than one step",
     "ignoring case, spaces and punctuation"),
    ({"samples": pairs("question {}", 2000, " and so on")}, "length bias",
     "the chosen response is the longer one in 100.0% of "),
])
def test_a_fault_of_the_data_is_found(changes, name, text):
    assert text in failing(findings(**changes))[name]


def test_what_was_asked_for_is_no_fault():
    counts = {"no rejected response": 900, "beyond the share of 0.3": 900, "language de": 900,
              "prompt is held out": 900, "prompt occurred before": 900}
    assert failing(findings(filtered_out=counts)) == {}


def test_languages_are_told_by_share():
    number = count(1)
    samples = pairs("question {}", 2000, " and some more words")
    found = findings(samples, guess=lambda text: "de" if next(number) % 4 == 0 else "en")
    assert found["languages"].text == "en 75%, de 25% (guessed from 500 rows)"


def test_a_language_is_guessed_without_a_network():
    texts = ("Das ist ein ganz gewöhnlicher deutscher Satz.", "これは日本語の文です。")
    for text, language in zip(texts, ("de", "ja"), strict=True):
        samples = [Sample(({"role": "user", "content": text},), text * 2)]
        assert findings(samples, guess=None)["languages"].text.startswith(language)
