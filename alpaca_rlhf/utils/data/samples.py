"""What every form of data becomes, and the checks that its adaptor is made of.

Each check gives back what it was asked for or raises `Unusable` with the reason.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from alpaca_rlhf.utils.data.tokenizer import Message


@dataclass(frozen=True)
class Sample:
    """One dialogue that ends with a user's turn, and its replies.

    Attributes:
        messages: role and content, a user's turn last. A turn in the form of Stanford Alpaca has
            `instruction` and `input` too, for the template of that name; its content is both.
        chosen: the (better) reply.
        rejected: the worse reply, None where the data has only one.
        history_is_trained: whether step 1 may train the assistant's earlier turns; False where
            each of them is the reply of a row of its own.
        language: as the data states it, or None.
    """

    messages: tuple[Message, ...]
    chosen: str
    rejected: str | None = None
    history_is_trained: bool = field(default=True, compare=False)
    language: str | None = field(default=None, compare=False)

    def prompt_key(self) -> str:
        """The text by which equal prompts are known."""
        turns = [{"content": m["content"], "role": m["role"]} for m in self.messages]
        return json.dumps(turns, ensure_ascii=False)


class Unusable(Exception):
    """A row that cannot be used; the message is the reason it is counted under."""


Made = Sample | Iterable[Sample | Unusable]


# --- texts and turns -----------------------------------------------------------------------------

_HUMAN_ASSISTANT = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):", re.MULTILINE)
_ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "model": "assistant",
}
# JSON can spell half of a character ("\\ud83d"); no encoding has it.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_dialogue(text: str) -> list[Message]:
    """`Human: … Assistant: …` text -> turns; a last turn that is empty stands as "".

    Raises:
        Unusable: the text does not begin with a Human's turn.
    """
    parts = _HUMAN_ASSISTANT.split(text.strip())
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human":
        raise Unusable("dialogue does not begin with Human:")
    return turns_between(parts)


def turns_between(parts: list[str]) -> list[Message]:
    """Names and texts in turn, after whatever stands before the first name."""
    return [
        {"role": _ROLES[who.lower()], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def user_turn(text: str) -> Message:
    """What the user says."""
    return {"role": "user", "content": text}


def text_of(value: Any, what: str) -> str:
    """A text that is not empty, without the space around it."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is not text")
    if not value.strip():
        raise Unusable(f"empty {what}")
    return value.strip()


def list_of(value: Any, what: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list):
        raise Unusable(f"{what} is no list")
    if not value:
        raise Unusable(f"empty {what}")
    return value


def value_of(value: Any, key: str, what: str) -> Any:
    """What an object has under a key; None when it has no such key."""
    if not isinstance(value, dict):
        raise Unusable(f"{what} is not an object")
    return value.get(key)


def number_of(value: Any, what: str) -> float:
    """A finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(f"{what} is not a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise Unusable(f"{what} is not a number")
    return value


def turns_of(value: Any, what: str) -> list[Message]:
    """A list of {role, content} or {from, value} -> turns in order, roles by our names."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Unusable(f"{what} is neither text nor messages")
    pairs = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
             for turn in value]
    if not all(isinstance(role, str) and isinstance(said, str) for role, said in pairs):
        raise Unusable(f"{what} is neither text nor messages")
    if any(role.lower() not in _ROLES for role, _ in pairs):
        raise Unusable("role is not system, user or assistant")
    return [{"role": _ROLES[role.lower()], "content": said.strip()} for role, said in pairs]


def ending_with_user(turns: list[Message]) -> list[Message]:
    """Turns of which the last is the user's, and says something."""
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"]:
        raise Unusable("dialogue does not end with a user's turn")
    return turns


def in_order(turns: list[Message]) -> list[Message]:
    """A system's turn or none, then user and assistant in turn, the user last."""
    ending_with_user(turns)
    talk = turns[1:] if turns[0]["role"] == "system" else turns
    if [turn["role"] for turn in talk] != (["user", "assistant"] * len(talk))[: len(talk)]:
        raise Unusable("roles out of order")
    if not all(turn["content"] for turn in talk):
        raise Unusable("empty turn")
    return turns


def messages_of(prompt: Any, what: str = "prompt") -> list[Message]:
    """A prompt as text, as Human/Assistant text or as messages -> turns ending with the user's."""
    if not isinstance(prompt, str):
        return in_order(turns_of(prompt, what))
    if not prompt.strip():
        raise Unusable(f"empty {what}")
    if not is_dialogue(prompt):
        return [user_turn(prompt.strip())]
    turns = parse_dialogue(prompt)
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return ending_with_user(turns)


def is_dialogue(text: Any) -> bool:
    """Whether it is text in the Human/Assistant form."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None


def reply_of(value: Any, side: str) -> str:
    """A reply as text, or as messages of which the last is the assistant's."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        if value[-1].get("role", "assistant") != "assistant":
            raise Unusable(f"{side} does not end with the assistant's turn")
        value = value[-1].get("content")
    return text_of(value, side)


def sample_of(messages: list[Message], chosen: Any, rejected: Any = None, **more: Any) -> Sample:
    """A checked sample; `rejected` None is none."""
    better = reply_of(chosen, "chosen")
    worse = None if rejected is None else reply_of(rejected, "rejected")
    if better == worse:
        raise Unusable("chosen equals rejected")
    texts = (better, worse or "", *(text for message in messages for text in message.values()))
    if any(_HALF_CHARACTER.search(text) for text in texts):
        raise Unusable("text is not valid Unicode")
    return Sample(tuple(messages), better, worse, **more)


def pair_of(messages: list[Message], chosen: Any, rejected: Any) -> Sample:
    """A checked sample that must have both replies."""
    if rejected is None:
        raise Unusable("rejected is not text")
    return sample_of(messages, chosen, rejected)


def best_and_worst(messages: list[Message], replies: list[tuple[float, Any]]) -> Sample:
    """The best and the worst of scored replies; of equal ones none is better."""
    best, worst = max(replies, key=lambda r: r[0]), min(replies, key=lambda r: r[0])
    if len(replies) == 1:
        return sample_of(messages, best[1])
    if best[0] == worst[0]:
        raise Unusable("tie")
    return pair_of(messages, best[1], worst[1])


def whole_pair(chosen: list[Message], rejected: list[Message]) -> Sample:
    """Two whole dialogues that part at their last reply."""
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("pair parts before the last reply")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("dialogue does not end with Assistant:")
    messages = ending_with_user(chosen[:-1])
    return pair_of(messages, chosen[-1]["content"], rejected[-1]["content"])
