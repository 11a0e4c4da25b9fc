"""Evaluations measure on what a run held out, according to the record in its model's folder."""

import json

import numpy as np
import pytest

from alpaca_rlhf.evaluation import held_out
from alpaca_rlhf.utils.configs import HeldOutConfig
from alpaca_rlhf.utils.data import split as splitting
from alpaca_rlhf.utils.data.sources import Tally, open_sources
from alpaca_rlhf.utils.data.split import Split
from alpaca_rlhf.utils.errors import UserError


def choose(*models, pairs=True, **changes):
    return held_out.choose(HeldOutConfig(**changes), [str(model) for model in models], pairs)


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


def test_a_models_record_gives_the_split(run):
    data, model = run
    chosen = choose(model)
    split = Split(2, (1.0, 1.0, 0.0), 7)
    placed = splitting.placed(open_sources([str(data)]), split, [Tally()])
    expected = {one.sample.prompt_key() for one in placed if one.step == 0}
    assert 1 < len(expected) < 30
    assert prompts(chosen) == expected and len(chosen.samples) == 2 * len(expected)
    assert (chosen.seed, chosen.embedded) == (7, False)


def test_flags_override_the_record_and_a_warning_names_the_difference(run, capsys):
    data, model = run
    np.save(model / "trained_prompts.npy", np.array([], dtype=np.int64))
    assert choose(model, seed=8).seed == 8
    assert "--seed 8 here, 7 for the model" in capsys.readouterr().out


def test_prompts_that_the_model_was_trained_on_are_reported(run, capsys):
    data, model = run
    digest = splitting.digest(choose(model).samples[0].prompt_key())
    trained = np.array([digest], dtype=np.int64)
    np.save(model / "trained_prompts.npy", trained)
    choose(model)
    assert "was trained on 1 of this run's" in capsys.readouterr().out


def test_the_record_of_the_folder_around_an_adapter_counts(run):
    _, model = run
    (model / "adapter").mkdir()
    assert held_out.record_folder(str(model / "adapter")) == model


def test_prompts_are_used_once_pairs_each_time_and_a_limit_samples_by_the_seed(run):
    data, _ = run
    everything = {"part": "all", "data_path": [str(data)]}
    assert len(choose(**everything).samples) == 300
    assert len(choose(pairs=False, **everything).samples) == 150
    few = [choose(limit=5, seed=seed, **everything).samples for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2] and len(few[0]) == 5


def test_without_a_record_and_data_it_is_the_embedded_data():
    chosen = choose(limit=3)
    assert (chosen.embedded, len(chosen.samples), chosen.seed) == (True, 3, 1234)
    assert chosen.description.endswith("(held out of all three steps) of embedded, seed 1234")


@pytest.mark.parametrize(("changes", "line"), [
    ({"pairs": False}, "no prompt is held out; give --part all"),
    ({"part": "all"}, "has no pair with a chosen and a rejected response"),
])
def test_data_without_any_use_is_refused_with_the_remedy(tmp_path, changes, line):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match=line):
        choose(data_path=[str(path)], **changes)
