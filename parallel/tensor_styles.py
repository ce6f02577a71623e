"""The words of a tensor-parallel plan, and which dimension of a module's parameters each divides. Imports no torch: estimates read it.

`parallel.tensor` says what each does to the module's input and output.
"""

from __future__ import annotations

SHARD_DIM: dict[str, int | None] = {
    "vocab_parallel_embedding": 0,
    "sequence_parallel": None,
    "gather_sequence": None,
    "colwise": 0,
    "kv_colwise": 0,
    "replicated_with_grad_allreduce": None,
    "rowwise": 1,
    "vocab_parallel_head": 0,
}
"""Style -> dimension that tensor ranks share out; None leaves the parameters whole on every rank."""


def shard_dim(style: str, *, tensor: int, kv_heads: int) -> int | None:
    """The dimension that `tensor` ranks share out. Ranks that share a key/value head keep all heads, and sum their gradients."""
    return None if shares_heads(style, tensor=tensor, kv_heads=kv_heads) else SHARD_DIM[style]


def shares_heads(style: str, *, tensor: int, kv_heads: int) -> bool:
    """Whether a rank keeps all key/value heads and computes with one of them: there are fewer heads than ranks."""
    return style == "kv_colwise" and tensor > kv_heads
