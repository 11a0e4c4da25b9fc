"""Talk with a model in the terminal.

    python -m alpaca_rlhf.inference.chat --path output/final/actor

Takes a folder of step 1 or 3, an adapter's folder or a hub id. The model is given the dialogue in
the template it was trained with; what no longer fits into its context is left off by whole turns.
Lines that begin with / are commands (/help lists them); a line that ends with \\ goes on with the
next. Ctrl-C stops a reply, /quit or the end of input leaves.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca_rlhf.inference import flags
from alpaca_rlhf.utils.errors import UserError

if TYPE_CHECKING:
    from alpaca_rlhf.inference.chat_model import ChatModel
    from alpaca_rlhf.utils.configs import SamplingConfig

HELP = """/reset              forget the dialogue
/system TEXT        what stands before the dialogue, from the start; without TEXT: nothing
/set NAME VALUE     temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed
/set                what they are
/save [FILE]        append the dialogue to FILE (chat.jsonl), as a line that --data_path reads
/help               this
/quit               leave; so does the end of input
Ctrl-C stops a reply. A line that ends with \\ goes on with the next."""
SAVED = "chat.jsonl"
SETTINGS: dict[str, Callable[[str], float]] = {
    "temperature": flags.number(float, low=0),
    "top_p": flags.number(float, above=0, high=1),
    "top_k": flags.number(int, low=0),
    "repetition_penalty": flags.number(float, above=0),
    "max_new_tokens": flags.number(int, low=1),
    "seed": flags.number(int, low=0),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of this program."""
    parser = flags.Parser("python -m alpaca_rlhf.inference.chat", __doc__)
    parser.add("--path", "folder of a model or an adapter, or hub id", required=True)
    parser.add("--system", "text that stands before the dialogue", default="")
    parser.add("--seed", "fixes the replies (default: new ones each time)",
               type=flags.number(int, low=0))
    parser.add_sampling(temperature=0.7, top_p=0.95)
    parser.add_loading()
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load the model, then talk until the user leaves."""
    from alpaca_rlhf.evaluation.saved import open_policy
    from alpaca_rlhf.inference.chat_model import ChatModel

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    policy = open_policy(args.path, flags.load_options(args))
    sampling = flags.sampling(args, policy.context)
    session = Session(ChatModel(policy), sampling, args.seed, args.system)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (lines can then be edited, and earlier ones called back)
    say(f"{args.path}, {policy.context} tokens of context. /help lists the commands.")
    while session.goes_on:
        try:
            session.turn(read_message())
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(/quit leaves)")
        except UserError as error:
            say(f"error: {error}")


def say(text: str) -> None:
    """A line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def read_message() -> str:
    """What the user types: a line, and the following ones while they end with a backslash.

    Raises:
        EOFError: the end of input.
    """
    lines = [input("you> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("...> "))
    return "\n".join(lines)


class Session:
    """A dialogue and its settings.

    Attributes:
        sampling: how replies are drawn.
        goes_on: until /quit.
    """

    def __init__(
        self, model: "ChatModel", sampling: "SamplingConfig", seed: int | None, system: str
    ) -> None:
        from alpaca_rlhf.inference.conversation import Conversation

        self._model, self.sampling, self._seed = model, sampling, seed
        self._talk = Conversation(system.strip())
        self.goes_on = True
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset, "/system": self._system, "/set": self._set,
            "/save": self._save, "/help": lambda _: say(HELP), "/quit": self._quit,
            "/exit": self._quit,
        }

    def turn(self, line: str) -> None:
        """Obey a command, or answer a message.

        Raises:
            UserError: an unknown command or setting, or a message that cannot be answered.
        """
        name, _, rest = line.strip().partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/"):
            raise UserError(f"unknown command {name[:40]!r}; /help lists them")
        else:
            self._answer(line)

    def _answer(self, line: str) -> None:
        """Stream a reply; Ctrl-C keeps what there is of it."""
        from alpaca_rlhf.inference.chat_model import End

        messages = self._talk.asked(line)
        end, said = None, ""
        stream = self._model.stream(messages, self.sampling, self._seed)
        try:
            for piece in stream:
                if isinstance(piece, End):
                    end = piece
                    continue
                sys.stdout.write(piece if said else f"model> {piece}")
                sys.stdout.flush()
                said += piece
        except KeyboardInterrupt:
            pass
        finally:
            stream.close()
        self._talk.answered(messages, said)
        say("" if said else "model> (nothing)")
        for note in _notes(end):
            say(note)

    def _reset(self, rest: str) -> None:
        self._talk.turns = []
        say("(a new dialogue)")

    def _system(self, rest: str) -> None:
        from alpaca_rlhf.inference.conversation import printable

        self._talk.system, self._talk.turns = printable(rest).strip(), []
        say("(a new dialogue, " + ("with that before it)" if rest else "nothing before it)"))

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").partition(" ")
        if name:
            self._change(name, value.strip())
        shown = {**vars(self.sampling), "seed": self._seed}
        say("(" + ", ".join(f"{setting} {shown[setting]}" for setting in SETTINGS) + ")")

    def _change(self, name: str, value: str) -> None:
        if name not in SETTINGS:
            raise UserError(f"/set {name[:40]}: no such setting; there are {', '.join(SETTINGS)}")
        try:
            number: Any = SETTINGS[name](value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"/set {name} {error}") from None
        if name == "max_new_tokens" and number >= self._model.policy.context:
            raise UserError(f"/set max_new_tokens {number}: the model reads "
                            f"{self._model.policy.context} tokens in all; take fewer")
        if name == "seed":
            self._seed = number
        else:
            self.sampling = replace(self.sampling, **{name: number})

    def _save(self, rest: str) -> None:
        path = Path(rest or SAVED).expanduser()
        self._talk.save(path)
        say(f"(saved to {path})")

    def _quit(self, rest: str) -> None:
        self.goes_on = False


def _notes(end: Any) -> list[str]:
    """What should be known about a reply."""
    if end is None:
        return ["(stopped)"]
    cut = f"(cut at max_new_tokens, {end.reply_tokens})"
    left_off = f"(the {end.dropped_turns} oldest turns no longer fit and were left off)"
    return [note for note, holds in ((cut, end.reason == "length"), (left_off, end.dropped_turns))
            if holds]


if __name__ == "__main__":
    flags.run(parse, main)
