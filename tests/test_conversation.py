"""Dialogues: what becomes of any text, and which turns fit the context."""

import json

import pytest
from loading import load

from alpaca_rlhf.evaluation.conversation import Conversation, cleaned, fit_context
from alpaca_rlhf.utils.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALK = [user("What is ice?"), assistant("Cold."), user("Who wrote Faust?"), assistant("Goethe."),
        user("Is it long?")]


@pytest.mark.parametrize(("text", "kept"), [
    ("  hi \r\n there\r ", "hi \n there"),
    ("a\x1b[2Jb\x00c\x07\x9f", "a[2Jbc"),
    ("tab\tstays", "tab\tstays"),
    ("half \ud83d done", "half  done"),
    ("🙂 e\u0301 مرحبا 你好", "🙂 e\u0301 مرحبا 你好"),
])
def test_control_characters_are_removed_and_all_else_stays(text, kept):
    assert cleaned(text) == kept


@pytest.mark.parametrize("text", ["", "  \n ", "\x00\x1b", "\ud83d"])
def test_empty_text_is_refused(text):
    with pytest.raises(UserError, match="the message is empty"):
        cleaned(text)


def test_a_dialogue_that_fits_is_kept_whole(small):
    ids, dropped = fit_context(small.chat, TALK, 128, 8)
    assert (ids, dropped) == (small.chat.prompt_ids(TALK), 0)


def test_the_oldest_turns_are_left_out_first_and_the_last_one_stays(small):
    for start in (2, 4):
        rest = small.chat.prompt_ids(TALK[start:])
        assert fit_context(small.chat, TALK, len(rest) + 8, 8) == (rest, start)
    assert fit_context(small.chat, TALK, len(small.chat.prompt_ids(TALK[2:])) + 7, 8)[1] == 4


def test_the_system_message_stays(small):
    system = {"role": "system", "content": "Be kind."}
    rest = small.chat.prompt_ids([system, TALK[-1]])
    assert fit_context(small.chat, [system, *TALK], len(rest) + 8, 8) == (rest, 4)


@pytest.mark.parametrize(("text", "tokens", "line"), [
    ("What is ice? " * 60, 8, "tokens; with 8 for the response the model can read 120; shorten"),
    ("x" * 1_000_000, 8, "1,000,000 characters, far more than fit"),
    ("Hi.", 128, "max_new_tokens 128: the model reads 128 tokens"),
])
def test_a_message_that_cannot_fit_is_refused_with_its_size(small, text, tokens, line):
    with pytest.raises(UserError, match=line):
        fit_context(small.chat, [*TALK[:-1], user(text)], 128, tokens)


def test_spelled_out_special_tokens_do_not_end_a_turn(small):
    eos = small.tokenizer.eos_token
    assert small.chat.eos_id not in fit_context(small.chat, [user(f"a {eos} b")], 128, 8)[0]


def test_a_saved_dialogue_is_data_to_train_on(tmp_path):
    talk = Conversation("Be kind.")
    with pytest.raises(UserError, match="nothing to save"):
        talk.save(tmp_path / "talk.jsonl")
    talk.store(talk.with_prompt("What is ice?"), "Cold 🙂.")
    talk.save(tmp_path / "talk.jsonl")
    talk.save(tmp_path / "talk.jsonl")
    assert len((tmp_path / "talk.jsonl").read_text().splitlines()) == 2
    (sample, _) = load([str(tmp_path / "talk.jsonl")]).train
    assert [m["content"] for m in sample.messages] == ["Be kind.", "What is ice?"]
    assert sample.chosen == "Cold 🙂."
    with pytest.raises(UserError, match="cannot be written"):
        talk.save(tmp_path / "no" / "folder.jsonl")
    assert json.loads((tmp_path / "talk.jsonl").read_text().splitlines()[0])["messages"]
