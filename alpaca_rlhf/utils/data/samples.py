"""The sample that every data format gives, and the checks that formats are made of.

Each check returns the value, or raises `Unusable` with the reason.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from alpaca_rlhf.utils.data.tokenizer import Message


@dataclass(frozen=True)
class Sample:
    """A dialogue that ends with a user turn, and its responses.

    A turn of Stanford Alpaca's format has `instruction` and `input` beside its content, which is
    both, for the template of that name.
    """

    messages: tuple[Message, ...]
    chosen: str  # "" where `lacking` says why there is none
    rejected: str | None = None  # None where the data has only one response
    # Step 1 may train the assistant's earlier turns, unless each of them is a row of its own.
    history_is_trained: bool = field(default=True, compare=False)
    language: str | None = field(default=None, compare=False)  # as the data states it
    # Numbers of the assistant's earlier turns, from 0, that the data marks as not to be trained.
    untrained: tuple[int, ...] = ()
    lacking: str = ""  # reason why steps 1 and 2 cannot use it: the prompt serves step 3 alone

    def prompt_key(self) -> str:
        """Return the text that equal prompts have in common."""
        turns = [{"content": m["content"], "role": m["role"]} for m in self.messages]
        return json.dumps(turns, ensure_ascii=False)


@dataclass
class Tally:
    """Counts of one data set: rows read, samples made of them, and what was filtered out.

    An Open Assistant tree is one row, and so is a message of a flat one.
    """

    rows: int = 0
    samples: int = 0
    unused: Counter[str] = field(default_factory=Counter)  # rows or samples, by reason
    unread: Counter[str] = field(default_factory=Counter)  # rows, by column or key nobody reads
    unfit: str = ""  # says of the first row that fits no data format what it holds


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


def response_text(value: Any, what: str) -> str:
    """Check for text that is not empty, and strip its end."""
    text_of(value, what)
    return stripped(value)


def stripped(response: str) -> str:
    """Strip a response at its end, and at its start of the single space that follows a name.

    Other whitespace at its start, as before indented code, is the response's.
    """
    return re.sub(r"\A (?=\S)", "", response.rstrip())


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

# Only a blank line begins a turn: names at the start of another line are part of a text.
_HUMAN_ASSISTANT = re.compile(r"(?:\A\s*|\n[ \t]*\r?\n)(Human|Assistant):")
_OPEN = re.compile(r"\s*Human:.*\n[ \t]*\r?\nAssistant:\s*", re.DOTALL)
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "model": "assistant",
}
_TOOL_ROLE = re.compile(r"tool|function|ipython|observation")
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
# Marks of what is trained: OpenAI's and axolotl's, and those of other trainers.
MARK_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_weight")
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
_UNTRAINED = "untrained"  # key of a turn that `sample_of` turns into a number of the sample


def user_turn(text: str) -> Message:
    """Return a user turn."""
    return {"role": "user", "content": text}


def first_of(value: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first value that is not null under some names, or None."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def flag_of(value: Any) -> bool | None:
    """Read true, false, 1 or 0, also as text; anything else is None."""
    return _FLAGS.get(str(value).strip().lower())


def is_dialogue(text: Any) -> bool:
    """Return whether it is `Human: … Assistant: …` text."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None


def is_open_dialogue(text: Any) -> bool:
    """Return whether it is `Human: … Assistant:` text up to where a response begins."""
    return isinstance(text, str) and _OPEN.fullmatch(text) is not None


def is_turns(value: Any) -> bool:
    """Return whether it is a list of {role, content} or {from, value}, or one of them."""
    turns = value if isinstance(value, list) else [value]
    said = [turn for turn in turns if turn is not None]
    return bool(said) and all(
        isinstance(turn, dict) and isinstance(first_of(turn, ROLE_KEYS), str | None)
        and any(name in turn for name in ROLE_KEYS) for turn in said)


def parse_dialogue(text: str) -> list[Message]:
    """Split `Human: … Assistant: …` text into turns; a last turn that is empty stays as ""."""
    before, turns = split_turns(text.strip(), _HUMAN_ASSISTANT)
    if before.strip() or len(turns) < 1 or turns[0]["role"] != "user":
        raise Unusable("dialogue does not begin with Human:")
    return turns


def split_turns(text: str, names: re.Pattern[str]) -> tuple[str, list[Message]]:
    """Return what stands before the first name, and the turns between names.

    Two user names in a row are of a chat that the user pasted: from the second one on all is the
    user's text, up to the assistant's last name.
    """
    found = list(names.finditer(text))
    roles = [_ROLES[match[1].lower()] for match in found]
    doubled = next((i for i, two in enumerate(pairwise(roles), 1) if two == ("user", "user")), None)
    if doubled:
        found = found[:doubled] + (found[-1:] if roles[-1] == "assistant" else [])
    ends = [match.start() for match in found] + [len(text)]
    turns = [_message(_ROLES[match[1].lower()], text[match.end() : end].removeprefix(" "))
             for match, end in zip(found, ends[1:], strict=True)]
    return text[: ends[0]], turns


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": stripped(text) if role == "assistant" else text.strip()}


def turns_of(value: Any, what: str) -> list[Message]:
    """Read a list of {role, content} or {from, value}, or a single one, with roles by our names.

    Nulls, and turns of nothing but nulls, are left out: a merged parquet file has them.
    """
    turns = value if isinstance(value, list) else [value]
    said = [turn for turn in turns if turn is not None]
    if not all(isinstance(turn, dict) for turn in said) or (turns and not said):
        raise Unusable(f"{what} is neither text nor messages")
    return [_turn(turn, what) for turn in said
            if any(one is not None for one in turn.values()) or not turn]


def _turn(turn: dict[str, Any], what: str) -> Message:
    role, content = first_of(turn, ROLE_KEYS), first_of(turn, TEXT_KEYS)
    spelled = role.strip().lower() if isinstance(role, str) else ""
    name = _ROLES.get(spelled)
    if _TOOL_ROLE.match(spelled) or any(turn.get(key) for key in _TOOL_KEYS):
        raise Unusable("tool turns")
    text = joined(content)
    if not isinstance(role, str) or not isinstance(text, str):
        raise Unusable(f"{what} is neither text nor messages")
    if name is None:
        raise Unusable(f"role {json.dumps(role[:40])} is not system, user or assistant")
    message = _message(name, text)
    mark = first_of(turn, MARK_KEYS)
    if name == "assistant" and mark is not None:
        trained = flag_of(mark)
        if trained is None:
            raise Unusable(f"{next(key for key in MARK_KEYS if key in turn)} is not 0 or 1")
        message |= {} if trained else {_UNTRAINED: "yes"}
    return message


def is_trained(turn: Message) -> bool:
    """Return whether it is a turn of the assistant's that the data does not exclude."""
    return turn["role"] == "assistant" and _UNTRAINED not in turn


def joined(content: Any) -> Any:
    """Join the text parts of a content in parts; return any other content as it is.

    Raises:
        Unusable: a part is no text; names its kind.
    """
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("tool_use", "tool_result", "tool_call"):
            raise Unusable("tool turns")
        if kind not in (None, "text", "input_text", "output_text"):
            raise Unusable(f"a content part is {json.dumps(kind)[:40]}, not text")
        if part is not None and not isinstance(text, str):
            return content
        texts.append(text or "")
    return "".join(texts)


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
    """Read a prompt, given as text, as `Human: … Assistant:` text or as messages."""
    if not isinstance(prompt, str):
        return in_order(turns_of(prompt, what))
    if not is_open_dialogue(prompt):
        return [user_turn(text_of(prompt, what))]
    return ending_with_user(parse_dialogue(prompt)[:-1])


# --- samples -------------------------------------------------------------------------------------

# JSON can spell half of a character ("\\ud83d"), which no encoding can hold.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def response_of(value: Any, side: str) -> str:
    """Read a response: text, a turn, a list of one of them, or messages that end with it."""
    if isinstance(value, list) and value:
        roles = [first_of(turn, ROLE_KEYS) if isinstance(turn, dict) else None for turn in value]
        if len(value) > 1 and _ROLES.get(str(roles[0])) == "assistant":
            raise Unusable(f"{side} is more than one turn")
        if len(value) == 1 or any(roles):
            value = value[-1]
    if isinstance(value, dict) and first_of(value, ROLE_KEYS):
        turn = _turn({"content": "", **value}, side)
        if turn["role"] != "assistant":
            raise Unusable(f"{side} does not end with an assistant turn")
    if isinstance(value, dict):
        value = first_of(value, TEXT_KEYS)
    return response_text(joined(value), side)


def sample_of(
    messages: list[Message], chosen: Any, rejected: Any = None, lacking: str = "", **more: Any
) -> Sample:
    """Make a sample; without `rejected` it is no pair, and with `lacking` a prompt alone."""
    better = "" if lacking else response_of(chosen, "chosen")
    worse = None if rejected is None else response_of(rejected, "rejected")
    if worse is not None and better.strip() == worse.strip():
        raise Unusable("chosen equals rejected")
    earlier = [message for message in messages if message["role"] == "assistant"]
    untrained = tuple(i for i, message in enumerate(earlier) if _UNTRAINED in message)
    turns = tuple({k: v for k, v in message.items() if k != _UNTRAINED} for message in messages)
    texts = (better, worse or "", *(text for turn in turns for text in turn.values()))
    if any(_HALF_CHARACTER.search(text) for text in texts):
        raise Unusable("text is not valid Unicode")
    return Sample(turns, better, worse, untrained=untrained, lacking=lacking, **more)


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


def whole_pair(
    chosen: list[Message], rejected: list[Message],
    prompt_of: Callable[[list[Message]], list[Message]],
) -> Sample:
    """Make a sample of two whole dialogues that differ in their last response only.

    `prompt_of` makes the prompt of the turns that they share.
    """
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        raise Unusable("dialogues differ before the last response")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("dialogue does not end with an assistant turn")
    messages = prompt_of(ending_with_user(shared))
    return pair_of(messages, chosen[-1]["content"], rejected[-1]["content"])
