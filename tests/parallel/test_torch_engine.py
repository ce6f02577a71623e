"""The native engine in one process: a step does not depend on the microbatches, and master weights are fp32."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.engine import EngineOptions, Microbatch
from parallel.engines.torch.build import build_single_process_engine
from parallel.engines.torch.engine import TorchEngine

B, S, V, D = 8, 16, 50, 32
IGNORED = -100


@dataclass(frozen=True)
class Loss:
    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor


class Model(nn.Module):
    """Two layers and a tied output. The engine needs only the named parameters of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return F.linear(x + self.down(F.silu(self.up(x))), self.embed.weight)


def compute_loss(model: nn.Module, received: Tensor | None, microbatch: Microbatch) -> Loss:
    assert received is None
    logits = model(microbatch.input_ids).float().flatten(0, 1)
    loss = F.cross_entropy(logits, microbatch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(loss, loss, torch.zeros(()))


class RecordingSGD:
    """SGD that keeps the gradients of the last step."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.named = dict(named)
        self.lr = 0.0
        self.steps = 0
        self.gradients: dict[str, Tensor] = {}

    def set_lr(self, scale: float) -> None:
        self.lr = scale

    def step(self) -> None:
        self.steps += 1
        self.gradients = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}
        with torch.no_grad():
            for name, gradient in self.gradients.items():
                self.named[name] -= self.lr * gradient

    def zero_grad(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {}


def engine(
    dtype: torch.dtype = torch.float32, max_grad_norm: float | None = None, loss: Callable[..., Loss] = compute_loss
) -> TorchEngine:
    torch.manual_seed(0)
    return build_single_process_engine(
        Model(), loss, lambda named: RecordingSGD(list(named)), EngineOptions(dtype, max_grad_norm), torch.device("cpu")
    )


def batch(uneven: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids and labels; if uneven, row i has 2i + 1 targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (B, S + 1), generator=generator)
    labels = ids[:, 1:].clone()
    if uneven:
        for row in range(B):
            labels[row, 2 * row + 1 :] = IGNORED
    return ids[:, :-1], labels


def split_batch(ids: Tensor, labels: Tensor, sizes: Sequence[int]) -> list[Microbatch]:
    assert sum(sizes) == B
    rows = torch.split(torch.arange(B), list(sizes))
    nothing = torch.zeros((0,), dtype=torch.int32)
    return [Microbatch(ids[r], labels[r], nothing, nothing, int((labels[r] != IGNORED).sum())) for r in rows]


SPLITS = [(8,), (4, 4), (1,) * 8, (3, 3, 2), (7, 1)]


@pytest.mark.parametrize("sizes", SPLITS[1:], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_gradients_loss_and_step_do_not_depend_on_the_microbatches(
    sizes: Sequence[int], dtype: torch.dtype, tolerance: float
) -> None:
    reference, parts = engine(dtype), engine(dtype)
    one, many = (e.train_step(split_batch(*batch(), c), 0.5) for e, c in ((reference, (8,)), (parts, sizes)))
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=tolerance)
    for name, gradient in reference._optimizer.gradients.items():
        assert distance(parts._optimizer.gradients[name], gradient) < tolerance
    for name, weight in reference.state()["model"].items():
        torch.testing.assert_close(parts.state()["model"][name], weight, rtol=0, atol=tolerance)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """512 equal microbatches give exactly the gradient of one. A sum in bf16 would stop growing at 256."""
    one = split_batch(*batch(), (8,))
    few, many = engine(torch.bfloat16), engine(torch.bfloat16)
    few.train_step(one, 0.0)
    many.train_step(one * 512, 0.0)
    for name, gradient in few._optimizer.gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(many._optimizer.gradients[name], gradient)
    expected = few._optimizer.gradients["up.weight"]
    in_bf16 = torch.zeros_like(expected, dtype=torch.bfloat16)
    for _ in range(512):
        in_bf16 += (expected / 512).bfloat16()
    assert distance(in_bf16.float(), expected) > 0.3


def test_the_loss_is_the_mean_over_all_targets_of_the_global_batch() -> None:
    """Row i has 2i + 1 targets, so the mean of the microbatches' means differs."""
    e, (ids, labels) = engine(), batch()
    with torch.no_grad():
        nll = F.cross_entropy(
            e.model(ids).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
        ).view(B, S)
    counts = (labels != IGNORED).sum(1)
    assert counts.tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    of_tokens, of_means = (nll.sum() / counts.sum()).item(), (nll.sum(1) / counts).mean().item()
    result = e.train_step(split_batch(ids, labels, (1,) * 8), 0.0)
    assert result.loss == pytest.approx(of_tokens, rel=1e-6)
    assert abs(of_means - of_tokens) > 1e-3


def test_a_mean_of_means_is_detected() -> None:
    def mean_of_microbatch(model: nn.Module, received: Tensor | None, microbatch: Microbatch) -> Loss:
        sums = compute_loss(model, received, microbatch)
        scaled = sums.total / microbatch.n_targets * 8
        return Loss(scaled, scaled, sums.z_loss)

    right, wrong = engine(), engine(loss=mean_of_microbatch)
    for e in (right, wrong):
        e.train_step(split_batch(*batch(), (1,) * 8), 0.0)
    assert distance(wrong._optimizer.gradients["up.weight"], right._optimizer.gradients["up.weight"]) > 0.1


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    e, (ids, labels) = engine(), batch()
    torch.manual_seed(0)
    model = Model()
    F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
    result = e.train_step(split_batch(ids, labels, (3, 3, 2)), 0.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(e._optimizer.gradients[name], parameter.grad, rtol=0, atol=1e-6)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)


def test_compute_weights_are_the_rounded_master_weights_after_every_step() -> None:
    e = engine(torch.bfloat16)
    for step in range(4):
        master_weights, copies = e.state()["model"], dict(e.model.named_parameters())
        assert master_weights.keys() == copies.keys()
        for name, master in master_weights.items():
            assert master.dtype == torch.float32
            assert torch.equal(copies[name], master.bfloat16())
        assert (master_weights["up.weight"] != copies["up.weight"].float()).any()  # master weights have more digits
        before = master_weights["up.weight"].clone()
        e.train_step(split_batch(*batch(), (4, 4)), 0.1 * (step + 1))
        assert not torch.equal(e.state()["model"]["up.weight"], before)
    assert all(parameter.grad is None for parameter in e.model.parameters())


def test_updates_below_the_precision_of_bf16_are_not_lost() -> None:
    e, microbatches = engine(torch.bfloat16), split_batch(*batch(), (8,))
    first = e.model.up.weight.clone()
    e.train_step(microbatches, 1e-5)
    assert (e.model.up.weight != first).float().mean() < 0.01
    for _ in range(300):
        e.train_step(microbatches, 1e-5)
    assert (e.model.up.weight != first).float().mean() > 0.3


def test_loaded_state_is_used_after_sync_compute_weights() -> None:
    e = engine(torch.bfloat16)
    with torch.no_grad():
        e.state()["model"]["up.bias"].fill_(1 / 3)
    assert e.model.up.bias[0].item() != pytest.approx(1 / 3, rel=1e-2)
    e.sync_compute_weights()
    assert torch.equal(e.model.up.bias, torch.full((2 * D,), 1 / 3).bfloat16())


def test_fp32_weights_exist_once() -> None:
    e = engine()
    pointers = {name: parameter.data_ptr() for name, parameter in e.model.named_parameters()}
    assert {name: tensor.data_ptr() for name, tensor in e.state()["model"].items()} == pointers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_clipping_scales_all_gradients_and_reports_the_norm_before(dtype: torch.dtype) -> None:
    free, clipped, loose = engine(dtype), engine(dtype, max_grad_norm=0.01), engine(dtype, max_grad_norm=1e6)
    results = [e.train_step(split_batch(*batch(), (4, 4)), 0.1) for e in (free, clipped, loose)]
    norm = results[0].grad_norm
    assert norm > 0.1
    assert [result.grad_norm for result in results] == [norm] * 3
    for name, gradient in free._optimizer.gradients.items():
        torch.testing.assert_close(clipped._optimizer.gradients[name], gradient * (0.01 / norm), rtol=1e-4, atol=0)
        assert torch.equal(loose._optimizer.gradients[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_nonfinite_step_is_reported_and_changes_nothing(dtype: torch.dtype, poison: str) -> None:
    """One microbatch of two is bad. A gradient can be infinite while the loss is finite: sqrt(0)."""
    sick = False

    def loss(model: nn.Module, received: Tensor | None, microbatch: Microbatch) -> Loss:
        sums = compute_loss(model, received, microbatch)
        if not sick or microbatch.n_targets > 20:
            return sums
        extra = torch.nan * sums.total if poison == "loss" else (model.up.weight * 0).float().norm().sqrt()
        return Loss(sums.total + extra, sums.cross_entropy + extra.detach(), sums.z_loss)

    e, healthy = engine(dtype, max_grad_norm=1.0, loss=loss), engine(dtype, max_grad_norm=1.0)
    for each in (e, healthy):
        each.train_step(split_batch(*batch(), (4, 4)), 0.1)
    before = [tensor.clone() for tensor in (*e.state()["model"].values(), *e.model.parameters())]
    sick = True
    result = e.train_step(split_batch(*batch(), (4, 4)), 0.1)
    assert not result.is_finite
    assert math.isfinite(result.loss) == (poison == "gradient")
    assert not math.isfinite(result.grad_norm)
    assert e._optimizer.steps == 1
    assert all(
        torch.equal(a, b) for a, b in zip(before, (*e.state()["model"].values(), *e.model.parameters()), strict=True)
    )
    sick = False  # nothing may be left in the gradients
    assert e.train_step(split_batch(*batch(), (4, 4)), 0.1) == healthy.train_step(split_batch(*batch(), (4, 4)), 0.1)


def test_a_step_uses_the_given_learning_rate() -> None:
    e = engine()
    before = e.state()["model"]["up.weight"].clone()
    e.train_step(split_batch(*batch(), (8,)), 0.25)
    moved = before - e.state()["model"]["up.weight"]
    torch.testing.assert_close(moved, 0.25 * e._optimizer.gradients["up.weight"], rtol=0, atol=1e-7)


def test_evaluation_sums_over_targets_and_changes_nothing() -> None:
    e, (ids, labels) = engine(), batch()
    before = [tensor.clone() for tensor in e.state()["model"].values()]
    loss, n_targets, _ = e.eval_step(split_batch(ids, labels, (5, 3)))
    assert n_targets == 64
    with torch.no_grad():
        reference = F.cross_entropy(
            e.model(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
    assert loss == pytest.approx(reference, rel=1e-6)
    assert all(parameter.grad is None for parameter in e.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, e.state()["model"].values(), strict=True))


def test_losses_of_many_microbatches_are_summed_in_fp64() -> None:
    """0.1 nats 20,000 times: a running sum in fp32 would be off by 1e-5."""
    many, tenth = 20_000, torch.tensor(0.1)

    def loss(model: nn.Module, received: Tensor | None, microbatch: Microbatch) -> Loss:
        return Loss(model.up.bias[0] * 0, tenth, tenth / 2)

    e, microbatches = engine(loss=loss), [Microbatch(*(torch.empty(0),) * 4, n_targets=1)] * many
    result = e.train_step(microbatches, 0.0)
    assert result.loss == pytest.approx(tenth.item(), rel=1e-12)
    assert result.z_loss == pytest.approx(tenth.item() / 2, rel=1e-12)
    assert e.eval_step(microbatches)[:2] == (pytest.approx(many * tenth.item(), rel=1e-12), many)
    naive = torch.zeros(())
    for _ in range(many):
        naive += tenth
    assert abs(naive.item() / (many * tenth.item()) - 1) > 1e-6


def test_a_batch_without_targets_changes_no_weight() -> None:
    e, (ids, labels) = engine(), batch()
    before = e.state()["model"]["up.weight"].clone()
    result = e.train_step(split_batch(ids, torch.full_like(labels, IGNORED), (4, 4)), 1.0)
    assert (result.loss, result.grad_norm) == (0.0, 0.0)
    assert torch.equal(e.state()["model"]["up.weight"], before)
