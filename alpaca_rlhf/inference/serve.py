"""An OpenAI-compatible endpoint: any client of /v1/chat/completions can talk to a model.

    python -m alpaca_rlhf.inference.serve --path output/final/actor output/actor

Takes folders that step 1 or 3 exported, adapters' folders or hub ids. Listens on this machine only;
needs `pip install fastapi uvicorn`. A dialogue that is too long for the model loses its oldest
turns, as in the chats; a request that cannot be served gets status 400 and one line with the
reason.
"""

import contextlib
from collections.abc import Sequence

from alpaca_rlhf.inference import server
from alpaca_rlhf.utils import arguments, console
from alpaca_rlhf.utils.configs import ServeProgram

SECONDS_TO_END = 5  # for responses that are being generated when the server is stopped


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load the models, serve until stopped."""
    args = arguments.parse(ServeProgram, argv, doc=__doc__)
    server.require("fastapi", "uvicorn")
    # Imported here, so that --help and mistakes in the command line need no torch.
    import uvicorn

    from alpaca_rlhf.evaluation.saved import open_policy, short_names
    from alpaca_rlhf.inference.chat_model import ChatModel
    from alpaca_rlhf.inference.endpoint import application

    console.quiet_libraries()
    listener = server.listen(args.server.host, args.server.port)
    chats = {}
    for name, path in zip(short_names(args.server.path), args.server.path, strict=True):
        policy = open_policy(path, args.loading)
        policy.resolve(args.sampling)
        chats[name] = ChatModel(policy, args.server.at_once)
    host, port = listener.getsockname()[:2]
    console.say(f"serving {', '.join(chats)} at http://{host}:{port}/v1")
    config = uvicorn.Config(
        application(chats, args.sampling), log_level="warning",
        timeout_graceful_shutdown=SECONDS_TO_END,
    )
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it is stopped
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    console.run_main(main)
