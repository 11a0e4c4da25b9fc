"""LoRA: what it matches, what trains, and that the base can always be had again."""

import pytest
import torch
from conftest import moved, snapshot
from torch import nn
from torch.testing import assert_close

from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.reward_model import TokenScorer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, wanted=None, filled=True, only_lora=True):
    """A model with an adapter whose B, zero at first, is filled."""
    targets = lora.match_modules(model, wanted, "--lora_module_name")
    model = lora.add_lora(
        model, rank=4, alpha=8, dropout=0.0, targets=targets, only_lora=only_lora
    )
    if filled:
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


# ------------------------------------------------------------------- what is matched


@pytest.mark.parametrize("wanted", ["query", "q_proj,query", "embed_tokens", "lm_head"])
def test_a_name_that_matches_nothing_is_refused_with_the_names_there_are(small, wanted):
    with pytest.raises(UserError) as error:
        lora.match_modules(small.causal_lm(), wanted, "--actor_lora_module_name")
    assert str(error.value) == (
        f"--actor_lora_module_name {wanted.split(',')[-1]}: matches no linear layer; there are "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_by_default_every_projection_of_the_decoder_is_matched_and_no_head(small):
    expected = {
        f"model.layers.{layer}.{'mlp' if name in PROJECTIONS[4:] else 'self_attn'}.{name}"
        for layer in (0, 1) for name in PROJECTIONS
    }
    for model in (small.causal_lm(), small.reward_model()):
        assert set(lora.match_modules(model, None, "--lora_module_name")) == expected


def test_a_part_of_a_name_matches_all_that_contain_it(small):
    given = lora.match_modules(small.causal_lm(), "layers.1.mlp, q_proj", "--lora_module_name")
    assert set(given) == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }


# ------------------------------------------------------------------- what trains


def trained_kinds(model):
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    return {"lora" if "lora_" in n else "head" if "score" in n else "base" for n in trains}


def test_only_the_adapter_trains_and_beside_it_a_head(small):
    assert trained_kinds(adapted(small.causal_lm())) == {"lora"}
    assert trained_kinds(adapted(small.reward_model())) == {"lora", "head"}


def test_without_only_lora_everything_trains_but_the_saved_head(small):
    model = adapted(small.reward_model(), only_lora=False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["base_model.model.score.original_module.weight"]


def test_the_description_counts_what_is_matched_and_what_trains(small):
    # q_proj: 32 x 32 in each of 2 layers; the adapter 4 x (32 + 32) in each.
    model = adapted(small.causal_lm(), "q_proj")
    total = sum(p.numel() for p in model.parameters())
    assert lora.describe_training(model, lora.match_modules(
        small.causal_lm(), "q_proj", "--lora_module_name"
    )) == (
        f"LoRA matched 2 modules with 2,048 parameters; trains 512 of {total:,} parameters "
        "(lora 512)"
    )


def test_the_description_of_a_whole_model_says_that_lora_is_off(small):
    model = small.reward_model()
    total = sum(p.numel() for p in model.parameters())
    assert lora.describe_training(model, None) == (
        f"LoRA off; trains {total:,} of {total:,} parameters (head 32, base {total - 32:,})"
    )


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_every_layer_of_the_adapter_learns_under_gradient_checkpointing(small, role):
    model = (small.causal_lm if role == "actor" else small.reward_model)(
        gradient_checkpointing=True
    )
    model = adapted(model).train()
    batch = small.prompts(2)
    if role == "actor":
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    else:
        output = TokenScorer(model)(batch.input_ids, batch.attention_mask)
    output.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 28 + (role == "critic")
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_the_critics_head_learns_and_the_adapter_off_has_the_saved_one(small):
    plain = small.reward_model()
    engine = small.trained("critic", lora=4)
    batch = small.prompts(2)
    before = snapshot(engine.module)
    engine.backward(engine(batch.input_ids, batch.attention_mask).square().sum())
    engine.step()
    heads = [name for name in moved(before, engine.module) if "score" in name]
    assert heads == ["model.base_model.model.score.modules_to_save.default.weight"]
    with torch.no_grad(), lora.adapter_off(engine.module.model):
        off = engine.module(batch.input_ids, batch.attention_mask)
    with torch.no_grad():
        expected = TokenScorer(plain)(batch.input_ids, batch.attention_mask)
    assert off.equal(expected)


# ------------------------------------------------------------------- off, merged, folded


def test_the_adapter_off_gives_the_base_bit_for_bit_and_on_something_else(small):
    model, batch = adapted(small.causal_lm()), small.prompts(3)
    plain = logits(small.causal_lm(), batch)
    with lora.adapter_off(model):
        assert logits(model, batch).equal(plain)
    assert (logits(model, batch) - plain).abs().max() > 0.1


def test_a_model_without_an_adapter_cannot_turn_one_off(small):
    with pytest.raises(AssertionError, match="adapter"), lora.adapter_off(small.causal_lm()):
        pass


def test_merged_weights_give_what_the_adapter_gives(small):
    model, batch = adapted(small.causal_lm()), small.prompts(3)
    plain = small.causal_lm()
    plain.load_state_dict(
        lora.merged_state_dict(model, lora.gathered_state_dict(model, on_this_rank=True))
    )
    assert_close(logits(plain, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_merged_weights_are_those_of_pefts_own_merge(small, role):
    model = adapted(small.causal_lm() if role == "actor" else small.reward_model())
    if role == "critic":
        nn.init.normal_(model.get_base_model().score.modules_to_save["default"].weight)
    ours = lora.merged_state_dict(model, lora.gathered_state_dict(model, on_this_rank=True))
    theirs = model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)


def test_merging_leaves_the_model_as_it_is(small):
    model = adapted(small.causal_lm())
    before = snapshot(model)
    lora.merged_state_dict(model, lora.gathered_state_dict(model, on_this_rank=True))
    assert moved(before, model) == set()


def test_only_the_rank_that_writes_holds_the_gathered_weights(small):
    assert lora.gathered_state_dict(small.causal_lm(), on_this_rank=False) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_gives_the_same_logits_and_leaves_every_weight_bit_for_bit(small, dtype):
    model, batch = adapted(small.causal_lm(dtype=dtype)), small.prompts(3)
    before, expected = snapshot(model), logits(model, batch)
    with lora.folded(model):
        inside, changed = logits(model, batch), moved(before, model)
    assert (inside - expected).abs().mean() < (1e-5 if dtype == torch.float32 else 0.05)
    assert len(changed) == 14
    assert moved(before, model) == set()
    assert logits(model, batch).equal(expected)


def test_folding_is_taken_back_after_an_exception(small):
    model = adapted(small.causal_lm())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in the midst"), lora.folded(model):
        raise RuntimeError("in the midst")
    assert moved(before, model) == set()
    assert not any(layer.merged for layer in lora.lora_layers(model))


def test_folding_within_folding_adds_the_adapter_once(small):
    model, batch = adapted(small.causal_lm()), small.prompts(2)
    with lora.folded(model):
        once = logits(model, batch)
        with lora.folded(model):
            assert logits(model, batch).equal(once)
        assert logits(model, batch).equal(once)
