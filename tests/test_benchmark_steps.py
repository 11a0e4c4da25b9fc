"""benchmarks/steps.py: our own contender at few steps, the choice of steps, the arithmetic."""

import importlib
import json
import sys

import pytest
from conftest import small_config, small_tokenizer
from programs import REPOSITORY


@pytest.fixture
def benchmark(monkeypatch):
    """Import a module of the folder, which is no package."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with places for 128 + 64 tokens."""
    from transformers import LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("model"), small_tokenizer()
    LlamaForCausalLM(small_config(tokenizer, max_position_embeddings=256)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_our_contender_trains_and_fills_the_table(
    benchmark, model, monkeypatch, tmp_path, capsys
):
    file, pairs = tmp_path / "figures.json", tmp_path / "pairs.jsonl"
    pairs.write_text("".join(
        json.dumps({"prompt": f"Count to {i}.", "chosen": "1 2 " * (i % 7 + 1), "rejected": "No."})
        + "\n" for i in range(60)))
    monkeypatch.setattr(sys, "argv", [
        "steps.py", "--model", str(model), "--data_path", str(pairs), "--settings",
        "--work", "sft", "ppo",
        "--rounds", "1", "--steps", "2", "--warmup", "1", "--max_seq_len", "64", "--batch", "4",
        "--threads", "1", "--json", str(file)])
    benchmark("steps").main()
    heading, _, names, _, *lines = capsys.readouterr().out.splitlines()[-6:]
    assert "fp32" in heading and names.startswith("| work | contender | speed")
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| step 1, loss on all tokens", "ours"], ["| step 3", "ours"]]
    sft, ppo = (result["reports"]["ours"][0]
                        for result in json.loads(file.read_text())["results"])
    assert (sft["rows"], ppo["rows"]) == (8, 32)
    # Real tokens are some of the positions: a step lost, or one counted twice, would not be.
    for report in (sft, ppo):
        assert 0.5 < report["tokens"] / report["positions"] <= 1
    assert sft["trained"] == sft["tokens"] - 8  # loss on all tokens but the first of each row
    assert set(ppo["phases"]) == {"generation", "scoring", "update"}
    assert 0 < sum(ppo["phases"].values()) <= ppo["seconds"]


def test_the_largest_batch_comes_first_and_a_round_has_one_of_each_part_of_the_sizes(
    benchmark, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [1] * n}) + "\n" for n in range(1, 9)))
    workers = benchmark("step_workers")
    clock = object.__new__(workers.Clock)
    clock.rows = [json.loads(line) for line in rows.read_text().splitlines()]
    clock._job, clock._plan = {"warmup": 1, "rounds": 2, "steps": 2}, []
    epoch = [[row] for row in (3, 7, 0, 5, 1, 6, 2, 4)]
    assert clock.choose(epoch) == [[7], [2], [6], [0], [4]]


def test_arithmetic_is_six_for_a_weight_and_token_and_half_of_the_attention(benchmark):
    shape = benchmark("steps").Shape(layers=2, width=4, body=100, head=10)
    report = {"tokens": 5, "trained": 3, "squares": 13}
    assert shape.arithmetic(report) == 6 * (100 * 5 + 10 * 3) + 6 * 2 * 4 * 13


def test_the_sizes_of_a_model_leave_out_the_lookup(benchmark, model):
    # Two layers of 32: queries and outputs 32 x 32, keys and values 32 x 16, three of 32 x 48.
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert benchmark("steps").shape(str(model)) == (2, 32, layers, len(small_tokenizer()) * 32)
