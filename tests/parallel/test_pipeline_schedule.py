"""Stages are balanced by cost, each has one rank, and impossible layouts are refused with a way out."""

from itertools import combinations, pairwise

import pytest

from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.pipeline.schedule import (
    STAGES_PER_RANK,
    Action,
    LayerCosts,
    assign_layers,
    bubble_fraction,
    check_pipeline,
    rank_of_stage,
    stages_of_rank,
)


def equal(n_layers: int, first: float = 0.0, last: float = 0.0) -> LayerCosts:
    return LayerCosts((1.0,) * n_layers, first, last)


def best(costs: LayerCosts, n_stages: int) -> float:
    """The largest stage cost of the best assignment, found by trying all."""
    n_layers = len(costs.layers)
    cuts = ((0, *inner, n_layers) for inner in combinations(range(1, n_layers), n_stages - 1))
    return min(max(costs.stage(range(a, b)) for a, b in pairwise(cut)) for cut in cuts)


COSTS = [
    *(equal(9, *ends) for ends in [(0, 0), (0, 2.5), (1.2, 0.4), (0.1, 7), (12, 12)]),
    LayerCosts((0.2, 0.2, 0.2, 1.4, 1.4, 1.4, 1.4, 1.4, 1.4), last=0.7),
    LayerCosts((0.5, 1.5, 0.5, 1.5, 0.5, 1.5, 0.5, 1.5, 0.5)),
]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_the_assignment_is_optimal(n_stages: int, costs: LayerCosts) -> None:
    ranges = assign_layers(costs, n_stages)
    assert [layer for layers in ranges for layer in layers] == list(range(9))
    assert len(ranges) == n_stages
    assert all(ranges)
    assert max(map(costs.stage, ranges)) == best(costs, n_stages)


@pytest.mark.parametrize("n_stages", range(1, 14))
@pytest.mark.parametrize("last", [0.0, 0.4, 1.0, 1.8, 2.5, 7.0])
def test_equal_layers_fill_the_cheapest_stage_one_by_one(n_stages: int, last: float) -> None:
    """The rule for models whose layers are all alike."""
    counts = [1] * n_stages
    for _ in range(13 - n_stages):
        of_stages = [count + last * (stage == n_stages - 1) for stage, count in enumerate(counts)]
        counts[min(range(n_stages), key=lambda stage: (of_stages[stage], -stage))] += 1
    assert [len(layers) for layers in assign_layers(equal(13, last=last), n_stages)] == counts


def test_remaining_layers_go_to_later_stages() -> None:
    assert assign_layers(equal(5), 4) == (range(1), range(1, 2), range(2, 3), range(3, 5))


def test_the_last_stage_has_fewer_layers_for_the_output_projection() -> None:
    assert [len(layers) for layers in assign_layers(equal(126, 0.1, 1.8), 16)] == [8] * 15 + [6]


def test_an_assignment_that_ignores_what_differs_is_detected() -> None:
    for costs in (equal(8, last=2.5), LayerCosts((0.2, 0.2, 0.2, 0.2, 1.8, 1.8, 1.8, 1.8))):
        assert max(map(costs.stage, assign_layers(equal(8), 4))) > best(costs, 4)


@pytest.mark.parametrize(("schedule", "v"), [("1f1b", 1), ("interleaved", 3), ("zbv", 2)])
def test_every_stage_has_one_rank(schedule: str, v: int) -> None:
    layout = Layout(pipeline=4, schedule=schedule, stages_per_rank=v)
    held = {stage: rank for rank in range(4) for stage in stages_of_rank(rank, layout)}
    assert held == {stage: rank_of_stage(stage, layout) for stage in range(layout.n_stages)}


def test_a_rank_of_a_v_holds_the_first_and_the_last_stage() -> None:
    assert stages_of_rank(0, Layout(pipeline=4, schedule="zbv", stages_per_rank=2)) == (0, 7)


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
def test_one_rank_without_a_pipeline_holds_one_stage(schedule: str) -> None:
    assert stages_of_rank(0, Layout(schedule=schedule)) == (0,)


REFUSED = {
    "microbatches": (
        Layout(pipeline=4),
        8,
        3,
        "parallel.pipeline=4 needs as many .* train.batch_size .* train.micro_batch_size .* at most 3$",
    ),
    "layers": (
        Layout(pipeline=4),
        3,
        8,
        "parallel.pipeline=4 .* is 4 stages, more than model.n_layers=3; use a parallel.pipeline of at most 3$",
    ),
    "more stages than layers on one rank": (
        Layout(pipeline=2, schedule="interleaved", stages_per_rank=9),
        8,
        8,
        "18 stages, .*; lower parallel.stages_per_rank$",
    ),
    "rounds": (
        Layout(pipeline=4, schedule="interleaved", stages_per_rank=2),
        8,
        9,
        "parallel.schedule=interleaved .* the 9 of .* train.batch_size .* to have 10$",
    ),
    "v": (
        Layout(pipeline=2, schedule="zbv", stages_per_rank=3, zero=2),
        8,
        8,
        "parallel.stages_per_rank=3 .* parallel.schedule=zbv, which wants 2;",
    ),
    "one": (
        Layout(pipeline=2, stages_per_rank=2),
        8,
        8,
        "parallel.stages_per_rank=2 .* parallel.schedule=1f1b, which wants 1;",
    ),
    "several": (
        Layout(pipeline=2, schedule="interleaved"),
        8,
        8,
        "parallel.stages_per_rank=1 .*=interleaved, which wants 2 or more;",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_pipeline_is_refused_in_one_line(case: str) -> None:
    layout, n_layers, n_microbatches, line = REFUSED[case]
    with pytest.raises(LayoutError, match=line) as error:
        check_pipeline(layout, n_layers, n_microbatches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "n_layers", "n_microbatches"),
    [
        (Layout(), 1, 1),
        (Layout(pipeline=4), 4, 4),
        (Layout(pipeline=4, schedule="gpipe"), 5, 7),
        (Layout(pipeline=4, schedule="interleaved", stages_per_rank=2), 8, 10),
        (Layout(pipeline=4, schedule="zbv", stages_per_rank=2), 8, 5),
    ],
    ids=str,
)
def test_a_possible_pipeline_is_accepted(layout: Layout, n_layers: int, n_microbatches: int) -> None:
    check_pipeline(layout, n_layers, n_microbatches)


def test_more_stages_than_layers_cannot_be_assigned() -> None:
    with pytest.raises(LayoutError, match=r"model\.n_layers=3 cannot fill 4 stages"):
        assign_layers(equal(3), 4)


def test_a_slow_stage_adds_bubble() -> None:
    orders = {rank: [Action("forward", rank, i) for i in range(4)] for rank in range(2)}
    assert bubble_fraction(orders, [1, 1]) == pytest.approx(1 - 8 / 10)
    assert bubble_fraction(orders, [1, 3]) == pytest.approx(1 - 16 / 26)


def test_a_deadlock_is_detected() -> None:
    orders = {
        0: [Action("backward", 0, 0), Action("forward", 0, 0)],
        1: [Action("forward", 1, 0), Action("backward", 1, 0)],
    }
    with pytest.raises(ValueError, match="no rank can go on"):
        bubble_fraction(orders, [1, 1])
