"""Collectives on small Python objects, used to coordinate the ranks around a checkpoint.

They run over gloo, in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from data_pipeline.errors import StorageError
from pretrain.errors import UserError

T = TypeVar("T")

EXPECTED_ERRORS = (OSError, UserError, StorageError, ValueError, TypeError, RuntimeError)
"""Errors of disks, of torch.distributed.checkpoint and of the checks in this package: passed on to the other ranks.

Any other error ends its own rank, and the process group then ends the others.
"""


def is_rank_zero(group: ProcessGroup | None) -> bool:
    """Return whether this is rank 0 of `group`; a process without a group is."""
    return group is None or dist.get_rank(group) == 0


def all_gather_object(value: T, group: ProcessGroup | None) -> list[T]:
    """Return the values of all ranks, ordered by rank, on every rank. `group=None` is a single process."""
    if group is None:
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def run_on_all(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its local result once all ranks have succeeded.

    Raises:
        One of EXPECTED_ERRORS: a rank that fails raises its own error; the others raise the error of the lowest failed
            rank.
    """
    result, failure = _try(action)
    failures = [error for error in all_gather_object(failure, group) if error is not None]
    if failures:
        raise failure or failures[0]
    return result[0]


def on_rank_zero(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. An error of rank 0 is raised on every rank."""
    outcome = [_try(action) if is_rank_zero(group) else None]
    if group is not None:
        dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group)
    assert outcome[0] is not None
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result[0]


def _try(action: Callable[[], T]) -> tuple[list[T], BaseException | None]:
    """Return ([result], None) or ([], error)."""
    try:
        return [action()], None
    except EXPECTED_ERRORS as error:
        return [], error
