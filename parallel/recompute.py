"""Activation recomputation (arXiv:1604.06174): the backward pass computes a block's activations again.

`full` keeps the input of each block. `selective` also keeps the results of the operators that are expensive to
compute (arXiv:2205.05198, section 5). A block keeps its parameter names: only its forward is wrapped. The wrapper
lies inside of FSDP and of torch.compile; with a split backward pass it lies around the compiled pieces
(`parallel.pipeline.zero_bubble`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Forward = Callable[..., Tensor]

OPERATORS: dict[str, frozenset[str]] = {
    "matmul": frozenset(
        {"aten::mm", "aten::bmm", "aten::addmm", "aten::linear", "aten::baddbmm", "pretrain::grouped_mm"}
    ),
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
"""Value of `train.recompute_keep` -> the operators whose results it keeps, by name in PyTorch's dispatcher."""


def apply_recompute(
    blocks: Sequence[nn.Module], mode: str, first: int = 0, every: int = 1, keep: Collection[str] = ()
) -> None:
    """Make every `every`-th block of the model recompute its activations, in place.

    Args:
        blocks: of this rank, in order.
        mode: `none`, `full` or `selective`.
        first: index of the first of them in the full model, from 0.
        every: 1 is all blocks, 2 the second, fourth, ... of the full model.
        keep: keys of OPERATORS, for `selective`.
    """
    if mode == "none":
        return
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
    if mode == "selective":
        kept_operators = frozenset().union(*(OPERATORS[key] for key in keep))
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, _keep_policy(kept_operators)))
    for number, block in enumerate(blocks, first + 1):
        if number % every == 0:
            block.forward = _checkpointed(block.forward, run)  # a wrapper module would rename the parameters


def _checkpointed(forward: Forward, run: Callable[..., Tensor]) -> Forward:
    """A Python function, not a `partial`: the compiler skips callables without a frame, and everything they call."""

    def checkpointed(*args: object, **kwargs: object) -> Tensor:
        return run(forward, *args, **kwargs)

    return checkpointed


def _keep_policy(kept_operators: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    # Any: an OpOverload, which is not public.
    def policy(_: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        is_kept = operator.name().split(".")[0] in kept_operators
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
