"""The reward model: where its score is read, its head, and the statistics saved beside it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2ForSequenceClassification

from alpaca_rlhf.utils.configs import LoadingConfig, RoleConfig
from alpaca_rlhf.utils.data.batches import pad
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model.reward_model import (
    TokenScorer,
    is_reward_model,
    load_statistics,
    save_statistics,
    scores,
)

# Rows of 9, 4 and 6 tokens; the second has the pad id (3) in its text, the third ends with it.
ROWS = [[1, 50, 60, 70, 80, 90, 100, 110, 2], [1, 40, 3, 2], [1, 30, 31, 32, 33, 3]]


@pytest.fixture(scope="module")
def scorer(small):
    return TokenScorer(small.reward_model()).eval()


@pytest.fixture
def absolute(small):
    """A model with absolute positions."""
    torch.manual_seed(0)
    return TokenScorer(GPT2ForSequenceClassification(GPT2Config(
        vocab_size=len(small.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
        initializer_range=0.5, num_labels=1, pad_token_id=3,
    ))).eval()


@torch.no_grad()
@pytest.mark.parametrize("model", ["scorer", "absolute"])
def test_a_text_has_one_score_padded_left_or_right_with_whatever_ids(model, request):
    scorer = request.getfixturevalue(model)
    alone = torch.cat([scores(scorer, *pad([row], 3)) for row in ROWS])
    assert alone.std() > 0.1
    for left in (False, True):
        for longer in ([], [[1] * 15]):
            ids, mask = (rows[: len(ROWS)] for rows in pad([*ROWS, *longer], 3, left))
            assert_close(scores(scorer, ids, mask), alone, rtol=1e-5, atol=1e-5)
            other = ids.masked_fill(mask == 0, 77)
            assert_close(scores(scorer, other, mask), alone, rtol=1e-5, atol=1e-5)
            for groups in ([([1], 4), ([2, 0], 9)], [([2], 6), ([1], 4), ([0], 9)]):
                assert_close(scores(scorer, ids, mask, groups), alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_value_depends_only_on_the_tokens_up_to_it(scorer):
    ids, _ = pad(ROWS[:1], 3)
    changed = ids.clone()
    changed[0, 6:] = 200
    first, second = scorer(ids), scorer(changed)
    assert_close(first[:, :6], second[:, :6], rtol=1e-6, atol=1e-6)
    assert (first[:, 6:] - second[:, 6:]).abs().min() > 1e-3


@torch.no_grad()
def test_the_score_is_the_one_that_transformers_pools(small, scorer):
    rows = [ROWS[0], [1, 40, 41, 2]]  # transformers finds pads by their id: no text may have one
    ids, mask = pad(rows, small.tokenizer.pad_token_id)
    theirs = small.reward_model()(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    assert_close(scores(scorer, ids, mask), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_values_of_a_half_precision_model_are_fp32(small):
    assert TokenScorer(small.reward_model(dtype="bf16"))(pad(ROWS, 3)[0]).dtype == torch.float32


def test_a_new_head_has_std_1_over_root_of_hidden_size_plus_1(small):
    torch.manual_seed(0)
    weights = torch.stack([small.reward_model(small.actor).score.weight for _ in range(20)])
    assert weights.shape == (20, 1, 32)
    # 640 numbers: four standard errors on either side.
    assert weights.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.12)
    assert weights.mean().abs() < 4 / math.sqrt(33 * 640)


def test_a_reward_model_is_a_classifier_with_one_label(small, tmp_path):
    config = json.loads((Path(small.critic) / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path, expected in ((small.critic, True), (small.actor, False), (str(tmp_path), False)):
        assert is_reward_model(RoleConfig(model_name_or_path=path), LoadingConfig()) is expected


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
        f"--critic_model_name_or_path {tmp_path}: the mean and standard deviation of its scores, "
        "which step 2 saves, are missing or broken; run step 2 again, or "
        "take --reward_normalization reference"
    )
