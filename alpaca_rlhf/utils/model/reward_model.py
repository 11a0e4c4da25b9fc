"""The reward model and the critic: a sequence classifier with one label, applied to every token.

It is loaded and saved as `LlamaForSequenceClassification` (or the family's own), so any tool can
read it. Here its head is applied to every position: the critic needs them all, and the score is
found by the mask, not by comparing ids with pad.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alpaca_rlhf.utils.configs import LoadingConfig, RoleConfig
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.model.causal_lm import load_config, load_model
from alpaca_rlhf.utils.model.lora import unwrapped
from alpaca_rlhf.utils.rl_math import align

STATISTICS_FILE = "score_statistics.json"


class ScoreHead(nn.Linear):
    """A linear head that computes in fp32 whatever its weights are: in bf16 many scores are equal.

    Args:
        head: the linear layer whose parameters it takes over.
    """

    def __init__(self, head: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(head.in_features, head.out_features, bias=head.bias is not None)
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [..., 1] of hidden states [..., D]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias)


class TokenScorer(nn.Module):
    """Compute a scalar for every position: the value of a state, or the score at the last token.

    Args:
        model: a sequence classifier with one label, or the same with an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, groups: Sequence[tuple[list[int], int]] = ()) -> Tensor:
        """Return values [B, T], in fp32, of ids [B, T] padded right.

        What follows a token does not change its value, so there is no mask.

        Args:
            input_ids: [B, T].
            groups: rows of similar length and their length, each without the padding of the others;
                values of padding are 0 where they are not computed.
        """
        if not groups:
            return self._values(input_ids)
        parts, order = [], []
        for rows, width in groups:
            values = self._values(input_ids[rows, :width])
            parts.append(F.pad(values, (0, input_ids.shape[1] - width)))
            order += rows
        return torch.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]

    def _values(self, input_ids: Tensor) -> Tensor:
        classifier = unwrapped(self.model)
        decoder = getattr(classifier, classifier.base_model_prefix)
        hidden = decoder(input_ids=input_ids, use_cache=False)[0]
        return classifier.score(hidden).squeeze(-1)


def scores(
    scorer: nn.Module, input_ids: Tensor, attention_mask: Tensor,
    groups: Sequence[tuple[list[int], int]] = (),
) -> Tensor:
    """Return scores [B] of whole sequences: the value at each row's last real token.

    Args:
        scorer: a `TokenScorer`, or its DeepSpeed engine.
        input_ids, attention_mask: [B, T], padded on either side.
        groups: rows and their greatest length, which are computed apart; by default all together.
    """
    ids, lengths = align(input_ids, attention_mask)
    values = scorer(ids, groups)
    return values.gather(-1, (lengths - 1).unsqueeze(-1)).squeeze(-1)


def is_reward_model(role: RoleConfig, loading: LoadingConfig) -> bool:
    """Return whether the role's path holds a sequence classifier with one label."""
    config = load_config(role, loading)
    names = config.architectures or [""]
    return names[0].endswith("ForSequenceClassification") and config.num_labels == 1


def require_reward_model(role: RoleConfig, loading: LoadingConfig) -> None:
    """Raise UserError unless the role's path holds a sequence classifier with one label."""
    if not is_reward_model(role, loading):
        raise UserError(
            f"{role.flag('model_name_or_path')} {role.model_name_or_path}: is no reward model (a "
            "sequence classifier with one label); give the folder that step 2 wrote"
        )


def load_reward_model(
    role: RoleConfig, loading: LoadingConfig, ds_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """Load a sequence classifier with one label; see `load_model`.

    From a causal LM the head is new, drawn from N(0, 1 / (d + 1)) with d its input size (Stiennon
    et al. 2020; "N implementation details", 2023); from a reward model it is the saved one.
    """
    new_head = not is_reward_model(role, loading)
    model = load_model(
        AutoModelForSequenceClassification, role, loading, ds_config, tokenizer,
        num_labels=1,
    )
    # Only now, for the embeddings may have got a row for it.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    if new_head:
        weight = model.score.weight
        std = 1.0 / math.sqrt(model.score.in_features + 1)
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
            if weight.numel():
                nn.init.normal_(weight, std=std)
    model.score = ScoreHead(model.score)
    return model


def save_statistics(folder: Path, mean: float, std: float, count: int) -> None:
    """Save mean and standard deviation of `count` held-out chosen scores beside the model."""
    record = {"mean": mean, "std": std, "count": count}
    (folder / STATISTICS_FILE).write_text(json.dumps(record, indent=2) + "\n")


def load_statistics(folder: str) -> tuple[float, float]:
    """Load the mean and standard deviation saved with a reward model.

    Raises:
        UserError: the file is missing or broken.
    """
    path = Path(folder) / STATISTICS_FILE
    try:
        record = json.loads(path.read_text())
        return float(record["mean"]), float(record["std"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--critic_model_name_or_path {folder}: the mean and standard deviation of its scores, "
            "which step 2 saves, are missing or broken; run step 2 again, or take "
            "--reward_normalization reference"
        ) from error
