"""The backward pass in two, as zero bubble wants it (arXiv:2401.10241): gradients of what came in now, of weights in a pass of their own.

Of a block's backward pass the products that make the gradients of weights are half, and nobody waits for them. Here a linear layer's
backward pass makes the gradient of its input, and sets aside what the other product is made of. Norms, biases and attention, which cost
little or cannot be split, are not. PyTorch's pipelines can split any graph, but not one that is compiled, recomputed, or whose weights
FSDP2 frees in between.

Set aside are a layer's input, kept or recomputed, and the gradient of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.fsdp import fsdp_param_groups


class ZeroBubbleBackward:
    """The weights' part of the backward passes of one stage."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Has the linear layers of the blocks set their products aside, in place; what splits them may make subclasses of their class."""
        self._aside: list[_Product] = []
        for block in blocks:
            for layer in block.modules():
                if type(layer) is nn.Linear:
                    layer.__class__ = _Linear
                    cast(_Linear, layer).aside = self._aside

    def begin(self) -> None:
        """Before a step: nothing is set aside, whatever became of the last one."""
        self._aside.clear()

    def take(self, stage: nn.Module) -> Callable[[], None]:
        """What adds the gradients of weights of the microbatch whose backward pass just ended.

        stage: an FSDP module, which is to add them up in the type that it reduces them in.
        """
        products, self._aside[:] = list(self._aside), []

        def add() -> None:
            while products:  # what a product is made of is freed with it
                products.pop().add()
            _sum_as_reduced(stage)

        return add


class _Product(NamedTuple):
    """What the gradient of a layer's weight is made of."""

    weight_OI: Tensor
    x: Tensor
    grad_y: Tensor

    def add(self) -> None:
        grad_OI = self.grad_y.flatten(0, -2).T @ self.x.flatten(0, -2)
        torch.autograd.backward(
            self.weight_OI, grad_OI
        )  # to where the parameter lies, if this is a tensor rank's part of it


class _Linear(nn.Linear):
    """A linear layer, y = x W' + b, whose weight has its gradient later. Its name, state and numbers are those of nn.Linear."""

    aside: list[_Product]

    # What is set aside has to outlive the compiled pass, which would write over it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        y: Tensor = _LinearOfInput.apply(x, self)  # type: ignore[no-untyped-call]  # torch does not type apply()
        return y if self.bias is None else y + self.bias


class _LinearOfInput(torch.autograd.Function):
    """x W' as a function of x alone: its backward pass sets the other product aside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Linear) -> Tensor:  # Any: torch's context takes any attribute
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:  # Any: as above
        (x,) = ctx.saved_tensors
        layer: _Linear = ctx.layer
        with torch.enable_grad():  # read now: FSDP2 has the whole parameter here, and later maybe not
            weight_OI = layer.weight
        layer.aside.append(_Product(weight_OI, x, grad_y))
        return grad_y @ weight_OI.detach(), None


def _sum_as_reduced(stage: nn.Module) -> None:
    """Have FSDP2 add new gradients, which are of the weights' type, to its sums. It does so after a backward pass of its own."""
    for group in fsdp_param_groups(stage) if isinstance(stage, FSDPModule) else ():
        group.post_backward()
