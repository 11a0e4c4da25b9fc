"""From dialogues to ids: one prompt, one reply, one ending, the same in all three steps.

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

import pytest
from conftest import small_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_model import word_tokenizer
from tokenizers import AddedToken

from alpaca_rlhf.demo import tiny_llama
from alpaca_rlhf.utils.data import chat_template, prepare
from alpaca_rlhf.utils.data.prepare import Lengths
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, describe, load_tokenizer, require_same
from alpaca_rlhf.utils.errors import UserError

SMOLLM2 = Path(__file__).resolve().parents[1] / "output" / "smollm2-135m"
WIDE = Lengths(10**6, 10**6, "truncate", "--max_seq_len 2000000")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def encode_reply(sample: Sample, form: ChatFormat, lengths: Lengths = WIDE, **options) -> dict:
    return prepare.encode_replies([sample], form, lengths, **options)[0]


def encode_pair(sample: Sample, form: ChatFormat) -> dict:
    return prepare.encode_pairs([sample], form, WIDE)[0]


def encode_prompt(sample: Sample, form: ChatFormat) -> dict:
    return prepare.encode_prompts([sample], form, WIDE)[0]


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
    row = encode_reply(sample, word_format())
    assert row["input_ids"] == [1, 4, 6, 7, 5, 8, 9, 2]
    assert row["labels"] == [-100, -100, -100, -100, -100, 8, 9, 2]


TWO_TURNS = Sample((user("hi"), assistant("yes"), user("you")), "no")
#              <s> Human: hi Assistant: yes </s> Human: you Assistant: no </s>
TWO_TURN_IDS = [1, 4, 6, 5, 8, 2, 4, 7, 5, 9, 2]


def test_step_1_trains_every_reply_and_its_eos_and_nothing_else():
    row = encode_reply(TWO_TURNS, word_format())
    assert row["input_ids"] == TWO_TURN_IDS
    assert row["labels"] == [-100, -100, -100, -100, 8, 2, -100, -100, -100, 9, 2]


def test_step_1_trains_the_last_reply_alone_when_told_so():
    row = encode_reply(TWO_TURNS, word_format(), train_on="last")
    assert row["input_ids"] == TWO_TURN_IDS
    assert row["labels"] == [-100] * 9 + [9, 2]


def test_a_reply_that_is_trained_in_a_row_of_its_own_is_not_trained_as_history():
    once = dataclasses.replace(TWO_TURNS, history_is_trained=False)
    assert encode_reply(once, word_format())["labels"] == [-100] * 9 + [9, 2]


def test_an_earlier_reply_without_a_word_is_not_trained():
    silent = Sample((user("hi"), assistant(""), user("you")), "no")
    row = encode_reply(silent, word_format())
    assert row["input_ids"] == [1, 4, 6, 5, 2, 4, 7, 5, 9, 2]
    assert row["labels"] == [-100] * 8 + [9, 2]


def test_labels_are_cut_with_the_prompt():
    row = encode_reply(TWO_TURNS, word_format(), Lengths.of_sequence(8, "truncate"))
    assert row["input_ids"] == TWO_TURN_IDS[-8:]
    assert row["labels"] == [-100, 8, 2, -100, -100, -100, 9, 2]


def test_two_replies_in_a_row_are_both_trained():
    twice = Sample((user("hi"), assistant("yes"), assistant("no"), user("you")), "no")
    row = encode_reply(twice, word_format())
    assert row["input_ids"] == [1, 4, 6, 5, 8, 2, 5, 9, 2, 4, 7, 5, 9, 2]
    assert row["labels"] == [-100] * 4 + [8, 2, -100, 9, 2, -100, -100, -100, 9, 2]


def test_train_on_prompt_trains_every_token():
    row = encode_reply(TWO_TURNS, word_format(), train_on_prompt=True)
    assert row["labels"] == row["input_ids"] == TWO_TURN_IDS


def test_step_2_pairs_share_the_prompt():
    row = encode_pair(Sample((user("hi"),), "yes", "no no"), word_format())
    assert row["chosen_ids"] == [1, 4, 6, 5, 8, 2]
    assert row["rejected_ids"] == [1, 4, 6, 5, 9, 9, 2]


def test_step_3_keeps_the_messages_for_people():
    row = encode_prompt(Sample((user("hi ü"),), "yes"), word_format())
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
    """A tokenizer as others make them, without a template."""
    tokenizer = word_tokenizer(words, **special)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
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
        "choose one of human_assistant, alpaca, alpaca_short, vicuna, llama2, chatml")


OTHERS = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def test_without_a_flag_a_tokenizer_of_others_gets_human_assistant(tmp_path):
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = OTHERS
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == chat_template.jinja("human_assistant", adds_bos=False)


@pytest.mark.parametrize("name", ["human_assistant", "alpaca", "vicuna", "llama2", "tokenizer"])
def test_a_template_is_handed_on_by_the_model(tmp_path, name, capsys):
    base = word_tokenizer(WORDS)
    base.chat_template = OTHERS
    base.save_pretrained(tmp_path / "base")
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
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder, "alpaca", fixed=True)
    assert str(refused.value) == (
        f"--chat_template alpaca: {folder} was trained with vicuna; remove the flag")


def test_chatml_makes_its_end_of_turn_eos_where_the_tokenizer_has_it(tmp_path, capsys):
    folder = saved(tmp_path, WORDS + " <|im_start|> <|im_end|>", pad_token=None)
    tokenizer = load_tokenizer(folder, "chatml")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 11)
    assert tokenizer.pad_token_id not in (2, 11, None)
    assert capsys.readouterr().out == "--chat_template chatml: <|im_end|> is eos from here on\n"
    tokenizer.save_pretrained(tmp_path / "sft")
    form = ChatFormat(load_tokenizer(str(tmp_path / "sft")))
    assert form.eos_id == form.response_ids("yes")[-1] == 11


def test_chatml_is_refused_where_its_end_of_turn_would_be_several_ids(tmp_path):
    folder = saved(tmp_path, WORDS + " <|im_start|>")
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder, "chatml")
    assert str(refused.value) == (
        f"--chat_template chatml: the tokenizer of {folder} has no <|im_end|>; choose another "
        "template, or a model that has them")


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
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@st.composite
def dialogues(draw) -> list[dict[str, str]]:
    """One to three turns of the user, with the assistant's between them."""
    turns = draw(st.integers(1, 3))
    made = [user(draw(SPOKEN))]
    for _ in range(turns - 1):
        made += [assistant(draw(SPOKEN).strip()), user(draw(SPOKEN))]
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
            vocab=tokenizer.get_vocab(), merges=tiny_llama._merges(tokenizer.get_vocab()),
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


def has_special(form: ChatFormat, *texts: str) -> bool:
    return any(token in text for token in form.tokenizer.all_special_tokens for text in texts)


@property_of_every_format
@given(messages=dialogues(), reply=SPOKEN)
def test_prompt_and_response_ids_are_those_of_any_other_tool(name, messages, reply):
    form = chat_format(name)
    assume(not has_special(form, reply, *(m["content"] for m in messages)))
    tool = partial(form.tokenizer.apply_chat_template, return_dict=False)
    assert form.prompt_ids(messages) == tool(messages, add_generation_prompt=True)
    whole = tool([*messages, assistant(reply.strip())])
    ids = form.prompt_ids(messages) + form.response_ids(reply)
    if name == "smollm2 tokenizer":  # which ends each turn with eos and a line break
        assert form.tokenizer.decode(whole[len(ids) :]) == "\n"
        whole = whole[: len(ids)]
    assert ids == whole


@property_of_every_format
@given(instruction=SPOKEN, extra=SPOKEN, reply=SPOKEN)
def test_an_alpaca_turn_with_an_input_has_the_ids_of_any_other_tool(
    name, instruction, extra, reply
):
    form = chat_format(name)
    assume(not has_special(form, reply, instruction, extra, instruction + extra))
    turn = {**user(f"{instruction}\n\n{extra}"), "instruction": instruction, "input": extra}
    whole = form.tokenizer.apply_chat_template(
        [turn, assistant(reply.strip())], return_dict=False)
    ids = form.prompt_ids([turn]) + form.response_ids(reply)
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) <= (name == "smollm2 tokenizer")


@property_of_every_format
@given(messages=dialogues(), reply=SPOKEN)
def test_labels_cover_exactly_the_replies_and_their_eos(name, messages, reply):
    form = chat_format(name)
    row = encode_reply(Sample(tuple(messages), reply.strip()), form)
    said = [m["content"] for m in messages if m["role"] == "assistant"] + [reply]
    trained = [form.response_ids(text) for text in said]
    expected = [ids for ids in trained if len(ids) > 1 or ids is trained[-1]]
    assert [i for i in row["labels"] if i != -100] == sum(expected, [])
    assert sum(label == form.eos_id for label in row["labels"]) == len(expected)
    for label, token in zip(row["labels"], row["input_ids"], strict=True):
        assert label in (-100, token)


@property_of_every_format
@given(reply=SPOKEN)
def test_response_ids_decode_to_the_stripped_text(name, reply):
    form = chat_format(name)
    assume(not has_special(form, reply))
    assert form.decode(form.response_ids(reply)) == reply.strip()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(reply=st.text(ANY_CHARACTER, max_size=30))
def test_every_character_survives_a_tokenizer_that_has_every_byte(reply):
    form = chat_format("small human_assistant")
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
    prompt = encode_prompt(sample, form)["prompt_ids"]
    reply = encode_reply(sample, form)
    pair = encode_pair(sample, form)
    assert prompt == form.prompt_ids(messages)
    assert pair["chosen_ids"] == reply["input_ids"] == prompt + form.response_ids(chosen)
    assert pair["rejected_ids"] == prompt + form.response_ids(rejected)
