"""Context parallelism: the ranks of the `context` axis share out the tokens of every row. Attention alone looks beyond its own tokens.

Two methods, both on plain collectives, so that they run on gloo and keep documents apart:

- `gather` (Llama 3, arXiv:2407.21783, section 3.3.2): every rank gathers the keys and values of whole rows and answers its own queries.
  Under a causal mask late queries cost more than early ones, so with c ranks a row is cut into 2c chunks and rank i holds chunks i and
  2c-1-i: all ranks have the same work.
- `ulysses` (arXiv:2309.14509): rank i holds the i-th of c chunks. Around attention the ranks exchange sequence parts for heads, so that
  each sees whole rows of some heads; it moves less, but cannot use more ranks than there are key/value heads.

Everything else works on each token alone; the mask brings the positions of the held tokens for RoPE.
Shape suffixes: B batch, S held tokens, R tokens of the row, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
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
"""(queries [B, S, H, K], keys and values [B, R, G, K], mask) -> [B, S, H, K]. The mask's type is the model's, and passes through."""


@runtime_checkable
class HasAttentionFunction(Protocol):
    """A module that does its attention by a function, which can be replaced."""

    attention_function: AttentionFunction


def local_tokens(seq_len: int, layout: Layout, context_rank: int) -> LocalTokens:
    """The tokens of each row of `seq_len` that a rank of the context axis holds. Raises LayoutError if they cannot be shared out evenly."""
    ranks, chunks = layout.context, chunks_per_row(layout)
    if seq_len % chunks:
        raise LayoutError(
            f"data.seq_len={seq_len} has to be a multiple of {chunks} with parallel.context={ranks} and "
            f"parallel.context_method={layout.context_method}; try {-(-seq_len // chunks) * chunks}"
        )
    size = seq_len // chunks
    if chunks == ranks:
        return LocalTokens(((context_rank * size, (context_rank + 1) * size),), full_rows=True)
    mirrored = chunks - 1 - context_rank
    return LocalTokens(
        ((context_rank * size, (context_rank + 1) * size), (mirrored * size, (mirrored + 1) * size)), full_rows=False
    )


def chunks_per_row(layout: Layout) -> int:
    """How many equal chunks a row is cut into: its length has to be a multiple of that."""
    return 2 * layout.context if layout.context > 1 and layout.context_method == "gather" else layout.context


def shard_sequence(microbatch: Microbatch, tokens: LocalTokens) -> Microbatch:
    """The held tokens of whole rows. Positions and document ids stay whole, for the mask; so does the number of targets."""

    def mine(rows_BR: Tensor) -> Tensor:
        parts = [rows_BR[:, first:end] for first, end in tokens.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    return replace(
        microbatch, input_ids=mine(microbatch.input_ids), labels=mine(microbatch.labels), local_tokens=tokens
    )


def apply_context_parallel(module: nn.Module, mesh: DeviceMesh, method: str) -> None:
    """Let every attention inside `module` reach over the ranks of the 1-D `mesh`, by `gather` or `ulysses`."""
    around = {"gather": allgather_attention, "ulysses": ulysses_attention}[method]
    for part in module.modules():
        if isinstance(part, HasAttentionFunction):
            part.attention_function = partial(around, part.attention_function, mesh.get_group())


def allgather_attention(
    attend: AttentionFunction, group: ProcessGroup, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: object
) -> Tensor:
    """Attention of the held queries over the keys and values of whole rows; the mask says where in the row the queries stand."""
    k_BRGK, v_BRGK = _in_order(all_gather(torch.stack((k_BSGK, v_BSGK))[None], group, 0))  # one message for both
    return attend(q_BSHK, k_BRGK, v_BRGK, mask)


def _in_order(parts_C2BSGK: Tensor) -> Tensor:
    """What the ranks hold -> [2, B, R, G, K] in the order of the row."""
    early, late = parts_C2BSGK.chunk(2, dim=3)
    return torch.cat((*early, *reversed(late.unbind())), dim=2)


def ulysses_attention(
    attend: AttentionFunction, group: ProcessGroup, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: object
) -> Tensor:
    """Attention of whole rows in this rank's share of the heads. Raises ValueError unless the ranks divide the key/value heads."""
    if k_BSGK.shape[2] % group.size():
        raise ValueError(
            f"parallel.context_method=ulysses shares out key/value heads, and parallel.context={group.size()} does not divide the "
            f"{k_BSGK.shape[2]} of a rank; use parallel.context_method=gather"
        )
    q, k, v = (all_to_all(x, group, split_dim=2, concat_dim=1) for x in (q_BSHK, k_BSGK, v_BSGK))
    return all_to_all(attend(q, k, v, mask), group, split_dim=1, concat_dim=2)
