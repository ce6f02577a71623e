"""A training step of any rank of any layout without GPUs, peers or data: what the rank holds and sends, measured, beside the formulas.

The code that trains builds the rank and takes the step, on tensors that have a shape and no memory
(`parallel.simulate.fake_world`). Attention runs by the variable-length kernels of GPUs, which make no mask of [S, S];
nothing is compiled. Writes no file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from parallel.engine import Blueprint, Microbatch, Optimizer
from parallel.engines.torch.build import build_engine
from parallel.layout import Layout
from parallel.simulate.fake_world import pretend
from parallel.simulate.trackers import REST, Meter, Traffic, kinds_of
from pretrain.config import RunConfig
from pretrain.config.loading import validate
from pretrain.console import format_memory, plain_table
from pretrain.errors import UserError
from pretrain.estimate.communication import traffic
from pretrain.estimate.rank_memory import Holding, fullest, hold, n_microbatches
from pretrain.setup.engine import blueprint_of, numbers_of
from pretrain.setup.layout import layout_of
from pretrain.setup.resolve import plan

ROUNDS = {"gpipe": None, "1f1b": 1}
"""Microbatches of a dry step at most, times the ranks of the pipeline; 2 where nothing is said. More are more of the same, but under GPipe,
which keeps the activations of all."""

SHOWN_DIGITS = 3
"""Decimals of a size in GiB, MiB or KiB."""

SMALL = 1024
"""Bytes sent that are not told."""


@dataclass(frozen=True)
class Measured:
    """What one rank had in a step, in bytes."""

    most: dict[str, int]
    """Of each kind of `parallel.simulate.trackers`, at its most."""
    peak: int
    """Of all kinds together, at one moment."""
    sent: dict[str, dict[str, int]]
    """{axis: {operation: bytes}}."""


def dry_run(config: RunConfig, world_size: int, rank: int | None, console: Console) -> None:
    """Print what a rank of `world_size` would hold and send in a step; without a rank, the one that holds most.

    Raises:
        UserError: a layout that cannot be, or a rank that there is not.
    """
    config, _ = plan(config, world_size)
    layout = layout_of(config, world_size)
    rank = fullest(config, layout) if rank is None else rank
    if not 0 <= rank < world_size:
        raise UserError(f"--rank={rank} is not one of {world_size} ranks; use 0 to {world_size - 1}")
    config, in_full = shortened(config, layout), n_microbatches(config, layout)
    measured = measure(config, layout, rank)
    place = " ".join(f"{axis}={at}" for axis, at in layout.coordinates(rank).items() if getattr(layout, axis) > 1)
    held = hold(config, layout, rank)
    layers = ", ".join(f"{layers.start} to {layers.stop - 1}" for layers in held.layers)
    steps = n_microbatches(config, layout)
    console.print(
        f"{layout}: rank {rank} of {world_size}" + (f", at {place}" if place else ""), highlight=False, soft_wrap=True
    )
    console.print(
        f"layers {layers} of {config.model.n_layers}, {held.n_parameters:,} parameters", highlight=False, soft_wrap=True
    )
    shown = f"a step of {steps} microbatch{'es' * (steps > 1)}" + (
        f"; the {in_full - steps} others of a whole step are more of the same" * (in_full > steps)
    )
    console.print(Text(f"{shown}, uncompiled", "dim"), soft_wrap=True)
    if config.optim.kind == "muon":
        console.print(
            Text("optim.kind=muon gathers what its products need; no formula counts that", "dim"), soft_wrap=True
        )
    console.print(_held_table(measured, held))
    if layout.offload:
        console.print(
            Text("parallel.offload=true: parameters, gradients and optimizer state are in host memory", "dim"),
            soft_wrap=True,
        )
    if measured.sent:
        console.print(_sent_table(measured.sent, traffic(config, layout, rank)))


def shortened(config: RunConfig, layout: Layout) -> RunConfig:
    """The config of a step that shows all that a whole one shows, and runs in a dry run."""
    tree = config.model_dump(mode="json")
    rounds, all_of_them = ROUNDS.get(layout.schedule, 2), n_microbatches(config, layout)
    few = all_of_them if rounds is None else min(all_of_them, max(2, rounds * layout.pipeline))
    tree["train"]["batch_size"] = few * config.train.micro_batch_size * layout.data
    tree["train"] |= {"compile": False, "attention": "varlen", "device": "cpu"}
    return validate(tree)


def measure(config: RunConfig, layout: Layout, rank: int) -> Measured:
    """Build a rank of a resolved config and take a step, in pretence; in a second or a minute, by its layers and microbatches."""
    layout = replace(
        layout, offload=False, async_tensor=False
    )  # both are for devices that are not there, and change no size
    with pretend(rank, layout.world_size), Meter() as meter:
        blueprint = _observed(blueprint_of(config), meter)
        engine = build_engine(blueprint, numbers_of(config), layout=layout, rank=rank, device=torch.device("cpu"))
        meter.watch(kinds_of(engine))
        step = [_microbatch(config) for _ in range(n_microbatches(config, layout))]
        with Traffic(layout) as moved:
            engine.train_step(step, lr_scale=1.0)
    return Measured(meter.most, meter.peak, {axis: dict(operations) for axis, operations in moved.sent.items()})


def _microbatch(config: RunConfig) -> Microbatch:
    """Rows of one document each."""
    b, S = config.train.micro_batch_size, config.data.seq_len
    zeros_BS = torch.zeros(b, S, dtype=torch.int32)
    return Microbatch(zeros_BS, zeros_BS, torch.arange(S, dtype=torch.int32).expand(b, S), zeros_BS, n_targets=b * S)


def _observed(blueprint: Blueprint, meter: Meter) -> Blueprint:
    """The same without initial values; the meter looks before the optimizer steps, when all gradients are reduced and none is freed."""

    def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        return _ObservedOptimizer(blueprint.build_optimizer(named_parameters), meter)

    return replace(blueprint, fill=lambda *_: None, build_optimizer=build_optimizer)


@dataclass(frozen=True)
class _ObservedOptimizer:
    optimizer: Optimizer
    meter: Meter

    def set_lr(self, scale: float) -> None:
        self.optimizer.set_lr(scale)

    def step(self) -> None:
        self.meter.by_kind()
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        return self.optimizer.state()


def _held_table(measured: Measured, held: Holding) -> Table:
    table = plain_table("held by this rank", "measured", "formula", "difference")
    formulas = {
        "parameters": held.master_bytes,
        "optimizer state": held.optimizer_bytes,
        "gradients": held.gradient_bytes,
        "gathered parameters": held.copy_bytes + held.gathered_bytes,
        REST: held.activation_bytes,
    }
    for kind, formula in formulas.items():
        table.add_row(*_compared(kind + (" (estimate)" if kind == REST else ""), measured.most[kind], formula))
    table.add_row("most at one time", format_memory(measured.peak, SHOWN_DIGITS))
    return table


def _sent_table(sent: dict[str, dict[str, int]], formulas: dict[str, dict[str, float]]) -> Table:
    table = plain_table("sent by this rank in the step", "measured", "formula", "difference")
    for axis, operations in sent.items():
        for operation, count in operations.items():
            if count < SMALL:  # sums of losses and norms, which no formula counts
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
