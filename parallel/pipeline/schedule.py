"""Which layers a pipeline stage holds, which stages a rank holds, how long ranks idle. Imports no torch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from parallel.errors import LayoutError
from parallel.layout import Layout

STAGES_PER_RANK = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "interleaved_zero_bubble": (2, None),
    "zbv": (2, 2),
}
"""Smallest and largest number of stages per rank, by schedule."""

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")
"""Schedules that compute the gradients of weights separately from those of activations, and later."""


class LayerCosts(NamedTuple):
    """Time that the parts of a model take, in any unit. Pipeline stages are balanced with it."""

    layers: tuple[float, ...]
    """Of each layer."""
    first: float = 0.0
    """What the embedding adds to the first stage."""
    last: float = 0.0
    """What the final norm, the output projection and the loss add to the last stage."""

    def stage(self, layers: range) -> float:
        """Time of a stage with these layers."""
        ends = self.first * (layers.start == 0) + self.last * (layers.stop == len(self.layers))
        return sum(self.layers[layers.start : layers.stop]) + ends


@lru_cache(maxsize=256)
def assign_layers(costs: LayerCosts, n_stages: int) -> tuple[range, ...]:
    """Assign consecutive layers to stages so that the most expensive stage is as cheap as possible.

    Among such assignments it takes the most even one, with the smallest sum of squares. If several are as even, later
    stages get more layers: under 1F1B they keep fewer microbatches.

    Args:
        costs: of the model.
        n_stages: of the pipeline.

    Raises:
        LayoutError: there are more stages than layers.

    >>> assign_layers(LayerCosts((1.0,) * 6, last=1.5), 3)
    (range(0, 2), range(2, 5), range(5, 6))
    >>> assign_layers(LayerCosts((3.0, 1.0, 1.0, 1.0)), 2)
    (range(0, 1), range(1, 4))
    """
    n_layers = len(costs.layers)
    if n_stages > n_layers:
        raise LayoutError(
            f"model.n_layers={n_layers} cannot fill {n_stages} stages (parallel.pipeline * parallel.stages_per_rank); "
            f"use at most {n_layers} stages, or a smaller parallel.pipeline"
        )
    ranges = [range(start, stop) for start in range(n_layers) for stop in range(start + 1, n_layers + 1)]
    cost_of = {(layers.start, layers.stop): costs.stage(layers) for layers in ranges}
    smallest, _ = _cut(cost_of, n_layers, n_stages, max)
    even = {cut: cost**2 for cut, cost in cost_of.items() if cost <= smallest}
    _, cuts = _cut(even, n_layers, n_stages, operator.add)
    return tuple(range(start, stop) for start, stop in pairwise(cuts))


def _cut(
    costs: Mapping[tuple[int, int], float], n_layers: int, n_stages: int, add: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Cut the layers into stages with the smallest total cost.

    Args:
        costs: of the stages that are allowed, by (first layer, layer behind the last).
        n_layers: to cut.
        n_stages: to make.
        add: total of some stages, and the cost of the next -> total.

    Returns:
        (total, cuts): the layers of stage i are those from cuts[i] to cuts[i + 1].
    """
    # {number of layers in the stages so far: the best total and its cuts}
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(1, n_stages + 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for stop in range(stage, n_layers - n_stages + stage + 1) if stage < n_stages else (n_layers,):
            shorter = [(start, *found) for start, found in best.items() if (start, stop) in costs]
            if shorter:
                longer[stop] = min((add(total, costs[start, stop]), (*cuts, stop)) for start, total, cuts in shorter)
        best = longer
    return best[n_layers]


def stages_of_rank(pipeline_rank: int, layout: Layout) -> tuple[int, ...]:
    """The stages that a pipeline rank holds: every p-th, or for `zbv` one on the way down the V and one on the way up.

    >>> stages_of_rank(1, Layout(pipeline=4, schedule="interleaved", stages_per_rank=2))
    (1, 5)
    >>> stages_of_rank(1, Layout(pipeline=4, schedule="zbv", stages_per_rank=2))
    (1, 6)
    """
    if layout.schedule == "zbv" and layout.pipeline > 1:
        return pipeline_rank, layout.n_stages - 1 - pipeline_rank
    return tuple(range(pipeline_rank, layout.n_stages, layout.pipeline))


def rank_of_stage(stage: int, layout: Layout) -> int:
    """The pipeline rank that holds a stage."""
    if layout.schedule == "zbv":
        return min(stage, layout.n_stages - 1 - stage)
    return stage % layout.pipeline


def has_split_backward(pipeline: int, schedule: str) -> bool:
    """Whether weight gradients are computed in a pass of their own (`parallel.pipeline.zero_bubble`)."""
    return pipeline > 1 and schedule in ZERO_BUBBLE


def check_pipeline(layout: Layout, n_layers: int, n_microbatches: int) -> None:
    """Raise LayoutError unless the schedule can run `n_microbatches` per step and data rank over that many layers."""
    if layout.pipeline == 1:
        return
    check_stages_per_rank(layout)
    p, stages_per_rank, schedule = layout.pipeline, layout.stages_per_rank, layout.schedule
    if layout.n_stages > n_layers:
        fits = n_layers // stages_per_rank
        remedy = f"use a parallel.pipeline of at most {fits}" if fits > 1 else "lower parallel.stages_per_rank"
        raise LayoutError(
            f"parallel.pipeline={p} * parallel.stages_per_rank={stages_per_rank} is {layout.n_stages} stages, "
            f"more than model.n_layers={n_layers}; {remedy}"
        )
    if n_microbatches < p:
        raise LayoutError(
            f"parallel.pipeline={p} needs as many microbatches a step, but train.batch_size and train.micro_batch_size "
            f"give each data rank {n_microbatches}; raise the first, lower the second, or use a parallel.pipeline of "
            f"at most {n_microbatches}"
        )
    if schedule in ("interleaved", "interleaved_zero_bubble") and not _fills_rounds(n_microbatches, p):
        nearest = next(n for n in _nearby_counts(n_microbatches) if n >= p and _fills_rounds(n, p))
        raise LayoutError(
            f"parallel.schedule={schedule} works in rounds of parallel.pipeline={p} microbatches or some more, but the "
            f"{n_microbatches} of a data rank make no equal rounds; change train.batch_size or train.micro_batch_size "
            f"to have {nearest}"
        )


def check_stages_per_rank(layout: Layout) -> None:
    """Raise LayoutError unless the schedule takes that many stages per rank."""
    fewest, most = STAGES_PER_RANK[layout.schedule]
    count, schedule = layout.stages_per_rank, layout.schedule
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest} or more" if most is None else f"{fewest}"
        raise LayoutError(
            f"parallel.stages_per_rank={count} does not go with parallel.schedule={schedule}, which wants {wanted}; "
            "leave it at auto, or choose another schedule"
        )


def _fills_rounds(n_microbatches: int, pipeline: int) -> bool:
    """Whether torch's interleaved schedules accept `n_microbatches`: equal rounds of `pipeline` or more of them."""
    return n_microbatches % max(1, n_microbatches // pipeline) == 0


def _nearby_counts(n: int) -> Iterator[int]:
    """n + 1, n - 1, n + 2, ...: they include a multiple of every number up to n."""
    for distance in range(1, n + 1):
        yield n + distance
        yield n - distance


Kind = Literal["forward", "backward", "input", "weight"]


class Action(NamedTuple):
    """One forward or backward pass, or half of one, of a rank."""

    kind: Kind
    """`backward` computes both the gradient of the stage's input (`input`) and that of its weights (`weight`)."""
    stage: int
    microbatch: int


_DURATION: dict[Kind, float] = {"forward": 1.0, "input": 1.0, "weight": 1.0, "backward": 2.0}


def bubble_fraction(orders: Mapping[int, Sequence[Action]], costs: Sequence[float]) -> float:
    """The fraction of a step that the average rank idles, if sending takes no time.

    Args:
        orders: the actions of each rank, in its order.
        costs: time of a forward pass of each stage. Each half of a backward pass takes as long.

    Raises:
        ValueError: the ranks wait for each other.
    """
    finished: dict[tuple[str, int, int], float] = {}
    clocks = dict.fromkeys(orders, 0.0)
    remaining = {rank: list(reversed(order)) for rank, order in orders.items()}
    while any(remaining.values()):
        before = len(finished)
        for rank, actions in remaining.items():
            while actions and (ready := _ready(actions[-1], finished, len(costs))) is not None:
                action = actions.pop()
                clocks[rank] = max(clocks[rank], ready) + _DURATION[action.kind] * costs[action.stage]
                result = "gradient" if action.kind in ("backward", "input") else action.kind
                finished[result, action.stage, action.microbatch] = clocks[rank]
        if len(finished) == before:
            raise ValueError(f"no rank can go on: {[actions[-1] for actions in remaining.values() if actions]}")
    busy = sum(_DURATION[action.kind] * costs[action.stage] for order in orders.values() for action in order)
    return 1 - busy / (max(clocks.values()) * len(orders))


def _ready(action: Action, finished: Mapping[tuple[str, int, int], float], n_stages: int) -> float | None:
    """The time at which all inputs of an action exist; None if some of it is not computed yet."""
    _, stage, microbatch = action
    if action.kind == "forward":
        return 0.0 if stage == 0 else finished.get(("forward", stage - 1, microbatch))
    if action.kind == "weight":
        return finished.get(("gradient", stage, microbatch))
    inputs = [("forward", stage, microbatch)] + ([("gradient", stage + 1, microbatch)] if stage < n_stages - 1 else [])
    times = [finished.get(key) for key in inputs]
    return None if None in times else max(time for time in times if time is not None)
