"""`parallel.reshard_to`: the backward pass gathers from a few neighbours, and one mesh serves all blocks."""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from workers import WorkerPool

import parallel.fsdp
from parallel.engine import InspectableEngine, Microbatch
from parallel.engines.torch.build import build_engine
from parallel.layout import Layout
from parallel.mesh import build_mesh, data_mesh, reshard_mesh
from pretrain.config import RunConfig
from pretrain.setup.engine import build_engine_options, build_model_spec

N_LAYERS = 3
UNITS = N_LAYERS + 1
"""Units that the backward pass gathers: the embedding and each block. The root stays gathered."""
GROUPS_OF_A_MESH = 2
"""One per axis of the mesh."""
GROUPED = {
    Layout(shard=4, tensor=2, reshard_to=2): [[0, 2], [4, 6], [1, 3], [5, 7]],
    Layout(replicate=2, shard=4, reshard_to=2): [[0, 1], [2, 3], [4, 5], [6, 7]],
    Layout(pipeline=2, shard=2, context=2, reshard_to=2): [[0, 1], [2, 3], [4, 5], [6, 7]],
    Layout(shard=2, context=2, tensor=2, reshard_to=2): [[0, 2], [4, 6], [1, 3], [5, 7]],
    Layout(shard=8, reshard_to=4): [[0, 1, 2, 3], [4, 5, 6, 7]],
}
"""The ranks that share resharded parameters: consecutive FSDP ranks."""


def engine_of(layout: Layout, n_layers: int = N_LAYERS) -> InspectableEngine:
    config = RunConfig.model_validate(
        {
            "model": {"n_layers": n_layers, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64, "vocab_size": 64},
            "data": {"seq_len": 16},
            "train": {"device": "cpu", "precision": "fp32", "compile": False, "attention": "sdpa"},
            "optim": {"warmup": 0, "decay": 1.0},
        }
    )
    return build_engine(
        build_model_spec(config),
        build_engine_options(config),
        layout=layout,
        rank=dist.get_rank(),
        device=torch.device("cpu"),
    )


def plain_fsdp2() -> AbstractContextManager[object]:
    """Pass a number as `reshard_after_forward`, without a mesh."""
    return patch.multiple(parallel.fsdp, reshard_mesh=lambda *_: None, fsdp_resharding_over=lambda _: nullcontext())


def private_names() -> tuple[object, object]:
    """What `fsdp_resharding_over` replaces and restores."""
    return _fully_shard._get_post_forward_mesh_info, _fsdp_param_group.FSDPParam  # type: ignore[attr-defined]


def groups_made(layout: Layout, n_layers: int, is_plain: bool) -> int:
    """Number of process groups of this rank after its engine is built."""
    before = private_names()
    with plain_fsdp2() if is_plain else nullcontext():
        engine = engine_of(layout, n_layers)
    assert private_names() == before
    assert engine.model_chunks
    return len(dist.distributed_c10d._world.pg_map)  # no public name counts them


def groups(workers: WorkerPool, layout: Layout, n_layers: int, is_plain: bool = False) -> int:
    (number,) = set(workers.run(groups_made, layout.world_size, layout, n_layers, is_plain))
    return number


@pytest.mark.parametrize("n_layers", [2, 5])
def test_one_mesh_is_made_for_any_number_of_blocks(n_layers: int, workers: WorkerPool) -> None:
    """Plain FSDP2 makes one for the embedding and one for each block."""
    without = groups(workers, Layout(shard=4), n_layers)
    assert groups(workers, Layout(shard=4, reshard_to=4), n_layers) == without
    assert groups(workers, Layout(shard=4, reshard_to=2), n_layers) == without + GROUPS_OF_A_MESH
    assert groups(workers, Layout(shard=4, reshard_to=2), n_layers, is_plain=True) == without + GROUPS_OF_A_MESH * (
        n_layers + 1
    )


def neighbours(layout: Layout) -> tuple[list[int], list[int]]:
    """This rank's group in our mesh, and in the mesh that FSDP2 would make."""
    mesh = build_mesh(layout, "cpu")
    near = reshard_mesh(mesh, layout)["reshard_shard"].get_group()
    by_fsdp2 = cast(Tensor, data_mesh(mesh, layout).mesh).view(-1, layout.reshard_to or 0)
    (mine,) = by_fsdp2[(by_fsdp2 == dist.get_rank()).any(1)].tolist()
    return dist.get_process_group_ranks(near), mine


@pytest.mark.parametrize(("layout", "expected"), GROUPED.items(), ids=str)
def test_groups_are_consecutive_fsdp_ranks(layout: Layout, expected: list[list[int]], workers: WorkerPool) -> None:
    for rank, (ours, by_fsdp2) in enumerate(workers.run(neighbours, 8, layout)):
        assert ours == by_fsdp2
        assert ours == next(group for group in expected if rank in group)


class Gathers(TorchDispatchMode):
    """Counts all-gathers by their number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = Counter[int]()

    def __torch_dispatch__(
        self, operation: OpOverload, _: object, given: tuple[object, ...] = (), more: dict[str, object] | None = None
    ) -> object:
        if operation is torch.ops.c10d._allgather_base_.default:
            whole, part = cast(tuple[Tensor, Tensor], given[:2])
            self.ranks[whole.numel() // part.numel()] += 1
        return operation(*given, **more or {})


def gathered_in_a_step(layout: Layout, is_plain: bool) -> tuple[Counter[int], float]:
    """All-gathers of a step by number of ranks, and the loss of the next step."""
    with plain_fsdp2() if is_plain else nullcontext():
        engine = engine_of(layout)
    ids_BS = (torch.arange(16)[None] * 7 + layout.data_rank(dist.get_rank())) % 64
    microbatch = Microbatch(ids_BS, ids_BS, ids_BS * 0, torch.arange(16)[None], n_targets=16)
    with Gathers() as gathers:
        engine.train_step([microbatch], lr_scale=1.0)
    return gathers.ranks, engine.train_step([microbatch], lr_scale=1.0).loss


def test_the_backward_pass_gathers_from_neighbours_only_and_trains_the_same(workers: WorkerPool) -> None:
    """Without `reshard_to` all gathers are over 4 ranks. Plain FSDP2 gathers as we do."""
    found = [
        workers.run(gathered_in_a_step, 4, layout, is_plain)[0]
        for layout, is_plain in (
            (Layout(shard=4), False),
            (Layout(shard=4, reshard_to=2), False),
            (Layout(shard=4, reshard_to=2), True),
        )
    ]
    some = {4: UNITS + 1, 2: UNITS}
    assert [ranks for ranks, _ in found] == [{4: 2 * UNITS + 1}, some, some]
    assert len({loss for _, loss in found}) == 1


def test_tensor_shards_are_gathered_from_neighbours_too(workers: WorkerPool) -> None:
    """The collectives of tensor parallelism are the same in both."""
    (all_of, loss), (some, same) = (
        workers.run(gathered_in_a_step, 8, each, False)[0]
        for each in (Layout(shard=4, tensor=2), Layout(shard=4, tensor=2, reshard_to=2))
    )
    assert all_of - some == {4: UNITS}
    assert some - all_of == {2: UNITS}
    assert loss == same
