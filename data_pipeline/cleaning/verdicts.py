"""Verdicts on the documents of a chunk: kept, contaminated but kept, or dropped for a reason.

One small file a chunk, written atomically.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.atomic import read_checksummed, write_checksummed

KEPT = 0


@dataclass(frozen=True, eq=False)
class ChunkVerdicts:
    """Verdicts on the documents of one chunk, in reading order."""

    codes: NDArray[np.uint16]
    """KEPT, or 1 + the index of the drop reason in `reasons`."""
    reasons: tuple[str, ...]
    marks: NDArray[np.bool_]
    """Documents that share n-grams with evaluation sets and are kept all the same."""
    texts: str
    """`TextsHash` of the texts that the verdicts are about."""
    signatures: str
    """Hash of the signature file written with the verdicts; empty where there is none."""
    key: str
    """Hash of everything that decides the verdicts."""

    def drop_reason(self, document: int) -> str | None:
        """Return why a document is dropped, or None if it is kept."""
        code = int(self.codes[document])
        return None if code == KEPT else self.reasons[code - 1]

    def with_reasons(self, codes: NDArray[np.uint8 | np.uint16], reasons: Sequence[str | None]) -> ChunkVerdicts:
        """Return the verdicts with further documents dropped. A document that is dropped already keeps its reason.

        Args:
            codes: for each document an index into `reasons`.
            reasons: the first is None and keeps a document.
        """
        used, new_codes = np.unique(codes, return_inverse=True)
        new_reasons = [reason for reason in (reasons[code] for code in used.tolist()) if reason is not None]
        shift = len(self.reasons) + (0 if codes.size and used[0] == 0 else 1)
        is_newly_dropped = (self.codes == KEPT) & (codes > 0)
        merged = np.where(is_newly_dropped, new_codes + shift, self.codes).astype(np.uint16)
        return replace(self, codes=merged, reasons=(*self.reasons, *new_reasons))

    def digest(self) -> str:
        """Return a hash of the verdicts and of the texts that they are about."""
        hasher = xxhash.xxh3_128(repr((self.reasons, self.texts)).encode())
        hasher.update(self.codes.tobytes())
        hasher.update(self.marks.tobytes())
        return hasher.hexdigest()


class TextsHash:
    """Hash of a sequence of texts, by which a second pass notices that a file has changed."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, text: str) -> None:
        """Add the next text."""
        self._hash.update(text.encode())
        self._hash.update(b"\xff")  # separates texts: no UTF-8 text holds this byte

    def hexdigest(self) -> str:
        """Return the hash of the texts so far."""
        return self._hash.hexdigest()


def encode_reasons(reasons: Sequence[str | None]) -> tuple[NDArray[np.uint16], tuple[str, ...]]:
    """Return `codes` and `reasons` of `ChunkVerdicts` for a drop reason, or None, of each document."""
    table = tuple(dict.fromkeys(reason for reason in reasons if reason is not None))
    codes: dict[str | None, int] = {None: KEPT} | {reason: i for i, reason in enumerate(table, start=1)}
    return np.fromiter((codes[reason] for reason in reasons), np.uint16, len(reasons)), table


def write_verdicts(file: Path, verdicts: ChunkVerdicts) -> None:
    """Write the verdicts atomically."""
    content = io.BytesIO()
    strings = np.array([verdicts.texts, verdicts.signatures, verdicts.key, *verdicts.reasons], np.str_)
    np.savez_compressed(content, codes=verdicts.codes, marks=verdicts.marks, strings=strings)
    write_checksummed(file, content.getvalue())


def read_verdicts(file: Path) -> ChunkVerdicts | None:
    """Return the verdicts in a file, or None if it is missing or damaged."""
    content = read_checksummed(file)
    if content is None:
        return None
    with np.load(io.BytesIO(content)) as arrays:
        texts, signatures, key, *reasons = arrays["strings"].tolist()
        return ChunkVerdicts(arrays["codes"], tuple(reasons), arrays["marks"], texts, signatures, key)
