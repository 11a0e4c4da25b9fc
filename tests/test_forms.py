"""Forms of rows that users bring: docs/data.md shows one of each, and none is used silently wrong.

Set UPDATE_DOCS=1 to write the table of the page anew.
"""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from loading import load

from alpaca_rlhf.utils.configs import DataConfig, SFTConfig
from alpaca_rlhf.utils.data import formats, prepare
from alpaca_rlhf.utils.data.samples import Sample, Tally

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def read(*rows: dict) -> tuple[list[Sample], dict[str, int], dict[str, int]]:
    """Return samples, reasons for rows without one, and what nothing reads."""
    tally = Tally()
    return list(formats.read(rows, "", tally)), dict(tally.unused), dict(tally.unread)


ASK = (user("Why is ice cold?"),)
TALK = (user("Name a river."), assistant("Nile."), user("Another."))
HH = "\n\nHuman: Name a river.\n\nAssistant: Nile.\n\nHuman: Another.\n\nAssistant:"
PAIR = {"chosen": "Frozen.", "rejected": "No."}
TALK_AS_SHAREGPT = [human("Name a river."), gpt("Nile."), human("Another.")]
ICE = [user("Why is ice cold?"), assistant("Frozen.")]
NODE = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Why is ice cold?"}

# (what it is, the row, its sample)
FORMS = [
    ("pair, all text", {"prompt": "Why is ice cold?", **PAIR}, Sample(ASK, "Frozen.", "No.")),
    ("pair, hh-rlhf's text", {"chosen": f"{HH} Rhine.", "rejected": f"{HH} No."},
     Sample(TALK, "Rhine.", "No.")),
    ("pair, the prompt as hh-rlhf's text", {"prompt": HH, "chosen": " Rhine.", "rejected": " No."},
     Sample(TALK, "Rhine.", "No.")),
    ("pair, whole dialogues", {"chosen": [*TALK, assistant("Rhine.")],
                               "rejected": [*TALK, assistant("No.")]},
     Sample(TALK, "Rhine.", "No.")),
    ("pair, a turn each", {"prompt": list(TALK), "chosen": assistant("Rhine."),
                           "rejected": [assistant("No.")]}, Sample(TALK, "Rhine.", "No.")),
    ("pair, ShareGPT's", {"conversations": TALK_AS_SHAREGPT, "chosen": gpt("Rhine."),
                          "rejected": gpt("No.")}, Sample(TALK, "Rhine.", "No.")),
    ("pair, instruction-style", {"instruction": "Why is it cold?", "input": "ice", **PAIR},
     Sample(({**user("Why is it cold?\n\nice"), "instruction": "Why is it cold?",
              "input": "ice"},), "Frozen.", "No.")),
    ("pair, system column", {"system": "Be brief.", "question": "Why is ice cold?", **PAIR},
     Sample((system("Be brief."), *ASK), "Frozen.", "No.")),
    ("SHP", {"history": "Why is ice cold?", "human_ref_A": "No.", "human_ref_B": "Frozen.",
             "labels": 0}, Sample(ASK, "Frozen.", "No.")),
    ("alpaca_eval", {"instruction": "Why is ice cold?", "output_1": "Frozen.", "output_2": "No.",
                     "preference": 1}, Sample(ASK, "Frozen.", "No.")),
    ("WebGPT", {"question": {"full_text": "Why is ice cold?"}, "answer_0": "Frozen [1].",
                "answer_1": "No.", "score_0": 0.5, "score_1": -0.5},
     Sample(ASK, "Frozen.", "No.")),
    ("GPT-4-LLM's comparisons", {"user_input": "Why is ice cold?", "responses_and_scores": [
        {"response": "Frozen.", "score": 9}, {"response": "No.", "score": 2}]},
     Sample(ASK, "Frozen.", "No.")),
    ("Open Assistant's tree", {"message_tree_id": "1", "prompt": {**NODE, "replies": [
        {"role": "assistant", "text": "Frozen.", "rank": 0},
        {"role": "assistant", "text": "No.", "rank": 1}]}}, Sample(ASK, "Frozen.", "No.")),
    ("Open Assistant's flat messages (each a row)", NODE, None),
    ("MIRACL", {"query": "Why is ice cold?", "positive_passages": [{"text": "Frozen."}],
                "negative_passages": [{"text": "No."}]}, Sample(ASK, "Frozen.", "No.")),
    ("seed tasks", {"instruction": "Why is ice cold?", "instances": [
        {"input": "", "output": "Frozen."}]}, Sample(ASK, "Frozen.")),
    ("Alpaca", {"instruction": "Another.", "input": "", "output": "Rhine.", "system": "Be brief.",
                "history": [["Name a river.", "Nile."]]},
     Sample((system("Be brief."), *TALK), "Rhine.")),
    ("messages", {"messages": [system("Be brief."), *TALK, assistant("Rhine.")]},
     Sample((system("Be brief."), *TALK), "Rhine.")),
    ("messages, a turn that is not trained", {"messages": [
        TALK[0], {**TALK[1], "weight": 0}, TALK[2], {**assistant("Rhine."), "weight": 1}]},
     Sample(TALK, "Rhine.", untrained=(0,))),
    ("messages, content in parts", {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Why is "},
                                     {"type": "text", "text": "ice cold?"}]},
        assistant("Frozen.")]}, Sample(ASK, "Frozen.")),
    ("ShareGPT", {"system": "Be brief.", "conversations": [*TALK_AS_SHAREGPT, gpt("Rhine.")]},
     Sample((system("Be brief."), *TALK), "Rhine.")),
    ("JSON in a string", {"conversations": json.dumps([human("Why is ice cold?"),
                                                       gpt("Frozen.")])}, Sample(ASK, "Frozen.")),
    ("Vicuna's text", {"prompt": "USER: Name a river. ASSISTANT: Nile.</s>USER: Another. "
                       "ASSISTANT:", "label": "Rhine."}, Sample(TALK, "Rhine.")),
    ("Zhihu-KOL", {"INSTRUCTION": "Why is ice cold?", "RESPONSE": "Frozen."},
     Sample(ASK, "Frozen.")),
    ("HC3", {"question": "Why is ice cold?", "human_answers": ["Frozen."]},
     Sample(ASK, "Frozen.")),
    ("MKQA (a sample for each language)", {
        "queries": {"zh_cn": "Why is ice cold?", "ja": "Why is ice cold?"},
        "answers": {"zh_cn": [{"text": "Frozen."}], "ja": [{"text": "Frozen."}]}},
     Sample(ASK, "Frozen.")),
    ("JaQuAD, several questions", {"questions": ["Why is ice cold?"], "paragraph": "Frozen."},
     Sample(ASK, "Frozen.")),
    ("JaQuAD, one question", {"question": "Why is ice cold?", "sentence": "Frozen."},
     Sample(ASK, "Frozen.")),
    ("prompt and response", {"prompt": "Why is ice cold?", "completion": "Frozen."},
     Sample(ASK, "Frozen.")),
    ("KTO, a good response", {"prompt": "Why is ice cold?", "completion": "Frozen.",
                              "label": True}, Sample(ASK, "Frozen.")),
    ("KTO, a bad response", {"prompt": "Why is ice cold?", "completion": "No.", "label": False},
     Sample(ASK, "", lacking="label is false")),
    ("prompt alone", {"prompt": list(TALK)}, Sample(TALK, "", lacking="no response")),
]


def table() -> str:
    lines = ["| form | steps | row |", "| --- | --- | --- |"]
    for what, row, sample in FORMS:
        steps = "1 2 3" if sample is None or sample.rejected else "1 3" if sample.chosen else "3"
        lines.append(f"| {what} | {steps} | `{json.dumps(row)}` |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_a_row_of_each_form_as_it_is_read_here():
    before, begin, rest = PAGE.read_text().partition("## A row of each form\n")
    introduction, _, after = rest.partition("| form |")
    after = after[after.index("\n\n"):]
    page = before + begin + introduction + table() + after[1:]
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


@pytest.mark.parametrize(("row", "sample"), [(row, sample) for _, row, sample in FORMS if sample],
                         ids=[what for what, _, sample in FORMS if sample])
def test_a_row_of_each_form_gives_its_sample_and_leaves_nothing_unread(row, sample):
    samples, unused, unread = read(row)
    assert (samples, unused, unread) == ([sample] * max(1, len(row.get("queries", []))), {}, {})


def test_every_format_has_a_row_on_the_page():
    shown = [formats.choose(formats.unpacked(row)) for _, row, _ in FORMS]
    assert [one.names for one in formats.FORMATS if one not in shown] == []


# --- one turn in any shape -----------------------------------------------------------------------

SHAPES = [lambda text: text, assistant, gpt, lambda text: [assistant(text)],
          lambda text: [gpt(text)], lambda text: [text],
          lambda text: {**assistant(text), "from": None, "value": None},
          lambda text: [{"type": "text", "text": text}],
          lambda text: {"role": "assistant", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [
    {"prompt": "Why is ice cold?"}, {"question": "Why is ice cold?"}, {"prompt": list(ASK)},
    {"instruction": "Why is ice cold?"}, {"messages": list(ASK)}, {"prompt": ASK[0]},
    {"conversations": [human("Why is ice cold?")]}, {"prompt": json.dumps(ASK)},
])
def test_a_pair_is_read_whatever_shape_its_turns_have(prompt, shape):
    row = {**prompt, "chosen": shape("Frozen."), "rejected": shape("No.")}
    assert read(row) == ([Sample(ASK, "Frozen.", "No.")], {}, {})


def test_nulls_of_merged_structs_are_nothing(tmp_path):
    null = {"role": None, "content": None, "from": None, "value": None}
    rows = [
        {"messages": [{**null, **ICE[0]}, {**null, **ICE[1]}, null], "prompt": None,
         "completion": None, "chosen": None, "rejected": None},
        {"messages": None, "prompt": [{**null, **human("Why is ice cold?")}],
         "completion": "Frozen.", "chosen": None, "rejected": None},
        {"messages": None, "prompt": [{**null, **ASK[0]}], "completion": None,
         "chosen": "Frozen.", "rejected": "No."},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = load([str(tmp_path / "rows.parquet")])
    assert data.train == [Sample(ASK, "Frozen.")] * 2 + [Sample(ASK, "Frozen.", "No.")]


def test_each_row_is_read_by_what_it_holds():
    rows = [{"note": "about this file"}, {"instruction": "Why is ice cold?", "output": "Frozen."},
            {"messages": ICE}, {"prompt": "Why is ice cold?", **PAIR}, NODE, {"prompt": "Hi"},
            {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "Frozen."}]
    samples, unused, _ = read(*rows)
    assert unused == {"no known data format": 1}
    assert [(one.chosen, one.rejected) for one in samples] == [
        ("Frozen.", None), ("Frozen.", None), ("Frozen.", "No."), ("", None), ("Frozen.", None)]


@pytest.mark.parametrize("nothing", [None, "", " "])
@pytest.mark.parametrize("row", [
    {"instruction": "Why is ice cold?", "output": "Frozen."}, {"messages": ICE},
    {"input": "Why is ice cold?", "output": "Frozen."}, {"query": "Why is ice cold?",
                                                         "answer": "Frozen."}])
def test_a_column_that_holds_nothing_does_not_count(row, nothing):
    for column in ("prompt", "instruction", "input", "completion", "system"):
        row = {column: nothing, **row}
    assert read(row) == ([Sample(ASK, "Frozen.")], {}, {})


@pytest.mark.parametrize(("columns", "nearest"), [
    ({"Prompt": "a", "Chosen": "b", "Rejected": "c"},
     "the columns Prompt (text), Chosen (text), Rejected (text) fit no known data format; the "
     "nearest is prompt + chosen + rejected (missing: prompt, chosen, rejected); rename "),
    ({"conversation_a": [], "conversation_b": []}, "the nearest is messages (missing: messages)"),
    ({"INSTRUCTION": "a", "ANSWER": 3}, "the nearest is INSTRUCTION + RESPONSE"),
])
def test_a_refusal_says_what_was_found_and_what_is_nearest(columns, nearest):
    tally = Tally()
    assert list(formats.read([columns], "", tally)) == []
    assert nearest in tally.unfit


# --- what is read beside the form's own columns --------------------------------------------------


@pytest.mark.parametrize(("row", "before"), [
    ({"messages": ICE, "system": "Be brief."}, [system("Be brief.")]),
    ({"messages": [{"role": "developer", "content": "Be brief."}, *ICE]}, [system("Be brief.")]),
    ({"prompt": ASK[0]["content"], **PAIR, "system_prompt": "Be brief."}, [system("Be brief.")]),
    ({"chosen": ICE, "rejected": [ICE[0], assistant("No.")], "system": "Be brief."},
     [system("Be brief.")]),
    ({"prompt": list(ASK), "system": "Be brief."}, [system("Be brief.")]),
    ({"messages": ICE, "system": " "}, []),
    ({"messages": ICE, "tools": "[]", "system": None, "history": []}, []),
    *[({"instruction": ASK[0]["content"], "output": "Frozen.", "history": history}, list(TALK[:2]))
      for history in ([["Name a river.", "Nile."]], ["Name a river.", "Nile."], list(TALK[:2]),
                      [{"instruction": "Name a river.", "output": "Nile."}],
                      TALK_AS_SHAREGPT[:2], '[["Name a river.", "Nile."]]')],
])
def test_system_text_and_history_come_before_the_prompt(row, before):
    (sample,), unused, unread = read(row)
    assert (list(sample.messages), unused, unread) == ([*before, *ASK], {}, {})


def test_columns_and_keys_that_nothing_reads_are_named_with_their_rows():
    rows = [{"messages": [ICE[0], {**ICE[1], "reasoning": "Cold."}], "id": 1, "tools": "[{}]",
             "hint": "x"}] * 2 + [{"messages": ICE, "hint": "", "score": 3}]
    samples, unused, unread = read(*rows)
    assert (len(samples), unused) == (3, {})
    assert unread == {"key reasoning of turns": 2, "column tools": 2, "column hint": 2}
    # The dialogue's own system text counts; a column that says the same again is not named.
    own = [system("Own."), *ICE]
    assert read({"messages": own, "system": "Other."})[2] == {"column system": 1}
    assert read({"messages": own, "system": "Own.", "prompt": ASK[0]["content"]})[2] == {}
    rendered = "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3"
    assert read({"instruction": "Add.", "input": "1, 2", "output": "3", "text": rendered})[2] == {}


@pytest.mark.parametrize(("key", "off", "on"), [
    ("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True), ("training", False, True),
    ("loss", False, True), ("loss_weight", 0, 1), ("weight", "0", "1")])
def test_turns_that_are_marked_are_not_trained(key, off, on):
    def talk(*marks):
        turns = [TALK[0], {**TALK[1], key: marks[0]}, TALK[2], {**assistant("Rhine."),
                                                                 key: marks[1]}]
        (sample,), unused, unread = read({"messages": turns})
        assert (unused, unread) == ({}, {})
        assert all(turn.keys() == {"role", "content"} for turn in sample.messages)
        return sample

    assert talk(off, on) == Sample(TALK, "Rhine.", untrained=(0,))
    assert talk(on, on) == talk(None, on) == Sample(TALK, "Rhine.")
    assert talk(on, off) == Sample(TALK[:1], "Nile.")
    assert talk(off, off).lacking == "response is marked as not trained"


@pytest.mark.parametrize("mark", [{"label": False}, {"kto_tag": False}, {"label": 0},
                                  {"label": "false"}, {"weight": 0}, {"train": False}])
@pytest.mark.parametrize("row", [
    {"messages": ICE}, {"prompt": "Why is ice cold?", "completion": [assistant("Frozen.")]},
    {"instruction": "Why is ice cold?", "input": "", "output": "Frozen."}])
def test_a_response_that_is_marked_as_bad_is_never_a_good_one(row, mark):
    (sample,), unused, unread = read({**row, **mark})
    assert (sample.messages, sample.chosen, sample.rejected) == (ASK, "", None)
    assert sample.lacking == f"{next(iter(mark))} is false"
    assert (unused, unread) == ({}, {})


@pytest.mark.parametrize(("turn", "reason"), [
    ({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
     'a content part is "image_url", not text'),
    ({"role": "user", "content": [{"type": "image", "text": None}]},
     'a content part is "image", not text'),
    ({"role": "tool", "content": "3"}, "tool turns"),
    ({"from": "function_call", "value": "{}"}, "tool turns"),
    ({"role": "Tool-Response", "content": "3"}, "tool turns"),
    ({"role": "tool_output", "content": "3"}, "tool turns"),
    ({"role": "assistant", "content": "", "tool_calls": [{}]}, "tool turns"),
    ({"from": "narrator", "value": "x"}, 'role "narrator" is not system, user or assistant'),
    ({"role": "assistant", "content": "x", "weight": 0.5}, "weight is not 0 or 1"),
])
def test_turns_that_cannot_be_used_have_a_reason(turn, reason):
    assert read({"messages": [*TALK[:2], TALK[2], turn, *ICE]})[1] == {reason: 1}


CODE = "    if cold:\n        return ice"


@pytest.mark.parametrize("response", [CODE, "\n\nFrozen.", "\tFrozen."])
@pytest.mark.parametrize("row", [
    lambda text: {"prompt": "Why is ice cold?", "chosen": text, "rejected": "No."},
    lambda text: {"prompt": HH, "chosen": f" {text}", "rejected": " No."},
    lambda text: {"chosen": f"{HH} {text}", "rejected": f"{HH} No."},
    lambda text: {"messages": [user("Why is ice cold?"), assistant(text)]},
    lambda text: {"messages": [*TALK[:2], user("So?"), assistant(text), user("?"), ICE[1]]},
    lambda text: {"instruction": "Why is ice cold?", "output": text},
    lambda text: {"question": "Why is ice cold?", "human_answers": [text]},
    lambda text: {"question": "?", "history": [["Why is ice cold?", text]], "answer": "Frozen."},
    lambda text: {"prompt": f"USER: Hi. ASSISTANT: {text}</s>USER: So? ASSISTANT:", "label": "No."},
])
def test_whitespace_at_the_start_of_a_response_is_the_responses(row, response):
    ((sample,), _, _) = read(row(response))
    said = [sample.chosen, *(m["content"] for m in sample.messages if m["role"] == "assistant")]
    assert response in said


def test_a_single_space_before_a_response_is_no_part_of_it():
    ((sample, other), reasons, _) = read(
        {"prompt": "Hi", "chosen": " Yes. ", "rejected": "\nNo."},
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "\n\nYes."})
    assert (sample.chosen, sample.rejected, other.chosen) == ("Yes.", "\nNo.", "Yes.")
    assert reasons == {"chosen equals rejected": 1}


def test_a_row_with_pictures_is_not_read_as_text():
    assert read({"messages": ICE, "images": ["a.png"]})[1] == {"column images is not text": 1}
    assert read({"messages": ICE, "images": []})[1] == {}


# --- names of roles inside a text ----------------------------------------------------------------

CHAT = "Human: hi\nAssistant: PASTED\nHuman: bye"
SPACED = "Human: hi\n\nAssistant: PASTED\n\nHuman: bye"


@pytest.mark.parametrize(("row", "prompt"), [
    ({"prompt": f"\n\nHuman: Sum up:\n{CHAT}\n\nAssistant:", **PAIR}, [f"Sum up:\n{CHAT}"]),
    ({"prompt": f"\n\nHuman: Sum up:\n\n{SPACED}\n\nAssistant:", **PAIR},
     [f"Sum up:\n\n{SPACED}"]),
    ({"chosen": f"\n\nHuman: Sum up:\n\n{SPACED}\n\nAssistant: Frozen.",
      "rejected": f"\n\nHuman: Sum up:\n\n{SPACED}\n\nAssistant: No."}, [f"Sum up:\n\n{SPACED}"]),
    ({"prompt": f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sum up:\n\n{SPACED}\n\nAssistant:",
      **PAIR}, ["Hi", "Yes?", f"Sum up:\n\n{SPACED}"]),
    *[({column: f"{chat}\n\nSum that up.", **more}, [f"{chat}\n\nSum that up."])
      for chat in (CHAT, SPACED) for column, more in (
          ("prompt", PAIR), ("question", PAIR), ("prompt", {"completion": "Frozen."}),
          ("instruction", {"output": "Frozen."}))],
    ({"prompt": [user(SPACED)], **PAIR}, [SPACED]),
    ({"messages": [user(SPACED), assistant("Frozen.")]}, [SPACED]),
    ({"prompt": "USER: Sum up: USER: hi ASSISTANT: PASTED USER: bye ASSISTANT:",
      "label": "Frozen."}, ["Sum up: USER: hi ASSISTANT: PASTED USER: bye"]),
])
def test_a_pasted_chat_stays_text_of_the_user(row, prompt):
    (sample,), _, _ = read(row)
    assert [turn["content"] for turn in sample.messages] == prompt
    assert sample.chosen == "Frozen."


SCRIPT = "Here:\n\nHuman: hi\n\nAssistant: hello\nAssistant: bye"


@pytest.mark.parametrize("prompt", ["Write.", "\n\nHuman: Write.\n\nAssistant:"])
@pytest.mark.parametrize(("chosen", "rejected"), [
    (SCRIPT, "No."), (SCRIPT, f"{SCRIPT}!"), (CHAT, f"{CHAT}!"), (SPACED, f"{SPACED}!"),
    ('[{"role": "user", "content": "x"}]', "No.")])
def test_a_script_in_a_response_is_whole(prompt, chosen, rejected):
    expected = [Sample((user("Write."),), chosen, rejected)]
    assert read({"prompt": prompt, "chosen": chosen, "rejected": rejected})[0] == expected
    whole = {"chosen": f"\n\nHuman: Write.\n\nAssistant: {chosen}",
             "rejected": f"\n\nHuman: Write.\n\nAssistant: {rejected}"}
    assert read({"prompt": prompt, **whole})[0] == expected
    named = {"chosen": f"Assistant: {chosen}", "rejected": f"Assistant: {rejected}"}
    if "Human" in prompt:
        assert read({"prompt": prompt, **named})[0] == expected


# --- what the steps train on ---------------------------------------------------------------------


def prepared(folder: Path, monkeypatch, rows: list[dict], step: int) -> prepare.Prepared:
    from test_prepare import chat_format

    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(data_path=["rows.jsonl"], data_output_path=str(folder / "cache"),
                      data_split="1,1,1")
    options = {"seed": 1, "chat": chat_format()}
    if step == 1:
        return prepare.prepare_sft(data, SFTConfig(), max_seq_len=64, **options)
    if step == 2:
        return prepare.prepare_pairs(data, max_seq_len=64, **options)
    return prepare.prepare_prompts(data, max_prompt_seq_len=64, **options)


def test_each_step_uses_what_it_can_and_counts_the_rest(tmp_path, monkeypatch):
    rows = [row for i in range(40) for row in (
        {"prompt": f"a {i}", "chosen": "b", "rejected": "c", "mood": "d"}, {"prompt": f"b {i}"},
        {"prompt": f"c {i}", "completion": "a", "label": False})]
    counts = []
    for step in (1, 2, 3):
        made = prepared(tmp_path, monkeypatch, rows, step)
        report = made.report["filtered_out"]
        counts.append(report)
        assert made.report["train"] + made.report["held_out"] + sum(report.values()) < 120
        assert "warning: rows.jsonl: nothing reads column mood (40 rows)" in made.describe()
    assert [set(count) for count in counts] == [{"no response", "label is false"}] * 2 + [set()]


def test_a_marked_turn_has_no_label(tmp_path, monkeypatch):
    turns = [user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("d")]
    rows = [{"messages": [*turns[:2], user(f"c {i}"), turns[3]]} for i in range(30)]
    made = prepared(tmp_path, monkeypatch, rows, 1)
    plain = prepared(tmp_path, monkeypatch, [
        {"messages": [*row["messages"][:1], assistant("b"), *row["messages"][2:]]}
        for row in rows], 1)

    def trained(data):
        return [sum(label != -100 for label in row) for row in data.train["labels"]]

    assert trained(made)
    assert [more - less for more, less in zip(trained(plain), trained(made), strict=True)] == [
        2] * len(trained(made))
