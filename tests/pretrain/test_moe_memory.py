"""Experts: what a rank of any layout holds and sends, measured on tensors without memory, is what the formulas say."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from parallel.engines.torch.engine import TorchEngine
from parallel.layout import Layout
from parallel.simulate.memory import ACTIVATIONS, MemoryTracker, tensor_kinds
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.estimate import activations
from pretrain.estimate.communication import estimate_traffic
from pretrain.estimate.flops import parameter_count
from pretrain.estimate.fsdp_units import FsdpUnits
from pretrain.estimate.rank_memory import estimate_rank_memory
from pretrain.model.activation_terms import BlockActivations
from pretrain.setup.dry_run import Measured, _microbatch, measure, shorten_step
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import resolve_for_cluster

MOE = (
    *("model.architecture=moe", "model.moe.n_experts=8", "model.moe.d_ff=352", "model.n_layers=4"),
    *("model.d_model=256", "model.n_heads=8", "model.n_kv_heads=4", "model.d_ff=704", "model.vocab_size=2048"),
    *("data.seq_len=4096", "train.micro_batch_size=1", "train.batch_size=8", "train.precision=bf16"),
)
EXPERT_2 = "parallel.expert=2"
BOTH_2 = (EXPERT_2, "parallel.expert_tensor=2")
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one process": (
        1,
        0,
        (
            "train.batch_size=2",
            "model.moe.n_dense_layers=1",
            "model.moe.n_shared_experts=1",
            "model.moe.score_function=sigmoid",
        ),
    ),
    "zero 3": (4, 3, (EXPERT_2,)),
    "zero 2, experts on all ranks": (4, 0, ("parallel.expert=4", "parallel.zero=2")),
    "zero 1, 64 experts": (
        4,
        1,
        (EXPERT_2, "parallel.zero=1", "model.moe.n_experts=64", "model.moe.top_k=8", "model.moe.d_ff=64"),
    ),
    "replicas, expert tensor": (8, 3, (*BOTH_2, "parallel.replicate=2")),
    "tensor": (4, 3, ("parallel.tensor=2",)),
    "without sequence": (4, 3, (EXPERT_2, "parallel.tensor=2", "parallel.sequence=false", "train.recompute=full")),
    "context": (4, 1, (EXPERT_2, "parallel.context=2", "train.batch_size=4")),
    "1f1b": (4, 0, (EXPERT_2, "parallel.pipeline=2")),
    "zbv": (4, 0, (EXPERT_2, "parallel.pipeline=2", "parallel.schedule=zbv")),
    "selective": (4, 3, (EXPERT_2, "train.recompute=selective")),
    "large experts": (8, 0, (EXPERT_2, "model.moe.d_ff=4096", "data.seq_len=512")),
}
"""(processes, rank, settings)."""

STATIC_WITHIN, ACTIVATIONS_WITHIN, TRAFFIC_WITHIN = 1e-3, 0.07, 2e-3
SMALL = 16_384  # bytes: counts, and sums of norms and losses


def planned(case: str, *more: str) -> tuple[RunConfig, Layout, int]:
    world_size, rank, args = CASES[case]
    resolved = resolve_for_cluster(load(None, [*MOE, *args, *more]).config, world_size)
    return shorten_step(resolved.config, resolved.layout), resolved.layout, rank


@cache
def measured(case: str) -> Measured:
    return measure(*planned(case))


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_what_the_formulas_say(case: str) -> None:
    config, layout, rank = planned(case)
    held, most = estimate_rank_memory(config, layout, rank), measured(case).peak_by_kind
    assert most["parameters"] == pytest.approx(held.master_bytes, rel=STATIC_WITHIN)
    assert most["optimizer state"] == pytest.approx(held.optimizer_bytes, rel=STATIC_WITHIN)
    assert most["gradients"] == pytest.approx(held.gradient_bytes, rel=STATIC_WITHIN)
    if held.compute_weight_bytes:
        assert most["gathered parameters"] == pytest.approx(held.compute_weight_bytes, rel=STATIC_WITHIN)
    else:  # at its most for moments that the tracker may miss
        assert most["gathered parameters"] <= held.gathered_bytes
    assert most[ACTIVATIONS] > 0.2 * measured(case).peak
    assert held.activation_bytes == pytest.approx(most[ACTIVATIONS], rel=ACTIVATIONS_WITHIN)


@pytest.mark.parametrize("case", [case for case in CASES if case != "one process"])
def test_a_rank_sends_what_the_formulas_say(case: str) -> None:
    config, layout, rank = planned(case)
    expected = estimate_traffic(config, layout, rank)
    sent = {axis: {name: n for name, n in moved.items() if n > SMALL} for axis, moved in measured(case).sent.items()}
    sent.pop("all ranks", None)
    assert {axis: moved for axis, moved in sent.items() if moved} == {
        axis: pytest.approx({name: n for name, n in moved.items() if n > SMALL}, rel=TRAFFIC_WITHIN)
        for axis, moved in expected.items()
    }
    if layout.expert > 1:
        assert sent["expert"]["all-to-all"] > 0


@pytest.mark.parametrize(
    "args",
    [
        (EXPERT_2,),
        ("parallel.expert=8", "parallel.pipeline=2", "parallel.zero=3"),
        (*BOTH_2, "parallel.replicate=2"),
        ("model.moe.n_experts=6", "parallel.expert=2", "parallel.shard=16"),
        ("model.moe.n_experts=24", "parallel.shard=16"),
    ],
    ids=str,
)
def test_the_parameters_of_all_ranks_add_up_to_the_model(args: tuple[str, ...]) -> None:
    resolved = resolve_for_cluster(load(None, [*MOE, "train.batch_size=16", *args]).config, 16)
    config, layout = resolved.config, resolved.layout
    total = sum(estimate_rank_memory(config, layout, rank).n_parameters for rank in range(16))
    assert total == layout.replicate * parameter_count(config.model)


FORGOTTEN: dict[str, tuple[str, str]] = {
    "rows of the experts": ("zero 3", "expert_inputs"),
    "temporaries of their backward pass": ("selective", "backward_peak"),
    "outputs that selective recomputation keeps": ("selective", "expert_hidden"),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_without_one_of_its_terms_the_estimate_misses(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, field = FORGOTTEN[what]
    blocks = activations._blocks

    def forget(block: BlockActivations) -> BlockActivations:
        if field == "expert_inputs":
            return replace(block, kept=block.kept - block.expert_inputs)
        return replace(block, **{field: 0.0})

    monkeypatch.setattr(
        activations, "_blocks", lambda *given: {layer: forget(block) for layer, block in blocks(*given).items()}
    )
    estimate = estimate_rank_memory(*planned(case)).activation_bytes
    assert estimate < (1 - ACTIVATIONS_WITHIN) * measured(case).peak_by_kind[ACTIVATIONS]


def test_experts_counted_with_their_block_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    of: Callable[..., FsdpUnits] = FsdpUnits.of

    def together(*given: object) -> FsdpUnits:
        units = of(*given)
        return replace(units, block=units.block + units.experts, experts=0)

    monkeypatch.setattr(FsdpUnits, "of", together)
    estimate = estimate_rank_memory(*planned("large experts")).activation_bytes
    assert estimate > 1.2 * measured("large experts").peak_by_kind[ACTIVATIONS]


def test_a_real_step_peaks_at_the_estimate() -> None:
    """On tensors with memory, and with the uneven load of a router that has learned nothing."""
    config, layout, rank = planned("one process", "data.seq_len=512")
    config = config.model_copy(update={"train": config.train.model_copy(update={"attention": "sdpa"})})
    with MemoryTracker() as memory:
        engine = build_engine(config)
        assert isinstance(engine, TorchEngine)
        memory.watch(tensor_kinds(engine))
        routing = engine.train_step([_microbatch(config), _microbatch(config)], lr_scale=1.0).routing
    assert routing is not None
    assert estimate_rank_memory(config, layout, rank).activation_bytes == pytest.approx(
        memory.peak_by_kind[ACTIVATIONS], rel=0.1
    )
