"""The rank grid of a layout as a DeviceMesh: the one place where process groups of the axes are made."""

from __future__ import annotations

from torch.distributed import get_backend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import _redistribute
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from parallel.layout import AXES, Layout
from parallel.world import COLLECTIVE_TIMEOUT


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """A mesh over all ranks with the axes of `layout.AXES`, those of size 1 included.

    The default process group must be there and be as large as the layout. Where it is bound to a GPU (`parallel.world.process_group`) NCCL's
    communicators are split off at once, also those of axes of size 1: no rank waits for another at its first message.
    """
    root = init_device_mesh(
        device_type,
        (layout.pipeline, layout.replicate, layout.fsdp, layout.tensor),
        mesh_dim_names=("pipeline", "replicate", "fsdp", "tensor"),
    )
    # Parameters are divided over `shard` and `context` as one axis. No public name unflattens; flattening is public only in PyTorch's
    # guides, and slicing what was flattened is being removed. By its number: torch 2.11 does not take the name.
    mesh = root._unflatten(2, (layout.shard, layout.context), ("shard", "context"))
    assert mesh.mesh_dim_names == AXES
    for grid in (root, mesh):
        _bound(grid)
    return mesh


def _bound(mesh: DeviceMesh) -> None:
    """Have the axes' groups give up when the group of all ranks does. By themselves they wait half an hour; no public name tells them."""
    for axis in mesh.mesh_dim_names or ():
        if (
            get_backend(group := mesh.get_group(axis)) != "fake"
        ):  # nobody is waited for (`parallel.simulate.fake_world`)
            _set_pg_timeout(COLLECTIVE_TIMEOUT, group)


def data_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The ranks that hold the same layers and the same tensor part: (`replicate`, `fsdp`), or `fsdp` alone without replicas.

    FSDP2 wants it to be of the same root as the mesh of tensor parallelism.
    """
    root = mesh._get_root_mesh()  # private, as `_unflatten`
    return root["replicate", "fsdp"] if layout.replicate > 1 else root["fsdp"]


def reshard_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """(`apart`, `near`): the "fsdp" ranks of one `replicate`, neighbours in groups of `reshard_to`, which has to be there and divide them.

    Makes process groups: all ranks must come here together, and what is sharded alike should have one.
    """
    assert layout.reshard_to is not None
    sizes = (layout.fsdp // layout.reshard_to, layout.reshard_to)
    near = mesh._get_root_mesh()._unflatten(2, sizes, ("apart", "near"))[
        "apart", "near"
    ]  # private, and by number, as in `build_mesh`
    _bound(near)
    return near


def clear_mesh_caches() -> None:
    """After a process group was destroyed, where another may follow: DTensor remembers what it found out by the shape of a mesh.

    It would take a mesh of the next group for the same and name groups that are gone, and keeps the threads of gloo alive. No public name
    clears any of the three.
    """
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # untyped in torch
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()
