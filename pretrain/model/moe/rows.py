"""What a router knows of its tokens: which rows count, a random key for each token, the rest of a row on other ranks.

Shape suffixes: B rows, S tokens of a row on this rank, R tokens of a full row, E experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PADDING = -1
"""Key of a row that only fills up a microbatch. Its tokens are routed, but count nowhere."""

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # as signed numbers
_GOLDEN = -7046029254386353131
_POSITIVE = 2**62 - 1


def hash_int64(x: Tensor) -> Tensor:
    """Mix the bits of int64 numbers: splitmix64 (doi:10.1145/2714064.2660195), element by element."""
    x = x + _GOLDEN
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * multiplier
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(keys: Tensor) -> Tensor:
    """Return fp32 numbers in [0, 1) that depend on the keys only, so no layout changes them."""
    return (hash_int64(keys) >> 40 & 2**24 - 1).float() * 2**-24


def row_keys(row_ids_B: Tensor, seed: int) -> Tensor:
    """Return a random key for each row from its index in the run and the run's seed; PADDING stays PADDING."""
    signed_seed = (seed + 2**63) % 2**64 - 2**63  # a seed has 64 bits without a sign
    keys_B = hash_int64(row_ids_B + hash_int64(torch.tensor(signed_seed))) & _POSITIVE
    return torch.where(row_ids_B < 0, PADDING, keys_B)


class RowRanks(Protocol):
    """The ranks that hold the other tokens of this rank's rows. Nothing here is differentiated."""

    def sum(self, counts_BE: Tensor) -> Tensor:
        """Add up the numbers of all these ranks."""

    def gather(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] of each rank -> [B, R, ...] in the order of the row."""

    def local(self, x_BR: Tensor) -> Tensor:
        """[B, R, ...] in the order of the row -> [B, S, ...], the tokens of this rank."""

    @property
    def size(self) -> int:
        """R / S: number of ranks that share a row."""


class FullRows:
    """`RowRanks` of a rank that has full rows."""

    size = 1

    def sum(self, counts_BE: Tensor) -> Tensor:
        """See `RowRanks`."""
        return counts_BE

    def gather(self, x_BS: Tensor) -> Tensor:
        """See `RowRanks`."""
        return x_BS

    def local(self, x_BR: Tensor) -> Tensor:
        """See `RowRanks`."""
        return x_BR
