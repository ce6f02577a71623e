"""64-bit hashes of numbers, and of the words and word n-grams of many texts at once.

A word is a run of letters, digits and marks, in lower case. All other characters only separate words. In writing
systems without spaces, each character is a word, so that n-grams are meaningful there too. So `a+b` and `A - B` have
the same words: near-duplicates and contamination should be found in spite of such differences. Exact duplicates are
found by another hash, elsewhere.

All characters of a batch of texts are hashed in a few NumPy passes. With prefix[i] = the sum over j < i of value[j] *
C^j modulo 2^64, the range [s, e) has the hash (prefix[e] - prefix[s]) * C^-s, independent of its position (R. Karp and
M. Rabin, "Efficient randomized pattern-matching algorithms", IBM J. Res. Dev. 31(2), 1987). Words are ranges of
characters, and n-grams are ranges of word hashes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, made odd: the increment of splitmix64."""

BATCH_CHARACTERS = 1 << 17
"""Characters hashed at a time. The intermediate results of so many fit the cache of a core."""

_BASE = 0xD1342543DE82EF95
_CODES = (
    0x40000  # the Unicode planes that have letters; higher code points are unassigned or private and separate words
)
_IS_WORD = 0x80000000  # flag in `_folding_table` of a character that is a word by itself
_NO_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Chinese, Japanese, Yi
    (0xF900, 0xFAFF),  # Chinese, compatibility forms
    (0xFF66, 0xFF9F),  # Japanese, half width
    (0x20000, 0x3FFFF),  # Chinese, rare
)
"""First and last code point of each writing system without spaces."""

_SPACE = re.compile(r"\s")


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply one step of splitmix64 and its finalizer, modulo 2^64: a bijection that scrambles all bits.

    Source: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x + np.uint64(GOLDEN_GAMMA)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def split_long_text(text: str) -> Iterator[str]:
    """Yield a long text in pieces of at most BATCH_CHARACTERS, cut at white space unless half a batch has none."""
    start = 0
    while start < len(text):
        half = start + BATCH_CHARACTERS // 2
        space = _SPACE.search(text, half, half + BATCH_CHARACTERS // 2)
        end = space.start() if space else half + BATCH_CHARACTERS // 2
        yield text[start:end]
        start = end


def word_batches(texts: Sequence[str], overlap: int) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.int64]]]:
    """Yield the word hashes of texts in batches: (index of the first text, word hashes, words of each text).

    A text of more than BATCH_CHARACTERS characters is yielded alone, in several batches. Each repeats the last
    `overlap` words of the one before, so that for n up to overlap + 1 the n-grams of the batches are those of the text.
    Needs about 40 bytes of memory per character of a batch, and 8 bytes per word of a long text.
    """
    first, size = 0, 0
    for i, text in enumerate(texts):
        if size and size + len(text) > BATCH_CHARACTERS:
            yield first, *_hash_words(texts[first:i])
            first, size = i, 0
        size += len(text) + 1
        if len(text) > BATCH_CHARACTERS:
            words = np.concatenate([_hash_words([piece])[0] for piece in split_long_text(text)])
            step = BATCH_CHARACTERS // 4
            for start in range(0, max(1, len(words) - overlap), step):
                part = words[start : start + step + overlap]
                yield i, part, np.array([len(part)])
            first, size = i + 1, 0
    if size:
        yield first, *_hash_words(texts[first:])


def hash_ngrams(
    words: NDArray[np.uint64], counts: NDArray[np.int64], n: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return (hashes of all n-grams, n-grams of each text). All words of a text of fewer than n words are one n-gram.

    Args:
        words: word hashes of the concatenated texts, [sum(counts)].
        counts: words of each text, [texts].
        n: words in an n-gram.
    """
    grams = np.where(counts > 0, np.maximum(counts - n + 1, 1), 0)
    # For each text: the index of its first word minus the index of its first n-gram.
    shifts = (counts.cumsum() - counts) - (grams.cumsum() - grams)
    starts = np.arange(grams.sum()) + np.repeat(shifts, grams)
    ends = starts + np.repeat(np.minimum(counts, n), grams)
    return _hash_ranges(words, starts, ends), grams


def _hash_words(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return (hashes of the words of all texts, words of each text)."""
    joined = "\n".join(("", *texts, ""))
    if joined.isascii():
        folded = _folding_table()[:128].take(np.frombuffer(joined.encode("ascii"), np.uint8))
        inside = folded != 0
        edges = inside[1:] != inside[:-1]
    else:
        folded = _folding_table().take(
            np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32), mode="clip"
        )
        inside, alone = folded != 0, folded >= _IS_WORD
        edges = (inside[1:] != inside[:-1]) | alone[1:] | alone[:-1]
    starts = np.flatnonzero(edges & inside[1:]) + 1
    ends = np.flatnonzero(edges & inside[:-1]) + 1
    text_ends = np.fromiter(map(len, texts), np.int64, len(texts)).cumsum()
    bounds = np.concatenate(([0], text_ends + np.arange(1, len(texts) + 1)))  # the line feeds between the texts
    return _hash_ranges(folded, starts, ends), np.diff(np.searchsorted(starts, bounds))


def _hash_ranges(
    values: NDArray[np.uint64] | NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Hash each range [start, end) of `values`. A hash depends only on the values in its range, not on its position."""
    powers, inverse_powers = _powers(max(16, len(values).bit_length()))
    prefix = np.empty(len(values) + 1, np.uint64)
    prefix[0] = 0
    np.cumsum(values * powers[: len(values)], out=prefix[1:])
    return splitmix64((prefix[ends] - prefix[starts]) * inverse_powers[starts])


@cache
def _powers(bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return C^i and C^-i modulo 2^64 for all i < 2^bits."""
    factors, inverse_factors = np.ones((2, 1 << bits), np.uint64)
    factors[1:], inverse_factors[1:] = _BASE, pow(_BASE, -1, 1 << 64)
    return np.cumprod(factors), np.cumprod(inverse_factors)


@cache
def _folding_table() -> NDArray[np.uint32]:
    """Return for each code point its lower case, plus _IS_WORD if it is a word by itself; 0 if it separates words."""
    table = np.zeros(_CODES, np.uint32)
    for code in range(_CODES - 1):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN":
            table[code] = ord(character.lower()[0])
    for first, last in _NO_SPACES:
        part = table[first : last + 1]
        part[part != 0] |= np.uint32(_IS_WORD)
    return table
