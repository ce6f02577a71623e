import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data_pipeline.locks import FileLock, LockHeldError

HOLDER = """
import sys
from pathlib import Path
from data_pipeline.locks import FileLock

lock = FileLock.acquire(Path(sys.argv[1]), blocking=False)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_held_lock_names_its_holder_and_is_released_when_the_holder_is_killed(lock_file: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(lock_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        for _ in range(2):  # a refused attempt leaves the holder's name in place
            with pytest.raises(LockHeldError) as refused:
                FileLock.acquire(lock_file, blocking=False)
            assert refused.value.holder == str(holder.pid)
        holder.kill()
    FileLock.acquire(lock_file, blocking=False).release()
    assert lock_file.read_text() == f"{os.getpid()}\n"


def test_a_waiting_process_gets_the_lock_although_the_holder_deletes_the_file(lock_file: Path) -> None:
    first = FileLock.acquire(lock_file, blocking=False)
    locks: list[FileLock] = []
    waiting = threading.Thread(target=lambda: locks.append(FileLock.acquire(lock_file, blocking=True)))
    waiting.start()
    first.release(delete=True)
    waiting.join()
    with pytest.raises(LockHeldError):
        FileLock.acquire(lock_file, blocking=False)
    locks[0].release(delete=True)
    assert not lock_file.exists()


def test_without_locks_only_a_required_lock_is_an_error(lock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks available"):
        FileLock.acquire(lock_file, blocking=True)
    FileLock.acquire(lock_file, blocking=True, required=False).release(delete=True)
    assert not lock_file.exists()
