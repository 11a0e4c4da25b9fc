"""Dialogues to token ids: prompt, response and ending, the same in all three steps.

The properties are checked under every template with a small sentencepiece tokenizer, and with that
of SmolLM2-135M where `scripts/fetch_smollm2.py` has put it into output/smollm2-135m.
"""

import atexit
import dataclasses
import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from conftest import small_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_model import word_tokenizer
from tokenizers import AddedToken
from transformers.convert_slow_tokenizer import generate_merges

from alpaca_rlhf.utils.configs import LoadingConfig
from alpaca_rlhf.utils.data import chat_template
from alpaca_rlhf.utils.data.encode import Lengths, encode_pairs, encode_prompts, encode_sft
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.tokenizer import (
    ChatFormat,
    eos_ids,
    load_chat,
    load_tokenizer,
    require_same,
)
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


@pytest.mark.parametrize(("messages", "ids"), [
    ([user("hi you")], [1, 4, 6, 7, 5]),
    ([user("hi"), assistant("yes"), user("you")], [1, 4, 6, 5, 8, 2, 4, 7, 5]),
])
def test_prompt_ids_begin_with_bos_and_end_before_the_response(messages, ids):
    assert word_format().prompt_ids(messages) == ids


def test_response_ids_are_the_response_and_one_eos():
    assert word_format().response_ids(" yes no\n") == [8, 9, 2]


TWO_TURNS = Sample((user("hi"), assistant("yes"), user("you")), "no")
#               <s> Human: hi Assistant: yes </s> Human: you Assistant: no </s>
TWO_TURNS_IDS = [1, 4, 6, 5, 8, 2, 4, 7, 5, 9, 2]


@pytest.mark.parametrize(("sample", "options", "ids", "labels"), [
    (Sample((user("hi you"),), "yes no"), {}, [1, 4, 6, 7, 5, 8, 9, 2], [-100] * 5 + [8, 9, 2]),
    # Every response and its eos, and nothing else.
    (TWO_TURNS, {}, TWO_TURNS_IDS, [-100, -100, -100, -100, 8, 2, -100, -100, -100, 9, 2]),
    (TWO_TURNS, {"train_on": "last"}, TWO_TURNS_IDS, [-100] * 9 + [9, 2]),
    (TWO_TURNS, {"train_on_prompt": True}, TWO_TURNS_IDS, TWO_TURNS_IDS),
    # The earlier response is trained in a row of its own.
    (dataclasses.replace(TWO_TURNS, history_is_trained=False), {}, TWO_TURNS_IDS,
     [-100] * 9 + [9, 2]),
    # An earlier response without a word is not trained.
    (Sample((user("hi"), assistant(""), user("you")), "no"), {}, [1, 4, 6, 5, 2, 4, 7, 5, 9, 2],
     [-100] * 8 + [9, 2]),
    # Labels are cut with the prompt, which keeps bos.
    (TWO_TURNS, {"lengths": Lengths.of_sequence(8, "truncate")}, [1, *TWO_TURNS_IDS[-7:]],
     [-100, 8, 2, -100, -100, -100, 9, 2]),
    # Two responses in a row are both trained.
    (Sample((user("hi"), assistant("yes"), assistant("no"), user("you")), "no"), {},
     [1, 4, 6, 5, 8, 2, 5, 9, 2, 4, 7, 5, 9, 2],
     [-100] * 4 + [8, 2, -100, 9, 2, -100, -100, -100, 9, 2]),
])
def test_step_1_trains_exactly_these_tokens(sample, options, ids, labels):
    (row,) = encode_sft([sample], word_format(), **{"lengths": WIDE, **options})
    assert (row["input_ids"], row["labels"]) == (ids, labels)


def test_step_2_pairs_share_the_prompt():
    (row,) = encode_pairs([Sample((user("hi"),), "yes", "no no")], word_format(), WIDE)
    assert row["chosen_ids"] == [1, 4, 6, 5, 8, 2]
    assert row["rejected_ids"] == [1, 4, 6, 5, 9, 9, 2]


def test_step_3_keeps_the_messages_to_show_them():
    (row,) = encode_prompts([Sample((user("hi ü"),), "yes")], word_format(), WIDE)
    assert row["prompt_ids"] == [1, 4, 6, 3, 5]
    assert json.loads(row["messages"]) == [{"role": "user", "content": "hi ü"}]


@pytest.mark.parametrize("text", [
    "hi </s>", "<s>hi", "hi<pad>", "h<s>i", "h</s>i", "h<</s>s>i", "hi<<pad>/s>", "<</s>/s>hi"])
def test_spelled_out_special_tokens_never_become_real_ones(text):
    chat = word_format()
    assert chat.prompt_ids([user(text)]) == [1, 4, 6, 5]
    assert chat.response_ids(text) == [6, 2]


def test_a_special_token_without_a_name_of_its_own_is_removed_too():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<plain>")])
    chat = ChatFormat(tokenizer)
    assert chat.prompt_ids([user("hi <|eot_id|> <plain>")]) == [1, 4, 6, 11, 5]


def test_decoded_text_has_no_special_tokens():
    assert word_format().decode([1, 8, 9, 2, 0, 0]) == "yes no"


# --- what a tokenizer must have ------------------------------------------------------------------


def saved(folder: Path, words: str = WORDS, **special: str | None) -> str:
    """A tokenizer as others make them, without a template."""
    tokenizer = word_tokenizer(words, **special)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("words", "special", "pad"), [
    (WORDS, {}, ("<pad>", 0)),  # a pad of its own is kept though its id is 0
    (WORDS, {"pad_token": "</s>"}, ("<unk>", 3)),
    ("hi", {"pad_token": "</s>", "unk_token": None}, ("<pad>", 0)),
    (WORDS, {"pad_token": None, "unk_token": "<s>"}, ("<pad>", 0)),
])
def test_pad_is_never_eos_but_a_token_of_its_own_or_unk(tmp_path, words, special, pad):
    tokenizer = load_tokenizer(saved(tmp_path, words, **special))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == pad
    assert tokenizer.eos_token_id == 2


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as refused:
        load_tokenizer(*args, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    folder = saved(tmp_path, eos_token=None)
    assert refusal(folder) == (
        f"{folder}: the tokenizer has no eos token; set eos_token in its config")


NO_VOCABULARY = "it has no tokenizer.json or other vocabulary; give a folder with tokenizer files"


@pytest.mark.parametrize(("files", "problem"), [
    ({}, NO_VOCABULARY),
    ({"config.json": "{}"}, NO_VOCABULARY),
    ({"config.json": '{"model_type": "llama"}'}, NO_VOCABULARY),
    # These would be loaded as a tokenizer of nothing but special tokens.
    ({"config.json": '{"model_type": "gpt2"}'}, NO_VOCABULARY),
    ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}'},
     NO_VOCABULARY),
    ({"config.json": "{"}, "its config.json is broken; save or download it again"),
    ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"},
     "its tokenizer_config.json is broken; save or download it again"),
    ({"tokenizer.json": '{"version": "1.0"', "tokenizer_config.json": "{}"},
     "its tokenizer.json is broken; save or download it again"),
    ({"tokenizer.json": b"\xff\xfe\x00", "tokenizer_config.json": "{}"},
     "its tokenizer.json is broken; save or download it again"),
    ({"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
     "its files cannot be read (KeyError); save or download them again"),
    ({"config.json": '{"model_type": "llama"}', "tokenizer.model": ""},
     "its files cannot be read (ValueError); save or download them again"),
    ({"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'},
     "it comes with code of its own; give --trust_remote_code to run it"),
])
def test_a_folder_without_a_whole_tokenizer_is_refused(tmp_path, files, problem):
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    assert refusal(str(tmp_path)) == f"no tokenizer can be loaded from {tmp_path}: {problem}"


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, problem in (
        (tmp_path / "file", "it is a file; give the folder with the tokenizer files"),
        (tmp_path / "nowhere", "no such folder; check the name"),
    ):
        assert refusal(str(path)) == f"no tokenizer can be loaded from {path}: {problem}"


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [2]), (2, [2]), (9, [2, 9]), ([9, 2, 11], [2, 9, 11])])
def test_a_response_ends_with_the_tokenizers_eos_or_one_of_the_generation_config(
    configured, expected
):
    assert eos_ids(word_tokenizer(WORDS), configured) == expected


def test_template_adds_bos_only_where_the_tokenizer_does(tmp_path):
    assert "bos_token" not in load_tokenizer(saved(tmp_path)).chat_template
    assert small_tokenizer().chat_template.startswith("{{- bos_token -}}")


OTHERS = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def with_template(template: str) -> Any:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = template
    return tokenizer


def test_a_tokenizers_own_template_is_used_only_when_asked_for(tmp_path):
    with_template(OTHERS).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), "tokenizer").chat_template == OTHERS
    default = load_tokenizer(str(tmp_path)).chat_template
    assert default == chat_template.jinja("human_assistant", adds_bos=False)


def test_a_tokenizer_without_a_template_is_refused_when_its_own_is_asked_for(tmp_path):
    assert refusal(saved(tmp_path), "tokenizer") == (
        f"--chat_template tokenizer: the tokenizer of {tmp_path} has none; "
        "choose one of human_assistant, alpaca, alpaca_short, vicuna, llama2, chatml")


@pytest.mark.parametrize("name", ["human_assistant", "alpaca", "vicuna", "llama2", "tokenizer"])
def test_a_template_is_handed_on_by_the_model(tmp_path, name, capsys):
    with_template(OTHERS).save_pretrained(tmp_path / "base")
    load_tokenizer(str(tmp_path / "base"), name).save_pretrained(tmp_path / "sft")
    first = load_tokenizer(str(tmp_path / "sft"))
    first.save_pretrained(tmp_path / "reward")
    again = load_tokenizer(str(tmp_path / "reward"), fixed=True)
    same = load_tokenizer(str(tmp_path / "reward"), name, fixed=True)
    own = load_tokenizer(str(tmp_path / "reward"), "tokenizer", fixed=True)
    expected = (OTHERS if name == "tokenizer" else chat_template.jinja(name, adds_bos=False))
    assert {t.chat_template for t in (first, again, same, own)} == {expected}
    assert capsys.readouterr().out == ""


def test_another_template_than_the_models_is_told_or_refused(tmp_path, capsys):
    load_tokenizer(saved(tmp_path / "base"), "vicuna").save_pretrained(tmp_path / "sft")
    folder = str(tmp_path / "sft")
    changed = load_tokenizer(folder, "alpaca")
    assert changed.chat_template == chat_template.jinja("alpaca", adds_bos=False)
    assert capsys.readouterr().out == (
        f"--chat_template alpaca: {folder} was trained with vicuna; from here on it is alpaca\n")
    assert refusal(folder, "alpaca", fixed=True) == (
        f"--chat_template alpaca: {folder} was trained with vicuna; remove the flag")


def test_chatml_makes_its_end_of_turn_eos_where_the_tokenizer_has_it(tmp_path, capsys):
    folder = saved(tmp_path, WORDS + " <|im_start|> <|im_end|>", pad_token=None)
    tokenizer = load_tokenizer(folder, "chatml")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 11)
    assert tokenizer.pad_token_id not in (2, 11, None)
    assert capsys.readouterr().out == (
        "--chat_template chatml: <|im_end|> is eos from here on\n"
        "tokenizer: there is no pad beside eos; pad is '<unk>' from here on\n")
    tokenizer.save_pretrained(tmp_path / "sft")
    chat = ChatFormat(load_tokenizer(str(tmp_path / "sft")))
    assert chat.eos_id == chat.response_ids("yes")[-1] == 11


def test_chatml_is_refused_where_its_end_of_turn_would_be_several_ids(tmp_path):
    folder = saved(tmp_path, WORDS + " <|im_start|>")
    assert refusal(folder, "chatml") == (
        f"--chat_template chatml: the tokenizer of {folder} has no <|im_end|>; choose another "
        "template, or a model that has them")


@pytest.mark.parametrize(("template", "line"), [
    ("{% for m in messages %}{{ m.content + ' no' }}{% endfor %}",
     "an assistant turn ends with ' no', not with the single token '</s>'"),
    (OTHERS + "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
     "the template's generation prompt is not the text that precedes a response"),
])
def test_a_template_that_gives_other_ids_in_training_than_in_generation_is_refused(template, line):
    with pytest.raises(UserError) as refused:
        ChatFormat(with_template(template))
    assert str(refused.value) == f"--chat_template tokenizer: {line}; choose human_assistant"


def test_a_dialogue_that_the_tokenizers_own_template_refuses_is_one_line():
    chat = ChatFormat(with_template(
        "{% if messages|length > 2 %}{{ raise_exception('only\\none turn') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"))
    with pytest.raises(UserError) as refused:
        chat.prompt_ids([user("hi"), assistant("yes"), user("no")])
    assert str(refused.value) == (
        "--chat_template tokenizer: the template refuses a dialogue of 3 turns (only one turn); "
        "choose human_assistant")


def test_the_start_up_line_names_the_special_tokens(tmp_path, capsys):
    word_tokenizer(WORDS).save_pretrained(tmp_path)
    load_chat(str(tmp_path), LoadingConfig())
    assert capsys.readouterr().out == (
        "tokenizer: 10 tokens, bos '<s>' = 1, eos '</s>' = 2, pad '<pad>' = 0\n")


# --- actor and critic ----------------------------------------------------------------------------


def test_tokenizers_of_actor_and_critic_must_be_the_same():
    require_same(word_tokenizer(WORDS), word_tokenizer(WORDS))
    for what, other in (
        ("vocabularies", word_tokenizer("Assistant: Human: hi you yes no")),
        ("special tokens", word_tokenizer(WORDS, pad_token="<unk>")),
        ("chat templates", with_template(OTHERS)),
    ):
        actor = word_tokenizer(WORDS)
        actor.name_or_path, other.name_or_path = "out/actor", "out/critic"
        with pytest.raises(UserError) as refused:
            require_same(actor, other)
        assert str(refused.value) == (
            f"--actor_model_name_or_path and --critic_model_name_or_path have different {what} "
            "(out/actor, out/critic); train both from the same model")


# --- properties over random dialogues ------------------------------------------------------------

OURS = list(chat_template.TEMPLATES)
FORMATS = ([f"{kind} {name}" for kind in ("small", "small-space") for name in OURS
            if name != "chatml"] + ["small-im chatml"]
           + [f"smollm2 {name}" for name in (*OURS, "tokenizer")])
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
RESPONSE = SPOKEN.map(str.rstrip)
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@st.composite
def dialogues(draw) -> list[dict[str, str]]:
    """One to three turns of the user, with the assistant's between them."""
    turns = draw(st.integers(1, 3))
    made = [user(draw(SPOKEN))]
    for _ in range(turns - 1):
        made += [assistant(draw(RESPONSE)), user(draw(SPOKEN))]
    return made


@cache
def folder_of(name: str) -> str:
    """A folder with a tokenizer.

    It is small; or with the space that LLaMA's own puts before a text (small-space), or with
    chatml's tokens (small-im); or SmolLM2's.
    """
    if name == "smollm2":
        if not SMOLLM2.is_dir():
            pytest.skip("no output/smollm2-135m; scripts/fetch_smollm2.py makes it")
        return str(SMOLLM2)
    tokenizer = small_tokenizer()
    if name == "small-space":
        tokenizer = type(tokenizer)(
            vocab=tokenizer.get_vocab(), merges=generate_merges(tokenizer.get_vocab(), None),
            add_bos_token=True, add_prefix_space=True, pad_token="<pad>")
        assert tokenizer.tokenize("a") == ["▁a"]
    if name == "small-im":
        tokens = [AddedToken(text, special=True) for text in chat_template.CHATML_TOKENS]
        tokenizer.add_tokens(tokens)
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def chat_format(name: str) -> ChatFormat:
    tokenizer, template = name.split()
    folder = folder_of(tokenizer)
    return ChatFormat(load_tokenizer(folder, template))


def property_of_every_format(test):
    """Run a property with each tokenizer and template."""
    randomly = settings(max_examples=25, deadline=None, derandomize=True)(test)
    return pytest.mark.parametrize("name", FORMATS)(randomly)


def has_special(chat: ChatFormat, *texts: str) -> bool:
    return any(token in text for token in chat.tokenizer.all_special_tokens for text in texts)


@property_of_every_format
@given(messages=dialogues(), response=RESPONSE)
def test_prompt_and_response_ids_are_those_of_any_other_tool(name, messages, response):
    chat = chat_format(name)
    assume(not has_special(chat, response, *(m["content"] for m in messages)))
    tool = partial(chat.tokenizer.apply_chat_template, return_dict=False)
    said = [response, *(m["content"] for m in messages if m["role"] == "assistant")]
    # BPE may merge whitespace across the end of a prompt; prompt and response are encoded apart.
    merges = chat.prompt_text(messages).endswith("\n") and any(text[0].isspace() for text in said)
    prompt, whole = chat.prompt_ids(messages), tool([*messages, assistant(response)])
    assert prompt == tool(messages, add_generation_prompt=True) or merges
    ids = prompt + chat.response_ids(response)
    ending = "\n" if name == "smollm2 tokenizer" else ""  # after the eos of each turn
    assert chat.tokenizer.decode(whole) == chat.tokenizer.decode(ids) + ending
    assert ids == whole[: len(ids)] or merges


@property_of_every_format
@given(instruction=SPOKEN, extra=SPOKEN, response=RESPONSE)
def test_an_alpaca_turn_with_an_input_has_the_ids_of_any_other_tool(
    name, instruction, extra, response
):
    chat = chat_format(name)
    assume(not has_special(chat, response, instruction, extra, instruction + extra))
    turn = {**user(f"{instruction}\n\n{extra}"), "instruction": instruction, "input": extra}
    whole = chat.tokenizer.apply_chat_template(
        [turn, assistant(response)], return_dict=False)
    ids = chat.prompt_ids([turn]) + chat.response_ids(response)
    if response[0].isspace() and chat.prompt_text([turn]).endswith("\n"):
        assert chat.tokenizer.decode(whole).startswith(chat.tokenizer.decode(ids))
        return
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) <= (name == "smollm2 tokenizer")


@property_of_every_format
@given(messages=dialogues(), response=RESPONSE)
def test_labels_cover_exactly_the_responses_and_their_eos(name, messages, response):
    chat = chat_format(name)
    (row,) = encode_sft([Sample(tuple(messages), response)], chat, WIDE)
    said = [m["content"] for m in messages if m["role"] == "assistant"] + [response]
    trained = [chat.response_ids(text) for text in said]
    expected = [ids for ids in trained if len(ids) > 1 or ids is trained[-1]]
    assert [i for i in row["labels"] if i != -100] == sum(expected, [])
    assert sum(label == chat.eos_id for label in row["labels"]) == len(expected)
    for label, token in zip(row["labels"], row["input_ids"], strict=True):
        assert label in (-100, token)


@property_of_every_format
@given(response=RESPONSE)
def test_response_ids_decode_to_the_text_with_the_whitespace_at_its_start(name, response):
    chat = chat_format(name)
    assume(not has_special(chat, response))
    assert chat.decode(chat.response_ids(response)) == response.rstrip()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(response=st.text(ANY_CHARACTER, max_size=30))
def test_every_character_survives_a_tokenizer_that_has_every_byte(response):
    chat = chat_format("small human_assistant")
    assume(not has_special(chat, response))
    assert chat.decode(chat.response_ids(response)) == response.rstrip()


@property_of_every_format
@given(response=st.lists(st.one_of(SPOKEN, st.sampled_from(SPECIAL)), max_size=8).map("".join))
def test_eos_is_one_id_at_the_end_and_no_other_special_id_is_in_a_response(name, response):
    chat = chat_format(name)
    *before, last = chat.response_ids(response)
    assert last == chat.eos_id
    assert not set(before) & set(chat.tokenizer.all_special_ids)


@property_of_every_format
@given(text=st.lists(st.one_of(SPOKEN, st.sampled_from(SPECIAL)), max_size=8).map("".join))
def test_no_text_adds_a_special_id_to_a_prompt(name, text):
    chat = chat_format(name)
    special = set(chat.tokenizer.all_special_ids)

    def count(content: str) -> int:
        return sum(i in special for i in chat.prompt_ids([user(content)]))

    assert count(text) == count("Hi")


@property_of_every_format
@given(messages=dialogues(), chosen=SPOKEN, rejected=SPOKEN)
def test_all_steps_read_the_same_ids(name, messages, chosen, rejected):
    chat = chat_format(name)
    sample = Sample(tuple(messages), chosen, rejected)
    (prompt,) = encode_prompts([sample], chat, WIDE)
    (sft,) = encode_sft([sample], chat, WIDE)
    (pair,) = encode_pairs([sample], chat, WIDE)
    ids = chat.prompt_ids(messages)
    assert prompt["prompt_ids"] == ids
    assert pair["chosen_ids"] == sft["input_ids"] == ids + chat.response_ids(chosen)
    assert pair["rejected_ids"] == ids + chat.response_ids(rejected)
