"""How the ranks of a process group agree around a checkpoint. What they say is small and travels through host memory (gloo)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from data_pipeline.errors import StorageError
from pretrain.errors import UserError

T = TypeVar("T")

EXPECTED = (OSError, UserError, StorageError, ValueError, TypeError, RuntimeError)
"""What disks, torch.distributed.checkpoint and the checks of this package raise. Anything else ends its own rank, which ends the others."""


def is_first(group: ProcessGroup | None) -> bool:
    """Whether this is the rank that does what is done once; None is a process alone."""
    return group is None or dist.get_rank(group) == 0


def gather(value: T, group: ProcessGroup | None) -> list[T]:
    """The values of all ranks, by rank, on every rank."""
    if group is None:
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def together(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """The result of `action` here, once it has ended well on all ranks. A rank where it fails raises its error, others the first's."""
    result, failure = _try(action)
    failures = [error for error in gather(failure, group) if error is not None]
    if failures:
        raise failure or failures[0]
    return result[0]


def on_first(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """The result of `action` on the first rank, on every rank; an error there is raised everywhere."""
    outcome = [_try(action) if is_first(group) else None]
    if group is not None:
        dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group)
    assert outcome[0] is not None
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result[0]


def _try(action: Callable[[], T]) -> tuple[list[T], BaseException | None]:
    """([result], None), or ([], error)."""
    try:
        return [action()], None
    except EXPECTED as error:
        return [], error
