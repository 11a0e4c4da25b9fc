"""The file of an evaluation's results: checked before the models are loaded, written whole."""

import json
import os
from pathlib import Path
from typing import Any

from alpaca_rlhf.utils import console
from alpaca_rlhf.utils.errors import UserError


def check_output(path: str | None, *suffixes: str) -> None:
    """Refuse an `--output` file that could not be written in the end.

    Raises:
        UserError: its name does not end in one of `suffixes`, or it cannot be written.
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


def write_output(path: str | None, content: str | dict[str, Any]) -> None:
    """Write text, or a record as JSON, completely or not at all; without a path write nothing."""
    if path is None:
        return
    if not isinstance(content, str):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    partial = Path(f"{path}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
    console.say(f"written to {path}")
