"""Who holds what: the layers, parameters and bytes of any rank of a layout, from the settings alone. No torch; the dry run checks it.

Certain is what is counted in parameters: masters, copies to compute with, gradients, optimizer state ("static"). Activations are an
estimate of what the backward pass keeps; fragments of the allocator, buffers of collectives and workspaces of kernels are in none of it.
Shape suffixes are those of `pretrain.model`: D model width, V vocabulary, F hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from parallel.layout import Layout
from parallel.pipeline.schedule import assign_layers, stages_of_rank
from pretrain.config import ModelConfig, RunConfig
from pretrain.estimate.activations import COMPUTE_BYTES, activation_bytes
from pretrain.estimate.flops import count_parameters

MASTER_BYTES = 4
GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"adamw": 8, "muon": 4}
"""Per parameter, all of it fp32: AdamW has two moments, Muon one."""


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model."""

    name: str
    shape: tuple[int, ...]
    split: int | None
    """The dimension that tensor parallelism divides; None leaves it whole."""

    @property
    def kind(self) -> str:
        """`embedding`, `attention`, `mlp`, `norms` or `head`."""
        for kind, mark in (("norms", "norm"), ("embedding", "embed_tokens"), ("head", "lm_head"), ("mlp", ".mlp.")):
            if mark in self.name:
                return kind
        return "attention"

    def local_shape(self, layout: Layout) -> tuple[int, ...]:
        """What a tensor rank computes with."""
        return tuple(size // layout.tensor if i == self.split else size for i, size in enumerate(self.shape))

    def elements(self, layout: Layout, fsdp_rank: int | None = None) -> int:
        """Of a tensor rank's part; with an fsdp rank, of what that one keeps: rows are cut into equal chunks, rounded up (FSDP2)."""
        rows, *rest = self.local_shape(layout)
        if fsdp_rank is not None:
            chunk = -(-rows // layout.fsdp)
            rows = min(chunk, max(0, rows - fsdp_rank * chunk))
        return rows * math.prod(rest)


@dataclass(frozen=True)
class Holding:
    """What one rank holds."""

    stages: tuple[int, ...]
    layers: tuple[range, ...]
    """Of each stage."""
    parameters: dict[str, int]
    """Elements that this rank keeps, by kind; the sum over `pipeline`, fsdp and `tensor` ranks is the model. Counted more than once there:
    norms, and key/value heads that tensor ranks share; and a tied embedding, which the last stage has too."""
    whole_elements: int
    """Elements of its stages' tensor parts, before `shard` and `context` ranks share them out."""
    master_bytes: int
    copy_bytes: int
    """Whole parameters in the numbers to compute with; 0 where `gathered_bytes` come and go instead."""
    gradient_bytes: int
    """fp32; at its most, when the last microbatch of a step has been through."""
    optimizer_bytes: int
    gathered_bytes: int
    """`zero=3`: parameters that are whole for a moment."""
    activation_bytes: int
    """Estimate of the most that is kept for backward passes; see `activations`."""
    offloaded: bool
    """Masters, gradients and optimizer state are in host memory."""

    @property
    def n_parameters(self) -> int:
        """All kinds."""
        return sum(self.parameters.values())

    @property
    def state_bytes(self) -> int:
        """What is counted in parameters, wherever it lives."""
        return self.master_bytes + self.copy_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def static_bytes(self) -> int:
        """What must fit on the device, whatever the batch: a run with less memory than this certainly fails."""
        return (self.copy_bytes if self.offloaded else self.state_bytes) + self.gathered_bytes


def hold(config: RunConfig, layout: Layout, rank: int) -> Holding:
    """What a rank holds under a resolved config.

    Per parameter, with N fsdp ranks (`shard` x `context`): masters 4/N bytes, AdamW 8/N; copies 2 (bf16) under `zero` 1 and 2, and in a
    pipeline, which keeps what a backward pass has gathered; gradients 4/N, but 4 where they are summed up whole over several
    microbatches: under `zero=1`, and in a pipeline, which reduces once a step. `replicate` divides nothing. One process has masters,
    AdamW, gradients, and copies in bf16 only.
    """
    at, micro = layout.coordinates(rank), n_microbatches(config, layout)
    ranges, stages = layers_of_stages(config, layout), stages_of_rank(at["pipeline"], layout)
    held = [weight for stage in stages for weight in weights(config.model, ranges[stage], layout)]
    kept = {
        weight.name: weight.elements(layout, layout.fsdp_rank(rank)) for weight in held
    }  # a name once: twins share their state
    parameters = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for weight in held:
        parameters[weight.kind] += weight.elements(layout, layout.fsdp_rank(rank))
    whole, mine = sum(weight.elements(layout) for weight in held), sum(parameters.values())
    number = COMPUTE_BYTES[config.train.precision]
    alone = layout.world_size == 1 and not layout.offload
    stay_whole = number == 2 if alone else layout.zero < 3 or layout.pipeline > 1
    sums_whole = (layout.zero == 1 or layout.pipeline > 1) and micro > 1
    matrices = sum(
        kept[weight.name] for weight in held if weight.name.startswith("model.layers.") and len(weight.shape) == 2
    )
    moments = OPTIMIZER_BYTES["adamw"] * sum(kept.values())
    if config.optim.kind == "muon":
        moments -= (OPTIMIZER_BYTES["adamw"] - OPTIMIZER_BYTES["muon"]) * matrices
    return Holding(
        stages=stages,
        layers=tuple(ranges[stage] for stage in stages),
        parameters=parameters,
        whole_elements=whole,
        master_bytes=MASTER_BYTES * mine,
        copy_bytes=number * whole if stay_whole else 0,
        gradient_bytes=GRADIENT_BYTES * (whole if sums_whole else mine),
        optimizer_bytes=moments,
        gathered_bytes=number * _gathered(held, layout) if not (stay_whole or alone) else 0,
        activation_bytes=activation_bytes(config, layout, at["pipeline"], [ranges[stage] for stage in stages], micro),
        offloaded=layout.offload,
    )


def fullest(config: RunConfig, layout: Layout) -> int:
    """The rank with the most static bytes; the first of them. Under `hold`'s rules the first of each stage's ranks have the most."""
    ranks = [i * layout.stride("pipeline") for i in range(layout.pipeline)]
    return max(ranks, key=lambda rank: (hold(config, layout, rank).static_bytes, -rank))


def layers_of_stages(config: RunConfig, layout: Layout) -> list[range]:
    """The layers of every stage of the pipeline."""
    first, last = end_costs(config.model)
    return assign_layers(config.model.n_layers, layout.n_stages, first_cost=first, last_cost=last)


def end_costs(model: ModelConfig) -> tuple[float, float]:
    """What the embedding adds to the first stage of a pipeline and the output projection to the last, in matrix products of one layer.

    The embedding is looked up and multiplies nothing: 0.
    """
    counts = count_parameters(model)
    return 0.0, model.n_layers * model.vocab_size * model.d_model / (counts.attention + counts.mlp)


def n_microbatches(config: RunConfig, layout: Layout) -> int:
    """Of a whole batch, on each data rank."""
    return -(-config.train.batch_size // layout.data // config.train.micro_batch_size)


def weights(model: ModelConfig, layers: range, layout: Layout) -> Iterator[Weight]:
    """The parameters of `Transformer(model, layers=layers)`, and how tensor parallelism splits each."""
    D, q_width, kv_width = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    kv_split = (
        None if layout.tensor > model.n_kv_heads else 0
    )  # ranks that share a head keep all of them, and sum their gradients
    last = layers.stop == model.n_layers
    if layers.start == 0 or (last and model.tie_embeddings):
        yield Weight("model.embed_tokens.weight", (model.vocab_size, D), 0)
    for i in layers:
        block = f"model.layers.{i}"
        for name, width, split in (
            ("q_proj", q_width, 0),
            ("k_proj", kv_width, kv_split),
            ("v_proj", kv_width, kv_split),
        ):
            yield Weight(f"{block}.self_attn.{name}.weight", (width, D), split)
            if model.qkv_bias:
                yield Weight(f"{block}.self_attn.{name}.bias", (width,), split)
        yield Weight(f"{block}.self_attn.o_proj.weight", (D, q_width), 1)
        if model.qk_norm:
            yield Weight(f"{block}.self_attn.q_norm.weight", (model.head_dim,), None)
            yield Weight(f"{block}.self_attn.k_norm.weight", (model.head_dim,), None)
        yield Weight(f"{block}.mlp.gate_proj.weight", (model.d_ff, D), 0)
        yield Weight(f"{block}.mlp.up_proj.weight", (model.d_ff, D), 0)
        yield Weight(f"{block}.mlp.down_proj.weight", (D, model.d_ff), 1)
        yield Weight(f"{block}.input_layernorm.weight", (D,), None)
        yield Weight(f"{block}.post_attention_layernorm.weight", (D,), None)
    if last:
        yield Weight("model.norm.weight", (D,), None)
        if not model.tie_embeddings:
            yield Weight("lm_head.weight", (model.vocab_size, D), 0)


def _gathered(held: Iterable[Weight], layout: Layout) -> int:
    """Elements that are whole at one time: what is used at the end of the model stays whole for a microbatch, blocks come and go."""
    blocks: dict[str, int] = {}
    stays = 0
    for weight in held:
        if weight.name.startswith("model.layers."):
            block = weight.name.split(".")[2]
            blocks[block] = blocks.get(block, 0) + weight.elements(layout)
        elif weight.kind != "embedding":
            stays += weight.elements(layout)
    return stays + sum(sorted(blocks.values())[-1 - layout.prefetch :])
