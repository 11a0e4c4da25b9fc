"""Places of data: files, folders, the hub; what is broken is refused in one line that names it."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from loading import load

from alpaca_rlhf.utils.data.samples import Sample
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


def write(path: Path, content: str | bytes | list) -> str:
    """Write text, bytes or rows (as lines or parquet), compressed when the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet" and isinstance(content, list):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        return str(path)
    text = lines(content) if isinstance(content, list) else content
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def refusal(*data_paths: str) -> str:
    with pytest.raises(UserError) as refused:
        load(list(data_paths))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [
    ("list.json", json.dumps(PAIRS)),
    ("list.json", "\n " + json.dumps(PAIRS, indent=2)),
    ("list.json", b"\xef\xbb\xbf" + json.dumps(PAIRS, indent=2).encode()),
    ("lines.json", PAIRS),
    ("lines.jsonl", PAIRS),
    ("blank.jsonl", "\n" + lines(PAIRS).replace("\n", "\n\n \n")),
    ("windows.jsonl", "\ufeff" + lines(PAIRS).replace("\n", "\r\n")),
    ("last.jsonl", lines(PAIRS).rstrip("\n")),
    ("lines.jsonl.gz", PAIRS),
    ("list.json.gz", json.dumps(PAIRS)),
    ("a.name.with.dots.jsonl.gz", PAIRS),
    ("rows.parquet", PAIRS),
    ("lr=1/rows.jsonl", PAIRS),
    ("a=b:0.5.jsonl", PAIRS),
])
def test_a_file_is_read_whatever_its_kind_and_name(tmp_path, name, content):
    assert load([write(tmp_path / name, content)]).train == SAMPLES


COLUMNS = {name: [row[name] for row in PAIRS] for name in PAIRS[0]}
BY_NUMBER = {name: {str(i): text for i, text in enumerate(texts)}
             for name, texts in COLUMNS.items()}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "ROWS.JSONL", "rows.ndjson"])
@pytest.mark.parametrize("content", [
    json.dumps(PAIRS), json.dumps(PAIRS, indent=1),
    "\n\n".join(json.dumps(row, indent=4) for row in PAIRS),
    "".join(map(json.dumps, PAIRS)),
    lines(PAIRS[:1]) + "\n".join(json.dumps(row, indent=4) for row in PAIRS[1:]),
    *[json.dumps(value, indent=indent) for indent in (None, 1) for value in (
        {"data": PAIRS}, {"version": "1.0", "tags": ["a", "b", "c"], "rows": PAIRS},
        {"data": {"train": PAIRS}}, {"rows": [{"row_idx": 1, "row": row} for row in PAIRS]},
        COLUMNS, BY_NUMBER, {str(i): row for i, row in enumerate(PAIRS)},
        {"columns": list(COLUMNS), "index": [0, 1, 2], "data": [list(r.values()) for r in PAIRS]},
        {"schema": {"fields": [{"name": "prompt"}]}, "data": PAIRS})],
])
def test_json_is_read_in_any_layout(tmp_path, name, content):
    assert load([write(tmp_path / name, content)]).train == SAMPLES


@pytest.mark.parametrize("row", [
    {"messages": [SAMPLES[0].messages[0], {"role": "assistant", "content": "Good 0."}]},
    {"prompt": [SAMPLES[0].messages[0]], "completion": ["Good 0."]}])
def test_a_file_of_one_row_with_a_list_in_it_is_one_row(tmp_path, row):
    path = write(tmp_path / "row.json", json.dumps(row, indent=1))
    assert load([path]).train == [Sample(SAMPLES[0].messages, "Good 0.")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.JSONL.GZ", "rows.jsonl.bz2",
                                  "rows.json.xz"])
def test_every_encoding_and_compression_is_read_whatever_the_name(
    tmp_path, name, packed, encoding
):
    for content in (json.dumps(PAIRS, indent=1), lines(PAIRS)):
        (tmp_path / name).write_bytes(packed(content.encode(encoding)))
        assert load([str(tmp_path / name)]).train == SAMPLES


def test_suffixes_in_capitals_are_known_in_a_folder_too(tmp_path):
    write(tmp_path / "Train.JSONL", PAIRS[:2])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS[2:]), tmp_path / "TEST.PARQUET")
    data = load([str(tmp_path)])
    assert (data.train, data.held_out) == (SAMPLES[:2], SAMPLES[2:])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.mark.parametrize(("name", "content", "problem"), [
    *[(name, LFS, "a pointer of git LFS, not the data itself; run git lfs pull, or download the "
       "file") for name in ("rows.jsonl", "rows.json", "rows.parquet", "plain.gz.jsonl")],
    ("rows.jsonl", "/annex/objects/SHA256E-s1--0.jsonl\n",
     "a pointer of git-annex, not the data itself; run git annex get"),
    ("rows.jsonl", b"PK\3\4....", "a zip archive; unpack it"),
    ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd....", "compressed with zstd; unpack it (zstd -d)"),
    ("rows.json", json.dumps({"train": PAIRS, "test": PAIRS}), "an object with several lists of "
     "rows (train, test); write each to a file of that name, and give their folder"),
])
def test_a_file_that_is_not_the_data_itself_is_named(tmp_path, name, content, problem):
    path = write(tmp_path / name, content)
    assert refusal(path) == f"{path}: {problem}"


@pytest.mark.parametrize("entry", ["~/a.jsonl", "~/a.jsonl:1", "Dahoas/rm-static=~/a.jsonl"])
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, entry):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", PAIRS)
    assert load([entry]).train == SAMPLES


def test_several_data_sets_are_joined_in_order(tmp_path):
    first, second = write(tmp_path / "a.jsonl", PAIRS[1:]), write(tmp_path / "b.json", PAIRS[:1])
    assert load([first, second]).train == [*SAMPLES[1:], SAMPLES[0]]


BROKEN_17 = lines(PAIRS * 5) + "{}\n" + '{"prompt": "Hi", "chosen": "Yes."\n' + lines(PAIRS)
NO_COMMA = "not JSON (Expecting ',' delimiter); mend or remove the line"
ROW = json.dumps(PAIRS[0])


@pytest.mark.parametrize(("name", "content", "line"), [
    ("rows.jsonl", BROKEN_17, f", line 17: {NO_COMMA}"),
    ("rows.json", BROKEN_17, f", line 17: {NO_COMMA}"),
    ("rows.jsonl.gz", BROKEN_17, f", line 17: {NO_COMMA}"),
    ("rows.jsonl", lines(PAIRS) + "\n" * 13 + "{broken\n",
     ", line 17: not JSON (Expecting property name enclosed in double quotes); mend or remove the "
     "line"),
    ("rows.json", f'[\n{ROW},\n{{"prompt" "Hi"}}\n]',
     ", line 3: not JSON (Expecting ':' delimiter); mend or remove the line"),
    ("rows.json", f"[{ROW}", f", line 1: {NO_COMMA}"),
    ("rows.json", f"[{ROW},\n", ", line 2: not JSON (Expecting value); mend or remove the line"),
    ("rows.json", f"\n[{ROW},\n]", ", line 3: not JSON (Expecting value); mend or remove the line"),
    ("rows.json", f"[{ROW}]\n{{}}",
     ", line 1: not an object with named columns; mend or remove it"),
    ("rows.json", "<!DOCTYPE html>\n<html></html>\n",
     ", line 1: not JSON but a web page; download the file itself"),
    ("rows.json", json.dumps([*PAIRS, "text"]),
     ", entry 4: not an object with named columns; mend or remove it"),
    ("rows.jsonl", [*PAIRS, ["a", "b"]],
     ", line 4: not an object with named columns; mend or remove it"),
    ("rows.jsonl", lines(PAIRS) + '{"prompt": ' + "9" * 5000 + "\n",
     ", line 4: not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has "
     "5000 digits); mend or remove the line"),
    ("rows.jsonl", lines(PAIRS) + '{"prompt": ' + "[" * 100_000 + "\n",
     ", line 4: not JSON (maximum recursion depth exceeded while decoding a JSON array from a "
     "unicode string); mend or remove the line"),
    ("rows.jsonl", lines(PAIRS[:1]).encode() + b'{"prompt": "\xff"}\n',
     ", line 2: not UTF-8; convert the file"),
    ("rows.json", b"[\n" + ROW.encode() + b',\n{"prompt": "\xff"}]',
     ", line 3: not UTF-8; convert the file"),
    ("rows.parquet", lines(PAIRS), ": not a parquet file; write it again"),
    ("rows.csv", "prompt,chosen\n",
     ": unknown kind of file; known are .json, .jsonl, .parquet, also with .gz, .bz2, .xz"),
])
def test_a_broken_file_is_refused_with_its_line(tmp_path, name, content, line):
    path = write(tmp_path / name, content)
    assert refusal(path) == path + line


def test_a_broken_gz_is_refused(tmp_path):
    cut, corrupt, plain = (tmp_path / f"{name}.jsonl.gz" for name in ("cut", "corrupt", "plain"))
    write(cut, PAIRS * 100)
    cut.write_bytes(cut.read_bytes()[:-20])
    line = refusal(str(cut))
    assert line.startswith(f"{cut}, after line ")
    assert line.endswith(": cannot be read (Compressed file ended before the end-of-stream marker "
                         "was reached); write it again")
    write(corrupt, os.urandom(4000).hex())
    data = bytearray(corrupt.read_bytes())
    data[100:200] = bytes(100)
    corrupt.write_bytes(data)
    assert refusal(str(corrupt)).startswith(f"{corrupt}: cannot be read (")
    plain.write_text(lines(PAIRS))
    assert load([str(plain)]).train == SAMPLES


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = write(tmp_path / "rows.json", text)
    assert refusal(path) == f"--data_path {path}: the file is empty; give one with rows"


def test_a_file_without_a_usable_row_lists_its_own_reasons(tmp_path):
    bad = [{**PAIRS[0], "chosen": ""}, {**PAIRS[0], "chosen": ""}, {**PAIRS[0], "prompt": " "}]
    first = write(tmp_path / "first.jsonl", [*PAIRS, {**PAIRS[0], "rejected": ""}])
    second = write(tmp_path / "second.jsonl", bad)
    assert refusal(first, second) == (
        f"--data_path {second}: no usable row (2 empty chosen; 1 empty prompt); give other data")


# --- entries -------------------------------------------------------------------------------------


def test_a_name_before_the_path_chooses_the_format(tmp_path):
    row = {"prompt": "not looked at", "chosen": "\n\nHuman: Hi\n\nAssistant: Yes.",
           "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    path = write(tmp_path / "rows.jsonl", [row])
    assert load([f"Anthropic/hh-rlhf={path}"]).train == [
        Sample(({"role": "user", "content": "Hi"},), "Yes.", "No.")]


def test_without_an_entry_the_embedded_data_is_taken_and_announced(capsys):
    data = load([])
    assert capsys.readouterr().out == "--data_path is not given: using the embedded data set\n"
    assert len(data.held_out) == 400
    assert len(data.train) > 6000
    assert data.filtered_out == {}


@pytest.mark.parametrize(("entry", "start", "end"), [
    ("PATH:0", "the share after the colon must be above 0 and at most 1", ""),
    ("PATH:1.5", "the share after the colon must be above 0 and at most 1", ""),
    ("some/set=PATH", "no data format some/set; known are Dahoas/synthetic", "prompt-only"),
    *[(entry, "the columns prompt (text), chosen (text) fit no known data format; the nearest is "
       "prompt + chosen + rejected (missing: rejected)", "see docs/data.md for a row of each")
      for entry in ("local/jsonfile=PATH", "PATH")],
    ("FOLDER/missing.jsonl", "no such file or folder, and no data set of that name is known; known "
     "are Dahoas/synthetic-instruct-gptj-pairwise, ",
     ", owner/name of the hub, and local .json, .jsonl and .parquet files"),
    ("data/missing.jsonl", "no such file or folder, and no data set", ""),  # no name of the hub
    ("FOLDER", "the folder FOLDER has no train.json, train.jsonl or train.parquet; add one, or "
     "give the file itself", ""),
    ("local/jsonfile", "there is no folder FOLDER/data; put train.json and eval.json there, or "
     "give the path of a file", ""),
])
def test_an_entry_that_leads_nowhere_is_refused(tmp_path, monkeypatch, entry, start, end):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "eval.jsonl", [{"prompt": "a", "chosen": "b"}])
    entry, start = (text.replace("PATH", path).replace("FOLDER", str(tmp_path))
                    for text in (entry, start))
    line = refusal(entry)
    where = ", row 1" if "columns" in start else ""
    assert line.startswith(f"--data_path {entry}{where}: {start}")
    assert line.endswith(end)


def test_a_fingerprint_follows_the_bytes_and_nothing_else(tmp_path):
    def fingerprint(path):
        (source,) = open_sources([str(path)])
        return source.fingerprint()

    path = Path(write(tmp_path / "train.jsonl", PAIRS))
    first, folder = fingerprint(path), fingerprint(tmp_path)
    os.utime(path, (0, 0))
    assert (fingerprint(path), fingerprint(tmp_path)) == (first, folder)
    write(path, lines(PAIRS).replace("Good 1", "Nice 1"))
    assert fingerprint(path) != first
    changed = fingerprint(tmp_path)
    write(tmp_path / "README.md", "not data")
    assert fingerprint(tmp_path) == changed != folder
    write(tmp_path / "test.jsonl", PAIRS)
    assert fingerprint(tmp_path) not in (changed, folder)
    write(path, '{"broken": ')  # is not parsed
    fingerprint(path)


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [
    ("train.jsonl", "eval.json.gz"), ("train.json", "test.jsonl"),
    ("train.json", "validation.json"),
    ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ("default/train/0000.parquet", "default/validation/0000.parquet"),  # the hub's parquet branch
])
def test_a_folder_has_its_own_held_out_part(tmp_path, files):
    for file, rows in zip(files, (PAIRS[:2], PAIRS[2:]), strict=True):
        write(tmp_path / file, rows)
    write(tmp_path / "README.md", "not data")
    data = load([str(tmp_path)])
    assert (data.train, data.held_out) == (SAMPLES[:2], SAMPLES[2:])


def test_local_jsonfile_is_the_folder_data_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "data" / "train.json", json.dumps(PAIRS[:2]))
    write(tmp_path / "data" / "eval.json", PAIRS[2:])
    monkeypatch.chdir(tmp_path)
    data = load(["local/jsonfile"])
    assert (data.train, data.held_out) == (SAMPLES[:2], SAMPLES[2:])


def test_folders_in_a_folder_are_read_and_hidden_ones_are_not(tmp_path):
    for part in ("harmless-base", "helpful-base", ".git"):
        write(tmp_path / part / "train.jsonl", PAIRS[:1])
    assert load([str(tmp_path)]).train == SAMPLES[:1] * 2


def test_a_data_set_saved_with_datasets_is_read(tmp_path):
    rows = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "dict")
    rows.save_to_disk(tmp_path / "plain")
    both, plain = load([str(tmp_path / "dict")]), load([str(tmp_path / "plain")])
    assert (both.train, both.held_out) == (SAMPLES, SAMPLES)
    assert (plain.train, plain.held_out) == (SAMPLES, [])
    (tmp_path / "plain" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    assert refusal(str(tmp_path / "plain")).startswith(
        f"{tmp_path}/plain: datasets cannot read what it saved there (")
    write(tmp_path / "plain" / "data-00000-of-00001.arrow", LFS)
    assert "data-00000-of-00001.arrow: a pointer of git LFS" in refusal(str(tmp_path / "plain"))


# --- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Anthropic/hh-rlhf", "someone/pairs"])
def test_a_hub_set_out_of_reach_names_the_remedy(monkeypatch, name):
    def unreachable(*names):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert refusal(name) == (
        f"--data_path {name}: the hub did not give it (ConnectionError); download it and give "
        f"{name}=PATH")


def test_a_hub_set_made_by_a_script_is_read_from_its_parquet_form(monkeypatch):
    def scripted(name, configuration, revision=None):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found mkqa.py")
        return {"train": [{"queries": {"ja": "問", "zh_cn": None},
                           "answers": {"ja": [{"text": "答"}], "zh_cn": []}}]}

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    assert load(["mkqa"]).train == [Sample(({"role": "user", "content": "問"},), "答")]


@pytest.mark.parametrize(("splits", "train", "held_out"), [
    (["train", "test"], ["train"], ["test"]),
    # Where some splits are made for preferences, these alone.
    (["train_sft", "train_prefs", "test_prefs", "test_gen"], ["train_prefs"], ["test_prefs"]),
])
def test_a_hub_set_keeps_its_own_split(monkeypatch, splits, train, held_out):
    found = {name: [{"prompt": name, "chosen": "Yes.", "rejected": "No."}] for name in splits}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: found)
    data = load(["HuggingFaceH4/ultrafeedback_binarized"])
    assert [one.messages[0]["content"] for one in data.train] == train
    assert [one.messages[0]["content"] for one in data.held_out] == held_out


def test_a_hub_set_without_a_split_to_train_on_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: {"test": [], "extra": []})
    assert refusal("someone/pairs") == (
        "--data_path someone/pairs: has no split train, but test, extra; download it and give the "
        "file to train on")
