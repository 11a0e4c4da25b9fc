"""Batches: padding, masks and weights; which rows, on which rank; rows of plain text."""

import dataclasses
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import word_tokenizer

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import PPOConfig
from alpaca_rlhf.utils.data.batches import (
    collate_pairs,
    collate_prompts,
    collate_tokens,
    covering_batches,
    length_grouped,
    length_groups,
    micro_batches,
    pad,
    rank_batches,
    shuffled,
    text_batches,
    text_rows,
)
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.errors import UserError

TOKENS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"input_ids": [5, 9], "labels": [-100, 9]},
]
PAIRS = [
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]},
    {"chosen_ids": [9], "rejected_ids": [9, 6, 7, 8]},
]
PROMPTS = [{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8]}]


@pytest.mark.parametrize(("rows", "options", "ids", "mask"), [
    ([[1, 2], [3]], {}, [[1, 2], [3, 9]], [[1, 1], [1, 0]]),
    ([[1, 2], [3]], {"left": True}, [[1, 2], [9, 3]], [[1, 1], [0, 1]]),
    ([], {}, [], []),
    # An id that equals the padding's is not masked.
    ([[9, 1, 9], [2]], {}, [[9, 1, 9], [2, 9, 9]], [[1, 1, 1], [1, 0, 0]]),
])
def test_rows_are_padded_and_masked_on_one_side(rows, options, ids, mask):
    padded, masked = pad(rows, 9, **options)
    assert (padded.tolist(), masked.tolist()) == (ids, mask)


def test_tokens_are_padded_right_and_padding_is_not_trained():
    batch = collate_tokens(TOKENS, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert batch.weight() == 3


def test_the_first_token_is_not_predicted_and_weighs_nothing():
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert collate_tokens([row], pad_id=0).weight() == 2


def test_pairs_are_padded_right_together_chosen_first():
    batch = collate_pairs(PAIRS, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [9, 0, 0, 0], [5, 8, 0, 0], [9, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.weight() == 2


def test_prompts_are_padded_left():
    batch = collate_prompts(PROMPTS, pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("batch", [
    collate_tokens(TOKENS, 0), collate_pairs(PAIRS, 0), collate_prompts(PROMPTS, 0)],
    ids=lambda batch: type(batch).__name__)
def test_a_batch_holds_whole_numbers_moves_as_one_and_cannot_be_changed(batch):
    moved = batch.to(torch.device("meta"))
    assert type(moved) is type(batch)
    for entry in dataclasses.fields(batch):
        assert getattr(batch, entry.name).dtype == torch.long
        assert getattr(moved, entry.name).device.type == "meta"
        assert getattr(moved, entry.name).shape == getattr(batch, entry.name).shape
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.input_ids = torch.zeros(1)


# --- order ---------------------------------------------------------------------------------------

LENGTHS = [(37 * i * i) % 101 + 1 for i in range(1003)]


@pytest.mark.parametrize("order", [
    lambda seed, epoch: shuffled(1003, seed, epoch),
    lambda seed, epoch: length_grouped(LENGTHS, 8, seed, epoch),
], ids=["shuffled", "length_grouped"])
def test_an_order_has_every_row_once_and_is_fixed_by_seed_and_epoch(order):
    orders = order(1, 0), order(1, 1), order(2, 0)
    assert all(sorted(rows) == list(range(1003)) for rows in orders)
    assert order(1, 0) == orders[0]
    first, *others = ({frozenset(rows[i : i + 8]) for i in range(0, 1003, 8)} for rows in orders)
    assert all(len(first & other) < 10 for other in others)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 400, 401, 1003])
def test_batches_have_rows_of_similar_length_and_come_in_no_order_of_length(n):
    order = length_grouped(LENGTHS[:n], 8, seed=1, epoch=3)
    assert sorted(order) == list(range(n))
    batches = [[LENGTHS[row] for row in order[i : i + 8]] for i in range(0, n - 7, 8)]
    if n >= 400:
        spread = [max(batch) - min(batch) for batch in batches]
        assert sum(spread) / len(spread) < 6  # of 101; shuffled it is 78
        rises = [sum(one) < sum(other) for one, other in zip(batches, batches[1:], strict=False)]
        assert 0.35 < sum(rises) / len(rises) < 0.65


@pytest.mark.parametrize("order", [
    shuffled(24, seed=1, epoch=0), length_grouped(LENGTHS, 8, seed=1, epoch=0)],
    ids=["shuffled", "length_grouped"])
@pytest.mark.parametrize("world", [2, 4])
def test_n_ranks_with_batch_b_see_what_one_rank_with_batch_n_b_sees(order, world):
    alone = rank_batches(order, 2 * world, 0, 1)
    dealt = [rank_batches(order, 2, rank, world) for rank in range(world)]
    together = [sorted(sum(batches, [])) for batches in zip(*dealt, strict=True)]
    assert together == [sorted(batch) for batch in alone][: len(together)]
    assert len(together) * 2 * world > len(order) - world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 7, 8, 12, 25])
def test_ranks_have_as_many_batches_and_fewer_rows_than_ranks_are_left_out(n, world):
    order = shuffled(n, seed=1, epoch=0)
    dealt = [rank_batches(order, 2, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    assert all(batch for batches in dealt for batch in batches)
    taken = [row for batches in dealt for batch in batches for row in batch]
    assert n - len(taken) < world
    assert sorted(taken) == sorted(order[: len(taken)])


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), most=st.integers(1, 200))
def test_micro_batches_by_tokens_hold_each_row_once_and_are_as_full_as_allowed(lengths, most):
    cuts = [[lengths[row] for row in cut]
            for cut in micro_batches(range(len(lengths)), lengths, 4, most)]
    assert sum(cuts, []) == sorted(lengths, reverse=True)
    for cut in cuts:
        assert len(cut) == 1 or len(cut) * cut[0] <= most
    assert all((len(cut) + 1) * cut[0] > most for cut in cuts[:-1])


@pytest.mark.parametrize(("lengths", "count", "expected"), [
    ([5, 90, 6, 88, 50], 2, [[0, 2], [4, 3, 1]]), ([5, 90, 6, 88, 50], 3, [[0, 2], [4], [3, 1]]),
    ([7, 7], 3, [[0], [1]]), ([3], 2, [[0]]), ([4, 9], 1, [[0, 1]]),
])
def test_groups_are_cut_where_that_saves_most_padding(lengths, count, expected):
    assert length_groups(lengths, count) == expected


@pytest.mark.parametrize(("others", "expected"), [
    ([(2, 5)], 3), ([(4, 5)], 4), ([(5, 5), (3, 9)], 5), ([(9, 9)], 5), ([(1, 2)], 2),
])
def test_every_rank_gets_as_many_micro_batches_as_the_rank_that_needs_most(
    monkeypatch, others, expected
):
    """`others`: (micro-batches, rows) of the other ranks; never more than a rank has rows."""
    monkeypatch.setattr(distributed, "gather_rows", lambda mine: [*mine, *others])
    cuts = micro_batches(range(5), [9, 8, 7, 2, 1], 4, 18)
    assert len(cuts) == expected
    assert sum(cuts, []) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_an_evaluation_covers_each_row_once_with_as_many_batches_on_every_rank(n, world):
    dealt = [covering_batches(n, 2, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    counted = [i for batches in dealt for batch, counts in batches if counts for i in batch]
    assert sorted(counted) == list(range(n))


# --- plain text ----------------------------------------------------------------------------------

CHAT = ChatFormat(word_tokenizer("Human: Assistant: a b c"))  # ids 4 to 8, eos 2


@pytest.mark.parametrize(("text", "length", "expected"), [
    ("a b\nc\n\nb\n\n \n\na", 3, [[6, 7, 8], [2, 7, 2]]),  # each text ends with eos
    ("a b c", 4, [[6, 7, 8, 2]]),  # the last row is just full
    ("a </s> <unk> b", 3, [[6, 7, 2]]),  # spelled-out special tokens are left out
])
def test_text_is_cut_into_rows_that_are_trained_whole(tmp_path, text, length, expected):
    (tmp_path / "text.txt").write_text(text)
    rows = text_rows(str(tmp_path / "text.txt"), None, CHAT, length)
    assert rows == [{"input_ids": ids, "labels": ids} for ids in expected]


class Columns(dict):
    """A hub data set: columns by name."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_a_hub_set_is_read_by_its_column_text(monkeypatch):
    asked = []

    def found(name, configuration, split):
        asked.append((name, configuration, split))
        return Columns(text=["a b", "", "c"])

    monkeypatch.setattr("datasets.load_dataset", found)
    rows = text_rows("some/text", "v1", CHAT, 5)
    assert [row["input_ids"] for row in rows] == [[6, 7, 2, 8, 2]]
    assert asked == [("some/text", "v1", "train")]


def unreachable(*names, **options):
    raise ConnectionError("no route\nto host")


@pytest.mark.parametrize(("content", "hub", "line"), [
    (b"a b c", None, "holds 4 tokens, less than one row of 5 (--max_prompt_seq_len + "
     "--max_answer_seq_len); give more text, or shorten the rows"),
    (b"a b \xff", None, "not UTF-8 at byte 4; convert the file"),
    (None, unreachable, "no such file, and the hub did not give it (ConnectionError); give a local "
     "text file"),
    (None, lambda *names, **options: Columns(a=[], b=[]),
     "no column text; there are a, b; give a data set with one, or a local text file"),
])
def test_text_that_cannot_be_used_is_refused(tmp_path, monkeypatch, content, hub, line):
    name = "some/text"
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
        name = str(tmp_path / "text.txt")
    monkeypatch.setattr("datasets.load_dataset", hub)
    with pytest.raises(UserError) as refused:
        text_rows(name, None, CHAT, 5)
    assert str(refused.value) == f"--unsupervised_dataset_name {name}: {line}"


def ids_of_iterations(path, rank=0, world=1, size=2, skip=0, monkeypatch=None) -> list:
    ppo = PPOConfig(unsupervised_dataset_name=path, per_device_training_batch_size=size)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    found = islice(text_batches(ppo, CHAT, length=1, count=2, skip=skip), 2)
    return [[batch.input_ids.flatten().tolist() for batch in batches] for batches in found]


def test_text_goes_round_over_iterations_and_ranks_and_resumes_where_it_was(tmp_path, monkeypatch):
    path = str(tmp_path / "text.txt")
    (tmp_path / "text.txt").write_text("Human: Assistant: a b c")  # 6 rows with eos
    alone = ids_of_iterations(path, monkeypatch=monkeypatch)
    assert alone == [[[4, 5], [6, 7]], [[8, 2], [4, 5]]]
    assert ids_of_iterations(path, skip=1, monkeypatch=monkeypatch)[0] == alone[1]
    ranks = [ids_of_iterations(path, rank, 2, size=1, monkeypatch=monkeypatch) for rank in (0, 1)]
    assert [[one + other for one, other in zip(*both, strict=True)]
            for both in zip(*ranks, strict=True)] == alone


def test_without_text_every_iteration_has_none():
    assert list(islice(text_batches(PPOConfig(), CHAT, length=1, count=2, skip=0), 2)) == [None] * 2
