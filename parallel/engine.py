"""The interface between the training loop and whatever holds the model: the loop never asks which engine it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

State = dict[str, dict[str, Tensor | dict[str, Tensor]]]
"""{"model": {name: tensor}, "optimizer": {name: {slot: tensor}}}, by canonical parameter names, in global shapes."""


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one forward and backward pass, each tensor [b, S]; labels of -100 are no targets."""

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    """Stays on the host, as `document_ids`: the mask that is made of both reads their values, and a GPU would have to wait."""
    document_ids: Tensor
    n_targets: int
    """Labels that count, known on the host so that nobody waits for the device to count them."""


class LossSum(Protocol):
    """Sums over the targets of a microbatch, fp32 scalars: what is minimised, and its two parts, detached."""

    @property
    def total(self) -> Tensor:
        """cross_entropy + z_loss, to be differentiated."""

    @property
    def cross_entropy(self) -> Tensor:
        """Negative log-likelihood in nats."""

    @property
    def z_loss(self) -> Tensor:
        """The z-loss with its weight; 0 without one."""


@dataclass(frozen=True)
class StepResult:
    """What a step was, per target token of the global batch; the gradient norm is the one before clipping."""

    loss: float
    z_loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """False once something overflowed; the engine has then left the weights as they were."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Optimizer(Protocol):
    """What an engine needs of an optimizer over the fp32 master weights."""

    def set_lr(self, scale: float) -> None:
        """Learning rate of the next step, as a fraction of the peak."""

    def step(self) -> None:
        """Update the weights from their gradients."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Per parameter name, the tensors that a resumed run needs."""


ComputeLoss = Callable[[nn.Module, Microbatch], LossSum]
BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]


class Engine(Protocol):
    """A model and its optimizer on their devices."""

    def train_step(self, microbatches: Sequence[Microbatch], lr_scale: float) -> StepResult:
        """One optimizer step over the global batch, given in microbatches."""

    def eval_step(self, microbatch: Microbatch) -> tuple[float, int]:
        """(sum of the cross-entropy in nats, number of targets), weights untouched."""

    def state(self) -> State:
        """Live tensors of everything a checkpoint holds: writing into them is loading, followed by `loaded`."""

    def loaded(self) -> None:
        """Say that the tensors of `state()` were written into."""
