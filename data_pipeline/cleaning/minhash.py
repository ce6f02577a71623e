"""What duplicates are told by: a hash of the text for exact ones, and MinHash signatures, cut into bands, for near ones.

A document is the set of its shingles, the runs of `ngram` words. Of each of bands * rows random orders of all shingles, its smallest
one is kept: two documents agree there with the probability of their Jaccard similarity J, the share of their shingles that both have
(A. Broder, "On the resemblance and containment of documents", SEQUENCES 1997). A band is the hash of `rows` of them, so that some
band is equal with probability 1 - (1 - J^rows)^bands (P. Indyk and R. Motwani, "Approximate nearest neighbors", STOC 1998).

Only arrays in and out; what is done with them is told in `dedup.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.hashing import hash_ngrams, split_long_text, splitmix64, word_batches

NO_WORDS = np.uint32(0xFFFFFFFF)
"""The minima of a text without words."""


def detection_probability(jaccard: float, bands: int, rows: int) -> float:
    """Of two documents of this similarity: that they have a band in common."""
    return 1 - (1 - jaccard**rows) ** bands


def similarity_threshold(bands: int, rows: int) -> float:
    """The Jaccard similarity at which half of the pairs are found."""
    return float((1 - 0.5 ** (1 / bands)) ** (1 / rows))


def text_hash(text: str) -> int:
    """64 bits (XXH3) of a text without its case, and with one space for each run of white space. Punctuation counts."""
    hasher, begun = xxhash.xxh3_64(), False
    for piece in split_long_text(text):
        words = " ".join(piece.casefold().split())
        if words:
            space = " " if begun and piece[0].isspace() else ""
            hasher.update((space + words).encode("utf-8", "surrogatepass"))
            begun = True
    return hasher.intdigest()


class MinHasher:
    """Makes signatures. Those of two signers compare if all of `ngram`, `bands`, `rows` and `seed` are equal."""

    def __init__(self, ngram: int, bands: int, rows: int, seed: int = 0) -> None:
        self.ngram, self.bands, self.rows = ngram, bands, rows
        numbers = splitmix64(np.arange(bands * rows + rows, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32)))
        self._factors = (numbers[: bands * rows] >> np.uint64(32)).astype(np.uint32).reshape(bands, rows, 1)
        self._weights = numbers[bands * rows :] | np.uint64(1)

    def hash_bands(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """The hash of each band of each text, [texts, bands]; 0 and only 0 for a text without words, which is like no other.

        A text of fewer words than a shingle has one shingle: all its words.
        """
        minima = self.min_hashes(texts)
        hashes = np.empty((len(texts), self.bands), np.uint64)
        for band in range(self.bands):
            mixed = splitmix64((minima[band] * self._weights[:, None]).sum(0, dtype=np.uint64))
            hashes[:, band] = np.maximum(mixed, np.uint64(1))
        hashes[(minima == NO_WORDS).all((0, 1))] = 0
        return hashes

    def min_hashes(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """The smallest hash of each text's shingles under each function, [bands, rows, texts].

        A shingle's 64-bit hash is two numbers x and y of 32 bits, and function i is factor[i] * x + y modulo 2^32: a multiplication
        and an addition that a CPU does in eight or more lanes at once, and over random shingles two of them are all but independent.
        """
        minima = np.full((self.bands, self.rows, len(texts)), NO_WORDS)
        for first, words, counts in word_batches(texts, self.ngram - 1):
            shingles, per_text = hash_ngrams(words, counts, self.ngram)
            filled = np.flatnonzero(per_text)
            if not len(filled):
                continue
            starts = (per_text.cumsum() - per_text)[filled]
            x, y = shingles.astype(np.uint32), (shingles >> np.uint64(32)).astype(np.uint32)
            scratch = np.empty((self.rows, len(shingles)), np.uint32)
            for band in range(self.bands):
                np.multiply(x, self._factors[band], out=scratch)
                np.add(scratch, y, out=scratch)
                ours = minima[band, :, first : first + len(counts)]
                ours[:, filled] = np.minimum(ours[:, filled], np.minimum.reduceat(scratch, starts, axis=1))
        return minima
