"""Exported models: Hugging Face folders that any tool can load.

An export has safetensors, config, tokenizer with chat template, generation config and a model card.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.data.tokenizer import eos_ids
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model.lora import unwrapped
from alpaca_rlhf.utils.model.weights.backbone import ADAPTER_FOLDER, sample_base, save_adapter
from alpaca_rlhf.utils.model.weights.whole import adapter_state_dict, merged_state_dict
from alpaca_rlhf.utils.run.run_folder import ARGUMENTS_FILE

MERGED_EXACTLY = 1e-3  # share of the adapter's update up to which rounding is not mentioned


def export(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path | None, title: str,
    facts: dict[str, Any],
) -> None:
    """Save a model in Hugging Face format with its adapter merged, and the adapter beside it.

    All ranks must call it (under ZeRO-3 each holds a part). The model is not changed.

    Args:
        model: a causal LM or sequence classifier, with or without an adapter.
        tokenizer: saved with it, chat template included.
        folder: made if it does not exist; None saves nothing.
        title, facts: of the model card.
    """
    if folder is None:
        return
    adapter, sample = {}, {}
    if isinstance(model, PeftModel):
        adapter = adapter_state_dict(model, distributed.is_main())
        sample = sample_base(model, distributed.is_main())
    weights, lost = merged_state_dict(model, distributed.is_main())
    if lost > MERGED_EXACTLY:
        facts = facts | {"adapter": (
            f"merged in {unwrapped(model).dtype}, which rounds away {lost:.1%} of its update "
            f"(norm); exact in {ADAPTER_FOLDER}/")}
    with distributed.failing_together():
        if distributed.is_main():
            if adapter:
                save_adapter(model, adapter, sample, folder / ADAPTER_FOLDER)
            _save_model(unwrapped(model), weights, tokenizer, folder)
            (folder / "README.md").write_text(model_card(title, facts))


def rehearse(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """Write all of an export but its weights, and remove it: what cannot be saved fails early.

    Raises:
        UserError: the libraries refuse to save the tokenizer or a configuration.
    """
    if folder is None or not distributed.is_main():
        return
    plain = unwrapped(model)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".rehearsal-") as rehearsal:
            plain.config.save_pretrained(rehearsal)
            tokenizer.save_pretrained(rehearsal)
            if plain.can_generate():
                _generation_config(plain, tokenizer).save_pretrained(rehearsal)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the model could not be saved after the training: "
                        f"{(str(error).strip() or type(error).__name__).splitlines()[0]}; mend its "
                        "config.json, generation_config.json or tokenizer") from error


def _save_model(
    model: nn.Module, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Save the whole weights `state` with the class and configuration of `model`."""
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    assert not empty, f"weights that were not gathered: {empty}"
    assert isinstance(model, PreTrainedModel)
    config = copy.deepcopy(model.config)
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    with torch.device("meta"):
        plain = type(model)(config).to(model.dtype)
    if plain.can_generate():
        plain.generation_config = _generation_config(model, tokenizer)
    plain.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = eos_ids(tokenizer, config.eos_token_id)
    config.bos_token_id = tokenizer.bos_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Vicuna and Llama 2 have sampling parameters without do_sample: they mean sampling.
        config.do_sample = True
    return config


def model_card(title: str, facts: dict[str, Any]) -> str:
    """Return the README.md of an exported model, with its facts as a table."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"# {title}\n\nTrained with alpaca-rlhf. `{ARGUMENTS_FILE}` of the run gives every "
        f"argument; `--config` takes it.\n\n| | |\n| --- | --- |\n{rows}\n"
    )
