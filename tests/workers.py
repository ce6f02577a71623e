"""A pool of worker processes for multi-rank tests. torch is imported once a session; a test sends it a function.

    pool.run(function, 4, *args, **kwargs)    # on 4 ranks of a gloo group; one result per rank

If a case raises, the error shows the traceback of the rank that failed first. If it hangs, it is stopped and the error
shows the stacks of all ranks. A dead worker is noticed at once. The pool stays usable after each of these. It works
without pytest too: `with WorkerPool() as pool`.
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

MAX_WORLD_SIZE = 8
START_TIMEOUT = 120.0
PROCESSES = multiprocessing.get_context("forkserver")
"""Forks processes from a server that has the slow imports already."""
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
"""Seconds that the peers of a failed rank get to answer. Those that do not are replaced."""
STACK_WAIT = 0.5
MAX_CASES = 16
"""A worker is replaced after this many. FSDP2 keeps the classes of sharded modules, parallelized modules keep their
mesh, and gloo groups have threads. Forking a new worker takes a tenth of a second."""

R = TypeVar("R")


class CaseFailed(RuntimeError):
    """A case raised on some rank, hung, or killed its worker. The message holds the traceback or the stacks."""


@dataclass(frozen=True)
class Case:
    """Sent to a worker. The call is pickled separately: `path` must be set before its function can be imported."""

    path: list[str]
    name: str
    rank: int
    world_size: int
    timeout: float
    call: bytes


@dataclass(frozen=True)
class Returned:
    """A rank's answer. The value is pickled separately, so that tensors travel by value and not as shared memory."""

    value: bytes


@dataclass(frozen=True)
class Raised:
    """The answer of a rank that failed. All ranks use the machine's clock, so the earliest failure is the cause."""

    when: float
    text: str


@dataclass
class Worker:
    """One process, the pipe to it, the file for its stack (on a crash or SIGUSR1), and the number of cases it ran."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    stack: Path
    n_cases: int = 0

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class WorkerPool:
    """Up to 8 worker processes on this machine, started when first needed."""

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
        """Call `function` on every rank of a new gloo group, with the same seed and one thread.

        Args:
            function: from the top level of a module; closures and lambdas cannot be pickled.
            world_size: number of ranks, 1 to 8.
            args, kwargs: passed by value, the same for all ranks.
            timeout: seconds until the case counts as hung.

        Returns:
            The value of each rank, in rank order; tensors are copies.

        Raises:
            CaseFailed: with the first failure. Failures that it caused on other ranks are left out.
            TypeError: the function or an argument cannot be pickled.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size={world_size}: the pool has 1 to {MAX_WORLD_SIZE} workers")
        call = _pickle(function, args, kwargs)
        self._ensure_workers(world_size)
        ranks = self._workers[:world_size]
        answers: dict[int, Returned | Raised] = {}
        name = f"case-{next(self._names)}"
        try:
            for rank, worker in enumerate(ranks):
                worker.pipe.send_bytes(pickle.dumps(Case(sys.path, name, rank, world_size, timeout, call)))
            _collect_answers(ranks, answers, timeout)
            if problem := _describe_failure(ranks, answers, timeout):
                raise CaseFailed(f"{function.__module__}.{function.__qualname__}: {problem}")
            return [pickle.loads(answer.value) for _, answer in sorted(answers.items()) if isinstance(answer, Returned)]
        finally:
            self._end_case(ranks, answers)

    def _ensure_workers(self, size: int) -> None:
        """Start missing workers all at once, and wait until they are ready."""
        from torch.distributed import TCPStore

        self._workers = [worker for worker in self._workers if worker.process.is_alive()]
        for worker in [worker for worker in self._workers if worker.n_cases >= MAX_CASES]:
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

    def _end_case(self, ranks: Sequence[Worker], answers: dict[int, Returned | Raised]) -> None:
        """Have all ranks leave the group. Replace workers that did not answer."""
        for rank, worker in enumerate(ranks):
            if rank in answers:
                worker.n_cases += 1
                worker.pipe.send_bytes(b"leave")
            else:
                self._workers.remove(worker)
                worker.end()


def _pickle(function: Callable[..., object], args: object, kwargs: object) -> bytes:
    try:
        return pickle.dumps((function, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"cannot be sent to a worker: {error}; use a function from the top level of a module, and plain values"
        ) from error


def _collect_answers(ranks: Sequence[Worker], answers: dict[int, Returned | Raised], timeout: float) -> None:
    """Collect answers until all ranks answered, time is up, or a rank failed and its peers had time to notice."""
    waiting = {worker.pipe: rank for rank, worker in enumerate(ranks)}
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                ranks[rank].process.join()  # it died
            if not isinstance(answers.get(rank), Returned):
                deadline = min(deadline, time.monotonic() + GRACE)


def _describe_failure(ranks: Sequence[Worker], answers: dict[int, Returned | Raised], timeout: float) -> str | None:
    """Describe what went wrong, or None. A dead worker comes first, then an exception, then a hang."""
    size = len(ranks)
    for rank, worker in enumerate(ranks):
        if rank not in answers and (code := worker.process.exitcode) is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"rank {rank} of {size} {how}\n{worker.stack.read_text()}".rstrip()
    if raised := {rank: answer for rank, answer in answers.items() if isinstance(answer, Raised)}:
        first = min(raised, key=lambda rank: raised[rank].when)
        return f"rank {first} of {size} raised\n{raised[first].text}"
    if len(answers) == size:
        return None
    return f"no answer after {timeout:g} s\n" + "\n".join(_stacks(ranks, answers))


def _stacks(ranks: Sequence[Worker], answers: dict[int, Returned | Raised]) -> list[str]:
    """The stack of each rank."""
    for rank, worker in enumerate(ranks):
        if rank not in answers and worker.process.pid is not None:
            os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(STACK_WAIT)  # faulthandler writes inside the signal handler, even during a blocked C call
    return [
        f"rank {rank}: " + ("has returned" if rank in answers else "\n" + worker.stack.read_text())
        for rank, worker in enumerate(ranks)
    ]


def _serve(pipe: Connection, port: int, stack: Path) -> None:
    """Main loop of a worker: receive a case, run it, answer, and leave the group when all ranks answered."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that a case starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with stack.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        faulthandler.enable(file)  # writes the stack on a crash
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        gc.freeze()  # imported modules stay; scanning them after every failure would take longer than a case
        store = distributed.TCPStore("127.0.0.1", port, is_master=False)
        pipe.send_bytes(b"ready")
        while True:
            try:
                message = pipe.recv_bytes()
            except EOFError:  # the parent is gone
                return
            answer = _run_case(pickle.loads(message), store)
            if isinstance(answer, Raised):
                gc.collect()  # objects of the failed case may keep connections of the group open
                _leave_group()  # peers that wait for this rank fail at once
            pipe.send_bytes(pickle.dumps(answer))
            pipe.recv_bytes()
            _leave_group()
            gc.collect()  # models and meshes form cycles and hold groups, which have threads


def _run_case(case: Case, store: Store) -> Returned | Raised:
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
    except BaseException as error:  # the parent raises it again, also SystemExit and pytest outcomes
        when, trace = time.monotonic(), error.__traceback__
        return Raised(when, "".join(traceback.format_exception(error.with_traceback(trace.tb_next if trace else None))))


def _leave_group() -> None:
    """Close the group, and clear DTensor's cache of meshes: it would reuse them for the next case."""
    from torch import distributed

    from parallel.torch_compat import clear_mesh_caches

    if distributed.is_initialized():
        distributed.destroy_process_group()
    clear_mesh_caches()
