"""Frozen weights in 4 bits (NF4: Dettmers et al. 2023, QLoRA) or 8 (LLM.int8, 2022): bitsandbytes.

Linear layers of the decoder are quantized as a model loads; heads, embeddings and norms are not.
What is exported does not come from quantized weights: the base is loaded again, as it was before.
"""

import copy
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.errors import UserError

# Of a product of normal numbers, relative; rounding gives 0.09 and 0.008.
LARGEST_ERROR = {4: 0.13, 8: 0.03}
# What tells peft and transformers about quantization, and how to load what was quantized.
_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "load_originals")
_STATES = ("state", "quant_state")  # in a layer, beside its weight


def require_quantizer(bits: int, dtype: torch.dtype, model: nn.Module) -> None:
    """Check by small products, as wide as a model's, that this device computes with such weights.

    Raises:
        UserError: bitsandbytes is missing, fails, or gives wrong numbers.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--load_in_{bits}bit: bitsandbytes is not installed; pip install "
                        "bitsandbytes")
    # It says for every product of 8 bits that inputs are rounded to fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    reason = ""
    for inputs in sorted({layer.weight.shape[isinstance(layer, nn.Linear)]
                          for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D)}):
        try:
            error = product_error(bits, dtype, inputs)
            if not error < LARGEST_ERROR[bits]:
                reason = f"a product of {inputs} inputs is wrong by {error:.0%}"
        except Exception as failure:  # whatever it raises on a device that it is not for
            reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        if reason:
            raise UserError(f"--load_in_{bits}bit: bitsandbytes cannot compute in {dtype} on "
                            f"{distributed.device().type} ({reason}); take the other of 4 and 8 "
                            "bits, or remove the flag")


def product_error(bits: int, dtype: torch.dtype, inputs: int) -> float:
    """Return the relative error of a product with a quantized weight and of its gradient."""
    import bitsandbytes

    random = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(64, inputs, generator=random).to(dtype) for _ in range(2))
    given = torch.randn(64, 64, generator=random).to(distributed.device(), dtype)
    layer: Any = bitsandbytes.nn.Linear8bitLt(
        inputs, 64, bias=False, has_fp16_weights=False, threshold=6.0,
    ) if bits == 8 else bitsandbytes.nn.Linear4bit(
        inputs, 64, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.load_state_dict({"weight": weight})
    x = x.to(distributed.device()).requires_grad_()
    product = layer.to(x.device)(x)
    product.backward(given)
    assert x.grad is not None
    whole = weight.float().to(x.device)
    pairs = ((product, x.float() @ whole.T), (x.grad, given.float() @ whole))
    return max(((one.float() - two).norm() / two.norm()).item() for one, two in pairs)


def config(bits: int, dtype: torch.dtype, scores: bool = False) -> BitsAndBytesConfig:
    """Return how the linear layers of a causal LM, or of one that `scores`, are quantized."""
    skipped = ["score"] if scores else None  # the default: the head, whatever its name
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped)


class _Frozen:
    """A quantized layer that computes alike in training and evaluation, and that is not saved.

    On a CPU bitsandbytes has other kernels for evaluation, so PPO's ratios would not start at 1;
    and those of 8 bits overflow on processors without VNNI.
    """

    def train(self, mode: bool = True) -> "_Frozen":
        return self

    def _save_to_state_dict(self, *_: Any) -> None:
        return


def settle(model: PreTrainedModel, load_originals: Callable[[], PreTrainedModel]) -> None:
    """Prepare a model that was just quantized for training and export.

    `load_originals` loads it in host memory as it was before.
    """
    for layer in model.modules():
        if is_quantized(getattr(layer, "weight", None)):
            kind: Any = type(layer)
            layer.training = True
            if hasattr(layer, "init_8bit_state"):
                layer.init_8bit_state()  # from the weight, where copies of the layer would lose it
            layer.__class__ = type(kind.__name__, (_Frozen, kind), {})
    del model.config.quantization_config  # which would be exported
    model.load_originals = load_originals


def is_quantized(weight: Any) -> bool:
    """Return whether a weight is stored in 4 or 8 bits."""
    return isinstance(weight, nn.Parameter) and not weight.is_floating_point()


def twin(module: nn.Module) -> Any:
    """Copy a module but not its weights, nor what quantized layers keep beside them."""
    shared = [*module.parameters(), *(vars(layer)[name] for layer in module.modules()
                                      for name in _STATES if vars(layer).get(name) is not None)]
    return copy.deepcopy(module, {id(part): part for part in shared})


def mark_like(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Mark a model that has got the decoder of another one as quantized, if that is."""
    for name in _MARKS:
        if hasattr(other, name):
            setattr(model, name, getattr(other, name))
