"""Plain text as rows for the language-modelling loss of step 3."""

import pytest
from tiny_model import word_tokenizer

from alpaca_rlhf.utils.data.plain_text import load_blocks
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

FORM = ChatFormat(word_tokenizer("Human: Assistant: a b c"))  # ids 4 to 8, eos 2


def blocks(path, size: int) -> list[list[int]]:
    rows = load_blocks(str(path), None, FORM, size)
    assert all(row["labels"] == row["input_ids"] for row in rows)
    return [row["input_ids"] for row in rows]


def test_each_paragraph_ends_with_eos_and_all_are_cut_into_rows(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b\nc\n\nb\n\n \n\na")
    assert blocks(path, 3) == [[6, 7, 8], [2, 7, 2]]


def test_what_fills_the_last_row_exactly_is_kept(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c")
    assert blocks(path, 4) == [[6, 7, 8, 2]]


def test_spelled_out_special_tokens_are_left_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a </s> <unk> b")
    assert blocks(path, 3) == [[6, 7, 2]]


def refusal(name: str, size: int) -> str:
    with pytest.raises(UserError) as refused:
        load_blocks(name, None, FORM, size)
    return str(refused.value)


def test_text_of_less_than_one_row_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c")
    assert refusal(str(path), 5) == (
        f"--unsupervised_dataset_name {path}: holds 4 tokens, less than one row of 5 "
        "(--max_prompt_seq_len + --max_answer_seq_len); give more text, or shorten the rows")


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"a b \xff")
    assert refusal(str(path), 2) == (
        f"--unsupervised_dataset_name {path}: not UTF-8 at byte 4; convert the file")


def unreachable(*names, **options):
    raise ConnectionError("no route\nto host")


def test_a_name_out_of_reach_is_refused(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert refusal("some/text", 2) == (
        "--unsupervised_dataset_name some/text: no such file, and the hub did not give it "
        "(ConnectionError); give a local text file")


class Rows(dict):
    """A hub data set: columns by name."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_a_hub_set_is_read_by_its_column_text(monkeypatch):
    asked = []

    def found(name, configuration, split):
        asked.append((name, configuration, split))
        return Rows(text=["a b", "", "c"])

    monkeypatch.setattr("datasets.load_dataset", found)
    rows = load_blocks("some/text", "v1", FORM, 5)
    assert [row["input_ids"] for row in rows] == [[6, 7, 2, 8, 2]]
    assert asked == [("some/text", "v1", "train")]


def test_a_hub_set_without_that_column_is_refused(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: Rows(a=[], b=[]))
    assert refusal("some/text", 2) == (
        "--unsupervised_dataset_name some/text: no column text; there are a, b; give a data set "
        "with one, or a local text file")
