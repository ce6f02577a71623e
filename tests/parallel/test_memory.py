"""Parameters, gradients and optimizer state of each rank take the memory that ZeRO's formulas give."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from workers import WorkerPool

from parallel.engine import Microbatch, MicrobatchLoss
from parallel.engines.torch.build import build_engine
from parallel.fsdp import FSDPRoot
from parallel.layout import Layout
from parallel.simulate.memory import MemoryTracker, tensor_kinds
from pretrain.config import RunConfig
from pretrain.setup.engine import build_engine_options, build_model_spec

CONFIG = RunConfig.model_validate(
    {
        "model": {
            "n_layers": 8,
            "d_model": 64,
            "n_heads": 8,
            "n_kv_heads": 8,
            "head_dim": 8,
            "d_ff": 192,
            "vocab_size": 64,
        },
        "data": {"seq_len": 16},
        "train": {"device": "cpu", "precision": "bf16", "compile": False, "attention": "sdpa"},
        "optim": {"warmup": 0, "decay": 1.0},
    }
)
FORMULAS: dict[int, Callable[[int], float]] = {
    1: lambda n: 2 + 4 + (4 + 8) / n,
    2: lambda n: 2 + 4 / n + (4 + 8) / n,
    3: lambda n: 4 / n + (4 + 8) / n,
}
"""Bytes per parameter on n ranks: compute weights + gradients + (master weights + AdamW's moments)."""


def memory_by_zero(size: int, zeros: tuple[int, ...]) -> dict[int, dict[str, int]]:
    """Bytes by kind for each ZeRO stage, between two microbatches.

    All gradients exist then, those of ZeRO-1 not yet reduced, and no activation does.
    """
    return {
        zero: memory_between_microbatches(
            Layout(shard=size, zero=zero), torch.distributed.get_rank() if size > 1 else 0
        )
        for zero in zeros
    }


def memory_between_microbatches(layout: Layout, rank: int) -> dict[str, int]:
    spec, found = build_model_spec(CONFIG), list[dict[str, int]]()
    with MemoryTracker() as memory:

        def forward_step(part: nn.Module, received: Tensor | None, microbatch: Microbatch) -> Tensor | MicrobatchLoss:
            found.append(memory.by_kind())
            return spec.forward_step(part, received, microbatch)

        engine = build_engine(
            replace(spec, forward_step=forward_step),
            build_engine_options(CONFIG),
            layout=layout,
            rank=rank,
            device=torch.device("cpu"),
        )
        memory.watch(tensor_kinds(engine))
        engine.train_step([microbatch(), microbatch()], lr_scale=1.0)
    return found[1]


def microbatch() -> Microbatch:
    ids_BS = torch.arange(16)[None]
    return Microbatch(ids_BS, ids_BS, ids_BS, torch.zeros_like(ids_BS), n_targets=16)


def memory_without_resharding(size: int) -> dict[int, dict[str, int]]:
    """As `memory_by_zero` for ZeRO-3, but blocks stay gathered after their backward pass."""
    right = FSDPRoot.prepare_microbatch

    def wrong(root: FSDPRoot, *, is_last: bool) -> None:
        right(root, is_last=is_last)
        root._root.set_reshard_after_backward(False)

    FSDPRoot.prepare_microbatch = wrong
    try:
        return memory_by_zero(size, (3,))
    finally:
        FSDPRoot.prepare_microbatch = right


def expected(zero: int, n: int) -> dict[str, float]:
    """Bytes per parameter of each kind. The rest is the buffer of the last reduction."""
    return {
        "parameters": 4 / n,
        "optimizer state": 8 / n,
        "gradients": 4 if zero == 1 else 4 / n,
        "gathered parameters": 2 if zero < 3 or n == 1 else 0,
        "activations": 0,
    }


def parameters() -> int:
    with torch.device("meta"):
        return sum(
            parameter.numel() for parameter in build_model_spec(CONFIG).build(range(CONFIG.model.n_layers)).parameters()
        )


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_memory_matches_the_formula_within_5_percent(size: int, workers: WorkerPool) -> None:
    n_parameters = parameters()
    ranks = (
        workers.run(memory_by_zero, size, size, (1, 2, 3), timeout=120) if size > 1 else [memory_by_zero(1, (1, 2, 3))]
    )
    for rank, stages in enumerate(ranks):
        for zero, kinds in stages.items():
            formula = 18.0 if size == 1 else FORMULAS[zero](size)
            measured = sum(kinds.values()) / n_parameters
            each = ", ".join(f"{kind} {count / n_parameters:.2f}" for kind, count in kinds.items())
            print(
                f"ZeRO-{zero} on {size}: rank {rank} holds {measured:.3f} bytes a parameter ({each}), "
                f"the formula says {formula:.3f}"
            )
            assert measured == pytest.approx(formula, rel=0.05)
            assert {kind: kinds[kind] / n_parameters for kind in kinds} == pytest.approx(
                expected(zero, size), rel=0.02, abs=0.15
            )


def test_zero_3_without_resharding_is_detected(workers: WorkerPool) -> None:
    formula = FORMULAS[3](2) * parameters()
    for stages in workers.run(memory_without_resharding, 2, 2):
        assert sum(stages[3].values()) > 1.2 * formula
