"""The schedules of torch.distributed.pipelining: which there are, in which order they work, and how long ranks idle.

Starts nothing and needs no process group. `parallel.pipeline.schedule` has what needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from parallel.layout import Layout
from parallel.pipeline.schedule import Action, Kind, LayerCosts, assign_layers, bubble_fraction
from parallel.torch_compat import pipeline_order

SINGLE_STAGE: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
"""Schedules with one stage per rank."""

MULTI_STAGE: dict[str, type[PipelineScheduleMulti]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
"""Schedules with several stages per rank."""

_KINDS: dict[str, Kind] = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "input",
    "BACKWARD_WEIGHT": "weight",
}
"""torch's name of an action -> ours."""


def schedule_actions(layout: Layout, n_microbatches: int) -> dict[int, list[Action]]:
    """The actions of each pipeline rank, in its order."""
    p = layout.pipeline
    if layout.schedule in SINGLE_STAGE:
        return {rank: _single_stage_actions(layout, rank, n_microbatches) for rank in range(p)}
    orders = pipeline_order(
        MULTI_STAGE[layout.schedule], n_ranks=p, stages_per_rank=layout.stages_per_rank, n_microbatches=n_microbatches
    )
    return {
        rank: [
            Action(_KINDS[a.computation_type.name], a.stage_index, a.microbatch_index or 0) for a in orders[rank] if a
        ]
        for rank in range(p)
    }


def _single_stage_actions(layout: Layout, stage: int, n_microbatches: int) -> list[Action]:
    """Warm-up forward passes, then backward and forward passes in turn, then the remaining backward passes."""
    warmup = n_microbatches if layout.schedule == "gpipe" else min(n_microbatches, layout.pipeline - stage)
    forward = [Action("forward", stage, i) for i in range(n_microbatches)]
    backward = [Action("backward", stage, i) for i in range(n_microbatches)]
    steady = [action for pair in zip(backward, forward[warmup:], strict=False) for action in pair]
    return forward[:warmup] + steady + backward[n_microbatches - warmup :]


def layout_bubble_fraction(layout: Layout, n_microbatches: int, costs: Sequence[float] | None = None) -> float:
    """The fraction of a step that the average rank idles, if a backward pass takes two forwards and sends no time.

    With equal stages, p ranks and m microbatches it is (p - 1) / (m + p - 1) for GPipe and 1F1B, and
    (p - 1) / (v m + p - 1) for v interleaved stages per rank. (Section 2.2 of arXiv:2104.04473 divides by the work.)

    Args:
        layout: its pipeline.
        n_microbatches: of a step, on each data rank.
        costs: of the stages; None is equal ones.
    """
    return bubble_fraction(schedule_actions(layout, n_microbatches), costs or [1.0] * layout.n_stages)


def describe_pipeline(layout: Layout, costs: LayerCosts, n_microbatches: int) -> str:
    """One line for the start of a run.

    `4 stages of 3+3+3+2 layers on 4 ranks, 1f1b, 16 microbatches a step: ranks wait 18% of it`
    """
    stages = assign_layers(costs, layout.n_stages)
    bubble = layout_bubble_fraction(layout, n_microbatches, [costs.stage(layers) for layers in stages])
    counts = "+".join(str(len(layers)) for layers in stages)
    return (
        f"{layout.n_stages} stages of {counts} layers on {layout.pipeline} ranks, "
        f"{layout.schedule}, {n_microbatches} microbatches a step: ranks wait {bubble:.0%} of it"
    )
