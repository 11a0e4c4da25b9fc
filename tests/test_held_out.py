"""What an evaluation measures on: what a run held out, as it has recorded it with its model."""

import json

import numpy as np
import pytest

from alpaca_rlhf.evaluation import held_out
from alpaca_rlhf.utils.data import sources as raw_datasets
from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.sources import Tally
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.errors import UserError

DEFAULT = Split(3, (2.0, 4.0, 4.0), 1234)


def wanted(**changes):
    usual = {"data_path": (), "seed": None, "shares": None, "languages": (), "part": "held_out",
             "limit": 0, "pairs": True}
    return held_out.Wanted(**{**usual, **changes})


@pytest.fixture
def run(tmp_path):
    """300 pairs, 2 to a prompt, and the folder of a model trained on them with seed 7."""
    rows = [{"prompt": f"What is {i // 2}?", "chosen": f"It is {i}.", "rejected": "No."}
            for i in range(300)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    model.mkdir()
    record = {"step": 2, "seed": 7, "shares": [1.0, 1.0, 0.0], "languages": [],
              "data": [{"data_set": str(data), "share": 1.0, "fingerprint": "x"}]}
    (model / "data_split.json").write_text(json.dumps(record))
    return data, model


def prompts(chosen):
    return {sample.prompt_key() for sample in chosen.samples}


def test_a_models_record_says_what_was_held_out(run):
    data, model = run
    chosen = held_out.choose(wanted(), [str(model)], DEFAULT)
    split = Split(2, (1.0, 1.0, 0.0), 7)
    sources = raw_datasets.open_sources([str(data)])
    expected = {one.key for one in splitting.placed(sources, split, [Tally()]) if one.step == 0}
    assert 1 < len(expected) < 30
    assert prompts(chosen) == expected and len(chosen.samples) == 2 * len(expected)
    assert (chosen.seed, chosen.embedded) == (7, False)


def test_flags_win_over_the_record_and_a_seed_that_differs_is_told(run):
    data, model = run
    (model / "trained_prompts.npy").unlink(missing_ok=True)
    np.save(model / "trained_prompts.npy", np.array([], dtype=np.int64))
    chosen = held_out.choose(wanted(seed=8), [str(model)], DEFAULT)
    assert chosen.seed == 8
    assert any("--seed 8 here, 7 for the model" in note for note in chosen.notes)


def test_prompts_that_the_model_was_trained_on_are_told(run):
    data, model = run
    chosen = held_out.choose(wanted(), [str(model)], DEFAULT)
    digest = splitting.digest(chosen.samples[0].prompt_key())
    trained = np.array([int.from_bytes(digest, "big", signed=True)], dtype=np.int64)
    np.save(model / "trained_prompts.npy", trained)
    notes = held_out.choose(wanted(), [str(model)], DEFAULT).notes
    assert any("was trained on 1 of this run's" in note for note in notes)


def test_the_record_of_the_folder_around_an_adapter_counts(run):
    _, model = run
    (model / "adapter").mkdir()
    assert held_out.record_folder(str(model / "adapter")) == model


def test_prompts_count_once_pairs_each_time_and_a_limit_is_drawn_by_the_seed(run):
    data, model = run
    everything = wanted(part="all", data_path=(str(data),))
    assert len(held_out.choose(everything, [], DEFAULT).samples) == 300
    once = held_out.choose(wanted(part="all", data_path=(str(data),), pairs=False), [], DEFAULT)
    assert len(once.samples) == 150
    few = [held_out.choose(wanted(part="all", data_path=(str(data),), limit=5, seed=seed), [],
                           DEFAULT).samples for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2] and len(few[0]) == 5


def test_without_a_record_and_data_it_is_the_embedded_data():
    chosen = held_out.choose(wanted(limit=3), [], DEFAULT)
    assert chosen.embedded and len(chosen.samples) == 3


def test_nothing_held_out_is_said_with_its_remedy(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="no prompt is held out; take --part all"):
        held_out.choose(wanted(data_path=(str(tmp_path / "one.jsonl"),), pairs=False), [], DEFAULT)
    with pytest.raises(UserError, match="has no pair with a chosen and a rejected reply"):
        held_out.choose(wanted(data_path=(str(tmp_path / "one.jsonl"),), part="all"), [], DEFAULT)
