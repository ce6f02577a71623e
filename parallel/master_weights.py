"""fp32 masters beside bf16 copies, on one process; on several, `parallel.fsdp` has both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def split_master_weights(model: nn.Module, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], Callable[[], None]]:
    """Turn the module's parameters into copies of `dtype`, if they are not of it already.

    Returns:
        The fp32 masters by name, which collect the gradients; and what brings the copies up to them.
    """
    if dtype == torch.float32:
        return dict(model.named_parameters()), lambda: None
    master_weights = {name: nn.Parameter(parameter.detach()) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)  # new memory: what it had is the master's alone from here on
        parameter.register_post_accumulate_grad_hook(_collect_into(master_weights[name]))  # type: ignore[no-untyped-call]  # untyped in torch
    copies, originals = list[Tensor](model.parameters()), list[Tensor](master_weights.values())
    return master_weights, lambda: torch._foreach_copy_(
        copies, originals
    )  # no public name; a loop of copy_() does the same, slower


def _collect_into(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Hook: add a finished gradient to the master's, and free it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return hook
