"""Public preference data beside the repository, where it is there: every row used or accounted for.

The expected numbers are checked against a second, plainer reading of each file.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from loading import Loaded, load

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ALPACA_EVAL = SHARED / "alpaca_eval" / "alpaca-7b_vs_text_davinci_003.json.gz"
HH_RLHF = SHARED / "hh_rlhf" / "harmless-base.jsonl.gz"
OASST = SHARED / "oasst" / "en_trees_70.jsonl.gz"
SEED_TASKS = SHARED / "alpaca" / "seed_tasks.jsonl"


def loaded(path: Path, name: str = "") -> Loaded:
    if not path.is_file():
        pytest.skip(f"no {path.name} in ../shared/data/{path.parent.name}")
    return load([f"{name}={path}" if name else str(path)])


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def test_alpaca_eval_is_used_but_for_its_ties():
    data = loaded(ALPACA_EVAL)
    assert (len(data.train), len(data.held_out)) == (789, 0)
    assert data.filtered_out == {"tie": 16}
    rows = json.loads(text_of(ALPACA_EVAL))
    assert Counter(row["preference"] == 0 for row in rows) == {False: 789, True: 16}


def test_alpaca_eval_pairs_are_those_of_the_file():
    data = loaded(ALPACA_EVAL)
    rows = [row for row in json.loads(text_of(ALPACA_EVAL)) if row["preference"]]
    for row, sample in zip(rows, data.train, strict=True):
        worse = 3 - int(row["preference"])
        assert [m["role"] for m in sample.messages] == ["user"]
        assert sample.messages[0]["content"] == row["instruction"].strip()
        assert sample.rejected == row[f"output_{worse}"].strip()
        assert sample.chosen == row[f"output_{3 - worse}"].strip()


MARK = "\n\nAssistant:"


def plainly_read() -> tuple[list[tuple[str, str, str]], Counter[str]]:
    """(dialogue, chosen, rejected) of the usable pairs, and a count of the others by reason."""
    pairs, reasons = [], Counter[str]()
    for line in text_of(HH_RLHF).splitlines():
        row = json.loads(line)
        (before, chosen), (other, rejected) = (
            row[side].rsplit(MARK, 1) for side in ("chosen", "rejected"))
        if before != other:
            reasons["dialogues differ before the last response"] += 1
        elif not chosen.strip():
            reasons["empty chosen"] += 1
        else:
            pairs.append((before, chosen.strip(), rejected.strip()))
    return pairs, reasons


@pytest.mark.parametrize("name", ["", "Anthropic/hh-rlhf"])
def test_hh_rlhf_is_used_but_for_empty_responses_and_pairs_that_part_early(name):
    data = loaded(HH_RLHF, name)
    assert (len(data.train), len(data.held_out)) == (1495, 0)
    assert data.filtered_out == {"empty chosen": 4, "dialogues differ before the last response": 1}
    pairs, reasons = plainly_read()
    assert (len(pairs), reasons) == (1495, data.filtered_out)


def test_hh_rlhf_pairs_are_those_of_the_file():
    data = loaded(HH_RLHF)
    names = {"user": "Human", "assistant": "Assistant"}
    for (before, chosen, rejected), sample in zip(plainly_read()[0], data.train, strict=True):
        turns = [f"{names[m['role']]}: {m['content']}" for m in sample.messages]
        assert "".join("\n\n".join(turns).split()) == "".join(before.split())
        assert (sample.chosen, sample.rejected) == (chosen, rejected)


def test_hh_rlhf_dialogues_begin_and_end_with_the_user():
    data = loaded(HH_RLHF)
    roles = [[message["role"] for message in sample.messages] for sample in data.train]
    assert {(turns[0], turns[-1]) for turns in roles} == {("user", "user")}
    # In three dialogues of the file the assistant speaks twice in a row.
    alternate = [turns == ["user", "assistant"] * (len(turns) // 2) + ["user"] for turns in roles]
    assert alternate.count(False) == 3


def replied_to(node: dict, path: tuple = ()) -> list[tuple]:
    """(dialogue, best response, worst response or None) of each prompter's turn of a tree."""
    found = []
    said = (*path, node["text"].strip())
    if node["role"] == "prompter":
        ranked = sorted((one["rank"], one["text"]) for one in node["replies"] if "rank" in one)
        texts = [text for _, text in ranked] or [one["text"] for one in node["replies"][:1]]
        worst = texts[-1].strip() if len(texts) > 1 else None
        found.append((said, texts[0].strip() if texts else None, worst))
    for reply in node["replies"]:
        found += replied_to(reply, said)
    return found


@pytest.mark.parametrize("name", ["", "OpenAssistant/oasst1"])
def test_open_assistants_trees_are_used_but_for_turns_without_a_response(name):
    data = loaded(OASST, name)
    assert (len(data.train), data.filtered_out) == (182, {"prompt without a response": 140})
    turns = [turn for line in text_of(OASST).splitlines()
             for turn in replied_to(json.loads(line)["prompt"])]
    assert Counter(best is None for _, best, _ in turns) == {False: 182, True: 140}
    samples = Counter((tuple(m["content"] for m in one.messages), one.chosen, one.rejected)
                      for one in data.train)
    assert samples == Counter(turn for turn in turns if turn[1] is not None)
    assert sum(one.rejected is None for one in data.train) == 36


def test_seed_tasks_give_a_sample_for_each_instance():
    data = loaded(SEED_TASKS)
    rows = [json.loads(line) for line in text_of(SEED_TASKS).splitlines()]
    instances = [(row["instruction"], one) for row in rows for one in row["instances"]]
    assert (len(rows), len(data.train), data.filtered_out) == (175, len(instances), {})
    for (instruction, one), sample in zip(instances, data.train, strict=True):
        assert sample.chosen == one["output"].strip()
        (message,) = sample.messages
        assert message.get("input", "") == one["input"].strip()
        assert message["content"].startswith(instruction.strip())
