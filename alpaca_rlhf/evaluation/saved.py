"""Any saved model, opened for use: a folder that a step wrote, an adapter alone, or a hub id.

    policy = open_policy("output/actor", LoadingConfig())
    replies = policy.replies([policy.form.prompt_ids(messages)], SamplingConfig(64), seed=0)
    scorer = open_scorer("output/critic", LoadingConfig())
    scorer.score([prompt + reply.ids for …])

An adapter is loaded onto the model it was made for and merged, so all that follows knows whole
models only. The tokenizer is the adapter's own, or that of the folder around it (`OUT/adapter` lies
in `OUT`), or the base model's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from alpaca_rlhf.utils import distributed, preflight
from alpaca_rlhf.utils.configs import LoadingConfig, RoleConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, pad
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, Message, load_tokenizer
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.generation.decoder import Decoder
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
from alpaca_rlhf.utils.model.reward_model import (
    TokenScorer,
    is_reward_model,
    load_reward_model,
    scores,
)
from alpaca_rlhf.utils.run import export
from alpaca_rlhf.utils.run.run_folder import read_json

# Whole on one device: that is what DeepSpeed's configuration says to the loaders.
_WHOLE: dict[str, Any] = {"zero_optimization": {"stage": 0}}
# Where neither the model nor its tokenizer says how much it can read.
_USUAL_CONTEXT = 4096
_ENDLESS = 10**9  # what some tokenizers say for "no limit" is larger still
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth"]
_SCORED_AT_ONCE = 16384  # tokens, padding included


@dataclass(frozen=True)
class Reply:
    """What a policy has written.

    Attributes:
        text: without special tokens.
        ids: its tokens, eos included if it has one.
        ended: whether it ended by itself rather than at the limit.
    """

    text: str
    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class Policy:
    """A causal LM in evaluation mode, with all that drawing replies takes.

    Attributes:
        name: for people; the path it was opened by.
        model: on this process's device.
        form: its tokenizer and the chat template it was trained with.
        context: most tokens of prompt and reply together.
        eos_ids: what ends a reply.
    """

    name: str
    model: PreTrainedModel
    form: ChatFormat
    context: int
    eos_ids: list[int]

    def replies(
        self, prompts: Sequence[list[int]], sampling: SamplingConfig, seed: int, slots: int = 32
    ) -> list[list[Reply]]:
        """For each prompt `num_generations` replies, fixed by the seed.

        Args:
            prompts: ids, bos included.
            sampling: the distribution.
            seed: of the numbers they are drawn with; the same for two policies, so that like
                policies give like replies.
            slots: most replies that are drawn at once.
        """
        device = distributed.device()
        ids, mask = (part.to(device) for part in pad(list(prompts), self.form.pad_id, left=True))
        batch = Decoder(self.model, slots).generate(
            PromptBatch(ids, mask), sampling, torch.tensor(self.eos_ids, device=device),
            self.form.pad_id, torch.Generator(device=device).manual_seed(seed),
        )
        tokens = batch.input_ids[:, ids.shape[1] :].tolist()
        lengths = batch.response_mask.sum(-1).tolist()
        made = [self._reply(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        n = sampling.num_generations
        return [made[start : start + n] for start in range(0, len(made), n)]

    def _reply(self, ids: list[int]) -> Reply:
        return Reply(self.form.decode(ids), ids, ids[-1] in self.eos_ids)


@dataclass(frozen=True)
class Scorer:
    """A reward model in evaluation mode.

    Attributes:
        name: for people; the path it was opened by.
        model: gives a value at every token.
        form: its tokenizer and the chat template it was trained with.
        context: most tokens of prompt and reply together.
    """

    name: str
    model: TokenScorer
    form: ChatFormat
    context: int

    def rate(
        self, dialogues: Sequence[Sequence[Message]], replies: Sequence[Reply]
    ) -> list[float]:
        """The score of each reply to its dialogue, whatever tokenizer it was written with.

        As in step 3 a reply that was cut has no eos; of a dialogue that is too long the end counts.
        """
        rows = []
        for messages, reply in zip(dialogues, replies, strict=True):
            ids = self.form.response_ids(reply.text)[: None if reply.ended else -1]
            room = max(1, self.context - len(ids))
            rows.append(self.form.prompt_ids(messages)[-room:] + ids)
        return self.score(rows)

    @torch.no_grad()
    def score(self, rows: Sequence[list[int]]) -> list[float]:
        """The score of each whole sequence of ids, prompt and reply; like lengths go together."""
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            size = max(1, _SCORED_AT_ONCE // max(1, len(rows[order[0]])))
            batch, order = order[:size], order[size:]
            ids, mask = pad([rows[i] for i in batch], self.form.pad_id)
            device = distributed.device()
            for i, score in zip(
                batch, scores(self.model, ids.to(device), mask.to(device)).tolist(), strict=True
            ):
                found[i] = score
        return found


def open_policy(path: str, options: LoadingConfig) -> Policy:
    """A causal LM from a whole model's folder, an adapter's, or the hub.

    Raises:
        UserError: there is none, it is a reward model, or its base model cannot be found.
    """
    model, form = _open(path, options, load_causal_lm, scorer=False)
    return Policy(
        path, model, form, context_length(model, form.tokenizer),
        export.eos_ids(model, form.tokenizer),
    )


def open_scorer(path: str, options: LoadingConfig) -> Scorer:
    """A reward model from a whole model's folder, an adapter's, or the hub.

    Raises:
        UserError: there is none, or what is there gives no scores.
    """
    model, form = _open(path, options, load_reward_model, scorer=True)
    context = context_length(model, form.tokenizer)
    return Scorer(path, TokenScorer(model).eval(), form, context)


Load = Callable[..., PreTrainedModel]


def _open(
    path: str, options: LoadingConfig, load: Load, scorer: bool
) -> tuple[PreTrainedModel, ChatFormat]:
    preflight.require_cached(path)
    config = _adapter_config(path)
    if config is None:
        if is_reward_model(RoleConfig(model_name_or_path=path), options) != scorer:
            raise UserError(_other_kind(path, scorer))
        tokenizer = load_tokenizer(path, trust_remote_code=options.trust_remote_code)
        model = load(RoleConfig(model_name_or_path=path), options, _WHOLE, tokenizer)
    else:
        adapter = read_json(Path(config), f"no adapter in {path}")
        if scorer and "score" not in (adapter.get("modules_to_save") or []):
            raise UserError(_other_kind(path, scorer))
        base = _base_of(path, adapter)
        tokenizer = load_tokenizer(
            _tokenizer_of(path, base), trust_remote_code=options.trust_remote_code
        )
        model = _merged(path, load(RoleConfig(model_name_or_path=base), options, _WHOLE, tokenizer))
    return model.to(distributed.device()).eval(), ChatFormat(tokenizer)


def _adapter_config(path: str) -> str | None:
    """The configuration of an adapter; None for what is none, or cannot be had at all."""
    try:
        return find_adapter_config_file(path)
    except (OSError, ValueError):  # no such folder and no such model: the model's loader says so
        return None


def _other_kind(path: str, scorer: bool) -> str:
    if scorer:
        return (f"{path}: is no reward model (a sequence classifier with one label); give the "
                "folder that step 2 wrote")
    return (f"{path}: is a reward model, which scores and does not write; give the folder that "
            "step 1 wrote, or actor/ of step 3")


def _base_of(path: str, adapter: dict[str, Any]) -> str:
    """The model an adapter was made for; a relative folder is looked for around the adapter too.

    Raises:
        UserError: the adapter names none, or a folder that is not there.
    """
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}: the adapter does not say which model it was made for; set "
                        "base_model_name_or_path in its adapter_config.json")
    around = [Path(), *Path(path).absolute().parents]
    found = next((str(folder / base) for folder in around if (folder / base).is_dir()), None)
    if found is None and (Path(base).is_absolute() or base.count("/") != 1 or base[0] == "."):
        raise UserError(f"{path}: the adapter was made for {base}, and no such folder is there; "
                        "put it there, or set base_model_name_or_path in adapter_config.json")
    if found is None:
        preflight.require_cached(base)
    return found or base


def _tokenizer_of(path: str, base: str) -> str:
    """Where an adapter's tokenizer is: beside it, in the folder around it, or with its base."""
    beside = [Path(path), Path(path).absolute().parent]
    if not Path(path).exists():
        beside = [Path(snapshot_download(path, ignore_patterns=_WEIGHTS))]
    having = (str(folder) for folder in beside if (folder / "tokenizer_config.json").exists())
    return next(having, base)


def _merged(path: str, base: PreTrainedModel) -> PreTrainedModel:
    try:
        return PeftModel.from_pretrained(base, path).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: the adapter does not fit its base model ({reason})") from error


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens the model can read, as its configuration or its tokenizer says."""
    said = [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min((n for n in said if isinstance(n, int) and 0 < n < _ENDLESS), default=_USUAL_CONTEXT)


def short_names(paths: Sequence[str]) -> list[str]:
    """For people: the last parts of paths, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)
