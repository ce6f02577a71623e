"""A pool of worker processes for tests of what takes several ranks: torch is imported once a session, a case is a function sent to them.

    pool.run(function, 4, *args, **kwargs)    # calls function(*args, **kwargs) on 4 ranks of a gloo group; one result per rank

A case that raises is told with the traceback of the rank that failed first, a hang is cut with the stacks of all ranks, a dead worker is
noticed at once; after each of them the pool goes on. `with WorkerPool() as pool` works without pytest too.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

LARGEST_WORLD = 8
START_TIMEOUT = 120.0
PROCESSES = multiprocessing.get_context("forkserver")
"""Starts processes as forks of one that has imported what takes long, and nothing else: none of them pays for it again."""
PROCESSES.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.distributed.pipelining",
        "pretrain.cli",
        "pytest",
    ]
)
GRACE = 2.0
"""Seconds in which the peers of a failed rank may answer; those that do not are replaced."""
STACK_WAIT = 0.5
MOST_CASES = 16
"""A worker is replaced after so many: FSDP2 keeps the classes of modules that were sharded, split ones know their mesh, and gloo's groups
have threads. A fresh one is forked in a tenth of a second."""

R = TypeVar("R")


class CaseFailed(RuntimeError):
    """A case raised on some rank, hung, or killed its worker; the message holds the traceback or the stacks."""


@dataclass(frozen=True)
class Case:
    """What a worker is sent. The call is pickled by itself: the path has to be there before its function can be found."""

    path: list[str]
    name: str
    rank: int
    world_size: int
    timeout: float
    call: bytes


@dataclass(frozen=True)
class Returned:
    """What a rank answers. The value is pickled by itself, so that tensors go by value and not as shared memory."""

    value: bytes


@dataclass(frozen=True)
class Raised:
    """What a rank answers that failed. The clock is the machine's: of several ranks, the earliest is the cause."""

    when: float
    text: str


@dataclass
class Worker:
    """One process, the pipe to it, the file that gets its stack when it crashes or gets SIGUSR1, and the cases that it has served."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    stack: Path
    served: int = 0

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class WorkerPool:
    """Up to 8 worker processes on this machine, started when they are first needed."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []
        self._names = count()
        self._folder = tempfile.TemporaryDirectory(prefix="workers-")
        self._store: Store | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._workers:
            self._workers.pop().end()
        self._folder.cleanup()

    def run(
        self, function: Callable[..., R], world_size: int, /, *args: object, timeout: float = 60.0, **kwargs: object
    ) -> list[R]:
        """Call `function` on every rank of a fresh gloo group, with the same seed and one thread.

        Args:
            function: defined at the top level of a module; closures and lambdas cannot be sent.
            world_size: number of ranks, 1 to 8.
            args, kwargs: the same for all ranks, by value.
            timeout: seconds until the case counts as hung.

        Returns:
            What each rank returned, by rank; tensors are copies.

        Raises:
            CaseFailed: with the first failure; the others that it caused are left out.
            TypeError: the function or an argument cannot be sent.
        """
        if not 1 <= world_size <= LARGEST_WORLD:
            raise ValueError(f"world_size={world_size}: the pool has 1 to {LARGEST_WORLD} workers")
        call = _pickle(function, args, kwargs)
        self._grow(world_size)
        team = self._workers[:world_size]
        answers: dict[int, Returned | Raised] = {}
        name = f"case-{next(self._names)}"
        try:
            for rank, worker in enumerate(team):
                worker.pipe.send_bytes(pickle.dumps(Case(sys.path, name, rank, world_size, timeout, call)))
            _listen(team, answers, timeout)
            if problem := _problem(team, answers, timeout):
                raise CaseFailed(f"{function.__module__}.{function.__qualname__}: {problem}")
            return [pickle.loads(answer.value) for _, answer in sorted(answers.items()) if isinstance(answer, Returned)]
        finally:
            self._settle(team, answers)

    def _grow(self, size: int) -> None:
        """Start the workers that are missing, all at once, and wait until they are there."""
        from torch.distributed import TCPStore

        self._workers = [worker for worker in self._workers if worker.process.is_alive()]
        for worker in [worker for worker in self._workers if worker.served >= MOST_CASES]:
            self._workers.remove(worker)
            worker.end()
        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        known = len(self._workers)
        while len(self._workers) < size:
            ours, theirs = PROCESSES.Pipe()
            stack = Path(self._folder.name) / f"{next(self._names)}.stack"
            process = PROCESSES.Process(target=_serve, args=(theirs, self._store.port, stack), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(Worker(process, ours, stack))
        for worker in self._workers[known:]:
            if not worker.pipe.poll(START_TIMEOUT):
                self._workers.remove(worker)
                worker.end()
                raise CaseFailed(f"a worker did not start within {START_TIMEOUT:.0f} s")
            worker.pipe.recv_bytes()

    def _settle(self, team: Sequence[Worker], answers: dict[int, Returned | Raised]) -> None:
        """Let all ranks leave the group; replace the workers that owe an answer, whatever it was that interrupted them."""
        for rank, worker in enumerate(team):
            if rank in answers:
                worker.served += 1
                worker.pipe.send_bytes(b"leave")
            else:
                self._workers.remove(worker)
                worker.end()


def _pickle(function: Callable[..., object], args: object, kwargs: object) -> bytes:
    try:
        return pickle.dumps((function, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"cannot be sent to a worker: {error}; the function must stand at the top level of its module, and be given plain values"
        ) from error


def _listen(team: Sequence[Worker], answers: dict[int, Returned | Raised], timeout: float) -> None:
    """Collect the answers until all are there, or time is over, or one failed and its peers had time to notice."""
    waiting = {worker.pipe: rank for rank, worker in enumerate(team)}
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                team[rank].process.join()  # it died
            if not isinstance(answers.get(rank), Returned):
                deadline = min(deadline, time.monotonic() + GRACE)


def _problem(team: Sequence[Worker], answers: dict[int, Returned | Raised], timeout: float) -> str | None:
    """What went wrong, if something did: a death before an error that it may have caused, an error before a wait that it may have."""
    size = len(team)
    for rank, worker in enumerate(team):
        if rank not in answers and (code := worker.process.exitcode) is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"rank {rank} of {size} {how}\n{worker.stack.read_text()}".rstrip()
    if raised := {rank: answer for rank, answer in answers.items() if isinstance(answer, Raised)}:
        first = min(raised, key=lambda rank: raised[rank].when)
        return f"rank {first} of {size} raised\n{raised[first].text}"
    if len(answers) == size:
        return None
    return f"no end after {timeout:g} s\n" + "\n".join(_stacks(team, answers))


def _stacks(team: Sequence[Worker], answers: dict[int, Returned | Raised]) -> list[str]:
    """Where each rank is."""
    for rank, worker in enumerate(team):
        if rank not in answers and worker.process.pid is not None:
            os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(STACK_WAIT)  # faulthandler writes in the signal handler itself, even below a blocked call
    return [
        f"rank {rank}: " + ("has returned" if rank in answers else "\n" + worker.stack.read_text())
        for rank, worker in enumerate(team)
    ]


def _serve(pipe: Connection, port: int, stack: Path) -> None:
    """A worker's life: wait for a case, attempt it, answer, leave the group when all have answered."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for what it may start itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    with stack.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        faulthandler.enable(file)  # where it was when it crashed
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        gc.freeze()  # what is imported stays: looking through it after every failure would take longer than the case
        store = distributed.TCPStore("127.0.0.1", port, is_master=False)
        pipe.send_bytes(b"here")
        while True:
            try:
                message = pipe.recv_bytes()
            except EOFError:  # the parent is gone
                return
            answer = _attempt(pickle.loads(message), store)
            if isinstance(answer, Raised):
                gc.collect()  # whatever the case left behind could keep the group's connections open
                _leave()  # peers that wait for this rank fail, and need not be waited for
            pipe.send_bytes(pickle.dumps(answer))
            pipe.recv_bytes()
            _leave()
            gc.collect()  # models and meshes go in circles, and hold groups, each of which has threads of its own


def _attempt(case: Case, store: Store) -> Returned | Raised:
    import torch
    from torch import distributed

    try:
        sys.path[:] = case.path
        function, args, kwargs = pickle.loads(case.call)
        torch.manual_seed(0)
        distributed.init_process_group(
            "gloo",
            store=distributed.PrefixStore(case.name, store),
            rank=case.rank,
            world_size=case.world_size,
            timeout=timedelta(seconds=case.timeout),
        )
        return Returned(pickle.dumps(function(*args, **kwargs)))
    except BaseException as error:  # the parent raises it: SystemExit and pytest's outcomes too
        when, trace = time.monotonic(), error.__traceback__
        return Raised(when, "".join(traceback.format_exception(error.with_traceback(trace.tb_next if trace else None))))


def _leave() -> None:
    """Close the group's connections, and have DTensor forget its meshes: it would take those of the next case for the same."""
    from torch import distributed

    from parallel.mesh import clear_mesh_caches

    if distributed.is_initialized():
        distributed.destroy_process_group()
    clear_mesh_caches()
