"""The interface between the training loop and an engine, which holds the model. The loop uses nothing else of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from parallel.layout import Layout
from parallel.pipeline.schedule import LayerCosts

State = dict[str, dict[str, Tensor | dict[str, Tensor]]]
"""{"model": {name: tensor}, "optimizer": {name: {slot: tensor}}}, by canonical parameter names, in global shapes."""


@dataclass(frozen=True)
class Microbatch:
    """The sequences of one forward and backward pass. A label of -100 is not a target."""

    input_ids: Tensor
    """[b, S], as `labels`. Under context parallelism S counts the tokens of this rank, see `local_tokens`."""
    labels: Tensor
    positions: Tensor
    """[b, row], as `document_ids`: full rows, on the host: the attention mask reads their values."""
    document_ids: Tensor
    n_targets: int
    """Number of targets in the full rows. Counted on the host, so that nobody waits for the device."""
    local_tokens: LocalTokens | None = None
    """Set by the engine under context parallelism."""
    row_ids: Tensor | None = None
    """[b] int64, on the host: index of each row's first sample in the run, -1 for rows that only fill up the
    microbatch. None: all rows count."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the full rows, without padding rows."""
        n_rows = len(self.document_ids) if self.row_ids is None else int((self.row_ids >= 0).sum())
        return n_rows * self.document_ids.shape[-1]


@dataclass(frozen=True)
class LocalTokens:
    """The tokens of each row that a rank holds under context parallelism."""

    ranges: tuple[tuple[int, int], ...]
    """(first, end) in the row, in the order in which the rank holds them."""
    full_rows: bool
    """True if attention sees full rows of some heads; False if this rank's queries see all keys of the row."""


class MicrobatchLoss(Protocol):
    """Sums over the targets of a microbatch, scalars: the loss in fp32, and its two terms in fp64, detached."""

    @property
    def total(self) -> Tensor:
        """cross_entropy + z_loss, to be differentiated."""

    @property
    def cross_entropy(self) -> Tensor:
        """Negative log-likelihood in nats."""

    @property
    def z_loss(self) -> Tensor:
        """The weighted z-loss; 0 without one."""


@dataclass(frozen=True)
class StepResult:
    """The result of a training step. Losses are averages over the targets of the global batch."""

    loss: float
    z_loss: float
    grad_norm: float
    """Before clipping."""
    stop_requested: bool = False
    """Whether any rank requested a stop."""
    routing: Tensor | None = None
    """[n_layers, ModelSpec.routing_width], fp64 on the host: what the `RoutedLayer`s counted over the global batch,
    divided by nothing. None without routed layers."""
    n_tokens: int = 0
    """Tokens of the global batch."""

    @property
    def is_finite(self) -> bool:
        """False if something overflowed. The engine has then left the weights unchanged."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class EvalResult(NamedTuple):
    """The result of an evaluation step, over all data ranks."""

    loss_sum: float
    """Summed cross-entropy in nats."""
    n_targets: int
    routing: Tensor | None = None
    """As in `StepResult`."""


@runtime_checkable
class RoutedLayer(Protocol):
    """A module that sends tokens to experts, counts its decisions, and balances the load once a step."""

    layer: int
    """Number of its layer in the model."""

    @property
    def saved_buffers(self) -> Mapping[str, Tensor]:
        """{name: tensor} that checkpoints hold. The same on every rank."""

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """Replace its buffers by new ones with initial values, on `device`; None keeps the device."""

    def begin_step(self, token_scale: Tensor) -> None:
        """Prepare the passes of a training step; `token_scale` is 1 / tokens of the global batch."""

    def take_sums(self) -> Tensor:
        """What it counted since the last call, over this rank's tokens: fp64 [ModelSpec.routing_width]."""

    def end_step(self, sums: Tensor) -> None:
        """Balance the load by what all ranks counted in a step."""


class Optimizer(Protocol):
    """An optimizer over the fp32 master weights."""

    def set_lr(self, scale: float) -> None:
        """Set the learning rate of the next step, as a fraction of the peak."""

    def step(self) -> None:
        """Update the weights from their gradients."""

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that a resumed run needs, by parameter name."""


ForwardStep = Callable[[nn.Module, Tensor | None, Microbatch], "Tensor | MicrobatchLoss"]
"""Run a model chunk: (chunk, activations of the chunk before, microbatch) -> activations, or the loss.

The first chunk gets None and reads `input_ids`. The last chunk returns the loss."""

BuildOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
"""Build an optimizer over named master weights."""


class ModelChunk(Protocol):
    """Consecutive layers of a model: an `nn.Module` that says how it can be parallelized."""

    @property
    def tp_plan(self) -> Mapping[str, str]:
        """Tensor parallelism of the full model: module-name pattern -> a style of `parallel.tensor`."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks of this chunk, in order. Recomputation works on blocks."""

    @property
    def fsdp_units(self) -> Sequence[nn.Module]:
        """Modules whose parameters FSDP gathers together, in the order of their use."""

    @property
    def tied_parameter(self) -> str | None:
        """Canonical name of the parameter that the first and the last chunk share, or None."""

    def compile_submodules(self) -> None:
        """torch.compile the repeated submodules. Call it before the chunk is parallelized: the first pass compiles."""


@dataclass(frozen=True)
class ModelSpec:
    """What an engine needs to build and run a model."""

    costs: LayerCosts
    """Of its layers and ends. Pipeline stages are balanced with it."""
    d_model: int
    """Width of the activations between two blocks."""
    build: Callable[[range], nn.Module]
    """Build these layers as a `ModelChunk` without values, on the current `torch.device`. `range(n_layers)` is all."""
    init_shard: Callable[[str, Tensor, tuple[int, ...], tuple[int, ...]], None]
    """Write initial values: (canonical name, this rank's shard, its offset in the full parameter, the full shape)."""
    forward_step: ForwardStep
    build_optimizer: BuildOptimizer
    routing_width: int = 0
    """Numbers that each `RoutedLayer` counts; 0 without such layers."""

    @property
    def n_layers(self) -> int:
        """Of the full model."""
        return len(self.costs.layers)


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes."""

    dtype: torch.dtype
    """Of the forward and backward pass. Master weights, gradient sums and optimizer state are fp32."""
    max_grad_norm: float | None
    """Gradients are clipped to this global norm; None does not clip."""
    compile: bool = False
    recompute: str = "none"
    """`none`, `full` or `selective`, in every `recompute_every`-th block; see `parallel.recompute`."""
    recompute_every: int = 1
    recompute_keep: tuple[str, ...] = ()


class Engine(Protocol):
    """A model and its optimizer on their devices."""

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        lr_scale: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Take one optimizer step over the global batch.

        Args:
            microbatches: of this data rank. All ranks pass the same number.
            lr_scale: learning rate, as a fraction of the peak.
            stop_requested: asked after the backward passes. If it is true on any rank, every rank's result says so.
        """

    def eval_step(self, microbatches: Sequence[Microbatch]) -> EvalResult:
        """Evaluate the microbatches of all data ranks. Changes no weight."""

    def state(self) -> State:
        """The live tensors that a checkpoint holds. To load one, write into them, then call `sync_compute_weights`."""

    def sync_compute_weights(self) -> None:
        """Copy the master weights to the weights that the passes compute with. Call it after writing into `state()`."""


class InspectableEngine(Engine, Protocol):
    """An engine on torch modules. Memory trackers and tests look into it; the training loop does not."""

    @property
    def layout(self) -> Layout:
        """The layout that the engine was built for."""

    @property
    def model_chunks(self) -> Sequence[nn.Module]:
        """The chunks of the model on this rank."""

    @property
    def master_weights(self) -> Mapping[str, nn.Parameter]:
        """This rank's fp32 master weights by canonical name; DTensors if they are sharded."""
