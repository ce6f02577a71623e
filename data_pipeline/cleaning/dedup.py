"""Duplicates over all sources: signature files in, for each document in or out.

A document is dropped if one before it, in the order of the files, has the same text hash (exact) or shares a band (near). The first of
its kind therefore stays, however the documents were cut into files. One before it counts even if it is dropped itself.

Held-out text of its own is compared whatever the settings are: documents that repeat it are dropped for reasons of their own.

A signature file is a `.npy` of 64-bit numbers, [1 + bands, documents]: the text hashes, then each band, each in one piece, so that one
column of all files can be read without the others. 0 takes no part: a document that a filter dropped, a text without words.

Memory is bounded whatever the number of documents: columns are compared one by one, each in as many ranges of its values as that
takes; every range reads the column again. Only one byte a document stays all along (two if there are more than 127 sources).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.atomic import write_atomic
from data_pipeline.errors import DataError
from data_pipeline.settings import DedupConfig

HELD_OUT_DUPLICATES = ("exact_duplicate_of_held_out", "near_duplicate_of_held_out")
"""Why a document for training is dropped that repeats held-out text; behind it stands the name of the held-out source."""

ReasonCodes = NDArray[np.uint8 | np.uint16]
Hashes = NDArray[np.uint64]
DocumentIndices = NDArray[np.int64]

BYTES_PER_ENTRY = 72
"""Peak bytes for each value that is compared at a time: value, number and order, sorted, and what a sort takes besides."""

MIN_ENTRIES = 8192
"""Values that are compared at a time at least, however small the memory: 0.6 MB."""


@dataclass(frozen=True, eq=False)
class DuplicateCodes:
    """What is to be dropped."""

    codes: tuple[ReasonCodes, ...]
    """For each file one number a document, an index of `reasons`; 0 stays."""

    reasons: tuple[str | None, ...]
    """`exact_duplicate: web`: the text of a document of source `web`, the first that has it. `near_duplicate: web`: likewise. Of a document
    for training that repeats held-out text: `exact_duplicate_of_held_out: NAME`, `near_duplicate_of_held_out: NAME`."""


@dataclass(frozen=True)
class _SignatureFile:
    path: Path
    first: int
    """Documents in the files before it."""
    documents: int
    data: int
    """Byte at which the numbers begin."""


def write_signatures(
    file: Path, text_hashes: NDArray[np.uint64], bands: NDArray[np.uint64], kept: NDArray[np.bool_]
) -> None:
    """Write the signatures of some documents; the file is there whole or not at all.

    Args:
        file: what to write; replaced if it is there.
        text_hashes: `text_hash` of each document, [documents]; zeros where `exact` is off.
        bands: `MinHasher.hash_bands` of the documents, [documents, bands]; no bands where `minhash` is off.
        kept: whether a document takes part, [documents].
    """
    columns = np.zeros((1 + bands.shape[1], len(kept)), np.uint64)
    columns[0, kept] = text_hashes[kept]
    columns[1:, kept] = bands[kept].T
    content = io.BytesIO()
    np.save(content, columns)
    write_atomic(file, content.getbuffer(), sync_parent=True)


def find_duplicates(
    files: Sequence[Path],
    sources: Sequence[str],
    config: DedupConfig,
    progress: Callable[[float], None] = lambda _: None,
    *,
    n_held_out: int = 0,
) -> DuplicateCodes:
    """Which documents of all files repeat earlier ones. A document that does so both ways is an exact duplicate.

    Documents for training are compared with held-out ones in both ways, whether or not the settings ask for one of them.

    Args:
        files: signature files in the order of the documents.
        sources: the source of each file; those of one source stand together.
        config: what to compare, and the memory for it. The bands must be those of the files.
        progress: is given the share that is done, from 0 to 1.
        n_held_out: how many of the sources are held-out text of its own; they come first.

    Raises:
        DataError: a file is damaged or was written with another number of bands.
        ValueError: the files of a source do not stand together.
    """
    names = tuple(dict.fromkeys(sources))
    source_of_file = [names.index(source) for source in sources]
    if source_of_file != sorted(source_of_file):
        raise ValueError(f"the files of a source must stand together, got {', '.join(sources)}")
    found = _open_all(files, 1 + config.bands if config.minhash or n_held_out else None)
    documents = sum(file.documents for file in found)
    source_starts = np.array([found[source_of_file.index(source)].first for source in range(len(names))])
    first_training = next(
        (file.first for file, source in zip(found, source_of_file, strict=True) if source >= n_held_out), documents
    )
    codes: ReasonCodes = np.zeros(documents, np.uint8 if 2 * (n_held_out + len(names)) < 256 else np.uint16)
    room = max(MIN_ENTRIES, int(config.memory_mb * 1e6 / BYTES_PER_ENTRY))
    parts = max(1, ceil(documents / (0.8 * room)))
    columns = range(0 if config.exact or n_held_out else 1, 1 + (config.bands if config.minhash or n_held_out else 0))
    for done, column in enumerate(columns):
        for part in range(parts):
            for repeats, firsts in _repeated(_read(found, column, part, parts, room // 16), room):
                code = np.searchsorted(source_starts, firsts, "right") - 1
                near, asked = int(column > 0), config.minhash if column else config.exact
                if n_held_out:
                    of_held_out = code < n_held_out
                    of_held_out &= repeats >= first_training
                    code[of_held_out] -= 2 * n_held_out + near * (
                        len(names) - n_held_out
                    )  # the lowest codes: this reason goes first
                    if not asked:
                        repeats, code = repeats[of_held_out], code[of_held_out]
                code += 1 + 2 * n_held_out + near * len(names)
                before = codes[repeats]
                codes[repeats] = np.where(before == 0, code, np.minimum(before, code))
            progress((done + (part + 1) / parts) / len(columns))
    kinds = [
        *((kind, names[:n_held_out]) for kind in HELD_OUT_DUPLICATES),
        ("exact_duplicate", names),
        ("near_duplicate", names),
    ]
    reasons = (None, *(f"{kind}: {name}" for kind, those in kinds for name in those))
    return DuplicateCodes(tuple(codes[file.first : file.first + file.documents] for file in found), reasons)


def _open_all(files: Sequence[Path], columns: int | None) -> list[_SignatureFile]:
    """Where each file's numbers are; DataError if one is damaged or does not have these columns."""
    found, first = [], 0
    for path in files:
        try:
            with path.open("rb") as stream:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                data = stream.tell()
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a signature file ({error}); remove it and prepare again") from error
        if dtype != np.uint64 or len(shape) != 2 or columns not in (None, shape[0]):
            raise DataError(
                f"{path}: has shape {shape}, not {columns or 1} columns of hashes; remove it and prepare again"
            )
        if path.stat().st_size != data + 8 * shape[0] * shape[1]:
            raise DataError(
                f"{path}: not whole, {path.stat().st_size} bytes, not {data + 8 * shape[0] * shape[1]}; remove it and prepare again"
            )
        found.append(_SignatureFile(path, first, shape[1], data))
        first += shape[1]
    return found


def _read(
    files: Sequence[_SignatureFile], column: int, part: int, parts: int, block: int
) -> Iterator[tuple[Hashes, DocumentIndices]]:
    """(values, numbers of their documents) of one of `parts` equal ranges of a column's values, a block of documents at a time."""
    lowest, highest = np.uint64(max(1, -(-(part << 64) // parts))), np.uint64(-(-((part + 1) << 64) // parts) - 1)
    for file in files:
        for start in range(0, file.documents, block):
            count, at = min(block, file.documents - start), file.data + 8 * (column * file.documents + start)
            values = np.fromfile(file.path, np.uint64, count, offset=at)
            wanted = np.flatnonzero((values >= lowest) & (values <= highest))
            yield values[wanted], wanted + (file.first + start)


def _repeated(
    entries: Iterable[tuple[Hashes, DocumentIndices]], room: int
) -> Iterator[tuple[DocumentIndices, DocumentIndices]]:
    """(documents whose value an earlier one has, the first document with that value), from entries in the order of the documents.

    Entries are collected until there is no room for more; of those that are equal only the first goes on. A value that a billion
    documents share takes no more memory than others.
    """
    values, numbers, size = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for more_values, more_numbers in entries:
        if size + len(more_values) > room:
            yield _keep_first(values, numbers)
            size = len(values[0])
        values.append(more_values)
        numbers.append(more_numbers)
        size += len(more_values)
    yield _keep_first(values, numbers)


def _keep_first(values: list[Hashes], numbers: list[DocumentIndices]) -> tuple[DocumentIndices, DocumentIndices]:
    """(documents that repeat a value, the first document with it); leaves only first ones in the lists, as one array each."""
    value, number = np.concatenate(values), np.concatenate(numbers)
    values.clear()  # as everywhere here: what is not needed any more makes room
    numbers.clear()
    order = np.argsort(value, kind="stable")
    value = value[order]
    number = number[order]
    del order
    new = np.ones(len(value), np.bool_)
    np.not_equal(value[1:], value[:-1], out=new[1:])
    firsts, repeats = np.flatnonzero(new), np.flatnonzero(~new)
    originals = number[firsts[np.searchsorted(firsts, repeats) - 1]]
    values.append(value[firsts])
    numbers.append(number[firsts])
    return number[repeats], originals
