"""The average of the weights: how it moves, and that the model gets its own back."""

import pytest
import torch
from conftest import moved, snapshot
from torch import nn
from torch.testing import assert_close

from alpaca_rlhf.utils.model.ema import Ema


def linear():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.zero_()
    model.bias.requires_grad_(False)
    return model


def test_the_average_moves_by_the_share_that_the_decay_leaves():
    model = linear()
    ema = Ema(model, decay=0.9)
    for value in (11.0, 21.0):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update()
    with ema.swapped_in():
        # 1 -> 0.9 + 1.1 = 2 -> 1.8 + 2.1 = 3.9; 2 -> 1.8 + 1.1 = 2.9 -> 2.61 + 2.1 = 4.71
        assert_close(model.weight.detach(), torch.tensor([[3.9, 4.71]]))


def test_the_model_has_its_own_weights_again_bit_for_bit_also_after_an_exception():
    model = linear()
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 1 / 3]]))
    ema.update()
    before = snapshot(model)
    with ema.swapped_in():
        assert moved(before, model) == {"weight"}
    assert moved(before, model) == set()
    with pytest.raises(RuntimeError, match="in the midst"), ema.swapped_in():
        raise RuntimeError("in the midst")
    assert moved(before, model) == set()


def test_what_does_not_train_is_not_averaged():
    model = linear()
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model.bias.fill_(4.0)
    ema.update()
    with ema.swapped_in():
        assert model.bias.item() == 4.0


def test_small_moves_of_bf16_weights_are_not_lost():
    model = linear().bfloat16()
    ema = Ema(model, decay=0.999)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(1000):
        ema.update()
    with ema.swapped_in():
        # 2 - 0.999^1000 = 1.632; a bf16 average would have stayed at 1
        assert model.weight[0, 0].item() == pytest.approx(1.632, rel=0.01)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_average_of_an_engines_adapter_is_what_is_seen_while_it_is_in(small, stage):
    # At stage 3 these small weights are shards that stay gathered: both must change.
    engine = small.trained("actor", stage, lora=4)
    ema = Ema(engine.module, decay=0.5)
    before, batch = snapshot(engine.module), small.prompts(2)

    def logits():
        return engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits

    engine.backward(logits().square().mean())
    engine.step()
    ema.update()
    after, own = snapshot(engine.module), logits().detach()
    name = next(name for name in before if "lora_B" in name)
    assert not after[name].equal(before[name])
    with ema.swapped_in():
        inside = snapshot(engine.module)[name]
        averaged = logits().detach()
    assert_close(inside, (before[name] + after[name]) / 2)
    assert not averaged.equal(own)
    assert moved(after, engine.module) == set()
    assert logits().equal(own)
