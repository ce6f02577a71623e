"""The split backward pass of zero bubble (arXiv:2401.10241): gradients of activations now, gradients of weights later.

The matrix products for the weights' gradients are half of a block's backward pass, and no other rank waits for them.
So a linear layer's backward pass here computes the gradient of its input, and defers the product for its weight. What
is deferred keeps the layer's input, saved or recomputed, and the gradient of its output. Norms, biases and attention
are not split: they cost little or cannot be.

PyTorch's pipelines can split any graph, but not a compiled or recomputed one, nor one whose weights FSDP2 frees in
between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.torch_compat import fsdp_param_groups


class ZeroBubbleBackward:
    """The deferred weight gradients of one stage."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Make the linear layers of the blocks defer their weight gradients, in place.

        Comes before tensor parallelism, which makes subclasses of the class of a layer.
        """
        self._deferred: list[_WeightGradient] = []
        for block in blocks:
            for layer in block.modules():
                if type(layer) is nn.Linear:
                    layer.__class__ = _DeferringLinear
                    cast(_DeferringLinear, layer).deferred = self._deferred

    def begin_step(self) -> None:
        """Drop what an interrupted step may have left."""
        self._deferred.clear()

    def take_weight_gradients(self, stage: nn.Module) -> Callable[[], None]:
        """Take the deferred gradients of the microbatch whose backward pass just ended.

        Args:
            stage: the module of the stage. If it is an FSDP module, it sums up gradients in its reduction dtype.

        Returns:
            A function that computes the gradients and adds them.
        """
        weight_gradients, self._deferred[:] = list(self._deferred), []

        def add() -> None:
            while weight_gradients:  # pop() frees the inputs of each product
                weight_gradients.pop().add()
            _accumulate_in_reduction_dtype(stage)

        return add


class _WeightGradient(NamedTuple):
    """The inputs of the product that gives the gradient of a layer's weight. O outputs, I inputs of the layer."""

    weight_OI: Tensor
    x: Tensor
    grad_y: Tensor

    def add(self) -> None:
        grad_OI = self.grad_y.flatten(0, -2).T @ self.x.flatten(0, -2)
        # `weight_OI` may be a tensor rank's view: backward() finds the parameter behind it.
        torch.autograd.backward(self.weight_OI, grad_OI)


class _DeferringLinear(nn.Linear):
    """A linear layer, y = x W' + b, that defers the gradient of its weight. Otherwise the same as nn.Linear."""

    deferred: list[_WeightGradient]

    # Not compiled: compiled code would reuse the memory of the deferred tensors.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        y: Tensor = _DeferringProduct.apply(x, self)  # type: ignore[no-untyped-call]  # torch does not type apply()
        return y if self.bias is None else y + self.bias


class _DeferringProduct(torch.autograd.Function):
    """x W' as a function of x only. Its backward pass defers the gradient of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _DeferringLinear) -> Tensor:  # Any: torch's context takes any attribute
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:  # Any: as above
        (x,) = ctx.saved_tensors
        layer: _DeferringLinear = ctx.layer
        # Read the weight now: FSDP2 has gathered it here, and may have freed it later.
        with torch.enable_grad():
            weight_OI = layer.weight
        layer.deferred.append(_WeightGradient(weight_OI, x, grad_y))
        return grad_y @ weight_OI.detach(), None


def _accumulate_in_reduction_dtype(stage: nn.Module) -> None:
    """Make FSDP2 add the new gradients to its sums, as it does after a backward pass of its own."""
    for group in fsdp_param_groups(stage) if isinstance(stage, FSDPModule) else ():
        group.post_backward()
