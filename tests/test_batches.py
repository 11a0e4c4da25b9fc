"""Rows of ids become padded batches: which side, which mask, how much they weigh."""

import dataclasses

import pytest
import torch

from alpaca_rlhf.utils.data.batches import (
    PairBatch,
    collate_pairs,
    collate_prompts,
    collate_tokens,
    pad,
)

TOKENS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [5, 9], "labels": [-100, 9]},
]
PAIRS = [
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]},
    {"chosen_ids": [9], "rejected_ids": [9, 6, 7, 8]},
]
PROMPTS = [{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8]}]


def test_padding_on_the_right():
    ids, mask = pad([[1, 2], [3]], 9)
    assert ids.tolist() == [[1, 2], [3, 9]]
    assert mask.tolist() == [[1, 1], [1, 0]]


def test_padding_on_the_left():
    ids, mask = pad([[1, 2], [3]], 9, left=True)
    assert ids.tolist() == [[1, 2], [9, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(("left", "expected"), [(False, [[1, 9, 9]]), (True, [[9, 9, 1]])])
def test_padding_to_a_length(left, expected):
    assert pad([[1]], 9, left, length=3)[0].tolist() == expected


def test_padding_of_nothing():
    ids, mask = pad([], 9)
    assert ids.shape == mask.shape == (0, 0)


def test_an_id_that_equals_pad_is_not_masked():
    assert pad([[0, 1, 0], [2]], 0)[1].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_tokens_are_padded_right_and_pads_are_not_trained():
    batch = collate_tokens(TOKENS, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]


def test_tokens_weigh_what_is_predicted():
    assert collate_tokens(TOKENS, pad_id=0).weight() == 3


def test_the_first_token_is_predicted_from_nothing_and_weighs_nothing():
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert collate_tokens([row], pad_id=0).weight() == 2


def test_pairs_are_padded_right_together_chosen_first():
    batch = collate_pairs(PAIRS, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [9, 0, 0, 0], [5, 8, 0, 0], [9, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_pairs_weigh_one_each():
    assert collate_pairs(PAIRS, pad_id=0).weight() == 2


def test_prompts_are_padded_left():
    batch = collate_prompts(PROMPTS, pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("batch", [
    collate_tokens(TOKENS, 0), collate_pairs(PAIRS, 0), collate_prompts(PROMPTS, 0)],
    ids=lambda batch: type(batch).__name__)
def test_every_tensor_holds_whole_numbers_and_moves_along(batch):
    moved = batch.to(torch.device("meta"))
    assert type(moved) is type(batch)
    for entry in dataclasses.fields(batch):
        assert getattr(batch, entry.name).dtype == torch.long
        assert getattr(moved, entry.name).device.type == "meta"
        assert getattr(moved, entry.name).shape == getattr(batch, entry.name).shape


def test_a_batch_cannot_be_changed():
    batch = collate_pairs(PAIRS, pad_id=0)
    assert isinstance(batch, PairBatch)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.input_ids = torch.zeros(1)
