"""Messages to the person who started a run: lines, tables, and the last line of a failed run.

Only rank 0 writes. The rank is read from the environment, where the launcher or
`distributed.initialize` has put it, so that this module needs no torch and works before a process
group exists.
"""

import errno
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from alpaca_rlhf.utils.errors import TrainingStopped, UserError

TIMED_OUT = 124  # exit code after a collective that took too long, as of the command `timeout`
DEBUGGED = "ALPACA_RLHF_DEBUG"  # set to 1 by `my_deepspeed.py --debug`


def say(message: str) -> None:
    """Write a line to standard output, on rank 0 only."""
    if _rank() == 0:
        sys.stdout.write(message + "\n")
        sys.stdout.flush()


def table(headers: list[str], rows: list[list[str]], width: int = 48) -> str:
    """Align rows in columns; cells longer than `width` characters are shortened and end in …"""
    cells = [[shortened(str(cell), width) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def shortened(text: str, width: int) -> str:
    """Put a text on one line and shorten it to `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def quiet_libraries() -> None:
    """Turn off the progress bars, notes and known warnings of transformers and DeepSpeed."""
    import deepspeed
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel("WARNING")
    # transformers still calls functions by names that torch is going to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")


def under_debugger() -> bool:
    """Return whether this is the single process of `my_deepspeed.py --debug`."""
    return os.environ.get(DEBUGGED) == "1"


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; end with exit code 2 and one line on a user's error.

    A full disk and a lost rank are one line as well (exit code 1, or `TIMED_OUT` if it did not
    answer in time); any other exception is a bug and keeps its traceback. Rank 0 writes first, and
    the launcher ends the other ranks as soon as rank 0 has ended, so an error that all ranks share
    is printed once.
    """
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the console lacks ends no run
            stream.reconfigure(errors="replace")
    try:
        main()
    except TrainingStopped as stop:
        _write_error(str(stop))
        code = stop.code
    except (UserError, FloatingPointError) as error:
        _write_error(f"error: {error}")
        code = 2 if isinstance(error, UserError) else 1
    except Exception as error:
        if under_debugger():
            raise  # the debugger stops where it was raised
        _write_error(_full_disk(error) or _lost_rank(error) or traceback.format_exc())
        code = TIMED_OUT if _is_timeout(error) else 1
    if code == 0 and "torch" in sys.modules:
        from torch import distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of a broken collective would keep a failed process alive, and threads of
    # a finished one sometimes abort the interpreter while it shuts down.
    if code or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _full_disk(error: Exception) -> str | None:
    """Return the message for a full disk; None if the error is another one."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors has errors of its own.
    if not known and "No space left on device" not in str(error):
        return None
    where = getattr(error, "filename", None) or "the output or cache folder"
    return (f"error: no space left on the disk of {where}; free some and start again, with "
            "--resume_from_checkpoint latest if there are checkpoints")


def _is_timeout(error: Exception) -> bool:
    """Return whether gloo or NCCL has waited for another rank for too long."""
    return isinstance(error, RuntimeError) and bool(re.search("timed? ?out", str(error), re.I))


def _lost_rank(error: Exception) -> str | None:
    """Return the message for an error caused by another rank; None if it is this rank's own."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    ours = [frame for frame in traceback.extract_tb(error.__traceback__)
            if "alpaca_rlhf" in frame.filename]
    where = f" (in {ours[-1].name}, {ours[-1].filename}:{ours[-1].lineno})" if ours else ""
    if _is_timeout(error):
        return (f"error: rank {_rank()} waited for another rank until --collective_timeout was "
                f"over{where}; one is stuck or gone: see what it said last")
    if re.search("connection (was )?(closed|reset|refused)|broken pipe", text, re.IGNORECASE):
        time.sleep(5)  # the rank that failed first prints its error before the launcher ends it
        return f"error: another rank has ended{where}"
    return None


def _write_error(message: str) -> None:
    if _rank() != 0:
        time.sleep(3)
        message = f"[rank {_rank()}] {message}"
    sys.stderr.write(message.rstrip() + "\n")
