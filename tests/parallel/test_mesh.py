"""The process groups of mesh axes use the timeout of the world group."""

from datetime import timedelta

import pytest
import torch
from torch.distributed import ProcessGroup
from workers import WorkerPool

import parallel.mesh
from parallel.layout import Layout
from parallel.mesh import build_mesh, reshard_mesh
from parallel.world import COLLECTIVE_TIMEOUT

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""PyTorch's default for the group of a mesh axis."""


def timeouts(is_set: bool) -> set[timedelta]:
    layout = Layout(shard=2, tensor=2, reshard_to=2)
    with pytest.MonkeyPatch.context() as patch:
        if not is_set:
            patch.setattr(parallel.mesh, "_set_timeouts", lambda _: None)
        mesh = build_mesh(layout, "cpu")
        groups = [mesh.get_group(axis) for axis in mesh.mesh_dim_names or ()] + [
            reshard_mesh(mesh, layout).get_group("reshard_shard")
        ]
    return {timeout_of(group) for group in groups if group.size() < 4}  # an axis of all ranks reuses the world group


def timeout_of(group: ProcessGroup) -> timedelta:
    options = group._get_backend(torch.device("cpu")).options
    return timedelta(seconds=options._timeout.total_seconds())


@pytest.mark.parametrize(("is_set", "expected"), [(True, COLLECTIVE_TIMEOUT), (False, DEFAULT_TIMEOUT)])
def test_mesh_groups_have_the_timeout_of_the_world_group(
    is_set: bool, expected: timedelta, workers: WorkerPool
) -> None:
    assert workers.run(timeouts, 4, is_set) == [{expected}] * 4
