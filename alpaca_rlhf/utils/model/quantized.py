"""Frozen weights in 4 or 8 bits under LoRA adapters (QLoRA, Dettmers et al. 2023), by bitsandbytes.

Only the linear layers of the decoder are quantized: embeddings, norms and heads are not.
"""

import copy
import importlib.util
import logging
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from alpaca_rlhf.utils import distributed
from alpaca_rlhf.utils.configs import LoadingConfig
from alpaca_rlhf.utils.errors import UserError


def config(loading: LoadingConfig) -> BitsAndBytesConfig | None:
    """Return how frozen weights are quantized; None if they are not."""
    if loading.bits is None:
        return None
    # It says for every product that 8-bit products have inputs in fp16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if loading.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=distributed.resolve_dtype(loading.dtype))


def require_quantizer(loading: LoadingConfig) -> None:
    """Check, by a small product, that this device computes with quantized weights.

    Raises:
        UserError: bitsandbytes is missing, or fails.
    """
    if loading.bits is None:
        return
    flag = f"--load_in_{loading.bits}bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{flag}: needs bitsandbytes; pip install 'alpaca-rlhf[quantized]', or "
                        "leave the flag out")
    dtype, device = distributed.resolve_dtype(loading.dtype), distributed.device()
    wanted: Any = config(loading)
    try:
        import bitsandbytes

        layer: Any = (
            bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
            if loading.bits == 8 else bitsandbytes.nn.Linear4bit(
                64, 64, bias=False, quant_type=wanted.bnb_4bit_quant_type, compute_dtype=dtype))
        found = layer.to(dtype).to(device)(torch.ones(2, 64, dtype=dtype, device=device))
        works = bool(found.isfinite().all())
    except Exception as error:  # whatever its kernels raise on a device that they are not for
        raise UserError(f"{flag}: bitsandbytes cannot compute in {loading.dtype} on {device.type} "
                        f"({(str(error) or type(error).__name__).splitlines()[0]}); leave the flag "
                        "out") from error
    if not works:
        raise UserError(f"{flag}: bitsandbytes gives numbers that are not finite in "
                        f"{loading.dtype} on {device.type}; leave the flag out")


def prepare(model: Any, auto_class: Any, path: str, **options: Any) -> None:
    """Make a loaded model compute alike in both modes, and remember how its weights are loaded.

    On a CPU bitsandbytes has other kernels for evaluation mode, 8-bit ones with 8-bit inputs:
    log-probabilities of the rollout phase would not be those of the update.
    """
    for layer in model.modules():
        if any(map(is_quantized, layer.parameters(recurse=False))):
            layer.train()
            layer.train = MethodType(_stay, layer)
    settings = copy.deepcopy(model.config)
    del settings.quantization_config
    model.load_unquantized = partial(
        auto_class.from_pretrained, path, config=settings, dtype=model.dtype, **options)


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is stored in 4 or 8 bits."""
    return not weight.is_floating_point()


def unquantized(model: PreTrainedModel) -> dict[str, Tensor]:
    """Load the weights of a quantized model again, in host memory, as they were before."""
    load: Any = model.load_unquantized
    return dict(load().state_dict())


def elements(weight: Tensor) -> int:
    """Return the number of a weight's elements, of which a byte may hold two."""
    state: Any = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def shared_state(model: nn.Module) -> dict[int, Any]:
    """Return what quantized layers keep beside their weights, by id."""
    states = [getattr(module, "state", None) for module in model.modules()]
    return {id(state): state for state in states if state is not None}
