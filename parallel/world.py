"""The processes of a run as one: who this process is, how they meet, and fail. Imports torch only where there are several.

Knows the variables that torchrun sets. Failing together is settled with a few keys in the store that the launcher holds and every process
can reach from its first moment to its last; a process group could not do it: when a rank fails, its peers hang in a collective.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.errors import LayoutError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TIMEOUT = timedelta(minutes=10)
"""After which a collective that not all ranks reach is an error."""
LOOK_EVERY = 0.5
"""Seconds between two looks of a rank for whether another failed: a question to the store that costs microseconds."""
GLANCE = 0.02
"""The same, once one has; of thousands of ranks, each looks less often."""
HEARD_WITHIN = 3.0
"""Seconds in which every living rank answers that it has heard of a failure."""
SHOWN_WITHIN = 6.0
"""Seconds in which the rank that failed first shows its error; the others end then, whatever became of it."""
ALONE_FOR = 60.0
"""Seconds in which a rank may come to its end after the store is gone, and the launcher with it."""
OWN_FILES = 1024
"""Open files that are no connections of the process group: shards, logs, a logger's sockets."""
LOST = "was lost without a word: killed, or its machine went down"


@dataclass(frozen=True)
class World:
    """Which process this is, of how many: in all, and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that speaks and writes for all."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """What torchrun says; one process where it says nothing. LayoutError where only half of it is said."""
        said = {name: environment[name] for name in VARIABLES if name in environment}
        if not said:
            return cls()
        told = " ".join(f"{name}={value}" for name, value in said.items())
        way_out = "start with torchrun, which sets them all, or unset them for one process"
        if len(said) < len(VARIABLES):
            missing = ", ".join(name for name in VARIABLES if name not in said)
            raise LayoutError(f"{told} in the environment, without {missing}: {way_out}")
        if not all(value.isdecimal() for value in said.values()):
            raise LayoutError(f"{told} in the environment are not all numbers: {way_out}")
        world = cls(*(int(said[name]) for name in VARIABLES))
        if not (world.rank < world.size and world.local_rank < world.local_size <= world.size):
            raise LayoutError(f"{told} in the environment contradict each other: {way_out}")
        return world


@contextmanager
def start(world: World, device: str, *, even_alone: bool = False) -> Iterator[None]:
    """The process group around all distributed work: gloo for tensors on the CPU, NCCL beside it for CUDA. Nothing for one process.

    Args:
        world: of this process.
        device: "cpu" or "cuda".
        even_alone: make a group of one process too; what divides parameters wants one.

    Raises:
        LayoutError: there are more processes on this machine than GPUs.
    """
    if world.size == 1 and not even_alone:
        yield
        return
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import (
        HashStore,
    )  # torch.distributed has it too, but does not say so to type checkers

    # A stage that raises would have every rank print the whole schedule; and every rank says how DTensor puts matrices together for Muon.
    logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    gpu: torch.device | None = None
    if device == "cuda":
        if world.local_rank >= (there := torch.cuda.device_count()):
            raise LayoutError(
                f"{world.local_size} processes on a machine with {there} GPUs: start at most {there} (torchrun --nproc-per-node={there})"
            )
        # Bound to the group: the axes' communicators are then made with it, not when first used.
        gpu = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(gpu)
        # Of what passes between stages it says, once a rank, that it goes in the order in which it is given; so it may.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    _allow_files(world.size + OWN_FILES)  # gloo has a connection to every rank
    backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
    if world.size == 1:
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1, device_id=gpu)
    else:
        distributed.init_process_group(backend, timeout=TIMEOUT, device_id=gpu)
    yield
    distributed.destroy_process_group()  # not after an error: closed connections would make errors of their own on the other ranks


def _allow_files(wanted: int) -> None:
    """Let this process have so many files open, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


@contextmanager
def fail_together(world: World, show: Callable[[BaseException], int]) -> Iterator[None]:
    """Around all that a process of the run does: when a rank raises, its error is shown once and every rank ends, wherever it is.

    SystemExit and KeyboardInterrupt pass; with one process everything does. Where no launcher holds the store, rank 0 does, and it works
    as long as rank 0 lives.

    Args:
        world: of this process.
        show: shows an error and returns the exit code, which is that of all ranks then. It is called on the rank that failed first.
    """
    if world.size == 1:
        yield
        return
    from torch.distributed import DistError

    fate = _Fate.of(world)
    done, failing = threading.Event(), threading.Event()
    watcher = threading.Thread(
        target=_end_with_the_others, args=(fate.for_another_thread(), show, done, failing), daemon=True
    )
    watcher.start()
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever it is, the other ranks must not wait for this one
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # a launcher that saw another rank end sends it, and would cut the message off
        code = 1
        failing.set()
        try:
            if fate.is_first_to_fail():
                code = _tell(fate, error, show)
            watcher.join()  # it ends this process
        except DistError:  # the store is gone, and the launcher with it
            code = show(error)
        os._exit(code)
    finally:
        done.set()
        watcher.join()
        with suppress(DistError):
            fate.mark("left")


@dataclass(frozen=True)
class _Fate:
    """What the ranks know of each other: which are there, whether one failed, which have heard of it, whether its error was shown."""

    world: World
    store: Store
    attempt: str

    @classmethod
    def of(cls, world: World) -> _Fate:
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        fate = cls(
            world, store, f"fate/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        )  # the store may be older than this attempt
        fate.mark("joined", f"{os.getpid()} {_process_namespace()}")
        return fate

    def for_another_thread(self) -> _Fate:
        """With a connection of its own."""
        store: Store = self.store.clone()  # type: ignore[attr-defined]  # torch's stubs leave it out
        return _Fate(self.world, store, self.attempt)

    @property
    def glance(self) -> float:
        """Seconds between two looks once a rank has failed: the store answers 10,000 questions a second without haste."""
        return max(GLANCE, self.world.size / 10_000)

    def mark(self, what: str, value: str = "") -> None:
        self.store.set(f"{self.attempt}/{what}/{self.world.rank}", value)

    def is_first_to_fail(self) -> bool:
        return self.store.add(f"{self.attempt}/failed", 1) == 1

    def somebody_failed(self) -> bool:
        return self.store.check([f"{self.attempt}/failed"])

    def shown(self, code: int) -> None:
        self.store.set(f"{self.attempt}/shown", str(code))

    def exit_code(self) -> int | None:
        """Of the rank that failed, once it has shown its error."""
        key = f"{self.attempt}/shown"
        return int(self.store.get(key)) if self.store.check([key]) else None

    def neighbour(self) -> _Neighbour | None:
        """The next rank on this machine, once it has joined: every rank has one that looks. None where there is none that one can see."""
        world = self.world
        rank = world.rank - world.local_rank + (world.local_rank + 1) % world.local_size
        if rank == world.rank or not self._is_marked("joined", rank):
            return None
        pid, namespace = self.store.get(f"{self.attempt}/joined/{rank}").decode().split(" ")
        return _Neighbour(rank, int(pid)) if namespace == _process_namespace() else None

    def has_left(self, rank: int) -> bool:
        return self._is_marked("left", rank)

    def silent(self) -> list[int]:
        """Ranks that were there, have not left, and do not hear of the failure."""
        waiting = [
            rank for rank in range(self.world.size) if self._is_marked("joined", rank) and not self.has_left(rank)
        ]
        deadline = time.monotonic() + HEARD_WITHIN
        while waiting and not self._are_marked("heard", waiting) and time.monotonic() < deadline:
            time.sleep(self.glance)
        return [rank for rank in waiting if not self._is_marked("heard", rank)]

    def _is_marked(self, what: str, rank: int) -> bool:
        return self._are_marked(what, [rank])

    def _are_marked(self, what: str, ranks: Sequence[int]) -> bool:
        return self.store.check([f"{self.attempt}/{what}/{rank}" for rank in ranks])


@dataclass(frozen=True)
class _Neighbour:
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
        except OSError:  # another's, or not Linux
            return True
        return stat.rpartition(")")[2].split()[0] != "Z"  # dead, until the launcher looks


def _process_namespace() -> str:
    """Processes that have the same see each other by their numbers."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return "one"


def _tell(fate: _Fate, error: BaseException, show: Callable[[BaseException], int]) -> int:
    """Show the first error, and let the other ranks end."""
    world = fate.world
    error.add_note(f"on rank {world.rank} of {world.size}, {socket.gethostname()}")
    if isinstance(error, RuntimeError) and (
        silent := fate.silent()
    ):  # what gloo and NCCL raise when a peer's connection closes
        error.add_note(f"rank {', '.join(map(str, silent))} {LOST}")
    code = show(error)
    sys.stdout.flush()
    sys.stderr.flush()
    fate.shown(code)
    return code


def _end_with_the_others(
    fate: _Fate, show: Callable[[BaseException], int], done: threading.Event, failing: threading.Event
) -> None:
    """Thread of every rank: end the process when some rank has failed and shown its error. The main thread may hang anywhere.

    A rank that was killed shows none: its neighbour sees that it is gone, and speaks for it. Where connections do not break of themselves,
    as on gloo, nobody else would.
    It looks now and then instead of waiting in the store: a thread that sits in a C++ call when the interpreter ends aborts the process.
    """
    from torch.distributed import DistError

    try:
        neighbour: _Neighbour | None = None
        while not fate.somebody_failed():
            if done.wait(LOOK_EVERY):
                return
            neighbour = neighbour or fate.neighbour()
            if neighbour and not neighbour.is_alive and not fate.has_left(neighbour.rank) and fate.is_first_to_fail():
                _tell(fate, ChildProcessError(f"rank {neighbour.rank} {LOST}"), show)
        fate.mark("heard")
    except DistError:  # the store is gone, and the launcher with it
        if not done.wait(ALONE_FOR):
            os._exit(1)
        return
    code, deadline = None, time.monotonic() + SHOWN_WITHIN
    with suppress(DistError):
        while (code := fate.exit_code()) is None and time.monotonic() < deadline:
            time.sleep(fate.glance)
    # The healthy go first: the launcher sends SIGTERM to those that are left, and they would take it for a request to save.
    if failing.is_set():
        time.sleep(LOOK_EVERY + 10 * fate.glance)
    os._exit(1 if code is None else code)
