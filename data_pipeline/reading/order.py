"""The data order in O(1) memory: a keyed permutation of [0, n), evaluated one sample at a time.

A Feistel network (M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM J. Comput.
17(2), 1988) adds to one half of a number a hash of the other half, in turns; that can be undone, so it is a bijection whatever the
hash is. Our halves are a digit in base `a` and one in base `b`, both about sqrt(n), with a * b >= n ("generalised": J. Black and
P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002); our hash is splitmix64. A number that leaves [0, n) is sent through
again until it is back inside ("cycle walking", the same paper), which keeps the bijection. Since a * b - n is below a, that happens to
about one number in sqrt(n); halves of whole bits would leave [0, n) with up to three numbers in four.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.hashing import GOLDEN_GAMMA, splitmix64

ROUNDS = 8
"""Four make a permutation that cannot be told from a random one for large n; the digits of small n hold little, which wants more."""

_LEAST_BASE = 4  # less, and a round has almost nothing to hash
_MASK64 = (1 << 64) - 1


def permutation_key(seed: int, *parts: int | str) -> int:
    """A 64-bit key for what `parts` name: another seed, or other parts, give an unrelated order."""
    key = splitmix64(np.array([seed & _MASK64], np.uint64))
    for part in parts:
        number = xxhash.xxh3_64_intdigest(part.encode()) if isinstance(part, str) else part & _MASK64
        key = splitmix64(key ^ np.uint64(number))
    return int(key[0])


def permute(index: NDArray[np.int64], n: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where the keyed permutation of [0, n) sends each of `index`, an array of any length of numbers in [0, n), n up to 2^62.

    Args:
        index: what to permute.
        n: how many there are.
        key: of the permutation; or as many keys as `index` is long, of the permutation that each goes by.

    Raises:
        ValueError: a number lies outside [0, n).
    """
    index = np.asarray(index, np.int64)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"indices must lie in [0, {n}), got {index.min()} to {index.max()}")
    a = max(_LEAST_BASE, isqrt(n - 1) + 1)
    b = max(_LEAST_BASE, -(-n // a))
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    out = _feistel(index.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], a, b, keys[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], a: int, b: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass over numbers below a * b."""
    digit, other = np.divmod(x, np.uint64(b))
    base, other_base = np.uint64(a), np.uint64(b)
    for turn in range(1, ROUNDS + 1):
        hashed = splitmix64((keys + np.uint64(turn * GOLDEN_GAMMA & _MASK64)) ^ other)
        change = ((hashed >> np.uint64(32)) * base) >> np.uint64(32)  # from 0 to base - 1
        change += digit
        np.minimum(
            change, change - base, out=change
        )  # modulo base: below it, the difference wraps around to a huge number
        digit, other, base, other_base = other, change, other_base, base
    return digit * other_base + other
