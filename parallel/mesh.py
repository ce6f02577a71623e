"""The device mesh of a layout: the only place that makes process groups for its axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import get_backend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import AXES, EXPERT_AXES, Layout
from parallel.torch_compat import concatenate_meshes, flatten_mesh, root_mesh, set_group_timeout, unflatten_mesh
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


@dataclass(frozen=True)
class ExpertMesh:
    """The shard x context x tensor ranks as a grid for experts. All its meshes have the root of `build_mesh`."""

    axes: DeviceMesh
    """(`expert_data`, `expert`, `expert_tensor`)."""
    fsdp: DeviceMesh
    """The ranks that share the state of the same experts: those that differ on `expert_data` or `expert_tensor`, as
    (`replicate`, `expert_fsdp`), or without replicas as `expert_fsdp`."""


def build_expert_mesh(mesh: DeviceMesh, layout: Layout) -> ExpertMesh:
    """The expert axes of a layout whose `expert` * `expert_tensor` divide its shard x context x tensor ranks.

    This makes process groups, so all ranks must call it together. Use one such mesh for all modules.

    Args:
        mesh: of `build_mesh`.
        layout: of that mesh.
    """
    root = root_mesh(mesh)
    # All these ranks as one axis, to be split anew. Without tensor parallelism it exists, and without FSDP too.
    if layout.tensor == 1:
        folded = root["fsdp"]
    elif layout.fsdp == 1:
        folded = root["tensor"]
    else:
        folded = flatten_mesh(root["fsdp", "tensor"], "folded")
    axes = unflatten_mesh(folded, 0, (layout.expert_data, layout.expert, layout.expert_tensor), EXPERT_AXES)
    fsdp = axes["expert_data"]
    if layout.expert_tensor > 1:
        fsdp = flatten_mesh(axes["expert_data", "expert_tensor"], "expert_fsdp")
    for each in (folded, axes, fsdp):
        _set_timeouts(each)
    return ExpertMesh(axes, concatenate_meshes(root["replicate"], fsdp) if layout.replicate > 1 else fsdp)


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
