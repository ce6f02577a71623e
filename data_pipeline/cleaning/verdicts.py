"""What became of each document of a chunk: kept, marked, or dropped for a reason. A small file a chunk, whole or not there."""

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
    """KEPT, or 1 + the place of the reason in `reasons`."""
    reasons: tuple[str, ...]
    marks: NDArray[np.bool_]
    """Documents that share n-grams with evaluation sets and are kept all the same."""
    texts: str
    """Hash of the texts that were judged, see `TextsHash`."""
    signatures: str
    """Hash of the file of signatures that was written with them; empty where there is none."""
    key: str
    """Hash of all that decided them."""

    def reason(self, document: int) -> str | None:
        """Why a document is dropped; None where it is kept."""
        code = int(self.codes[document])
        return None if code == KEPT else self.reasons[code - 1]

    def with_reasons(self, codes: NDArray[np.uint8 | np.uint16], reasons: Sequence[str | None]) -> ChunkVerdicts:
        """With reasons for documents that were kept so far; one that is dropped already keeps its first reason.

        Args:
            codes: for each document an index of `reasons`.
            reasons: the first is None, for a document that stays.
        """
        found, places = np.unique(codes, return_inverse=True)
        more = [reason for reason in (reasons[code] for code in found.tolist()) if reason is not None]
        shift = len(self.reasons) + (0 if codes.size and found[0] == 0 else 1)
        late = (self.codes == KEPT) & (codes > 0)
        return replace(
            self, codes=np.where(late, places + shift, self.codes).astype(np.uint16), reasons=(*self.reasons, *more)
        )

    def digest(self) -> str:
        """Hash of what they say."""
        whole = xxhash.xxh3_128(repr((self.reasons, self.texts)).encode())
        whole.update(self.codes.tobytes())
        whole.update(self.marks.tobytes())
        return whole.hexdigest()


class TextsHash:
    """Hash of texts, one after the other: by it a file that changed between two passes is noticed."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def add(self, text: str) -> None:
        """The next one."""
        self._hash.update(text.encode())
        self._hash.update(b"\xff")  # a byte that no text holds

    def hexdigest(self) -> str:
        """Of those so far."""
        return self._hash.hexdigest()


def encode_reasons(reasons: Sequence[str | None]) -> tuple[NDArray[np.uint16], tuple[str, ...]]:
    """(codes, table) of a reason, or None, for each document."""
    table = tuple(dict.fromkeys(reason for reason in reasons if reason is not None))
    codes: dict[str | None, int] = {None: KEPT} | {reason: i for i, reason in enumerate(table, start=1)}
    return np.fromiter((codes[reason] for reason in reasons), np.uint16, len(reasons)), table


def write_verdicts(file: Path, verdicts: ChunkVerdicts) -> None:
    """Write them; a file of that name is whole."""
    content = io.BytesIO()
    strings = np.array([verdicts.texts, verdicts.signatures, verdicts.key, *verdicts.reasons], np.str_)
    np.savez_compressed(content, codes=verdicts.codes, marks=verdicts.marks, strings=strings)
    write_checksummed(file, content.getvalue())


def read_verdicts(file: Path) -> ChunkVerdicts | None:
    """None where there are none, or they are damaged."""
    content = read_checksummed(file)
    if content is None:
        return None
    with np.load(io.BytesIO(content)) as arrays:
        texts, signatures, key, *reasons = arrays["strings"].tolist()
        return ChunkVerdicts(arrays["codes"], tuple(reasons), arrays["marks"], texts, signatures, key)
