"""The inspector: what it shows of rows, its picture, its verdict and its exit code."""

import json
import sys

import pytest
from tiny_model import word_tokenizer

from alpaca_rlhf import inspect_data
from alpaca_rlhf.inspect_data import Paint, shown
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

FORM = ChatFormat(word_tokenizer("Human: Assistant: hi you yes no"))
REPLY = {"input_ids": [1, 4, 6, 5, 8, 2, 4, 7, 5, 9, 2],
         "labels": [-100, -100, -100, -100, 8, 2, -100, -100, -100, 9, 2]}
PAIR = {"chosen_ids": [1, 4, 6, 5, 8, 2], "rejected_ids": [1, 4, 6, 5, 9, 9, 2]}


@pytest.mark.parametrize(("row", "text"), [
    (REPLY, "<s> Human: hi Assistant:« yes </s>» Human: you Assistant:« no </s>»"),
    (PAIR, "<s> Human: hi Assistant:\n chosen:   « yes </s>»\n rejected: « no no </s>»"),
    ({"prompt_ids": [1, 4, 6, 5]}, "<s> Human: hi Assistant:"),
])
def test_what_is_trained_stands_in_quotes_without_colours(row, text):
    assert shown(row, FORM, Paint(colours=False)) == text


def test_what_is_trained_is_green_and_the_worse_reply_red():
    green, red, faint, plain = "\033[32m", "\033[31m", "\033[2m", "\033[0m"
    assert shown(REPLY, FORM, Paint(colours=True)).startswith(
        f"{faint}<s> Human: hi Assistant:{plain}{green} yes </s>{plain}{faint} Human: you")
    assert f"rejected: {red} no no </s>{plain}" in shown(PAIR, FORM, Paint(colours=True))


def inspect(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect_data", *map(str, argv)])
    try:
        inspect_data.main()
    except SystemExit as left:
        return left.code
    return 0


@pytest.fixture
def flags(small, tmp_path):
    """Data with 1,600 plain pairs, and a model to read them."""
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes {i}" + "!" * (i % 2),
             "rejected": f"No {i}" + "." * (2 * ((i + 1) % 2))} for i in range(1600)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {1: ["--model_name_or_path", small.actor], 2: ["--model_name_or_path", small.actor],
            3: ["--actor_model_name_or_path", small.actor,
                "--critic_model_name_or_path", small.critic]}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_sound_data_is_shown_drawn_and_passed(step, flags, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "lengths.png"
    code = inspect(monkeypatch, "--step", step, "--rows", 2, "--histogram", picture,
                   "--data_path", tmp_path / "rows.jsonl", "--data_output_path", tmp_path / "cache",
                   *flags[step])
    said = capsys.readouterr().out
    assert code == 0
    assert said.endswith("verdict: nothing here speaks against training on it\n")
    assert "--- row 2: " in said and "--- row 3: " not in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_data_to_look_at_ends_with_exit_code_1(flags, tmp_path, monkeypatch, capsys):
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "", "chosen": "", "rejected": ""}\n' * 99)
    code = inspect(monkeypatch, "--step", 1, "--histogram", tmp_path / "lengths.png",
                   "--data_path", tmp_path / "rows.jsonl", "--data_output_path", tmp_path / "cache",
                   *flags[1])
    said = capsys.readouterr().out
    assert code == 1
    assert said.endswith(
        "verdict: look closer before training: replies or prompts that are empty\n")
    assert "LOOK replies or prompts that are empty: 99 (5.8%), counted out" in said


@pytest.mark.parametrize(("argv", "line"), [
    ([], "--step is required: 1, 2 or 3, whose data is to be looked at"),
    (["--step", "4"], "argument --step: invalid choice: 4 (choose from 1, 2, 3)"),
    (["--step", "1", "--rows", "-1"], "--rows -1: must be 0 or more"),
    (["--step", "1", "--seeed", "1"], "unknown flag --seeed; did you mean --seed?"),
])
def test_a_wrong_flag_is_refused_in_one_line(monkeypatch, argv, line):
    monkeypatch.setattr(sys, "argv", ["inspect_data", *argv])
    with pytest.raises(UserError) as refused:
        inspect_data.main()
    assert str(refused.value) == line
