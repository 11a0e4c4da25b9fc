"""What a dialogue looks like to the model: the exact text, and who may speak."""

import jinja2
import pytest
from tiny_model import word_tokenizer

from alpaca_rlhf.utils.data import chat_template

QUESTION = {"role": "user", "content": "Who are you?"}
ANSWER = {"role": "assistant", "content": "A model."}
THANKS = {"role": "user", "content": " Thanks!\n"}


def rendered(messages, name="human_assistant", adds_bos=True, prompt=False):
    tokenizer = word_tokenizer("")
    tokenizer.chat_template = chat_template.jinja(name, adds_bos)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_one_turn():
    assert rendered([QUESTION, ANSWER]) == (
        "<s>Human: Who are you?\n\nAssistant: A model.</s>")


def test_two_turns_with_the_space_around_them_taken_off():
    assert rendered([QUESTION, ANSWER, THANKS, {"role": "assistant", "content": "  Bye. "}]) == (
        "<s>Human: Who are you?\n\nAssistant: A model.</s>"
        "Human: Thanks!\n\nAssistant: Bye.</s>")


def test_generation_prompt_ends_right_before_the_reply():
    assert rendered([QUESTION, ANSWER, THANKS], prompt=True) == (
        "<s>Human: Who are you?\n\nAssistant: A model.</s>Human: Thanks!\n\nAssistant:")


def test_system_message_stands_first_without_a_name():
    assert rendered([{"role": "system", "content": " Be brief. "}, QUESTION], prompt=True) == (
        "<s>Be brief.\n\nHuman: Who are you?\n\nAssistant:")


def test_bos_is_left_out_for_a_tokenizer_that_adds_none():
    assert rendered([QUESTION, ANSWER], adds_bos=False) == (
        "Human: Who are you?\n\nAssistant: A model.</s>")


def test_newlines_inside_a_message_stay():
    assert rendered([{"role": "user", "content": "a\n\n b\r\n\tc"}], prompt=True) == (
        "<s>Human: a\n\n b\r\n\tc\n\nAssistant:")


def test_braces_in_a_message_are_text_not_template():
    assert rendered([{"role": "user", "content": "{{ 1 + 1 }} {% if %}"}], prompt=True) == (
        "<s>Human: {{ 1 + 1 }} {% if %}\n\nAssistant:")


def test_another_role_is_an_error():
    with pytest.raises(jinja2.TemplateError, match="unknown role tool"):
        rendered([{"role": "tool", "content": "x"}])


def test_a_name_that_is_no_template_is_an_error():
    with pytest.raises(KeyError, match="nonesuch"):
        chat_template.jinja("nonesuch", adds_bos=True)
