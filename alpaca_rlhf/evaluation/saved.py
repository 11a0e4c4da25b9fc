"""Open any saved model for use: a folder that a step exported, an adapter alone, or a hub id.

    policy = open_policy("output/actor", LoadingConfig())
    responses = policy.respond([messages], SamplingConfig(max_new_tokens=64), seed=0)
    scorer = open_scorer("output/critic", LoadingConfig())
    scorer.rate([messages], responses)

An adapter is loaded onto its base model and merged, so all other code sees whole models only. The
tokenizer is the adapter's own, or that of the folder around it (`OUT/adapter` is in `OUT`), or the
base model's.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from alpaca_rlhf.evaluation.conversation import fit_context
from alpaca_rlhf.utils import console, distributed, preflight
from alpaca_rlhf.utils.configs import LoadingConfig, RoleConfig, SamplingConfig
from alpaca_rlhf.utils.data.batches import PromptBatch, pad
from alpaca_rlhf.utils.data.tokenizer import ChatFormat, Message, eos_ids, load_tokenizer
from alpaca_rlhf.utils.errors import UserError
from alpaca_rlhf.utils.generation.decoder import Decoder
from alpaca_rlhf.utils.model.causal_lm import load_causal_lm
from alpaca_rlhf.utils.model.reward_model import (
    TokenScorer,
    is_reward_model,
    load_reward_model,
    scores,
)
from alpaca_rlhf.utils.model.weights.backbone import base_model
from alpaca_rlhf.utils.run.run_folder import read_json

# The part of DeepSpeed's configuration that loading reads: the whole model on one device.
_WHOLE: dict[str, Any] = {"zero_optimization": {"stage": 0}}
_DEFAULT_CONTEXT = 4096  # where neither the model nor its tokenizer states a limit
_NO_LIMIT = 10**9  # tokenizers without a limit state a larger number
_DEFAULT_NEW_TOKENS = 256
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.pth"]
_TOKENS_PER_BATCH = 16384  # scored at once, padding included

Dialogue = Sequence[Message]


@dataclass(frozen=True)
class Response:
    """A generated response."""

    text: str  # without special tokens
    ids: list[int]  # eos included if it has one
    ended: bool  # with eos rather than at the maximum length

    def record(self) -> dict[str, Any]:
        """Return the response as it stands in files of results."""
        return {"reply": self.text, "tokens": len(self.ids), "ended": self.ended}


@dataclass(frozen=True)
class Policy:
    """A causal LM in evaluation mode on this process's device."""

    name: str  # the path it was opened by
    model: PreTrainedModel
    chat: ChatFormat  # its tokenizer and the chat template it was trained with
    context: int  # maximum number of tokens of prompt and response together
    eos_ids: list[int]

    def resolve(self, sampling: SamplingConfig) -> SamplingConfig:
        """Fill in `max_new_tokens` where it is None: 256, or half of a short context.

        Raises:
            UserError: it leaves no room for a prompt.
        """
        longest = sampling.max_new_tokens or min(_DEFAULT_NEW_TOKENS, self.context // 2)
        if longest >= self.context:
            raise UserError(f"--max_new_tokens {longest}: {self.name} reads {self.context} tokens, "
                            "prompt and response together; take fewer")
        return replace(sampling, max_new_tokens=longest)

    def respond(
        self, dialogues: Sequence[Dialogue], sampling: SamplingConfig, seed: int,
        max_prompt_tokens: int | None = None, slots: int = 32,
    ) -> list[list[Response]]:
        """Generate `num_generations` responses to each dialogue, whose last turn is the user's.

        The seed fixes the random numbers, so equal policies give equal responses. Of a dialogue
        that is too long the oldest turns are left out, as in the chats; with `max_prompt_tokens` a
        prompt is cut to its last tokens, as in step 3. At most `slots` are decoded together.

        Raises:
            UserError: a dialogue does not fit, or the chat template refuses it.
        """
        sampling = self.resolve(sampling)
        limit = self.context - sampling.max_new_tokens
        prompts = []
        for number, messages in enumerate(dialogues, 1):
            try:
                if max_prompt_tokens is None:
                    ids, _ = fit_context(
                        self.chat, messages, self.context, sampling.max_new_tokens)
                else:
                    ids = self.chat.prompt_ids(messages)[-min(max_prompt_tokens, limit) :]
                prompts.append(ids)
            except UserError as error:
                raise UserError(f"{self.name}, prompt {number}: {error}") from None
        device = distributed.device()
        rollout = Decoder(self.model, slots).generate(
            PromptBatch(*pad(prompts, self.chat.pad_id, left=True)).to(device), sampling,
            torch.tensor(self.eos_ids, device=device), self.chat.pad_id,
            torch.Generator(device=device).manual_seed(seed),
        )
        lengths = rollout.response_mask.sum(-1).tolist()
        rows = [row[:n] for row, n in zip(rollout.responses.tolist(), lengths, strict=True)]
        made = iter(Response(self.chat.decode(row), row, row[-1] in self.eos_ids) for row in rows)
        return [[next(made) for _ in range(sampling.num_generations)] for _ in dialogues]


@dataclass(frozen=True)
class Scorer:
    """A reward model in evaluation mode on this process's device; attributes as of `Policy`."""

    model: TokenScorer
    chat: ChatFormat
    context: int

    def rate(
        self, dialogues: Sequence[Dialogue], responses: Sequence[Sequence[Response]]
    ) -> list[list[float]]:
        """Score the responses to each dialogue, whichever tokenizer they were generated with.

        As in step 3 a response that was cut has no eos; of a long dialogue the end is used.
        """
        rows = []
        for messages, some in zip(dialogues, responses, strict=True):
            prompt = self.chat.prompt_ids(messages)
            for response in some:
                ids = self.chat.response_ids(response.text)[: None if response.ended else -1]
                rows.append(prompt[-max(1, self.context - len(ids)) :] + ids)
        rated = iter(self.score(rows))
        return [[next(rated) for _ in some] for some in responses]

    @torch.no_grad()
    def score(self, rows: Sequence[list[int]]) -> list[float]:
        """Score whole sequences, prompt and response; those of similar length go together."""
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            size = max(1, _TOKENS_PER_BATCH // max(1, len(rows[order[0]])))
            batch, order = order[:size], order[size:]
            padded = pad([rows[i] for i in batch], self.chat.pad_id)
            ids, mask = (part.to(distributed.device()) for part in padded)
            for i, score in zip(batch, scores(self.model, ids, mask).tolist(), strict=True):
                found[i] = score
        return found


def open_policy(path: str, loading: LoadingConfig) -> Policy:
    """Open a causal LM: a whole model's folder, an adapter's, or a hub id.

    Raises:
        UserError: there is none, it is a reward model, or its base model cannot be found.
    """
    model, chat, context = _open(path, loading, scorer=False)
    ends = eos_ids(chat.tokenizer, model.generation_config.eos_token_id)
    chat.hide(ends)
    return Policy(name=path, model=model, chat=chat, context=context, eos_ids=ends)


def open_scorer(path: str, loading: LoadingConfig) -> Scorer:
    """Open a reward model: a whole model's folder, an adapter's, or a hub id.

    Raises:
        UserError: there is none, or the model there is not a reward model.
    """
    model, chat, context = _open(path, loading, scorer=True)
    return Scorer(TokenScorer(model).eval(), chat, context)


def _open(
    path: str, loading: LoadingConfig, scorer: bool
) -> tuple[PreTrainedModel, ChatFormat, int]:
    """Return a model, its tokenizer and the maximum sequence length that they state."""
    preflight.require_cached(path)
    config = None
    with contextlib.suppress(OSError, ValueError):  # there is nothing: loading raises the error
        config = find_adapter_config_file(path)
    if config is None:
        base = tokenizer_path = path
        right_kind = is_reward_model(RoleConfig(model_name_or_path=path), loading) == scorer
    else:
        adapter = read_json(Path(config), f"no adapter in {path}")
        base = base_model(path, adapter)
        preflight.require_cached(base)
        tokenizer_path = _tokenizer_path(path, base)
        right_kind = not scorer or "score" in (adapter.get("modules_to_save") or [])
    if not right_kind and scorer:
        raise UserError(f"{path}: is no reward model (a sequence classifier with one label); give "
                        "the folder that step 2 exported")
    if not right_kind:
        raise UserError(f"{path}: is a reward model, which scores and does not generate; give the "
                        "folder that step 1 exported, or actor/ of step 3")
    role = RoleConfig(model_name_or_path=base)
    preflight.require_weights(base)
    planned = preflight.Planned(role, loading, scores=scorer, decodes=not scorer)
    for line in preflight.require_served(planned):
        console.say(line)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=loading.trust_remote_code)
    load = load_reward_model if scorer else load_causal_lm
    model = load(role, loading, _WHOLE, tokenizer)
    if config is not None:
        try:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{path}: the adapter does not fit its base model ({reason})") from error
    stated = [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length]
    context = min((n for n in stated if isinstance(n, int) and 0 < n < _NO_LIMIT),
                  default=_DEFAULT_CONTEXT)
    return model.to(distributed.device()).eval(), ChatFormat(tokenizer), context


def _tokenizer_path(path: str, base: str) -> str:
    """Return the path of an adapter's tokenizer; see the top of this module."""
    beside = [Path(path), Path(path).absolute().parent]
    if not Path(path).exists():
        beside = [Path(snapshot_download(path, ignore_patterns=_WEIGHTS))]
    having = (str(folder) for folder in beside if (folder / "tokenizer_config.json").exists())
    return next(having, base)


def short_names(paths: Sequence[str]) -> list[str]:
    """Shorten paths to their last parts, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)
