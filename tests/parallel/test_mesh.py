"""The process groups of mesh axes: their timeouts, and the ranks of those for experts."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from workers import WorkerPool

import parallel.mesh
from parallel.layout import EXPERT_AXES, Layout
from parallel.mesh import build_expert_mesh, build_mesh, reshard_mesh
from parallel.world import COLLECTIVE_TIMEOUT

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""PyTorch's default for the group of a mesh axis."""


def timeouts(is_set: bool) -> set[timedelta]:
    layout = Layout(shard=2, tensor=2, reshard_to=2, expert=2, expert_tensor=2)
    with pytest.MonkeyPatch.context() as patch:
        if not is_set:
            patch.setattr(parallel.mesh, "_set_timeouts", lambda _: None)
        mesh = build_mesh(layout, "cpu")
        groups = [mesh.get_group(axis) for axis in mesh.mesh_dim_names or ()] + [
            reshard_mesh(mesh, layout).get_group("reshard_shard")
        ]
        experts = build_expert_mesh(mesh, layout)
        groups += [*(experts.axes.get_group(axis) for axis in EXPERT_AXES), experts.fsdp.get_group()]
    return {timeout_of(group) for group in groups if group.size() < 4}  # an axis of all ranks reuses the world group


def timeout_of(group: ProcessGroup) -> timedelta:
    options = group._get_backend(torch.device("cpu")).options
    return timedelta(seconds=options._timeout.total_seconds())


@pytest.mark.parametrize(("is_set", "expected"), [(True, COLLECTIVE_TIMEOUT), (False, DEFAULT_TIMEOUT)])
def test_mesh_groups_have_the_timeout_of_the_world_group(
    is_set: bool, expected: timedelta, workers: WorkerPool
) -> None:
    assert workers.run(timeouts, 4, is_set) == [{expected}] * 4


FOLDED = [
    Layout(shard=4, expert=2),
    Layout(tensor=2),
    Layout(pipeline=2, context=2, expert=2),
    Layout(replicate=2, shard=2, expert=2),
    Layout(shard=2, tensor=2, expert=2, expert_tensor=2),
    Layout(replicate=2, shard=2, tensor=2, expert_tensor=2),
    Layout(shard=2, context=2, tensor=2, expert=2, expert_tensor=2),
]
FULL = torch.arange(8 * 6 * 8.0).reshape(8, 6, 8)


def expert_groups(layout: Layout) -> tuple[dict[str, list[int]], int]:
    """The ranks of this rank's group on each expert axis, and the number of groups that the expert mesh added."""
    mesh = build_mesh(layout, "cpu")
    before = len(dist.distributed_c10d._world.pg_map)  # no public name counts them
    experts = build_expert_mesh(mesh, layout)
    added = len(dist.distributed_c10d._world.pg_map) - before
    return {axis: dist.get_process_group_ranks(experts.axes.get_group(axis)) for axis in EXPERT_AXES}, added


@pytest.mark.parametrize("layout", FOLDED, ids=str)
def test_expert_groups_are_those_of_the_layout(layout: Layout, workers: WorkerPool) -> None:
    inner = layout.fsdp * layout.tensor
    for rank, (groups, added) in enumerate(workers.run(expert_groups, layout.world_size, layout)):
        here = layout.expert_coordinates(rank)
        for axis, ranks in groups.items():
            replica = range(rank // inner * inner, (rank // inner + 1) * inner)
            assert ranks == [
                other for other in replica if layout.expert_coordinates(other) | {axis: 0} == here | {axis: 0}
            ]
        assert added <= 3 + (layout.tensor > 1 and layout.fsdp > 1) + (layout.expert_tensor > 1)


def sharded_experts(layout: Layout, dim: int) -> tuple[torch.Tensor, int]:
    """Experts of `FULL`, shared out over `expert` and sharded by FSDP2: the full tensor, and this rank's elements."""
    experts = build_expert_mesh(build_mesh(layout, "cpu"), layout)
    local = FULL.clone()
    if layout.expert > 1:
        local = distribute_tensor(local, experts.axes["expert"], [Shard(0)], src_data_rank=None)
    module = nn.ParameterDict({"weight": nn.Parameter(local)})
    fully_shard(module, mesh=experts.fsdp, shard_placement_fn=lambda _: Shard(dim))
    weight = module["weight"]
    assert isinstance(weight, DTensor)
    return weight.full_tensor().detach(), weight.to_local().numel()


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("layout", FOLDED, ids=str)
def test_fsdp2_shards_experts_over_the_ranks_that_hold_the_same(layout: Layout, dim: int, workers: WorkerPool) -> None:
    for full, n_elements in workers.run(sharded_experts, layout.world_size, layout, dim):
        assert torch.equal(full, FULL)
        assert n_elements == FULL.numel() // (layout.fsdp * layout.tensor)
