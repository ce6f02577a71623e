"""Writing files so that neither a crash nor a power loss leaves half of one: temporary name, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import xxhash


@contextmanager
def open_atomic(file: Path, *, sync_parent: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `file` when the block ends, and is deleted if the block raises.

    The temporary file lies in the same folder, because a rename works only within one file system. Its name is random:
    several processes, on several machines, may write the same file at the same time. A killed process leaves it behind.

    Args:
        file: the file to create or replace.
        sync_parent: fsync the folder too, so that the rename itself survives a power loss.
    """
    temporary = file.with_name(f".{file.name}.{uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            _sync(stream)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_parent:
        sync_folder(file.parent)


def write_atomic(file: Path, content: bytes | memoryview, *, sync_parent: bool = False) -> None:
    """Write a file so that it holds all of `content` or is not changed at all. `sync_parent` as in `open_atomic`."""
    with open_atomic(file, sync_parent=sync_parent) as stream:
        stream.write(content)


def write_synced(file: Path, content: bytes | memoryview) -> None:
    """Write a file under its final name and fsync it. For folders that become visible by a rename of their own."""
    with file.open("wb") as stream:
        stream.write(content)
        _sync(stream)


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that new and renamed files in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checksummed(file: Path, content: bytes) -> None:
    """Write a small file atomically, with the XXH3-128 of `content` as its first line."""
    write_atomic(file, xxhash.xxh3_128_hexdigest(content).encode() + b"\n" + content)


def read_checksummed(file: Path) -> bytes | None:
    """Return what `write_checksummed` wrote; None if the file is missing or does not match its checksum."""
    try:
        digest, _, content = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    return content if xxhash.xxh3_128_hexdigest(content).encode() == digest else None


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
