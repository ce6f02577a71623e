"""The global gradient norm has fp64 precision on any layout, and clipping gives exactly `max_norm`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from workers import WorkerPool

import parallel.gradients
from parallel.gradients import clip_gradients_, local_squared_norm
from parallel.layout import Layout
from parallel.mesh import build_expert_mesh, build_mesh

MANY = 12_000_000


def parameter(gradient: Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.empty_like(gradient))
    made.grad = gradient
    return made


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers: no sum of their squares is exact in fp32."""
    return 1e-3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_of(*gradients: Tensor) -> float:
    found = local_squared_norm({str(i): parameter(g) for i, g in enumerate(gradients)}, Layout(), lambda _: 1)
    assert found.dtype == torch.float64
    return math.sqrt(found)


def exact(*gradients: Tensor) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def test_the_norm_of_12_million_numbers_matches_fp64_and_fp32_sums_do_not() -> None:
    gradient = numbers(MANY)
    wanted = exact(gradient)
    assert norm_of(gradient) == pytest.approx(wanted, rel=1e-12)
    naive = torch._foreach_norm([gradient])[0].item()
    assert abs(naive / wanted - 1) > 1e-4


def test_clipping_12_million_numbers_gives_max_norm() -> None:
    """With an fp32 sum the norm would be 0.03% too small, and the clipped gradients 0.03% too large."""
    clipped = parameter(numbers(MANY))
    assert clipped.grad is not None
    clip_gradients_([clipped], 0.5, norm_of(clipped.grad))
    assert exact(clipped.grad) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    "gradient",
    [
        numbers(3, 700, 500),
        numbers(2000, 300).T,
        numbers(600_000)[::2],
        numbers(0, 7),
        torch.tensor(3.0),
        torch.full((1000,), 1e30),  # their squares overflow fp32
        torch.full((1000,), 1e-30),
    ],
    ids=["three dimensions", "transposed", "strided", "empty", "one number", "huge", "tiny"],
)
def test_the_norm_matches_fp64(gradient: Tensor) -> None:
    assert norm_of(gradient, numbers(5)) == pytest.approx(exact(gradient, numbers(5)), rel=1e-12)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_the_norm_of_nonfinite_gradients_is_not_finite(value: float) -> None:
    gradient = numbers(300_000)
    gradient[200_000] = value
    assert not math.isfinite(norm_of(numbers(3), gradient))


def test_cpu_norms_work_on_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU makes an fp64 copy: 12M numbers in one piece would take 96 MB."""
    seen: list[int] = []
    norm = torch._foreach_norm

    def record(tensors: list[Tensor], *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        seen.extend(tensor.numel() for tensor in tensors)
        return norm(tensors, *args, **kwargs)  # type: ignore[arg-type]  # passed on unchanged

    monkeypatch.setattr(parallel.gradients.torch, "_foreach_norm", record)
    norm_of(numbers(1_000_000), numbers(10))
    assert sum(seen) == 1_000_010
    assert max(seen) * 8 <= 2**21


SPLIT, WHOLE, TIED = numbers(501, 800, seed=1), numbers(300, seed=2), numbers(700, 300, seed=3)
EXPERTS = numbers(8, 60, 50, seed=4)


def squares_of_rank(layout: Layout) -> float:
    """This rank's share of the squared norm of a parameter on all axes, a replicated one, one that stages share, and
    experts."""
    mesh = build_mesh(layout, "cpu")
    place = {"replicate": Replicate(), "shard": Shard(0), "context": Shard(0), "tensor": Shard(1)}
    axes = [axis for axis in place if getattr(layout, axis) > 1]
    master_weights = {"split": parameter(SPLIT)}
    if axes:
        gradient = distribute_tensor(SPLIT, mesh[tuple(axes)], [place[axis] for axis in axes])
        master_weights = {"split": parameter(gradient)}
    master_weights |= {"whole": parameter(WHOLE), "tied": parameter(TIED), "experts": parameter(EXPERTS)}
    if layout.expert > 1:
        experts = build_expert_mesh(mesh, layout)
        module = nn.ParameterDict(
            {"experts": distribute_tensor(EXPERTS, experts.axes["expert"], [Shard(0)], src_data_rank=None)}
        )
        fully_shard(module, mesh=experts.fsdp)
        master_weights["experts"] = parameter(module["experts"].detach())
    if dist.get_rank() // (layout.world_size // layout.pipeline) > 0:  # later stages hold the tied parameter only
        del master_weights["split"], master_weights["whole"], master_weights["experts"]
    return local_squared_norm(master_weights, layout, lambda name: layout.pipeline if name == "tied" else 1).item()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(shard=4),
        Layout(replicate=2, shard=2),
        Layout(tensor=2),
        Layout(shard=2, tensor=2),
        Layout(pipeline=2),
        Layout(pipeline=2, shard=2),
        Layout(shard=2, context=2, tensor=2),
        Layout(shard=4, expert=2),
        Layout(replicate=2, shard=2, tensor=2, expert=2, expert_tensor=2),
        Layout(pipeline=2, shard=2, expert=2),
    ],
    ids=str,
)
def test_the_shares_of_all_ranks_sum_up_to_the_fp64_norm(layout: Layout, workers: WorkerPool) -> None:
    shares = workers.run(squares_of_rank, layout.world_size, layout)
    assert math.sqrt(sum(shares)) == pytest.approx(exact(SPLIT, WHOLE, TIED, EXPERTS), rel=1e-12)
