"""The traffic of each collective of a training step, from the settings alone. No torch; the dry run measures the same.

Bytes are those that one rank sends with ring algorithms in a group of n ranks: all-gather and reduce-scatter (n - 1) /
n of the full tensor, all-reduce twice that, all-to-all (n - 1) / n of the rank's tensor, send all of it. Sums of norms
and losses, which do not grow with the model, are left out. The load of experts is assumed to be even. Letters: D model
width, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Collection

from parallel.layout import Layout
from parallel.pipeline.schedule import rank_of_stage
from pretrain.config import RunConfig
from pretrain.estimate.activations import COMPUTE_BYTES, recompute_flags
from pretrain.estimate.block_activations import BlockCollectives
from pretrain.estimate.parameters import ModelParameter, model_parameters
from pretrain.estimate.rank_memory import RankMemory, estimate_rank_memory, n_microbatches
from pretrain.model.activation_terms import FP32, INT32, INT64

Traffic = dict[str, dict[str, float]]
"""{axis: {operation: bytes that the rank sends in a step}}; the axis `fsdp` is `shard` and `context` together."""


def estimate_traffic(config: RunConfig, layout: Layout, rank: int) -> Traffic:
    """Estimate what a rank sends in a step with a full batch, under a resolved config. Axes of size 1 are left out.

    `fsdp` and `replicate` carry parameters and gradients; `context`, `tensor` and `pipeline` carry activations. Experts
    with a mesh of their own have `expert_data` for parameters and gradients (`expert_fsdp` together with the ranks of
    `expert_tensor`), and `expert` and `expert_tensor` for activations.
    """
    found: Traffic = {
        "pipeline": _pipeline(config, layout, rank),
        "replicate": _replicate(config, layout, rank),
        "fsdp": _fsdp(config, layout, rank),
        "context": _context(config, layout, rank),
        "tensor": _tensor(config, layout, rank),
        "expert_data" if layout.expert_tensor == 1 else "expert_fsdp": _expert_fsdp(config, layout, rank),
        "expert": _expert(config, layout, rank),
        "expert_tensor": _expert_tensor(config, layout, rank),
    }
    return {axis: moved for axis, moved in found.items() if sum(moved.values())}


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tokens(config: RunConfig, layout: Layout) -> int:
    """Tokens of all microbatches of a step, on one context rank."""
    return n_microbatches(config, layout) * config.train.micro_batch_size * config.data.seq_len // layout.context


def _parameters(config: RunConfig, layout: Layout, rank: int, *, experts: bool = False) -> list[ModelParameter]:
    """Parameters of all stages of a rank: either the experts with a mesh of their own, or all others."""
    held = estimate_rank_memory(config, layout, rank)
    found = [each for layers in held.layers for each in model_parameters(config.model, layers, layout.tensor)]
    return [each for each in found if (each.is_expert and layout.splits_experts) == experts]


def _fsdp(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """Gathering of compute weights, and reduction of gradients in fp32.

    Under `zero=3` every block is gathered for the forward and again for the backward pass of each microbatch, and the
    end of the model once a microbatch. In a pipeline, the next forward pass uses what a backward pass has gathered.
    Otherwise parameters are gathered once a step. Gradients are reduced once a microbatch; under `zero=1` and in a
    pipeline once a step.
    """
    micro, number = n_microbatches(config, layout), COMPUTE_BYTES[config.train.precision]
    held = _parameters(config, layout, rank)
    whole = sum(parameter.elements(layout) for parameter in held)
    at_end = sum(parameter.elements(layout) for parameter in held if _is_used_at_end(parameter, config))
    forward = backward = _ring(layout.fsdp) * number
    if layout.reshard_to is not None:
        backward = _ring(layout.reshard_to) * number
    if layout.zero < 3:
        gathered = forward * whole
    elif layout.pipeline > 1:
        gathered = (forward * micro + backward) * (whole - at_end) + forward * at_end
    else:
        gathered = micro * ((forward + backward) * (whole - at_end) + forward * at_end)
    reductions = 1 if layout.zero == 1 or layout.pipeline > 1 else micro
    return {"all-gather": gathered, "reduce-scatter": _ring(layout.fsdp) * FP32 * whole * reductions}


def _expert_fsdp(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """Experts with a mesh of their own: gathered and reduced as `_fsdp` says, but for `reshard_to`.

    Where a block recomputes under `zero=3`, its experts are gathered once more.
    """
    micro, ring = n_microbatches(config, layout), _ring(layout.expert_fsdp)
    held = _parameters(config, layout, rank, experts=True)
    whole = sum(parameter.elements(layout) for parameter in held)
    if layout.zero < 3:
        gathered: float = whole
    else:
        gathered = (micro + 1 if layout.pipeline > 1 else 2 * micro) * whole
    reductions = 1 if layout.zero == 1 or layout.pipeline > 1 else micro
    number = COMPUTE_BYTES[config.train.precision]
    return {"all-gather": ring * number * gathered, "reduce-scatter": ring * FP32 * whole * reductions}


def _moe_layers(config: RunConfig, layout: Layout, rank: int) -> list[int]:
    """Layers of a rank that have experts."""
    held = estimate_rank_memory(config, layout, rank)
    return [layer for layers in held.layers for layer in layers if config.model.moe.has_experts(layer)]


def _expert(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """Rows of D numbers to the experts and back, with their weights in fp32; and how many each expert gets, int32.

    The gradients of rows and weights travel the other way. Recomputation repeats the messages of the forward pass.
    """
    e, model = layout.expert, config.model
    layers = _moe_layers(config, layout, rank)
    again = len(_recomputed_layers(config, estimate_rank_memory(config, layout, rank), layers))
    rows = _tokens(config, layout) / layout.tensor * model.moe.top_k * layout.expert_tensor
    row = COMPUTE_BYTES[config.train.precision] * model.d_model
    counts = INT32 * model.moe.n_experts * n_microbatches(config, layout)
    passes = 2 * len(layers) + again
    return {"all-to-all": _ring(e) * (rows * (2 * row + FP32) * passes + counts * (len(layers) + again))}


def _expert_tensor(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """Tokens, their experts and weights are gathered, and their results summed; and the gradients the other way.

    Recomputation does not repeat the sum: nothing needs its result.
    """
    n, model = layout.expert_tensor, config.model
    layers = _moe_layers(config, layout, rank)
    again = len(_recomputed_layers(config, estimate_rank_memory(config, layout, rank), layers))
    tokens = _tokens(config, layout) / layout.tensor * n  # of all these ranks
    token, k = COMPUTE_BYTES[config.train.precision] * model.d_model, model.moe.top_k
    gathered = (token + (FP32 + INT64) * k) * (len(layers) + again) + token * len(layers)
    summed = (2 * token + FP32 * k) * len(layers)
    return {"all-gather": _ring(n) * tokens * gathered, "reduce-scatter": _ring(n) * tokens * summed}


def _is_used_at_end(parameter: ModelParameter, config: RunConfig) -> bool:
    """Final norm and output projection stay gathered between the forward and the backward pass of a microbatch."""
    return parameter.layer is None and (parameter.spec.kind != "embedding" or config.model.tie_embeddings)


def _replicate(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """The sharded gradients, once a step."""
    return {"all-reduce": 2 * _ring(layout.replicate) * FP32 * estimate_rank_memory(config, layout, rank).n_parameters}


def _tensor(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """Activations of [tokens, D]: gathered inputs and summed outputs of blocks, embedding and loss.

    With `sequence` an input is all-gathered and an output reduce-scattered, and the other way round for their
    gradients. Without it an output is all-reduced, and the gradient of an input. Recomputation repeats the collectives
    of the forward pass, unless their results are kept. The loss of a sharded vocabulary exchanges three fp32 numbers a
    token, and norms over all heads one each. Gradients of parameters that every tensor rank has are summed before FSDP2
    reduces them.
    """
    t, model, train = layout.tensor, config.model, config.train
    held = estimate_rank_memory(config, layout, rank)
    if t == 1:
        return {}
    is_first = any(layers.start == 0 for layers in held.layers)
    is_last = any(layers.stop == model.n_layers for layers in held.layers)
    once = _ring(t) * COMPUTE_BYTES[train.precision] * _tokens(config, layout) * model.d_model
    blocks = {layer: BlockCollectives.of(model, layer) for layers in held.layers for layer in layers}
    statistics = 3 * 2 * _ring(t) * FP32 * _tokens(config, layout) * is_last
    # The gradient of a gather is a reduction, and the other way round.
    both_ways = sum(block.gathers + block.reductions for block in blocks.values())
    # A block's last reduction, that of a dense MLP, is not repeated: nothing needs its result.
    again = {layer: blocks[layer] for layer in _recomputed_layers(config, held)}
    gathers_again = sum(block.gathers for block in again.values())
    reductions_again = sum(block.reductions - (not model.moe.has_experts(i)) for i, block in again.items())
    # The mean squares of queries and keys, one of each rank.
    squares = 2 * (t - 1) * FP32 * _tokens(config, layout) * (model.qk_norm == "full")
    squares_gathered, squares_scattered = squares * (len(blocks) + len(again)), squares * len(blocks)
    if not layout.sequence:
        reduced_outputs = 2 * once * (both_ways + reductions_again + is_first + is_last)
        found = {"all-reduce": reduced_outputs + statistics}
        # The tokens of a layer with experts are joined after it, and their gradients before it, because it split them.
        joined = 2 * once * len(_moe_layers(config, layout, rank))
        if squares or joined:
            found |= {"all-gather": squares_gathered + joined, "reduce-scatter": squares_scattered}
        return found
    micro = n_microbatches(config, layout)
    at_once = layout.zero == 1 or layout.pipeline > 1
    # Just before FSDP2 reduces them further.
    reduced = FP32 if at_once and micro > 1 else COMPUTE_BYTES[train.precision] * micro
    summed = sum(each.elements(layout) for each in _parameters(config, layout, rank) if each.tensor_dim is None)
    return {
        "all-gather": once * (both_ways + gathers_again + is_first + is_last) + squares_gathered,
        "reduce-scatter": once * (both_ways + reductions_again + is_first + is_last) + squares_scattered,
        "all-reduce": statistics + 2 * _ring(t) * reduced * summed,
    }


def _recomputed_layers(config: RunConfig, held: RankMemory, among: Collection[int] | None = None) -> list[int]:
    """Layers of a rank, or those of `among`, whose backward pass repeats the collectives of the forward pass."""
    train = config.train
    if train.recompute == "selective" and "collective" in train.recompute_keep:
        return []
    flags = {
        layer: again
        for layers in held.layers
        for layer, again in zip(layers, recompute_flags(config, layers), strict=True)
    }
    return [layer for layer, again in flags.items() if again and (among is None or layer in among)]


def _context(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """`gather`: keys and values, and the sums of their gradients.

    `ulysses`: queries, keys, values and outputs, both ways.
    """
    c, model, train = layout.context, config.model, config.train
    held = estimate_rank_memory(config, layout, rank)
    layers = sum(map(len, held.layers))
    again = len(_recomputed_layers(config, held))
    kv = max(1.0, model.n_kv_heads / layout.tensor) * model.head_dim
    q = model.n_heads / layout.tensor * model.head_dim
    per_number = _ring(c) * COMPUTE_BYTES[train.precision] * _tokens(config, layout)  # of the rank's tensor
    if layout.context_method == "ulysses":
        return {"all-to-all": per_number * (2 * q + 2 * kv) * (2 * layers + again)}
    whole_rows = per_number * c * 2 * kv
    return {"all-gather": whole_rows * (layers + again), "reduce-scatter": whole_rows * layers}


def _pipeline(config: RunConfig, layout: Layout, rank: int) -> dict[str, float]:
    """An activation or gradient for each microbatch and each boundary between ranks; a tied embedding's gradient."""
    if layout.pipeline == 1:
        return {}
    model, held = config.model, estimate_rank_memory(config, layout, rank)
    here, ends = layout.coordinates(rank)["pipeline"], layout.n_stages
    cuts = sum(
        0 <= neighbour < ends and rank_of_stage(neighbour, layout) != here
        for stage in held.stages
        for neighbour in (stage - 1, stage + 1)
    )
    split = layout.tensor if layout.sequence else 1
    sent = cuts * _tokens(config, layout) * model.d_model * COMPUTE_BYTES[config.train.precision] / split
    if model.tie_embeddings and rank_of_stage(0, layout) != rank_of_stage(ends - 1, layout):
        sent += FP32 * held.parameters.get("embedding", 0)
    return {"send": sent}
