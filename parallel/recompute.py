"""Activation recomputation (arXiv:1604.06174): the backward pass computes a block's activations again.

`full` keeps the input of each block. `selective` also keeps the results of the operators that are expensive to
compute (arXiv:2205.05198, section 5). A block keeps its parameter names: only its forward is wrapped. The wrapper
lies inside of FSDP and of torch.compile; with a split backward pass it lies around the compiled pieces
(`parallel.pipeline.zero_bubble`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.torch_compat import TorchDispatchMode

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
    blocks: Sequence[nn.Module],
    mode: str,
    first: int = 0,
    every: int = 1,
    keep: Collection[str] = (),
    *,
    has_nested_units: bool = False,
) -> None:
    """Make every `every`-th block of the model recompute its activations, in place.

    Args:
        blocks: of this rank, in order.
        mode: `none`, `full` or `selective`.
        first: index of the first of them in the full model, from 0.
        every: 1 is all blocks, 2 the second, fourth, ... of the full model.
        keep: keys of OPERATORS, for `selective`.
        has_nested_units: whether FSDP gathers parts of a block on their own. With `selective` such blocks cannot be
            compiled.
    """
    if mode == "none":
        return
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
    if mode == "selective":
        kept_operators = frozenset().union(*(OPERATORS[key] for key in keep))
        contexts = partial(create_selective_checkpoint_contexts, _keep_policy(kept_operators))
        run = partial(run, context_fn=partial(_only_for, kept_operators, contexts) if has_nested_units else contexts)
    for number, block in enumerate(blocks, first + 1):
        if number % every == 0:
            block.forward = _checkpointed(block.forward, run)  # a wrapper module would rename the parameters


def _checkpointed(forward: Forward, run: Callable[..., Tensor]) -> Forward:
    """A Python function, not a `partial`: the compiler skips callables without a frame, and everything they call."""

    def checkpointed(*args: object, **kwargs: object) -> Tensor:
        return run(forward, *args, **kwargs)

    return checkpointed


Contexts = tuple[TorchDispatchMode, TorchDispatchMode]
"""For the forward pass and for the recomputation."""


def _only_for(operators: frozenset[str], make_contexts: Callable[[], Contexts]) -> Contexts:
    """Show only these operators to torch's selective checkpointing.

    Torch checks that the recomputation runs the same operators as the forward pass. The hooks of FSDP units inside a
    block do not: a unit that was gathered ahead in one of the two is gathered here in the other.
    """
    forward, recomputation = make_contexts()
    return _Filter(operators, forward), _Filter(operators, recomputation)


class _Filter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """A dispatch mode that passes some operators on to another one."""

    def __init__(self, operators: frozenset[str], mode: TorchDispatchMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._operators = operators
        self._mode = mode

    # Any: operators and arguments that torch passes to a dispatch mode have no public type.
    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _name(operator) in self._operators:
            shown = operator, types, args, kwargs
            return self._mode.__torch_dispatch__(*shown)  # type: ignore[no-untyped-call]  # as above
        return operator(*args, **(kwargs or {}))


def _name(operator: Any) -> str:  # Any: an OpOverload, which is not public
    name: str = operator.name().split(".")[0]
    return name


def _keep_policy(kept_operators: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    # Any: as above.
    def policy(_: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        is_kept = _name(operator) in kept_operators
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
