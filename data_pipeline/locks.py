"""Locks between processes, on files. The kernel releases a lock when its process ends, however it ends.

Why not the package `filelock`: its version 3 empties the lock file before it has the lock, so a refused process erases
who holds it. Version 4 falls back to marker files on a file system without `flock`, and these survive a killed process.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class LockHeldError(Exception):
    """Another process holds the lock."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"held by process {holder}")
        self.holder = holder
        """Its process id; `unknown` if it could not be read."""


class FileLock:
    """An exclusive `flock` on a file, held until `release` is called or the process ends."""

    def __init__(self, file: Path, descriptor: int | None) -> None:
        self.file, self._descriptor = file, descriptor

    @classmethod
    def acquire(cls, file: Path, *, blocking: bool, required: bool = True) -> FileLock:
        """Create the lock file if it is missing, lock it, and write this process's id into it.

        Args:
            file: the lock file; its folder exists.
            blocking: wait while another process holds the lock.
            required: if false, go on without a lock if the file system has none. For work that is safe to do twice.

        Raises:
            LockHeldError: another process holds the lock, and `blocking` is false.
            OSError: the file cannot be opened, or the file system has no locks and the lock is required.
        """
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                is_current = _lock(descriptor, file, blocking)
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise LockHeldError(holder or "unknown") from None
            except OSError:
                os.close(descriptor)
                if required:
                    raise
                return cls(file, None)
            if is_current:
                return cls(file, descriptor)
            os.close(descriptor)
            if not blocking:
                raise LockHeldError("unknown")

    def release(self, *, delete: bool = False) -> None:
        """Release the lock, and delete its file if `delete` is true."""
        if delete:
            # Deleted while it is still locked: a process that waits for it sees that it locked a deleted file, and
            # starts over.
            self.file.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _lock(descriptor: int, file: Path, blocking: bool) -> bool:
    """Lock an open file and write the process id into it. Return false if another process deleted `file` before."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return True
    return False
