"""Each data format of the table, from rows in its exact schema; what cannot be used is counted."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import load

from alpaca_rlhf.utils.data import formats
from alpaca_rlhf.utils.data.samples import Sample, Tally, Unusable, parse_dialogue


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
KNOWN = [
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
    ("prompt-only", [{"prompt": list(TALK), "data_source": "x", "reward_model": {"style": "rule"}}],
     [Sample(TALK, "", lacking="no response")]),
]
# Trees come as JSON alone: each of their levels is a type of its own.
@pytest.mark.parametrize(("name", "rows", "expected"), [one for one in KNOWN if one[1][0] != TREE])
def test_a_repository_of_the_hub_is_read_by_its_name(tmp_path, name, rows, expected):
    for part in ("train-00000-of-00002", "test-00000-of-00001"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{part}.parquet")
    data = load([f"{name}={tmp_path}"])
    assert (data.train, data.held_out, data.filtered_out) == (expected, expected, {})


def read(rows: list[dict], name: str = "") -> tuple[list[Sample], dict[str, int]]:
    """Return the samples of rows, and the reasons for the others."""
    tally = Tally()
    samples = list(formats.read(rows, name, tally))
    return samples, dict(tally.unused)


@pytest.mark.parametrize(
    ("name", "rows", "expected"), KNOWN,
    ids=[f"{name} {'+'.join(list(rows[0])[:3])}" for name, rows, _ in KNOWN])
def test_rows_are_known_by_name_or_by_their_columns(name, rows, expected):
    as_json = json.loads(json.dumps(rows))
    assert read(as_json) == read(as_json, name) == (expected, {})


def test_every_format_of_the_table_stands_in_this_file():
    shown = {name for name, _, _ in KNOWN}
    assert [one.names for one in formats.FORMATS if not shown & set(one.names)] == []


# --- prompts and responses -----------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "messages"), [
    *[(prompt, (user("Hi\n\nthere"),)) for prompt in (
        "Hi\n\nthere", "  Hi\n\nthere \n",
        "\n\nHuman: Hi\n\nthere\n\nAssistant:", "Human:Hi\n\nthere\n\nAssistant: ",
        [user(" Hi\n\nthere ")])],
    (TALK_TEXT, TALK),
    (list(TALK), TALK),
    # Text that does not begin with Human: and end with Assistant: is one turn, whatever it names.
    ("Human: Hi\n\nthere", (user("Human: Hi\n\nthere"),)),
    ("Human: Hi\n\nAssistant: Yes", (user("Human: Hi\n\nAssistant: Yes"),)),
    ("Finish this:\n\nHuman: Hi\n\nAssistant:",
     (user("Finish this:\n\nHuman: Hi\n\nAssistant:"),)),
])
def test_a_prompt_is_text_a_dialogue_or_messages(prompt, messages):
    row = {"id": 3, "prompt": prompt, "chosen": " Good. ", "rejected": "Bad.\n", "score": None}
    assert read([row]) == ([Sample(messages, "Good.", "Bad.")], {})


def test_responses_may_be_messages():
    row = {"prompt": "Hi", "chosen": [user("Hi"), assistant("Good.")],
           "rejected": [assistant("Bad.")]}
    assert read([row]) == (PAIR, {})


def test_a_dialogue_is_read_turn_by_turn():
    assert parse_dialogue("\n\nHuman: A\nb\n\nAssistant: C: d\n\n\n\nHuman:  \n\nAssistant:") == [
        user("A\nb"), assistant("C: d"), user(""), assistant("")]


def test_equal_prompts_have_equal_keys_and_others_do_not():
    first = Sample((user("ü"),), "a", "b")
    assert first.prompt_key() == Sample((user("ü"),), "c", None).prompt_key()
    assert first.prompt_key() != Sample((assistant("ü"),), "a", "b").prompt_key()


def test_responses_that_are_rows_of_their_own_are_not_trained_twice():
    def trained(rows):
        return [sample.history_is_trained for sample in read(rows)[0]]

    assert trained(FLAT) == [False, False]
    assert trained([{"instruction": TALK_TEXT, "output": "x"}]) == [False]
    assert trained([{"messages": GOOD}]) == [True]


# --- what is filtered out ------------------------------------------------------------------------

ROW = {"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}
EVAL = {"instruction": "Hi", "output_1": "First.", "output_2": "Second.", "preference": 1}
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
    ({"user_input": "Hi", "responses_and_scores": None}, "responses_and_scores is not a list"),
    ({"query": "Hi", "positive_passages": [{"text": "Good."}], "negative_passages": []},
     "empty negative_passages"),
    ({"history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": None},
     "labels is not 0 or 1"),
    ({"instruction": "Hi", "input": 3, "output": "Good."}, "input is not text"),
    ({"instruction": "Hi", "instances": []}, "empty instances"),
    ({"conversations": []}, "no assistant turn"),
    ({"conversations": TALKING["conversations"][1:]}, "dialogue does not end with a user turn"),
    ({"conversations": TALKING["conversations"][1:] + TALKING["conversations"]},
     "roles out of order"),
    ({"conversations": TALKING["conversations"][:1] * 2 + TALKING["conversations"]},
     "roles out of order"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " "},
                        *TALKING["conversations"]]}, "empty turn"),
    ({"conversations": [{"from": "human", "value": None}]},
     "conversations is neither text nor messages"),
    ({"prompt": "Hi", "label": "Good."}, "dialogue does not end with a user turn"),
    ({"chosen": GOOD, "rejected": [user("Ho"), *BAD[1:]]},
     "dialogues differ before the last response"),
    ({"prompt": "Hi", "chosen": [user("Hi")], "rejected": "Bad."},
     "chosen does not end with an assistant turn"),
    ({"message_tree_id": "x", "prompt": None}, "message is not an object"),
    ({"message_tree_id": "x", "prompt": {"role": "assistant", "text": "Hi"}},
     "roles out of order"),
    ({"message_tree_id": "x", "prompt": {"role": "prompter", "text": "Hi", "replies": []}},
     "prompt without a response"),
    ({**ROW, "prompt": " \n"}, "empty prompt"),
    *[({**ROW, "prompt": prompt}, "prompt is neither text nor messages")
      for prompt in (None, ["Hi"], [{"role": "user"}])],
    *[({**ROW, "prompt": [turn, user("Hi")]}, "tool turns") for turn in (
        {"role": "tool", "content": "x"}, {"from": "observation", "value": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": [{"type": "tool_result", "content": "x"}]})],
    ({**ROW, "prompt": [{"role": "critic", "content": "x"}, user("Hi")]},
     'role "critic" is not system, user or assistant'),
    *[({**ROW, "prompt": prompt}, "dialogue does not end with a user turn")
      for prompt in ([], [user("Hi"), assistant("Yes")],
                     "Human:\n\nAssistant:")],
    ({**ROW, "chosen": ""}, "empty chosen"),
    ({**ROW, "rejected": " "}, "empty rejected"),
    ({**ROW, "chosen": 3}, "chosen is not text"),
    ({**ROW, "rejected": None}, "rejected is not text"),
    ({**ROW, "rejected": []}, "rejected is not text"),
    ({**ROW, "chosen": [{"role": "assistant"}]}, "chosen is not text"),
    ({**ROW, "rejected": "Good. "}, "chosen equals rejected"),
    ({**ROW, "prompt": "broken \ud83d emoji"}, "text is not valid Unicode"),
    ({**ROW, "rejected": "broken \ud83d emoji"}, "text is not valid Unicode"),
    *[({"chosen": chosen, "rejected": rejected}, reason) for chosen, rejected, reason in (
        (TALK_TEXT + " a", TALK_TEXT.replace("Hello", "2") + " b",
         "dialogues differ before the last response"),
        (TALK_TEXT + " a", TALK_TEXT + " b\n\nHuman: More\n\nAssistant: c",
         "dialogues differ before the last response"),
        (TALK_TEXT + " a", TALK_TEXT + " a", "chosen equals rejected"),
        (TALK_TEXT + " a", TALK_TEXT, "empty rejected"),
        (TALK_TEXT, TALK_TEXT + " b", "empty chosen"),
        (TALK_TEXT + " a\n\nHuman: End", TALK_TEXT + " a\n\nHuman: Stop",
         "dialogue does not end with an assistant turn"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "dialogue does not begin with Human:"),
        ("Yes", "No", "dialogue does not begin with Human:"),
        (TALK_TEXT + " a", None, "chosen or rejected is not text"))],
    ({**EVAL, "preference": 0}, "tie"),
    *[({**EVAL, "preference": preference}, "preference is not 0, 1 or 2")
      for preference in (3, None, "1", [1])],
])
def test_a_row_that_cannot_be_used_is_counted(row, reason):
    assert read([row]) == ([], {reason: 1})


def test_a_row_that_lacks_a_column_of_the_first_is_counted():
    assert read([ROW, {"prompt": "Hi", "chosen": "Good."}]) == (PAIR, {"no known data format": 1})


def test_alpaca_eval_names_the_better_output():
    better = [read([{**EVAL, "preference": preference}])[0][0].chosen for preference in (1, 2, 2.0)]
    assert better == ["First.", "Second.", "Second."]


def test_deleted_messages_of_a_tree_are_counted_and_the_others_used():
    replies = [{**reply, "deleted": reply["rank"] == 2} for reply in TREE["prompt"]["replies"]]
    (first, _), unused = read([{**TREE, "prompt": {**TREE["prompt"], "replies": replies}}])
    assert (first.chosen, first.rejected) == ("Good.", "Fair.")
    assert unused == {"deleted message": 1}


def test_messages_in_cycles_or_without_a_root_are_counted():
    cycle = [{**FLAT[1], "message_id": "a", "parent_id": "b"},
             {**FLAT[3], "message_id": "b", "parent_id": "a"},
             {**FLAT[3], "message_id": "c", "parent_id": "c"}]
    lost = [{**FLAT[3], "message_id": "d", "parent_id": "gone"},
            {**FLAT[4], "message_id": "e", "parent_id": "d"}]
    assert read([*FLAT, *cycle, *lost, FLAT[0], {**FLAT[0], "message_id": 3}])[1] == {
        "parent message is missing, or in a circle": 5, "message_id occurs twice": 1,
        "message_id or parent_id is not text": 1}


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


@pytest.mark.parametrize("one", formats.FORMATS, ids=lambda one: f"{one.names[0]} {one.columns[0]}")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_row_becomes_a_sample_or_is_counted(one, data):
    chosen = one
    columns = [data.draw(st.sampled_from(names)) for names, _ in one.fields()]
    row = data.draw(st.fixed_dictionaries({column: VALUE for column in columns}, optional={
        column: VALUE for column in ("system", "history", "label") if column not in columns}))
    rows = [row] if one.gather is None else one.gather([row])
    made = [one for row in rows for one in (
        [row] if isinstance(row, Unusable) else chosen.samples(row))]
    assert not any("\n" in str(reason) for reason in made if isinstance(reason, Unusable))
    samples = [sample for sample in made if isinstance(sample, Sample)]
    for sample in samples:
        assert sample.messages[-1]["role"] == "user"
        assert {message["role"] for message in sample.messages} <= {"system", "user", "assistant"}
        for text in (sample.messages[-1]["content"], sample.chosen, sample.rejected):
            assert text is None or text == text.rstrip() != "" or sample.lacking
        assert sample.messages[-1]["content"][0].strip()
        sample.prompt_key().encode()
        assert sample.chosen.strip() != (sample.rejected or "").strip() or sample.lacking
        assert bool(sample.chosen) is not bool(sample.lacking)


NODE = st.recursive(
    st.fixed_dictionaries({}, optional={"text": TEXT, "role": st.sampled_from(
        ["prompter", "assistant", "x"]), "rank": st.none() | st.integers(0, 3),
        "deleted": st.booleans(), "replies": ANYTHING}),
    lambda inner: st.fixed_dictionaries(
        {"text": TEXT, "role": st.sampled_from(["prompter", "assistant"]),
         "replies": st.lists(inner, max_size=3)}, optional={"rank": st.integers(0, 3)}),
    max_leaves=8)
MESSAGES = st.lists(st.fixed_dictionaries({
    "message_id": st.sampled_from(["a", "b", "c", "d", "", None]), "text": TEXT,
    "parent_id": st.sampled_from(["a", "b", "c", "e", "", None, 3]),
    "role": st.sampled_from(["prompter", "assistant"]),
    "rank": st.none() | st.integers(0, 2)}), max_size=8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees=st.lists(NODE, max_size=3), messages=MESSAGES)
def test_any_tree_and_any_flat_messages_are_read_to_the_end(trees, messages):
    rows = [{"message_tree_id": "x", "prompt": tree} for tree in trees]
    for given_rows in (rows, messages):
        for sample in read(given_rows)[0] if given_rows else []:
            roles = [message["role"] for message in sample.messages]
            assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
            assert len(roles) % 2
