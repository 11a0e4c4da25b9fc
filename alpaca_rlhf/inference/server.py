"""Libraries and a free port: checks of the web chat and the endpoint before a model is loaded."""

import importlib.util
import socket

from alpaca_rlhf.utils.errors import UserError


def require(*modules: str) -> None:
    """Refuse to start without optional libraries.

    Raises:
        UserError: has the command that installs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}")


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket, before the models are loaded.

    Raises:
        UserError: the address or port cannot be used.
    """
    try:
        return socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); take "
                        "another port, or 0 for a free one") from error
