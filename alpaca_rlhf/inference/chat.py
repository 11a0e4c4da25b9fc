"""Chat with a model in the terminal.

    python -m alpaca_rlhf.inference.chat --path output/final/actor

Takes a folder that step 1 or 3 exported, an adapter's folder or a hub id. The dialogue is rendered
in the chat template the model was trained with; its oldest turns are left out when it no longer
fits the context. Lines that begin with / are commands (/help lists them); a line that ends with \\
continues on the next. Ctrl-C stops a response, /quit or the end of input leaves.
"""

import sys
from collections.abc import Sequence

from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import ChatProgram


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load the model, chat."""
    args = arguments.parse(ChatProgram, argv, doc=__doc__)
    # Imported here, so that --help and mistakes in the command line need no torch.
    from alpaca_rlhf.evaluation.saved import open_policy
    from alpaca_rlhf.inference.chat_model import ChatModel
    from alpaca_rlhf.inference.terminal import Session

    console.quiet_libraries()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    policy = open_policy(args.chat.path, args.loading)
    session = Session(ChatModel(policy), args.chat, policy.resolve(args.sampling))
    if sys.stdin.isatty():
        import readline  # noqa: F401  (for editing lines, and recalling earlier ones)
    console.say(f"{args.chat.path}, {policy.context} tokens of context. /help lists the commands.")
    session.run()


if __name__ == "__main__":
    console.run_main(main)
