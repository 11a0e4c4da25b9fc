"""The sample that every data format gives, and the checks that formats are made of.

Each check returns the value, or raises `Unusable` with the reason.
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from alpaca_rlhf.utils.data.tokenizer import Message


@dataclass(frozen=True)
class Sample:
    """A dialogue that ends with a user turn, and its responses.

    A turn of Stanford Alpaca's format has `instruction` and `input` beside its content, which is
    both, for the template of that name.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str | None = None  # None where the data has only one response
    # Step 1 may train the assistant's earlier turns, unless each of them is a row of its own.
    history_is_trained: bool = field(default=True, compare=False)
    language: str | None = field(default=None, compare=False)  # as the data states it

    def prompt_key(self) -> str:
        """Return the text that equal prompts have in common."""
        turns = [{"content": m["content"], "role": m["role"]} for m in self.messages]
        return json.dumps(turns, ensure_ascii=False)


class Unusable(Exception):
    """A row that cannot be used; the message is the reason under which it is counted."""


# --- values --------------------------------------------------------------------------------------


def text_of(value: Any, what: str) -> str:
    """Check for text that is not empty, and strip it."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is not text")
    if not value.strip():
        raise Unusable(f"empty {what}")
    return value.strip()


def list_of(value: Any, what: str) -> list[Any]:
    """Check for a list that is not empty."""
    if not isinstance(value, list):
        raise Unusable(f"{what} is not a list")
    if not value:
        raise Unusable(f"empty {what}")
    return value


def value_of(value: Any, key: str, what: str) -> Any:
    """Check for an object, and return its value under a key, or None."""
    if not isinstance(value, dict):
        raise Unusable(f"{what} is not an object")
    return value.get(key)


def number_of(value: Any, what: str) -> float:
    """Check for a finite number; true and false are none."""
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not finite:
        raise Unusable(f"{what} is not a number")
    return value


# --- turns ---------------------------------------------------------------------------------------

_HUMAN_ASSISTANT = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):", re.MULTILINE)
_ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "model": "assistant",
}


def user_turn(text: str) -> Message:
    """Return a user turn."""
    return {"role": "user", "content": text}


def is_dialogue(text: Any) -> bool:
    """Return whether it is `Human: … Assistant: …` text."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None


def parse_dialogue(text: str) -> list[Message]:
    """Split `Human: … Assistant: …` text into turns; a last turn that is empty stays as ""."""
    parts = _HUMAN_ASSISTANT.split(text.strip())
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human":
        raise Unusable("dialogue does not begin with Human:")
    return turns_between(parts)


def turns_between(parts: list[str]) -> list[Message]:
    """Pair up names and texts, which follow whatever stands before the first name."""
    return [
        {"role": _ROLES[name.lower()], "content": text.strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def turns_of(value: Any, what: str) -> list[Message]:
    """Read a list of {role, content} or {from, value}, with roles by our names."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Unusable(f"{what} is neither text nor messages")
    pairs = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
             for turn in value]
    if not all(isinstance(role, str) and isinstance(text, str) for role, text in pairs):
        raise Unusable(f"{what} is neither text nor messages")
    if any(role.lower() not in _ROLES for role, _ in pairs):
        raise Unusable("role is not system, user or assistant")
    return [{"role": _ROLES[role.lower()], "content": text.strip()} for role, text in pairs]


def ending_with_user(turns: list[Message]) -> list[Message]:
    """Check that the last turn is the user's and not empty."""
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"]:
        raise Unusable("dialogue does not end with a user turn")
    return turns


def in_order(turns: list[Message]) -> list[Message]:
    """Check for a system turn or none, then user and assistant in turn, the user last."""
    ending_with_user(turns)
    talk = turns[1:] if turns[0]["role"] == "system" else turns
    if [turn["role"] for turn in talk] != (["user", "assistant"] * len(talk))[: len(talk)]:
        raise Unusable("roles out of order")
    if not all(turn["content"] for turn in talk):
        raise Unusable("empty turn")
    return turns


def messages_of(prompt: Any, what: str = "prompt") -> list[Message]:
    """Read a prompt, given as text, as `Human: …` text or as messages."""
    if not isinstance(prompt, str):
        return in_order(turns_of(prompt, what))
    if not is_dialogue(prompt):
        return [user_turn(text_of(prompt, what))]
    turns = parse_dialogue(prompt)
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return ending_with_user(turns)


# --- samples -------------------------------------------------------------------------------------

# JSON can spell half of a character ("\\ud83d"), which no encoding can hold.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def response_of(value: Any, side: str) -> str:
    """Read a response, given as text or as messages of which the last is the assistant's."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        if value[-1].get("role", "assistant") != "assistant":
            raise Unusable(f"{side} does not end with an assistant turn")
        value = value[-1].get("content")
    return text_of(value, side)


def sample_of(messages: list[Message], chosen: Any, rejected: Any = None, **more: Any) -> Sample:
    """Make a sample; without `rejected` it is no pair."""
    better = response_of(chosen, "chosen")
    worse = None if rejected is None else response_of(rejected, "rejected")
    if better == worse:
        raise Unusable("chosen equals rejected")
    texts = (better, worse or "", *(text for message in messages for text in message.values()))
    if any(_HALF_CHARACTER.search(text) for text in texts):
        raise Unusable("text is not valid Unicode")
    return Sample(tuple(messages), better, worse, **more)


def pair_of(messages: list[Message], chosen: Any, rejected: Any) -> Sample:
    """Make a sample that must have both responses."""
    if rejected is None:
        raise Unusable("rejected is not text")
    return sample_of(messages, chosen, rejected)


def best_and_worst(messages: list[Message], responses: list[tuple[float, Any]]) -> Sample:
    """Make a sample of the best and the worst of scored responses."""
    best, worst = max(responses, key=lambda r: r[0]), min(responses, key=lambda r: r[0])
    if len(responses) == 1:
        return sample_of(messages, best[1])
    if best[0] == worst[0]:
        raise Unusable("tie")
    return pair_of(messages, best[1], worst[1])


def whole_pair(chosen: list[Message], rejected: list[Message]) -> Sample:
    """Make a sample of two whole dialogues that differ in their last response only."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("dialogues differ before the last response")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("dialogue does not end with an assistant turn")
    messages = ending_with_user(chosen[:-1])
    return pair_of(messages, chosen[-1]["content"], rejected[-1]["content"])
