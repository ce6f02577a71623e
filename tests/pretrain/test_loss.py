"""Chunked linear cross-entropy: gradients against fp64 autograd, memory at full size, and its edges."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.reading.packing import NO_LABEL
from pretrain.model import loss as loss_module
from pretrain.model.loss import IGNORE, linear_cross_entropy, softmax_gradient_

T, D, V = 50, 24, 77


def problem(
    dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).to(weight_dtype or dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=generator)
    labels[::7] = -100
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy, gradient of hidden, gradient of weight) of the total, by autograd in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    total = cross_entropy + z_loss * logits.logsumexp(-1)[labels != -100].square().sum()
    return cross_entropy, *torch.autograd.grad(total, (hidden, weight))


@pytest.fixture(params=[1, 4, 50], ids=["1 chunk", "4 chunks", "50 chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loss_module, "_CHUNKS", request.param)
    monkeypatch.setattr(loss_module, "_SMALLEST_CHUNK", {"cpu": 1})
    monkeypatch.setattr(loss_module, "_BLOCK", 3 * V)
    return int(request.param)


def test_the_loss_ignores_the_label_that_packing_writes() -> None:
    assert IGNORE == NO_LABEL


def relative(x: Tensor, wanted: Tensor) -> float:
    return float((x.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.usefixtures("chunks")
def test_fp32_loss_and_gradients_equal_fp64_autograd_to_1e6(z_loss: float) -> None:
    hidden, weight, labels = problem()
    sums = linear_cross_entropy(hidden, weight, labels, z_loss)
    gradients = torch.autograd.grad(sums.total / 10, (hidden, weight))
    cross_entropy, grad_hidden, grad_weight = reference(hidden, weight, labels, z_loss)
    assert sums.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-6)
    assert sums.total.item() == pytest.approx(sums.cross_entropy.item() + sums.z_loss.item(), rel=1e-6)
    assert relative(gradients[0] * 10, grad_hidden) < 1e-6
    assert relative(gradients[1] * 10, grad_weight) < 1e-6


@pytest.mark.usefixtures("chunks")
def test_the_softmax_gets_chunks_of_one_size_however_many_tokens_are_left() -> None:
    sizes = []

    def softmax(logits_CV: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(len(logits_CV))
        return softmax_gradient_(logits_CV, *given)

    hidden, weight, labels = problem()
    linear_cross_entropy(hidden[:49], weight, labels[:49], softmax=softmax)
    chunks = loss_module._CHUNKS
    assert (
        sizes == {1: [49], 4: [13] * 4, 50: [1] * 49}[chunks]
    )  # four whole ones of 13 hold 52 tokens: three are filled up


def test_the_losses_of_tokens_are_added_up_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 chunks of a token of 0.1 nats each.

    In fp32 the sum is 1e-5 off, which is more than rounding a token's loss can be.
    """
    many, tenth = 20_000, torch.tensor(0.1)
    monkeypatch.setattr(loss_module, "_chunks", lambda logits, device: many)

    def softmax(logits_CV: Tensor, labels_C: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        return tenth.expand(len(labels_C)), tenth.expand(len(labels_C)) / 2, torch.zeros(len(labels_C))

    with torch.no_grad():
        sums = linear_cross_entropy(
            torch.zeros(many, 1), torch.zeros(2, 1), torch.zeros(many, dtype=torch.int64), softmax=softmax
        )
    assert sums.cross_entropy.item() == pytest.approx(many * tenth.item(), rel=1e-12)
    assert sums.z_loss.item() == pytest.approx(many * tenth.item() / 2, rel=1e-12)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("chunks")
def test_bf16_gradients_are_within_rounding_of_fp64(weight_dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(torch.bfloat16, weight_dtype)
    sums = linear_cross_entropy(hidden, weight, labels)
    grad_hidden, grad_weight = torch.autograd.grad(sums.total, (hidden, weight))
    cross_entropy, wanted_hidden, wanted_weight = reference(hidden, weight, labels, 0.0)
    assert grad_weight.dtype == weight_dtype
    assert sums.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-3)
    assert relative(grad_hidden, wanted_hidden) < 1e-2
    assert relative(grad_weight, wanted_weight) < 1e-2


def test_bf16_gradients_are_as_good_as_those_of_materialised_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_SMALLEST_CHUNK", {"cpu": 1})
    hidden, weight, labels = problem(torch.bfloat16)
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).total, (hidden, weight))
    materialised = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    theirs = torch.autograd.grad(materialised, (hidden, weight))
    _, *wanted = reference(hidden, weight, labels, 0.0)
    assert relative(ours[0], wanted[0]) < 1.5 * relative(theirs[0], wanted[0])
    assert relative(ours[1], wanted[1]) < 3 * relative(theirs[1], wanted[1])  # 16 roundings instead of one


def test_a_dropped_label_column_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = problem()
    monkeypatch.setattr(Tensor, "index_put_", lambda self, *_: self)
    gradient = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).total, hidden)[0]
    monkeypatch.undo()
    assert relative(gradient, reference(hidden, weight, labels, 0.0)[1]) > 0.1


def test_ignored_tokens_get_no_loss_and_no_gradient() -> None:
    hidden, weight, labels = problem()
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), 0.1)
    assert [x.item() for x in nothing] == [0.0, 0.0, 0.0]
    gradient = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, 0.1).total, hidden)[0]
    assert torch.equal(gradient[labels == -100], torch.zeros(int((labels == -100).sum()), D))
    assert bool((gradient[labels != -100] != 0).any(-1).all())


def test_without_gradients_the_loss_is_the_same_to_the_last_bit() -> None:
    hidden, weight, labels = problem()
    trained = linear_cross_entropy(hidden, weight, labels, 0.1)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels, 0.1)
    assert [x.item() for x in evaluated] == [x.item() for x in trained]
    assert not evaluated.total.requires_grad
    assert not trained.cross_entropy.requires_grad


def test_a_frozen_weight_gets_no_gradient_and_changes_none() -> None:
    hidden, weight, labels = problem()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).total, hidden)[0]
    frozen = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels).total, hidden)[0]
    assert torch.equal(both, frozen)


def test_a_second_backward_pass_is_refused_rather_than_scaled_twice() -> None:
    hidden, weight, labels = problem()
    total = linear_cross_entropy(hidden, weight, labels).total
    total.backward()
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_a_kept_graph_gives_the_same_gradients_again() -> None:
    hidden, weight, labels = problem()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).total / 10, (hidden, weight))
    total = linear_cross_entropy(hidden, weight, labels).total / 10
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    again = (
        torch.autograd.grad(total, hidden, retain_graph=True),
        torch.autograd.grad(total, weight),
    )  # as zero-bubble pipelines split it
    assert all(torch.equal(x, wanted) for x, wanted in zip(first, once, strict=True))
    assert all(torch.equal(x, wanted) for (x,), wanted in zip(again, once, strict=True))


def test_gradients_are_scaled_in_place_unless_the_graph_is_kept() -> None:
    def made_by_backward(retain_graph: bool) -> int:
        hidden, weight, labels = problem()
        total = linear_cross_entropy(hidden, weight, labels).total
        with PeakMemory() as memory:
            gradients = torch.autograd.grad(total, (hidden, weight), retain_graph=retain_graph)
        assert len(gradients) == 2
        return memory.peak

    assert made_by_backward(retain_graph=False) < 100  # the gradient of the sum, a number
    assert made_by_backward(retain_graph=True) > 4 * (T + V) * D


def test_the_softmax_traces_without_a_graph_break_and_gives_the_same() -> None:
    hidden, weight, labels = problem()
    logits = (hidden @ weight.T).detach()
    eager, traced = logits.clone(), logits.clone()
    expected = softmax_gradient_(eager, labels, 0.1)
    compiled = torch.compile(softmax_gradient_, backend="aot_eager", fullgraph=True)(traced, labels, 0.1)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(compiled, expected)


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made under it that live at the same time. Works on meta tensors: full sizes at no cost."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self.live and key not in known:
                storage = x.untyped_storage()
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
                self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_of_full_size_loss() -> tuple[int, int]:
    """(peak bytes of forward and backward, bytes of the weight's gradient) at V=128,256, S=4,096, D=2,048 in bf16."""
    with torch.device("meta"):
        hidden = torch.empty(4096, 2048, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128_256, 2048, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(4096, dtype=torch.long)
    with PeakMemory() as memory:
        sums = linear_cross_entropy(hidden, weight, labels, 1e-4)
        torch.autograd.grad(sums.total, (hidden, weight))
    return memory.peak, weight.numel() * 2


def test_the_loss_peaks_below_15_percent_of_materialised_logits_and_gradient() -> None:
    materialised = 2 * 4 * 4096 * 128_256
    peak, weight_gradient = peak_of_full_size_loss()
    assert weight_gradient < peak < 0.15 * materialised  # everything it allocates, the weight's gradient included
    assert peak - weight_gradient < 0.03 * materialised


def test_a_loss_in_one_chunk_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNKS", 1)
    assert peak_of_full_size_loss()[0] > 0.3 * 2 * 4 * 4096 * 128_256
