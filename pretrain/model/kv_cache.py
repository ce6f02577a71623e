"""Keys and values of earlier tokens, so that generating a token does not recompute them.

Shape suffixes: B batch, S new tokens, T capacity of the cache in tokens, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import ModelConfig


class LayerCache(NamedTuple):
    """The keys and values of one layer: room for T tokens, of which the first `length` are written."""

    k_BTGK: Tensor
    v_BTGK: Tensor
    length: int

    def append(self, k_BSGK: Tensor, v_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write S more tokens in place. Return all keys and values so far."""
        end = self.length + k_BSGK.shape[1]
        self.k_BTGK[:, self.length : end] = k_BSGK
        self.v_BTGK[:, self.length : end] = v_BSGK
        return self.k_BTGK[:, :end], self.v_BTGK[:, :end]


class KVCache:
    """Keys and values of every layer, allocated once for `capacity` tokens. The model advances `length`."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (batch, capacity, config.n_kv_heads, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.capacity = capacity
        self.length = 0

    def layer(self, i: int) -> LayerCache:
        """The cache of layer i."""
        return LayerCache(self.keys[i], self.values[i], self.length)
