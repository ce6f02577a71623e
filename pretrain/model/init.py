"""Initial weights that depend on the seed, the parameter's name and shape, and on nothing else.

A matrix is made of tiles, each drawn from a random stream of its own: whoever holds some box of it draws the tiles that touch the box, and
nobody needs more memory than the box and one tile a thread. Draws are made on the CPU, in fp32, whatever the device and type of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model.spec import architecture_of
from pretrain.model.transformer import Transformer

ROWS, COLUMNS = 64, 1024
"""Of a tile. Fixed: other numbers are other weights. 256 KB are drawn in 0.5 ms, beside which opening the stream is nothing, and 64 rows
are few where 128 ranks share out the rows of a matrix: what a rank draws in vain is at most a tile at each edge of its box."""


def init_weights(model: Transformer, seed: int) -> None:
    """Draw all weights of a model, or of some layers of one, in place.

    The architecture's spec says how each begins: constant, or normal with some standard deviation.
    """
    for name, parameter in model.named_parameters():
        init_shard(name, parameter.detach(), (0,) * parameter.ndim, tuple(parameter.shape), model.config, seed)


def init_shard(
    name: str, local: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], config: ModelConfig, seed: int
) -> None:
    """Write the initial values of a box of a parameter, bit for bit those that the whole has there.

    Args:
        name: of the parameter in the whole model.
        local: the box, which is written to; it may be empty.
        offset: of its first element in the parameter.
        shape: of the whole parameter, a vector or a matrix.
        config: of the whole model.
        seed: of the run.

    Draws on as many threads as torch computes with.
    """
    _, spec = architecture_of(config).find(name)
    if spec.initial.std is None:
        local.fill_(spec.initial.constant)
        return
    std = spec.initial.std(config)
    key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")

    def write(tile: _Tile) -> None:
        values = torch.from_numpy(tile.draw(key, shape)).mul_(std)
        rows, columns = (
            _overlap(*where) for where in zip((tile.row, tile.column), offset, local.shape, values.shape, strict=True)
        )
        local[rows.of_box, columns.of_box] = values[rows.of_tile, columns.of_tile].to(local.device, local.dtype)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(write, _tiles(offset, tuple(local.shape))):
            pass


class _Tile(NamedTuple):
    """A tile by its first row and column in the parameter."""

    row: int
    column: int

    def draw(self, key: int, shape: tuple[int, ...]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """Standard normal numbers, of the tile as far as the parameter goes.

        Philox (doi:10.1145/2063384.2063405) takes the whole key, where torch's generator on a CPU keeps 32 bits of a seed, and its numbers
        become normal ones in scalar code, where torch's depend on the instruction set.
        """
        stream = np.random.Philox(key=key, counter=(self.row // ROWS << 192) + (self.column // COLUMNS << 128))
        size = min(ROWS, shape[0] - self.row), min(COLUMNS, shape[1] - self.column)
        return np.random.Generator(stream).standard_normal(size, dtype=np.float32)


def _tiles(offset: tuple[int, ...], size: tuple[int, ...]) -> Iterator[_Tile]:
    """The tiles that touch the box."""
    if 0 not in size:
        for row in range(offset[0] // ROWS * ROWS, offset[0] + size[0], ROWS):
            for column in range(offset[1] // COLUMNS * COLUMNS, offset[1] + size[1], COLUMNS):
                yield _Tile(row, column)


class _Overlap(NamedTuple):
    """What a tile and a box have in common along a dimension, as each counts."""

    of_tile: slice
    of_box: slice


def _overlap(tile: int, box: int, box_size: int, tile_size: int) -> _Overlap:
    first, end = max(tile, box), min(tile + tile_size, box + box_size)
    return _Overlap(slice(first - tile, end - tile), slice(first - box, end - box))
