"""Which process this is, of how many, and the process group they form. Knows the variables that torchrun sets.

Imports torch only if there are several processes.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from parallel.errors import LayoutError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A collective that some rank does not reach in this time is an error."""
OTHER_OPEN_FILES = 1024
"""Files that a process opens beside the connections of its process group: shards, logs, sockets of loggers."""


@dataclass(frozen=True)
class World:
    """Which process this is, of how many: in all, and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one process that prints and writes records."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read torchrun's variables; one process if none is set.

        Raises:
            LayoutError: some are missing, not numbers, or contradict each other.
        """
        found = {name: environment[name] for name in VARIABLES if name in environment}
        if not found:
            return cls()
        shown = " ".join(f"{name}={value}" for name, value in found.items())
        remedy = "start with torchrun, which sets them all, or unset them for one process"
        if len(found) < len(VARIABLES):
            missing = ", ".join(name for name in VARIABLES if name not in found)
            raise LayoutError(f"{shown} in the environment, without {missing}: {remedy}")
        if not all(value.isdecimal() for value in found.values()):
            raise LayoutError(f"{shown} in the environment are not all numbers: {remedy}")
        world = cls(*(int(found[name]) for name in VARIABLES))
        if not (world.rank < world.size and world.local_rank < world.local_size <= world.size):
            raise LayoutError(f"{shown} in the environment contradict each other: {remedy}")
        return world


@contextmanager
def process_group(world: World, device: str, *, even_if_alone: bool = False) -> Iterator[None]:
    """Hold the default process group: gloo for CPU tensors, and NCCL for CUDA tensors. One process needs none.

    Args:
        world: this process.
        device: "cpu" or "cuda".
        even_if_alone: make a group of one process too. FSDP wants one.

    Raises:
        LayoutError: there are more processes on this machine than GPUs.
    """
    if world.size == 1 and not even_if_alone:
        yield
        return
    import torch
    from torch import distributed

    from parallel.torch_compat import HashStore

    # If a stage raises, every rank would print the whole schedule. DTensor warns on every rank how it gathers for Muon.
    logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    gpu: torch.device | None = None
    if device == "cuda":
        if world.local_rank >= (n_gpus := torch.cuda.device_count()):
            raise LayoutError(
                f"{world.local_size} processes on a machine with {n_gpus} GPUs: start at most {n_gpus} "
                f"(torchrun --nproc-per-node={n_gpus})"
            )
        # A device bound to the group makes the communicators of mesh axes at once, not at their first use.
        gpu = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(gpu)
        # NCCL warns that sends between pipeline stages run one after the other. That is the order we want.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    _raise_open_file_limit(world.size + OTHER_OPEN_FILES)  # gloo connects to every rank
    backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
    if world.size == 1:
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1, device_id=gpu)
    else:
        distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=gpu)
    yield
    # Not after an error: closing connections would raise errors on the other ranks.
    distributed.destroy_process_group()


def _raise_open_file_limit(wanted: int) -> None:
    """Allow this process so many open files, or as many as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
