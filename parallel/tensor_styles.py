"""Styles of tensor parallelism, and the dimension of a module's parameters that each divides. Imports no torch.

`parallel.tensor` says what each style does to the module's input and output.
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
"""{style: dimension that tensor ranks divide}. None: every rank has all of the parameter."""


def shard_dim(style: str, *, tensor: int, kv_heads: int) -> int | None:
    """Return the dimension that `tensor` ranks divide.

    Ranks that share a key/value head have all heads, and sum their gradients.
    """
    return None if shares_heads(style, tensor=tensor, kv_heads=kv_heads) else SHARD_DIM[style]


def shares_heads(style: str, *, tensor: int, kv_heads: int) -> bool:
    """Whether each rank has all key/value heads and uses one of them: there are fewer heads than ranks."""
    return style == "kv_colwise" and tensor > kv_heads
