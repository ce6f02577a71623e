"""All-gather and all-to-all on gloo against full tensors: values, gradients, compilation, recomputation."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from workers import WorkerPool

from parallel import collectives
from parallel.collectives import all_gather, all_to_all

SHAPE = (4, 3, 8)


def part(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(rank)).to(dtype)


def weights(rank: int, shape: torch.Size) -> Tensor:
    """An upstream gradient that differs by rank, in fp64, not contiguous."""
    return torch.randn(*shape[::-1], generator=torch.Generator().manual_seed(100 + rank), dtype=torch.float64).permute(
        *range(len(shape))[::-1]
    )


def whole_all_gather(parts: list[Tensor], dim: int) -> list[Tensor]:
    """The result of every rank, computed in one process."""
    return [torch.cat(parts, dim)] * len(parts)


def whole_all_to_all(parts: list[Tensor], split_dim: int, concat_dim: int) -> list[Tensor]:
    pieces = [x.chunk(len(parts), split_dim) for x in parts]
    return [torch.cat([piece[rank] for piece in pieces], concat_dim) for rank in range(len(parts))]


OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., list[Tensor]]]] = {
    **{f"all-gather along {d}": (partial(all_gather, dim=d), partial(whole_all_gather, dim=d)) for d in (0, 1, -1)},
    **{
        f"all-to-all {s} for {c}": (
            partial(all_to_all, split_dim=s, concat_dim=c),
            partial(whole_all_to_all, split_dim=s, concat_dim=c),
        )
        for s, c in ((0, 1), (2, 1), (0, 2), (-1, 0), (0, 0))
    },
}


def result(operation: str, dtype: torch.dtype, how: str = "eager") -> tuple[Tensor, Tensor]:
    """One rank's output and gradient. The loss weighs each element differently."""
    rank = dist.get_rank()
    function = partial(OPERATIONS[operation][0], group=dist.group.WORLD)
    x = part(rank, dtype).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    if how == "compiled":
        out = torch.compile(lambda x: 2 * function(x) - function(x), backend="aot_eager", fullgraph=True)(x)
    elif how == "recomputed":
        out = checkpoint(lambda x: function(x.sin()), x, use_reentrant=False)
    else:
        out = function(x)
    out.backward(weights(rank, out.shape).to(dtype))
    assert x.grad is not None
    return out.detach(), x.grad


def expected(operation: str, size: int, *, recomputed: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    parts = [part(rank).double().requires_grad_() for rank in range(size)]
    outs = OPERATIONS[operation][1]([x.sin() if recomputed else x for x in parts])
    loss = torch.stack([(out * weights(rank, out.shape)).sum() for rank, out in enumerate(outs)]).sum()
    return [out.detach() for out in outs], list(torch.autograd.grad(loss, parts))


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error of all ranks, as a fraction of the norm."""
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))


def compare(
    results: list[tuple[Tensor, Tensor]], operation: str, size: int, *, recomputed: bool = False
) -> tuple[float, float]:
    outs, gradients = expected(operation, size, recomputed=recomputed)
    return error([out for out, _ in results], outs), error([gradient for _, gradient in results], gradients)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_and_gradients_match_full_tensors(operation: str, size: int, workers: WorkerPool) -> None:
    assert max(compare(workers.run(result, size, operation, torch.float32), operation, size)) < 1e-6


@pytest.mark.parametrize("operation", ["all-gather along 1", "all-to-all 2 for 1"])
def test_bf16_matches_to_8_bits(operation: str, workers: WorkerPool) -> None:
    assert max(compare(workers.run(result, 2, operation, torch.bfloat16), operation, 2)) < 8e-3


@pytest.mark.parametrize("operation", ["all-gather along 1", "all-to-all 2 for 1"])
@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_collectives_compile_into_one_graph_and_recompute(how: str, operation: str, workers: WorkerPool) -> None:
    results = workers.run(result, 2, operation, torch.float32, how, timeout=180)
    assert max(compare(results, operation, 2, recomputed=how == "recomputed")) < 1e-6


def run_without_reduction(operation: str) -> tuple[Tensor, Tensor]:
    """All-gather whose backward pass takes the rank's own slice of the gradient and does not sum."""

    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _, size, dim = ctx.arguments  # type: ignore[attr-defined]  # set by forward
        return grad.chunk(size, dim)[dist.get_rank()], None, None, None

    original, collectives._AllGather.backward = collectives._AllGather.backward, staticmethod(backward)
    try:
        return result(operation, torch.float32)
    finally:
        collectives._AllGather.backward = staticmethod(original)


def test_a_missing_reduction_is_detected(workers: WorkerPool) -> None:
    values, gradients = compare(workers.run(run_without_reduction, 2, "all-gather along 1"), "all-gather along 1", 2)
    assert values < 1e-6
    assert gradients > 0.1


def uneven() -> str:
    with pytest.raises(ValueError, match="3 parts along dimension 1") as raised:
        all_to_all(part(0), dist.group.WORLD, 1, 0)
    return str(raised.value)


def test_indivisible_dimensions_are_refused_on_every_rank(workers: WorkerPool) -> None:
    assert workers.run(uneven, 2) == ["3 parts along dimension 1 cannot be shared out to 2 ranks"] * 2


def fake_shapes() -> list[tuple[int, ...]]:
    """Shapes of outputs and gradients, on meta tensors in a fake group of 64 ranks."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    x = torch.empty(2, 6, 128, 5, device="meta", requires_grad=True)
    outs = [all_gather(x, dist.group.WORLD, 1), all_to_all(x, dist.group.WORLD, 2, 1)]
    return [tuple(y.shape) for out in outs for y in (out, *torch.autograd.grad(out.sum(), x))]


def test_a_fake_group_of_64_ranks_gives_the_right_shapes(workers: WorkerPool) -> None:
    gradient = (2, 6, 128, 5)
    assert workers.run(fake_shapes, 1) == [[(2, 384, 128, 5), gradient, (2, 384, 2, 5), gradient]]
