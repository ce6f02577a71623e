"""Muon for stacked experts [E, rows, columns]: each expert's matrices are orthogonalized one by one, all in one batch.

`torch.optim.Muon` takes matrices only. This is the same optimizer (https://kellerjordan.github.io/posts/muon/,
arXiv:2502.16982) for a stack of them, with the same state, so that a dense and a mixture-of-experts layer are trained
alike.
Shape suffixes: E experts of this rank, H rows of one expert, D columns; N matrices [R, D], R rows each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.optim import Optimizer

from parallel.local import to_local

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the Newton-Schulz step a X + b (X X') X + c (X X')^2 X, from Keller Jordan's post."""
STEPS = 5
SMALLEST_NORM = 1e-7


class StackedMuon(Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay over stacks of matrices.

    Groups carry `matrices_per_expert`, as `pretrain.model.spec.OptimizerGroup` says it. A parameter without gradient
    keeps its value and its state. Sharded experts need no communication. If several ranks hold parts of one expert,
    they gather its update in fp32, and each orthogonalizes the full matrices.
    """

    def __init__(self, groups: list[dict[str, object]], momentum: float) -> None:
        """Make the optimizer.

        Args:
            groups: each with `params` [E, H, D], `lr`, `weight_decay` and `matrices_per_expert`, which divides H.
            momentum: of the moving average of gradients.
        """
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, float]) -> None:
        weight_EHD, gradient_EHD = to_local(parameter), to_local(cast(Tensor, parameter.grad))
        average_EHD = to_local(self.state[parameter]["momentum_buffer"])
        average_EHD.lerp_(gradient_EHD, 1 - group["momentum"])
        update_EHD = gradient_EHD.lerp(average_EHD, group["momentum"])

        n_matrices = int(group["matrices_per_expert"])
        if isinstance(parameter, DTensor):
            update_EHD = _on_full_matrices(update_EHD, parameter, n_matrices)
        else:
            update_EHD = _orthogonalize_experts(update_EHD, n_matrices)
        rows, columns = parameter.shape[1] // n_matrices, parameter.shape[2]
        weight_EHD.mul_(1 - group["lr"] * group["weight_decay"])
        weight_EHD.add_(update_EHD, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


def _on_full_matrices(update_EHD: Tensor, parameter: DTensor, n_matrices: int) -> Tensor:
    """Orthogonalize a rank's shard of an update, placed as `parameter` is.

    Ranks that hold parts of the same experts gather these. Along dimension 0 everything stays where it is.
    """
    placements = list(parameter.placements)
    # Not isinstance(..., Shard): the placements that FSDP2 makes over expert parallelism are of another class.
    whole_experts = [at if getattr(at, "dim", 0) == 0 else Replicate() for at in placements]
    if whole_experts == placements:
        return _orthogonalize_experts(update_EHD, n_matrices)

    def placed(local: Tensor, at: list[Placement]) -> DTensor:
        mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
        return DTensor.from_local(local, mesh, at, run_check=False, shape=shape, stride=stride)

    full = placed(update_EHD, placements).redistribute(placements=whole_experts).to_local()
    done = placed(_orthogonalize_experts(full, n_matrices), whole_experts)
    return done.redistribute(placements=placements).to_local()


def _orthogonalize_experts(update_EHD: Tensor, n_matrices: int) -> Tensor:
    """Orthogonalize each of the `n_matrices` that lie below one another in the rows of each expert."""
    if update_EHD.numel() == 0:
        return update_EHD
    n_experts, rows, columns = update_EHD.shape
    update_NRD = update_EHD.reshape(n_experts * n_matrices, rows // n_matrices, columns)
    return orthogonalize(update_NRD).reshape(update_EHD.shape)


def orthogonalize(x_NRD: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1, by five quintic Newton-Schulz steps in bf16.

    Args:
        x_NRD: N matrices of any dtype.

    Returns:
        The matrices in bf16; singular values lie in about [0.7, 1.2].
    """
    is_tall = x_NRD.shape[1] > x_NRD.shape[2]
    y_NRD = x_NRD.bfloat16()
    if is_tall:  # the smaller Gram matrix
        y_NRD = y_NRD.mT
    # The Frobenius norm bounds the largest singular value: it is at most 1 before the first step.
    y_NRD = y_NRD / torch.linalg.vector_norm(y_NRD, dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(STEPS):
        gram_NRR = y_NRD @ y_NRD.mT
        polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=B, alpha=C)
        y_NRD = torch.baddbmm(y_NRD, polynomial_NRR, y_NRD, beta=A)
    return y_NRD.mT if is_tall else y_NRD
