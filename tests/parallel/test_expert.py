"""Dispatch of tokens to the ranks of their experts, against all experts on one rank; what overlaps; full rows."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode  # no public name
from workers import WorkerPool

from parallel.context import local_tokens
from parallel.deep_ep import DeepEPDispatcher, make_buffer
from parallel.dispatch import AllToAllDispatcher, Dispatcher, ExpertTensorDispatcher
from parallel.expert import RowRanks, apply_expert_parallel
from parallel.fsdp import _expert_placement
from parallel.layout import Layout
from parallel.mesh import build_expert_mesh, build_mesh
from pretrain.model.moe.dispatch import LocalDispatcher

E, D, K = 8, 6, 2
DROPPED = E

Routed = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one rank: output [T, D], gradients of tokens and of weights, sums of the keys of each of its experts."""


def experts_of(routing: str, rank: int) -> Tensor:
    """[T, K], the experts of a rank's tokens."""
    generator = torch.Generator().manual_seed(rank)
    random = torch.rand(16, E, generator=generator).topk(K).indices
    match routing:
        case "random":
            return random
        case "all tokens to one expert":
            return torch.tensor([5, DROPPED]).expand(16, K).contiguous()
        case "a rank whose experts get none":
            return random % (E // 2)
        case "fewer tokens than experts":
            return random[:1]
        case "some dropped":
            return random.masked_fill(torch.rand(16, K, generator=generator) < 0.5, DROPPED)
        case "all dropped":
            return torch.full((16, K), DROPPED)
    raise ValueError(routing)


ROUTINGS = [
    "random",
    "all tokens to one expert",
    "a rank whose experts get none",
    "fewer tokens than experts",
    "some dropped",
    "all dropped",
]


def tokens_of(routing: str, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, experts, weights, keys) of a rank."""
    expert_TK = experts_of(routing, rank)
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn(len(expert_TK), D, generator=generator, dtype=torch.float64)
    weight_TK = torch.rand(expert_TK.shape, generator=generator, dtype=torch.float64)
    return (
        x_TD.requires_grad_(),
        expert_TK,
        weight_TK.requires_grad_(),
        torch.arange(expert_TK.numel()).view_as(expert_TK),
    )


def matrices() -> Tensor:
    """[E, D, D], one matrix for each expert."""
    return torch.randn(E, D, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def run_layer(dispatcher: Dispatcher, routing: str, rank: int, first: int, n_local: int, *, keys: bool) -> Routed:
    """Pass a rank's tokens through experts `first`, ... of this rank: each multiplies by its matrix and the weight."""
    x_TD, expert_TK, weight_TK, key_TK = tokens_of(routing, rank)
    in_flight = dispatcher.send(x_TD, expert_TK, weight_TK, key_TK if keys else None)
    rows = dispatcher.receive(in_flight)
    outputs, key_sums, start = [], [], 0
    for expert, end in enumerate(rows.offsets_E.tolist()):
        outputs.append(rows.weight_X[start:end, None] * (rows.x_XD[start:end] @ matrices()[first + expert]))
        key_sums.append(rows.key_X[start:end].sum() if rows.key_X is not None else torch.tensor(0))
        start = end
    garbage = rows.x_XD[start:] * float("inf")  # rows behind the last are read by nobody
    out_TD = dispatcher.combine(torch.cat([*outputs, garbage]), in_flight)
    (out_TD * torch.arange(D)).sum().backward()
    assert x_TD.grad is not None
    assert weight_TK.grad is not None
    assert len(outputs) == n_local
    return out_TD.detach(), x_TD.grad, weight_TK.grad, torch.stack(key_sums)


def run_rank(kind: str, routing: str) -> Routed:
    """As one of the ranks that share out the experts."""
    size, rank = dist.get_world_size(), dist.get_rank()
    inner = LocalDispatcher(E, drops=True)
    n_local = E // size
    if kind == "deepep":
        with patch.dict(sys.modules, {"deep_ep": fake_deep_ep()}):
            buffer = make_buffer(dist.group.WORLD, D)
        dispatcher: Dispatcher = DeepEPDispatcher(inner.for_experts(n_local), buffer, E, n_local)
    else:
        dispatcher = AllToAllDispatcher(inner, dist.group.WORLD)
    return run_layer(dispatcher, routing, rank, rank * n_local, n_local, keys=kind != "deepep")


def expected(routing: str, rank: int) -> Routed:
    return run_layer(LocalDispatcher(E, drops=True), routing, rank, 0, E, keys=True)


def error(found: Routed, exact: Routed) -> float:
    """Of output and gradients, as a fraction of the norm."""
    pairs = zip(found[:3], exact[:3], strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


def run_in_wrong_order(routing: str) -> Routed:
    with patch("parallel.dispatch._inverse", lambda order_X: order_X):
        return run_rank("all_to_all", routing)


def test_results_in_the_wrong_order_are_detected(workers: WorkerPool) -> None:
    found = workers.run(run_in_wrong_order, 2, "random")
    assert max(error(ours, expected("random", rank)) for rank, ours in enumerate(found)) > 0.1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_are_those_of_one_rank(routing: str, size: int, workers: WorkerPool) -> None:
    found = workers.run(run_rank, size, "all_to_all", routing)
    alone = [expected(routing, rank) for rank in range(size)]
    for ours, theirs in zip(found, alone, strict=True):
        assert error(ours, theirs) < 1e-14
    assert torch.equal(torch.cat([keys for *_, keys in found]), torch.stack([keys for *_, keys in alone]).sum(0))


@pytest.mark.parametrize("routing", ["random", "some dropped", "a rank whose experts get none"])
def test_deepep_gives_the_same(routing: str, workers: WorkerPool) -> None:
    """With a stand-in for the package that does what its documentation says."""
    for rank, ours in enumerate(workers.run(run_rank, 4, "deepep", routing)):
        assert error(ours, expected(routing, rank)) < 1e-6  # weights travel in fp32


def fake_deep_ep() -> ModuleType:
    """A package `deep_ep` on plain collectives."""
    module: Any = ModuleType("deep_ep")
    module.Buffer = FakeBuffer
    return module


class FakeConfig:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, size: int) -> int:
        return hidden_bytes * size

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


class FakeBuffer:
    """deep_ep.Buffer: a token goes once to each rank with experts for it; `combine` adds up what the ranks return."""

    get_dispatch_config = get_combine_config = staticmethod(lambda size: FakeConfig())

    def __init__(self, group: ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.rank, self.size = group.rank(), group.size()

    def capture(self) -> None:
        return None

    def current_stream_wait(self) -> None:
        return None

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[None, None, Tensor, None, None]:
        assert topk_idx.max() < num_experts
        return None, None, torch.zeros(num_experts), None, None

    def gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    def dispatch(
        self, x: Tensor, handle: Any = None, topk_idx: Any = None, topk_weights: Any = None, **layout: Any
    ) -> tuple[Any, ...]:
        if handle is not None:
            return self.gather(x)[handle], None, None, None, None, self
        n_local = len(layout["num_tokens_per_expert"]) // self.size
        local = self.gather(topk_idx) - self.rank * n_local
        local = local.masked_fill((local < 0) | (local >= n_local) | (self.gather(topk_idx) < 0), -1)
        here = (local >= 0).any(1).nonzero()[:, 0]
        weights = self.gather(topk_weights).masked_fill(local < 0, 0)
        return self.gather(x)[here], local[here], weights[here], [], here, self

    def combine(self, x: Tensor, handle: Tensor, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        n_tokens = 16  # of each rank

        def add_up(rows: Tensor) -> Tensor:
            full = rows.new_zeros(n_tokens * self.size, rows.shape[1]).index_add(0, handle, rows)
            dist.all_reduce(full)
            return full.chunk(self.size)[self.rank]

        return add_up(x), None if topk_weights is None else add_up(topk_weights), self


class Recorder(TorchDispatchMode):
    """The names of collectives, and of `sin` and `cos`, which stand for shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().split("::")[1].split(".")[0]
        if name in ("all_to_all_single", "wait_tensor", "sin", "cos"):
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


def collectives() -> tuple[list[str], list[str]]:
    """In their order, of the forward and of the backward pass."""
    dispatcher = AllToAllDispatcher(LocalDispatcher(E, drops=False), dist.group.WORLD)
    x_TD, expert_TK, weight_TK, _ = tokens_of("random", dist.get_rank())
    with Recorder() as forward:
        in_flight = dispatcher.send(x_TD, expert_TK, weight_TK, None)
        shared_TD = x_TD.sin()
        rows = dispatcher.receive(in_flight)
        out_TD = dispatcher.combine(rows.x_XD * rows.weight_X[:, None], in_flight) + shared_TD
    with Recorder() as backward:
        out_TD.sum().backward()
    return forward.names, backward.names


def test_shared_experts_are_computed_while_tokens_travel_in_both_passes(workers: WorkerPool) -> None:
    exchange, wait = "all_to_all_single", "wait_tensor"
    for forward, backward in workers.run(collectives, 2):
        counts, rows, results = [exchange, wait], [exchange, exchange, "sin", wait, wait], [exchange, wait]
        assert forward == [*counts, *rows, *results]
        assert backward == [exchange, wait, exchange, exchange, "cos", wait, wait]


def run_width_rank(routing: str) -> Routed:
    """As one of two neighbours that each compute half of a sum over the width, for the tokens of both."""
    dispatcher = ExpertTensorDispatcher(LocalDispatcher(E, drops=True), dist.group.WORLD)
    half = matrices() / 2
    with patch(f"{__name__}.matrices", lambda: half):
        return run_layer(dispatcher, routing, dist.get_rank(), 0, E, keys=True)


@pytest.mark.parametrize("routing", ["random", "some dropped"])
def test_ranks_that_split_the_width_add_up(routing: str, workers: WorkerPool) -> None:
    for rank, ours in enumerate(workers.run(run_width_rank, 2, routing)):
        assert error(ours, expected(routing, rank)) < 1e-14


class Layer(nn.Module):
    """What `parallel.expert` sees of an MoE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = Experts()
        self.dispatcher: Any = LocalDispatcher(E, drops=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.arange(E * 8 * D).view(E, 8, D).float())
        self.down_proj = nn.Parameter(torch.arange(E * D * 4).view(E, D, 4).float())


def weights_of_rank(layout: Layout) -> tuple[Tensor, Tensor]:
    layer = Layer()
    apply_expert_parallel(layer, build_expert_mesh(build_mesh(layout, "cpu"), layout), layout)
    return layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()


def test_a_rank_computes_with_its_experts_and_its_part_of_their_width(workers: WorkerPool) -> None:
    layout, full = Layout(shard=2, tensor=2, expert=2, expert_tensor=2), Experts()
    gate_E4D, up_E4D = full.gate_up_proj.detach().chunk(2, 1)
    for rank, (gate_up, down) in enumerate(workers.run(weights_of_rank, 4, layout)):
        experts, part = slice(rank // 2 * 4, rank // 2 * 4 + 4), slice(rank % 2 * 2, rank % 2 * 2 + 2)
        assert torch.equal(gate_up, torch.cat((gate_E4D[experts, part], up_E4D[experts, part]), 1))
        assert torch.equal(down, full.down_proj.detach()[experts, :, part])


@pytest.mark.parametrize(("n_ranks", "dim"), [(4, 0), (8, 0), (6, 1), (16, 2), (5, 0)])
def test_experts_are_sharded_along_the_first_dimension_that_divides(n_ranks: int, dim: int) -> None:
    assert _expert_placement(nn.Parameter(torch.empty(8, 12, 16)), n_ranks=n_ranks).dim == dim


def rows_of_rank(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(this rank's tokens, the gathered rows, the summed counts)."""
    mesh = init_device_mesh("cpu", (layout.context, layout.tensor), mesh_dim_names=("context", "tensor"))
    ranks = RowRanks(mesh["context"], mesh["tensor"], layout)
    full = torch.arange(3 * 16 * 2).view(3, 16, 2)
    local = ranks.local(full)
    assert local.shape[1] * ranks.size == 16
    return local, ranks.gather(local), ranks.sum(torch.full((3, E), dist.get_rank() + 1.0))


@pytest.mark.parametrize(
    "layout",
    [Layout(context=2, tensor=2), Layout(context=4, context_method="ulysses"), Layout(context=4), Layout(tensor=4)],
    ids=str,
)
def test_full_rows_are_gathered_in_their_order(layout: Layout, workers: WorkerPool) -> None:
    full = torch.arange(3 * 16 * 2).view(3, 16, 2)
    for rank, (local, rows, counts) in enumerate(workers.run(rows_of_rank, 4, layout)):
        context_rank, tensor_rank = divmod(rank, layout.tensor)
        ranges = local_tokens(16, layout, context_rank).ranges
        part = torch.cat([full[:, first:end] for first, end in ranges], 1).chunk(layout.tensor, 1)[tensor_rank]
        assert torch.equal(local, part)
        assert torch.equal(rows, full)
        assert counts.unique().tolist() == [1 + 2 + 3 + 4]
