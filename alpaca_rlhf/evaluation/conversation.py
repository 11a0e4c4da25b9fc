"""Dialogues for generation: cleaned text, the turns so far, and the part that fits the context."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alpaca_rlhf.utils.data.tokenizer import ChatFormat, Message
from alpaca_rlhf.utils.errors import UserError

# Control characters (terminal escape sequences) and halves of characters; tab and line feed stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# No text with so many characters per token of the context fits: it need not be tokenized first.
_CHARACTERS_PER_TOKEN = 100


def printable(text: str) -> str:
    """Remove control characters and turn line ends into line feeds."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def cleaned(text: str) -> str:
    """Make a turn of what somebody typed or sent.

    Raises:
        UserError: nothing is left of it.
    """
    kept = printable(text).strip()
    if not kept:
        raise UserError("the message is empty; write something")
    return kept


@dataclass
class Conversation:
    """The turns of a dialogue, and the system message before them ("" for none)."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def with_prompt(self, text: str) -> list[Message]:
        """Return the messages with a new user turn, which is not stored yet.

        Raises:
            UserError: the text is empty.
        """
        return [*self.messages(), {"role": "user", "content": cleaned(text)}]

    def store(self, messages: Sequence[Message], response: str) -> None:
        """Store the messages returned by `with_prompt`, and the response to them."""
        turns = [m for m in messages if m["role"] != "system"]
        self.turns = [*turns, {"role": "assistant", "content": response}]

    def messages(self) -> list[Message]:
        """Return the system message, if there is one, and all turns."""
        system: list[Message] = [{"role": "system", "content": self.system}]
        return [*(system if self.system else []), *self.turns]

    def save(self, path: Path) -> None:
        """Append the dialogue to a file, as a line that `--data_path` reads: {"messages": […]}.

        Raises:
            UserError: there is nothing to save, or the file cannot be written.
        """
        if not self.turns:
            raise UserError("nothing to save yet")
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages()}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def fit_context(
    chat: ChatFormat, messages: Sequence[Message], context: int, max_new_tokens: int
) -> tuple[list[int], int]:
    """Tokenize as much of a dialogue as fits the context, and count the turns left out.

    The oldest turns are left out first, a user turn with all that follows it up to the next one;
    the system message and the last turn, the user's, stay. `max_new_tokens` of the `context` are
    kept free for the response.

    Raises:
        UserError: the last turn alone does not fit, or the template refuses the dialogue.
    """
    limit = context - max_new_tokens
    if limit < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: the model reads {context} tokens, "
                        "prompt and response together; take fewer")
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = list(messages[len(system) :])
    starts = [i for i, message in enumerate(turns) if message["role"] == "user"]
    last = [*system, *turns[starts[-1] :]]
    characters = sum(len(message["content"]) for message in last)
    if characters > limit * _CHARACTERS_PER_TOKEN:
        raise UserError(f"the message has {characters:,} characters, far more than fit into the "
                        f"{limit} tokens that the model can read of it; shorten it")
    kept, dropped = chat.prompt_ids(last), starts[-1]
    if len(kept) > limit:
        raise UserError(f"the message has {len(kept):,} tokens; with {max_new_tokens} for the "
                        f"response the model can read {limit}; shorten it, or take a smaller "
                        "max_new_tokens")
    for start in reversed(starts[:-1]):
        ids = chat.prompt_ids([*system, *turns[start:]])
        if len(ids) > limit:
            break
        kept, dropped = ids, start
    return kept, dropped
