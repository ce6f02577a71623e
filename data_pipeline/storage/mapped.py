"""Files of tokens as memory: mapped when first touched, the least recently used let go of, every MiB compared with its checksum once.

A mapping holds a descriptor as long as it lives, and of those a process has few. So of all that is mapped here only MOST_OPEN are at a
time, in the whole process; one that was let go of is mapped again when it is wanted. What was checked stays checked.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.manifest import BLOCK_BYTES

MOST_OPEN = 128
"""Files mapped at a time."""

T = TypeVar("T")
_BLOCK_BITS = BLOCK_BYTES.bit_length() - 1
_clock = count(1)
_open: WeakSet[Reopened[Any]] = WeakSet()  # Any: whatever each opens
_open_lock = threading.Lock()


class Damage(DataError):
    """A file was read, and it does not hold what it did. A file that cannot be opened is no damage: what it holds may well be whole."""


class Reopened(ABC, Generic[T]):
    """What holds a file open and can open it again."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._value: T | None = None
        self._used = 0

    @abstractmethod
    def _make(self) -> T:
        """Open it."""

    def get(self) -> T:
        """It, opened if it is not. Whoever keeps it, or a view of it, keeps the file open."""
        value = self._value
        self._used = next(_clock)
        if value is None:
            self._value = value = self._make()
            with _open_lock:
                _open.add(self)
                while len(_open) > MOST_OPEN:
                    oldest = min(_open, key=lambda one: one._used)
                    oldest._value = None
                    _open.remove(oldest)
        return value


Array = NDArray[Any]  # Any: of the type that was asked for


class CheckedArray(Reopened[Array]):
    """An array in a file, mapped when first touched, each MiB of it compared with its checksum when that is first touched."""

    def __init__(
        self, file: Path, start: int, size: int, dtype: np.dtype[Any], checksums: Callable[[], NDArray[np.uint64]], way_out: str
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
        super().__init__()
        self._file, self._start, self._size, self._dtype = file, start, size, dtype
        self._checksums, self._way_out = checksums, way_out
        self._checked = bytearray(-(-size // BLOCK_BYTES))
        self._itemsize = dtype.itemsize

    def _make(self) -> Array:
        return np.frombuffer(map_file(self._file, self._start, self._size, self._way_out), self._dtype, self._size // self._itemsize)

    def read(self, low: int, high: int) -> Array:
        """Items [low, high), at least one, read-only.

        Raises:
            Damage: a block does not match its checksum, or the file is shorter by now.
            DataError: the file cannot be opened.
        """
        array = self.get()
        first, last = low * self._itemsize >> _BLOCK_BITS, high * self._itemsize - 1 >> _BLOCK_BITS
        if self._checked.find(0, first, last + 1) >= 0:
            self._compare(array, first, last)
        return array[low:high]

    def _compare(self, array: Array, first: int, last: int) -> None:
        expected, raw = self._checksums(), array.view(np.uint8).data
        for block in range(first, last + 1):
            low = block * BLOCK_BYTES
            if not self._checked[block] and xxhash.xxh3_64_intdigest(raw[low : low + BLOCK_BYTES]) != expected[block]:
                raise Damage(
                    f"{self._file} is damaged: block {block} of {len(expected)} (1 MiB from byte {self._start + low}) does not "
                    f"match its checksum; {self._way_out}"
                )
            self._checked[block] = 1


def map_file(file: Path, start: int, size: int, way_out: str) -> memoryview:
    """Bytes [start, start + size) of a file, mapped.

    Raises:
        Damage: the file is shorter.
        DataError: it cannot be opened.
    """
    try:
        return np.memmap(file, np.uint8, "r", start, (size,)).data
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise Damage(f"{file} cannot be read ({error}); {way_out}") from None


def unreadable(file: Path, error: OSError) -> DataError:
    """That a file could not be opened, which tells nothing about what it holds."""
    return DataError(
        f"{file} cannot be opened ({error.strerror or error}); nothing is known to be damaged: look after the disk or mount, the "
        f"permissions, memory and the limit of open files (`ulimit -n`), and start again"
    )
