"""RMSNorm (arXiv:1910.07467), computed in fp32 whatever the input's type."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, which has `width` elements."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape ending in `width`; the result has the type of x, also where the weight is kept in fp32."""
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        # Rounded before the weight is applied, as in transformers' models: bf16 checkpoints give the same numbers.
        return (self.weight * normed.to(x.dtype)).to(x.dtype)
