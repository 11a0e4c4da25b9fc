"""The flags that evaluations, chats and the endpoint share, and how such a command is started.

Imports no torch: `--help` and a mistyped flag answer at once.
"""

import argparse
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from alpaca_rlhf.utils.errors import UserError

if TYPE_CHECKING:
    from alpaca_rlhf.evaluation.held_out import Chosen
    from alpaca_rlhf.utils.configs import LoadingConfig, SamplingConfig

DATA_SPLIT = "2,4,4"
SEED = 1234
NEW_TOKENS = 256


class Parser(argparse.ArgumentParser):
    """A parser whose every complaint is a UserError of one line.

    Args:
        command: how it is started, such as `python -m alpaca_rlhf.inference.chat`.
        doc: of the module; its first line is the description, what follows the flags the rest.
    """

    def __init__(self, command: str, doc: str | None) -> None:
        first, _, rest = (doc or "").partition("\n")
        super().__init__(
            prog=command, description=first, epilog=rest.strip(), allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse complains of."""
        unknown = re.search(r"unrecognized arguments: .*?(--\w+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise UserError(f"unknown flag {unknown[1]}; {hint}")
        raise UserError(" ".join(message.removeprefix("argument ").split()) + "; see --help")

    def add(self, flag: str, text: str, **settings: object) -> None:
        """A flag whose help ends with its default, where it has one."""
        default = settings.get("default")
        shown = default not in (None, False, "") and default != []
        ending = f" (default: {default})" if shown and "(default" not in text else ""
        text = (text + ending).replace("%", "%%")
        self.add_argument(flag, help=text, **settings)  # type: ignore[arg-type]

    def add_loading(self) -> None:
        """How models are brought into memory."""
        self.add("--dtype", "precision of the weights; auto is bf16 where the device has it, fp32 "
                 "on a CPU", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
        self.add("--attn_implementation", "the attention kernel", default="sdpa",
                 choices=["sdpa", "eager", "flash_attention_2"])
        self.add("--trust_remote_code", "run code that comes with a hub model",
                 action="store_true")

    def add_sampling(self, temperature: float, top_p: float) -> None:
        """How replies are drawn, with these defaults."""
        self.add("--max_new_tokens", f"longest reply, in tokens (default: {NEW_TOKENS}, or half of "
                 "what the model reads if that is less)", type=number(int, low=1))
        self.add("--temperature", "divides the logits; 0 is greedy", type=number(float, low=0),
                 default=temperature)
        self.add("--top_p", "draw from the likeliest tokens of this total probability",
                 type=number(float, above=0, high=1), default=top_p)
        self.add("--top_k", "draw from so many likeliest tokens; 0: from all",
                 type=number(int, low=0), default="0")
        self.add("--repetition_penalty", "above 1 makes tokens that occurred less likely",
                 type=number(float, above=0), default="1.0")
        self.add("--greedy", "always the likeliest token; as --temperature 0",
                 action="store_true")

    def add_data(self) -> None:
        """What is measured on."""
        self.add("--data_path", "data sets, as the steps take them (default: those that the run "
                 "has recorded with its model, else the embedded ones)", nargs="+", default=[])
        self.add("--part", "held_out: prompts that no step trained on; all: every one, for a data "
                 "set that is a test set", default="held_out", choices=["held_out", "all"])
        self.add("--data_split", "shares of the three steps (default: as recorded, else "
                 f"{DATA_SPLIT})")
        self.add("--seed", "of the split and of all that is drawn (default: the split's as "
                 f"recorded, else {SEED})", type=number(int, low=0))
        self.add("--lang", "languages to keep, as the steps take them (default: as recorded)",
                 nargs="+", default=[])

    def add_output(self, what: str) -> None:
        """Where results go."""
        self.add("--output", f"file for {what} (default: none, only the console)")


def number(
    kind: Callable[[str], float], low: float | None = None, above: float | None = None,
    high: float | None = None,
) -> Callable[[str], float]:
    """A reader of numbers that argparse can use, which says what it expects."""
    bounds = [f"{low:g} or more" if low is not None else "",
              f"above {above:g}" if above is not None else "",
              f"at most {high:g}" if high is not None else ""]
    expected = "a whole number" if kind is int else "a number"
    expected = ", ".join([expected, *filter(None, bounds)])

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        fits = (value == value and abs(value) != float("inf")
                and (low is None or value >= low) and (above is None or value > above)
                and (high is None or value <= high))
        if not fits:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {expected}")
        return value

    return read


def choose_samples(
    args: argparse.Namespace, models: Sequence[str], limit: int, pairs: bool
) -> "Chosen":
    """From `add_data`: what to measure `models` on; says what it is.

    Raises:
        UserError: the data cannot be read, or nothing in it is of use.
    """
    from alpaca_rlhf.evaluation import held_out
    from alpaca_rlhf.utils import arguments, console
    from alpaca_rlhf.utils.data.split import Split

    shares = arguments.split_shares(args.data_split or DATA_SPLIT)
    wanted = held_out.Wanted(
        tuple(args.data_path), args.seed, shares if args.data_split else None,
        tuple(args.lang), args.part, limit, pairs,
    )
    chosen = held_out.choose(wanted, models, Split(3, shares, SEED))
    for note in chosen.notes:
        console.say(note)
    return chosen


def load_options(args: argparse.Namespace) -> "LoadingConfig":
    """From `add_loading`."""
    from alpaca_rlhf.utils.configs import LoadingConfig

    return LoadingConfig(
        dtype=args.dtype, attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def sampling(args: argparse.Namespace, context: int, replies: int = 1) -> "SamplingConfig":
    """From `add_sampling`, for models that read `context` tokens, prompt and reply together.

    Raises:
        UserError: the longest reply leaves no room for a prompt.
    """
    from alpaca_rlhf.utils.configs import SamplingConfig

    new_tokens = args.max_new_tokens or min(NEW_TOKENS, context // 2)
    if new_tokens >= context:
        raise UserError(f"--max_new_tokens {new_tokens}: the model reads {context} tokens, prompt "
                        "and reply together; take fewer")
    return SamplingConfig(
        new_tokens, 0.0 if args.greedy else args.temperature, args.top_p, args.top_k,
        args.repetition_penalty, replies,
    )


def check_output(path: str | None, *suffixes: str) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        UserError: it ends otherwise than in one of `suffixes`, or its folder cannot be written.
    """
    if path is None:
        return
    if Path(path).suffix not in suffixes:
        raise UserError(f"--output {path}: must end in {' or '.join(suffixes)}")
    folder = Path(path).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output {path}: cannot be written; give another file")


def write_output(path: str | None, text: str) -> None:
    """Write the results, whole or not at all, if a file was given."""
    if path is None:
        return
    from alpaca_rlhf.utils import console

    partial_file = Path(f"{path}.partial")
    partial_file.write_text(text, encoding="utf-8")
    os.replace(partial_file, path)
    console.say(f"written to {path}")


def require(*modules: str) -> None:
    """Refuse to start without optional libraries.

    Raises:
        UserError: gives the command that installs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}")


def run(
    parse: Callable[[Sequence[str]], argparse.Namespace], main: Callable[[argparse.Namespace], None]
) -> None:
    """Read the command line, then load what is heavy and go on: an entry point's last line."""
    try:
        args = parse(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    from alpaca_rlhf.utils import console

    console.quiet_libraries()
    console.run_main(partial(main, args))
