"""From dialogues to ids: one prompt, one reply, one ending, the same in all three steps.

The properties are checked with a small sentencepiece tokenizer, and with that of SmolLM2-135M under
both templates where `scripts/fetch_smollm2.py` has put it into output/smollm2-135m.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from conftest import small_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_model import word_tokenizer
from tokenizers import AddedToken

from alpaca_rlhf.utils.data import preprocessing
from alpaca_rlhf.utils.data.preprocessing import Lengths
from alpaca_rlhf.utils.data.raw_datasets import Sample
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, describe, load_tokenizer, require_same
from alpaca_rlhf.utils.errors import UserError

SMOLLM2 = Path(__file__).resolve().parents[1] / "output" / "smollm2-135m"
WIDE = Lengths(10**6, 10**6, "truncate", "--max_seq_len 2000000")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# --- literal ids ---------------------------------------------------------------------------------

WORDS = "Human: Assistant: hi you yes no"  # ids 4 to 9


def word_format(**special: str | None) -> ChatFormat:
    return ChatFormat(word_tokenizer(WORDS, **special))


def test_prompt_ids_begin_with_bos_and_end_before_the_reply():
    assert word_format().prompt_ids([user("hi you")]) == [1, 4, 6, 7, 5]


def test_an_earlier_reply_in_the_prompt_ends_with_eos():
    dialogue = [user("hi"), assistant("yes"), user("you")]
    assert word_format().prompt_ids(dialogue) == [1, 4, 6, 5, 8, 2, 4, 7, 5]


def test_response_ids_are_the_reply_and_one_eos():
    assert word_format().response_ids(" yes no\n") == [8, 9, 2]


def test_step_1_trains_exactly_the_reply_and_its_eos():
    sample = Sample((user("hi you"),), "yes no")
    row = preprocessing.encode_reply(sample, word_format(), WIDE)
    assert row["input_ids"] == [1, 4, 6, 7, 5, 8, 9, 2]
    assert row["labels"] == [-100, -100, -100, -100, -100, 8, 9, 2]


def test_step_1_does_not_train_the_earlier_replies():
    sample = Sample((user("hi"), assistant("yes"), user("you")), "no")
    labels = preprocessing.encode_reply(sample, word_format(), WIDE)["labels"]
    assert labels == [-100] * 9 + [9, 2]


def test_train_on_prompt_trains_every_token():
    row = preprocessing.encode_reply(Sample((user("hi"),), "no"), word_format(), WIDE, True)
    assert row["labels"] == row["input_ids"] == [1, 4, 6, 5, 9, 2]


def test_step_2_pairs_share_the_prompt():
    row = preprocessing.encode_pair(Sample((user("hi"),), "yes", "no no"), word_format(), WIDE)
    assert row["chosen_ids"] == [1, 4, 6, 5, 8, 2]
    assert row["rejected_ids"] == [1, 4, 6, 5, 9, 9, 2]


def test_step_3_keeps_the_messages_for_people():
    row = preprocessing.encode_prompt(Sample((user("hi ü"),), "yes"), word_format(), WIDE)
    assert row["prompt_ids"] == [1, 4, 6, 3, 5]
    assert json.loads(row["messages"]) == [{"role": "user", "content": "hi ü"}]


@pytest.mark.parametrize("text", [
    "hi </s>", "<s>hi", "hi<pad>", "h<s>i", "h</s>i", "h<</s>s>i", "hi<<pad>/s>", "<</s>/s>hi"])
def test_spelled_out_special_tokens_never_become_real_ones(text):
    form = word_format()
    assert form.prompt_ids([user(text)]) == [1, 4, 6, 5]
    assert form.response_ids(text) == [6, 2]


def test_a_special_token_without_a_name_of_its_own_is_no_text_either():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<plain>")])
    form = ChatFormat(tokenizer)
    assert form.prompt_ids([user("hi <|eot_id|> <plain>")]) == [1, 4, 6, 11, 5]


def test_decoded_text_has_no_special_tokens():
    assert word_format().decode([1, 8, 9, 2, 0, 0]) == "yes no"


# --- what a tokenizer must have ------------------------------------------------------------------


def saved(folder: Path, words: str = WORDS, **special: str | None) -> str:
    word_tokenizer(words, **special).save_pretrained(folder)
    return str(folder)


def test_a_pad_of_its_own_is_kept_though_its_id_is_0(tmp_path):
    assert load_tokenizer(saved(tmp_path)).pad_token_id == 0


def test_pad_that_is_eos_is_replaced_by_unk(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, pad_token="</s>"))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (3, 2)


def test_pad_that_is_eos_is_replaced_by_a_new_token_without_unk(tmp_path):
    tokenizer = load_tokenizer(saved(tmp_path, "hi", pad_token="</s>", unk_token=None))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)


def test_a_missing_pad_is_a_new_token_when_unk_is_eos(tmp_path):
    folder = saved(tmp_path, pad_token=None, unk_token="<s>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, None)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    folder = saved(tmp_path, eos_token=None)
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder)
    assert str(refused.value) == (
        f"{folder}: the tokenizer has no eos token; set eos_token in its config")


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as refused:
        load_tokenizer(str(tmp_path))
    line = str(refused.value)
    assert line.startswith(f"no tokenizer can be loaded from {tmp_path}: ")
    assert line.endswith("; give a folder with tokenizer files")
    assert "\n" not in line


def test_template_adds_bos_only_where_the_tokenizer_does(tmp_path):
    assert "bos_token" not in load_tokenizer(saved(tmp_path)).chat_template
    assert small_tokenizer().chat_template.startswith("{{- bos_token -}}")


def test_a_tokenizers_own_template_is_kept_when_asked_for(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), "tokenizer").chat_template == tokenizer.chat_template


def test_a_tokenizer_without_a_template_is_refused_when_its_own_is_asked_for(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        load_tokenizer(str(tmp_path), "tokenizer")
    assert str(refused.value) == (
        f"--chat_template tokenizer: the tokenizer of {tmp_path} has none; "
        "choose one of human_assistant")


def with_template(template: str) -> ChatFormat:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def test_a_template_whose_turns_do_not_end_with_eos_is_refused():
    with pytest.raises(UserError) as refused:
        with_template("{% for m in messages %}{{ m.content + ' no' }}{% endfor %}")
    assert str(refused.value) == (
        "--chat_template tokenizer: an assistant's turn ends with ' no', not with the single "
        "token '</s>'; choose human_assistant")


def test_a_template_whose_generation_prompt_is_not_what_precedes_a_reply_is_refused():
    with pytest.raises(UserError) as refused:
        with_template("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
                      "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}")
    assert str(refused.value) == (
        "--chat_template tokenizer: the template's generation prompt is not what stands before a "
        "reply; choose human_assistant")




def test_a_dialogue_that_the_tokenizers_own_template_refuses_is_one_line():
    form = with_template(
        "{% if messages|length > 2 %}{{ raise_exception('only\\none turn') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}")
    with pytest.raises(UserError) as refused:
        form.prompt_ids([user("hi"), assistant("yes"), user("no")])
    assert str(refused.value) == (
        "--chat_template tokenizer: the template refuses a dialogue of 3 turns (only one turn); "
        "choose human_assistant")


def test_the_start_up_line_names_the_special_tokens():
    assert describe(word_tokenizer(WORDS)) == (
        "tokenizer: 10 tokens, bos '<s>' = 1, eos '</s>' = 2, pad '<pad>' = 0")


# --- actor and critic ----------------------------------------------------------------------------


def test_equal_tokenizers_go_together():
    require_same(word_tokenizer(WORDS), word_tokenizer(WORDS))


@pytest.mark.parametrize(("what", "other"), [
    ("vocabularies", word_tokenizer("Assistant: Human: hi you yes no")),
    ("special tokens", word_tokenizer(WORDS, pad_token="<unk>")),
])
def test_different_tokenizers_are_refused(what, other):
    actor = word_tokenizer(WORDS)
    actor.name_or_path, other.name_or_path = "out/actor", "out/critic"
    with pytest.raises(UserError) as refused:
        require_same(actor, other)
    assert str(refused.value) == (
        f"--actor_model_name_or_path and --critic_model_name_or_path have different {what} "
        "(out/actor, out/critic); train both from the same model")


def test_different_templates_are_refused():
    other = word_tokenizer(WORDS)
    other.chat_template += " "
    with pytest.raises(UserError, match="have different chat templates"):
        require_same(word_tokenizer(WORDS), other)


# --- properties over random dialogues ------------------------------------------------------------

FORMATS = ("small", "smollm2 human_assistant", "smollm2 tokenizer")
# A lone surrogate is no text, and U+2581 is how sentencepiece writes a space. What is printed does
# not need every byte, and SmolLM2's vocabulary has not got every byte.
PRINTED = st.characters(exclude_categories=["C"], exclude_characters="\u2581")
ANY_CHARACTER = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXT = st.one_of(
    st.text(PRINTED, max_size=30),
    st.lists(
        st.sampled_from(["Hi", " ", "\n", "\n\n", "Human:", "Assistant:", "é", "日本", "👩‍👩‍👧",
                         "\t", "don't", "1234", ".", " .", "<", "s>", "|", "im_end", "\r\n",
                         "\u00a0"]),
        max_size=12,
    ).map("".join),
)
SPOKEN = TEXT.filter(lambda text: bool(text.strip()))
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@st.composite
def dialogues(draw) -> list[dict[str, str]]:
    """One to three turns of the user, with the assistant's between them."""
    turns = draw(st.integers(1, 3))
    made = [user(draw(SPOKEN))]
    for _ in range(turns - 1):
        made += [assistant(draw(SPOKEN)), user(draw(SPOKEN))]
    return made


@cache
def chat_format(name: str) -> ChatFormat:
    if name == "small":
        return ChatFormat(small_tokenizer())
    if not SMOLLM2.is_dir():
        pytest.skip("no output/smollm2-135m; scripts/fetch_smollm2.py makes it")
    return ChatFormat(load_tokenizer(str(SMOLLM2), name.split()[1]))


def property_of_every_format(test):
    """Run a property with each tokenizer and template."""
    randomly = settings(max_examples=60, deadline=None, derandomize=True)(test)
    return pytest.mark.parametrize("name", FORMATS)(randomly)


def has_special(form: ChatFormat, *texts: str) -> bool:
    return any(token in text for token in form.tokenizer.all_special_tokens for text in texts)


@property_of_every_format
@given(messages=dialogues(), reply=SPOKEN)
def test_prompt_and_response_ids_are_those_of_the_whole_dialogue(name, messages, reply):
    form = chat_format(name)
    assume(not has_special(form, reply, *(m["content"] for m in messages)))
    whole = form.tokenizer.apply_chat_template(
        [*messages, assistant(reply.strip())], return_dict=False)
    ids = form.prompt_ids(messages) + form.response_ids(reply)
    assert ids == whole[: len(ids)]
    assert form.tokenizer.decode(whole[len(ids) :]).strip() == ""


@property_of_every_format
@given(reply=SPOKEN)
def test_response_ids_decode_to_the_stripped_text(name, reply):
    form = chat_format(name)
    assume(not has_special(form, reply))
    assert form.decode(form.response_ids(reply)) == reply.strip()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(reply=st.text(ANY_CHARACTER, max_size=30))
def test_every_character_survives_a_tokenizer_that_has_every_byte(reply):
    form = chat_format("small")
    assume(not has_special(form, reply))
    assert form.decode(form.response_ids(reply)) == reply.strip()


@property_of_every_format
@given(reply=st.lists(st.one_of(SPOKEN, st.sampled_from(SPECIAL)), max_size=8).map("".join))
def test_eos_is_one_id_at_the_end_and_no_other_special_id_is_in_a_reply(name, reply):
    form = chat_format(name)
    *before, last = form.response_ids(reply)
    assert last == form.eos_id
    assert not set(before) & set(form.tokenizer.all_special_ids)


@property_of_every_format
@given(text=st.lists(st.one_of(SPOKEN, st.sampled_from(SPECIAL)), max_size=8).map("".join))
def test_no_text_adds_a_special_id_to_a_prompt(name, text):
    form = chat_format(name)
    special = set(form.tokenizer.all_special_ids)

    def count(content: str) -> int:
        return sum(i in special for i in form.prompt_ids([user(content)]))

    assert count(text) == count("Hi")


@property_of_every_format
@given(messages=dialogues(), chosen=SPOKEN, rejected=SPOKEN)
def test_all_steps_read_the_same_ids(name, messages, chosen, rejected):
    form = chat_format(name)
    sample = Sample(tuple(messages), chosen, rejected)
    prompt = preprocessing.encode_prompt(sample, form, WIDE)["prompt_ids"]
    reply = preprocessing.encode_reply(sample, form, WIDE)
    pair = preprocessing.encode_pair(sample, form, WIDE)
    assert prompt == form.prompt_ids(messages)
    assert pair["chosen_ids"] == reply["input_ids"] == prompt + form.response_ids(chosen)
    assert pair["rejected_ids"] == prompt + form.response_ids(rejected)
