"""Muon over stacked experts: what torch's Muon makes of each matrix, however the experts are sharded."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter
from torch.optim import Muon

from parallel.local import to_local
from pretrain.config import OptimConfig
from pretrain.errors import UserError
from pretrain.estimate.parameters import _check_group
from pretrain.model.architectures.llama import SPEC as LLAMA
from pretrain.model.spec import (
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    MATRICES,
    NORMAL,
    VECTORS,
    ModuleSpec,
    OptimizerGroup,
    ParameterSpec,
)
from pretrain.optim.build import Optimizers, build_optimizer
from tests.workers import WorkerPool

EXPERTS = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
F, D = 24, 16
CONFIG = OptimConfig(kind="muon", lr=0.02, muon_momentum=0.9, weight_decay=0.1)
STEPS = 3
CLOSE = 0.01
"""Relative distance of two sums of updates in bf16 on the same numbers. The same kernels give the same bits."""


def build(weights: dict[str, Parameter], gate_up: OptimizerGroup = EXPERT_GATE_UP) -> Optimizers:
    row = ModuleSpec(
        "gather_sequence",
        {
            "gate_up_proj": ParameterSpec("experts", NORMAL, gate_up),
            "down_proj": ParameterSpec("experts", NORMAL, EXPERT_DOWN),
        },
    )
    spec = replace(LLAMA, modules={**LLAMA.modules, "model.layers.*.mlp.experts": row})
    return build_optimizer(weights.items(), CONFIG, spec)


def initial(n_experts: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        GATE_UP: torch.randn(n_experts, 2 * F, D, generator=generator),
        DOWN: torch.randn(n_experts, D, F, generator=generator),
    }


def gradients(n_experts: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(x.shape, generator=generator) for name, x in initial(n_experts).items()}


def matrices(name: str, stack: Tensor) -> list[Tensor]:
    """The matrices that a dense layer would have, of all experts."""
    return [matrix for expert in stack for matrix in (expert.chunk(2) if name == GATE_UP else [expert])]


def train(n_experts: int, gate_up: OptimizerGroup = EXPERT_GATE_UP) -> dict[str, Tensor]:
    weights = {name: Parameter(x) for name, x in initial(n_experts).items()}
    optimizer = build(weights, gate_up)
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(n_experts, step).items():
            weights[name].grad = gradient
        optimizer.set_lr(1 / step)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def train_matrix_by_matrix(n_experts: int) -> dict[str, list[Tensor]]:
    """By torch's Muon."""
    weights = {name: [Parameter(m.clone()) for m in matrices(name, x)] for name, x in initial(n_experts).items()}
    optimizer = Muon(
        [m for ms in weights.values() for m in ms],
        lr=CONFIG.lr,
        weight_decay=CONFIG.weight_decay,
        momentum=CONFIG.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(1, STEPS + 1):
        for name, gradient in gradients(n_experts, step).items():
            for matrix, its_gradient in zip(weights[name], matrices(name, gradient), strict=True):
                matrix.grad = its_gradient.contiguous()
        optimizer.param_groups[0]["lr"] = CONFIG.lr / step
        optimizer.step()
    return {name: [m.detach() for m in ms] for name, ms in weights.items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance between two trainings, in units of what training changed."""
    before = initial(len(next(iter(expected.values()))))
    return max(
        ((found[name] - expected[name]).norm() / (expected[name] - before[name]).norm()).item() for name in expected
    )


def by_torch(n_experts: int) -> dict[str, Tensor]:
    found = train_matrix_by_matrix(n_experts)
    return {name: torch.cat(found[name]).reshape(x.shape) for name, x in initial(n_experts).items()}


def test_it_is_torchs_muon_for_each_matrix_of_each_expert() -> None:
    assert distance(train(5), by_torch(5)) < CLOSE


def test_gate_and_up_orthogonalized_as_one_matrix_are_another_optimizer() -> None:
    one = replace(EXPERT_GATE_UP, matrices_per_expert=1)
    assert distance(train(5, gate_up=one), by_torch(5)) > 20 * CLOSE


def test_experts_orthogonalized_as_one_matrix_are_another_optimizer() -> None:
    whole = Parameter(initial(5)[DOWN].flatten(0, 1))
    alone = Muon([whole], lr=CONFIG.lr, momentum=CONFIG.muon_momentum, adjust_lr_fn="match_rms_adamw")
    for step in range(1, STEPS + 1):
        whole.grad = gradients(5, step)[DOWN].flatten(0, 1)
        alone.param_groups[0]["lr"] = CONFIG.lr / step
        alone.step()
    expected = by_torch(5)[DOWN]
    assert distance({DOWN: whole.detach().reshape(expected.shape)}, {DOWN: expected}) > 20 * CLOSE


def test_an_expert_without_tokens_only_decays() -> None:
    weights = {name: Parameter(x) for name, x in initial(2).items()}
    optimizer = build(weights)
    for name, weight in weights.items():
        weight.grad = gradients(2, 1)[name]
        weight.grad[1] = 0
    optimizer.step()
    for name, before in initial(2).items():
        torch.testing.assert_close(weights[name][1].detach(), before[1] * (1 - 0.02 * 0.1), rtol=1e-6, atol=0)
        assert (weights[name][0] - before[0]).abs().max() > 1e-3


def test_its_state_is_that_of_muon() -> None:
    weights = {name: Parameter(x) for name, x in initial(2).items()}
    state = build(weights).state()
    assert {name: list(slots) for name, slots in state.items()} == {n: ["momentum_buffer"] for n in (GATE_UP, DOWN)}
    assert all(slots["momentum_buffer"].shape == weights[name].shape for name, slots in state.items())


class Holder(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Parameter(weights[GATE_UP]), Parameter(weights[DOWN])


Placed = list[Shard]
"""Placement on the axes that expert parallelism uses, before FSDP."""


def train_sharded(
    n_experts: int, n_fsdp: int, sizes: tuple[int, ...], gate_up: Placed, down: Placed, fsdp_dim: int
) -> tuple[dict[str, Tensor], int]:
    """(the full weights after training, the number of collectives that the optimizer took)."""
    names = ("fsdp", "expert", "expert_tensor")[: 1 + len(sizes)]
    mesh = init_device_mesh("cpu", (n_fsdp, *sizes), mesh_dim_names=names)
    places = {GATE_UP: gate_up, DOWN: down}

    def placed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not sizes:
            return tensors
        return {n: distribute_tensor(x, mesh[names[1:]], places[n], src_data_rank=None) for n, x in tensors.items()}

    module = Holder(placed(initial(n_experts)))
    fully_shard(module, mesh=mesh["fsdp"], shard_placement_fn=lambda _: Shard(fsdp_dim))
    weights = {GATE_UP: module.gate_up_proj, DOWN: module.down_proj}
    optimizer = build(weights)
    n_collectives = 0
    for step in range(1, STEPS + 1):
        source = Holder(placed(gradients(n_experts, step)))
        fully_shard(source, mesh=mesh["fsdp"], shard_placement_fn=lambda _: Shard(fsdp_dim))
        for name, gradient in ((GATE_UP, source.gate_up_proj), (DOWN, source.down_proj)):
            weights[name].grad = gradient.detach()
        optimizer.set_lr(1 / step)
        with CommDebugMode() as communication:
            optimizer.step()
        n_collectives += communication.get_total_counts()
    assert all(isinstance(weight, DTensor) for weight in weights.values())
    assert all(to_local(slots["momentum_buffer"]).shape for slots in optimizer.state().values())
    return {name: weight.detach().full_tensor() for name, weight in weights.items()}, n_collectives


@pytest.mark.parametrize(
    ("n_experts", "n_fsdp", "sizes", "gate_up", "down", "fsdp_dim", "communicates"),
    [
        (3, 2, (), [], [], 0, False),  # uneven
        (1, 4, (), [], [], 0, False),  # ranks without experts
        (3, 2, (), [], [], 1, True),
        (8, 2, (2,), [Shard(0)], [Shard(0)], 0, False),  # a strided placement
        (4, 2, (2,), [Shard(0)], [Shard(0)], 1, True),
        (3, 2, (2,), [Shard(2)], [Shard(2)], 0, True),
        (3, 2, (2,), [Shard(2)], [Shard(1)], 1, True),  # down_proj: strided along dimension 1
        (4, 2, (2, 2), [Shard(0), Shard(1)], [Shard(0), Shard(2)], 0, True),
    ],
)
def test_sharded_experts_are_updated_as_in_one_process(
    n_experts: int,
    n_fsdp: int,
    sizes: tuple[int, ...],
    gate_up: Placed,
    down: Placed,
    fsdp_dim: int,
    communicates: bool,
    workers: WorkerPool,
) -> None:
    world_size = n_fsdp * torch.Size(sizes).numel()
    expected = train(n_experts)
    for found, n_collectives in workers.run(
        train_sharded, world_size, n_experts, n_fsdp, sizes, gate_up, down, fsdp_dim
    ):
        assert distance(found, expected) < CLOSE
        assert (n_collectives > 0) == communicates


@pytest.mark.parametrize(
    ("shape", "group", "problem"),
    [
        ((4, 8, 8), MATRICES, "'matrices', which Muon takes matrix by matrix; use a group with matrices_per_expert"),
        ((4, 7, 8), EXPERT_GATE_UP, r"matrices_per_expert=2; its shape must be \[experts, rows, columns\]"),
        ((8, 8), EXPERT_DOWN, "matrices_per_expert=1; its shape must be"),
    ],
)
def test_a_group_that_does_not_fit_the_shape_is_refused(
    shape: tuple[int, ...], group: OptimizerGroup, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        _check_group("table", shape, group)
    for good, its_group in (((4, 8, 8), EXPERT_GATE_UP), ((4, 7, 8), EXPERT_DOWN), ((8, 8), MATRICES), ((8,), VECTORS)):
        _check_group("table", good, its_group)
