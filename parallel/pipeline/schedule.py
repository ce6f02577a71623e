"""Which layers a stage of the pipeline holds, which stages a rank holds, and how long ranks wait. Pure arithmetic: imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
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
"""Fewest and most stages on a rank, by schedule."""

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")
"""Schedules that compute the gradients of the parameters apart from those of the activations, and later."""


def assign_layers(n_layers: int, n_stages: int, *, first_cost: float, last_cost: float) -> list[range]:
    """Consecutive layers of every stage, so that the most expensive stage is as cheap as can be.

    A layer costs 1; `first_cost` is what the embedding adds to the first stage, `last_cost` what norm, output projection and loss add to
    the last, both in layers. Among equally good ones later stages get more: under 1F1B they keep fewer microbatches.
    Raises LayoutError if there are more stages than layers.

    >>> assign(6, 3, first_cost=0, last_cost=1.5)
    [range(0, 2), range(2, 5), range(5, 6)]
    """
    if n_stages > n_layers:
        raise LayoutError(
            f"model.n_layers={n_layers} cannot fill {n_stages} stages (parallel.pipeline * parallel.stages_per_rank); "
            f"use at most {n_layers} stages, or a smaller parallel.pipeline"
        )
    counts = [1] * n_stages
    costs = stage_costs(counts, first_cost=first_cost, last_cost=last_cost)
    # Every layer costs the same wherever it goes, so giving each to the cheapest stage ends at the least possible maximum.
    for _ in range(n_layers - n_stages):
        cheapest = min(range(n_stages), key=lambda stage: (costs[stage], -stage))
        counts[cheapest] += 1
        costs[cheapest] += 1
    return [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]


def stage_costs(counts: Sequence[int], *, first_cost: float, last_cost: float) -> list[float]:
    """What each stage of so many layers costs, in layers."""
    costs = [float(count) for count in counts]
    costs[0] += first_cost
    costs[-1] += last_cost
    return costs


def stages_of_rank(pipeline_rank: int, layout: Layout) -> tuple[int, ...]:
    """The stages that a rank of the pipeline holds: every p-th, or for `zbv` one on the way down the V and one on the way up.

    >>> stages_of_rank(1, Layout(pipeline=4, schedule="interleaved", stages_per_rank=2))
    (1, 5)
    >>> stages_of_rank(1, Layout(pipeline=4, schedule="zbv", stages_per_rank=2))
    (1, 6)
    """
    if layout.schedule == "zbv":
        return pipeline_rank, layout.n_stages - 1 - pipeline_rank
    return tuple(range(pipeline_rank, layout.n_stages, layout.pipeline))


def rank_of_stage(stage: int, layout: Layout) -> int:
    """The rank of the pipeline that holds a stage."""
    if layout.schedule == "zbv":
        return min(stage, layout.n_stages - 1 - stage)
    return stage % layout.pipeline


def has_split_backward(pipeline: int, schedule: str) -> bool:
    """Whether the gradients of weights have a pass of their own (`parallel.pipeline.zero_bubble`)."""
    return pipeline > 1 and schedule in ZERO_BUBBLE


def check_pipeline(layout: Layout, n_layers: int, n_microbatches: int) -> None:
    """Raise LayoutError unless the schedule can run `n_microbatches` a step, on each data rank, over that many layers."""
    if layout.pipeline == 1:
        return
    check_stages_per_rank(layout)
    p, held, schedule = layout.pipeline, layout.stages_per_rank, layout.schedule
    if layout.n_stages > n_layers:
        fits = n_layers // held
        way_out = f"use a parallel.pipeline of at most {fits}" if fits > 1 else "lower parallel.stages_per_rank"
        raise LayoutError(
            f"parallel.pipeline={p} * parallel.stages_per_rank={held} is {layout.n_stages} stages, more than model.n_layers={n_layers}; "
            f"{way_out}"
        )
    if n_microbatches < p:
        raise LayoutError(
            f"parallel.pipeline={p} needs as many microbatches a step, but train.batch_size and train.micro_batch_size give each data rank "
            f"{n_microbatches}; raise the first, lower the second, or use a parallel.pipeline of at most {n_microbatches}"
        )
    if schedule in ("interleaved", "interleaved_zero_bubble") and not _fills_rounds(n_microbatches, p):
        near = next(n for n in _counts_nearby(n_microbatches) if n >= p and _fills_rounds(n, p))
        raise LayoutError(
            f"parallel.schedule={schedule} works in rounds of parallel.pipeline={p} microbatches or some more, but the {n_microbatches} of "
            f"a data rank make no equal rounds; change train.batch_size or train.micro_batch_size to have {near}"
        )


def check_stages_per_rank(layout: Layout) -> None:
    """The part of `check_pipeline` that the layout alone decides."""
    fewest, most = STAGES_PER_RANK[layout.schedule]
    held, schedule = layout.stages_per_rank, layout.schedule
    if held < fewest or (most is not None and held > most):
        wanted = f"{fewest} or more" if most is None else f"{fewest}"
        raise LayoutError(
            f"parallel.stages_per_rank={held} does not go with parallel.schedule={schedule}, which wants {wanted}; leave it at auto, "
            "or choose another schedule"
        )


def _fills_rounds(n_microbatches: int, pipeline: int) -> bool:
    """What torch asks of its interleaved schedules: equal rounds of `pipeline` microbatches, or some more."""
    return n_microbatches % max(1, n_microbatches // pipeline) == 0


def _counts_nearby(n: int) -> Iterator[int]:
    """n + 1, n - 1, n + 2, ...: one of them is a multiple of any size up to n."""
    for distance in range(1, n + 1):
        yield n + distance
        yield n - distance


Kind = Literal["forward", "backward", "input", "weight"]


class Action(NamedTuple):
    """One piece of work of a rank."""

    kind: Kind
    """`backward` is both the gradient of what came in (`input`) and that of the parameters (`weight`)."""
    stage: int
    microbatch: int


_DURATION: dict[Kind, float] = {"forward": 1.0, "input": 1.0, "weight": 1.0, "backward": 2.0}


def bubble_fraction(orders: Mapping[int, Sequence[Action]], costs: Sequence[float]) -> float:
    """Which part of a step the average rank waits for others, if each does its actions in the given order, and sending takes no time.

    A forward pass takes a stage its cost, as long as each half of the backward pass. Raises ValueError if the ranks wait for each other.
    """
    finished: dict[tuple[str, int, int], float] = {}
    clocks = dict.fromkeys(orders, 0.0)
    todo = {rank: list(reversed(order)) for rank, order in orders.items()}
    while any(todo.values()):
        before = len(finished)
        for rank, actions in todo.items():
            while actions and (ready := _ready(actions[-1], finished, len(costs))) is not None:
                action = actions.pop()
                clocks[rank] = max(clocks[rank], ready) + _DURATION[action.kind] * costs[action.stage]
                gives = "gradient" if action.kind in ("backward", "input") else action.kind
                finished[gives, action.stage, action.microbatch] = clocks[rank]
        if len(finished) == before:
            raise ValueError(f"no rank can go on: {[actions[-1] for actions in todo.values() if actions]}")
    busy = sum(_DURATION[action.kind] * costs[action.stage] for order in orders.values() for action in order)
    return 1 - busy / (max(clocks.values()) * len(orders))


def _ready(action: Action, finished: Mapping[tuple[str, int, int], float], n_stages: int) -> float | None:
    """When everything is there that an action reads, None if that is not known yet."""
    _, stage, microbatch = action
    if action.kind == "forward":
        return 0.0 if stage == 0 else finished.get(("forward", stage - 1, microbatch))
    if action.kind == "weight":
        return finished.get(("gradient", stage, microbatch))
    reads = [("forward", stage, microbatch)] + ([("gradient", stage + 1, microbatch)] if stage < n_stages - 1 else [])
    times = [finished.get(key) for key in reads]
    return None if None in times else max(time for time in times if time is not None)
