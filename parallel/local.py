"""This rank's shard of a tensor, and where it lies in the full tensor."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.torch_compat import local_shape_and_offset


class LocalShard(NamedTuple):
    """A box of a tensor: `full[offset[0] : offset[0] + local.shape[0], ...]`."""

    local: Tensor
    """A plain tensor in the memory of the parameter: writing into it writes into the parameter."""

    offset: tuple[int, ...]
    """Index of its first element in the full tensor. Meaningless if the shard is empty."""

    shape: tuple[int, ...]
    """Of the full tensor."""


def local_shard(parameter: Tensor) -> LocalShard:
    """This rank's shard of a DTensor, even if sharded unevenly or twice along a dimension. All of a plain tensor.

    Raises:
        ValueError: the DTensor's local tensor has not the shape that its placements give.
    """
    if not isinstance(parameter, DTensor):
        return LocalShard(parameter.detach(), (0,) * parameter.ndim, tuple(parameter.shape))
    shape, offset = local_shape_and_offset(parameter)
    local = cast(DTensor, parameter.detach()).to_local()
    if tuple(local.shape) != shape:
        raise ValueError(
            f"the local shard has shape {tuple(local.shape)}, but {parameter.placements} of {tuple(parameter.shape)} "
            f"gives {shape}"
        )
    return LocalShard(local, offset, tuple(parameter.shape))


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
