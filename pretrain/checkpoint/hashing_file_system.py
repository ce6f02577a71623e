"""A file system for torch.distributed.checkpoint that hashes and syncs each file while it writes it.

No byte is read back for its checksum. The writer's own `sync_files` is not enough: it syncs `.metadata` while Python
still buffers the end of the file.
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

from pretrain.checkpoint.manifest import FileChecksum


class HashingFileSystem(FileSystem):
    """The local file system, with the checksums of the files written through it."""

    def __init__(self) -> None:
        self.checksums: dict[str, FileChecksum] = {}
        """By file name, of every file that was written completely."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a new file for sequential writing, without seeking. Raises OSError if it exists."""
        if mode != "wb":
            raise ValueError(f"{path} is opened with mode {mode!r}; this file system writes only new files")
        with Path(path).open("xb") as file, _HashingStream(file) as stream:
            try:
                yield stream
            except RuntimeError as error:
                raise _os_error_behind(error) or error from error
            stream.close()
            self.checksums[Path(path).name] = FileChecksum(size=stream.size, xxh3=stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file and the key of its checksum."""
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class _HashingStream(io.RawIOBase):
    """Writes to `file` and hashes what it writes. Closing it syncs the file to the disk."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.file = file
        self.size = 0
        self.digest = xxhash.xxh3_64()

    def writable(self) -> bool:
        return True

    # The type of the base class is private to typeshed.
    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
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


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """Return the OSError in the context chain of `error`: torch.save hides it behind a RuntimeError about file
    positions."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__context__
    return None
