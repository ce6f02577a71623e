"""Tensor and sequence parallelism: loss and gradients of one process, the collectives that it costs, and what happens when one is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from workers import WorkerPool

from parallel import tensor
from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.mesh import build_mesh, data_mesh
from pretrain.config import ModelConfig
from pretrain.model.init import initialise
from pretrain.model.transformer import SPLIT_PLAN, Transformer

TINY = ModelConfig(vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32, init_std=0.2)
Gradients = dict[str, Tensor]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(input ids, labels, document ids), [2, 16]: two documents a row, some tokens without a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(TINY.vocab_size, (2, 17), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, 3:6] = -100
    return ids[:, :-1], labels, (torch.arange(16) >= 7).long().expand(2, 16)


def loss_and_gradients(model: Transformer) -> tuple[float, Gradients]:
    ids, labels, documents = batch()
    positions = torch.cat((torch.arange(7), torch.arange(9))).expand(2, 16)
    sums = model.loss(ids, labels, model.document_mask(documents, positions), 1e-3)
    sums.total.backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
    return sums.total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(config: ModelConfig) -> tuple[float, Gradients]:
    model = Transformer(config)
    initialise(model, 3)
    return loss_and_gradients(model)


def split_model(config: ModelConfig, sequence: bool, compiled: bool = False) -> Transformer:
    """As the engine builds it: shapes, split, FSDP2 over one rank, memory, values."""
    size = torch.distributed.get_world_size()
    layout = Layout(tensor=size)
    mesh = build_mesh(layout, "cpu")
    with torch.device("meta"):
        model = Transformer(config)
    tensor.split(model, mesh["tensor"], model.plan, sequence=sequence, replicate_kv=True)
    if compiled:
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=data_mesh(mesh, layout))
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device="cpu")
    whole = Transformer(config)
    initialise(whole, 3)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert isinstance(ours, DTensor)
            ours.copy_(torch.distributed.tensor.distribute_tensor(theirs, ours.device_mesh, ours.placements, src_data_rank=None))
    return model


def split_gradients(
    config: ModelConfig, sequence: bool, compiled: bool = False, broken: Callable[[], None] | None = None
) -> tuple[float, Gradients]:
    if broken is not None:
        broken()
    loss, gradients = loss_and_gradients(split_model(config, sequence, compiled))
    return loss, {name: gradient.full_tensor() for name, gradient in gradients.items() if isinstance(gradient, DTensor)}


def errors(config: ModelConfig, results: list[tuple[float, Gradients]]) -> tuple[float, float]:
    """Largest relative error over ranks of the loss, and over ranks and parameters of the gradient."""
    loss, wanted = alone(config)
    assert all(set(gradients) == set(wanted) for _, gradients in results)
    worst = max(float((g[name] - wanted[name]).norm() / wanted[name].norm()) for _, g in results for name in wanted)
    return max(abs(ours - loss) / loss for ours, _ in results), worst


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"qk_norm": True, "qkv_bias": True}),
        (4, {"qk_norm": True, "qkv_bias": True}),  # more ranks than key/value heads
        (4, {"n_kv_heads": 1, "tie_embeddings": True}),
        (2, {"tie_embeddings": True}),
    ],
)
def test_loss_and_gradients_are_those_of_one_process(workers: WorkerPool, size: int, sequence: bool, changes: dict[str, object]) -> None:
    config = TINY.model_copy(update=changes)
    loss, gradient = errors(config, workers.run(split_gradients, size, config, sequence))
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize("sequence", [True, False])
def test_compiled_blocks_are_one_graph_and_give_the_same(workers: WorkerPool, sequence: bool) -> None:
    config = TINY.model_copy(update={"qk_norm": True})
    loss, gradient = errors(config, workers.run(split_gradients, 2, config, sequence, True))
    assert loss < 1e-6
    assert gradient < 1e-5
