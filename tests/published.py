"""Sizes of published models, and folders that hold a model's config.json and no weights.

    write_config("meta-llama/Llama-3.1-8B", folder)     # what a plan of memory reads of a model
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)


@dataclass(frozen=True)
class Published:
    """A model's type in transformers, its sizes, and its number of parameters."""

    kind: str
    parameters: int
    sizes: dict[str, Any]


def _llama(
    parameters: int, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int,
    vocabulary: int, positions: int, **more: Any,
) -> Published:
    """Return a model of the LLaMA family, or of one with the same sizes."""
    kind = more.pop("kind", "llama")
    return Published(kind, parameters, {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary, "max_position_embeddings": positions, **more})


def _opt(parameters: int, hidden: int, heads: int, **more: Any) -> Published:
    return Published("opt", parameters, {
        "hidden_size": hidden, "ffn_dim": 4 * hidden, "num_hidden_layers": 24,
        "num_attention_heads": heads, "word_embed_proj_dim": hidden, "vocab_size": 50272,
        "max_position_embeddings": 2048, **more})


_QWEN3 = {"kind": "qwen3", "head_dim": 128}
PUBLISHED = {
    "huggyllama/llama-7b": _llama(6_738_415_616, 4096, 11008, 32, 32, 32, 32000, 2048),
    "meta-llama/Llama-3.1-8B": _llama(8_030_261_248, 4096, 14336, 32, 32, 8, 128256, 131072),
    "Qwen/Qwen3-0.6B-Base": _llama(596_049_920, 1024, 3072, 28, 16, 8, 151936, 32768,
                                   tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-1.7B-Base": _llama(1_720_574_976, 2048, 6144, 28, 16, 8, 151936, 32768,
                                   tie_word_embeddings=True, **_QWEN3),
    "Qwen/Qwen3-8B-Base": _llama(8_190_735_360, 4096, 12288, 36, 32, 8, 151936, 32768, **_QWEN3),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _llama(
        1_100_048_384, 2048, 5632, 22, 32, 4, 32000, 2048),
    "HuggingFaceTB/SmolLM2-360M": _llama(361_821_120, 960, 2560, 32, 15, 5, 49152, 8192,
                                         tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(1_711_376_384, 2048, 8192, 24, 32, 32, 49152, 8192,
                                         tie_word_embeddings=True),
    "facebook/opt-1.3b": _opt(1_315_758_080, 2048, 32),
    "facebook/opt-350m": _opt(331_196_416, 1024, 16, word_embed_proj_dim=512,
                              do_layer_norm_before=False),
}


def config_of(name: str) -> PreTrainedConfig:
    """Return the configuration of a published model."""
    model = PUBLISHED[name]
    return AutoConfig.for_model(model.kind, architectures=[_architecture(model.kind)],
                                dtype="bfloat16", **model.sizes)


def _architecture(kind: str) -> str:
    return {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "opt": "OPTForCausalLM"}[kind]


def write_config(name: str, folder: Path, *, scores: bool = False) -> str:
    """Write the config.json of a published model, or of a reward model made of it.

    Returns:
        The folder's path.
    """
    config = config_of(name)
    if scores:
        config.num_labels = 1
        config.architectures = [
            _architecture(config.model_type).replace("CausalLM", "SequenceClassification")]
    config.save_pretrained(folder)
    return str(folder)


def without_weights(folder: str) -> PreTrainedModel:
    """Build the model of a config.json on the meta device, where it needs no memory."""
    config = AutoConfig.from_pretrained(folder)
    scores = config.architectures[0].endswith("SequenceClassification")
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)
