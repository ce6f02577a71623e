"""The grouped SwiGLU of the experts equals a loop over the experts in plain PyTorch, on every path that runs here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from parallel.recompute import apply_recompute
from pretrain.model.moe.grouped import _groups, _rounded_size, grouped_swiglu
from pretrain.model.moe.loop import loop_swiglu

SwiGLU = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

D, FF = 24, 20

COUNTS = {
    "uneven": [5, 40, 1, 18],
    "some get none": [0, 37, 0, 0, 3, 0],
    "one gets all": [0, 64, 0],
    "one expert": [33],
    "no rows": [0, 0, 0],
    "fewer rows than a tile": [1, 0, 2],
}


def make_inputs(counts: list[int], dtype: torch.dtype = torch.float32, n_garbage: int = 0) -> list[Tensor]:
    torch.manual_seed(0)
    X, E = sum(counts) + n_garbage, len(counts)
    floats = [torch.randn(X, D), torch.randn(E, 2 * FF, D) / D**0.5, torch.randn(E, D, FF) / FF**0.5]
    offsets_E = torch.tensor(counts).cumsum(0).int()
    leaves = [value.to(dtype).requires_grad_() for value in floats]
    return [*leaves, torch.rand(X).requires_grad_(), offsets_E]


def outputs_and_gradients(swiglu: SwiGLU, inputs: list[Tensor]) -> list[Tensor]:
    """y and the gradients of x, gate_up, down and weight, of the rows that belong to an expert."""
    n_rows = int(inputs[-1][-1])
    y_XD = swiglu(*inputs)
    grad_y_XD = torch.randn(y_XD.shape, generator=torch.Generator().manual_seed(1)).to(y_XD.dtype)
    x, gate_up, down, weight = torch.autograd.grad(y_XD[:n_rows], inputs[:4], grad_y_XD[:n_rows])
    return [y_XD.detach()[:n_rows], x[:n_rows], gate_up, down, weight[:n_rows]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    norm = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / norm if norm else found.double().norm().item()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_same_as_a_loop(counts: list[int]) -> None:
    inputs = make_inputs(counts)
    ours = outputs_and_gradients(grouped_swiglu, inputs)
    for found, expected in zip(ours, outputs_and_gradients(loop_swiglu, inputs), strict=True):
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_bf16_is_as_near_to_fp64_as_a_loop_in_bf16(counts: list[int]) -> None:
    inputs = make_inputs(counts, torch.bfloat16)
    exact = [value.detach().double().requires_grad_() for value in inputs[:4]]
    expected = outputs_and_gradients(loop_swiglu, [*exact, inputs[4]])
    loop = outputs_and_gradients(loop_swiglu, inputs)
    for ours, theirs, target in zip(outputs_and_gradients(grouped_swiglu, inputs), loop, expected, strict=True):
        assert relative_error(ours, target) <= 2 * relative_error(theirs, target)
        assert relative_error(ours, target) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
def test_rows_past_the_last_expert_are_never_read(dtype: torch.dtype, garbage: float) -> None:
    clean = make_inputs([5, 40, 0, 3], dtype, n_garbage=30)
    x_XD, gate_up_EHD, down_EDF, weight_X, offsets_E = clean
    bad_x_XD, bad_weight_X = x_XD.detach().clone(), weight_X.detach().clone()
    bad_x_XD[48:], bad_weight_X[48:] = garbage, garbage
    bad = [bad_x_XD.requires_grad_(), gate_up_EHD, down_EDF, bad_weight_X.requires_grad_(), offsets_E]
    grad_y_XD = torch.ones_like(x_XD)
    expected = torch.autograd.grad(grouped_swiglu(*clean), clean[:4], grad_y_XD)
    grad_y_XD = grad_y_XD.index_fill(0, torch.arange(48, 78), garbage)
    found = torch.autograd.grad(grouped_swiglu(*bad), bad[:4], grad_y_XD)
    assert torch.equal(grouped_swiglu(*bad)[:48], grouped_swiglu(*clean)[:48])
    for name, one, other in zip(("x", "gate_up", "down", "weight"), found, expected, strict=True):
        is_rows = name in ("x", "weight")
        assert torch.equal(one[:48] if is_rows else one, other[:48] if is_rows else other), name
    # The same garbage in rows of the last expert is seen.
    one_more = offsets_E + torch.tensor([0, 0, 0, 1]).int()
    seen = torch.autograd.grad(grouped_swiglu(*bad[:4], one_more), bad[:4], grad_y_XD)
    assert not seen[1].isfinite().all()


def test_a_row_that_is_not_finite_spoils_its_own_expert_only() -> None:
    inputs = make_inputs([20, 20, 20], torch.bfloat16)  # the windows of 32 rows overlap
    with torch.no_grad():
        inputs[0][25] = float("nan")
    _, _, gate_up_EHD, down_EDF, _ = outputs_and_gradients(grouped_swiglu, inputs)
    for gradient in (gate_up_EHD, down_EDF):
        assert [bool(matrix.isfinite().all()) for matrix in gradient] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_checkpointed_and_under_no_grad(dtype: torch.dtype) -> None:
    inputs = make_inputs(COUNTS["uneven"], dtype)
    expected = outputs_and_gradients(grouped_swiglu, inputs)
    compiled = torch.compile(grouped_swiglu, fullgraph=True)
    torch.compiler.reset()
    for found, target in zip(outputs_and_gradients(compiled, inputs), expected, strict=True):
        assert relative_error(found, target) < (1e-6 if dtype == torch.float32 else 1e-2)
    recomputed = outputs_and_gradients(lambda *values: checkpoint(grouped_swiglu, *values, use_reentrant=False), inputs)
    assert all(map(torch.equal, recomputed, expected))
    with torch.no_grad():
        assert torch.equal(grouped_swiglu(*inputs), expected[0])


def test_new_group_sizes_do_not_recompile() -> None:
    compiled = torch.compile(grouped_swiglu, fullgraph=True)
    torch.compiler.reset()
    compiled(*make_inputs([5, 40, 1, 18]))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*make_inputs([64, 0, 0, 0]))


def test_only_x_and_h_are_kept_for_the_backward_pass() -> None:
    inputs = make_inputs([30, 34], torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        grouped_swiglu(*inputs)
    activations = [tuple(value.shape) for value in kept if all(value is not given for given in inputs)]
    assert activations == [(64, 2 * FF)]


def test_frozen_inputs_cost_no_product() -> None:
    inputs = make_inputs([30, 34])
    one_product = 2 * 64 * D * FF
    with FlopCounterMode(display=False) as all_products:
        grouped_swiglu(*inputs).sum().backward()
    assert all_products.get_total_flops() == 9 * one_product
    inputs[1].requires_grad_(False)
    with FlopCounterMode(display=False) as without_gate_up:
        grouped_swiglu(*inputs).sum().backward()
    assert without_gate_up.get_total_flops() == 7 * one_product


@pytest.mark.parametrize(("mode", "n_products"), [("full", 12), ("selective", 9)])
def test_selective_recomputation_keeps_the_products(mode: str, n_products: int) -> None:
    class Block(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return grouped_swiglu(*inputs)

    block = Block()
    apply_recompute([block], mode, keep=("matmul",))
    with FlopCounterMode(display=False) as counter:
        block(*make_inputs([30, 34])).sum().backward()
    assert counter.get_total_flops() == n_products * 2 * 64 * D * FF


def test_half_precision_multiplies_few_distinct_sizes() -> None:
    sizes = {_rounded_size(n) for n in range(1, 8193)}
    assert len(sizes) < 100
    for n in range(1, 8193):
        assert n <= _rounded_size(n) < n + max(16, n / 16)
    assert [_rounded_size(n) for n in (0, 1, 16, 17, 256, 257, 512, 513)] == [0, 16, 16, 32, 256, 272, 512, 544]


def test_windows_hold_their_group_and_stay_among_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = torch.randint(0, 70, (8,), generator=generator)
        offsets_E = counts.cumsum(0).int()
        for group in _groups(offsets_E, torch.empty(1, dtype=torch.bfloat16)):
            assert 0 <= group.first <= group.start <= group.end <= group.last <= offsets_E[-1]
            assert group.last - group.first == _rounded_size(group.end - group.start)
        for group in _groups(offsets_E, torch.empty(1)):
            assert (group.first, group.last) == (group.start, group.end)
