"""Samples to encoded rows: prompt and responses as token ids, cut to the maximum lengths."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from alpaca_rlhf.utils.data.samples import Sample
from alpaca_rlhf.utils.data.tokenizer import ChatFormat
from alpaca_rlhf.utils.losses import IGNORE_INDEX

# Columns of a row.
FILTERED_OUT = "filtered_out"  # reason why the row is not used, or ""
LENGTH = "length"  # in tokens; of a pair, of the longer sequence
_EMPTY = "empty response"  # also one of nothing but special tokens, spelled out

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Lengths:
    """Maximum lengths in tokens, and the treatment of rows that are longer."""

    prompt: int  # a longer one keeps bos, the system's text and its end
    response: int  # eos included; a longer one keeps its start
    overlong: str  # "truncate", "drop" or "error"
    flag: str  # where the lengths come from, for messages

    @classmethod
    def of_sequence(cls, max_seq_len: int, overlong: str) -> "Lengths":
        """Give prompt and response half of a sequence each; what one leaves, the other takes."""
        half = max_seq_len // 2
        return cls(half, max_seq_len - half, overlong, f"--max_seq_len {max_seq_len}")

    @classmethod
    def of_prompt(cls, max_prompt_seq_len: int, overlong: str) -> "Lengths":
        """Give everything to the prompt."""
        return cls(max_prompt_seq_len, 0, overlong, f"--max_prompt_seq_len {max_prompt_seq_len}")

    def fit(
        self, prompt: list[int], *responses: list[int], head: int = 0
    ) -> tuple[list[int], list[list[int]]]:
        """Cut a prompt and its responses so that each sequence fits; a cut response has no eos.

        A cut prompt keeps its end, and of its first `head` ids (bos and the system's text) as many
        as half of its length.
        """
        room = self._for_prompt(*responses)
        if len(prompt) > room:
            head = min(head, max(1, room // 2), room)
            prompt = prompt[:head] + prompt[len(prompt) - room + head :]
        total = self.prompt + self.response
        return prompt, [response[: total - len(prompt)] for response in responses]

    def cut(self, prompt: list[int], *responses: list[int]) -> bool:
        """Return whether the prompt would be cut."""
        return len(prompt) > self._for_prompt(*responses)

    def _for_prompt(self, *responses: list[int]) -> int:
        total = self.prompt + self.response
        longest = max((len(response) for response in responses), default=self.response)
        return max(self.prompt, total - longest)


def _head(
    chat: ChatFormat, lengths: Lengths, sample: Sample, prompt: list[int], *responses: list[int]
) -> int:
    """Return how many ids a prompt keeps at its start if it is cut: bos and the system's text."""
    return chat.head_length(sample.messages, prompt) if lengths.cut(prompt, *responses) else 0


def encode_sft(
    samples: Sequence[Sample], chat: ChatFormat, lengths: Lengths, train_on: str = "all",
    train_on_prompt: bool = False,
) -> Rows:
    """Encode samples of step 1: `input_ids`, and `labels` that are -100 where nothing is trained.

    `train_on` "last" trains the response alone, "all" the assistant's earlier turns too, unless
    they are the responses of rows of their own, or marked as not trained.
    """
    dialogues = chat.segments([sample.messages for sample in samples])
    responses = chat.responses(sample.chosen for sample in samples)
    rows = []
    for sample, segments, full in zip(samples, dialogues, responses, strict=True):
        whole = list(chain.from_iterable(segments))
        head = _head(chat, lengths, sample, whole, full)
        prompt, (response,) = lengths.fit(whole, full, head=head)
        earlier = train_on == "all" and sample.history_is_trained
        labels = _labels(segments, train_on_prompt, earlier, sample.untrained)
        labels, _ = lengths.fit(labels, full, head=head)
        row: dict[str, Any] = {"input_ids": prompt + response, "labels": labels + response}
        before, after = len(whole) + len(full), len(row["input_ids"])
        row |= _outcome(segments, before, after, len(whole) - len(prompt), lengths)
        if chat.is_empty(sample.chosen):
            row[FILTERED_OUT] = _EMPTY
        rows.append(row)
    return rows


def _labels(
    segments: list[list[int]], contexts: bool, earlier: bool, untrained: Sequence[int]
) -> list[int]:
    """Return the ids of a prompt that are trained, and -100 elsewhere.

    Even segments are contexts, odd ones earlier responses; those of the numbers `untrained` are
    left out, and so is a response that is nothing but its eos, unless contexts are trained too.
    """
    left_out = {2 * number + 1 for number in untrained}
    return [
        token if number not in left_out
        and (contexts or (earlier and number % 2 and len(segment) > 1)) else IGNORE_INDEX
        for number, segment in enumerate(segments) for token in segment
    ]


def encode_pairs(samples: Sequence[Sample], chat: ChatFormat, lengths: Lengths) -> Rows:
    """Encode samples of step 2: `chosen_ids` and `rejected_ids`, each with the prompt."""
    dialogues = chat.segments([sample.messages for sample in samples])
    better = chat.responses(sample.chosen for sample in samples)
    worse = chat.responses(sample.rejected or "" for sample in samples)
    rows = []
    for sample, segments, *full in zip(samples, dialogues, better, worse, strict=True):
        whole = list(chain.from_iterable(segments))
        head = _head(chat, lengths, sample, whole, *full)
        prompt, (chosen, rejected) = lengths.fit(whole, *full, head=head)
        row: dict[str, Any] = {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        before = sum(map(len, full)) + len(whole)
        after = len(chosen) + len(rejected) + len(prompt)
        row |= _outcome(segments, before, after, len(whole) - len(prompt), lengths)
        row[LENGTH] = len(prompt) + max(len(chosen), len(rejected))
        if chosen == rejected:
            row[FILTERED_OUT] = "responses are identical after truncation"
        if chat.is_empty(sample.chosen) or chat.is_empty(sample.rejected or ""):
            row[FILTERED_OUT] = _EMPTY
        rows.append(row)
    return rows


def encode_prompts(samples: Sequence[Sample], chat: ChatFormat, lengths: Lengths) -> Rows:
    """Encode samples of step 3: `prompt_ids`, and `messages` as JSON to show and for gold rules."""
    rows = []
    dialogues = chat.segments([sample.messages for sample in samples])
    for sample, segments in zip(samples, dialogues, strict=True):
        whole = list(chain.from_iterable(segments))
        prompt, _ = lengths.fit(whole, head=_head(chat, lengths, sample, whole))
        row = {"prompt_ids": prompt, "messages": json.dumps(sample.messages, ensure_ascii=False)}
        cut = len(whole) - len(prompt)
        rows.append(row | _outcome(segments, len(whole), len(prompt), cut, lengths))
    return rows


def _outcome(
    segments: list[list[int]], before: int, after: int, prompt_cut: int, lengths: Lengths
) -> dict[str, Any]:
    """Return the columns all rows have: cut or not, why filtered out, and the length."""
    cut = after < before
    reason = f"over {lengths.flag}" if cut and lengths.overlong != "truncate" else ""
    if not segments:
        reason = "refused by the chat template"
    return {"cut": cut, "prompt_cut": prompt_cut > 0, FILTERED_OUT: reason, LENGTH: after}
