"""Every layout matches one process, and broken layouts do not. `benchmarks.parity` makes the table."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager  # no public name

import parallel.fsdp
import parallel.gradients
from benchmarks.parity.cases import BIAS, LARGE, MOE, SHARED, TIED, TOLERANCES, Case, all_cases
from benchmarks.parity.compare import TrainingTrace, compare, train_case, train_reference
from parallel.dispatch import AllToAllDispatcher
from parallel.engine import Microbatch
from parallel.engines.torch import build, rank_model
from parallel.engines.torch.engine import TorchEngine
from parallel.layout import Layout
from parallel.pipeline.tied_embedding import TiedEmbedding
from parallel.pipeline.zero_bubble import ZeroBubbleBackward
from pretrain.model.moe.router import Router
from pretrain.optim.build import Optimizers
from pretrain.setup import engine as program
from tests.workers import WorkerPool

STEPS = 3


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name.replace(" ", "_"))
def test_losses_gradients_and_parameters_match_one_process(case: Case, workers: WorkerPool) -> None:
    steps = steps_of(case.settings)
    errors = compare(
        workers.run(train_case, case.layout.world_size, case, steps, timeout=120), train_reference(case.settings, steps)
    )
    assert {kind: error for kind, error in errors.items() if error > case.tolerances.get(kind, float("inf"))} == {}


def steps_of(args: tuple[str, ...]) -> int:
    """One step suffices for the norm of large tensors, and takes a second. Biases of experts need more."""
    return 1 if args == LARGE else 5 if args == BIAS else STEPS


def no_reduction(patch: pytest.MonkeyPatch) -> None:
    """Each data rank keeps its own gradients, of all parameters."""
    patch.setattr(parallel.fsdp, "data_mesh", lambda mesh, layout: mesh["tensor"])


def own_loss_scale(patch: pytest.MonkeyPatch) -> None:
    """Each data rank divides by its own number of targets."""
    patch.setattr(
        TorchEngine,
        "_count_targets_and_tokens",
        lambda self, given: torch.tensor([sum(m.n_targets for m in given), sum(m.n_tokens for m in given)]),
    )


def wrong_head_order(patch: pytest.MonkeyPatch) -> None:
    """Tensor ranks exchange their key and value heads."""
    local_shard = build.local_shard

    def swapped(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
        shard, offset, shape = local_shard(parameter)
        if shape == (32, 64):  # k_proj and v_proj: 4 heads of width 8
            offset = ((offset[0] + 16) % 32, offset[1])
        return shard, offset, shape

    patch.setattr(build, "local_shard", swapped)


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """The last stage never steps."""
    if dist.get_rank() == dist.get_world_size() - 1:
        patch.setattr(Optimizers, "step", lambda self: None)


def no_document_mask(patch: pytest.MonkeyPatch) -> None:
    """Context ranks attend across documents."""
    forward_step = program.forward_step

    def blind(model: nn.Module, received: torch.Tensor | None, microbatch: Microbatch, **settings: float) -> object:
        one = microbatch.document_ids * 0
        return forward_step(model, received, replace(microbatch, document_ids=one), **settings)

    patch.setattr(program, "forward_step", blind)


def untied(patch: pytest.MonkeyPatch) -> None:
    """The embedding and the output projection keep their own gradients."""
    patch.setattr(TiedEmbedding, "sum_gradients", lambda self: None)


def no_deferred_gradients(patch: pytest.MonkeyPatch) -> None:
    """Zero bubble drops the deferred weight gradients."""
    take = ZeroBubbleBackward.take_weight_gradients
    patch.setattr(
        ZeroBubbleBackward, "take_weight_gradients", lambda self, stage: [take(self, stage), lambda: None][-1]
    )


def naive_norm(patch: pytest.MonkeyPatch) -> None:
    """Sum the squares in fp32, as a CPU does by default."""
    norm = torch._foreach_norm
    patch.setattr(parallel.gradients, "_pieces", lambda gradient: (gradient,))
    patch.setattr(torch, "_foreach_norm", lambda tensors, *_, **__: norm(tensors))


def same_ranges(patch: pytest.MonkeyPatch) -> None:
    """Every context rank takes the tokens of the first one."""
    local_tokens = rank_model.context.local_tokens
    patch.setattr(
        rank_model.context, "local_tokens", lambda seq_len, layout, context_rank: local_tokens(seq_len, layout, 0)
    )


def unreduced_experts(patch: pytest.MonkeyPatch) -> None:
    """Each rank keeps its own gradients of experts that other ranks hold too."""
    make = build.build_expert_mesh
    patch.setattr(
        build,
        "build_expert_mesh",
        lambda *given: (mesh := make(*given)) and replace(mesh, fsdp=mesh.axes["expert_tensor"]),
    )


def load_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    """Only the first rank counts the load of experts."""
    if dist.get_rank() > 0:
        take_sums = Router.take_sums
        patch.setattr(Router, "take_sums", lambda self: take_sums(self) * 0)


def wrong_order(patch: pytest.MonkeyPatch) -> None:
    """Results of experts go back in the order of the experts, not in that in which the tokens came."""
    combine = AllToAllDispatcher.combine
    patch.setattr(AllToAllDispatcher, "combine", lambda self, y, sent: combine(self, y, sent._replace(order_X=None)))


def experts_twice(patch: pytest.MonkeyPatch) -> None:
    """The norm counts experts once for every two ranks."""
    n_holders = parallel.gradients._n_holders
    patch.setattr(
        parallel.gradients,
        "_n_holders",
        lambda weight, layout: n_holders(weight, layout) / (2 if weight.ndim == 3 else 1),
    )


def to_two_experts(patch: pytest.MonkeyPatch) -> None:
    """Every token goes to experts 0 and 1."""
    patch.setattr(
        Router, "_choose", lambda self, scores: torch.arange(2, device=scores.device).expand(*scores.shape[:-1], 2)
    )


def trace_only(patch: pytest.MonkeyPatch) -> None:
    """torch.compile without code generation, which takes a minute per layout on a CPU."""
    compile = torch.compile
    patch.setattr(torch, "compile", lambda *given, **more: compile(*given, **more, backend="aot_eager"))


ZERO_BUBBLE = Layout(pipeline=2, schedule="zbv", stages_per_rank=2)

Break = Callable[[pytest.MonkeyPatch], None]

BROKEN: list[tuple[Break, Layout, tuple[str, ...]]] = [
    (no_reduction, Layout(shard=2), ()),
    (own_loss_scale, Layout(shard=2), ()),
    (wrong_head_order, Layout(tensor=2, sequence=True), ()),
    (stale_weights, Layout(pipeline=2), ()),
    (no_document_mask, Layout(context=2), ()),
    (no_document_mask, Layout(context=2, context_method="ulysses"), ()),
    (untied, Layout(pipeline=2), TIED),
    (no_deferred_gradients, ZERO_BUBBLE, ()),
    (same_ranges, Layout(context=2), ()),
    (naive_norm, Layout(shard=2), LARGE),
    (unreduced_experts, Layout(shard=4, expert=2), MOE),
    (load_of_one_rank, Layout(shard=2, expert=2), MOE),
    (wrong_order, Layout(shard=2, expert=2), MOE),
    (experts_twice, Layout(shard=2, expert=2), MOE),
]


@contextlib.contextmanager
def changed(how: Break) -> Iterator[None]:
    """Break this worker inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        how(patch)
        yield


def on_changed_rank(case: Case, steps: int, how: Break) -> TrainingTrace | None:
    with changed(how):
        return train_case(case, steps)


def count_compiled_operations(case: Case) -> int:
    """Operations in all graphs of a compiled step, including those in recomputed regions."""
    found = 0

    def count(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., object]:
        nonlocal found
        found += sum(len(part.graph.nodes) for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        return aot_eager(graph, inputs)

    compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *given, **more: compile(*given, **more, backend=count))
        torch.compiler.reset()
        train_case(case, 1)
    return found


COMPILED = [
    (Layout(shard=2), ()),
    (Layout(shard=2, zero=2), ("train.recompute=full",)),
    (Layout(shard=2, tensor=2, sequence=True), ("train.recompute=selective",)),
    (Layout(context=2), ("train.recompute=selective",)),
    (Layout(context=2, context_method="ulysses"), ()),
    (Layout(pipeline=2, zero=2), ()),
    (ZERO_BUBBLE, ()),
    (ZERO_BUBBLE, ("train.recompute=full",)),
    (Layout(shard=2, expert=2), SHARED),
    (Layout(tensor=2, expert=2), (*MOE, "train.recompute=full")),
]


@pytest.mark.parametrize(("layout", "args"), COMPILED, ids=str)
def test_compiled_blocks_match(layout: Layout, args: tuple[str, ...], workers: WorkerPool) -> None:
    model = tuple(setting for setting in args if setting.startswith("model."))
    case = Case(layout, model, layout_settings=("train.compile=true", *args), micro_batch=1)
    errors = compare(
        workers.run(on_changed_rank, layout.world_size, case, STEPS, trace_only, timeout=120),
        train_reference(model, STEPS),
    )
    assert {kind: error for kind, error in errors.items() if error > TOLERANCES[kind]} == {}


@pytest.mark.parametrize(
    ("layout", "mode"), [(Layout(shard=2), "full"), (Layout(shard=2), "selective"), (ZERO_BUBBLE, "full")], ids=str
)
def test_recomputed_blocks_are_compiled(layout: Layout, mode: str, workers: WorkerPool) -> None:
    plain, recomputing = (
        workers.run(
            count_compiled_operations,
            2,
            Case(layout, layout_settings=("train.compile=true", *args), micro_batch=1),
            timeout=120,
        )[0]
        for args in ((), (f"train.recompute={mode}",))
    )
    assert plain > 100
    assert recomputing > 0.9 * plain


@pytest.mark.parametrize(
    ("how", "layout", "args"), BROKEN, ids=lambda value: getattr(value, "__name__", str(value)).replace(" ", "_")
)
def test_a_broken_layout_is_detected(how: Break, layout: Layout, args: tuple[str, ...], workers: WorkerPool) -> None:
    case, steps = Case(layout, args, micro_batch=4 if args == LARGE else 1), steps_of(args)
    errors = compare(
        workers.run(on_changed_rank, layout.world_size, case, steps, how, timeout=120), train_reference(args, steps)
    )
    # Not by the parameters, which may be what is broken, but by what the passes computed.
    del errors["parameter_error"]
    assert max(error / (TOLERANCES[kind] or 1e-5) for kind, error in errors.items()) > 10


@pytest.mark.parametrize("layout", [Layout(shard=4, expert=4), Layout(tensor=2, expert=2, expert_tensor=1)], ids=str)
def test_ranks_whose_experts_get_no_tokens_match(layout: Layout, workers: WorkerPool) -> None:
    case = Case(layout, MOE, micro_batch=1)
    traces = workers.run(on_changed_rank, layout.world_size, case, 2, to_two_experts, timeout=120)
    with changed(to_two_experts):
        expected = train_reference.__wrapped__(MOE, 2)
    errors = compare(traces, expected)
    assert {kind: error for kind, error in errors.items() if error > TOLERANCES[kind]} == {}
    assert expected.routing[0][0, :8].tolist() == [512, 512, 0, 0, 0, 0, 0, 0]


def test_a_missing_parameter_is_detected() -> None:
    reference = TrainingTrace(
        [1.0], [1.0], [{"a": torch.ones(2), "b": torch.ones(2)}], {"a": torch.ones(2), "b": torch.ones(2)}
    )
    half = TrainingTrace([1.0], [1.0], [{"a": torch.ones(2)}], {"a": torch.ones(2)})
    assert compare([half], reference)["parameter_error"] == float("inf")


def kinds(found: Sequence[Case]) -> set[frozenset[str]]:
    axes = ("pipeline", "replicate", "shard", "context", "tensor")
    return {frozenset(axis for axis in axes if getattr(case.layout, axis) > 1) for case in found}


def test_every_kind_and_every_pair_of_parallelism_is_tested() -> None:
    single = {frozenset({axis}) for axis in ("pipeline", "replicate", "shard", "context", "tensor")}
    pairs = {
        frozenset({a, b})
        for a in ("shard", "tensor", "pipeline", "context")
        for b in ("shard", "tensor", "pipeline", "context")
        if a < b
    }
    assert single | pairs | {frozenset({"shard", "tensor", "pipeline"}), frozenset({"replicate", "shard"})} <= kinds(
        all_cases()
    )
