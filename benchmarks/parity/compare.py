"""Train a case on a layout and on one process, and compare the two runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.parity.cases import BATCH_SIZE, MAX_GRAD_NORM, MODEL, SEQ_LEN, VOCAB_SIZE, Case
from data_pipeline.reading.packing import Batch
from parallel.engine import BuildOptimizer, Microbatch, Optimizer
from parallel.engines.torch.build import build_engine
from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.model.moe.router import N_SUMS
from pretrain.setup.engine import build_engine_options, build_model_spec
from pretrain.train.batching import split_microbatches, to_host

CPU = torch.device("cpu")


@dataclass
class TrainingTrace:
    """What some steps of training produced on one rank."""

    losses: list[float]
    grad_norms: list[float]
    """Global gradient norm of each step, before clipping."""
    gradients: list[dict[str, Tensor]]
    """Clipped gradients of each step: full tensors by canonical name."""
    parameters: dict[str, Tensor]
    """Full tensors after the last step, by canonical name: parameters, and what routers remember (biases, load)."""
    routing: list[Tensor] = field(default_factory=list)
    """What routers counted in each step, [n_layers, E + N_SUMS]; empty for a dense model."""


def make_config(settings: Iterable[str]) -> RunConfig:
    """Return the config of `MODEL` with more `key=value` settings."""
    return load(None, [*MODEL, *settings]).config


def make_batch(step: int) -> Batch:
    """Return a global batch of packed documents, another one for each step.

    Each row has between 1 and all of its labels.
    """
    random = np.random.default_rng(step)
    ids = random.integers(VOCAB_SIZE, size=(BATCH_SIZE, SEQ_LEN + 1), dtype=np.int32)
    document_ids = (random.random((BATCH_SIZE, SEQ_LEN)) < 1 / 16).cumsum(1, dtype=np.int32)
    ends = np.diff(document_ids, axis=1, append=-1) != 0
    has_label = np.arange(SEQ_LEN) < random.integers(1, SEQ_LEN + 1, size=(BATCH_SIZE, 1))
    labels = np.where(ends | ~has_label, -100, ids[:, 1:]).astype(np.int32)
    return Batch(ids[:, :-1], labels, document_ids, row_ids=step * BATCH_SIZE + np.arange(BATCH_SIZE))


def microbatches_of_rank(batch: Batch, data_rank: int, n_data_ranks: int, size: int) -> list[Microbatch]:
    """Return one data rank's rows of a global batch, `size` sequences a microbatch."""
    rows = slice(data_rank * BATCH_SIZE // n_data_ranks, (data_rank + 1) * BATCH_SIZE // n_data_ranks)
    assert batch.row_ids is not None
    shard = Batch(batch.input_ids[rows], batch.labels[rows], batch.document_ids[rows], row_ids=batch.row_ids[rows])
    return list(split_microbatches(to_host(shard, CPU), size, CPU))


@dataclass
class GradientRecorder:
    """An optimizer that keeps a copy of the gradients of each step."""

    inner: Optimizer
    parameters: Mapping[str, nn.Parameter]
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def set_lr(self, scale: float) -> None:
        """Forward to the inner optimizer."""
        self.inner.set_lr(scale)

    def step(self) -> None:
        """Record full gradients, then step. A collective: all ranks of the mesh must call it."""
        self.gradients.append({name: full_copy(p.grad) for name, p in self.parameters.items() if p.grad is not None})
        self.inner.step()

    def zero_grad(self) -> None:
        """Forward to the inner optimizer."""
        self.inner.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Forward to the inner optimizer."""
        return self.inner.state()


def full_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor; every rank gets all of a sharded one."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_on_layout(config: RunConfig, layout: Layout, rank: int, micro_batch: int, steps: int) -> TrainingTrace:
    """Train `steps` steps as one rank of a layout."""
    spec, recorders = build_model_spec(config), list[GradientRecorder]()

    def build_recorder(named: Iterable[tuple[str, nn.Parameter]]) -> GradientRecorder:
        parameters = dict(named)
        recorders.append(GradientRecorder(spec.build_optimizer(parameters.items()), parameters))
        return recorders[0]

    build: BuildOptimizer = build_recorder
    engine = build_engine(
        replace(spec, build_optimizer=build), build_engine_options(config), layout=layout, rank=rank, device=CPU
    )
    results = [
        engine.train_step(
            microbatches_of_rank(make_batch(step), layout.data_rank(rank), layout.data, micro_batch), lr_scale=1.0
        )
        for step in range(steps)
    ]
    model = engine.state()["model"]
    parameters = {name: full_copy(tensor) for name, tensor in model.items() if isinstance(tensor, Tensor)}
    return TrainingTrace(
        [r.loss for r in results],
        [r.grad_norm for r in results],
        recorders[0].gradients,
        parameters,
        [r.routing for r in results if r.routing is not None],
    )


@cache
def train_reference(settings: tuple[str, ...], steps: int) -> TrainingTrace:
    """Train the same steps on one process, with the whole batch as one microbatch."""
    return train_on_layout(make_config(settings), Layout(), rank=0, micro_batch=BATCH_SIZE, steps=steps)


def train_case(case: Case, steps: int) -> TrainingTrace | None:
    """Train a case on this worker. Of the ranks that hold the same layers, only the first returns its trace."""
    # DTensor warns about each full_tensor() of a 2D mesh.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    rank = torch.distributed.get_rank()
    coordinates = case.layout.coordinates(rank)
    config = make_config([*case.settings, *case.layout_settings])
    trace = train_on_layout(config, case.layout, rank, case.micro_batch, steps)
    return None if any(place for axis, place in coordinates.items() if axis != "pipeline") else trace


def compare(traces: Sequence[TrainingTrace | None], reference: TrainingTrace) -> dict[str, float]:
    """Return the largest relative error of each kind; a missing parameter counts as infinite.

    With routers there are two more: of the tokens of each expert (load), and of auxiliary losses, entropy and dropped
    assignments (balance), each of them by itself.
    """
    stages = [trace for trace in traces if trace is not None]
    losses = [abs(a - b) / abs(b) for stage in stages for a, b in zip(stage.losses, reference.losses, strict=True)]
    gradients = [
        error
        for step, expected in enumerate(reference.gradients)
        for error in _relative_errors([stage.gradients[step] for stage in stages], expected)
    ]
    norms = [abs(a - b) / b for stage in stages for a, b in zip(stage.grad_norms, reference.grad_norms, strict=True)]
    norms += [_clipping_error(*step) for step in zip(reference.gradients, reference.grad_norms, strict=True)]
    parameters = _relative_errors([stage.parameters for stage in stages], reference.parameters)
    errors = {"loss_error": losses, "gradient_error": gradients, "norm_error": norms, "parameter_error": parameters}
    if reference.routing:
        assert all(len(stage.routing) == len(reference.routing) for stage in stages)
        pairs = [pair for stage in stages for pair in zip(stage.routing, reference.routing, strict=True)]
        errors |= {
            "load_error": [_routing_error(a[:, :-N_SUMS], b[:, :-N_SUMS]) for a, b in pairs],
            "balance_error": [_routing_error(a[:, i], b[:, i]) for a, b in pairs for i in range(-N_SUMS, 0)],
        }
    return {kind: max(values) for kind, values in errors.items()}


def _routing_error(found: Tensor, expected: Tensor) -> float:
    """Relative error of what routers counted, over all layers."""
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def _clipping_error(clipped: Mapping[str, Tensor], reported_norm: float) -> float:
    """Relative error of a reported norm: gradients clipped with the true one have the norm that clipping promises."""
    norm = sum(gradient.double().square().sum().item() for gradient in clipped.values()) ** 0.5
    promised = reported_norm * min(1, MAX_GRAD_NORM / (reported_norm + 1e-6))  # as parallel.gradients clips
    return abs(float(norm) / promised - 1)


def _relative_errors(stages: Sequence[Mapping[str, Tensor]], expected: Mapping[str, Tensor]) -> list[float]:
    """Return |a - b| / |b| of every tensor on every stage. Two stages hold a tied embedding, and both must agree."""
    found = [(name, tensor) for stage in stages for name, tensor in stage.items()]
    if {name for name, _ in found} != expected.keys():
        return [float("inf")]
    return [
        ((tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)).item() for name, tensor in found
    ]
