"""Collectives that autograd and the compiler can trace, on gloo and NCCL. Knows tensors and process groups only.

They use PyTorch's functional collectives, which do not write into their arguments. So a compiled block stays one graph,
selective recomputation can keep their results, and a fake process group gives results of the right shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.torch_compat import all_gather_tensor, all_to_all_tensor, reduce_scatter_tensor


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Concatenate the tensors of all ranks along `dim`, in rank order. All ranks pass the same shape.

    The gradient is summed over the ranks and scattered.
    """
    name, size = group.group_name, group.size()
    out: Tensor = _AllGather.apply(x, name, size, dim % x.ndim)  # type: ignore[no-untyped-call]  # untyped in torch
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Sum over the ranks, and keep this rank's part along `dim`. All ranks pass the same shape.

    The gradients of the parts are concatenated. The group's size must divide `dim`.
    """
    name, size = group.group_name, group.size()
    out: Tensor = _ReduceScatter.apply(x, name, size, dim % x.ndim)  # type: ignore[no-untyped-call]  # untyped in torch
    return out


def all_to_all(x: Tensor, group: ProcessGroup, split_dim: int, concat_dim: int) -> Tensor:
    """Split x along `split_dim`, send part r to rank r, and concatenate what arrives along `concat_dim`, in rank order.

    The gradient takes the way back.

    Raises:
        ValueError: the group's size does not divide `split_dim`.
    """
    if x.shape[split_dim] % group.size():
        raise ValueError(
            f"{x.shape[split_dim]} parts along dimension {split_dim} cannot be shared out to {group.size()} ranks"
        )
    name, size, dims = group.group_name, group.size(), (split_dim % x.ndim, concat_dim % x.ndim)
    out: Tensor = _AllToAll.apply(x, name, size, *dims)  # type: ignore[no-untyped-call]  # untyped in torch
    return out


class _AllGather(torch.autograd.Function):
    """All-gather. The backward pass is a reduce-scatter."""

    # Any: torch's context takes any attribute.
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int, dim: int) -> Tensor:
        ctx.arguments = group_name, size, dim
        return _join(all_gather_tensor(x.contiguous(), size, group_name), size, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # Any: as above
        group_name, size, dim = ctx.arguments
        # Backends scatter along the first dimension only, and from contiguous memory.
        parts = _split(grad, size, dim).flatten(0, 1)
        return reduce_scatter_tensor(parts, size, group_name), None, None, None


class _ReduceScatter(torch.autograd.Function):
    """Reduce-scatter. The backward pass is an all-gather."""

    # Any: as above.
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int, dim: int) -> Tensor:
        ctx.arguments = group_name, size, dim
        return reduce_scatter_tensor(_split(x, size, dim).flatten(0, 1), size, group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # Any: as above
        group_name, size, dim = ctx.arguments
        return _join(all_gather_tensor(grad.contiguous(), size, group_name), size, dim), None, None, None


class _AllToAll(torch.autograd.Function):
    """All-to-all. The backward pass is the all-to-all with the two dimensions exchanged."""

    # Any: as above.
    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
        ctx.arguments = group_name, size, split_dim, concat_dim
        return _all_to_all(x, group_name, size, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # Any: as above
        group_name, size, split_dim, concat_dim = ctx.arguments
        return _all_to_all(grad, group_name, size, concat_dim, split_dim), None, None, None, None


def _all_to_all(x: Tensor, group_name: str, size: int, split_dim: int, concat_dim: int) -> Tensor:
    parts = _split(x, size, split_dim).flatten(0, 1)
    return _join(all_to_all_tensor(parts, size, group_name), size, concat_dim)


def _split(x: Tensor, size: int, dim: int) -> Tensor:
    """[size, ...]: the parts along `dim`, each contiguous."""
    return torch.unflatten(x, dim, (size, -1)).movedim(dim, 0).contiguous()


def _join(parts: Tensor, size: int, dim: int) -> Tensor:
    """Undo `_split` for parts that are concatenated along the first dimension."""
    return torch.unflatten(parts, 0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)
