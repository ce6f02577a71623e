"""Initial weights that depend on the seed and on the parameter's name, and on nothing else.

Every 1024 rows of a parameter are drawn from a generator of their own, so a rank that holds some rows can draw just
those. Draws are made on the CPU, in fp32, whatever the device and type of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import blake2b

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model.transformer import Transformer

ROWS = 1024
"""Rows of a block. Fixed: other numbers are other weights."""

_INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def initialise(model: Transformer, seed: int) -> None:
    """Draw all weights in place.

    Matrices are normal with `init_std`, those that write to the residual stream divided by sqrt(2 * n_layers) (GPT-2);
    norms are 1, biases 0.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for start, rows in initial_rows(name, parameter.shape, model.config, seed):
                parameter[start : start + len(rows)] = rows.to(parameter.device, parameter.dtype)


def initial_rows(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 rows) of every block of the parameter."""
    std = config.init_std / math.sqrt(2 * config.n_layers) if name.endswith(_INTO_RESIDUAL) else config.init_std
    for first in range(0, shape[0], ROWS):
        size = (min(ROWS, shape[0] - first), *shape[1:])
        if len(shape) > 1:
            yield first, torch.empty(size).normal_(0.0, std, generator=_generator(seed, name, first // ROWS))
        else:
            yield first, torch.zeros(size) if name.endswith("bias") else torch.ones(size)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    # torch keeps 32 bits of a CPU seed. Among the 20,000 blocks of a 405B model two coincide with a chance of 1 in 20;
    # that is harmless, and a reason for large blocks.
    digest = blake2b(f"{seed}/{name}/{block}".encode(), digest_size=4).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
