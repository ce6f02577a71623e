"""Many chunks, some processes: results as they come, progress from inside a chunk, and an end to all when one fails.

Processes are spawned, not forked: a fork of a process whose threads hold locks can hang. They end with the process that started
them, however that one ends.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.sharedctypes
import multiprocessing.synchronize
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import Protocol, TypeVar

from data_pipeline.errors import DataError

_POLL_SECONDS = 0.2


class Job(Protocol):
    """One chunk's work; crosses to the worker by pickle."""

    @property
    def name(self) -> str:
        """What an error calls it."""
        ...


J = TypeVar("J", bound=Job)
R = TypeVar("R")


@dataclass(frozen=True)
class Done:
    """How much of the jobs is done."""

    documents: int = 0
    read: int = 0
    """Bytes of the sources' files, compressed size."""
    tokens: int = 0

    def __add__(self, other: Done) -> Done:
        return Done(self.documents + other.documents, self.read + other.read, self.tokens + other.tokens)


Tell = Callable[[Done], None]
"""Called inside a job after every batch with what the batch did."""


class _Abandoned(Exception):
    """This job is no longer wanted."""


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(work: Callable[[J, Tell], R], jobs: Sequence[J], workers: int, progress: Tell) -> Iterator[R]:
    """Yield the result of each job, in the order in which they finish.

    Args:
        work: a function of a module; does one job, and calls its second argument after every batch.
        jobs: what to do.
        workers: processes; one, or a single job, works in this process.
        progress: is given what was done since its last call, a few times a second.

    Raises:
        DataError: from a job, or because a worker was killed. The other jobs are given up.
    """
    if workers == 1 or len(jobs) <= 1:
        for job in jobs:
            yield work(job, progress)
        return
    context = multiprocessing.get_context("spawn")
    counts, stop = context.Array("q", 3), context.Event()

    def tell() -> None:
        with counts.get_lock():
            done = Done(*counts[:])
            counts[:] = [0, 0, 0]
        progress(done)

    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (counts, stop))
    try:
        waiting: dict[Future[R], J] = {pool.submit(_work, work, job): job for job in jobs}
        while waiting:
            finished, _ = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            tell()
            for future in finished:
                job = waiting.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    raise DataError(
                        f"a worker process died while {job.name} or a chunk beside it was prepared, perhaps for want of memory; "
                        f"lower data.workers or data.shard_tokens, and run the command again: it goes on from the chunks that are done"
                    ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_counts: multiprocessing.sharedctypes.SynchronizedArray[int]
_stop: multiprocessing.synchronize.Event


def _begin(counts: multiprocessing.sharedctypes.SynchronizedArray[int], stop: multiprocessing.synchronize.Event) -> None:
    """Set up a worker. What it shares with its parent can only be handed over here, so it stays in two globals of the worker."""
    global _counts, _stop
    _counts, _stop = counts, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal: the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    wait_for([parent.sentinel])
    os._exit(1)


def _work(work: Callable[[J, Tell], R], job: J) -> R:
    return work(job, _tell)


def _tell(done: Done) -> None:
    if _stop.is_set():
        raise _Abandoned
    with _counts.get_lock():
        for i, count in enumerate((done.documents, done.read, done.tokens)):
            _counts[i] += count
