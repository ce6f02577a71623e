"""A file system for torch.distributed.checkpoint that hashes what it writes, while it writes, and brings it to the disk.

Hashing on the way means that no byte is read back for its checksum. The writer's own `sync_files` is not enough: it syncs `.metadata`
while the end of it is still in Python's buffer.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

from pretrain.checkpoint.record import FileSum


class HashingFileSystem(FileSystem):
    """Files on this machine, with the sums of those written through it."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}
        """By file name, for every file that was written to its end."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file to be written once, from its beginning to its end, without seeking. Raises OSError if it exists."""
        if mode != "wb":
            raise ValueError(f"{path} is opened with mode {mode!r}; this file system only writes")
        with Path(path).open("xb") as file, _HashingStream(file) as stream:
            try:
                yield stream
            except RuntimeError as error:
                raise _disk_error_behind(error) or error from error
            stream.close()
            self.sums[Path(path).name] = FileSum(size=stream.size, xxh3=stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, and its sum with it."""
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _HashingStream(io.RawIOBase):
    """Passes writes on to `file` and hashes them on the way; closing it syncs the file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file
        self.size = 0
        self.digest = xxhash.xxh3_64()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]  # its type there is private to typeshed
        self.file.write(data)
        self.digest.update(data)
        written = memoryview(data).nbytes
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        if not self.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            super().close()


def _disk_error_behind(error: BaseException | None) -> OSError | None:
    """torch.save answers a failed write with an error of its own about file positions; what the disk said is in that one's context."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__context__
    return None
