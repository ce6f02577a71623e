"""fp32 master weights beside bf16 compute weights, in one process. On several, `parallel.fsdp` holds both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def split_master_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Cast the parameters of `model` to `dtype`, and return their fp32 master weights by name.

    The master weights collect the gradients of the parameters. If `dtype` is fp32, the parameters are the master
    weights.
    """
    if dtype == torch.float32:
        return dict(model.named_parameters())
    master_weights = {name: nn.Parameter(parameter.detach()) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)  # new memory; the master weight keeps the old
        hook = _accumulate_into(master_weights[name])
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # untyped in torch
    return master_weights


def _accumulate_into(master_weight: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a finished gradient to the master weight's gradient, and frees it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master_weight.grad is None:
            master_weight.grad = parameter.grad.float()
        else:
            master_weight.grad += parameter.grad
        parameter.grad = None

    return hook
