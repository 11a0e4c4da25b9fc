"""Workers that wait for a debugger: `my_deepspeed.py --debug_ranks 0,1 --debug_port 5678`.

The bootstrap writes the ranks and the port into the environment, the launcher carries them to every
node, and each rank named listens on the port plus its number and waits there for a client (VS Code,
or any other of the debug adapter protocol). On this machine only: a debugger may run any code, so a
worker of another node is reached through `ssh -L`.
"""

import importlib.util
import os
import sys

from alpaca_rlhf.utils.errors import UserError

RANKS, PORT = "ALPACA_RLHF_DEBUG_RANKS", "ALPACA_RLHF_DEBUG_PORT"
INSTALL = "--debug_ranks needs debugpy: pip install debugpy"


def wait_for_client() -> None:
    """If this rank was named by `--debug_ranks`, wait until a debugger is attached.

    Raises:
        UserError: debugpy isn't installed here, or the port is taken.
    """
    rank = os.environ.get("RANK", "0")
    if rank not in os.environ.get(RANKS, "").split(","):
        return
    if importlib.util.find_spec("debugpy") is None:
        raise UserError(INSTALL)
    # It would advise, on each start, to switch off frozen modules: no breakpoint of ours is there.
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    import debugpy

    port = int(os.environ[PORT]) + int(rank)
    try:
        debugpy.listen(("127.0.0.1", port))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--debug_port {os.environ[PORT]}: rank {rank} cannot listen on port {port} "
            f"({' '.join(str(error).split())}); give another"
        ) from error
    sys.stdout.write(f"rank {rank} waits for a debugger on 127.0.0.1:{port}\n")
    sys.stdout.flush()
    debugpy.wait_for_client()
