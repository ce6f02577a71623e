"""What became of each document of a chunk: kept, marked, or dropped for a reason. A small file a chunk, whole or not there."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

KEPT = 0


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on the documents of one chunk, in reading order."""

    codes: NDArray[np.uint16]
    """KEPT, or 1 + the place of the reason in `reasons`."""
    reasons: tuple[str, ...]
    marks: NDArray[np.bool_]
    """Documents that share n-grams with evaluation sets and are kept all the same."""
    key: str
    """Hash of all that decided them."""

    @classmethod
    def of(cls, reasons: Sequence[str | None], marks: NDArray[np.bool_], key: str) -> Verdicts:
        """From a reason, or None, for each document."""
        table = tuple(dict.fromkeys(reason for reason in reasons if reason is not None))
        place = {reason: i for i, reason in enumerate(table, start=1)}
        return cls(np.array([place.get(reason, KEPT) if reason else KEPT for reason in reasons], np.uint16), table, marks, key)

    def reason(self, document: int) -> str | None:
        """Why a document is dropped; None where it is kept."""
        code = int(self.codes[document])
        return None if code == KEPT else self.reasons[code - 1]

    def with_reasons(self, more: Sequence[str | None]) -> Verdicts:
        """With a reason for documents that were kept so far; one that is dropped already keeps its first reason."""
        return Verdicts.of([self.reason(i) or reason for i, reason in enumerate(more)], self.marks, self.key)


def write_verdicts(file: Path, verdicts: Verdicts) -> None:
    """Write aside and rename: a file of that name is whole."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        np.savez_compressed(
            stream, codes=verdicts.codes, reasons=np.array(verdicts.reasons, np.str_), marks=verdicts.marks, key=np.array(verdicts.key)
        )
    temporary.replace(file)


def read_verdicts(file: Path, key: str | None = None) -> Verdicts | None:
    """None where there are none, they are damaged (the file carries checksums), or were decided by something else than `key`."""
    try:
        with np.load(file) as arrays:
            verdicts = Verdicts(arrays["codes"], tuple(arrays["reasons"].tolist()), arrays["marks"], str(arrays["key"]))
    except (OSError, zipfile.BadZipFile, ValueError, KeyError):
        return None
    return verdicts if key in (None, verdicts.key) else None
