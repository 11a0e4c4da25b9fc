"""Rows of any known form become samples; what cannot be used is counted, what is broken named."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import load

from alpaca_rlhf.utils.data import formats
from alpaca_rlhf.utils.data.formats import ADAPTORS
from alpaca_rlhf.utils.data.samples import Sample, parse_dialogue
from alpaca_rlhf.utils.data.sources import open_sources
from alpaca_rlhf.utils.errors import UserError

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}."}
         for i in range(3)]
SAMPLES = [
    Sample(({"role": "user", "content": f"Question {i}?"},), f"Good {i}.", f"Bad {i}.")
    for i in range(3)
]


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> str:
    """Write a file, compressed when its name says so."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def refusal(*data_paths: str) -> str:
    with pytest.raises(UserError) as refused:
        load(list(data_paths))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- kinds of files ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [
    ("list.json", json.dumps(PAIRS)),
    ("list.json", "\n " + json.dumps(PAIRS, indent=2)),
    ("lines.json", lines(PAIRS)),
    ("lines.jsonl", lines(PAIRS)),
    ("blank.jsonl", "\n" + lines(PAIRS).replace("\n", "\n\n \n")),
    ("windows.jsonl", lines(PAIRS).replace("\n", "\r\n")),
    ("last.jsonl", lines(PAIRS).rstrip("\n")),
    ("lines.jsonl.gz", lines(PAIRS)),
    ("list.json.gz", json.dumps(PAIRS)),
    ("a.name.with.dots.jsonl.gz", lines(PAIRS)),
])
def test_a_json_file_is_read(tmp_path, name, text):
    assert load([write(tmp_path / name, text)]).train == SAMPLES


def test_a_parquet_file_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    assert load([str(path)]).train == SAMPLES


def test_a_parquet_file_may_hold_messages(tmp_path):
    path = tmp_path / "rows.parquet"
    row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Yes.", "rejected": "No."}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert load([str(path)]).train == [Sample(({"role": "user", "content": "Hi"},), "Yes.", "No.")]


@pytest.mark.parametrize("held_out", ["eval", "test", "validation"])
def test_a_folder_has_its_own_held_out_part(tmp_path, held_out):
    write(tmp_path / "train.jsonl", lines(PAIRS[:2]))
    write(tmp_path / f"{held_out}.json.gz", json.dumps(PAIRS[2:]))
    write(tmp_path / "README.md", "not data")
    data = load([str(tmp_path)])
    assert (data.train, data.held_out) == (SAMPLES[:2], SAMPLES[2:])


def test_local_jsonfile_is_the_folder_data_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "data" / "train.json", json.dumps(PAIRS[:2]))
    write(tmp_path / "data" / "eval.json", lines(PAIRS[2:]))
    monkeypatch.chdir(tmp_path)
    data = load(["local/jsonfile"])
    assert (data.train, data.held_out) == (SAMPLES[:2], SAMPLES[2:])


def test_a_name_before_the_path_chooses_the_adaptor(tmp_path):
    row = {"prompt": "not looked at", "chosen": "\n\nHuman: Hi\n\nAssistant: Yes.",
           "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    path = write(tmp_path / "rows.jsonl", lines([row]))
    assert load([f"Anthropic/hh-rlhf={path}"]).train == [
        Sample(({"role": "user", "content": "Hi"},), "Yes.", "No.")]


def test_a_path_may_hold_an_equals_sign(tmp_path):
    path = write(tmp_path / "lr=1" / "rows.jsonl", lines(PAIRS))
    assert load([path]).train == SAMPLES


def test_a_fingerprint_follows_the_bytes_and_nothing_else(tmp_path):
    def fingerprint(path):
        (source,) = open_sources([str(path)])
        return source.rows.fingerprint()

    path = Path(write(tmp_path / "train.jsonl", lines(PAIRS)))
    first, folder = fingerprint(path), fingerprint(tmp_path)
    os.utime(path, (0, 0))
    assert (fingerprint(path), fingerprint(tmp_path)) == (first, folder)
    write(path, lines(PAIRS).replace("Good 1", "Nice 1"))
    assert len({first, fingerprint(path)}) == 2
    changed = fingerprint(tmp_path)
    write(tmp_path / "README.md", "not data")
    assert fingerprint(tmp_path) == changed != folder
    write(tmp_path / "test.jsonl", lines(PAIRS))
    assert fingerprint(tmp_path) not in (changed, folder)
    write(path, '{"broken": ')  # is not parsed
    fingerprint(path)


def test_several_data_sets_are_joined_in_order(tmp_path):
    first = write(tmp_path / "a.jsonl", lines(PAIRS[1:]))
    second = write(tmp_path / "b.json", json.dumps(PAIRS[:1]))
    assert load([first, second]).train == [*SAMPLES[1:], SAMPLES[0]]


def test_without_a_path_the_embedded_data_is_taken_and_announced(capsys):
    data = load([])
    assert capsys.readouterr().out == "--data_path is not given: using the embedded data set\n"
    assert len(data.held_out) == 400
    assert len(data.train) > 6000
    assert data.counted_out == {}


# --- forms of rows -------------------------------------------------------------------------------


def only_sample(tmp_path: Path, **row) -> Sample:
    (sample,) = load([write(tmp_path / "rows.jsonl", lines([row]))]).train
    return sample


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("prompt", [
    "Hi\n\nthere", "  Hi\n\nthere \n", "Human: Hi\n\nthere", "\n\nHuman: Hi\n\nthere\n\nAssistant:",
    "Human:Hi\n\nthere\n\nAssistant: ", [{"role": "user", "content": " Hi\n\nthere "}]])
def test_a_prompt_of_one_turn(tmp_path, prompt):
    sample = only_sample(tmp_path, prompt=prompt, chosen=" Yes. ", rejected="No.\n")
    assert sample == Sample((user("Hi\n\nthere"),), "Yes.", "No.")


@pytest.mark.parametrize("prompt", [
    "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: More\n\nAssistant:",
    [user("Hi"), assistant("Hello."), user("More")],
])
def test_a_prompt_of_two_turns(tmp_path, prompt):
    sample = only_sample(tmp_path, prompt=prompt, chosen="Yes.", rejected="No.")
    assert sample.messages == (user("Hi"), assistant("Hello."), user("More"))


def test_a_prompt_that_names_a_human_later_is_one_turn(tmp_path):
    text = "Finish this:\n\nHuman: Hi\n\nAssistant:"
    sample = only_sample(tmp_path, prompt=text, chosen="Yes.", rejected="No.")
    assert sample.messages == (user(text),)


def test_replies_may_be_messages(tmp_path):
    sample = only_sample(
        tmp_path, prompt="Hi", chosen=[user("Hi"), assistant("Yes.")], rejected=[assistant("No.")])
    assert (sample.chosen, sample.rejected) == ("Yes.", "No.")


def test_other_columns_are_let_be(tmp_path):
    sample = only_sample(tmp_path, id=3, prompt="Hi", chosen="Yes.", rejected="No.", score=None)
    assert sample == Sample((user("Hi"),), "Yes.", "No.")


def test_a_dialogue_is_read_turn_by_turn():
    assert parse_dialogue("\n\nHuman: A\nb\n\nAssistant: C: d\n\n\n\nHuman:  \n\nAssistant:") == [
        user("A\nb"), assistant("C: d"), user(""), assistant("")]


def test_hh_rlhf_pairs_part_at_the_last_reply(tmp_path):
    shared = "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nAssistant:"
    sample = only_sample(tmp_path, chosen=shared + " Good.", rejected=shared + " Bad.")
    assert sample == Sample((user("One"), assistant("Two"), user("Three")), "Good.", "Bad.")


@pytest.mark.parametrize(("preference", "chosen", "rejected"), [
    (1, "First.", "Second."), (2, "Second.", "First."), (2.0, "Second.", "First.")])
def test_alpaca_eval_names_the_better_output(tmp_path, preference, chosen, rejected):
    sample = only_sample(
        tmp_path, instruction="Hi", output_1="First.", output_2="Second.", preference=preference)
    assert sample == Sample((user("Hi"),), chosen, rejected)


def test_equal_prompts_have_equal_keys_and_others_do_not():
    first = Sample((user("ü"),), "a", "b")
    assert first.prompt_key() == Sample((user("ü"),), "c", None).prompt_key()
    assert first.prompt_key() != Sample((assistant("ü"),), "a", "b").prompt_key()


# --- what is counted out -------------------------------------------------------------------------


def counted(tmp_path: Path, name: str, rows: list) -> dict[str, int]:
    return dict(load([write(tmp_path / name, lines(rows))]).counted_out)


GOOD = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize(("change", "reason"), [
    ({"prompt": " \n"}, "empty prompt"),
    ({"prompt": None}, "prompt is neither text nor messages"),
    ({"prompt": ["Hi"]}, "prompt is neither text nor messages"),
    ({"prompt": [{"role": "user"}]}, "prompt is neither text nor messages"),
    ({"prompt": [{"role": "tool", "content": "x"}, user("Hi")]},
     "role is not system, user or assistant"),
    ({"prompt": []}, "dialogue does not end with a user's turn"),
    ({"prompt": [user("Hi"), assistant("Yes")]}, "dialogue does not end with a user's turn"),
    ({"prompt": "Human: Hi\n\nAssistant: Yes"}, "dialogue does not end with a user's turn"),
    ({"prompt": "Human:\n\nAssistant:"}, "dialogue does not end with a user's turn"),
    ({"chosen": ""}, "empty chosen"),
    ({"rejected": " "}, "empty rejected"),
    ({"chosen": 3}, "chosen is not text"),
    ({"rejected": None}, "rejected is not text"),
    ({"rejected": []}, "rejected is not text"),
    ({"chosen": [{"role": "assistant"}]}, "chosen is not text"),
    ({"rejected": "Yes. "}, "chosen equals rejected"),
    ({"prompt": "broken \ud83d emoji"}, "text is not valid Unicode"),
    ({"rejected": "broken \ud83d emoji"}, "text is not valid Unicode"),
])
def test_a_pair_that_cannot_be_used_is_counted(tmp_path, change, reason):
    assert counted(tmp_path, "rows.jsonl", [GOOD, {**GOOD, **change}]) == {reason: 1}


def test_a_row_that_lacks_a_column_the_others_have_is_counted(tmp_path):
    assert counted(tmp_path, "rows.jsonl", [GOOD, {"prompt": "Hi", "chosen": "Yes."}]) == {
        "rejected is not text": 1}


TALK = "\n\nHuman: One\n\nAssistant: Two\n\nHuman: Three\n\nAssistant:"


@pytest.mark.parametrize(("chosen", "rejected", "reason"), [
    (TALK + " a", TALK.replace("Two", "2") + " b", "pair parts before the last reply"),
    (TALK + " a", TALK + " b\n\nHuman: More\n\nAssistant: c", "pair parts before the last reply"),
    (TALK + " a", TALK + " a", "chosen equals rejected"),
    (TALK + " a", TALK, "empty rejected"),
    (TALK, TALK + " b", "empty chosen"),
    (TALK + " a\n\nHuman: End", TALK + " a\n\nHuman: Stop",
     "dialogue does not end with Assistant:"),
    ("\n\nAssistant: a", "\n\nAssistant: b", "dialogue does not begin with Human:"),
    ("Yes", "No", "dialogue does not begin with Human:"),
    (TALK + " a", None, "chosen or rejected is not text"),
])
def test_an_hh_rlhf_pair_that_cannot_be_used_is_counted(tmp_path, chosen, rejected, reason):
    rows = [{"chosen": TALK + " Yes.", "rejected": TALK + " No."},
            {"chosen": chosen, "rejected": rejected}]
    assert counted(tmp_path, "rows.jsonl", rows) == {reason: 1}


def test_alpaca_eval_counts_ties_and_what_is_no_preference(tmp_path):
    row = {"instruction": "Hi", "output_1": "First.", "output_2": "Second.", "preference": 1}
    rows = [{**row, "preference": preference} for preference in (1, 2, 0, 0, 3, None, "1", [1])]
    assert counted(tmp_path, "rows.json", rows) == {
        "tie": 2, "preference is not 0, 1 or 2": 4}


# --- what is refused -----------------------------------------------------------------------------


def test_unknown_columns_list_what_is_there_and_what_is_known(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([{"question": "a", "answer": "b"}]))
    line = refusal(path)
    assert line.startswith(
        f"--data_path {path}: the columns question, answer fit no known form; known are "
        "prompt+chosen+rejected; question+chosen+rejected; chosen+rejected; history+human_ref_A+")
    assert line.endswith("; question+sentence")


def test_a_missing_column_of_a_named_form(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([{"prompt": "a", "chosen": "b"}]))
    assert refusal(f"local/jsonfile={path}") == (
        f"--data_path local/jsonfile={path}: no column rejected; "
        "the columns found are prompt, chosen")


BROKEN = lines(PAIRS * 5) + "{}\n" + '{"prompt": "Hi", "chosen": "Yes."\n' + lines(PAIRS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_a_broken_line_17_is_named(tmp_path, name):
    path = write(tmp_path / name, BROKEN)
    assert refusal(path) == (
        f"{path}, line 17: not JSON (Expecting ',' delimiter); mend or remove the line")


def test_blank_lines_count_as_lines(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines(PAIRS) + "\n" * 13 + "{broken\n")
    assert refusal(path).startswith(f"{path}, line 17: not JSON (")


def test_a_broken_list_names_its_line(tmp_path):
    path = write(tmp_path / "rows.json", f'[\n{json.dumps(PAIRS[0])},\n{{"prompt" "Hi"}}\n]')
    assert refusal(path) == (
        f"{path}, line 3: not JSON (Expecting ':' delimiter); mend or remove the line")


def test_an_html_page_named_json_is_refused(tmp_path):
    path = write(tmp_path / "rows.json", "<!DOCTYPE html>\n<html></html>\n")
    assert refusal(path) == (
        f"{path}, line 1: not JSON but a web page; download the file itself")


@pytest.mark.parametrize(("text", "reason"), [
    ("[ROW", "line 1: not JSON (Expecting ',' delimiter)"),
    ("[ROW,\n", "line 2: not JSON (Expecting value)"),
    ("\n[ROW,\n]", "line 3: not JSON (Expecting value)"),
    ("[ROW]\n{}", "line 1: not JSON (something follows the list)"),
])
def test_a_list_that_does_not_end_well_names_its_line(tmp_path, text, reason):
    path = write(tmp_path / "rows.json", text.replace("ROW", json.dumps(PAIRS[0])))
    assert refusal(path) == f"{path}, {reason}; mend or remove the line"


def test_an_entry_that_is_no_object_is_named(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps([*PAIRS, "text"]))
    assert refusal(path) == (
        f"{path}, entry 4: not an object with named columns; mend or remove it")


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([*PAIRS, ["a", "b"]]))
    assert refusal(path) == (
        f"{path}, line 4: not an object with named columns; mend or remove the line")


@pytest.mark.parametrize("line", ["9" * 5000, "[" * 100_000])
def test_json_that_python_will_not_read_is_refused(tmp_path, line):
    path = write(tmp_path / "rows.jsonl", lines(PAIRS) + '{"prompt": ' + line + "\n")
    assert refusal(path).startswith(f"{path}, line 4: not JSON (")


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = write(tmp_path / "rows.json", text)
    assert refusal(path) == f"--data_path {path}: the file is empty; give one with rows"


def test_invalid_utf8_names_the_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines(PAIRS[:1]).encode() + b'{"prompt": "\xff"}\n')
    assert refusal(path) == f"{path}, line 2: not UTF-8; convert the file"


def test_a_truncated_gz_is_refused(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl.gz", lines(PAIRS * 100)))
    path.write_bytes(path.read_bytes()[:-20])
    line = refusal(str(path))
    assert line.startswith(f"{path}, after line ")
    assert line.endswith(": cannot be read (Compressed file ended before the end-of-stream marker "
                         "was reached); write it again")


def test_a_corrupt_gz_is_refused(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl.gz", os.urandom(4000).hex()))
    data = bytearray(path.read_bytes())
    data[100:200] = bytes(100)
    path.write_bytes(data)
    assert refusal(str(path)).startswith(f"{path}: cannot be read (")


def test_a_gz_that_is_not_compressed_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_text(lines(PAIRS))
    assert refusal(str(path)) == (
        f"{path}: cannot be read (Not a gzipped file (b'{{\"')); write it again")


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    path = write(tmp_path / "rows.parquet", lines(PAIRS))
    assert refusal(path) == f"{path}: not a parquet file; write it again"


def test_another_kind_of_file_is_refused(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt,chosen\n")
    assert refusal(path) == (
        f"{path}: unknown kind of file; known are .json, .jsonl (.gz), .parquet")


def test_a_path_that_is_not_there_is_refused(tmp_path):
    line = refusal(f"{tmp_path}/rows.jsonl")
    assert line.startswith(
        f"--data_path {tmp_path}/rows.jsonl: no such file or folder, and no data set of that name "
        "is known; known are Dahoas/synthetic-instruct-gptj-pairwise, ")
    assert line.endswith(", owner/name of the hub, and local .json, .jsonl and .parquet files")


def test_a_relative_path_that_is_not_there_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("data/rows.jsonl").startswith("--data_path data/rows.jsonl: no such file")


def test_a_name_that_no_adaptor_has_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines(PAIRS))
    assert refusal(f"some/set={path}").startswith(
        f"--data_path some/set={path}: no adaptor some/set; known are ")


def test_a_folder_without_a_train_file_is_refused(tmp_path):
    write(tmp_path / "eval.json", json.dumps(PAIRS))
    assert refusal(str(tmp_path)) == (
        f"--data_path {tmp_path}: the folder {tmp_path} has no train.json, train.jsonl or "
        "train.parquet; add one, or give the file itself")


def test_local_jsonfile_without_a_folder_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("local/jsonfile") == (
        f"--data_path local/jsonfile: there is no folder {tmp_path}/data; put train.json and "
        "eval.json there, or give the path of a file")


@pytest.mark.parametrize("name", ["Anthropic/hh-rlhf", "someone/pairs"])
def test_a_hub_set_out_of_reach_names_the_remedy(monkeypatch, name):
    import datasets

    def unreachable(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert refusal(name) == (
        f"--data_path {name}: the hub did not give it (ConnectionError); download it "
        f"and give {name}=PATH")


def test_a_hub_set_made_by_a_script_is_read_from_its_parquet_form(monkeypatch):
    import datasets

    def scripted(name, revision=None):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found mkqa.py")
        return {"train": [{"queries": {"ja": "問", "zh_cn": None},
                           "answers": {"ja": [{"text": "答"}], "zh_cn": []}}]}

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    assert load(["mkqa"]).train == [Sample((user("問"),), "答")]


def test_a_hub_set_with_splits_for_preferences_gives_those_alone(monkeypatch):
    import datasets

    def rows(name):
        return [{"prompt": name, "chosen": "Yes.", "rejected": "No."}]

    splits = ("train_sft", "train_prefs", "test_prefs", "test_gen")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {s: rows(s) for s in splits})
    data = load(["HuggingFaceH4/ultrafeedback_binarized"])
    assert [one.messages[0]["content"] for one in data.train] == ["train_prefs"]
    assert [one.messages[0]["content"] for one in data.held_out] == ["test_prefs"]


def test_a_hub_set_keeps_its_own_split(monkeypatch):
    import datasets

    def rows(question):
        return [{"chosen": f"\n\nHuman: {question}\n\nAssistant: Yes.",
                 "rejected": f"\n\nHuman: {question}\n\nAssistant: No."}]

    found = {"train": rows("A"), "test": rows("B")}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: found)
    data = load(["Anthropic/hh-rlhf"])
    assert [sample.messages[0]["content"] for sample in data.train] == ["A"]
    assert [sample.messages[0]["content"] for sample in data.held_out] == ["B"]


def test_a_file_without_a_usable_row_lists_the_reasons(tmp_path):
    rows = [{**GOOD, "chosen": ""}, {**GOOD, "chosen": ""}, {**GOOD, "prompt": " "}]
    path = write(tmp_path / "rows.jsonl", lines(rows))
    assert refusal(path) == (
        f"--data_path {path}: no usable row (2 empty chosen; 1 empty prompt); give other data")


def test_the_reasons_are_those_of_the_file_itself(tmp_path):
    first = write(tmp_path / "first.jsonl", lines([GOOD, {**GOOD, "chosen": ""}]))
    second = write(tmp_path / "second.jsonl", lines([{**GOOD, "prompt": " "}]))
    assert refusal(first, second) == (
        f"--data_path {second}: no usable row (1 empty prompt); give other data")


# --- any row at all ------------------------------------------------------------------------------

TEXT = st.one_of(
    st.text(max_size=10),
    st.lists(st.sampled_from(["\n\n", "Human:", "Assistant:", " ", "a", "b"]), max_size=8)
    .map("".join),
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool"])
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLE | st.none(), "content": TEXT | st.none()})
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
VALUE = TEXT | st.lists(MESSAGE, max_size=3) | ANYTHING | st.integers(0, 3)


@pytest.mark.parametrize(
    "adaptor", ADAPTORS, ids=lambda adaptor: f"{adaptor.names[0]} {adaptor.columns[0]}")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_row_becomes_a_sample_or_is_counted(adaptor, data):
    row = data.draw(st.fixed_dictionaries({column: VALUE for column in adaptor.columns}))
    unused = Counter()
    samples = list(adaptor.read([row], unused))
    assert not any("\n" in reason for reason in unused)
    for sample in samples:
        assert sample.messages[-1]["role"] == "user"
        assert {message["role"] for message in sample.messages} <= {"system", "user", "assistant"}
        for text in (sample.messages[-1]["content"], sample.chosen, sample.rejected):
            assert text is None or text == text.strip() != ""
        sample.prompt_key().encode()
        assert sample.chosen != sample.rejected


NODE = st.recursive(
    st.fixed_dictionaries({}, optional={"text": TEXT, "role": st.sampled_from(
        ["prompter", "assistant", "x"]), "rank": st.none() | st.integers(0, 3),
        "deleted": st.booleans(), "replies": ANYTHING}),
    lambda inner: st.fixed_dictionaries(
        {"text": TEXT, "role": st.sampled_from(["prompter", "assistant"]),
         "replies": st.lists(inner, max_size=3)}, optional={"rank": st.integers(0, 3)}),
    max_leaves=8)
FLAT = st.fixed_dictionaries({
    "message_id": st.sampled_from(["a", "b", "c", "d", "", None]), "text": TEXT,
    "parent_id": st.sampled_from(["a", "b", "c", "e", "", None, 3]),
    "role": st.sampled_from(["prompter", "assistant"]), "rank": st.none() | st.integers(0, 2)})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees=st.lists(NODE, max_size=3), messages=st.lists(FLAT, max_size=8))
def test_any_tree_and_any_flat_messages_are_read_to_the_end(trees, messages):
    flat, nested = formats.named("OpenAssistant/oasst1")
    for adaptor, rows in ((nested, [{"prompt": tree} for tree in trees]), (flat, messages)):
        for sample in adaptor.read(rows, Counter()):
            roles = [message["role"] for message in sample.messages]
            assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
            assert len(roles) % 2


def test_the_counts_of_several_files_are_added(tmp_path):
    text = lines([GOOD, {**GOOD, "chosen": ""}])
    paths = [write(tmp_path / name, text) for name in ("a.json", "b.json")]
    assert load(paths).counted_out == Counter({"empty chosen": 2})
