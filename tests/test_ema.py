"""The average of the weights: how it moves, and that the model gets its own weights back."""

import pytest
import torch
from conftest import moved, snapshot
from torch import nn
from torch.testing import assert_close

from alpaca_rlhf.utils.model.weights.ema import Ema


@pytest.fixture
def model():
    """One row of weights that train, and a bias that does not."""
    model = nn.Linear(2, 1)
    put(model, 1.0, 2.0)
    model.bias.requires_grad_(False).zero_()
    return model


@torch.no_grad()
def put(model, *weights):
    model.weight.copy_(torch.tensor([weights]))


def test_an_update_moves_the_average_of_trained_weights_by_one_minus_decay(model):
    ema = Ema(model, decay=0.9)
    for value in (11.0, 21.0):
        put(model, value, value)
        model.bias.fill_(4.0)
        ema.update()
    with ema.swapped_in():
        # 1 -> 0.9 + 1.1 = 2 -> 1.8 + 2.1 = 3.9; 2 -> 1.8 + 1.1 = 2.9 -> 2.61 + 2.1 = 4.71
        assert_close(model.weight.detach(), torch.tensor([[3.9, 4.71]]))
        assert model.bias.item() == 4.0


def test_the_model_has_its_own_weights_again_bit_for_bit_also_after_an_exception(model):
    ema = Ema(model, decay=0.5)
    put(model, 0.1, 1 / 3)
    ema.update()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        assert moved(before, model) == {"weight"}
        raise RuntimeError("inside")
    assert moved(before, model) == set()


def test_small_moves_of_bf16_weights_are_not_lost(model):
    ema = Ema(model.bfloat16(), decay=0.999)
    put(model, 2.0, 2.0)
    for _ in range(1000):
        ema.update()
    with ema.swapped_in():
        # 2 - 0.999^1000 = 1.632; a bf16 average would have stayed at 1.
        assert model.weight[0, 0].item() == pytest.approx(1.632, rel=0.01)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_model_computes_with_the_average_while_it_is_swapped_in(small, stage):
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
        inside, averaged = snapshot(engine.module)[name], logits().detach()
    assert_close(inside, (before[name] + after[name]) / 2)
    assert not averaged.equal(own)
    assert moved(after, engine.module) == set()
    assert logits().equal(own)


@pytest.mark.parametrize("stage", [2, 3])
def test_masters_are_averaged_and_not_the_bf16_weights_that_are_rounded_from_them(small, stage):
    engine = small.trained("actor", stage, dtype="bf16", learning_rate=1e-6)
    ema, batch = Ema(engine.module, decay=0.5), small.prompts(2)
    before = snapshot(engine.module)
    engine.backward(engine(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.square().mean())
    engine.step()
    ema.update()
    # A step of 1e-6 is lost in the rounding of most weights, and half of it is in the average.
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    name = next(name for name in names if name.endswith("q_proj.weight"))
    average = ema.state_dict()["average"][names.index(name)]
    distance = (average - before[name].float()).abs()
    assert_close(distance.mean().item(), 0.5e-6, rtol=0.1, atol=0)
    with ema.swapped_in():
        assert snapshot(engine.module)[name].equal(average.bfloat16())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_saved_average_is_whole_and_fits_every_stage(small, stage):
    one, other = (Ema(small.trained("actor", at).module, decay=0.5) for at in (0, stage))
    saved = {"average": [torch.randn_like(whole) for whole in one.state_dict()["average"]]}
    other.load_state_dict(saved)
    for whole, again in zip(saved["average"], other.state_dict()["average"], strict=True):
        assert again.equal(whole)
