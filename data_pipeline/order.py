"""The data order in O(1) memory: a keyed permutation of [0, n), evaluated one sample at a time.

A balanced Feistel network (M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions",
SIAM J. Comput. 17(2), 1988) is a bijection of 2h-bit numbers whatever its round function is; ours is the finaliser of splitmix64
(G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). A number that leaves [0, n) is
sent through again until it is back inside ("cycle walking": J. Black and P. Rogaway, "Ciphers with arbitrary finite domains",
CT-RSA 2002), which keeps the bijection and takes fewer than 4 passes on average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
"""Four make a permutation that cannot be told from a random one for large h; the halves of small n are a few bits, which want more."""

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def order_key(seed: int, epoch: int) -> int:
    """The 64-bit key of one pass over the data: another seed or epoch gives an unrelated order."""
    return int(_mix(_mix(np.array([seed & _MASK64], np.uint64)) ^ np.array([epoch & _MASK64], np.uint64))[0])


def permute(index: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Where the keyed permutation of [0, n) sends each of `index`, an array of any length of numbers in [0, n).

    Raises:
        ValueError: a number lies outside [0, n).
    """
    index = np.asarray(index, np.int64)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"indices must lie in [0, {n}), got {index.min()} to {index.max()}")
    half_bits = max(2, ((n - 1).bit_length() + 1) // 2)
    round_keys = _mix(np.array([(key + r * _GOLDEN) & _MASK64 for r in range(1, ROUNDS + 1)], np.uint64))
    out = _feistel(index.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, round_keys)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half_bits: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass over numbers of 2 * half_bits bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64: one step and its finaliser, modulo 2^64."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
