"""Who holds what: the layers, parameters and bytes of any rank of a layout, from the settings alone. No torch; the dry run checks it.

Certain is what is counted in parameters: masters, copies to compute with, gradients, optimizer state ("static"). Activations are an
estimate of what the backward pass keeps; fragments of the allocator, buffers of collectives and workspaces of kernels are in none of it.
Shape suffixes are those of `pretrain.model`: D model width, V vocabulary, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.layout import Layout
from parallel.pipeline.schedule import assign_layers, stages_of_rank
from pretrain.config import RunConfig
from pretrain.estimate.activations import COMPUTE_BYTES, activation_bytes
from pretrain.estimate.flops import pipeline_end_costs
from pretrain.estimate.parameters import ModelParameter, model_parameters

MASTER_BYTES = 4
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"adamw": 8, "muon": 4}
"""Per parameter, all of it fp32: AdamW has two moments, Muon one."""


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds."""

    stages: tuple[int, ...]
    layers: tuple[range, ...]
    """Of each stage."""
    parameters: dict[str, int]
    """Elements that this rank keeps, by kind; the sum over `pipeline`, fsdp and `tensor` ranks is the model. Counted more than once there:
    norms, and key/value heads that tensor ranks share; and a tied embedding, which the last stage has too."""
    unsharded_elements: int
    """Elements of its stages' tensor parts, before `shard` and `context` ranks share them out."""
    master_bytes: int
    compute_weight_bytes: int
    """Whole parameters in the numbers to compute with; 0 where `gathered_bytes` come and go instead."""
    gradient_bytes: int
    """fp32; at its most, when the last microbatch of a step has been through."""
    optimizer_bytes: int
    gathered_bytes: int
    """`zero=3`: parameters that are whole for a moment."""
    activation_bytes: int
    """Estimate of the most that is kept for backward passes; see `activations`."""
    is_offloaded: bool
    """Masters, gradients and optimizer state are in host memory."""

    @property
    def n_parameters(self) -> int:
        """All kinds."""
        return sum(self.parameters.values())

    @property
    def state_bytes(self) -> int:
        """What is counted in parameters, wherever it lives."""
        return self.master_bytes + self.compute_weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def static_bytes(self) -> int:
        """What must fit on the device, whatever the batch: a run with less memory than this certainly fails."""
        return (self.compute_weight_bytes if self.is_offloaded else self.state_bytes) + self.gathered_bytes


def estimate_rank_memory(config: RunConfig, layout: Layout, rank: int) -> RankMemory:
    """What a rank holds under a resolved config.

    Per parameter, with N fsdp ranks (`shard` x `context`): masters 4/N bytes, AdamW 8/N; copies 2 (bf16) under `zero` 1 and 2, and in a
    pipeline, which keeps what a backward pass has gathered; gradients 4/N, but 4 where they are summed up whole over several
    microbatches: under `zero=1`, and in a pipeline, which reduces once a step. `replicate` divides nothing. One process has masters,
    AdamW, gradients, and copies in bf16 only.
    """
    at, micro = layout.coordinates(rank), n_microbatches(config, layout)
    ranges, stages = layers_of_stages(config, layout), stages_of_rank(at["pipeline"], layout)
    held = [parameter for stage in stages for parameter in model_parameters(config.model, ranges[stage], layout.tensor)]
    kept = [parameter.elements(layout, layout.fsdp_rank(rank)) for parameter in held]
    by_kind: dict[str, int] = {}
    for parameter, count in zip(held, kept, strict=True):
        by_kind[parameter.spec.kind] = by_kind.get(parameter.spec.kind, 0) + count
    whole, mine = sum(parameter.elements(layout) for parameter in held), sum(kept)
    number = COMPUTE_BYTES[config.train.precision]
    alone = layout.world_size == 1 and not layout.offload
    stay_whole = number == 2 if alone else layout.zero < 3 or layout.pipeline > 1
    sums_whole = (layout.zero == 1 or layout.pipeline > 1) and micro > 1
    by_muon = config.optim.kind == "muon"
    # By name: where one rank holds both copies of a tied parameter, they share their state.
    moments = {
        parameter.name: OPTIMIZER_BYTES["muon" if by_muon and parameter.spec.group.muon else "adamw"] * count
        for parameter, count in zip(held, kept, strict=True)
    }
    return RankMemory(
        stages=stages,
        layers=tuple(ranges[stage] for stage in stages),
        parameters=by_kind,
        unsharded_elements=whole,
        master_bytes=MASTER_BYTES * mine,
        compute_weight_bytes=number * whole if stay_whole else 0,
        gradient_bytes=GRADIENT_BYTES * (whole if sums_whole else mine),
        optimizer_bytes=sum(moments.values()),
        gathered_bytes=number * _gathered(held, layout) if not (stay_whole or alone) else 0,
        activation_bytes=activation_bytes(config, layout, at["pipeline"], [ranges[stage] for stage in stages], micro),
        is_offloaded=layout.offload,
    )


def find_peak_rank(config: RunConfig, layout: Layout) -> int:
    """The rank with the most static bytes; the first of them. Under `estimate_rank_memory`'s rules the first of each stage's ranks have the most."""
    ranks = [i * layout.stride("pipeline") for i in range(layout.pipeline)]
    return max(ranks, key=lambda rank: (estimate_rank_memory(config, layout, rank).static_bytes, -rank))


def layers_of_stages(config: RunConfig, layout: Layout) -> list[range]:
    """The layers of every stage of the pipeline."""
    first, last = pipeline_end_costs(config.model)
    return assign_layers(config.model.n_layers, layout.n_stages, first_cost=first, last_cost=last)


def n_microbatches(config: RunConfig, layout: Layout) -> int:
    """Of a whole batch, on each data rank."""
    return layout.n_microbatches(config.train.batch_size, config.train.micro_batch_size)


def _gathered(held: Iterable[ModelParameter], layout: Layout) -> int:
    """Elements that are whole at one time: what is used at the end of the model stays whole for a microbatch, blocks come and go."""
    blocks: dict[int, int] = {}
    stays = 0
    for parameter in held:
        if parameter.layer is not None:
            blocks[parameter.layer] = blocks.get(parameter.layer, 0) + parameter.elements(layout)
        elif parameter.spec.kind != "embedding":
            stays += parameter.elements(layout)
    return stays + sum(sorted(blocks.values())[-1 - layout.prefetch :])
