"""Dry run: take a training step as any rank of any layout, without GPUs, peers or data. Compare it with the formulas.

The real engine is built and takes the step, on tensors that have a shape but no memory
(`parallel.simulate.fake_world`). Attention uses the variable-length GPU kernels, which make no [S, S] mask. Nothing is
compiled, and no file is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from parallel.engine import Microbatch, ModelSpec, Optimizer
from parallel.engines.torch.build import build_engine
from parallel.layout import AXES, Layout
from parallel.simulate.communication import CommTracker
from parallel.simulate.fake_world import fake_world
from parallel.simulate.memory import ACTIVATIONS, MemoryTracker, tensor_kinds
from pretrain.config import RunConfig
from pretrain.config.loading import validate
from pretrain.console import format_memory, plain_table
from pretrain.errors import UserError
from pretrain.estimate.communication import estimate_traffic
from pretrain.estimate.rank_memory import RankMemory, estimate_rank_memory, n_microbatches
from pretrain.setup.engine import build_engine_options, build_model_spec
from pretrain.setup.resolve import resolve_for_cluster

ROUNDS = {"gpipe": None, "1f1b": 1}
"""Microbatches of a dry-run step, in units of the pipeline's ranks; 2 for schedules not listed. More would show nothing
new, except under GPipe, which keeps the activations of all microbatches (None: take all)."""

SHOWN_DIGITS = 3
"""Decimals of a size in GiB, MiB or KiB."""

MIN_BYTES_SHOWN = 1024
"""Smaller transfers are not printed."""


@dataclass(frozen=True)
class Measured:
    """What one rank held and sent in a step, in bytes."""

    peak_by_kind: dict[str, int]
    """The peak of each kind of `parallel.simulate.memory`, each at its own moment."""
    peak: int
    """The peak of all kinds together."""
    sent: dict[str, dict[str, int]]
    """{axis: {operation: bytes}}."""


def dry_run(config: RunConfig, world_size: int, rank: int | None, console: Console) -> None:
    """Print what a rank of `world_size` would hold and send in a step. Without a rank, take the one that holds most.

    Raises:
        UserError: the layout is impossible, or there is no such rank.
    """
    resolved = resolve_for_cluster(config, world_size)
    config, layout = resolved.config, resolved.layout
    rank = resolved.peak_rank if rank is None else rank
    if not 0 <= rank < world_size:
        raise UserError(f"--rank={rank} is not one of {world_size} ranks; use 0 to {world_size - 1}")
    n_in_full = n_microbatches(config, layout)
    config = shorten_step(config, layout)
    measured, held = measure(config, layout, rank), estimate_rank_memory(config, layout, rank)
    for line in (*_describe_rank(config, layout, rank, held), *_describe_step(config, layout, n_in_full)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_memory_table(measured, held))
    if layout.offload:
        note = "parallel.offload=true: parameters, gradients and optimizer state are in host memory"
        console.print(Text(note, "dim"), soft_wrap=True)
    if measured.sent:
        console.print(_traffic_table(measured.sent, estimate_traffic(config, layout, rank)))


def _describe_rank(config: RunConfig, layout: Layout, rank: int, held: RankMemory) -> Iterator[str]:
    """Where the rank stands in the layout, and what part of the model it holds."""
    sizes = dict(zip(AXES, layout.sizes, strict=True))
    place = " ".join(f"{axis}={at}" for axis, at in layout.coordinates(rank).items() if sizes[axis] > 1)
    layers = ", ".join(f"{layers.start} to {layers.stop - 1}" for layers in held.layers)
    yield f"{layout}: rank {rank} of {layout.world_size}" + (f", at {place}" if place else "")
    yield f"layers {layers} of {config.model.n_layers}, {held.n_parameters:,} parameters"


def _describe_step(config: RunConfig, layout: Layout, n_in_full: int) -> Iterator[Text]:
    """How the dry step differs from one with `n_in_full` microbatches, and from the formulas."""
    steps = n_microbatches(config, layout)
    step = f"a step of {steps} microbatch{'es' * (steps > 1)}"
    if n_in_full > steps:
        step += f"; the {n_in_full - steps} others of a full step would show nothing new"
    yield Text(f"{step}, uncompiled", "dim")
    if config.optim.kind == "muon":
        yield Text("optim.kind=muon gathers what its products need; no formula counts that", "dim")


def shorten_step(config: RunConfig, layout: Layout) -> RunConfig:
    """Return the config of a step with few microbatches. Its memory peaks like that of the full step."""
    tree = config.model_dump(mode="json")
    rounds, n_in_full = ROUNDS.get(layout.schedule, 2), n_microbatches(config, layout)
    few = n_in_full if rounds is None else min(n_in_full, max(2, rounds * layout.pipeline))
    tree["train"]["batch_size"] = few * config.train.micro_batch_size * layout.data
    tree["train"] |= {"compile": False, "attention": "varlen", "device": "cpu"}
    return validate(tree)


def measure(config: RunConfig, layout: Layout, rank: int) -> Measured:
    """Build one rank of a resolved config in a fake world and take a step. Takes a second to a minute."""
    # Both need devices that are not here, and change no size.
    layout = replace(layout, offload=False, async_tensor=False)
    with fake_world(rank, layout.world_size), MemoryTracker() as memory:
        spec = _observed(build_model_spec(config), memory)
        engine = build_engine(spec, build_engine_options(config), layout=layout, rank=rank, device=torch.device("cpu"))
        memory.watch(tensor_kinds(engine))
        step = [_microbatch(config) for _ in range(n_microbatches(config, layout))]
        with CommTracker(layout) as comm:
            engine.train_step(step, lr_scale=1.0)
    return Measured(
        memory.peak_by_kind, memory.peak, {axis: dict(operations) for axis, operations in comm.sent.items()}
    )


def _microbatch(config: RunConfig) -> Microbatch:
    """Sequences of one document each."""
    b, S = config.train.micro_batch_size, config.data.seq_len
    zeros_BS = torch.zeros(b, S, dtype=torch.int32)
    return Microbatch(zeros_BS, zeros_BS, torch.arange(S, dtype=torch.int32).expand(b, S), zeros_BS, n_targets=b * S)


def _observed(spec: ModelSpec, memory: MemoryTracker) -> ModelSpec:
    """The same without initial values. The tracker counts just before the optimizer steps: all gradients exist then."""

    def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        return _ObservedOptimizer(spec.build_optimizer(named_parameters), memory)

    return replace(spec, init_shard=lambda *_: None, build_optimizer=build_optimizer)


@dataclass(frozen=True)
class _ObservedOptimizer:
    optimizer: Optimizer
    memory: MemoryTracker

    def set_lr(self, scale: float) -> None:
        self.optimizer.set_lr(scale)

    def step(self) -> None:
        self.memory.by_kind()
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        return self.optimizer.state()


def _memory_table(measured: Measured, held: RankMemory) -> Table:
    table = plain_table("held by this rank", "measured", "formula", "difference")
    formulas = {
        "parameters": held.master_bytes,
        "optimizer state": held.optimizer_bytes,
        "gradients": held.gradient_bytes,
        "gathered parameters": held.compute_weight_bytes + held.gathered_bytes,
        ACTIVATIONS: held.activation_bytes,
    }
    for kind, formula in formulas.items():
        table.add_row(
            *_compared(kind + (" (estimate)" if kind == ACTIVATIONS else ""), measured.peak_by_kind[kind], formula)
        )
    table.add_row("most at one time", format_memory(measured.peak, SHOWN_DIGITS))
    return table


def _traffic_table(sent: dict[str, dict[str, int]], formulas: dict[str, dict[str, float]]) -> Table:
    table = plain_table("sent by this rank in the step", "measured", "formula", "difference")
    for axis, operations in sent.items():
        for operation, count in operations.items():
            if count < MIN_BYTES_SHOWN:  # sums of losses and norms, which no formula counts
                continue
            table.add_row(*_compared(f"{axis}: {operation}", count, formulas.get(axis, {}).get(operation, 0)))
    return table


def _compared(name: str, measured: float, formula: float) -> tuple[str, str, str, str]:
    return (
        name,
        format_memory(measured, SHOWN_DIGITS),
        format_memory(formula, SHOWN_DIGITS),
        f"{measured / formula - 1:+.2%}" if formula else "",
    )
