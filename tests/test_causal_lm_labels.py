"""Numbers of some tokens of a causal LM: only their positions are projected."""

import pytest
import torch
from families import FAMILIES, save
from plain import forward_logits, token_loss
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from alpaca_rlhf.utils import losses
from alpaca_rlhf.utils.data.batches import pad
from alpaca_rlhf.utils.losses import IGNORE_INDEX
from alpaca_rlhf.utils.model.causal_lm import TokenHead, at_labels
from alpaca_rlhf.utils.rl_math import align

ROWS = [[1, *range(20, 30)], [1, 40, 41, 42, 43], [1, 50, 51, 52, 53, 54, 55]]


def batch():
    ids, mask = pad(ROWS, 3)
    labels = torch.where(mask.bool() & (torch.arange(ids.shape[1]) > 2), ids, IGNORE_INDEX)
    return ids, mask, labels


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_each_family_is_that_of_all_its_logits_with_a_mask(name, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save(FAMILIES[name], tmp_path / name)).eval()
    ids, mask, labels = batch()
    expected = token_loss(forward_logits(model, ids, mask), labels)
    right = gradients(expected, model)
    for _ in range(2):  # the first time shows whether the model gives its head's output as it is
        loss = at_labels(model, ids, labels, losses.token_loss)
        assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        found = gradients(loss, model)
        assert found.keys() == right.keys()
        for key, gradient in found.items():
            assert_close(gradient, right[key], rtol=1e-3, atol=1e-5)
    caps = getattr(model.config, "final_logit_softcapping", None) is not None
    assert model.get_output_embeddings().applies is not caps


@torch.no_grad()
def test_only_positions_that_predict_labels_are_projected_and_attention_gets_no_mask(
    small, monkeypatch
):
    model, seen = small.causal_lm(), []
    ids, _, labels = batch()
    right = losses.chosen_logprobs
    model.lm_head.register_forward_hook(lambda _, given, made: seen.append(tuple(made.shape)))
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda *given, **how: seen.append(how["attn_mask"]) or attend(*given, **how))
    found = at_labels(model, ids, labels, right)
    expected = forward_logits(model, *pad(ROWS, 3)).log_softmax(-1)[:, :-1]
    expected = expected.gather(-1, ids[:, 1:, None])[labels[:, 1:] != IGNORE_INDEX]
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert seen[:3] == [None, None, (14, 1)]
    assert type(model.lm_head) is TokenHead
    assert model(input_ids=ids).logits.shape == (*ids.shape, len(small.tokenizer))


def test_an_error_on_the_way_leaves_a_head_that_gives_logits(small):
    model = small.causal_lm()
    ids, _, labels = batch()

    def fails(*given):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        at_labels(model, ids, labels, fails)
    assert model(input_ids=ids).logits.shape[:2] == ids.shape


def test_rows_are_aligned_whichever_side_is_padded():
    rows = [[5, 6], [7, 0, 8, 9], [1]]
    for left in (False, True):
        ids, lengths = align(*pad(rows, 3, left))
        assert ids.tolist() == [[5, 6, 3, 3], [7, 0, 8, 9], [1, 3, 3, 3]]
        assert lengths.tolist() == [2, 4, 1]
    ids, lengths = align(torch.tensor([[3, 5, 6, 3, 3]]), torch.tensor([[0, 1, 1, 0, 0]]))
    assert ids.tolist() == [[5, 6]]
