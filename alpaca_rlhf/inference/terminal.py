"""The terminal chat: prompts and commands, line by line."""

import sys
from dataclasses import replace
from pathlib import Path

from alpaca_rlhf.evaluation.conversation import Conversation, printable
from alpaca_rlhf.inference.chat_model import ChatModel, End
from alpaca_rlhf.utils import arguments
from alpaca_rlhf.utils.configs import ChatConfig, ChatProgram, SamplingConfig
from alpaca_rlhf.utils.console import say
from alpaca_rlhf.utils.errors import UserError

HELP = """/reset              start a new dialogue
/system TEXT        start a new dialogue with this system message; without TEXT: with none
/set NAME VALUE     temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed
/set                show these settings
/save [FILE]        append the dialogue to FILE (chat.jsonl), as a line that --data_path reads
/help               show this list
/quit               leave; so does the end of input
Ctrl-C stops a response. A line that ends with \\ continues on the next."""
SAVED = "chat.jsonl"
SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed")


def read_message() -> str:
    """Read a line, and the following ones while they end with a backslash.

    Raises:
        EOFError: the end of input.
    """
    lines = [input("you> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("...> "))
    return "\n".join(lines)


class Session:
    """A dialogue in the terminal and its settings; `running` until /quit."""

    def __init__(self, model: ChatModel, chat: ChatConfig, sampling: SamplingConfig) -> None:
        self._model, self._sampling, self._seed = model, sampling, chat.seed
        self.conversation = Conversation(chat.system.strip())
        self.running = True

    def run(self) -> None:
        """Read and obey lines until /quit or the end of input."""
        while self.running:
            try:
                self.obey(read_message())
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                say("\n(/quit leaves)")
            except UserError as error:
                say(f"error: {error}")

    def obey(self, line: str) -> None:
        """Execute a command, or respond to a message.

        Raises:
            UserError: an unknown command or setting, or a message that cannot be responded to.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match name:
            case "/reset":
                self.conversation.turns = []
                say("(a new dialogue)")
            case "/system":
                self.conversation = Conversation(printable(rest).strip())
                say(f"(a new dialogue, {'with that' if rest else 'without a'} system message)")
            case "/set":
                self._set(rest)
            case "/save":
                path = Path(rest or SAVED).expanduser()
                self.conversation.save(path)
                say(f"(saved to {path})")
            case "/help":
                say(HELP)
            case "/quit" | "/exit":
                self.running = False
            case _ if name.startswith("/"):
                raise UserError(f"unknown command {name[:40]!r}; /help lists them")
            case _:
                self._respond(line)

    def _respond(self, line: str) -> None:
        """Stream a response; Ctrl-C keeps what there is of it."""
        messages = self.conversation.with_prompt(line)
        end, text = None, ""
        stream = self._model.stream(messages, self._sampling, self._seed)
        try:
            for piece in stream:
                if isinstance(piece, End):
                    end = piece
                    continue
                sys.stdout.write(piece if text else f"model> {piece}")
                sys.stdout.flush()
                text += piece
        except KeyboardInterrupt:
            pass
        finally:
            stream.close()
        self.conversation.store(messages, text)
        say("" if text else "model> (nothing)")
        if end is None:
            say("(stopped)")
        elif end.reason == "length":
            say(f"(cut at max_new_tokens, {end.response_tokens})")
        if end is not None and end.dropped_turns:
            say(f"(the {end.dropped_turns} oldest turns no longer fit and were left out)")

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").partition(" ")
        if name:
            if name not in SETTINGS:
                raise UserError(
                    f"/set {name[:40]}: no such setting; there are {', '.join(SETTINGS)}")
            # The same checks as on the command line.
            args = arguments.parse(ChatProgram, ["--path", "-", f"--{name}={value.strip()}"])
            if name == "seed":
                self._seed = args.chat.seed
            else:
                changed = replace(self._sampling, **{name: getattr(args.sampling, name)})
                self._sampling = self._model.policy.resolve(changed)
        values = {**vars(self._sampling), "seed": self._seed}
        say("(" + ", ".join(f"{setting} {values[setting]}" for setting in SETTINGS) + ")")
