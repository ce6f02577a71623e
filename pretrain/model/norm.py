"""RMSNorm (arXiv:1910.07467), computed in fp32 whatever the input's dtype."""

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
        """Normalise any shape that ends in `width`. The result has the dtype of x, even with an fp32 weight."""
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(self.mean_square(x_fp32) + self.eps)
        # Round before applying the weight, as the models of transformers do: bf16 checkpoints give the same numbers.
        return (self.weight * normed.to(x.dtype)).to(x.dtype)

    def mean_square(self, x_fp32: Tensor) -> Tensor:
        """[..., width] -> [..., 1]. A method of its own, because ranks that share the width replace it."""
        return x_fp32.square().mean(-1, keepdim=True)
