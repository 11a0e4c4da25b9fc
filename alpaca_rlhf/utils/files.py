"""Files that a user gives, opened in one way: decompressed, as UTF-8 and without a byte order mark.

A file that only stands for the data, such as a pointer of git LFS, is refused with its name.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from alpaca_rlhf.utils.errors import UserError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")  # of compressed files; what they hold decides
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_POINTERS = {
    b"version https://git-lfs": "a pointer of git LFS, not the data itself; run git lfs pull, or "
    "download the file",
    b"/annex/objects/": "a pointer of git-annex, not the data itself; run git annex get",
}
_STAND_INS = {
    **_POINTERS,
    b"PK\3\4": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it (zstd -d)",
}
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32",
          codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
          codecs.BOM_UTF16_BE: "utf-16"}


def expanded(text: str) -> str:
    """Replace a home folder at the start, which the shell leaves in `--flag=~/x`."""
    return os.path.expanduser(text) if re.match(r"~\w*(/|$)", text) else text


def pointer_problem(path: Path) -> str:
    """Return what is wrong with a file that is a pointer of git LFS or git-annex, else ""."""
    with path.open("rb") as file:
        start = file.read(64)
    return next((problem for magic, problem in _POINTERS.items() if start.startswith(magic)), "")


def opened(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        UserError: it stands for the data, or is packed in a way that is not read.
        OSError, EOFError, zlib.error, lzma.LZMAError: it cannot be read.
    """
    file: Any = path.open("rb")
    for magic, unpacked in _COMPRESSED.items():
        if file.peek(8).startswith(magic):
            file = unpacked(file)
            break
    start = file.peek(64)
    for magic, problem in _STAND_INS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {problem}")
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if encoding == "utf-8-sig":
        file.read(len(codecs.BOM_UTF8))
    elif encoding:
        try:
            return io.BytesIO(file.read().decode(encoding).encode())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not {encoding.upper()} as its first bytes say; convert the "
                            "file") from error
    return file


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        UserError, OSError, EOFError, zlib.error, lzma.LZMAError: those of `opened`.
    """
    with opened(path) as file:
        return file.read().decode()
