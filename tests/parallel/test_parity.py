"""Every layout gives the numbers of one process; broken ones do not, by the same comparison. The table is `benchmarks/parity.py`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn

import parallel.build as build
from benchmarks.parity import BF16_LOSS_TOLERANCE, TIED, TOLERANCES, Case, Course, alone, cases, compare, on_rank
from parallel.engine import Microbatch
from parallel.engines.torch import TorchEngine
from parallel.layout import Layout
from parallel.pipeline import Tied
from parallel.shard import Sharded
from pretrain.train import build as program
from tests.workers import WorkerPool

STEPS = 3


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name.replace(" ", "_"))
def test_losses_gradients_and_parameters_are_those_of_one_process(case: Case, workers: WorkerPool) -> None:
    errors = compare(workers.run(on_rank, case.layout.world_size, case, STEPS, timeout=120), alone(case.words, STEPS))
    if case.is_bf16:
        assert errors["loss_error"] < BF16_LOSS_TOLERANCE
    else:
        assert {kind: error for kind, error in errors.items() if error > TOLERANCES[kind]} == {}


def no_reduction(patch: pytest.MonkeyPatch) -> None:
    """Data ranks keep their own gradients."""
    before = Sharded.before
    patch.setattr(Sharded, "before", lambda self, *, last: before(self, last=False))


def own_loss_scale(patch: pytest.MonkeyPatch) -> None:
    """Each data rank divides by its own number of targets."""
    patch.setattr(TorchEngine, "_count_targets", lambda self, given: torch.tensor(sum(m.n_targets for m in given)))


def wrong_head_order(patch: pytest.MonkeyPatch) -> None:
    """Tensor ranks hold each other's key heads, and nobody else's."""
    local_part = build.local_part

    def swapped(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
        mine, offset, shape = local_part(parameter)
        if shape == (32, 64):  # k_proj and v_proj: 4 heads of width 8
            offset = ((offset[0] + 16) % 32, offset[1])
        return mine, offset, shape

    patch.setattr(build, "local_part", swapped)


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """The last stage never steps."""
    if dist.get_rank() == dist.get_world_size() - 1:
        patch.setattr(TorchEngine, "loaded", lambda self: None)
        original = build.build_engine

        def frozen(blueprint: object, *args: object, **more: object) -> TorchEngine:
            engine = original(blueprint, *args, **more)
            engine._optimizer.inner.set_lr = lambda scale: None
            for group in (group for part in engine._optimizer.inner.parts for group in part.param_groups):
                group["lr"] = 0.0
            return engine

        patch.setattr("benchmarks.parity.build_engine", frozen)


def no_document_mask(patch: pytest.MonkeyPatch) -> None:
    """Context ranks attend across documents."""
    compute = program.compute

    def blind(model: nn.Module, received: torch.Tensor | None, microbatch: Microbatch, *, config: object) -> object:
        one = microbatch.document_ids * 0
        return compute(model, received, Microbatch(**{**vars(microbatch), "document_ids": one}), config=config)

    patch.setattr(program, "compute", blind)


def untied(patch: pytest.MonkeyPatch) -> None:
    """The embedding and the output projection keep their own gradients."""
    patch.setattr(Tied, "sum_gradients", lambda self: None)


def same_ranges(patch: pytest.MonkeyPatch) -> None:
    """Every context rank takes the tokens of the first one."""
    held = build.context.held
    patch.setattr(build.context, "held", lambda seq_len, layout, context_rank: held(seq_len, layout, 0))


Break = Callable[[pytest.MonkeyPatch], None]

BROKEN: list[tuple[Break, Layout, tuple[str, ...]]] = [
    (no_reduction, Layout(shard=2, zero=1), ()),
    (own_loss_scale, Layout(shard=2), ()),
    (wrong_head_order, Layout(tensor=2, sequence=True), ()),
    (stale_weights, Layout(pipeline=2), ()),
    (no_document_mask, Layout(context=2), ()),
    (no_document_mask, Layout(context=2, context_method="ulysses"), ()),
    (untied, Layout(pipeline=2), TIED),
    (same_ranges, Layout(context=2), ()),
]


@contextlib.contextmanager
def broken(how: Break) -> Iterator[None]:
    """Broken in this worker, and whole again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        how(patch)
        yield


def on_broken_rank(case: Case, steps: int, how: Break) -> Course | None:
    with broken(how):
        return on_rank(case, steps)


@pytest.mark.parametrize(("how", "layout", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", str(value)).replace(" ", "_"))
def test_a_broken_layout_is_noticed(how: Break, layout: Layout, words: tuple[str, ...], workers: WorkerPool) -> None:
    case = Case(layout, words, micro_batch=1)
    errors = compare(workers.run(on_broken_rank, layout.world_size, case, STEPS, how, timeout=120), alone(words, STEPS))
    assert max(errors[kind] / TOLERANCES[kind] for kind in errors) > 10


def test_the_comparison_sees_a_missing_parameter() -> None:
    reference = Course([1.0], [1.0], [{"a": torch.ones(2), "b": torch.ones(2)}], {"a": torch.ones(2), "b": torch.ones(2)})
    half = Course([1.0], [1.0], [{"a": torch.ones(2)}], {"a": torch.ones(2)})
    assert compare([half], reference)["parameter_error"] == float("inf")


def kinds(found: Sequence[Case]) -> set[frozenset[str]]:
    axes = ("pipeline", "replicate", "shard", "context", "tensor")
    return {frozenset(axis for axis in axes if getattr(case.layout, axis) > 1) for case in found}


def test_every_kind_and_every_pair_is_in_the_table() -> None:
    single = {frozenset({axis}) for axis in ("pipeline", "replicate", "shard", "context", "tensor")}
    pairs = {
        frozenset({a, b}) for a in ("shard", "tensor", "pipeline", "context") for b in ("shard", "tensor", "pipeline", "context") if a < b
    }
    assert single | pairs | {frozenset({"shard", "tensor", "pipeline"}), frozenset({"replicate", "shard"})} <= kinds(cases())
