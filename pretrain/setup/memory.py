"""Constraints on memory: a rank's parameters and state fit onto its device, its batches into the host's memory.

Only what is counted in parameters is certain. Activations are not checked: their estimate may be wrong, and smaller
microbatches help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.estimate.communication import estimate_traffic
from pretrain.estimate.rank_memory import estimate_rank_memory, find_peak_rank
from pretrain.setup.constraints import Violation, divisors

MAX_DOUBLINGS = 10
"""How often a remedy may double the number of processes."""

MAX_TENSOR_RANKS = 8
"""Tensor ranks that a remedy may ask for: they are slow beyond one node."""

MIN_SAVING = 0.05
"""Smallest part of the static memory for which more expert ranks are suggested."""

GIB = 2**30

BYTES_PER_TOKEN = 4 * 4
"""Of a batch on the host: token id, label, position and document number, int32 each."""

BATCHES_IN_MEMORY = 2
"""One is trained on while the next is read."""


def state_fits_device(config: RunConfig, layout: Layout, needed: int, available: int) -> Violation | None:
    """The fullest rank holds no more than a device has. The remedy is the smallest change that achieves it.

    Args:
        config: resolved.
        layout: of `build_layout`.
        needed: bytes that the fullest rank holds, whatever the batch.
        available: bytes of a device.
    """
    if needed <= available:
        return None
    fits = (remedy for remedy, other in _alternatives(config, layout) if _static_bytes(config, other) <= available)
    return Violation(
        f"the fullest rank would hold {needed / GIB:,.1f} GiB of parameters, gradients and optimizer state ({layout}, "
        f"parallel.zero={layout.zero}), and a device has {available / GIB:,.1f} GiB",
        next(fits, "use a smaller model"),
    )


def batch_fits_host(config: RunConfig, layout: Layout, available: int) -> Violation | None:
    """The rows that one process reads of a global batch fit into host memory. The remedy is the largest that fits.

    Args:
        config: resolved.
        layout: of `build_layout`.
        available: bytes of the host.
    """
    bytes_per_sequence = BATCHES_IN_MEMORY * BYTES_PER_TOKEN * config.data.seq_len
    needed = -(-config.train.batch_size // layout.data) * bytes_per_sequence
    if needed <= available:
        return None
    return Violation(
        f"train.batch_size={config.train.batch_size} sequences of data.seq_len={config.data.seq_len} tokens need "
        f"{needed / GIB:,.0f} GiB of memory in each process, and this machine has {available / GIB:,.0f} GiB",
        f"at most {available // bytes_per_sequence * layout.data} fit",
    )


def suggest_expert_ranks(config: RunConfig, layout: Layout, ranks_per_node: int) -> str:
    """One line on the `parallel.expert` that holds least, if more than now helps; empty if not.

    Expert ranks stay inside a node, because tokens travel between them in every layer.
    """
    now = _static_bytes(config, layout)
    inside = [other for other in _with_more_expert_ranks(config, layout) if other.expert <= ranks_per_node]
    least = min(inside, key=lambda other: _static_bytes(config, other), default=layout)
    saved = now - _static_bytes(config, least)
    if saved < MIN_SAVING * now:
        return ""
    sent = sum(estimate_traffic(config, least, find_peak_rank(config, least)).get("expert", {}).values())
    return (
        f"parallel.expert={least.expert} would hold {(now - saved) / GIB:,.2f} GiB on the fullest rank whatever the "
        f"batch, instead of {now / GIB:,.2f} GiB, and send {sent / GIB:,.2f} GiB of tokens to experts in a step"
    )


def _with_more_expert_ranks(config: RunConfig, layout: Layout) -> Iterator[Layout]:
    """The same processes with every larger `parallel.expert` that is possible."""
    ranks = layout.fsdp * layout.tensor // layout.expert_tensor
    for size in divisors(max(1, config.model.moe.n_experts)):
        if size > layout.expert and ranks % size == 0:
            yield replace(layout, expert=size)


def _static_bytes(config: RunConfig, layout: Layout) -> int:
    return estimate_rank_memory(config, layout, find_peak_rank(config, layout)).static_bytes


def _alternatives(config: RunConfig, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """(remedy, layout): those with as many processes, then those with as few more as possible, then host memory."""
    model, zero = config.model, 3 if layout.pipeline == 1 else layout.zero
    and_zero = f" parallel.zero={zero}" if zero != layout.zero else ""
    if and_zero:
        yield f"use{and_zero}", replace(layout, zero=zero)
    for other in _with_more_expert_ranks(config, layout):
        yield f"use parallel.expert={other.expert}{and_zero}", replace(other, zero=zero)
    for size in divisors(layout.replicate)[1:]:
        shard, copies = layout.shard * size, layout.replicate // size
        yield (
            f"use parallel.shard={shard} parallel.replicate={copies}{and_zero}",
            replace(layout, shard=shard, replicate=copies, zero=zero),
        )
    tensor_multiple = math.gcd(model.n_heads, model.n_kv_heads, model.d_ff, model.vocab_size)
    for doublings in range(1, MAX_DOUBLINGS + 1):
        for axis in ("shard", "tensor"):
            size = getattr(layout, axis) << doublings
            if axis == "shard" or (size <= MAX_TENSOR_RANKS and tensor_multiple % size == 0):
                processes = layout.world_size << doublings
                yield (
                    f"use parallel.{axis}={size}{and_zero} on {processes} processes",
                    replace(layout, zero=zero, **{axis: size}),
                )
    if not layout.offload:
        yield "use parallel.offload=true", replace(layout, offload=True)
