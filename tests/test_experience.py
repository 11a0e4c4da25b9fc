"""Records of rollouts: joining those of different lengths, and cutting them into mini-batches."""

import dataclasses

import pytest
import torch

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience
from alpaca_rlhf.utils.data.batches import Rollout

OFFSETS = {"logprobs": 0, "ref_logprobs": 100, "values": 200, "advantages": 300, "returns": 400}


def made(prompts, responses):
    """Prompts padded left and responses padded right with 0.

    Numbers name their row and position: row + position / 10 inside the mask.
    """
    p, r = max(map(len, prompts)), max(map(len, responses))
    pairs = list(zip(prompts, responses, strict=True))
    ids = [[0] * (p - len(a)) + a + b + [0] * (r - len(b)) for a, b in pairs]
    kept = [[0] * (p - len(a)) + [1] * len(a + b) + [0] * (r - len(b)) for a, b in pairs]
    mask, rows = torch.tensor(kept)[:, p:], torch.arange(len(pairs))
    numbers = (rows.unsqueeze(-1) + torch.arange(r) / 10) * mask
    return Experience(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(kept), response_mask=mask,
        decoded_logprobs=mask / 8, score=rows.float(), has_eos=rows % 2 == 0,
        **{name: numbers + offset for name, offset in OFFSETS.items()},
    )


FIRST = made([[1, 2, 3], [4]], [[10, 11], [12]])
SECOND = made([[5, 6]], [[13, 14, 15, 16]])
JOINED = Experience.joined([FIRST, SECOND])


def rows(record):
    """Prompt ids and response ids inside the masks, row by row."""
    split = record.input_ids.shape[1] - record.response_length
    return [
        (ids[:split][mask[:split].bool()].tolist(), tokens[kept.bool()].tolist())
        for ids, mask, tokens, kept in zip(
            record.input_ids, record.attention_mask, record.responses, record.response_mask,
            strict=True,
        )
    ]


def test_joining_keeps_every_prompt_and_response_and_masks_the_padding_it_adds():
    assert type(JOINED) is Experience
    assert rows(JOINED) == [([1, 2, 3], [10, 11]), ([4], [12]), ([5, 6], [13, 14, 15, 16])]
    assert (JOINED.input_ids.shape, JOINED.response_mask.shape) == ((3, 7), (3, 4))
    assert (JOINED.attention_mask.sum(), JOINED.weight()) == (13, 7)


def test_the_responses_are_the_last_columns():
    assert SECOND.responses.tolist() == [[13, 14, 15, 16]]
    assert FIRST.responses.tolist() == [[10, 11], [12, 0]]


def test_joined_numbers_stay_with_their_tokens():
    for name, offset in OFFSETS.items():
        inside = getattr(JOINED, name)[JOINED.response_mask.bool()] - offset
        expected = torch.tensor([0, 0.1, 1.0, 0, 0.1, 0.2, 0.3])
        assert torch.allclose(inside, expected, atol=1e-3), name
    assert JOINED.score.tolist() == [0.0, 1.0, 0.0]


def test_picked_rows_lose_the_columns_that_are_padding_in_all_of_them():
    picked = JOINED.rows([1, 0])
    assert rows(picked) == [([4], [12]), ([1, 2, 3], [10, 11])]
    assert (picked.input_ids.shape, picked.advantages.shape) == ((2, 5), (2, 2))
    assert picked.score.tolist() == [1.0, 0.0]
    assert rows(JOINED.rows([1])) == [([4], [12])]
    assert JOINED.rows([1]).input_ids.shape == (1, 2)


def test_a_row_without_response_tokens_is_kept():
    ids, mask = torch.tensor([[1, 5], [2, 0]]), torch.tensor([[1], [0]])
    empty = Rollout(ids, torch.tensor([[1, 1], [1, 0]]), mask, mask * 0.0)
    assert rows(Rollout.joined([empty, empty])) == [([1], [5]), ([2], [])] * 2
    assert rows(empty.rows([1])) == [([2], [])]
    assert empty.rows([1]).response_mask.shape == (1, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_mini_batches_hold_each_row_once_in_the_order_given(size):
    joined, order = Experience.joined([JOINED, FIRST]), [3, 0, 4, 2, 1]
    batches = [joined.rows(order[i : i + size]) for i in range(0, len(order), size)]
    assert [row for batch in batches for row in rows(batch)] == [rows(joined)[i] for i in order]
    assert [len(batch) for batch in batches][:-1] == [size] * (len(batches) - 1)
    assert sum(batch.weight() for batch in batches) == joined.weight()


def test_a_record_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FIRST.response_mask = None
