"""Chat in the browser: with one model, two side by side, or in a blind arena that counts votes.

    python -m alpaca_rlhf.inference.web_chat --path output/final/actor
    python -m alpaca_rlhf.inference.web_chat --path output/final/actor output/actor [--arena]

Takes folders that step 1 or 3 exported, adapters' folders or hub ids. Listens on this machine only,
with no public link unless --share asks for one, sends no telemetry and fetches nothing from
elsewhere; needs `pip install gradio`. In the arena the models change sides at random, the names are
shown after the vote, and each vote is appended to --votes as a pair that step 2 can train on.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from alpaca_rlhf.inference import server
from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import WebChatProgram
from alpaca_rlhf.utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load the models, serve the page until stopped."""
    args = arguments.parse(WebChatProgram, argv, doc=__doc__)
    if len(args.server.path) > 2:
        raise UserError(f"--path: {len(args.server.path)} models; give one or two")
    if args.chat.arena and len(args.server.path) != 2:
        raise UserError("--arena: needs two models; give --path A B")
    # Gradio reads this when it is imported, and would ask its servers for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    server.require("gradio")
    # Imported here, so that --help and mistakes in the command line need no torch.
    from alpaca_rlhf.evaluation.saved import open_policy, short_names
    from alpaca_rlhf.inference.chat_model import ChatModel
    from alpaca_rlhf.inference.votes import VoteFile
    from alpaca_rlhf.inference.web_page import Site, launch

    console.quiet_libraries()
    with server.listen(args.server.host, args.server.port) as found:  # fails at once if it is taken
        port = found.getsockname()[1]
    votes = VoteFile(Path(args.chat.votes)) if args.chat.arena else None
    policies = [open_policy(path, args.loading) for path in args.server.path]
    narrowest = min(policies, key=lambda policy: policy.context)
    site = Site(
        short_names(args.server.path), [ChatModel(one, args.server.at_once) for one in policies],
        narrowest.resolve(args.sampling), args.chat.system, votes,
    )
    launch(site, args.server.host, port, args.chat.share).block_thread()


if __name__ == "__main__":
    console.run_main(main)
