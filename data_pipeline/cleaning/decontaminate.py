"""Decontamination: which training documents hold parts of evaluation texts.

A document is hit if it has `ngram` words in a row that an evaluation text has as well, words as `hashing.py` tells them: neither case
nor punctuation nor line breaks hide anything (T. Brown et al., "Language models are few-shot learners", arXiv:2005.14165, appendix C).
An evaluation text of fewer words counts as a whole if it has at least MIN_WORDS; shorter ones would hit by accident, and are counted.
Compared are 64-bit hashes: with 10^6 of them, one in 2*10^13 innocent n-grams is taken for one of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import BinaryIO

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.hashing import hash_ngrams, word_batches
from data_pipeline.settings import DecontaminateConfig

MIN_WORDS = 8
"""An evaluation text of fewer words takes no part."""

SETTING = "data.decontaminate.paths"
ENDINGS = (".txt", ".jsonl", ".parquet")
AT_A_TIME = 4096
"""Evaluation texts hashed together."""


@dataclass(frozen=True, eq=False)
class Contamination:
    """What the evaluation texts hold."""

    grams: NDArray[np.uint64]
    """Hashes of their n-grams, sorted, each once."""

    lengths: tuple[int, ...]
    """Words of these n-grams: `ngram`, and the lengths of shorter texts."""

    n_texts: int
    """Evaluation texts that take part."""

    n_too_short: int
    """Evaluation texts with words, but too few."""

    @staticmethod
    def load(config: DecontaminateConfig) -> Contamination | None:
        """Read the evaluation texts; None if there are no paths.

        Raises:
            DataError: a path does not exist, matches no file or cannot be read, or there is no text that is long enough.
        """
        if not config.paths:
            return None
        least = min(MIN_WORDS, config.ngram)
        found: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        lengths: set[int] = set()
        n_texts = n_too_short = 0
        evaluation = _texts(config.paths)
        while texts := list(islice(evaluation, AT_A_TIME)):
            n_words = np.zeros(len(texts), np.int64)
            for first, words, counts in word_batches(texts, config.ngram - 1):
                n_words[first : first + len(counts)] = counts
                hashes, grams = hash_ngrams(words, counts, config.ngram)
                found.append(np.unique(hashes[np.repeat(counts >= least, grams)]))
            lengths.update(np.unique(n_words[n_words >= least].clip(max=config.ngram)).tolist())
            n_texts += int((n_words >= least).sum())
            n_too_short += int(((n_words > 0) & (n_words < least)).sum())
        if not n_texts:
            raise DataError(f"{SETTING}: none of the texts in {', '.join(config.paths)} has {least} words ({n_too_short} have fewer)")
        return Contamination(np.unique(np.concatenate(found)), tuple(sorted(lengths)), n_texts, n_too_short)

    @property
    def n_ngrams(self) -> int:
        """Different n-grams that are looked for."""
        return len(self.grams)

    def hits(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of these texts share an n-gram with an evaluation text, [texts]."""
        hit = np.zeros(len(texts), np.bool_)
        for first, words, counts in word_batches(texts, self.lengths[-1] - 1):
            for length in self.lengths:
                hashes, grams = hash_ngrams(words, counts, length)
                hit[first + np.searchsorted(grams.cumsum(), self._found(hashes), "right")] = True
        return hit

    def _found(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Which of these hashes are among the evaluation texts'."""
        maybe = np.flatnonzero(self._sieve[hashes >> np.uint64(64 - self._bits)])
        places = np.searchsorted(self.grams, hashes[maybe]).clip(max=len(self.grams) - 1)
        found: NDArray[np.int64] = maybe[self.grams[places] == hashes[maybe]]
        return found

    @cached_property
    def _bits(self) -> int:
        """Leading bits by which the sieve goes: about one in 16 of its places is taken, up to 64 MB."""
        return min(26, len(self.grams).bit_length() + 4)

    @cached_property
    def _sieve(self) -> NDArray[np.bool_]:
        """Whether some n-gram begins with these bits: spares almost all others the search among all."""
        sieve = np.zeros(1 << self._bits, np.bool_)
        sieve[self.grams >> np.uint64(64 - self._bits)] = True
        return sieve


def evaluation_hash(config: DecontaminateConfig) -> str:
    """A hash of all n-grams that are looked for; empty if there are no paths. Raises what `Contamination.load` raises."""
    contamination = Contamination.load(config)
    return xxhash.xxh3_128_hexdigest(contamination.grams.tobytes()) if contamination else ""


def _texts(paths: Sequence[str]) -> Iterator[str]:
    """All evaluation texts: whole .txt files, every string in the lines of .jsonl and in the rows of .parquet, however deep inside."""
    for given in paths:
        fs, files = _find(given)
        for file in files:
            read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[PurePosixPath(file).suffix]
            try:
                with fs.open(file, "rb") as stream:
                    yield from read(stream)
            except (OSError, ValueError) as error:  # broken JSON, parquet and UTF-8 are ValueErrors too
                raise DataError(f"{SETTING}: cannot read {file}: {' '.join(str(error).split())}") from error


def _find(given: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The files that one entry of `paths` stands for, sorted."""
    try:
        fs, path = fsspec.core.url_to_fs(given)
        found = fs.find(path) if fs.isdir(path) else [path] if fs.exists(path) else fs.glob(path)
    except (OSError, ValueError, ImportError) as error:  # no permission or connection, unknown protocol, missing driver
        raise DataError(f"{SETTING}: cannot read {given}: {error}") from error
    files = sorted(file for file in found if file.endswith(ENDINGS))
    if not files:
        what = f"holds no file that ends with {', '.join(ENDINGS)}" if found else "does not exist or matches no file"
        raise DataError(f"{SETTING}: {given} {what}")
    return fs, files


def _read_txt(stream: BinaryIO) -> Iterator[str]:
    yield stream.read().decode(errors="replace")


def _read_jsonl(stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield from _strings(json.loads(line.decode(errors="replace")))
            except json.JSONDecodeError as error:
                raise ValueError(f"broken JSON in line {number} ({error.msg} at column {error.colno})") from None


def _read_parquet(stream: BinaryIO) -> Iterator[str]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches():
        for row in batch.to_pylist():
            yield from _strings(row)


def _strings(value: object) -> Iterator[str]:
    """Every string among the values of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from _strings(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _strings(inside)
