"""Many jobs, some processes: results as they come, progress from inside a job, and an end to all when one fails.

Processes are spawned, not forked: a fork of a process whose threads hold locks can hang. They end at once when the process that
started them gives them up or ends, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar, cast

from data_pipeline.errors import DataError

_POLL_SECONDS = 0.2
_AHEAD = 2
"""Jobs that are handed over at a time, by worker: one to do and one to go on with."""

_MESSAGE = struct.Struct("<qqq")


class Job(Protocol):
    """One piece of work; crosses to the worker by pickle, so it is small."""

    @property
    def name(self) -> str:
        """What an error calls it."""
        ...


J = TypeVar("J", bound=Job)
R = TypeVar("R")


@dataclass(frozen=True)
class Progress:
    """How much of the jobs is done."""

    documents: int = 0
    read: int = 0
    """Bytes of the sources' files, compressed size."""
    tokens: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(self.documents + other.documents, self.read + other.read, self.tokens + other.tokens)


ProgressCallback = Callable[[Progress], None]
"""Called inside a job after every batch with what the batch did."""


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    begin: Callable[[], Callable[[J, ProgressCallback], R]], jobs: Sequence[J], workers: int, progress: ProgressCallback
) -> Iterator[R]:
    """Yield the result of each job, in the order in which they finish.

    Args:
        begin: called once in each process that works; gives what does a job there. Crosses to the worker by pickle, once.
        jobs: what to do.
        workers: processes; one, or a single job, works in this process.
        progress: is given what was done since its last call, a few times a second.

    Raises:
        DataError: from a job, or because a worker was killed. The other jobs are given up.
    """
    if not jobs:  # `begin` may be dear: it loads a tokenizer and checks an encoder
        return
    if workers == 1 or len(jobs) <= 1:
        work = begin()
        for job in jobs:
            yield work(job, progress)
        return
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    alive, our_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, partial(_set_up, begin, tell, alive))
    waiting, running = iter(jobs), dict[Future[R], J]()
    try:
        while True:
            with _no_interrupt():
                for job in islice(waiting, _AHEAD * workers - len(running)):
                    running[cast("Future[R]", pool.submit(_run, job))] = job
            if not running:
                return
            finished, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            while told.poll():
                progress(Progress(*_MESSAGE.unpack(told.recv_bytes())))
            for future in finished:
                running.pop(future)
                yield future.result()
    except BaseException as error:
        our_end.close()  # the workers notice
        if isinstance(error, BrokenProcessPool):
            beside = ", ".join(job.name for job in running.values())
            raise DataError(
                f"a worker process died while {beside or 'its work'} was prepared, perhaps for want of memory; lower data.workers or "
                f"data.shard_tokens, and run the command again: it goes on from what is finished"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for end in (told, tell, alive, our_end):
            end.close()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold SIGINT back, from this thread and for good from the processes it starts: Ctrl-C reaches all processes of a terminal, and
    the parent decides what becomes of the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Worker:
    """What a worker process has been given."""

    begin: Callable[[], Callable[[Any, ProgressCallback], object]]
    pipe: Connection
    """Shared by all workers. A message is written in one piece, so it needs no lock that a worker could die with."""

    @cached_property
    def work(self) -> Callable[[Any, ProgressCallback], object]:  # Any: only who calls `run_jobs` knows his jobs
        return self.begin()

    def tell(self, done: Progress) -> None:
        self.pipe.send_bytes(_MESSAGE.pack(done.documents, done.read, done.tokens))


_worker: _Worker


def _set_up(begin: Callable[[], Callable[[J, ProgressCallback], object]], tell: Connection, alive: Connection) -> None:
    """Set up a worker. What a pool hands to its workers can only be kept in a global of theirs."""
    global _worker
    _worker = _Worker(begin, tell)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()


def _end_with_parent(alive: Connection) -> None:
    """Nothing is ever sent: the pipe becomes readable when the parent's end is closed."""
    alive.poll(None)
    os._exit(1)


def _run(job: Job) -> object:
    return _worker.work(job, _worker.tell)
