"""Hashes of 64 bits: of numbers, and of the words and word n-grams of many texts at once.

A word is a run of letters, digits and marks, in lower case; whatever else stands between words only separates them. Writing systems
without spaces have a word for each character, so that n-grams mean something there as well. Thus `a+b` and `A - B` have the same
words: near-duplicates and contamination are meant to be found in spite of that. Exact duplicates have a hash of their own, elsewhere.

All characters of some texts are hashed in a few passes of numpy: with prefix[i] = sum over j < i of value[j] * C^j modulo 2^64, the
range [s, e) has the hash (prefix[e] - prefix[s]) * C^-s wherever it stands (R. Karp and M. Rabin, "Efficient randomized
pattern-matching algorithms", IBM J. Res. Dev. 31(2), 1987). Words are ranges of characters, n-grams are ranges of word hashes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: what splitmix64 steps by."""

BATCH_CHARACTERS = 1 << 17
"""Characters hashed at a time: what is computed for each of them stays in a core's cache."""

_BASE = 0xD1342543DE82EF95
_CODES = 0x40000  # the planes with letters; unassigned and private characters above them separate words
_ALONE = 0x80000000  # set in `_folded` for a character that is a word of its own
_NO_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # Chinese, Japanese, Yi
    (0xF900, 0xFAFF),  # Chinese, compatibility forms
    (0xFF66, 0xFF9F),  # Japanese, half width
    (0x20000, 0x3FFFF),  # Chinese, rare
)
"""First and last code points of the writing systems without spaces."""

_SPACE = re.compile(r"\s")


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 and its finaliser, modulo 2^64: a bijection that leaves no pattern.

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
    """A long text in pieces of a batch. They end at white space, unless half a batch has none."""
    start = 0
    while start < len(text):
        half = start + BATCH_CHARACTERS // 2
        space = _SPACE.search(text, half, half + BATCH_CHARACTERS // 2)
        end = space.start() if space else half + BATCH_CHARACTERS // 2
        yield text[start:end]
        start = end


def word_batches(texts: Sequence[str], overlap: int) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.int64]]]:
    """The hashed words of texts, some texts at a time: (number of the first text, word hashes of all, words of each).

    A text of more than BATCH_CHARACTERS characters comes alone and in several batches, each of which repeats the last `overlap` words
    of the one before: the n-grams of the batches, for n up to overlap + 1, are those of the text. Memory: about 40 bytes a character
    of a batch, and 8 bytes a word of a long text.
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
    """(hashes of all runs of n words, how many of them each text has). A text of fewer words has one run: all its words.

    Args:
        words: word hashes of the texts, one text after the other, [sum(counts)].
        counts: words of each text.
        n: words in a run.
    """
    grams = np.where(counts > 0, np.maximum(counts - n + 1, 1), 0)
    shifts = (counts.cumsum() - counts) - (
        grams.cumsum() - grams
    )  # from the number of a text's first n-gram to its first word's
    starts = np.arange(grams.sum()) + np.repeat(shifts, grams)
    ends = starts + np.repeat(np.minimum(counts, n), grams)
    return _hash_ranges(words, starts, ends), grams


def _hash_words(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hashes of the words of all texts, words of each text)."""
    joined = "\n".join(("", *texts, ""))
    if joined.isascii():
        folded = _folded()[:128].take(np.frombuffer(joined.encode("ascii"), np.uint8))
        inside = folded != 0
        edges = inside[1:] != inside[:-1]
    else:
        folded = _folded().take(np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32), mode="clip")
        inside, alone = folded != 0, folded >= _ALONE
        edges = (inside[1:] != inside[:-1]) | alone[1:] | alone[:-1]
    starts = np.flatnonzero(edges & inside[1:]) + 1
    ends = np.flatnonzero(edges & inside[:-1]) + 1
    begins = np.fromiter(map(len, texts), np.int64, len(texts)).cumsum()
    bounds = np.concatenate(([0], begins + np.arange(1, len(texts) + 1)))  # of the line feed in front of each text
    return _hash_ranges(folded, starts, ends), np.diff(np.searchsorted(starts, bounds))


def _hash_ranges(
    values: NDArray[np.uint64] | NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """A hash of each range [start, end) of `values`, which depends on the values in it and on nothing else."""
    up, down = _powers(max(16, len(values).bit_length()))
    prefix = np.empty(len(values) + 1, np.uint64)
    prefix[0] = 0
    np.cumsum(values * up[: len(values)], out=prefix[1:])
    return splitmix64((prefix[ends] - prefix[starts]) * down[starts])


@cache
def _powers(bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """C^i and C^-i modulo 2^64 for i < 2^bits."""
    up, down = np.ones((2, 1 << bits), np.uint64)
    up[1:], down[1:] = _BASE, pow(_BASE, -1, 1 << 64)
    return np.cumprod(up), np.cumprod(down)


@cache
def _folded() -> NDArray[np.uint32]:
    """By code point: that of the lower case, 0 for what separates words; _ALONE is added where a character is a word."""
    table = np.zeros(_CODES, np.uint32)
    for code in range(_CODES - 1):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN":
            table[code] = ord(character.lower()[0])
    for first, last in _NO_SPACES:
        part = table[first : last + 1]
        part[part != 0] |= np.uint32(_ALONE)
    return table
