"""`parallel.prefetch`: how many blocks are gathered ahead. Nothing else of a step depends on it."""

import pytest
import torch
import torch.distributed as dist
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from workers import WorkerPool

from parallel.engine import Microbatch
from parallel.engines.torch.build import build_engine
from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.setup.engine import build_engine_options, build_model_spec

N_LAYERS, MICROBATCHES = 5, 2
UNITS = N_LAYERS + 2
"""FSDP units: the root, the embedding, each block."""
FIRST = {0: [3, 4, 5, 6, 7], 1: [4, 5, 6, 7, 7], 3: [6, 7, 7, 7, 7]}
"""`prefetch` -> units gathered before each block of the first microbatch: root, embedding, blocks, those ahead."""
CONFIG = RunConfig.model_validate(
    {
        "model": {"n_layers": N_LAYERS, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64, "vocab_size": 64},
        "data": {"seq_len": 16},
        "train": {"device": "cpu", "precision": "fp32", "compile": False, "attention": "sdpa"},
        "optim": {"warmup": 0, "decay": 1.0},
    }
)


EXPERTS = {"architecture": "moe", "moe": {"n_experts": 4, "n_shared_experts": 1}}


def gathered_before_each_block(layout: Layout, config: RunConfig = CONFIG) -> tuple[list[list[int]], int, float]:
    """(all-gathers before the forward pass of each block, by microbatch; all-gathers of the step; its loss)."""
    engine = build_engine(
        build_model_spec(config),
        build_engine_options(config),
        layout=layout,
        rank=dist.get_rank(),
        device=torch.device("cpu"),
    )
    counts, gathers = list[int](), Gathers()
    for block in engine.model_chunks[0].layers:
        block.register_forward_pre_hook(lambda *_: counts.append(gathers.number))  # runs after FSDP2's hook
    with gathers:
        loss = engine.train_step([microbatch(i) for i in range(MICROBATCHES)], lr_scale=1.0).loss
    return [counts[:N_LAYERS], counts[N_LAYERS:]], gathers.number, loss


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    number = 0

    def __torch_dispatch__(
        self, operation: OpOverload, _: object, given: tuple[object, ...] = (), more: dict[str, object] | None = None
    ) -> object:
        self.number += operation is torch.ops.c10d._allgather_base_.default
        return operation(*given, **more or {})


def microbatch(number: int) -> Microbatch:
    ids_BS = (torch.arange(16)[None] * 7 + 11 * number + dist.get_rank()) % 64
    return Microbatch(ids_BS, ids_BS, ids_BS * 0, torch.arange(16)[None], n_targets=16)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_blocks_are_gathered_ahead_and_nothing_else_changes(zero: int, workers: WorkerPool) -> None:
    """ZeRO-3 gathers in each microbatch, ZeRO-1 and 2 in the first only."""
    losses = set()
    for ahead, first in FIRST.items():
        counts, total, loss = workers.run(gathered_before_each_block, 2, Layout(shard=2, zero=zero, prefetch=ahead))[0]
        assert counts == [first, [n + UNITS + (UNITS - 1) for n in first] if zero == 3 else [UNITS] * N_LAYERS]
        assert total == (
            2 * (UNITS + (UNITS - 1)) if zero == 3 else UNITS
        )  # the backward pass gathers all but the root
        losses.add(loss)
    assert len(losses) == 1


@pytest.mark.parametrize(("zero", "recompute"), [(1, "full"), (3, "none"), (3, "full"), (3, "selective")])
def test_experts_are_gathered_as_often_as_their_blocks(zero: int, recompute: str, workers: WorkerPool) -> None:
    """Also if their forward pass runs again in the backward pass."""
    values = CONFIG.model_dump()
    values["model"] |= EXPERTS
    values["train"] |= {"recompute": recompute}
    config, units, losses = RunConfig.model_validate(values), UNITS + N_LAYERS, set()
    for ahead in (0, 1):
        layout = Layout(shard=4, expert=2, zero=zero, prefetch=ahead)
        _, total, loss = workers.run(gathered_before_each_block, 4, layout, config)[0]
        assert total == (MICROBATCHES * (units + units - 1) if zero == 3 else units)
        losses.add(loss)
    assert len(losses) == 1
