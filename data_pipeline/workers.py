"""Jobs in worker processes: results as they finish, progress from inside of jobs, and an end to all if one fails.

Workers are spawned, not forked, because a fork of a process whose threads hold locks can hang. Workers end at once when
their parent process closes its end of a pipe or ends, however it ends.
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
_JOBS_PER_WORKER = 2
"""Jobs that are submitted for each worker: the one it works on, and the next one."""

_MESSAGE = struct.Struct("<qqq")


class Job(Protocol):
    """A piece of work. It is pickled to the worker, so it should be small."""

    @property
    def name(self) -> str:
        """The name of the job in error messages."""
        ...


J = TypeVar("J", bound=Job)
R = TypeVar("R")


@dataclass(frozen=True)
class Progress:
    """An amount of work that was done."""

    documents: int = 0
    read: int = 0
    """Bytes read of the sources' files, as they are on disk (compressed)."""
    tokens: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(self.documents + other.documents, self.read + other.read, self.tokens + other.tokens)


ProgressCallback = Callable[[Progress], None]
"""Called inside of a job after every batch, with the work of that batch."""


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    setup: Callable[[], Callable[[J, ProgressCallback], R]], jobs: Sequence[J], workers: int, progress: ProgressCallback
) -> Iterator[R]:
    """Yield the result of each job, in the order in which the jobs finish.

    Args:
        setup: called once in each worker process; returns the function that does a job. It is pickled once per worker.
        jobs: the jobs.
        workers: number of processes. With one worker, or a single job, everything runs in this process.
        progress: called a few times a second with the work done since its last call.

    Raises:
        DataError: a job raised it, or a worker was killed. The other jobs are cancelled.
    """
    if not jobs:  # `setup` may be expensive: it loads a tokenizer and checks an encoder
        return
    if workers == 1 or len(jobs) <= 1:
        work = setup()
        for job in jobs:
            yield work(job, progress)
        return
    context = multiprocessing.get_context("spawn")
    progress_reader, progress_writer = context.Pipe(duplex=False)
    parent_alive_reader, parent_alive_writer = context.Pipe(duplex=False)
    init = partial(_init_worker, setup, progress_writer, parent_alive_reader)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, init)
    waiting, running = iter(jobs), dict[Future[R], J]()
    try:
        while True:
            with _sigint_blocked():
                for job in islice(waiting, _JOBS_PER_WORKER * workers - len(running)):
                    running[cast("Future[R]", pool.submit(_run, job))] = job
            if not running:
                return
            finished, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            while progress_reader.poll():
                progress(Progress(*_MESSAGE.unpack(progress_reader.recv_bytes())))
            for future in finished:
                running.pop(future)
                yield future.result()
    except BaseException as error:
        parent_alive_writer.close()  # ends the workers
        if isinstance(error, BrokenProcessPool):
            names = ", ".join(job.name for job in running.values())
            raise DataError(
                f"a worker process died while {names or 'its work'} was prepared, perhaps out of memory; lower "
                "data.workers or data.shard_tokens, and run the command again: it continues from what is finished"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for end in (progress_reader, progress_writer, parent_alive_reader, parent_alive_writer):
            end.close()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT in this thread for the time of the block, and in the processes that it starts for good.

    Ctrl-C reaches all processes of a terminal. Only the parent should react, and end its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Worker:
    """The state of a worker process."""

    setup: Callable[[], Callable[[Any, ProgressCallback], object]]
    pipe: Connection
    """Shared by all workers. A message is one write, so it needs no lock that a killed worker could hold."""

    @cached_property
    def work(self) -> Callable[[Any, ProgressCallback], object]:  # Any: only the caller of `run_jobs` knows the type
        return self.setup()

    def report(self, progress: Progress) -> None:
        self.pipe.send_bytes(_MESSAGE.pack(progress.documents, progress.read, progress.tokens))


_worker: _Worker


def _init_worker(
    setup: Callable[[], Callable[[J, ProgressCallback], object]], progress: Connection, parent_alive: Connection
) -> None:
    """Initialize a worker process. An initializer of a pool can leave its result only in a global."""
    global _worker
    _worker = _Worker(setup, progress)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, args=(parent_alive,), daemon=True).start()


def _exit_with_parent(parent_alive: Connection) -> None:
    """Exit when the parent closes its end of the pipe. Nothing is ever sent through it."""
    parent_alive.poll(None)
    os._exit(1)


def _run(job: Job) -> object:
    return _worker.work(job, _worker.report)
