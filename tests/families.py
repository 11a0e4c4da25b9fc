"""Random stand-ins of the model families that people bring, with their special tokens.

Ids of special tokens are those of the real tokenizers where they fit a vocabulary of some 270, else
they have the same relations: eos that is unk, bos that is eos, no pad, a vocabulary that ends at a
multiple of some number. Every other id is a byte.

    save(FAMILIES["opt"], folder)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TURNS = (
    "{% for m in messages %}{{ START + m.role + SEP + m.content | trim + END + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ START + 'assistant' + SEP }}{% endif %}"
)


def turns(start: str, separator: str, end: str) -> str:
    """Return a chat template whose turns have a role between two marks."""
    return (TURNS.replace("START", repr(start)).replace("SEP", repr(separator))
            .replace("END", repr(end)))


CHATML = turns("<|im_start|>", "\n", "<|im_end|>")
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


@dataclass(frozen=True)
class Family:
    """A family: its type in transformers, special tokens with their ids, and sizes."""

    title: str
    kind: str
    tokens: dict[str, int]
    named: dict[str, str]
    sizes: dict[str, Any] = field(default_factory=lambda: LLAMA)
    template: str | None = None
    rows: int = 0  # of the embeddings, beyond the tokenizer's


def _both(token: str) -> dict[str, str]:
    return {"bos_token": token, "eos_token": token}


_END = "<|endoftext|>"
_NEOX = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 512}
_OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "word_embed_proj_dim": 32}
_OPT_TOKENS = {"<s>": 0, "<pad>": 1, "</s>": 2}
_OPT_NAMES = _both("</s>") | {"unk_token": "</s>", "pad_token": "<pad>"}
_GEMMA_TOKENS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106,
                 "<end_of_turn>": 107}
_GEMMA_NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
                "unk_token": "<unk>"}
_GEMMA_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

FAMILIES = {
    "llama2": Family("LLaMA 2", "llama", {"<unk>": 0, "<s>": 1, "</s>": 2},
                     {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
    "llama3": Family(
        "LLaMA 3", "llama",
        {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|start_header_id|>": 262,
         "<|end_header_id|>": 263, "<|eot_id|>": 265},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        template="{{ bos_token }}" + turns("<|start_header_id|>", "<|end_header_id|>\n\n",
                                           "<|eot_id|>").replace("+ '\\n' ", "")),
    "mistral": Family("Mistral", "mistral", {"<unk>": 0, "<s>": 1, "</s>": 2},
                      {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
    "qwen2": Family("Qwen2 and 2.5", "qwen2", {_END: 256, "<|im_start|>": 257, "<|im_end|>": 258},
                    {"eos_token": _END, "pad_token": _END}, template=CHATML, rows=13),
    "qwen3": Family("Qwen3", "qwen3", {_END: 256, "<|im_start|>": 257, "<|im_end|>": 258},
                    {"eos_token": "<|im_end|>", "pad_token": _END}, {**LLAMA, "head_dim": 8},
                    template=CHATML, rows=13),
    "gemma2": Family("Gemma 2", "gemma2", _GEMMA_TOKENS, _GEMMA_NAMES, {**LLAMA, "head_dim": 8},
                     template=_GEMMA_TURNS),
    "gemma3": Family("Gemma 3 (text)", "gemma3_text", _GEMMA_TOKENS, _GEMMA_NAMES,
                     {**LLAMA, "head_dim": 8, "sliding_window": 16}, template=_GEMMA_TURNS),
    "phi3": Family("Phi-3", "phi3",
                   {"<unk>": 0, "<s>": 1, "</s>": 2, _END: 258, "<|assistant|>": 259,
                    "<|end|>": 265, "<|user|>": 268},
                   {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": _END,
                    "pad_token": _END}, template=turns("<|", "|>\n", "<|end|>"), rows=64),
    "gpt2": Family("GPT-2", "gpt2", {_END: 256}, _both(_END) | {"unk_token": _END},
                   {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "opt": Family("OPT", "opt", _OPT_TOKENS, _OPT_NAMES, _OPT),
    "opt350m": Family(
        "OPT-350m (post-norm, projections)", "opt", _OPT_TOKENS, _OPT_NAMES,
        {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "pythia": Family("Pythia (GPT-NeoX)", "gpt_neox", {_END: 0, "<|padding|>": 1},
                     _both(_END) | {"unk_token": _END}, _NEOX, rows=15),
    "falcon": Family("Falcon", "falcon", {">>TITLE<<": 0, _END: 11}, {"eos_token": _END},
                     {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "smollm2": Family("SmolLM2", "llama", {_END: 0, "<|im_start|>": 1, "<|im_end|>": 2},
                      _both(_END) | {"unk_token": _END}),
    "smollm3": Family("SmolLM3", "smollm3",
                      {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|im_start|>": 267,
                       "<|im_end|>": 268},
                      {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, template=CHATML),
}


def byte_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family."""
    taken = set(family.tokens.values())
    free = (i for i in range(10**6) if i not in taken)
    vocabulary = {text: next(free) for text in sorted(pre_tokenizers.ByteLevel.alphabet())}
    last = max(*vocabulary.values(), *taken)
    fillers = {f"<reserved_{i}>": i for i in free if i < last} if last > 256 else {}
    tokenizer = Tokenizer(models.BPE({**vocabulary, **family.tokens, **fillers}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                  for text, _ in sorted(family.tokens.items(), key=lambda t: t[1])])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **family.named)
    made.chat_template = family.template
    return made


def config(family: Family, vocabulary: int, **changes: Any) -> Any:
    """Return the configuration of a family's stand-in; a large std makes its choices clear."""
    tokens = {f"{kind}_token_id": family.tokens.get(family.named.get(f"{kind}_token", ""))
              for kind in ("bos", "eos", "pad")}
    return AutoConfig.for_model(family.kind, **{
        "vocab_size": vocabulary + family.rows, "initializer_range": 0.2, **tokens, **family.sizes,
        **changes})


def save(family: Family, folder: Path, **changes: Any) -> str:
    """Write a stand-in, tokenizer and all; returns its path."""
    tokenizer = byte_tokenizer(family)
    torch.manual_seed(0)
    rows = 1 + max(tokenizer.get_vocab().values())
    AutoModelForCausalLM.from_config(config(family, rows, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
