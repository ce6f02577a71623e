"""Which part of a parameter is on this rank."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor
from torch.distributed.tensor import DTensor

# No public name says where a shard lies; DTensor's own checkpoints ask this function, which knows FSDP over tensor parallelism.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class LocalShard(NamedTuple):
    """A box of a tensor: `whole[offset[0] : offset[0] + local.shape[0], ...]`."""

    local: Tensor
    """Plain, in the memory of the parameter: writing into it is writing into the parameter."""

    offset: tuple[int, ...]
    """Of its first element in the whole; of an empty part it means nothing."""

    shape: tuple[int, ...]
    """Of the whole."""


def local_shard(parameter: Tensor) -> LocalShard:
    """What this rank holds of a plain tensor (all of it) or of a DTensor, however it is sharded: unevenly, or twice along a dimension."""
    if not isinstance(parameter, DTensor):
        return LocalShard(parameter.detach(), (0,) * parameter.ndim, tuple(parameter.shape))
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = cast(DTensor, parameter.detach()).to_local()
    if tuple(local.shape) != tuple(shape):
        raise ValueError(
            f"a part of shape {tuple(local.shape)} is where {parameter.placements} of {tuple(parameter.shape)} puts {shape}"
        )
    return LocalShard(local, tuple(offset), tuple(parameter.shape))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
