"""The layers, parameters and bytes of any rank of a layout, from the settings alone. No torch; the dry run checks it.

Master weights, compute weights, gradients and optimizer state are counted exactly ("static" memory). Activations are an
estimate. Fragmentation of the allocator, buffers of collectives and workspaces of kernels are not included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.layout import Layout
from parallel.pipeline.schedule import assign_layers, stages_of_rank
from pretrain.config import RunConfig
from pretrain.estimate.activations import COMPUTE_BYTES, activation_bytes
from pretrain.estimate.flops import pipeline_costs
from pretrain.estimate.parameters import ModelParameter, model_parameters

MASTER_BYTES = 4
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"adamw": 8, "muon": 4}
"""Bytes of optimizer state a parameter, in fp32: AdamW has two moments, Muon one."""


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank."""

    stages: tuple[int, ...]
    """Its stages of the pipeline."""
    layers: tuple[range, ...]
    """The layers of each of these stages."""
    parameters: dict[str, int]
    """Elements that this rank stores, by kind. The sum over `pipeline`, fsdp and `tensor` ranks is the model, except
    that tensor ranks each store all norms and all shared key/value heads, and the last stage stores a tied embedding
    again."""
    unsharded_elements: int
    """Elements of the rank's tensor shards, before `shard` and `context` ranks divide them."""
    master_bytes: int
    """Master weights, fp32."""
    compute_weight_bytes: int
    """Weights in the precision of the forward pass, if they stay; otherwise 0, and `gathered_bytes` are gathered
    when needed."""
    gradient_bytes: int
    """Gradients, fp32, at the end of a step's last microbatch, when they take most."""
    optimizer_bytes: int
    """Optimizer state, fp32."""
    gathered_bytes: int
    """`zero=3`: the most that is gathered at one time."""
    activation_bytes: int
    """Estimate of the peak of activations; see `pretrain.estimate.activations`."""
    is_offloaded: bool
    """Master weights, gradients and optimizer state are in host memory."""

    @property
    def n_parameters(self) -> int:
        """Elements of all kinds."""
        return sum(self.parameters.values())

    @property
    def state_bytes(self) -> int:
        """All that is counted in parameters, on the device or on the host."""
        return self.master_bytes + self.compute_weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def static_bytes(self) -> int:
        """What must fit on the device whatever the batch is: with less memory a run fails."""
        return (self.compute_weight_bytes if self.is_offloaded else self.state_bytes) + self.gathered_bytes


def estimate_rank_memory(config: RunConfig, layout: Layout, rank: int) -> RankMemory:
    """Compute the memory of a rank under a resolved config.

    Bytes a parameter, with N fsdp ranks (`shard` x `context`): master weights 4/N, AdamW 8/N. Compute weights 2 (bf16)
    under `zero` 1 and 2, and in a pipeline, which keeps what a backward pass has gathered. Gradients 4/N, but 4 where
    they are added up unsharded over several microbatches: under `zero=1`, and in a pipeline, which reduces once a step.
    `replicate` divides nothing. One process has master weights, AdamW, gradients, and compute weights in bf16 only.
    """
    at, micro = layout.coordinates(rank), n_microbatches(config, layout)
    ranges, stages = layers_of_stages(config, layout), stages_of_rank(at["pipeline"], layout)
    held = [parameter for stage in stages for parameter in model_parameters(config.model, ranges[stage], layout.tensor)]
    kept = [parameter.elements(layout, rank) for parameter in held]
    by_kind: dict[str, int] = {}
    for parameter, count in zip(held, kept, strict=True):
        by_kind[parameter.spec.kind] = by_kind.get(parameter.spec.kind, 0) + count
    unsharded, own = sum(parameter.elements(layout) for parameter in held), sum(kept)
    number = COMPUTE_BYTES[config.train.precision]
    alone = layout.world_size == 1 and not layout.offload
    stays_gathered = number == 2 if alone else layout.zero < 3 or layout.pipeline > 1
    sums_unsharded = (layout.zero == 1 or layout.pipeline > 1) and micro > 1
    by_muon = config.optim.kind == "muon"
    # By name: where one rank has both copies of a tied parameter, they share one optimizer state.
    moments = {
        parameter.name: OPTIMIZER_BYTES["muon" if by_muon and parameter.spec.group.muon else "adamw"] * count
        for parameter, count in zip(held, kept, strict=True)
    }
    return RankMemory(
        stages=stages,
        layers=tuple(ranges[stage] for stage in stages),
        parameters=by_kind,
        unsharded_elements=unsharded,
        master_bytes=MASTER_BYTES * own,
        compute_weight_bytes=number * unsharded if stays_gathered else 0,
        gradient_bytes=GRADIENT_BYTES * (unsharded if sums_unsharded else own),
        optimizer_bytes=sum(moments.values()),
        gathered_bytes=number * _gathered(held, layout) if not (stays_gathered or alone) else 0,
        activation_bytes=activation_bytes(config, layout, at["pipeline"], [ranges[stage] for stage in stages], micro),
        is_offloaded=layout.offload,
    )


def find_peak_rank(config: RunConfig, layout: Layout) -> int:
    """Return the first rank with the most static bytes. It is the first rank of some stage: FSDP rounds chunks up."""
    ranks = [i * layout.stride("pipeline") for i in range(layout.pipeline)]
    return max(ranks, key=lambda rank: (estimate_rank_memory(config, layout, rank).static_bytes, -rank))


def layers_of_stages(config: RunConfig, layout: Layout) -> tuple[range, ...]:
    """The layers of every pipeline stage."""
    return assign_layers(pipeline_costs(config.model), layout.n_stages)


def n_microbatches(config: RunConfig, layout: Layout) -> int:
    """Microbatches of a full batch on each data rank."""
    return layout.n_microbatches(config.train.batch_size, config.train.micro_batch_size)


def _gathered(held: Iterable[ModelParameter], layout: Layout) -> int:
    """The most elements that are gathered at one time: the end of the model for a full microbatch, and a few blocks.

    Experts with a mesh of their own are gathered when their block is used. The last block that is gathered ahead comes
    without its experts.
    """
    blocks: dict[int, int] = {}
    experts: dict[int, int] = {}
    at_end = 0
    for parameter in held:
        if parameter.layer is not None:
            units = experts if parameter.is_expert and layout.splits_experts else blocks
            units[parameter.layer] = units.get(parameter.layer, 0) + parameter.elements(layout)
        elif parameter.spec.kind != "embedding":
            at_end += parameter.elements(layout)
    ahead = layout.prefetch
    return at_end + sum(sorted(blocks.values())[-1 - ahead :]) + sum(sorted(experts.values())[-max(1, ahead) :])
