"""The device mesh of a layout: the only place that makes process groups for its axes."""

from __future__ import annotations

from torch.distributed import get_backend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import AXES, Layout
from parallel.torch_compat import root_mesh, set_group_timeout, unflatten_mesh
from parallel.world import COLLECTIVE_TIMEOUT

_FSDP_DIM = 2
"""Of the axis "fsdp" in the root mesh."""


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """A mesh over all ranks with the axes `layout.AXES`, including those of size 1.

    The default process group must exist and be as large as the layout. If it is bound to a GPU
    (`parallel.world.process_group`), NCCL's communicators are made here, also for axes of size 1. Then no rank waits
    for another at its first message.
    """
    root = init_device_mesh(
        device_type,
        (layout.pipeline, layout.replicate, layout.fsdp, layout.tensor),
        mesh_dim_names=("pipeline", "replicate", "fsdp", "tensor"),
    )
    # FSDP shards parameters over `shard` and `context` as one axis, so that axis is made first and split here.
    mesh = unflatten_mesh(root, _FSDP_DIM, (layout.shard, layout.context), ("shard", "context"))
    assert mesh.mesh_dim_names == AXES
    for each in (root, mesh):
        _set_timeouts(each)
    return mesh


def _set_timeouts(mesh: DeviceMesh) -> None:
    """Use the world group's timeout for the mesh's groups. By default they wait 30 minutes."""
    for axis in mesh.mesh_dim_names or ():
        group = mesh.get_group(axis)
        if get_backend(group) != "fake":  # nobody waits in `parallel.simulate.fake_world`
            set_group_timeout(group, COLLECTIVE_TIMEOUT)


def data_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The ranks with the same layers and the same tensor shards: (`replicate`, `fsdp`), or `fsdp` without replicas.

    FSDP2 requires that it has the same root as the mesh of tensor parallelism.
    """
    root = root_mesh(mesh)
    return root["replicate", "fsdp"] if layout.replicate > 1 else root["fsdp"]


def reshard_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """(`reshard_replicate`, `reshard_shard`): the "fsdp" ranks in groups of `layout.reshard_to` neighbours.

    `reshard_to` must be set and divide the "fsdp" ranks. This makes process groups, so all ranks must call it together.
    Use one such mesh for all modules.
    """
    assert layout.reshard_to is not None
    sizes = (layout.fsdp // layout.reshard_to, layout.reshard_to)
    names = ("reshard_replicate", "reshard_shard")
    groups = unflatten_mesh(root_mesh(mesh), _FSDP_DIM, sizes, names)[names]
    _set_timeouts(groups)
    return groups
