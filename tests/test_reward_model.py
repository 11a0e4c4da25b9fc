"""The reward model: where its score is read, what its head is, and what is kept beside it."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2ForSequenceClassification

from alpaca_rlhf.utils.data.batches import pad
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model.causal_lm import LoadOptions
from alpaca_rlhf.utils.model.reward_model import (
    TokenScorer,
    is_reward_model,
    load_reward_model,
    load_statistics,
    save_statistics,
    scores,
)

# Rows of 9, 4 and 6 tokens; the second holds the pad id (3) as text, the third ends with it.
ROWS = [[1, 50, 60, 70, 80, 90, 100, 110, 2], [1, 40, 3, 2], [1, 30, 31, 32, 33, 3]]


@pytest.fixture(scope="module")
def scorer(small):
    return TokenScorer(small.reward_model()).eval()


@torch.no_grad()
def score(scorer, rows, **padding):
    return scores(scorer, *pad(rows, value=3, **padding))


def check_sides(scorer):
    """Left- and right-padded copies, and each row alone, get one score."""
    alone = torch.cat([score(scorer, [row]) for row in ROWS])
    assert alone.std() > 0.1
    for padding in ({}, {"left": True}, {"length": 15}, {"left": True, "length": 15}):
        assert_close(score(scorer, ROWS, **padding), alone, rtol=1e-5, atol=1e-5)


def test_left_and_right_padded_copies_of_a_text_get_the_same_score(scorer):
    check_sides(scorer)


def test_a_model_with_absolute_positions_gives_both_copies_the_same_score_too(small):
    torch.manual_seed(0)
    check_sides(TokenScorer(GPT2ForSequenceClassification(GPT2Config(
        vocab_size=len(small.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
        initializer_range=0.5, num_labels=1, pad_token_id=3,
    ))).eval())


def test_unmasked_pads_are_noticed(scorer, monkeypatch):
    forward = TokenScorer.forward
    monkeypatch.setattr(
        TokenScorer, "forward", lambda self, ids, mask: forward(self, ids, torch.ones_like(mask))
    )
    with pytest.raises(AssertionError):
        check_sides(scorer)


@torch.no_grad()
def test_what_id_stands_in_the_padding_changes_no_score(scorer):
    ids, mask = pad(ROWS, value=3)
    other = ids.masked_fill(mask == 0, 77)
    assert_close(scores(scorer, other, mask), scores(scorer, ids, mask), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_value_depends_on_what_stands_before_it_only(scorer):
    ids, mask = pad(ROWS[:1], value=3)
    changed = ids.clone()
    changed[0, 6:] = 200
    values = scorer(ids, mask), scorer(changed, mask)
    assert_close(values[0][:, :6], values[1][:, :6], rtol=1e-6, atol=1e-6)
    assert (values[0][:, 6:] - values[1][:, 6:]).abs().min() > 1e-3


@torch.no_grad()
def test_the_score_is_the_one_transformers_pools(small, scorer):
    rows = [ROWS[0], [1, 40, 41, 2]]  # it looks for pads by their id, so no text may hold one
    ids, mask = pad(rows, value=small.tokenizer.pad_token_id)
    theirs = small.reward_model()(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert_close(scores(scorer, ids, mask), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_values_are_fp32_in_a_half_precision_model(small):
    scorer = TokenScorer(small.reward_model(dtype=torch.bfloat16))
    assert scorer(*pad(ROWS, value=3)).dtype == torch.float32


def test_a_new_head_is_drawn_with_deviation_1_over_root_of_hidden_size_plus_1(small):
    torch.manual_seed(0)
    drawn = [
        load_reward_model(small.actor, small.tokenizer, LoadOptions(), small.config()).score.weight
        for _ in range(20)
    ]
    weights = torch.stack(drawn)
    assert weights.shape == (20, 1, 32)
    # 640 draws: four standard errors either way
    assert weights.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.12)
    assert weights.mean().abs() < 4 / math.sqrt(33 * 640)


def test_a_saved_reward_model_keeps_its_head(small):
    first, second = small.reward_model(), small.reward_model()
    assert first.score.weight.equal(second.score.weight)


def test_a_reward_model_is_told_from_a_causal_lm(small):
    assert is_reward_model(small.critic, LoadOptions())
    assert not is_reward_model(small.actor, LoadOptions())


def test_a_classifier_with_two_labels_is_no_reward_model(small, tmp_path):
    config = json.loads((small.folder / "critic" / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not is_reward_model(str(tmp_path), LoadOptions())


def test_score_statistics_are_read_as_they_were_saved(tmp_path):
    save_statistics(tmp_path, 0.25, 1.75, 12)
    assert load_statistics(str(tmp_path)) == (0.25, 1.75)


@pytest.mark.parametrize("content", [None, "{", '{"mean": 1.0}', '{"mean": "x", "std": 1}'])
def test_missing_or_broken_statistics_are_one_line_with_the_remedy(tmp_path, content):
    path = tmp_path / "score_statistics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        load_statistics(str(tmp_path))
    assert str(error.value) == (
        f"--reward_normalization checkpoint: {path} is missing or broken; run step 2 again, or "
        "take --reward_normalization reference"
    )
