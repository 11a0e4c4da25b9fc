"""What would otherwise fail late, checked before the data is read and models are loaded."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from alpaca_rlhf.utils import console, memory_plan, optimizer
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.logging import tracker
from alpaca_rlhf.utils.memory_plan import Planned


def check(
    models: Sequence[Planned], tokenizer: str | None = None, trackers: Sequence[str] = ()
) -> None:
    """See to it that models can be had, optimizers and trackers built, and that all of it fits.

    Args:
        models: those that the run trains.
        tokenizer: hub id or folder, if it isn't a model's own.
        trackers: that metrics go to.

    Raises:
        UserError: a hub model is not in the cache and there is to be no network; a compiler or a
            tracker's package is missing; the weights do not fit. A folder that is no model is left
            to its loader.
    """
    tracker.require_packages(trackers)
    for path in [*(model.path for model in models), tokenizer]:
        if path is not None:
            require_cached(path)
    if any(model.settings.offload for model in models):
        optimizer.require_offloading()
    if all(_is_hub_id(m.path) or (Path(m.path) / "config.json").exists() for m in models):
        warning = memory_plan.check(models)
        if warning:
            console.say(warning)


def require_cached(path: str) -> None:
    """Refuse a hub id that is not in the cache when HF_HUB_OFFLINE says there is no network.

    Raises:
        UserError: names the cache, and how to fill it.
    """
    if not (_is_hub_id(path) and constants.HF_HUB_OFFLINE):
        return
    wanted = ("config.json", "tokenizer_config.json", "tokenizer.json")
    if any(isinstance(try_to_load_from_cache(path, name), str) for name in wanted):
        return
    raise UserError(
        f"{path}: no such folder, HF_HUB_OFFLINE is set, and the hub's cache "
        f"({constants.HF_HUB_CACHE}) has nothing of that name; give a folder, unset "
        f"HF_HUB_OFFLINE, or fill the cache where there is a network (hf download {path})"
    )


def _is_hub_id(path: str) -> bool:
    return not Path(path).exists() and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None
