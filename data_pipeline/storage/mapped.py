"""Files of tokens as memory: mapped when first touched, those open longest let go of, every MiB compared with its checksum once.

A file that is mapped holds two descriptors, and of those a process has few. So of all that is mapped here only MAX_OPEN_DESCRIPTORS / 2
files are at a time, in the whole process; one that was let go of is mapped again when it is wanted. What was checked stays
checked.

Touching a mapping where the file has been cut off, or where the disk fails, ends the process with SIGBUS. So the file's size is
looked at each time (0.3 us), and checksums are taken over what is read, not mapped: a disk that fails then is an error like any
other.
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
"""Descriptors held at a time."""

T = TypeVar("T")
_BLOCK_BITS = BLOCK_BYTES.bit_length() - 1
_open: OrderedDict[ref[MappedFile[Any]], None] = OrderedDict()  # the first was opened first. Any: whatever each opens
_open_lock = threading.Lock()


class CorruptDataError(DataError):
    """A file was read, and it does not hold what it did. A file that cannot be opened is no damage: what it holds may well be whole."""


def _forget(gone: ref[MappedFile[Any]]) -> None:
    _open.pop(gone, None)


class MappedFile(ABC, Generic[T]):
    """What holds a file mapped and can map it again."""

    def __init__(self, file: Path, start: int, size: int, way_out: str) -> None:
        """Open nothing yet.

        Args:
            file: to map.
            start: first byte to map.
            size: bytes to map.
            way_out: what to do when it is damaged.
        """
        self._file, self._start, self._size, self._way_out = file, start, size, way_out
        self._end = start + size
        self._held: tuple[T, FileIO] | None = None

    @abstractmethod
    def _make(self) -> tuple[T, FileIO]:
        """Map it. Returns it and the file, by `map_file`."""

    def get(self) -> T:
        """It, opened if it is not. Whoever keeps it, or a view of it, keeps the file open.

        Raises:
            CorruptDataError: the file is shorter than it was, or what `_make` says.
            StorageError: the file cannot be opened.
        """
        held = self._held
        value, stream = self._open() if held is None else held
        try:
            if (size := stream.seek(0, SEEK_END)) >= self._end:
                return value
        except OSError as error:
            raise unreadable_error(self._file, error, "read") from error
        raise CorruptDataError(
            f"{self._file} was cut off to {size} bytes while it was in use, and needs {self._end}; {self._way_out}"
        )

    def _open(self) -> tuple[T, FileIO]:
        self._held = held = self._make()
        with _open_lock:
            _open[ref(self, _forget)] = None
            while 2 * len(_open) > MAX_OPEN_DESCRIPTORS:
                oldest = _open.popitem(last=False)[0]()
                if oldest is not None:
                    oldest._held = None
        return held


Array = NDArray[Any]  # Any: of the type that was asked for


class CheckedArray(MappedFile[Array]):
    """An array in a file, mapped when first touched, each MiB of it compared with its checksum when that is first touched."""

    def __init__(
        self,
        file: Path,
        start: int,
        size: int,
        dtype: np.dtype[Any],
        checksums: Callable[[], NDArray[np.uint64]],
        way_out: str,
    ) -> None:
        """Open nothing yet.

        Args:
            file: that holds it.
            start: byte at which it begins.
            size: its bytes.
            dtype: of its items.
            checksums: XXH3-64 of each MiB.
            way_out: what to do when it is damaged.
        """
        super().__init__(file, start, size, way_out)
        self._dtype, self._checksums = dtype, checksums
        self._checked = bytearray(-(-size // BLOCK_BYTES))
        self._unchecked = len(self._checked)
        self._itemsize = dtype.itemsize

    def _make(self) -> tuple[Array, FileIO]:
        raw, stream = map_file(self._file, self._start, self._size, self._way_out)
        return np.frombuffer(raw, self._dtype, self._size // self._itemsize), stream

    def read(self, low: int, high: int) -> Array:
        """Items [low, high), at least one, read-only.

        Raises:
            CorruptDataError: a block does not match its checksum, or the file is shorter by now.
            StorageError: the file cannot be opened or read.
        """
        array = self.get()
        if self._unchecked:
            first, last = low * self._itemsize >> _BLOCK_BITS, high * self._itemsize - 1 >> _BLOCK_BITS
            if self._checked.find(0, first, last + 1) >= 0:
                self._compare(first, last)
        return array[low:high]

    def _compare(self, first: int, last: int) -> None:
        expected = self._checksums()
        for block in range(first, last + 1):
            low = block * BLOCK_BYTES
            if not self._checked[block] and xxhash.xxh3_64_intdigest(self._read(low)) != expected[block]:
                raise CorruptDataError(
                    f"{self._file} is damaged: block {block} of {len(expected)} (1 MiB from byte {self._start + low}) does not "
                    f"match its checksum; {self._way_out}"
                )
            self._checked[block] = 1
        self._unchecked = self._checked.count(0)

    def _read(self, low: int) -> bytes:
        """The block from byte `low` on."""
        _, stream = self._held or self._open()
        try:
            return os.pread(stream.fileno(), min(BLOCK_BYTES, self._size - low), self._start + low)
        except OSError as error:
            raise unreadable_error(self._file, error, "read") from error


def map_file(file: Path, start: int, size: int, way_out: str) -> tuple[memoryview, FileIO]:
    """(bytes [start, start + size) of a file, mapped; the file, which knows how long it is now).

    Raises:
        CorruptDataError: the file is shorter.
        StorageError: it cannot be opened.
    """
    try:
        stream = FileIO(file)
        return np.memmap(stream, np.uint8, "r", start, (size,)).data, stream
    except OSError as error:
        raise unreadable_error(file, error) from error
    except ValueError as error:
        raise CorruptDataError(f"{file} cannot be read ({error}); {way_out}") from None
