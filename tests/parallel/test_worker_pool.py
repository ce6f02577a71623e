"""The worker pool of multi-rank tests: its results, its reports of failures, and that it survives them."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributed, nn
from workers import MAX_CASES, CaseFailed, WorkerPool

FOREVER = 3600.0


@dataclass(frozen=True)
class Seen:
    """A result of a class that is defined in the test module itself."""

    rank: int
    size: int
    threads: int
    drawn: Tensor


def look() -> Seen:
    return Seen(distributed.get_rank(), distributed.get_world_size(), torch.get_num_threads(), torch.rand(2))


def total(start: float, *, factor: float = 1.0) -> Tensor:
    value = torch.tensor([start + distributed.get_rank()]) * factor
    distributed.all_reduce(value)
    return value


def spoil(tensor: Tensor) -> Tensor:
    if distributed.get_rank() == 0:
        tensor.zero_()
    return tensor


def trained() -> nn.Linear:
    return nn.Linear(2, 1)


def one_raises(which: int) -> None:
    if distributed.get_rank() == which:
        raise LookupError("the first mistake")
    distributed.barrier()


def one_fails_an_assertion() -> None:
    if distributed.get_rank() == 1:
        pytest.fail("said by pytest")
    distributed.barrier()


def one_stays_away() -> None:
    if distributed.get_rank() == 0:
        time.sleep(FOREVER)
    distributed.barrier()


def one_ends(code: int) -> None:
    if distributed.get_rank() == 1:
        os._exit(code)
    distributed.barrier()


def one_is_killed() -> None:
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def one_crashes() -> None:
    if distributed.get_rank() == 1:
        os.abort()
    distributed.barrier()


def pid() -> int:
    return os.getpid()


def assert_goes_on(workers: WorkerPool, world_size: int) -> None:
    expected = float(world_size * (world_size - 1) / 2)
    assert [value.item() for value in workers.run(total, world_size, 0.0)] == [expected] * world_size


@pytest.mark.parametrize("world_size", [4, 1, 2])
def test_each_rank_returns_its_own_result(workers: WorkerPool, world_size: int) -> None:
    seen = workers.run(look, world_size)
    assert [(one.rank, one.size, one.threads) for one in seen] == [(rank, world_size, 1) for rank in range(world_size)]
    assert all(torch.equal(one.drawn, seen[0].drawn) for one in seen)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_arguments_reach_every_rank(workers: WorkerPool, world_size: int) -> None:
    expected = 3.0 * sum(10.0 + rank for rank in range(world_size))
    assert [value.item() for value in workers.run(total, world_size, 10.0, factor=3.0)] == [expected] * world_size


def test_tensors_and_modules_go_by_value(workers: WorkerPool) -> None:
    tensor = torch.ones(3, dtype=torch.bfloat16)
    zeroed, kept = workers.run(spoil, 2, tensor)
    assert torch.equal(tensor, torch.ones(3, dtype=torch.bfloat16))
    assert torch.equal(zeroed, torch.zeros(3, dtype=torch.bfloat16))
    assert torch.equal(kept, tensor)
    assert trained().weight.shape == workers.run(trained, 1)[0].weight.shape


@pytest.fixture
def fresh() -> Iterator[WorkerPool]:
    """A pool whose workers have served no case: none is replaced for its age."""
    with WorkerPool() as pool:
        yield pool


def test_the_processes_live_until_they_have_served_enough(fresh: WorkerPool) -> None:
    first = fresh.run(pid, 2)
    assert [fresh.run(pid, 2) for _ in range(MAX_CASES - 1)] == [first] * (MAX_CASES - 1)
    assert not set(first) & {os.getpid(), *fresh.run(pid, 2)}


@pytest.mark.parametrize("which", [0, 2])
def test_an_error_is_told_by_the_rank_that_failed_first(fresh: WorkerPool, which: int) -> None:
    before = fresh.run(pid, 3)
    with pytest.raises(CaseFailed) as failed:
        fresh.run(one_raises, 3, which)
    message = str(failed.value)
    assert f"one_raises: rank {which} of 3 raised\nTraceback" in message
    assert 'raise LookupError("the first mistake")' in message
    assert message.rstrip().endswith("LookupError: the first mistake")
    assert message.count("Traceback") == 1  # not those of the two ranks that waited for it
    assert_goes_on(fresh, 3)
    assert fresh.run(pid, 3) == before


def test_what_pytest_raises_is_told_too(workers: WorkerPool) -> None:
    with pytest.raises(CaseFailed, match=r"rank 1 of 2 raised\n(.*\n)*.*Failed: said by pytest"):
        workers.run(one_fails_an_assertion, 2)


def test_a_hang_is_cut_and_shows_where_every_rank_is(workers: WorkerPool) -> None:
    with pytest.raises(CaseFailed) as failed:
        workers.run(one_stays_away, 3, timeout=2)
    message = str(failed.value)
    assert "one_stays_away: no answer after 2 s" in message
    assert [message.count(f"rank {rank}: ") for rank in range(3)] == [1, 1, 1]
    assert message.count("in one_stays_away") == 3
    assert message.count("in barrier") == 2
    assert_goes_on(workers, 3)


def test_a_dead_worker_is_noticed_long_before_the_timeout(workers: WorkerPool) -> None:
    began = time.monotonic()
    with pytest.raises(CaseFailed, match=r"one_ends: rank 1 of 2 ended with exit code 7$"):
        workers.run(one_ends, 2, 7, timeout=60)
    with pytest.raises(CaseFailed, match=r"one_is_killed: rank 1 of 2 was killed by SIGKILL$"):
        workers.run(one_is_killed, 2, timeout=60)
    with pytest.raises(
        CaseFailed, match=r"rank 1 of 2 was killed by SIGABRT\nFatal Python error: Aborted\n(.*\n)*.* in one_crashes"
    ):
        workers.run(one_crashes, 2, timeout=60)
    assert time.monotonic() - began < 60
    assert_goes_on(workers, 2)


def test_what_cannot_be_sent_is_refused(workers: WorkerPool) -> None:
    with pytest.raises(
        TypeError, match=r"cannot be sent to a worker: .*; use a function from the top level of a module"
    ):
        workers.run(lambda: 1, 2)
    with pytest.raises(ValueError, match=r"world_size=9: the pool has 1 to 8 workers"):
        workers.run(look, 9)


def test_no_worker_outlives_its_pool() -> None:
    with WorkerPool() as pool:
        (process,) = pool.run(pid, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
