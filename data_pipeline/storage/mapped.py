"""Memory-mapped token files: mapped at first use, closed again when many are open, every MiB verified once.

A mapped file holds two descriptors, and a process has few of them. So at most MAX_OPEN_DESCRIPTORS / 2 files are mapped
at a time in the whole process. The file that was opened first is closed first, and is mapped again when it is next
read. Blocks that were verified stay verified.

Reading a mapping ends the process with SIGBUS if the file was truncated, or if the disk fails. So each access looks at
the file's size (0.3 us), and checksums are taken over bytes that are read, not mapped: a failing disk raises an error.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from io import SEEK_END, FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import ref

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError, unreadable_error
from data_pipeline.storage.manifest import BLOCK_BYTES

MAX_OPEN_DESCRIPTORS = 192
"""File descriptors that mapped files hold at a time."""

T = TypeVar("T")
_BLOCK_BITS = BLOCK_BYTES.bit_length() - 1
_open_files: OrderedDict[ref[MappedFile[Any]], None] = OrderedDict()  # oldest first. Any: files map to different types
_open_files_lock = threading.Lock()


class CorruptDataError(DataError):
    """A file is missing, has the wrong size or does not match its checksum.

    A file that cannot be opened or read for another reason raises StorageError instead: its contents may be intact.
    """


def _forget(closed: ref[MappedFile[Any]]) -> None:
    _open_files.pop(closed, None)


class MappedFile(ABC, Generic[T]):
    """A file that is mapped when it is first used, and again after it was closed to free its descriptors."""

    def __init__(self, file: Path, start: int, size: int, remedy: str) -> None:
        """Open nothing yet.

        Args:
            file: to map.
            start: first byte to map.
            size: bytes to map.
            remedy: what to do if the file is damaged, for error messages.
        """
        self._file, self._start, self._size, self._remedy = file, start, size, remedy
        self._end = start + size
        self._mapped: tuple[T, FileIO] | None = None

    @abstractmethod
    def _map(self) -> tuple[T, FileIO]:
        """Map the file with `map_file`. Return the mapped object and the open file."""

    def get(self) -> T:
        """Return the mapped object; map the file if needed. The file stays open while the object or a view of it
        exists.

        Raises:
            CorruptDataError: the file is shorter than it was, or `_map` finds it damaged.
            StorageError: the file cannot be opened.
        """
        mapped = self._mapped
        value, stream = self._open() if mapped is None else mapped
        try:
            if (size := stream.seek(0, SEEK_END)) >= self._end:
                return value
        except OSError as error:
            raise unreadable_error(self._file, error, "read") from error
        raise CorruptDataError(
            f"{self._file} was cut off to {size} bytes while it was in use, and needs {self._end}; {self._remedy}"
        )

    def _open(self) -> tuple[T, FileIO]:
        self._mapped = mapped = self._map()
        with _open_files_lock:
            _open_files[ref(self, _forget)] = None
            while 2 * len(_open_files) > MAX_OPEN_DESCRIPTORS:
                oldest = _open_files.popitem(last=False)[0]()
                if oldest is not None:
                    oldest._mapped = None
        return mapped


Array = NDArray[Any]  # Any: the type that was asked for


class CheckedArray(MappedFile[Array]):
    """An array in a file. Each MiB is compared with its checksum when it is first read."""

    def __init__(
        self,
        file: Path,
        start: int,
        size: int,
        dtype: np.dtype[Any],
        checksums: Callable[[], NDArray[np.uint64]],
        remedy: str,
    ) -> None:
        """Open nothing yet.

        Args:
            file: the file that holds the array.
            start: byte at which the array begins.
            size: bytes of the array.
            dtype: type of the items.
            checksums: returns the XXH3-64 of each MiB.
            remedy: what to do if the file is damaged, for error messages.
        """
        super().__init__(file, start, size, remedy)
        self._dtype, self._checksums = dtype, checksums
        self._verified = bytearray(-(-size // BLOCK_BYTES))
        self._n_unverified = len(self._verified)
        self._itemsize = dtype.itemsize

    def _map(self) -> tuple[Array, FileIO]:
        raw, stream = map_file(self._file, self._start, self._size, self._remedy)
        return np.frombuffer(raw, self._dtype, self._size // self._itemsize), stream

    def read(self, low: int, high: int) -> Array:
        """Return items [low, high), at least one, as a read-only view.

        Raises:
            CorruptDataError: a block does not match its checksum, or the file became shorter.
            StorageError: the file cannot be opened or read.
        """
        array = self.get()
        if self._n_unverified:
            first, last = low * self._itemsize >> _BLOCK_BITS, high * self._itemsize - 1 >> _BLOCK_BITS
            if self._verified.find(0, first, last + 1) >= 0:
                self._verify(first, last)
        return array[low:high]

    def _verify(self, first: int, last: int) -> None:
        """Verify the blocks from `first` to `last`, unless they are verified already."""
        expected = self._checksums()
        for block in range(first, last + 1):
            low = block * BLOCK_BYTES
            if not self._verified[block] and xxhash.xxh3_64_intdigest(self._read_block(low)) != expected[block]:
                raise CorruptDataError(
                    f"{self._file} is damaged: block {block} of {len(expected)} (1 MiB from byte {self._start + low}) "
                    f"does not match its checksum; {self._remedy}"
                )
            self._verified[block] = 1
        self._n_unverified = self._verified.count(0)

    def _read_block(self, low: int) -> bytes:
        """Read the block that begins at byte `low` of the array."""
        _, stream = self._mapped or self._open()
        try:
            return os.pread(stream.fileno(), min(BLOCK_BYTES, self._size - low), self._start + low)
        except OSError as error:
            raise unreadable_error(self._file, error, "read") from error


def map_file(file: Path, start: int, size: int, remedy: str) -> tuple[memoryview, FileIO]:
    """Map bytes [start, start + size) of a file. Return them and the open file, whose size can be asked for later.

    Raises:
        CorruptDataError: the file is shorter.
        StorageError: the file cannot be opened.
    """
    try:
        stream = FileIO(file)
        return np.memmap(stream, np.uint8, "r", start, (size,)).data, stream
    except OSError as error:
        raise unreadable_error(file, error) from error
    except ValueError as error:
        raise CorruptDataError(f"{file} cannot be read ({error}); {remedy}") from None
