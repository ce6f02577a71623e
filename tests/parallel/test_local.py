"""Local shards: initialized shard by shard, a model has the same weights on every layout, bit for bit."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from workers import WorkerPool

from parallel import local, tensor
from parallel.layout import Layout
from parallel.local import local_shard
from parallel.mesh import build_mesh, data_mesh
from pretrain.config import ModelConfig
from pretrain.model.architectures.llama import Llama
from pretrain.model.init import ROWS, init_shard, init_weights

# No number of rows is a multiple of the ranks. Some norms have empty shards. Matrices have several tiles.
UNEVEN = ModelConfig(
    vocab_size=4 * ROWS + 20,
    n_layers=1,
    d_model=12,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_ff=1100,
    max_seq_len=32,
    qk_norm=True,
)


def initialize_rank(layout: Layout, naive: bool = False) -> tuple[dict[str, Tensor], int]:
    """The full weights after each rank initialized its shards, and the number of empty shards."""
    mesh = build_mesh(layout, "cpu")
    with torch.device("meta"):
        model = Llama(UNEVEN)
    if layout.tensor > 1:
        tensor.apply_tensor_parallel(model, mesh["tensor"], model.tp_plan, sequence=False, replicate_kv=True)
    for module in (*model.layers, model):
        fully_shard(module, mesh=data_mesh(mesh, layout))
    model.to_empty(device="cpu")
    empty = 0
    for name, parameter in model.named_parameters():
        part = local_shard(parameter)
        part.local.fill_(torch.nan)
        offset = (0,) * parameter.ndim if naive else part.offset
        init_shard(name, part.local, offset, part.shape, UNEVEN, seed=5)
        empty += part.local.numel() == 0
    return {
        name: parameter.full_tensor() for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)
    }, empty


def full_weights() -> dict[str, Tensor]:
    model = Llama(UNEVEN)
    init_weights(model, 5)
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(shard=4),
        Layout(tensor=4),
        Layout(shard=2, tensor=2),
        Layout(replicate=2, context=2),
        Layout(shard=4, tensor=2),
    ],
    ids=str,
)
def test_every_layout_has_the_same_initial_weights_bit_for_bit(workers: WorkerPool, layout: Layout) -> None:
    expected = full_weights()
    results = workers.run(initialize_rank, layout.world_size, layout)
    for weights, _ in results:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert sum(empty for _, empty in results) > 0 or layout.shard < 4


def test_shards_initialized_without_their_offset_are_detected(workers: WorkerPool) -> None:
    weights, _ = workers.run(initialize_rank, 4, Layout(shard=2, tensor=2), True)[0]
    assert not all(torch.equal(weights[name], value) for name, value in full_weights().items())


def test_the_shard_of_a_plain_tensor_is_all_of_it_and_shares_memory() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    part = local_shard(parameter)
    part.local.fill_(1)
    assert (part.offset, part.shape) == ((0, 0), (3, 4))
    assert parameter.sum() == 12


def misplaced() -> str:
    mesh = build_mesh(Layout(shard=2), "cpu")
    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=data_mesh(mesh, Layout(shard=2)))
    with (
        patch.object(local, "local_shape_and_offset", return_value=((3, 4), (0, 0))),
        pytest.raises(ValueError, match="local shard") as e,
    ):
        local_shard(model.weight)
    return str(e.value)


def test_a_shard_that_contradicts_its_placement_is_refused(workers: WorkerPool) -> None:
    assert workers.run(misplaced, 2)[0].startswith(
        "the local shard has shape (2, 4), but (Shard(dim=0),) of (4, 4) gives (3, 4)"
    )
