"""Context parallelism: `context` ranks share the tokens of every row. Only attention reads tokens of other ranks.

Two methods. Both use plain collectives, so they run on gloo and keep documents apart:

- `gather` (Llama 3, arXiv:2407.21783, section 3.3.2): every rank gathers the keys and values of full rows and
  computes the attention of its own queries. Under a causal mask late queries cost more than early ones. So a row is
  split into 2c chunks for c ranks, and rank i holds chunks i and 2c-1-i: all ranks have equal work.
- `ulysses` (arXiv:2309.14509): rank i holds the i-th of c chunks. Around attention an all-to-all exchanges sequence for
  heads, so that each rank sees full rows of some heads. It sends less, but allows no more ranks than key/value heads.

Shape suffixes: B batch, S local tokens, R tokens of the full row, C context ranks, H query heads, G key/value heads,
K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import all_gather, all_to_all
from parallel.engine import LocalTokens, Microbatch
from parallel.errors import LayoutError
from parallel.layout import Layout

AttentionFunction = Callable[[Tensor, Tensor, Tensor, object], Tensor]
"""(queries [B, S, H, K], keys and values [B, R, G, K], mask) -> [B, S, H, K]. The mask has the model's type."""


@runtime_checkable
class HasAttentionFunction(Protocol):
    """A module whose attention is a function that can be replaced."""

    attention_function: AttentionFunction


def chunks_per_row(layout: Layout) -> int:
    """Number of equal chunks that a row is split into. It must divide the length of a row."""
    return 2 * layout.context if layout.context > 1 and layout.context_method == "gather" else layout.context


def local_tokens(seq_len: int, layout: Layout, context_rank: int) -> LocalTokens:
    """The tokens of each row of `seq_len` that a context rank holds.

    Raises:
        LayoutError: `chunks_per_row` does not divide `seq_len`.
    """
    ranks, chunks = layout.context, chunks_per_row(layout)
    if seq_len % chunks:
        raise LayoutError(
            f"data.seq_len={seq_len} has to be a multiple of {chunks} with parallel.context={ranks} and "
            f"parallel.context_method={layout.context_method}; try {-(-seq_len // chunks) * chunks}"
        )
    size = seq_len // chunks
    early = context_rank * size, (context_rank + 1) * size
    if chunks == ranks:
        return LocalTokens((early,), full_rows=True)
    mirrored = chunks - 1 - context_rank
    return LocalTokens((early, (mirrored * size, (mirrored + 1) * size)), full_rows=False)


def shard_sequence(microbatch: Microbatch, tokens: LocalTokens) -> Microbatch:
    """Keep the local tokens of ids and labels. Positions, document ids and `n_targets` stay those of full rows."""

    def select(rows_BR: Tensor) -> Tensor:
        ranges = [rows_BR[:, first:end] for first, end in tokens.ranges]
        return ranges[0] if len(ranges) == 1 else torch.cat(ranges, 1)

    input_ids, labels = select(microbatch.input_ids), select(microbatch.labels)
    return replace(microbatch, input_ids=input_ids, labels=labels, local_tokens=tokens)


def apply_context_parallel(module: nn.Module, mesh: DeviceMesh, method: str) -> None:
    """Make every attention inside `module` work over the ranks of a 1-D mesh.

    Args:
        module: changed in place.
        mesh: the ranks that share a row.
        method: `gather` or `ulysses`.
    """
    wrapper = {"gather": allgather_attention, "ulysses": ulysses_attention}[method]
    for each in module.modules():
        if isinstance(each, HasAttentionFunction):
            each.attention_function = partial(wrapper, each.attention_function, mesh.get_group())


def allgather_attention(
    attention: AttentionFunction,
    group: ProcessGroup,
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    mask: object,
) -> Tensor:
    """Attention of the local queries over keys and values of full rows. The mask has the positions of the queries."""
    kv_C2BSGK = all_gather(torch.stack((k_BSGK, v_BSGK))[None], group, 0)  # one message for both
    k_BRGK, v_BRGK = in_row_order(kv_C2BSGK.unbind(), early_and_late=True, dim=2)
    return attention(q_BSHK, k_BRGK, v_BRGK, mask)


def in_row_order(local: Sequence[Tensor], *, early_and_late: bool, dim: int) -> Tensor:
    """Concatenate the tokens of all context ranks in the order of the row.

    Args:
        local: the tokens of each rank.
        early_and_late: whether each rank has an early and a late chunk, as with the method `gather`.
        dim: of the tokens.
    """
    if not early_and_late:
        return torch.cat(tuple(local), dim)
    early, late = zip(*(x.chunk(2, dim) for x in local), strict=True)
    return torch.cat((*early, *reversed(late)), dim)


def ulysses_attention(
    attention: AttentionFunction,
    group: ProcessGroup,
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    mask: object,
) -> Tensor:
    """Attention over full rows of this rank's heads.

    Raises:
        ValueError: the number of ranks does not divide the key/value heads.
    """
    if k_BSGK.shape[2] % group.size():
        raise ValueError(
            f"parallel.context_method=ulysses shares out key/value heads, and parallel.context={group.size()} does not "
            f"divide the {k_BSGK.shape[2]} of a rank; use parallel.context_method=gather"
        )
    q, k, v = (all_to_all(x, group, split_dim=2, concat_dim=1) for x in (q_BSHK, k_BSGK, v_BSGK))
    return all_to_all(attention(q, k, v, mask), group, split_dim=1, concat_dim=2)
