"""What has been written must still be there after a crash."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Force to the disk which files a folder has: those just made, renamed or removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
