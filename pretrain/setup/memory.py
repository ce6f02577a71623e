"""Whether what a rank certainly holds fits onto its device, and its batches into the host's memory: asked before anything is written.

Only what is counted in parameters is certain. Activations are not refused: their estimate may be wrong, and smaller microbatches help.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.estimate.rank_memory import fullest, hold
from pretrain.setup.layout_rules import divisors

MOST_DOUBLINGS = 10
"""Of the number of processes, that a way out may ask for."""

RANKS_OF_A_NODE = 8
"""Tensor ranks that a way out may ask for: beyond a node's they are slow."""

GIB = 2**30

BYTES_PER_TOKEN = 4 * 4
"""Of a batch on the host: token id, label, position and document number, int32 each."""

BATCHES_IN_MEMORY = 2
"""One is trained on while the next is read."""


def check_fits(config: RunConfig, layout: Layout) -> None:
    """Refuse what this machine's memory certainly cannot hold; see `check_memory` and `check_batch`."""
    check_memory(config, layout, device_bytes(config))
    check_batch(config, layout, host_bytes())


def device_bytes(config: RunConfig) -> int | None:
    """Memory of one device; None where it is not known, or is the host's."""
    if config.train.device != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def check_memory(config: RunConfig, layout: Layout, available: int | None) -> None:
    """Refuse a layout whose fullest rank holds more than a device has.

    Args:
        config: resolved.
        layout: of `layout_of`.
        available: bytes, of `device_bytes`; None checks nothing.

    Raises:
        UserError: with the smallest change that fits.
    """
    if available is None or (needed := _static_bytes(config, layout)) <= available:
        return
    fits = (told for told, other in _changes(config, layout) if _static_bytes(config, other) <= available)
    raise UserError(
        f"the fullest rank would hold {needed / GIB:,.1f} GiB of parameters, gradients and optimizer state ({layout}, "
        f"parallel.zero={layout.zero}), and a device has {available / GIB:,.1f} GiB: {next(fits, 'use a smaller model')}"
    )


def host_bytes() -> int | None:
    """Memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def check_batch(config: RunConfig, layout: Layout, available: int | None) -> None:
    """Refuse a global batch of which one process's rows do not fit into the host's memory.

    Args:
        config: resolved.
        layout: of `layout_of`.
        available: bytes, of `host_bytes`; None checks nothing.

    Raises:
        UserError: with the largest batch that fits.
    """
    ranks = layout.replicate * layout.shard
    bytes_per_sequence = BATCHES_IN_MEMORY * BYTES_PER_TOKEN * config.data.seq_len
    needed = -(-config.train.batch_size // ranks) * bytes_per_sequence
    if available is not None and needed > available:
        raise UserError(
            f"train.batch_size={config.train.batch_size} sequences of data.seq_len={config.data.seq_len} tokens need "
            f"{needed / GIB:,.0f} GiB of memory in each process, and this machine has {available / GIB:,.0f} GiB: "
            f"at most {available // bytes_per_sequence * ranks} fit"
        )


def _static_bytes(config: RunConfig, layout: Layout) -> int:
    return hold(config, layout, fullest(config, layout)).static_bytes


def _changes(config: RunConfig, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Other layouts, those first that ask for least: no more processes, then as few more as can be, then the host's memory."""
    model, zero = config.model, 3 if layout.pipeline == 1 else layout.zero
    and_zero = f" parallel.zero={zero}" if zero != layout.zero else ""
    if and_zero:
        yield f"use{and_zero}", replace(layout, zero=zero)
    for size in divisors(layout.replicate)[1:]:
        shard, copies = layout.shard * size, layout.replicate // size
        yield (
            f"use parallel.shard={shard} parallel.replicate={copies}{and_zero}",
            replace(layout, shard=shard, replicate=copies, zero=zero),
        )
    divided = math.gcd(model.n_heads, model.n_kv_heads, model.d_ff, model.vocab_size)
    for doublings in range(1, MOST_DOUBLINGS + 1):
        for axis in ("shard", "tensor"):
            size = getattr(layout, axis) << doublings
            if axis == "shard" or (size <= RANKS_OF_A_NODE and divided % size == 0):
                processes = layout.world_size << doublings
                yield (
                    f"use parallel.{axis}={size}{and_zero} on {processes} processes",
                    replace(layout, zero=zero, **{axis: size}),
                )
    if not layout.offload:
        yield "use parallel.offload=true", replace(layout, offload=True)
