"""Each form of the table, from small files in its exact schema and in the layouts of the hub."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from loading import load

from alpaca_rlhf.utils.data import formats
from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.errors import UserError


def user(text: str, **more: str) -> dict[str, str]:
    return {"role": "user", "content": text, **more}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


HI = (user("Hi"),)
TALK = (user("Hi"), assistant("Hello."), user("More"))
TALK_TEXT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: More\n\nAssistant:"
PAIR = [Sample(HI, "Good.", "Bad.")]
TALK_PAIR = [Sample(TALK, "Good.", "Bad.")]
GOOD, BAD = [*TALK, assistant("Good.")], [*TALK, assistant("Bad.")]
NODE = {"lang": "en", "deleted": False, "synthetic": False, "review_count": 3}
TREE = {
    "message_tree_id": "1", "tree_state": "ready_for_export", "prompt": {
        **NODE, "message_id": "1", "text": "Hi", "role": "prompter", "replies": [
            {**NODE, "message_id": "2", "parent_id": "1", "text": "Bad.", "role": "assistant",
             "rank": 2, "replies": []},
            {**NODE, "message_id": "3", "parent_id": "1", "text": "Good.", "role": "assistant",
             "rank": 0, "replies": [
                 {**NODE, "message_id": "4", "parent_id": "3", "text": "More", "role": "prompter",
                  "replies": [{**NODE, "message_id": "5", "parent_id": "4", "text": "Only.",
                               "role": "assistant", "rank": None, "replies": []}]}]},
            {**NODE, "message_id": "6", "parent_id": "1", "text": "Fair.", "role": "assistant",
             "rank": 1, "replies": []}]}}
FLAT = [
    {**NODE, "message_id": str(i), "parent_id": parent, "text": text, "role": role, "rank": rank}
    for i, parent, text, role, rank in (
        (1, None, "Hi", "prompter", None), (2, "1", "Bad.", "assistant", 2),
        (3, "1", "Good.", "assistant", 0), (4, "3", "More", "prompter", None),
        (5, "4", "Only.", "assistant", None), (6, "1", "Fair.", "assistant", 1))]
FROM_TREE = [*PAIR, Sample((user("Hi"), assistant("Good."), user("More")), "Only.")]
INPUT = (user("Add.\n\n1, 2", instruction="Add.", input="1, 2"),)

# (a name it goes by, its rows, the samples they make)
FORMS = [
    ("Anthropic/hh-rlhf", [{"chosen": TALK_TEXT + " Good.", "rejected": TALK_TEXT + " Bad."}],
     TALK_PAIR),
    ("Dahoas/rm-static",
     [{"prompt": TALK_TEXT, "response": " Good.", "chosen": " Good.", "rejected": " Bad."}],
     TALK_PAIR),
    ("Dahoas/full-hh-rlhf",
     [{"prompt": TALK_TEXT, "response": " Good.", "chosen": " Good.", "rejected": " Bad."}],
     TALK_PAIR),
    ("Dahoas/static-hh", [{"prompt": TALK_TEXT, "chosen": TALK_TEXT + " Good.",
                           "rejected": TALK_TEXT + " Bad."}], TALK_PAIR),
    ("Dahoas/synthetic-instruct-gptj-pairwise",
     [{"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}], PAIR),
    ("stanfordnlp/SHP", [
        {"post_id": "x", "history": "Hi", "human_ref_A": "Good.", "human_ref_B": "Bad.",
         "labels": 1, "score_ratio": 2.0},
        {"post_id": "y", "history": "Hi", "human_ref_A": "Bad.", "human_ref_B": "Good.",
         "labels": 0, "score_ratio": 3.0}], PAIR * 2),
    ("GPT-4-LLM", [{"instruction": "Add.", "input": "1, 2", "output": "3"},
                   {"instruction": "Hi", "input": "", "output": "Good."}],
     [Sample(INPUT, "3"), Sample(HI, "Good.")]),
    ("GPT-4-LLM", [{"user_input": "Hi", "responses_and_scores": [
        {"response": "Fair.", "score": 7.0, "source": "a"},
        {"response": "Bad.", "score": 2.0, "source": "b"},
        {"response": "Good.", "score": 9.5, "source": "c"}]}], PAIR),
    ("OpenAssistant/oasst1", FLAT, FROM_TREE),
    ("OpenAssistant/oasst1", [TREE], FROM_TREE),
    ("tatsu-lab/alpaca", [{"instruction": "Add.", "input": "1, 2", "output": "3", "text": "x"}],
     [Sample(INPUT, "3")]),
    ("yahma/alpaca-cleaned", [{"output": "Good.", "instruction": "Hi", "input": ""}],
     [Sample(HI, "Good.")]),
    ("MultiTurnAlpaca", [{"instruction": TALK_TEXT, "output": "Good."}], [Sample(TALK, "Good.")]),
    ("ShareGPT", [{"id": "x", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "More"}, {"from": "gpt", "value": "Good."},
        {"from": "human", "value": "Bye"}]}], [Sample(TALK, "Good.")]),
    ("ChatAlpaca", [{"messages": [system("Be brief."), *GOOD]}],
     [Sample((system("Be brief."), *TALK), "Good.")]),
    ("yitingxie/rlhf-reward-datasets",
     [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Assistant: Good.",
       "rejected": "Assistant: Bad."}], PAIR),
    ("openai/webgpt_comparisons", [
        {"question": {"dataset": "eli5", "id": "1", "full_text": "Hi"}, "answer_0": "Bad [1, 2].",
         "answer_1": "Good [3].", "score_0": -0.5, "score_1": 0.5}], PAIR),
    ("pvduy/sharegpt_alpaca_oa_vicuna_format",
     [{"prompt": "USER: Hi ASSISTANT: Hello.</s>USER: More ASSISTANT:", "label": "Good."}],
     [Sample(TALK, "Good.")]),
    ("wangrui6/Zhihu-KOL",
     [{"INSTRUCTION": "你好", "RESPONSE": "好", "SOURCE": "Zhihu", "METADATA": "{}"}],
     [Sample((user("你好"),), "好")]),
    ("Hello-SimpleAI/HC3-Chinese",
     [{"id": "0", "question": "你好", "human_answers": ["好", "不"], "chatgpt_answers": ["是"]}],
     [Sample((user("你好"),), "好")]),
    ("mkqa", [{"example_id": 1, "queries": {"en": "Hi", "zh_cn": "你好", "ja": "問"},
               "answers": {"en": [{"type": 1, "text": "Good."}],
                           "zh_cn": [{"type": 1, "text": "好"}],
                           "ja": [{"type": 1, "text": "答"}]}}],
     [Sample((user("你好"),), "好"), Sample((user("問"),), "答")]),
    ("lmqg/qg_jaquad", [{"answer": "x", "question": "問", "sentence": "文", "paragraph": "段"}],
     [Sample((user("問"),), "文")]),
    ("lmqg/qag_jaquad", [{"answers": ["x"], "questions": ["問", "二"], "paragraph": "段",
                          "questions_answers": "x"}], [Sample((user("問"),), "段")]),
    ("Cohere/miracl-zh-queries-22-12", [
        {"query_id": "1", "query": "你好",
         "positive_passages": [{"docid": "1", "title": "t", "text": "好"}],
         "negative_passages": [{"docid": "2", "title": "t", "text": "不"}]}],
     [Sample((user("你好"),), "好", "不")]),
    ("tatsu-lab/alpaca_eval", [{"instruction": "Hi", "output_1": "Bad.", "output_2": "Good.",
                                "preference": 2, "annotator": "x"}], PAIR),
    ("local/jsonfile", [{"prompt": TALK_TEXT, "chosen": "Good.", "rejected": "Bad."}], TALK_PAIR),
    ("local/jsonfile", [{"prompt": list(TALK), "chosen": [assistant("Good.")],
                         "rejected": [assistant("Bad.")]}], TALK_PAIR),
    ("prompt-completion", [{"prompt": "Hi", "completion": "Good."}], [Sample(HI, "Good.")]),
    ("prompt-completion", [{"prompt": list(TALK), "completion": [assistant("Good.")]}],
     [Sample(TALK, "Good.")]),
    ("ShareGPT", [{"messages": GOOD}], [Sample(TALK, "Good.")]),
    ("Anthropic/hh-rlhf", [{"chosen": GOOD, "rejected": BAD}], TALK_PAIR),
    ("HuggingFaceH4/ultrafeedback_binarized",
     [{"prompt": "Hi", "prompt_id": "x", "chosen": GOOD, "rejected": BAD, "messages": GOOD,
       "score_chosen": 8.0, "score_rejected": 3.0}], TALK_PAIR),
    ("argilla/dpo-mix-7k", [{"dataset": "x", "chosen": [user("Hi"), assistant("Good.")],
                             "rejected": [user("Hi"), assistant("Bad.")]}], PAIR),
    ("Intel/orca_dpo_pairs",
     [{"system": "Be brief.", "question": "Hi", "chosen": "Good.", "rejected": "Bad."}],
     [Sample((system("Be brief."), *HI), "Good.", "Bad.")]),
    ("seed_tasks", [{"id": "seed_task_0", "instruction": "Add.", "instances": [
        {"input": "1, 2", "output": "3"}, {"input": "", "output": "What?"}]}],
     [Sample(INPUT, "3"), Sample((user("Add."),), "What?")]),
]
IDS = [f"{name} {'+'.join(list(rows[0])[:3])}" for name, rows, _ in FORMS]
every_form = pytest.mark.parametrize(("name", "rows", "expected"), FORMS, ids=IDS)


def parquet(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# Trees come as JSON alone: each of their levels is a type of its own.
@pytest.mark.parametrize(
    ("name", "rows", "expected"), [form for form in FORMS if form[1][0] is not TREE]
)
def test_a_repository_of_the_hub_is_read_by_its_name(tmp_path, name, rows, expected):
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows)
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[:0])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    data = load([f"{name}={tmp_path}"])
    assert (data.train, data.held_out, data.counted_out) == (expected, expected, {})


@every_form
def test_a_file_is_read_by_its_columns(tmp_path, name, rows, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load([str(path)]).train == expected
    assert load([f"{name}={path}"]).train == expected


def test_every_name_of_the_table_stands_in_this_file_or_has_the_form_of_one_that_does():
    shown = {name for name, _, _ in FORMS}
    lacking = [a.names for a in formats.ADAPTORS if not shown & set(a.names)]
    assert lacking == []


# --- layouts -------------------------------------------------------------------------------------

ROWS = [{"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}]


def test_a_data_set_saved_with_datasets_is_read(tmp_path):
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS)
                                  for name in ("train", "validation")})
    saved.save_to_disk(tmp_path / "dict")
    saved["train"].save_to_disk(tmp_path / "plain")
    both, plain = load([str(tmp_path / "dict")]), load([str(tmp_path / "plain")])
    assert (both.train, both.held_out) == (PAIR, PAIR)
    assert (plain.train, plain.held_out) == (PAIR, [])


def test_what_datasets_saved_and_something_tore_is_refused(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot read what it saved there .*; save it again"):
        load([str(tmp_path)])


def test_the_hubs_parquet_branch_is_read(tmp_path):
    parquet(tmp_path / "default" / "train" / "0000.parquet", ROWS)
    parquet(tmp_path / "default" / "validation" / "0000.parquet", ROWS)
    data = load([str(tmp_path)])
    assert (data.train, data.held_out) == (PAIR, PAIR)


def test_folders_in_a_folder_are_read_and_hidden_ones_are_not(tmp_path):
    for part in ("harmless-base", "helpful-base", ".git"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert load([str(tmp_path)]).train == PAIR * 2


# --- what is counted out -------------------------------------------------------------------------


def counted(*rows: dict) -> dict[str, int]:
    """Reasons for rows of the form that the first of them has."""
    unused = Counter[str]()
    adaptor = next(a for a in formats.ADAPTORS if a.fits(rows[0]))
    list(adaptor.read(rows, unused))
    return dict(unused)


SCORED = {"question": {"full_text": "Hi"}, "answer_0": "Good.", "answer_1": "Bad.", "score_0": 0.5,
          "score_1": -0.5}
TALKING = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good."}]}


@pytest.mark.parametrize(("row", "reason"), [
    ({**SCORED, "score_1": 0.5}, "tie"),
    ({**SCORED, "score_1": None}, "score is not a number"),
    ({**SCORED, "score_1": True}, "score is not a number"),
    ({**SCORED, "score_1": float("nan")}, "score is not a number"),
    ({**SCORED, "question": "Hi"}, "question is not an object"),
    ({"user_input": "Hi", "responses_and_scores": []}, "empty responses_and_scores"),
    ({"user_input": "Hi", "responses_and_scores": None}, "responses_and_scores is no list"),
    ({"query": "Hi", "positive_passages": [{"text": "Good."}], "negative_passages": []},
     "empty negative_passages"),
    ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": None},
     "labels is not 0 or 1"),
    ({"instruction": "Hi", "input": 3, "output": "Good."}, "input is not text"),
    ({"instruction": "Hi", "input": "", "output": None}, "chosen is not text"),
    ({"instruction": "Hi", "instances": []}, "empty instances"),
    ({"conversations": []}, "no assistant's turn"),
    ({"conversations": TALKING["conversations"][1:]}, "dialogue does not end with a user's turn"),
    ({"conversations": TALKING["conversations"][1:] + TALKING["conversations"]},
     "roles out of order"),
    ({"conversations": TALKING["conversations"][:1] * 2 + TALKING["conversations"]},
     "roles out of order"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " "},
                        *TALKING["conversations"]]}, "empty turn"),
    ({"conversations": [{"from": "human", "value": None}]},
     "conversations is neither text nor messages"),
    ({"prompt": "Hi", "label": "Good."}, "dialogue does not end with a user's turn"),
    ({"chosen": GOOD, "rejected": [user("Ho"), *BAD[1:]]}, "pair parts before the last reply"),
    ({"prompt": "Hi", "chosen": [user("Hi")], "rejected": "Bad."},
     "chosen does not end with the assistant's turn"),
    ({"message_tree_id": "x", "prompt": None}, "message is not an object"),
    ({"message_tree_id": "x", "prompt": {"role": "assistant", "text": "Hi"}},
     "roles out of order"),
    ({"message_tree_id": "x", "prompt": {"role": "prompter", "text": "Hi", "replies": []}},
     "prompt without a reply"),
])
def test_a_row_that_cannot_be_used_is_counted(row, reason):
    assert counted(row) == {reason: 1}


def test_deleted_messages_of_a_tree_are_counted_and_the_others_used():
    replies = [{**reply, "deleted": reply["rank"] == 2} for reply in TREE["prompt"]["replies"]]
    tree = {**TREE, "prompt": {**TREE["prompt"], "replies": replies}}
    unused = Counter[str]()
    first, _ = formats.named("OpenAssistant/oasst1")[1].read([tree], unused)
    assert (first.chosen, first.rejected) == ("Good.", "Fair.")
    assert unused == {"deleted message": 1}


def test_a_cycle_of_messages_and_one_that_hangs_on_none_are_counted():
    circle = [{**FLAT[1], "message_id": "a", "parent_id": "b"},
              {**FLAT[3], "message_id": "b", "parent_id": "a"},
              {**FLAT[3], "message_id": "c", "parent_id": "c"}]
    lost = [{**FLAT[3], "message_id": "d", "parent_id": "gone"},
            {**FLAT[4], "message_id": "e", "parent_id": "d"}]
    assert counted(*FLAT, *circle, *lost, FLAT[0], {**FLAT[0], "message_id": 3}) == {
        "tree cycle": 3, "parent message is missing": 2, "message_id occurs twice": 1,
        "message_id or parent_id is not text": 1}


def test_replies_that_are_rows_of_their_own_are_not_trained_twice():
    def trained(name, rows):
        adaptor = next(a for a in formats.named(name) if a.fits(rows[0]))
        return [sample.history_is_trained for sample in adaptor.read(rows, Counter())]

    assert trained("OpenAssistant/oasst1", FLAT) == [False, False]
    assert trained("MultiTurnAlpaca", [{"instruction": TALK_TEXT, "output": "x"}]) == [False]
    assert trained("ShareGPT", [{"messages": GOOD}]) == [True]


# --- shares and names ----------------------------------------------------------------------------


def test_what_exists_under_the_whole_text_is_what_is_meant(tmp_path):
    odd = tmp_path / "a=b:0.5"
    odd.write_text("")
    (tmp_path / "a=b:0.5.jsonl").write_text(json.dumps(ROWS[0]))
    assert load([str(tmp_path / "a=b:0.5.jsonl")]).train == PAIR


@pytest.mark.parametrize("share", ["0", "1.5", "2"])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError) as refused:
        load([f"{path}:{share}"])
    assert str(refused.value) == (
        f"--data_path {path}:{share}: the share after the colon must be above 0 and at most 1")
