"""LoRA: matched modules, trainable parameters, and the base model recovered bit for bit."""

import pytest
import torch
from conftest import moved, snapshot, with_adapter
from torch.testing import assert_close

from alpaca_rlhf.utils.configs import RoleConfig
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model import lora
from alpaca_rlhf.utils.model.reward_model import TokenScorer
from alpaca_rlhf.utils.model.weights import whole

ROLES = ["actor", "critic"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(small, role, **options):
    return small.causal_lm(**options) if role == "actor" else small.reward_model(**options)


def matches(model, names=None, prefix=""):
    return lora.match_modules(model, RoleConfig(lora_module_name=names, prefix=prefix))


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def merged(model):
    return whole.merged_state_dict(model, on_this_rank=True)[0]


# --- matched modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["query", "q_proj,query", "embed_tokens", "lm_head"])
def test_a_name_that_matches_nothing_is_refused_with_the_names_there_are(small, names):
    with pytest.raises(UserError) as error:
        matches(small.causal_lm(), names, "actor_")
    assert str(error.value) == (
        f"--actor_lora_module_name {names.split(',')[-1]}: matches no linear layer; there are "
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


@pytest.mark.parametrize("role", ROLES)
def test_by_default_every_projection_of_the_decoder_matches_and_no_head(small, role):
    assert set(matches(load(small, role))) == {
        f"model.layers.{layer}.{'mlp' if name in PROJECTIONS[4:] else 'self_attn'}.{name}"
        for layer in (0, 1) for name in PROJECTIONS
    }


def test_a_part_of_a_name_matches_all_that_contain_it(small):
    assert set(matches(small.causal_lm(), "layers.1.mlp, q_proj")) == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }


# --- trainable parameters ------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "expected"), [("actor", {"lora"}), ("critic", {"lora", "head"})])
def test_only_the_adapter_and_a_head_are_trainable(small, role, expected):
    model = with_adapter(load(small, role))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    kinds = {"lora" if "lora_" in n else "head" if "score" in n else "base" for n in trained}
    assert kinds == expected


def test_without_only_lora_all_but_the_saved_head_is_trainable(small):
    model = with_adapter(small.reward_model(), only_lora=False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["base_model.model.score.original_module.weight"]


def test_the_description_counts_matched_and_trainable_parameters(small):
    # q_proj: 32 x 32 in each of 2 layers; the adapter 4 x (32 + 32) in each.
    model, targets = with_adapter(small.causal_lm(), "q_proj"), matches(small.causal_lm(), "q_proj")
    total = sum(p.numel() for p in model.parameters())
    assert lora.describe_training(model, targets) == (
        "LoRA matched 2 modules (q_proj) with 2,048 parameters; "
        f"trains 512 of {total:,} parameters (lora 512)"
    )
    model = small.reward_model()
    total = sum(p.numel() for p in model.parameters())
    assert lora.describe_training(model, None) == (
        f"LoRA off; trains {total:,} of {total:,} parameters (head 32, base {total - 32:,})"
    )


@pytest.mark.parametrize("role", ROLES)
def test_every_layer_of_the_adapter_has_a_gradient_under_gradient_checkpointing(small, role):
    model, batch = with_adapter(load(small, role, gradient_checkpointing=True)), small.prompts(2)
    if role == "actor":
        output = model.train()(input_ids=batch.input_ids).logits
    else:
        output = TokenScorer(model).train()(batch.input_ids)
    output.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 28 + (role == "critic")
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_the_critics_head_is_trained_and_with_the_adapter_disabled_the_saved_one_is_used(small):
    engine, batch = small.trained("critic", lora=4), small.prompts(2)
    before = snapshot(engine.module)
    engine.backward(engine(batch.input_ids).square().sum())
    engine.step()
    heads = [name for name in moved(before, engine.module) if "score" in name]
    assert heads == ["model.base_model.model.score.modules_to_save.default.weight"]
    with torch.no_grad(), lora.adapter_disabled(engine.module.model):
        disabled = engine.module(batch.input_ids)
        expected = TokenScorer(small.reward_model())(batch.input_ids)
    assert disabled.equal(expected)


# --- disabled, merged, folded --------------------------------------------------------------------


def test_the_disabled_adapter_gives_the_base_bit_for_bit_and_the_enabled_one_does_not(small):
    model, batch = with_adapter(small.causal_lm()), small.prompts(3)
    plain = logits(small.causal_lm(), batch)
    with lora.adapter_disabled(model):
        assert logits(model, batch).equal(plain)
    assert (logits(model, batch) - plain).abs().max() > 0.1


def test_a_model_without_an_adapter_cannot_disable_one(small):
    with pytest.raises(AssertionError, match="adapter"), lora.adapter_disabled(small.causal_lm()):
        pass


@pytest.mark.parametrize("role", ROLES)
def test_merged_weights_are_those_of_pefts_own_merge_and_merging_changes_nothing(small, role):
    model = with_adapter(load(small, role))
    before, ours = snapshot(model), merged(model)
    assert moved(before, model) == set()
    theirs = model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    assert_close(ours, dict(theirs), rtol=1e-6, atol=1e-6)


def test_a_plain_model_with_the_merged_weights_gives_the_adapters_logits(small):
    model, plain, batch = with_adapter(small.causal_lm()), small.causal_lm(), small.prompts(3)
    plain.load_state_dict(merged(model))
    assert_close(logits(plain, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def test_only_the_rank_that_writes_holds_the_gathered_weights(small):
    model = with_adapter(small.causal_lm())
    assert whole.gathered_state_dict(model, on_this_rank=False) == {}
    assert whole.merged_state_dict(model, on_this_rank=False) == ({}, 0.0)


def test_folding_gives_the_same_logits_and_restores_every_weight_bit_for_bit(small):
    model, batch = with_adapter(small.causal_lm()), small.prompts(3)
    before, expected = snapshot(model), logits(model, batch)
    with lora.folded(model):
        inside, changed = logits(model, batch), moved(before, model)
        with lora.folded(model):  # once more adds nothing
            assert logits(model, batch).equal(inside)
        assert logits(model, batch).equal(inside)
    assert (inside - expected).abs().mean() < 1e-5
    assert len(changed) == 14
    assert moved(before, model) == set()
    assert logits(model, batch).equal(expected)
