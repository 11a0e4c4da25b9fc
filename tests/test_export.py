"""Exported models that other tools load."""

import json

import golden_curves
import pytest
import torch
from conftest import moved, small_config, snapshot, with_adapter
from peft import PeftModel
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from alpaca_rlhf.training_model.step1_supervised_finetuning import main as step1
from alpaca_rlhf.utils.errors import TrainingStopped, UserError
from alpaca_rlhf.utils.run import export as export_module
from alpaca_rlhf.utils.run.export import export, rehearse


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
    model = with_adapter(small.causal_lm())
    before, expected = snapshot(model), logits(model, small)
    export(model, small.tokenizer, tmp_path, "card", {})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(merged, small), expected, rtol=1e-4, atol=1e-4)
    onto_the_base = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small.actor), tmp_path / "adapter"
    )
    assert_close(logits(onto_the_base, small), expected, rtol=1e-6, atol=1e-6)
    assert moved(before, model) == set()


@pytest.mark.parametrize("adapted", [False, True])
def test_an_exported_reward_model_is_read_by_transformers(small, tmp_path, adapted):
    model = small.reward_model()
    model = with_adapter(model) if adapted else model
    export(model, small.tokenizer, tmp_path, "card", {})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.num_labels == 1
    assert_close(logits(loaded, small), logits(model, small), rtol=1e-4, atol=1e-4)
    if adapted:
        onto_the_base = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(small.critic), tmp_path / "adapter"
        )
        assert_close(logits(onto_the_base, small), logits(model, small), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_tied_embeddings_stay_tied_and_are_written_once(small, tmp_path, adapted):
    torch.manual_seed(2)
    model = LlamaForCausalLM(small_config(small.tokenizer, tie_word_embeddings=True)).eval()
    model = with_adapter(model) if adapted else model
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


def test_sampling_parameters_without_do_sample_are_saved_as_sampling(small, tmp_path):
    model = small.causal_lm()
    model.generation_config.update(do_sample=False, temperature=0.9, top_p=0.6)
    rehearse(model, small.tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []
    export(model, small.tokenizer, tmp_path, "card", {})
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)
    rehearse(small.reward_model(), small.tokenizer, tmp_path)


def test_what_the_libraries_refuse_to_save_is_refused_before_the_training(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(type(small.tokenizer), "save_pretrained", lambda *_: int("x\ny"))
    with pytest.raises(UserError, match=r"^the model could not be saved after the training: inv.*; "
                       r"mend its config.json, generation_config.json or tokenizer$"):
        rehearse(small.causal_lm(), small.tokenizer, tmp_path)


def test_an_export_that_fails_leaves_a_checkpoint_and_is_made_again_by_one_command(
    small, tmp_path, monkeypatch
):
    words = ["--model_name_or_path", small.actor, "--max_steps", 2, "--max_seq_len", 64,
             "--eval_iters", 1, "--data_output_path", small.folder / "cache"]
    with monkeypatch.context() as broken, pytest.raises(TrainingStopped) as stopped:
        broken.setattr(export_module, "_save_model", lambda *_: {}["a name\nand more"])
        golden_curves.run(step1, tmp_path / "run", *words)
    kept = tmp_path / "run.partial" / "checkpoints" / "step-00000002"
    assert str(stopped.value) == (
        "error: the model could not be exported: 'a name\\nand more'; --resume_from_checkpoint "
        f"latest resumes from {kept}")
    # Into another folder: this process still holds the lock of the first.
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):  # no step is left to take
        golden_curves.run(step1, tmp_path / "again", *words, "--resume_from_checkpoint", kept)
    assert (tmp_path / "again" / "model.safetensors").exists()
