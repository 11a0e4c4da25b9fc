"""`--reward_function`: a Python function of the user's that scores responses."""

import importlib
import math
import traceback
from collections.abc import Callable

import torch

from alpaca_rlhf.utils.errors import UserError

RewardFunction = Callable[[list[str], list[str]], list[float]]


def load_reward_function(name: str | None) -> RewardFunction | None:
    """Import `module:name`, a function of prompts and responses (texts) that returns floats.

    Raises:
        UserError: no such module, or nothing callable of that name in it.
    """
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--reward_function {name}: {error}; give module:name, with its folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise UserError(f"--reward_function {name}: is not callable; name a function")
    return function


def apply_reward_function(
    function: RewardFunction, prompts: list[str], responses: list[str]
) -> list[float]:
    """Return the score of each response by a reward function.

    Raises:
        UserError: it raises, or does not return one number for each response, finite in fp32.
    """
    expected = f"return one finite float for each of the {len(responses)} responses"
    try:
        given = list(function(prompts, responses))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"--reward_function: {type(error).__name__}: {error} ({frame.filename}:"
                        f"{frame.lineno}, in {frame.name}); {expected}") from error
    if len(given) != len(responses):
        raise UserError(f"--reward_function: returned {len(given)} values; {expected}")
    scores = []
    for value in given:
        try:
            scores.append(torch.tensor(float(value), dtype=torch.float32).item())
        except (TypeError, ValueError, RuntimeError, OverflowError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise UserError(f"--reward_function: returned {value!r:.80}; {expected}")
    return scores
