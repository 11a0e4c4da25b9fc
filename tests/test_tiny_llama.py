"""The embedded model: an ordinary folder, built once and never left unfinished."""

import hashlib
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca_rlhf.demo import assistant_world, tiny_llama
from alpaca_rlhf.demo.tiny_llama import Recipe, ensure_tiny_llama

SMALL = Recipe(
    vocab_size=700, hidden_size=32, intermediate_size=64, layers=1, heads=2,
    tokenizer_dialogues=300, dialogues=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ensure_tiny_llama(tmp_path_factory.mktemp("cache"), SMALL)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_pretraining_data_is_that_of_its_format(tokenizer):
    """If this fails, the built models are out of date: raise FORMAT, then the digest."""
    torch.manual_seed(0)
    rows = [[part.tolist() for part in batch]
            for batch in tiny_llama._batches(tiny_llama.ChatFormat(tokenizer), SMALL)]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    assert (tiny_llama.FORMAT, assistant_world.FORMAT, digest[:16]) == (3, 1, "47bcbb322bdefbef")


@pytest.mark.parametrize("module", [tiny_llama, assistant_world])
def test_a_raised_format_is_another_folder(tmp_path, monkeypatch, module):
    monkeypatch.setattr(tiny_llama, "_build", lambda *_: None)
    before = ensure_tiny_llama(tmp_path)
    assert ensure_tiny_llama(tmp_path) == before
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert ensure_tiny_llama(tmp_path) != before


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_shows_a_progress_bar(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    ensure_tiny_llama(tmp_path, SMALL)
    assert ("pretraining the tiny LLaMA" in capsys.readouterr().err) == terminal


def test_it_has_two_to_five_million_parameters():
    with torch.device("meta"):
        config = tiny_llama.LlamaConfig(
            vocab_size=Recipe().vocab_size, hidden_size=Recipe().hidden_size,
            intermediate_size=Recipe().intermediate_size, num_hidden_layers=Recipe().layers,
            num_attention_heads=Recipe().heads, tie_word_embeddings=True,
        )
        model = tiny_llama.LlamaForCausalLM(config)
    assert 2_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000


def test_it_loads_as_any_other_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_second_call_builds_nothing(folder, monkeypatch):
    monkeypatch.setattr(tiny_llama, "_build", lambda *_: pytest.fail("built again"))
    assert ensure_tiny_llama(folder.parent, SMALL) == folder


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(unfinished, *_):
        (unfinished / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_llama, "_build", broken)
    with pytest.raises(KeyboardInterrupt):
        ensure_tiny_llama(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_same_recipe_gives_the_same_weights(folder, tmp_path):
    again = ensure_tiny_llama(tmp_path, SMALL)
    one, two = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_building_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    ensure_tiny_llama(tmp_path, SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_pad_is_not_eos(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize("text", ["Hello there.", "two\n\nlines", "naïve 日本 🙂", " a  b "])
def test_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
