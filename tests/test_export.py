"""Exported models that other tools load."""

import json

import pytest
import torch
from conftest import moved, small_config, snapshot, with_adapter
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from alpaca_rlhf.utils.run.export import export


def adapted(model):
    model = with_adapter(model)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model, small):
    # No row is padded: where a tool puts positions of padding is its own affair.
    batch = small.prompts(1)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def test_an_exported_actor_is_read_by_transformers(small, tmp_path):
    model = small.causal_lm()
    export(model, small.tokenizer, tmp_path, "card", {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert logits(loaded, small).equal(logits(model, small))


def test_an_export_with_an_adapter_is_the_merged_model_and_the_adapter_beside_it(small, tmp_path):
    model = adapted(small.causal_lm())
    before, expected = snapshot(model), logits(model, small)
    export(model, small.tokenizer, tmp_path, "card", {})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(merged, small), expected, rtol=1e-4, atol=1e-4)
    onto_the_base = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small.actor), tmp_path / "adapter"
    )
    assert_close(logits(onto_the_base, small), expected, rtol=1e-6, atol=1e-6)
    assert moved(before, model) == set()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_an_exported_reward_model_is_read_by_transformers(small, tmp_path, with_adapter):
    model = small.reward_model()
    model = adapted(model) if with_adapter else model
    export(model, small.tokenizer, tmp_path, "card", {})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    assert_close(logits(loaded, small), logits(model, small), rtol=1e-4, atol=1e-4)
    if with_adapter:
        onto_the_base = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(small.critic), tmp_path / "adapter"
        )
        assert_close(logits(onto_the_base, small), logits(model, small), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_tied_embeddings_stay_tied_and_are_written_once(small, tmp_path, with_adapter):
    torch.manual_seed(2)
    model = LlamaForCausalLM(small_config(small.tokenizer, tie_word_embeddings=True)).eval()
    model = adapted(model) if with_adapter else model
    export(model, small.tokenizer, tmp_path, "card", {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close(logits(loaded, small), logits(model, small), rtol=1e-4, atol=1e-4)
    size = (tmp_path / "model.safetensors").stat().st_size
    weights = 4 * sum(p.numel() for p in loaded.parameters())
    assert weights <= size < weights + 4 * 420 * 32  # not one embedding more


def test_an_export_keeps_the_precision_of_the_weights(small, tmp_path):
    export(small.causal_lm().bfloat16(), small.tokenizer, tmp_path, "card", {})
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_an_export_has_tokenizer_template_generation_config_and_card(small, tmp_path):
    model = small.causal_lm()
    model.generation_config.eos_token_id = 9
    export(model, small.tokenizer, tmp_path, "Policy", {"KL": 1.5})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "Hi."}]
    assert tokenizer.apply_chat_template(
        question, tokenize=False, add_generation_prompt=True
    ) == "<s>Human: Hi.\n\nAssistant:"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [small.tokenizer.eos_token_id, 9]
    assert generation["pad_token_id"] == small.tokenizer.pad_token_id
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert "| KL | 1.5 |" in (tmp_path / "README.md").read_text()


def test_nothing_is_exported_without_a_folder(small, tmp_path):
    export(small.causal_lm(), small.tokenizer, None, "card", {})
    assert list(tmp_path.iterdir()) == []
