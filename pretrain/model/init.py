"""Initial weights. They depend only on the seed and on the parameter's name and shape, not on the layout.

A matrix consists of tiles, and each tile has a random stream of its own. A rank that has a shard of the matrix draws
the tiles that overlap the shard. That needs memory for the shard and one tile a thread. Numbers are drawn on the CPU in
fp32, whatever the device and dtype of the model. Stacked experts [E, rows, columns] are E matrices with streams of
their own.
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
"""Size of a tile. Other sizes would give other weights. Drawing a tile of 256 KB takes 0.5 ms, far longer than opening
its stream. 64 rows are few enough for 128 ranks that share the rows of a matrix: a rank draws at most one tile too
many at each edge."""


def init_weights(model: Transformer, seed: int) -> None:
    """Initialise all weights of a model, or of some of its layers, in place, as the architecture's spec says."""
    for name, parameter in model.named_parameters():
        init_shard(name, parameter.detach(), (0,) * parameter.ndim, tuple(parameter.shape), model.config, seed)


def init_shard(
    name: str, local: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], config: ModelConfig, seed: int
) -> None:
    """Write the initial values of a shard of a parameter: bit for bit those of the full parameter at that place.

    Uses as many threads as torch does.

    Args:
        name: canonical name of the parameter.
        local: the shard to write; it may be empty.
        offset: position of the shard's first element in the full parameter.
        shape: of the full parameter: a vector, a matrix, or a stack of matrices [E, rows, columns].
        config: of the model.
        seed: of the run.
    """
    _, spec = architecture_of(config).find(name)
    if spec.initial.std is None:
        local.fill_(spec.initial.constant)
        return
    std = spec.initial.std(config)
    if local.ndim == 3:
        named = [(f"{name}/{offset[0] + i}", matrix) for i, matrix in enumerate(local)]
        offset, shape = offset[1:], shape[1:]
    else:
        named = [(name, local)]

    def write(tile: _Tile, key: int, shard: Tensor) -> None:
        values = torch.from_numpy(tile.draw(key, shape)).mul_(std)
        rows, columns = (
            _overlap(*where) for where in zip((tile.row, tile.column), offset, shard.shape, values.shape, strict=True)
        )
        shard[rows.in_shard, columns.in_shard] = values[rows.in_tile, columns.in_tile].to(shard.device, shard.dtype)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        writes = [
            pool.submit(write, tile, _key(f"{seed}/{own_name}"), shard)
            for own_name, shard in named
            for tile in _tiles(offset, tuple(shard.shape))
        ]
        for each in writes:
            each.result()


def random_stream(name: str, seed: int) -> np.random.Generator:
    """Return a stream of random numbers that depends only on the seed and on `name`, which no parameter may have."""
    return np.random.Generator(np.random.Philox(key=_key(f"{seed}/{name}")))


def _key(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")


class _Tile(NamedTuple):
    """A tile, by its first row and column in the full parameter."""

    row: int
    column: int

    def draw(self, key: int, shape: tuple[int, ...]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """Draw standard normal numbers for the part of the tile that lies in the parameter.

        numpy's Philox (doi:10.1145/2063384.2063405) uses the full 128-bit key and computes normal numbers in scalar
        code. torch's CPU generator keeps 32 bits of a seed, and its normal numbers depend on the instruction set.
        """
        stream = np.random.Philox(key=key, counter=(self.row // ROWS << 192) + (self.column // COLUMNS << 128))
        size = min(ROWS, shape[0] - self.row), min(COLUMNS, shape[1] - self.column)
        return np.random.Generator(stream).standard_normal(size, dtype=np.float32)


def _tiles(offset: tuple[int, ...], size: tuple[int, ...]) -> Iterator[_Tile]:
    """The tiles that overlap a shard."""
    if 0 not in size:
        for row in range(offset[0] // ROWS * ROWS, offset[0] + size[0], ROWS):
            for column in range(offset[1] // COLUMNS * COLUMNS, offset[1] + size[1], COLUMNS):
                yield _Tile(row, column)


class _Overlap(NamedTuple):
    """The overlap of a tile and a shard along one dimension, in the coordinates of each."""

    in_tile: slice
    in_shard: slice


def _overlap(tile: int, shard: int, shard_size: int, tile_size: int) -> _Overlap:
    first, end = max(tile, shard), min(tile + tile_size, shard + shard_size)
    return _Overlap(slice(first - tile, end - tile), slice(first - shard, end - shard))
