"""Records of rollouts: joining those of unlike lengths, and cutting them into mini-batches."""

import dataclasses

import pytest
import torch

from alpaca_rlhf.training_model.step3_rlhf_finetuning.experience import Experience, Rollout


def rollout(prompts, responses):
    """Prompts padded left and responses padded right with 0."""
    p, r = max(map(len, prompts)), max(map(len, responses))
    ids = [[0] * (p - len(a)) + a + b + [0] * (r - len(b))
           for a, b in zip(prompts, responses, strict=True)]
    ids = torch.tensor(ids)
    mask = torch.tensor([[1] * len(b) + [0] * (r - len(b)) for b in responses])
    prompt_mask = torch.tensor([[0] * (p - len(a)) + [1] * len(a) for a in prompts])
    return Rollout(ids, torch.cat([prompt_mask, mask], dim=-1), mask, mask / 8)


def experience(base):
    """Numbers that name their row and place: row + place / 10 inside the mask."""
    rows, length = base.response_mask.shape
    numbers = torch.arange(rows).unsqueeze(-1) + torch.arange(length) / 10
    marked = numbers * base.response_mask
    return Experience(
        **{f.name: getattr(base, f.name) for f in dataclasses.fields(Rollout)},
        logprobs=marked, ref_logprobs=marked + 100, values=marked + 200,
        score=torch.arange(rows).float(), has_eos=torch.arange(rows) % 2 == 0,
        advantages=marked + 300, returns=marked + 400,
    )


FIRST = rollout([[1, 2, 3], [4]], [[10, 11], [12]])
SECOND = rollout([[5, 6]], [[13, 14, 15, 16]])


def rows(record):
    """What stands inside the masks, row by row: prompt ids and response ids."""
    split = record.input_ids.shape[1] - record.response_length
    return [
        (ids[:split][mask[:split].bool()].tolist(), ids[split:][kept.bool()].tolist())
        for ids, mask, kept in zip(
            record.input_ids, record.attention_mask, record.response_mask, strict=True
        )
    ]


def test_joining_keeps_every_prompt_and_response_and_masks_what_it_adds():
    joined = Rollout.joined([FIRST, SECOND])
    assert joined.input_ids.shape == (3, 7)
    assert joined.response_mask.shape == (3, 4)
    assert rows(joined) == [([1, 2, 3], [10, 11]), ([4], [12]), ([5, 6], [13, 14, 15, 16])]
    assert joined.attention_mask.sum() == 13
    assert joined.weight() == 7


def test_the_responses_are_the_last_columns():
    assert SECOND.responses.tolist() == [[13, 14, 15, 16]]
    assert FIRST.responses.tolist() == [[10, 11], [12, 0]]


def test_joined_numbers_stay_with_their_tokens():
    joined = Experience.joined([experience(FIRST), experience(SECOND)])
    kept = joined.response_mask.bool()
    for name, offset in (("logprobs", 0), ("ref_logprobs", 100), ("values", 200),
                         ("advantages", 300), ("returns", 400)):
        inside = getattr(joined, name)[kept] - offset
        expected = torch.tensor([0, 0.1, 1.0, 0, 0.1, 0.2, 0.3])
        assert torch.allclose(inside, expected, atol=1e-3), name
    assert joined.score.tolist() == [0.0, 1.0, 0.0]


def test_rows_picks_rows_and_drops_the_columns_that_are_padding_in_all_of_them():
    joined = Experience.joined([experience(FIRST), experience(SECOND)])
    picked = joined.rows([1, 0])
    assert rows(picked) == [([4], [12]), ([1, 2, 3], [10, 11])]
    assert picked.input_ids.shape == (2, 5)
    assert picked.advantages.shape == (2, 2)
    assert picked.score.tolist() == [1.0, 0.0]
    assert rows(joined.rows([1])) == [([4], [12])]
    assert joined.rows([1]).input_ids.shape == (1, 2)


def test_a_row_without_response_tokens_is_kept():
    empty = dataclasses.replace(
        FIRST, response_mask=torch.tensor([[1, 1], [0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]),
    )
    assert len(Rollout.joined([empty, SECOND])) == 3
    assert rows(empty.rows([1])) == [([4], [])]
    assert empty.rows([1]).response_mask.shape == (1, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_mini_batches_hold_each_row_once_in_the_order_given(size):
    joined = Experience.joined([experience(FIRST), experience(SECOND), experience(FIRST)])
    batches = joined.mini_batches(size, [3, 0, 4, 2, 1])
    expected = [rows(joined)[i] for i in [3, 0, 4, 2, 1]]
    assert [row for batch in batches for row in rows(batch)] == expected
    assert [len(batch) for batch in batches][:-1] == [size] * (len(batches) - 1)
    assert sum(batch.weight() for batch in batches) == joined.weight()


def test_a_record_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FIRST.response_mask = None
