"""A dialogue as it grows, and what of it a model is given: whole turns, the newest, as fit.

Whatever people type or send becomes a message here, or is refused with one line that says why.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alpaca_rlhf.utils.data.tokenizer import ChatFormat, Message
from alpaca_rlhf.utils.errors import UserError

# Control characters (of terminals above all) and halves of characters; tab and line feed stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# No text of so many characters for each token of the context fits: it need not be tokenized first.
_CHARACTERS_PER_TOKEN = 100


def printable(text: str) -> str:
    """A text without control characters; line ends are line feeds."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def cleaned(text: str) -> str:
    """What somebody has written, fit to be a turn.

    Raises:
        UserError: nothing is left of it.
    """
    kept = printable(text).strip()
    if not kept:
        raise UserError("the message is empty; write something")
    return kept


@dataclass
class Conversation:
    """Turns so far; a system's text may stand before them all.

    Attributes:
        system: "" is none.
        turns: user and assistant in turn.
    """

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def asked(self, text: str) -> list[Message]:
        """The messages with one more turn of the user's, which is not yet kept.

        Raises:
            UserError: the text is empty.
        """
        return [*self.messages(), {"role": "user", "content": cleaned(text)}]

    def answered(self, messages: Sequence[Message], reply: str) -> None:
        """Keep what was asked, as `asked` gave it, and the reply to it."""
        turns = [m for m in messages if m["role"] != "system"]
        self.turns = [*turns, {"role": "assistant", "content": reply}]

    def messages(self) -> list[Message]:
        """All of it."""
        system: list[Message] = [{"role": "system", "content": self.system}]
        return [*(system if self.system else []), *self.turns]

    def save(self, path: Path) -> None:
        """Append it to a file as a line that --data_path reads: {"messages": […]}.

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


def fitted(
    form: ChatFormat, messages: Sequence[Message], context: int, new_tokens: int
) -> tuple[list[int], int]:
    """Ids of the dialogue for the next reply, and how many of its turns were left off.

    The oldest turns go first, a user's with all that follows it up to the next one; a system's text
    and the last turn stay.

    Args:
        form: the tokenizer and its template.
        messages: the last is the user's.
        context: most tokens of prompt and reply together.
        new_tokens: kept free for the reply.

    Raises:
        UserError: the last turn alone does not fit, or the template refuses the dialogue.
    """
    room = context - new_tokens
    if room < 1:
        raise UserError(f"max_new_tokens {new_tokens}: the model reads {context} tokens in all; "
                        "take fewer")
    system = [m for m in messages[:1] if m["role"] == "system"]
    talk = list(messages[len(system) :])
    starts = [i for i, message in enumerate(talk) if message["role"] == "user"]
    last = [*system, *talk[starts[-1] :]]
    characters = sum(len(message["content"]) for message in last)
    if characters > room * _CHARACTERS_PER_TOKEN:
        raise UserError(f"the message has {characters:,} characters, far more than fit into the "
                        f"{room} tokens that the model can read of it; shorten it")
    kept, dropped = form.prompt_ids(last), starts[-1]
    if len(kept) > room:
        raise UserError(f"the message has {len(kept):,} tokens; with {new_tokens} for the reply "
                        f"the model can read {room}; shorten it, or take a smaller "
                        "max_new_tokens")
    for start in reversed(starts[:-1]):
        ids = form.prompt_ids([*system, *talk[start:]])
        if len(ids) > room:
            break
        kept, dropped = ids, start
    return kept, dropped
