"""When one rank fails, every rank ends: the error is printed once, and all exit with the same code.

A process group cannot do this: when a rank fails, its peers hang in a collective. The ranks use the launcher's
key-value store instead, which each process can reach from start to end. A watcher thread on every rank polls it,
because the main thread may hang anywhere.

States of a rank, and the key it writes when it enters each:

| state        | entered when                                 | key written         | next                          |
|--------------|----------------------------------------------|---------------------|-------------------------------|
| running      | `fail_together` begins                       | `joined/RANK`       | left, reporting, acknowledged |
| reporting    | it is the first to increment `failed`: it    | `failed`, then      | exit with its own code        |
|              | raised, or its local peer was killed         | `reported` = code   |                               |
| acknowledged | its watcher saw `failed`                     | `acknowledged/RANK` | exit with the reported code   |
| left         | the block ended without an error             | `left/RANK`         | -                             |

The reporting rank waits ACKNOWLEDGE_TIMEOUT for acknowledgements; a rank that gives none was killed, and the error says
so. An acknowledged rank waits REPORT_TIMEOUT for the exit code, then exits with 1. A rank that is killed by the system
cannot report: each rank watches the process of the next rank on its machine, and reports for it. Where connections do
not break by themselves, as with NCCL, nobody else would notice.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

ShowError = Callable[[BaseException], int]
"""Prints an error and returns the exit code for it."""

POLL_INTERVAL = 0.5
"""Seconds between two polls for a failure. One poll costs microseconds."""
FAILURE_POLL_INTERVAL = 0.02
"""Seconds between two polls after a failure; longer with thousands of ranks."""
STORE_REQUESTS_PER_SECOND = 10_000
"""Load that the launcher's store handles easily."""
CONNECT_TIMEOUT = timedelta(minutes=5)
ACKNOWLEDGE_TIMEOUT = 3.0
"""Seconds in which every living rank acknowledges a failure."""
REPORT_TIMEOUT = 6.0
"""Seconds in which the reporting rank prints its error. The others exit after that in any case."""
STORE_LOST_TIMEOUT = 60.0
"""Seconds in which a rank may finish after the store is gone, and the launcher with it."""
KILLED = "disappeared: it was killed, or its machine went down"


@contextmanager
def fail_together(world: World, show: ShowError) -> Iterator[None]:
    """Run the block on every rank; if any rank raises, print its error once and end every rank with its exit code.

    SystemExit and KeyboardInterrupt count as an end without an error: they propagate, and the other ranks go on. With
    one process every exception propagates. If no launcher holds the store, rank 0 does; this then works as long as
    rank 0 lives.

    Args:
        world: this process.
        show: called on the reporting rank only.
    """
    if world.size == 1:
        yield
        return
    from torch.distributed import DistError

    coordinator = FailureCoordinator.connect(world)
    finished, raised = threading.Event(), threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(coordinator.with_own_connection(), show, finished, raised), daemon=True
    )
    watcher.start()
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever it is, the other ranks must not wait for this one
        # A launcher that sees another rank exit sends SIGTERM, which would cut the message off.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = 1
        raised.set()
        try:
            if coordinator.claim_report():
                code = _report(coordinator, error, show)
            watcher.join()  # it ends this process
        except DistError:  # the store is gone, and the launcher with it
            code = show(error)
        os._exit(code)
    finally:
        finished.set()
        watcher.join()
        with suppress(DistError):
            coordinator.mark("left")


@dataclass(frozen=True)
class FailureCoordinator:
    """The keys of the protocol in the launcher's store. Every method may raise DistError: the store is gone."""

    world: World
    store: Store
    prefix: str
    """Separates this attempt from earlier ones: torchrun's store outlives a restart."""

    @classmethod
    def connect(cls, world: World) -> FailureCoordinator:
        """Join: state `running`."""
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=CONNECT_TIMEOUT))
        coordinator = cls(world, store, f"failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
        coordinator.mark("joined", f"{os.getpid()} {_pid_namespace()}")
        return coordinator

    def with_own_connection(self) -> FailureCoordinator:
        """A copy for another thread."""
        store: Store = self.store.clone()  # type: ignore[attr-defined]  # torch's stubs leave it out
        return FailureCoordinator(self.world, store, self.prefix)

    @property
    def poll_interval(self) -> float:
        """Seconds between two polls once a rank has failed."""
        return max(FAILURE_POLL_INTERVAL, self.world.size / STORE_REQUESTS_PER_SECOND)

    def mark(self, state: str, value: str = "") -> None:
        """Record that this rank entered a state."""
        self.store.set(f"{self.prefix}/{state}/{self.world.rank}", value)

    def claim_report(self) -> bool:
        """Whether this rank is the first to fail, and reports. All others get False."""
        return self.store.add(f"{self.prefix}/failed", 1) == 1

    def has_failure(self) -> bool:
        """Whether any rank failed."""
        return self.store.check([f"{self.prefix}/failed"])

    def publish_exit_code(self, code: int) -> None:
        """End the report: the other ranks exit with this code."""
        self.store.set(f"{self.prefix}/reported", str(code))

    def reported_exit_code(self) -> int | None:
        """The code of the reporting rank; None until it has printed its error."""
        key = f"{self.prefix}/reported"
        return int(self.store.get(key)) if self.store.check([key]) else None

    def local_peer(self) -> _LocalPeer | None:
        """The next rank on this machine, once it joined. None if there is none, or its process is not visible."""
        world = self.world
        rank = world.rank - world.local_rank + (world.local_rank + 1) % world.local_size
        if rank == world.rank or not self._all_are("joined", [rank]):
            return None
        pid, namespace = self.store.get(f"{self.prefix}/joined/{rank}").decode().split(" ")
        return _LocalPeer(rank, int(pid)) if namespace == _pid_namespace() else None

    def has_left(self, rank: int) -> bool:
        """Whether a rank ended without an error."""
        return self._all_are("left", [rank])

    def wait_for_unresponsive(self) -> list[int]:
        """The ranks that joined, did not leave, and do not acknowledge the failure in time."""
        waiting = [
            rank for rank in range(self.world.size) if self._all_are("joined", [rank]) and not self.has_left(rank)
        ]
        deadline = time.monotonic() + ACKNOWLEDGE_TIMEOUT
        while waiting and not self._all_are("acknowledged", waiting) and time.monotonic() < deadline:
            time.sleep(self.poll_interval)
        return [rank for rank in waiting if not self._all_are("acknowledged", [rank])]

    def _all_are(self, state: str, ranks: Sequence[int]) -> bool:
        return self.store.check([f"{self.prefix}/{state}/{rank}" for rank in ranks])


@dataclass(frozen=True)
class _LocalPeer:
    """A rank that is a process of this machine."""

    rank: int
    pid: int

    @property
    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8")
        except ProcessLookupError:
            return False
        except OSError:  # another user's process, or not Linux
            return True
        return stat.rpartition(")")[2].split()[0] != "Z"  # a zombie is dead; its parent has not collected it yet


def _pid_namespace() -> str:
    """Processes with the same value see each other's process ids."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return "one"


def _report(coordinator: FailureCoordinator, error: BaseException, show: ShowError) -> int:
    """State `reporting`: print the first error, then let the other ranks exit."""
    world = coordinator.world
    error.add_note(f"on rank {world.rank} of {world.size}, {socket.gethostname()}")
    # gloo and NCCL raise RuntimeError when a peer's connection closes: say which peer it was.
    if isinstance(error, RuntimeError) and (unresponsive := coordinator.wait_for_unresponsive()):
        error.add_note(f"rank {', '.join(map(str, unresponsive))} {KILLED}")
    code = show(error)
    sys.stdout.flush()
    sys.stderr.flush()
    coordinator.publish_exit_code(code)
    return code


def _watch(
    coordinator: FailureCoordinator, show: ShowError, finished: threading.Event, raised: threading.Event
) -> None:
    """Thread of every rank: end the process when some rank failed and its error was printed.

    It polls instead of blocking in the store: a thread inside a C++ call aborts the process when the interpreter ends.

    Args:
        coordinator: with a connection of this thread.
        show: to report for a local peer that was killed.
        finished: set when the main thread ends its block.
        raised: set when the main thread raised.
    """
    from torch.distributed import DistError

    try:
        if not _wait_for_failure(coordinator, show, finished):
            return
        coordinator.mark("acknowledged")
    except DistError:  # the store is gone, and the launcher with it
        if not finished.wait(STORE_LOST_TIMEOUT):
            os._exit(1)
        return
    code, deadline = None, time.monotonic() + REPORT_TIMEOUT
    with suppress(DistError):
        while (code := coordinator.reported_exit_code()) is None and time.monotonic() < deadline:
            time.sleep(coordinator.poll_interval)
    # Ranks that did not raise exit first: once a rank is gone the launcher sends SIGTERM to the rest, who would save.
    if raised.is_set():
        time.sleep(POLL_INTERVAL + 10 * coordinator.poll_interval)
    os._exit(1 if code is None else code)


def _wait_for_failure(coordinator: FailureCoordinator, show: ShowError, finished: threading.Event) -> bool:
    """State `running`: True when a rank failed, False when this rank's block ended. Reports for a killed local peer."""
    peer: _LocalPeer | None = None
    while not coordinator.has_failure():
        if finished.wait(POLL_INTERVAL):
            return False
        peer = peer or coordinator.local_peer()
        if peer and not peer.is_alive and not coordinator.has_left(peer.rank) and coordinator.claim_report():
            _report(coordinator, ChildProcessError(f"rank {peer.rank} {KILLED}"), show)
    return True
