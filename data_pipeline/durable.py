"""Writing so that a loss of power takes nothing back: what a rename publishes is on the disk before it."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(file: Path, content: bytes | memoryview) -> None:
    """Write a file and wait until its bytes are on the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
