"""Clipping of the gradients by their global norm (arXiv:1211.5063)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale the `.grad` of all parameters in place so that their joint L2 norm is at most `max_norm`; None scales nothing.

    Returns the norm before clipping, a scalar on the device of the gradients: nothing here waits for the device. Where that norm is
    not finite, scaling makes the gradients NaN; the caller sees it in the norm and decides.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in with_gradient if parameter.grad is not None])
    if max_norm is not None:
        clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm
