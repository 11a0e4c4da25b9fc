"""Chat templates: the exact text of a dialogue, and which roles there are."""

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


SYSTEM = {"role": "system", "content": " Be brief. "}
BYE = {"role": "assistant", "content": "\n  Bye. "}


@pytest.mark.parametrize(("messages", "options", "text"), [
    ([QUESTION, ANSWER], {}, "<s>Human: Who are you?\n\nAssistant: A model.</s>"),
    ([QUESTION, ANSWER, THANKS, BYE], {}, "<s>Human: Who are you?\n\nAssistant: A model.</s>"
     "Human: Thanks!\n\nAssistant: \n  Bye.</s>"),
    # The generation prompt ends right before the response.
    ([QUESTION, ANSWER, THANKS], {"prompt": True},
     "<s>Human: Who are you?\n\nAssistant: A model.</s>Human: Thanks!\n\nAssistant:"),
    ([SYSTEM, QUESTION], {"prompt": True},
     "<s>Be brief.\n\nHuman: Who are you?\n\nAssistant:"),
    # No bos for a tokenizer that adds none.
    ([QUESTION, ANSWER], {"adds_bos": False}, "Human: Who are you?\n\nAssistant: A model.</s>"),
    # Newlines inside a message stay, and braces are text.
    ([{"role": "user", "content": "a\n\n b\r\n\tc"}], {"prompt": True},
     "<s>Human: a\n\n b\r\n\tc\n\nAssistant:"),
    ([{"role": "user", "content": "{{ 1 + 1 }} {% if %}"}], {"prompt": True},
     "<s>Human: {{ 1 + 1 }} {% if %}\n\nAssistant:"),
])
def test_human_assistant_renders_exactly_this(messages, options, text):
    assert rendered(messages, **options) == text


@pytest.mark.parametrize("name", chat_template.TEMPLATES)
def test_another_role_is_an_error(name):
    with pytest.raises(jinja2.TemplateError, match="unknown role tool"):
        rendered([{"role": "tool", "content": "x"}], name)


ADD = {"role": "user", "content": "Add.\n\n1, 2", "instruction": "Add.", "input": "1, 2"}
PREAMBLE = ("Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n")
WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
              "further context. Write a response that appropriately completes the request.\n\n")
CHAT = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. ")


@pytest.mark.parametrize(("name", "messages", "text"), [
    ("alpaca", [QUESTION],
     "<s>" + PREAMBLE + "### Instruction:\nWho are you?\n\n### Response:\n"),
    ("alpaca", [ADD],
     "<s>" + WITH_INPUT + "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"),
    ("alpaca", [SYSTEM, ADD],
     "<s>Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"),
    ("alpaca", [QUESTION, ANSWER, THANKS],
     "<s>" + PREAMBLE + "### Instruction:\nWho are you?\n\n### Response:\nA model.</s>\n\n"
     "### Instruction:\nThanks!\n\n### Response:\n"),
    ("alpaca_short", [QUESTION], "<s>### Instruction:\nWho are you?\n\n### Response:\n"),
    ("alpaca_short", [ADD],
     "<s>### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"),
    ("vicuna", [QUESTION, ANSWER, THANKS],
     "<s>" + CHAT + "USER: Who are you? ASSISTANT: A model.</s>USER: Thanks! ASSISTANT:"),
    ("vicuna", [SYSTEM, ADD], "<s>Be brief. USER: Add.\n\n1, 2 ASSISTANT:"),
    ("llama2", [QUESTION, ANSWER, THANKS],
     "<s>[INST] Who are you? [/INST] A model.</s><s>[INST] Thanks! [/INST]"),
    ("llama2", [SYSTEM, QUESTION, ANSWER, THANKS],
     "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho are you? [/INST] A model.</s>"
     "<s>[INST] Thanks! [/INST]"),
    ("chatml", [SYSTEM, QUESTION, ANSWER, THANKS],
     "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
     "<|im_start|>assistant\nA model.<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>\n"
     "<|im_start|>assistant\n"),
])
def test_each_template_renders_its_own_text(name, messages, text):
    assert rendered(messages, name, prompt=True) == text


@pytest.mark.parametrize(("name", "end"), [
    ("alpaca", ":\n\n  Bye.</s>"), ("vicuna", ": \n  Bye.</s>"), ("llama2", "] \n  Bye.</s>"),
    ("chatml", "assistant\n\n  Bye.<|im_end|>")])
def test_a_response_ends_with_the_end_of_turn_and_nothing_else(name, end):
    assert rendered([QUESTION, BYE], name).endswith(end)


def test_llama2_has_a_bos_before_each_turn_only_where_the_tokenizer_has_one():
    assert rendered([QUESTION, ANSWER, THANKS], "llama2", adds_bos=False, prompt=True) == (
        "[INST] Who are you? [/INST] A model.</s>[INST] Thanks! [/INST]")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", chat_template.TEMPLATES)
def test_a_template_is_known_by_its_source(name, adds_bos):
    assert chat_template.name_of(chat_template.jinja(name, adds_bos)) == name
    assert chat_template.name_of(chat_template.jinja(name, adds_bos) + " ") is None
