"""The global gradient norm over parameters on any meshes, and clipping by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.layout import Layout
from parallel.local import local

_CPU_PIECE = 2**18  # numbers: an fp64 copy of 2 MB stays in the cache, and 8 threads have enough to share


def local_squared_norm(
    master_weights: Mapping[str, nn.Parameter], layout: Layout, n_copies: Callable[[str], int]
) -> Tensor:
    """This rank's share of the squared norm of all gradients, fp64: summed over all ranks it is the whole.

    Where k ranks hold the same numbers each contributes a k-th of their squares, so that one sum over the world is right for parameters
    that are divided over different axes. `n_copies`: stages that hold a parameter of that name.
    """
    by_holders: dict[int, list[Tensor]] = {}
    for name, master in master_weights.items():
        if master.grad is not None:
            by_holders.setdefault(_holders(master, layout) * n_copies(name), []).extend(_pieces(local(master.grad)))
    shares = []
    for holders, gradients in by_holders.items():
        # No public name; a loop does the same, slower. It has to be told to add up in fp64: a CPU adds fp32 numbers one after the other,
        # and then 10M of them give a norm that is 0.03% too small, 270M one that is 3.7% too small (pytorch#68326). On CUDA these are two
        # kernels for some hundred tensors, which convert what they read and wait for nobody.
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
        shares.append(norms.square().sum() / holders)
    return torch.stack(shares).sum()


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """A CPU makes an fp64 copy of each tensor whose norm it takes: small ones cost no memory, and a sixth of the time."""
    return torch.split(gradient.flatten(), _CPU_PIECE) if gradient.device.type == "cpu" else (gradient,)


def _holders(parameter: Tensor, layout: Layout) -> int:
    """Ranks of a stage that hold the same part of a parameter."""
    holders = layout.world_size // layout.pipeline
    if isinstance(parameter, DTensor):
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            holders //= 1 if placement.is_replicate() else size
    return holders


def clip_gradients_(master_weights: Iterable[nn.Parameter], largest: float, norm: float) -> None:
    """Scale all gradients in place so that their global norm, which is `norm`, is at most `largest`."""
    if norm > largest:
        gradients = [local(master.grad) for master in master_weights if master.grad is not None]
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))  # no public name; as clip_grad_norm_ does it
