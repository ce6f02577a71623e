"""The shuffled data order in O(1) memory: a keyed permutation of [0, n), evaluated for any index alone.

The permutation is a Feistel network (M. Luby and C. Rackoff, "How to construct pseudorandom permutations from
pseudorandom functions", SIAM J. Comput. 17(2), 1988). Each round adds a hash of one half of a number to the other half.
A round can be undone, so the network is a bijection for any hash. Ours is splitmix64.

The two halves of a number are a digit in base `a` and a digit in base `b`, both about sqrt(n), with a * b >= n (the
"generalised" Feistel network of J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Results
outside of [0, n) pass through the network again until they are inside ("cycle walking", same paper), which keeps the
bijection. Since a * b - n < a, this happens to about one number in sqrt(n). With two halves of whole bits, it could be
three numbers in four.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.hashing import GOLDEN_GAMMA, splitmix64

ROUNDS = 8
"""Four rounds cannot be distinguished from a random permutation for large n. Small n have small digits and need
more."""

_MIN_BASE = 4  # with smaller digits, a round has almost nothing to hash
_MASK64 = (1 << 64) - 1


def permutation_key(seed: int, *parts: int | str) -> int:
    """Derive a 64-bit key from a seed and parts. Different seeds or parts give unrelated permutations."""
    key = splitmix64(np.array([seed & _MASK64], np.uint64))
    for part in parts:
        number = xxhash.xxh3_64_intdigest(part.encode()) if isinstance(part, str) else part & _MASK64
        key = splitmix64(key ^ np.uint64(number))
    return int(key[0])


def permute(index: NDArray[np.int64], n: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply the keyed permutation of [0, n) to each element of `index`.

    Args:
        index: numbers in [0, n), any length.
        n: size of the permuted range, up to 2^62.
        key: key of the permutation, or one key for each element.

    Raises:
        ValueError: a number lies outside of [0, n).
    """
    index = np.asarray(index, np.int64)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"indices must lie in [0, {n}), got {index.min()} to {index.max()}")
    a = max(_MIN_BASE, isqrt(n - 1) + 1)
    b = max(_MIN_BASE, -(-n // a))
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    out = _feistel(index.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], a, b, keys[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], a: int, b: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pass numbers below a * b through the network once."""
    digit, other = np.divmod(x, np.uint64(b))
    base, other_base = np.uint64(a), np.uint64(b)
    for round_number in range(1, ROUNDS + 1):
        hashed = splitmix64((keys + np.uint64(round_number * GOLDEN_GAMMA & _MASK64)) ^ other)
        total = ((hashed >> np.uint64(32)) * base) >> np.uint64(32)  # the hash, scaled to [0, base)
        total += digit
        # total modulo base: where total < base, the unsigned difference wraps around to a huge number.
        np.minimum(total, total - base, out=total)
        digit, other, base, other_base = other, total, other_base, base
    return digit * other_base + other
