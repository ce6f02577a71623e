"""The interface between the training loop and whatever holds the model: the loop never asks which engine it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

State = dict[str, dict[str, Tensor | dict[str, Tensor]]]
"""{"model": {name: tensor}, "optimizer": {name: {slot: tensor}}}, by canonical parameter names, in global shapes."""


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one forward and backward pass; labels of -100 are no targets."""

    input_ids: Tensor
    """[b, S], as `labels`; S are the tokens of `local_tokens` where there is one."""
    labels: Tensor
    positions: Tensor
    """[b, row], whole rows on the host, as `document_ids`: the mask made of both reads their values, and a GPU would have to wait."""
    document_ids: Tensor
    n_targets: int
    """Labels of the whole rows that count, known on the host so that nobody waits for the device to count them."""
    local_tokens: LocalTokens | None = None
    """Set by the engine under context parallelism."""


@dataclass(frozen=True)
class LocalTokens:
    """Under context parallelism: which tokens of each row a rank holds."""

    ranges: tuple[tuple[int, int], ...]
    """(first, end) in the row, in the order in which the rank holds them."""
    full_rows: bool
    """True if attention sees whole rows of some heads; False if the held queries see all keys of the row."""


class MicrobatchLoss(Protocol):
    """Sums over the targets of a microbatch, scalars: what is minimised, fp32, and its two parts, fp64, detached."""

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
    stop_requested: bool = False
    """Whether any rank's `asks` said so."""

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


ForwardStep = Callable[[nn.Module, Tensor | None, Microbatch], "Tensor | MicrobatchLoss"]
"""One part of the model over one microbatch: what the part before sent (None: this is the first, which reads `input_ids`) -> what the
next part needs, or the loss if this is the last."""

BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]


class ModelChunk(Protocol):
    """Consecutive layers of a model, an `nn.Module`: what they say of themselves, so that they can be split."""

    @property
    def tp_plan(self) -> Mapping[str, str]:
        """How tensor parallelism may split each module of the whole model, by patterns of names; `parallel.tensor` knows the words."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks that are here, in order: what is recomputed as one."""

    @property
    def fsdp_units(self) -> Sequence[nn.Module]:
        """Modules whose parameters are used at one time, in the order of their use: what is gathered as one."""

    @property
    def tied_parameter(self) -> str | None:
        """Canonical name of the parameter that the first and the last part share, or None."""

    def compile_submodules(self) -> None:
        """torch.compile what repeats. Before anything is split: compilation itself waits for the first pass."""


@dataclass(frozen=True)
class ModelSpec:
    """What an engine makes a model of."""

    n_layers: int
    d_model: int
    """Of what one block hands to the next."""
    build: Callable[[range], nn.Module]
    """These layers as a `ModelChunk` without values, on the device of the `torch.device` context; `range(n_layers)` is the whole model."""
    init_shard: Callable[[str, Tensor, tuple[int, ...], tuple[int, ...]], None]
    """(canonical name, this rank's tensor, its offset in the whole parameter, the whole parameter's shape): writes its initial values."""
    forward_step: ForwardStep
    build_optimizer: BuildOptimizer
    first_cost: float = 0.0
    """What comes before the first layer, and after the last one, in time of a layer: stages of a pipeline are balanced by it."""
    last_cost: float = 0.0


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes."""

    dtype: torch.dtype
    """Of the forward and backward pass; masters, sums of gradients and optimizer state are fp32."""
    max_grad_norm: float | None
    """Largest global gradient norm."""
    compile: bool = False
    recompute: str = "none"
    """`none`, `full` or `selective`, in every `recompute_every`-th block; see `parallel.recompute`."""
    recompute_every: int = 1
    recompute_keep: tuple[str, ...] = ()


class Engine(Protocol):
    """A model and its optimizer on their devices."""

    def train_step(
        self, microbatches: Sequence[Microbatch], lr_scale: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> StepResult:
        """One optimizer step over the global batch, of which each data rank gives its own microbatches, all ranks equally many.

        What one rank `asks` for at the end of its passes, all hear of in the result: a request to stop travels with the sums of the step.
        """

    def eval_step(self, microbatches: Sequence[Microbatch]) -> tuple[float, int]:
        """(sum of the cross-entropy in nats, number of targets) over the microbatches of all data ranks, weights untouched."""

    def state(self) -> State:
        """Live tensors of everything a checkpoint holds: writing into them is loading, followed by `sync_compute_weights`."""

    def sync_compute_weights(self) -> None:
        """Say that the tensors of `state()` were written into."""
