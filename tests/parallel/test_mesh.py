"""What the axes' process groups have besides their ranks."""

from datetime import timedelta

import pytest
import torch
from torch.distributed import ProcessGroup
from workers import WorkerPool

import parallel.mesh
from parallel.layout import Layout
from parallel.mesh import build_mesh, reshard_mesh
from parallel.world import COLLECTIVE_TIMEOUT

HALF_AN_HOUR = timedelta(minutes=30)
"""What PyTorch gives a group of an axis."""


def timeouts(bounded: bool) -> set[timedelta]:
    layout = Layout(shard=2, tensor=2, reshard_to=2)
    with pytest.MonkeyPatch.context() as patch:
        if not bounded:
            patch.setattr(parallel.mesh, "_bound", lambda _: None)
        mesh = build_mesh(layout, "cpu")
        groups = [mesh.get_group(axis) for axis in mesh.mesh_dim_names or ()] + [
            reshard_mesh(mesh, layout).get_group("near")
        ]
    return {timeout_of(group) for group in groups if group.size() < 4}  # a group of all ranks is that of the case


def timeout_of(group: ProcessGroup) -> timedelta:
    options = group._get_backend(torch.device("cpu")).options
    return timedelta(seconds=options._timeout.total_seconds())


@pytest.mark.parametrize(("bounded", "expected"), [(True, COLLECTIVE_TIMEOUT), (False, HALF_AN_HOUR)])
def test_a_collective_of_an_axis_gives_up_as_soon_as_one_of_all_ranks(
    bounded: bool, expected: timedelta, workers: WorkerPool
) -> None:
    assert workers.run(timeouts, 4, bounded) == [{expected}] * 4
