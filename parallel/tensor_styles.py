"""The styles of a tensor-parallel plan, and the dimension along which each shards a module's parameters.

Imports no torch, because estimates read it. `parallel.tensor` says what each style does to a module's input and output.
"""

from __future__ import annotations

SHARD_DIM: dict[str, int | None] = {
    "vocab_parallel_embedding": 0,
    "sequence_parallel": None,
    "gather_sequence": None,
    "colwise": 0,
    "kv_colwise": 0,
    "qk_norm": None,
    "replicated_with_grad_allreduce": None,
    "rowwise": 1,
    "vocab_parallel_head": 0,
    "split_tokens": None,
    "experts": None,
}
"""Style -> dimension that is sharded over tensor ranks; None replicates the parameters."""


def shard_dim(style: str, *, tensor: int, kv_heads: int) -> int | None:
    """The dimension that is sharded over `tensor` ranks. Ranks that share a head keep all heads and sum gradients."""
    return None if shares_heads(style, tensor=tensor, kv_heads=kv_heads) else SHARD_DIM[style]


def shares_heads(style: str, *, tensor: int, kv_heads: int) -> bool:
    """Whether ranks share key/value heads: with fewer heads than ranks, a rank keeps all and computes with one."""
    return style == "kv_colwise" and tensor > kv_heads
