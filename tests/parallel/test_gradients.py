"""The global gradient norm is as good as fp64's on any layout, and clipping by it gives exactly the norm that was asked for."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from workers import WorkerPool

import parallel.gradients
from parallel.gradients import clip_gradients_, local_squared_norm
from parallel.layout import Layout
from parallel.mesh import build_mesh

MANY = 12_000_000


def parameter(gradient: Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.empty_like(gradient))
    made.grad = gradient
    return made


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Of different sizes: no sum of their squares is exact in fp32."""
    return 1e-3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_of(*gradients: Tensor) -> float:
    found = local_squared_norm({str(i): parameter(g) for i, g in enumerate(gradients)}, Layout(), lambda _: 1)
    assert found.dtype == torch.float64
    return math.sqrt(found)


def exact(*gradients: Tensor) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def test_the_norm_of_12_million_numbers_is_that_of_fp64_and_a_sum_in_fp32_would_be_noticed() -> None:
    gradient = numbers(MANY)
    wanted = exact(gradient)
    assert norm_of(gradient) == pytest.approx(wanted, rel=1e-12)
    naive = torch._foreach_norm([gradient])[0].item()
    assert abs(naive / wanted - 1) > 1e-4


def test_clipping_12_million_numbers_gives_the_norm_that_was_asked_for() -> None:
    """A norm that is 0.03% too small, as a sum in fp32 gives it, would leave the gradients 0.03% too large."""
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
        torch.full((1000,), 1e30),  # its squares are no fp32 numbers
        torch.full((1000,), 1e-30),
    ],
    ids=["three dimensions", "transposed", "strided", "empty", "one number", "huge", "tiny"],
)
def test_the_norm_of_any_gradient_is_that_of_fp64(gradient: Tensor) -> None:
    assert norm_of(gradient, numbers(5)) == pytest.approx(exact(gradient, numbers(5)), rel=1e-12)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_the_norm_of_what_is_not_finite_is_not_finite(value: float) -> None:
    gradient = numbers(300_000)
    gradient[200_000] = value
    assert not math.isfinite(norm_of(numbers(3), gradient))


def test_a_cpu_is_given_small_pieces_as_it_copies_them_to_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """12M numbers in one piece cost 96 MB for as long as the sum takes."""
    seen: list[int] = []
    norm = torch._foreach_norm

    def noting(tensors: list[Tensor], *given: object, **more: object) -> tuple[Tensor, ...]:
        seen.extend(tensor.numel() for tensor in tensors)
        return norm(tensors, *given, **more)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(parallel.gradients.torch, "_foreach_norm", noting)
    norm_of(numbers(1_000_000), numbers(10))
    assert sum(seen) == 1_000_010
    assert max(seen) * 8 <= 2**21


SPLIT, WHOLE, TIED = numbers(501, 800, seed=1), numbers(300, seed=2), numbers(700, 300, seed=3)


def squares_of_rank(layout: Layout) -> float:
    """This rank's share of the squared norm of three parameters: one that all axes divide, one that none does, one that stages share."""
    mesh = build_mesh(layout, "cpu")
    place = {"replicate": Replicate(), "shard": Shard(0), "context": Shard(0), "tensor": Shard(1)}
    axes = [axis for axis in place if getattr(layout, axis) > 1]
    masters = {"split": parameter(SPLIT)}
    if axes:
        gradient = distribute_tensor(SPLIT, mesh[tuple(axes)], [place[axis] for axis in axes])
        masters = {"split": parameter(gradient)}
    masters |= {"whole": parameter(WHOLE), "tied": parameter(TIED)}
    if (
        dist.get_rank() // (layout.world_size // layout.pipeline) > 0
    ):  # a later stage has its copy of the tied one, and nothing else
        del masters["split"], masters["whole"]
    return local_squared_norm(masters, layout, lambda name: layout.pipeline if name == "tied" else 1).item()


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
    ],
    ids=str,
)
def test_the_shares_of_all_ranks_add_up_to_the_norm_of_fp64(layout: Layout, workers: WorkerPool) -> None:
    shares = workers.run(squares_of_rank, layout.world_size, layout)
    assert math.sqrt(sum(shares)) == pytest.approx(exact(SPLIT, WHOLE, TIED), rel=1e-12)
