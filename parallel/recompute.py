"""Activation recomputation (arXiv:1604.06174): what a block's backward pass needs is computed again instead of kept.

`full` keeps the input of each block; `selective` also the results of the operators that are dear to compute (arXiv:2205.05198, section 5).
A block stays the same module with the same parameter names; its forward is wrapped, inside of what is gathered and compiled (under zero
bubble, around what is compiled).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Forward = Callable[..., Tensor]

OPERATORS: dict[str, frozenset[str]] = {
    "matmul": frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::linear", "aten::baddbmm", "aten::_grouped_mm"}),
    "attention": frozenset(
        {
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_flash_attention_forward",
            "torch_attn::_varlen_attn",
            "flash_attn::_flash_attn_varlen_forward",
            "flash_attn_3::fwd",
        }
    ),
    "collective": frozenset(
        {
            "_c10d_functional::all_gather_into_tensor",
            "_c10d_functional::reduce_scatter_tensor",
            "_c10d_functional::all_reduce",
            "_c10d_functional::all_to_all_single",
            "_c10d_functional::wait_tensor",
        }
    ),
}
"""Operators whose results each word of `train.recompute_keep` keeps, by their names in PyTorch's dispatcher."""


def apply_recompute(
    blocks: Sequence[nn.Module], mode: str, first: int = 0, every: int = 1, keep: Collection[str] = ()
) -> None:
    """Have every `every`-th block of the model recompute its activations, in place.

    Args:
        blocks: those of the transformer's blocks that are here, in order.
        mode: `none`, `full` or `selective`.
        first: number of the first of them in the whole model, from 0.
        every: 1 is all of them, 2 the second, fourth, ... of the model, however it is cut.
        keep: with `selective`, words of OPERATORS.
    """
    if mode == "none":
        return
    wrap = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
    if mode == "selective":
        kept = frozenset().union(*(OPERATORS[word] for word in keep))
        wrap = partial(wrap, context_fn=partial(create_selective_checkpoint_contexts, _policy(kept)))
    for number, block in enumerate(blocks, first + 1):
        if number % every == 0:
            block.forward = _wrapped(block.forward, wrap)  # a wrapper module would rename the parameters


def _wrapped(forward: Forward, wrap: Callable[..., Tensor]) -> Forward:
    """A Python function, not a `partial`: the compiler passes over what has no frame, and all that is called from there."""

    def recomputed(*given: object, **named: object) -> Tensor:
        return wrap(forward, *given, **named)

    return recomputed


def _policy(kept: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    def keep_or_recompute(
        _: object, operator: Any, *args: object, **options: object
    ) -> CheckpointPolicy:  # Any: an OpOverload, not public
        return (
            CheckpointPolicy.MUST_SAVE if operator.name().split(".")[0] in kept else CheckpointPolicy.PREFER_RECOMPUTE
        )

    return keep_or_recompute
