"""Collectives that autograd and the compiler see through, alike on gloo and NCCL. Knows tensors and process groups, nothing else.

They stand on PyTorch's functional collectives, which do not write into their arguments: a compiled block keeps its one graph, selective
recomputation can keep their results, and a fake process group gives their shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The parts of all ranks, laid end to end along `dim` in rank order; the gradient of a part is summed over the ranks.

    All ranks give the same shape.
    """
    out: Tensor = _AllGather.apply(x, group.group_name, group.size(), dim % x.ndim)  # type: ignore[no-untyped-call]  # untyped in torch
    return out


def all_to_all(x: Tensor, group: ProcessGroup, split_dim: int, concat_dim: int) -> Tensor:
    """Rank r gets the r-th part along `split_dim` of every rank's x, laid end to end along `concat_dim` in rank order (all-to-all).

    The gradient goes back the same way. Raises ValueError unless the group's size divides `split_dim`.
    """
    if x.shape[split_dim] % group.size():
        raise ValueError(
            f"{x.shape[split_dim]} parts along dimension {split_dim} cannot be shared out to {group.size()} ranks"
        )
    name, size = group.group_name, group.size()
    out: Tensor = _AllToAll.apply(x, name, size, split_dim % x.ndim, concat_dim % x.ndim)  # type: ignore[no-untyped-call]  # as above
    return out


class _AllGather(torch.autograd.Function):
    """All-gather, and reduce-scatter for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group_name: str, size: int, dim: int
    ) -> Tensor:  # Any: torch's context takes any attribute
        ctx.where = group_name, size, dim
        parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group_name)
        return _join(_wait(parts), size, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # Any: as above
        group_name, size, dim = ctx.where
        # Ranks along the first dimension: the only one that backends scatter, from memory without gaps.
        parts = _split(grad, size, dim).flatten(0, 1)
        mine = torch.ops._c10d_functional.reduce_scatter_tensor(parts, "sum", size, group_name)
        return _wait(mine), None, None, None


class _AllToAll(torch.autograd.Function):
    """All-to-all; its gradient is the all-to-all with the dimensions the other way round."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group_name: str, size: int, split_dim: int, concat_dim: int
    ) -> Tensor:  # Any: as above
        ctx.where = group_name, size, split_dim, concat_dim
        return _all_to_all_single(x, group_name, size, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # Any: as above
        group_name, size, split_dim, concat_dim = ctx.where
        return _all_to_all_single(grad, group_name, size, concat_dim, split_dim), None, None, None, None


def _all_to_all_single(x: Tensor, group_name: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
    parts = _split(x, size, split_dim).flatten(0, 1)
    rows = [len(parts) // size] * size
    return _join(_wait(torch.ops._c10d_functional.all_to_all_single(parts, rows, rows, group_name)), size, concat_dim)


def _split(x: Tensor, size: int, dim: int) -> Tensor:
    """[size, ...]: the parts along `dim`, one after the other in memory."""
    return torch.unflatten(x, dim, (size, -1)).movedim(dim, 0).contiguous()


def _join(parts: Tensor, size: int, dim: int) -> Tensor:
    """The inverse of `_split`, for parts that lie one after the other along the first dimension."""
    return torch.unflatten(parts, 0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def _wait(x: Tensor) -> Tensor:
    """What a functional collective returned, once it may be read: on CUDA the stream waits, not the host."""
    out: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return out
