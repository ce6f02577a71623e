"""Signatures of documents for finding duplicates: a hash of the text for exact ones, banded MinHash for near ones.

A document is the set of its shingles: its runs of `ngram` words. For each of bands * rows random orders of all
shingles, MinHash keeps the smallest shingle of the document. Two documents agree on it with a probability equal to
their Jaccard similarity J, the fraction of their shingles that both have (A. Broder, "On the resemblance and
containment of documents", SEQUENCES 1997). A band is the hash of `rows` such minima, so two documents have at least one
equal band with probability 1 - (1 - J^rows)^bands (P. Indyk and R. Motwani, "Approximate nearest neighbors", STOC
1998).

This module only maps texts to arrays; `dedup.py` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.hashing import hash_ngrams, split_long_text, splitmix64, word_batches

NO_WORDS = np.uint32(0xFFFFFFFF)
"""All minima of a text without words."""


def detection_probability(jaccard: float, bands: int, rows: int) -> float:
    """Return the probability that two documents of this Jaccard similarity have an equal band."""
    return 1 - (1 - jaccard**rows) ** bands


def similarity_threshold(bands: int, rows: int) -> float:
    """Return the Jaccard similarity at which half of the pairs are found."""
    return float((1 - 0.5 ** (1 / bands)) ** (1 / rows))


def text_hash(text: str) -> int:
    """Return 64 bits (XXH3) of the text, ignoring case and treating each run of white space as one space.

    Punctuation counts.
    """
    hasher, has_content = xxhash.xxh3_64(), False
    for piece in split_long_text(text):
        words = " ".join(piece.casefold().split())
        if words:
            space = " " if has_content and piece[0].isspace() else ""
            hasher.update((space + words).encode("utf-8", "surrogatepass"))
            has_content = True
    return hasher.intdigest()


class MinHasher:
    """Computes MinHash signatures.

    Two hashers give comparable ones if `ngram`, `bands`, `rows` and `seed` are equal.
    """

    def __init__(self, ngram: int, bands: int, rows: int, seed: int = 0) -> None:
        self.ngram, self.bands, self.rows = ngram, bands, rows
        random = splitmix64(np.arange(bands * rows + rows, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32)))
        self._factors = (random[: bands * rows] >> np.uint64(32)).astype(np.uint32).reshape(bands, rows, 1)
        self._weights = random[bands * rows :] | np.uint64(1)

    def hash_bands(self, texts: Sequence[str]) -> NDArray[np.uint64]:
        """Return the hash of each band of each text, [texts, bands].

        It is 0 only for a text without words, which matches no other.

        A text with fewer words than `ngram` has one shingle: all its words.
        """
        minima = self.min_hashes(texts)
        hashes = np.empty((len(texts), self.bands), np.uint64)
        for band in range(self.bands):
            mixed = splitmix64((minima[band] * self._weights[:, None]).sum(0, dtype=np.uint64))
            hashes[:, band] = np.maximum(mixed, np.uint64(1))
        hashes[(minima == NO_WORDS).all((0, 1))] = 0
        return hashes

    def min_hashes(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """Return the smallest hash of each text's shingles under each hash function, [bands, rows, texts].

        A shingle's 64-bit hash is two 32-bit numbers x and y, and function i is factor[i] * x + y modulo 2^32: one
        multiplication and one addition, which a CPU does in eight or more lanes at once. Over random shingles, two such
        functions are all but independent.
        """
        minima = np.full((self.bands, self.rows, len(texts)), NO_WORDS)
        for first, words, counts in word_batches(texts, self.ngram - 1):
            shingles, per_text = hash_ngrams(words, counts, self.ngram)
            with_words = np.flatnonzero(per_text)
            if not len(with_words):
                continue
            starts = (per_text.cumsum() - per_text)[with_words]
            x, y = shingles.astype(np.uint32), (shingles >> np.uint64(32)).astype(np.uint32)
            hashed = np.empty((self.rows, len(shingles)), np.uint32)
            for band in range(self.bands):
                np.multiply(x, self._factors[band], out=hashed)
                np.add(hashed, y, out=hashed)
                batch = minima[band, :, first : first + len(counts)]
                batch[:, with_words] = np.minimum(batch[:, with_words], np.minimum.reduceat(hashed, starts, axis=1))
        return minima
