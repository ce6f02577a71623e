"""A training step of a model with experts: what it counts, and how it balances the load, however the batch is cut."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from moe_reference import route, shares
from torch import Tensor

from parallel.engine import Microbatch, StepResult
from parallel.engines.torch.engine import TorchEngine
from pretrain.checkpoint.state_dict import flatten_state_dict
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.model.moe.router import Router
from pretrain.model.moe.rows import PADDING
from pretrain.setup.engine import build_engine

E, K, L, D = 6, 2, 2, 32
MODEL = (
    *(f"model.n_layers={L}", f"model.d_model={D}", "model.n_heads=2", "model.n_kv_heads=2", "model.d_ff=48"),
    *("model.vocab_size=64", "model.init_std=0.3", "model.architecture=moe", f"model.moe.n_experts={E}"),
    *(f"model.moe.top_k={K}", "model.moe.d_ff=24", "train.device=cpu", "train.precision=fp32", "train.compile=false"),
    *("train.attention=sdpa", "train.steps=100", "optim.warmup=0", "optim.lr=1e-2", "optim.max_grad_norm=null"),
    *("data.seq_len=16", "optim.decay=1"),
)
ROWS, S = 6, 16


def make_engine(*args: str) -> TorchEngine:
    return cast(TorchEngine, build_engine(make_config(*args)))


def make_config(*args: str) -> RunConfig:
    return load(None, [*MODEL, *args]).config


def microbatches(size: int, step: int = 0, rows: int = ROWS) -> list[Microbatch]:
    """The rows of a step's global batch in microbatches of `size`, the last one filled up with padding rows."""
    ids = torch.randint(64, (rows, S + 1), generator=torch.Generator().manual_seed(step))
    missing = -rows % size
    ids = torch.cat((ids, torch.zeros(missing, S + 1, dtype=torch.int64)))
    labels = ids[:, 1:].clone()
    labels[rows:] = -100
    row_ids = torch.cat((torch.arange(rows) + step * rows, torch.full((missing,), PADDING)))
    positions = torch.arange(S).expand(len(ids), -1)
    parts = (part.split(size) for part in (ids[:, :-1], labels, positions, torch.zeros_like(positions), row_ids))
    return [Microbatch(i, y, p, d, int((y >= 0).sum()), row_ids=r) for i, y, p, d, r in zip(*parts, strict=True)]


def routers(engine: TorchEngine) -> list[Router]:
    return [module for module in engine.model.modules() if isinstance(module, Router)]


def step_with_gradients(engine: TorchEngine, batches: Sequence[Microbatch]) -> tuple[StepResult, dict[str, Tensor]]:
    """Take a step. The gradients are seen where the optimizer gets them."""
    gradients: dict[str, Tensor] = {}
    step = engine._optimizer.step

    def spy() -> None:
        gradients.update({name: p.grad.clone() for name, p in engine.master_weights.items() if p.grad is not None})
        step()

    object.__setattr__(engine._optimizer, "step", spy)  # a frozen dataclass
    return engine.train_step(batches, 1.0), gradients


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


SCOPES = {
    "sequence": ("model.moe.aux_loss_scope=sequence",),
    "global batch": (),
    "bias": ("model.moe.aux_loss=0", "model.moe.expert_bias=true"),
    "capacity": ("model.moe.capacity_factor=0.7", "model.moe.aux_loss_scope=sequence"),
    "noise": ("model.moe.input_jitter=0.1", "model.moe.expert_dropout=0.2"),
}
HEAVY = ("model.moe.aux_loss=1", "model.moe.router_z_loss=0.1")
"""So heavy that a mistake in the losses shows in the gradients."""


def two_steps(size: int, *args: str) -> tuple[StepResult, dict[str, Tensor], list[Tensor]]:
    """The second step, whose load of the global batch is not even any more; and the saved buffers after it."""
    engine = make_engine(*HEAVY, *args)
    engine.train_step(microbatches(size), 1.0)
    result, gradients = step_with_gradients(engine, microbatches(size, step=1))
    return result, gradients, [x for router in routers(engine) for x in router.saved_buffers.values()]


@pytest.mark.parametrize("size", [1, 4], ids=lambda size: f"microbatches of {size}")
@pytest.mark.parametrize("scope", SCOPES)
def test_losses_gradients_and_load_do_not_depend_on_microbatches_or_padding(scope: str, size: int) -> None:
    one, one_gradients, one_buffers = two_steps(ROWS, *SCOPES[scope])
    many, many_gradients, many_buffers = two_steps(size, *SCOPES[scope])
    assert one.routing is not None
    assert many.routing is not None
    assert torch.equal(many.routing[:, :E], one.routing[:, :E])
    torch.testing.assert_close(many.routing, one.routing, rtol=1e-5, atol=1e-6)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    for name, gradient in one_gradients.items():
        assert distance(many_gradients[name], gradient) < 2e-5, name
    assert all(torch.equal(many, one) for many, one in zip(many_buffers, one_buffers, strict=True))
    assert one.routing[:, :E].sum(1).tolist() == [ROWS * S * K] * L


def test_the_loss_of_a_microbatch_depends_on_its_size() -> None:
    """The negative control: its load is counted over other tokens."""
    (one, gradients, _), (many, others, _) = (two_steps(n, "model.moe.aux_loss_scope=microbatch") for n in (ROWS, 2))
    assert one.routing is not None
    assert many.routing is not None
    assert abs(many.routing[0, E] / one.routing[0, E] - 1) > 1e-3
    assert distance(others["model.layers.0.mlp.gate.weight"], gradients["model.layers.0.mlp.gate.weight"]) > 1e-2


def direct_sums(engine: TorchEngine, batches: Sequence[Microbatch]) -> Tensor:
    """[L, E + 4] of the tokens that count, from what each router reads and a loop over tokens."""
    seen: list[list[Tensor]] = [[] for _ in range(L)]
    handles = [
        router.register_forward_pre_hook(lambda _, given, seen=seen[i]: seen.append(given[0].detach()))
        for i, router in enumerate(routers(engine))
    ]
    with torch.no_grad():
        engine._runner.evaluate(batches)
    for handle in handles:
        handle.remove()
    sums = torch.zeros(L, E + 4, dtype=torch.float64)
    for i, router in enumerate(routers(engine)):
        router.take_sums()
        moe, load_E = router.config, router.expert_load.double()
        for x_BSD, batch in zip(seen[i], batches, strict=True):
            assert batch.row_ids is not None
            for x_SD in x_BSD[batch.row_ids >= 0].double():
                logits_SE = x_SD @ router.weight.detach().double().T
                counts: Counter[int] = Counter()
                for logits_E in logits_SE:
                    counts.update(route(logits_E, moe, [0.0] * E)[0])
                    share_E = shares(logits_E, moe)
                    sums[i, E] += moe.aux_loss * E * (load_E * share_E).sum()
                    sums[i, E + 1] += moe.router_z_loss * logits_E.logsumexp(0) ** 2
                    sums[i, E + 2] -= (share_E * share_E.log()).sum()
                sums[i, :E] += torch.tensor([counts[e] for e in range(E)])
                if moe.capacity_factor is not None:
                    room = -(-moe.capacity_factor * K * S // E)
                    sums[i, E + 3] += sum(max(count - room, 0) for count in counts.values())
    return sums


@pytest.mark.parametrize(
    "more", [(), ("train.recompute=full",), ("train.recompute=selective",), ("train.compile=true",)], ids=str
)
def test_statistics_are_counted_once_and_without_padding(
    more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **rest: compile(*given, **rest, backend="aot_eager"))
    torch.compiler.reset()
    settings = (*HEAVY, "model.moe.capacity_factor=0.75")
    batches = microbatches(4)
    expected = direct_sums(make_engine(*settings), batches)
    assert (expected > 0).all()
    engine = make_engine(*settings, *more)
    evaluated, trained = engine.eval_step(batches).routing, engine.train_step(batches, 1.0).routing
    for routing in (evaluated, trained):
        assert routing is not None
        assert torch.equal(routing[:, :E], expected[:, :E])
        assert torch.equal(routing[:, E + 3], expected[:, E + 3])
        torch.testing.assert_close(routing, expected, rtol=1e-5, atol=1e-5)


def test_without_row_ids_padding_would_count() -> None:
    batches = [replace(batch, row_ids=None) for batch in microbatches(4)]
    routing = make_engine().train_step(batches, 1.0).routing
    assert routing is not None
    assert routing[0, :E].sum() == (ROWS + 2) * S * K


def test_passes_between_steps_do_not_count() -> None:
    """Such as those that generate a sample."""
    engine, undisturbed = make_engine(), make_engine()
    with torch.no_grad():
        engine._runner.evaluate(microbatches(2, step=5))
    found, expected = (e.train_step(microbatches(2), 1.0).routing for e in (engine, undisturbed))
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_the_bias_follows_the_sign_of_the_load_error() -> None:
    """Algorithm 1 of arXiv:2408.15664, by hand over five steps: exact, in units of the rate."""
    engine = make_engine("model.moe.expert_bias=true", "model.moe.bias_update_rate=0.125", "model.moe.aux_loss=0")
    by_hand = [[0] * E for _ in range(L)]
    for step in range(5):
        routing = engine.train_step(microbatches(2, step), 1.0).routing
        assert routing is not None
        for biases, counts in zip(by_hand, routing[:, :E].tolist(), strict=True):
            for e, count in enumerate(counts):
                biases[e] += (count * E < ROWS * S * K) - (count * E > ROWS * S * K)
        for router, biases in zip(routers(engine), by_hand, strict=True):
            assert router.e_score_correction_bias.tolist() == [0.125 * b for b in biases]
    assert any(abs(b) >= 3 for biases in by_hand for b in biases)


def test_the_load_is_that_of_the_step_before() -> None:
    engine = make_engine()
    for step in range(2):
        routing = engine.train_step(microbatches(2, step), 1.0).routing
        assert routing is not None
        for router, counts in zip(routers(engine), routing[:, :E], strict=True):
            assert torch.equal(router.expert_load, (counts / (ROWS * S * K)).float())


@pytest.mark.parametrize("missing", ["", "expert_load", "e_score_correction_bias"])
def test_the_next_step_needs_the_saved_load_and_bias(missing: str) -> None:
    bias = ("model.moe.expert_bias=true", "model.moe.bias_update_rate=0.1")
    engine, restored = (make_engine(*HEAVY, *bias) for _ in range(2))
    engine.train_step(microbatches(2), 1.0)
    saved, target = (flatten_state_dict(e.state()) for e in (engine, restored))
    with torch.no_grad():
        for name, tensor in target.items():
            if not missing or not name.endswith(missing):
                tensor.copy_(saved[name])
    (one, one_gradients), (two, two_gradients) = (
        step_with_gradients(e, microbatches(2, 1)) for e in (engine, restored)
    )
    same = all(torch.equal(two_gradients[name], gradient) for name, gradient in one_gradients.items())
    assert same is not bool(missing)
    assert one.routing is not None
    assert two.routing is not None
    assert torch.equal(one.routing, two.routing) is not bool(missing)


def test_a_step_that_is_not_finite_balances_nothing() -> None:
    engine = make_engine("model.moe.expert_bias=true")
    engine.train_step(microbatches(2), 1.0)
    before = [x.clone() for router in routers(engine) for x in router.saved_buffers.values()]
    assert any(x.any() for x in before)
    with torch.no_grad():
        engine.master_weights["model.norm.weight"][0] = float("nan")
    assert not engine.train_step(microbatches(2, 1), 1.0).is_finite
    after = [x for router in routers(engine) for x in router.saved_buffers.values()]
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))


@pytest.mark.parametrize("more", [(), ("model.moe.capacity_factor=1", "model.moe.expert_bias=true")], ids=str)
def test_a_block_with_experts_compiles_to_one_graph(more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    compile, graphs = torch.compile, []

    def count(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *given, **rest: compile(*given, **rest, backend=count, fullgraph=True))
    torch.compiler.reset()
    engine = make_engine("train.compile=true", "model.n_layers=1", *more)
    for step in range(3):
        engine.train_step(microbatches(2, step), 1.0)
    assert len(graphs) == 3  # the block, the norm, and the softmax of the loss
