"""Find duplicate documents across all sources, from their signature files.

A document is dropped if an earlier document, in the order of the files, has the same text hash (exact duplicate) or the
same hash in any band (near-duplicate). So the first document of a group stays, whichever files the documents are in. An
earlier document counts even if it is dropped itself.

Held-out sources (`data.validation`) come first. Training documents that repeat a held-out one are always dropped, even
where the settings turn exact or near-duplicate removal off, and have drop reasons of their own.

A signature file is a `.npy` array of uint64, [1 + bands, documents]: one row of text hashes, then one row for each
band. A row is contiguous in the file, so one row of all files can be read without the others. The value 0 is never
compared: it stands for a document that a filter dropped or a text without words.

Memory is bounded whatever the number of documents. Rows are compared one after the other, and the values of a row in as
many ranges as the memory requires; each range reads the row again. Only the drop codes of all documents stay in memory:
1 byte a document, or 2 with more than 127 sources.
"""

from __future__ import annotations

import io
import itertools
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
"""Drop reasons of training documents that repeat a held-out document; `: <held-out source>` follows."""

ReasonCodes = NDArray[np.uint8 | np.uint16]
Hashes = NDArray[np.uint64]
DocumentIndices = NDArray[np.int64]
"""Indices of documents, counted over all files."""

BYTES_PER_ENTRY = 72
"""Peak memory of each value that is compared at a time: the value, its document and its sort order, and sorted
copies."""

MIN_ENTRIES = 8192
"""Values compared at a time at least, however small `memory_mb` is: 0.6 MB."""


@dataclass(frozen=True, eq=False)
class DuplicateCodes:
    """Which documents to drop, and why."""

    codes: tuple[ReasonCodes, ...]
    """For each file an index into `reasons` for each document; 0 keeps the document."""

    reasons: tuple[str | None, ...]
    """`exact_duplicate: web` or `near_duplicate: web`, where `web` is the source of the first such document. For
    training documents that repeat held-out text: `exact_duplicate_of_held_out: NAME` or `near_duplicate_of_held_out:
    NAME`."""


@dataclass(frozen=True)
class _SignatureFile:
    path: Path
    first: int
    """Index of its first document."""
    documents: int
    data: int
    """Byte offset of the array's data."""


@dataclass(frozen=True, eq=False)
class _SignedDocuments:
    """The documents of all signature files, and the source of each."""

    files: tuple[_SignatureFile, ...]
    sources: tuple[str, ...]
    """Each name once, held-out sources first."""
    source_starts: DocumentIndices
    """Index of the first document of each source."""
    n_documents: int
    n_held_out: int
    """Held-out sources."""

    def source_of(self, documents: DocumentIndices) -> NDArray[np.int64]:
        """The index in `sources` of each of these documents."""
        return np.searchsorted(self.source_starts, documents, "right") - 1

    @property
    def first_training_document(self) -> int:
        has_training = self.n_held_out < len(self.sources)
        return int(self.source_starts[self.n_held_out]) if has_training else self.n_documents


def write_signatures(
    file: Path, text_hashes: NDArray[np.uint64], bands: NDArray[np.uint64], kept: NDArray[np.bool_]
) -> None:
    """Write the signatures of some documents atomically.

    Args:
        file: what to write; an existing file is replaced.
        text_hashes: `text_hash` of each document, [documents]; zeros where `exact` is off.
        bands: `MinHasher.hash_bands` of the documents, [documents, bands]; no bands where `minhash` is off.
        kept: whether to compare each document, [documents].
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
    """Find the documents that repeat earlier ones.

    A document that is both an exact and a near-duplicate is an exact one.

    Args:
        files: signature files in the order of the documents.
        sources: the source of each file; files of one source must be consecutive.
        config: what to compare, and the memory for it. `bands` must match the files.
        progress: called with the fraction done, from 0 to 1.
        n_held_out: how many of the sources are held-out text; they come first.

    Raises:
        DataError: a file is damaged or was written with another number of bands.
        ValueError: the files of a source are not consecutive.
    """
    signed = _open_signed_documents(files, sources, config, n_held_out)
    reasons = _reasons(signed)
    codes: ReasonCodes = np.zeros(signed.n_documents, np.uint8 if len(reasons) <= 256 else np.uint16)
    max_entries = max(MIN_ENTRIES, int(config.memory_mb * 1e6 / BYTES_PER_ENTRY))
    n_ranges = max(1, ceil(signed.n_documents / (0.8 * max_entries)))  # 0.8: the hashes do not fill all ranges alike
    rows = _rows_to_compare(config, n_held_out)
    for done, (row, range_index) in enumerate(itertools.product(rows, range(n_ranges)), start=1):
        entries = _read_value_range(signed.files, row, range_index, n_ranges, block=max_entries // 16)
        for repeats, firsts in _find_repeats(entries, max_entries):
            _set_codes(codes, repeats, firsts, signed, config, is_near=row > 0)
        progress(done / (len(rows) * n_ranges))
    per_file = tuple(codes[file.first : file.first + file.documents] for file in signed.files)
    return DuplicateCodes(per_file, reasons)


def _rows_to_compare(config: DedupConfig, n_held_out: int) -> range:
    """The rows of the signature files to compare. Held-out text is compared in both ways, whatever the settings are."""
    has_exact, has_near = config.exact or n_held_out > 0, config.minhash or n_held_out > 0
    return range(0 if has_exact else 1, 1 + (config.bands if has_near else 0))


def _reasons(signed: _SignedDocuments) -> tuple[str | None, ...]:
    """The reason of each code, the one that takes precedence first: see `_set_codes`."""
    held_out = signed.sources[: signed.n_held_out]
    kinds = [(kind, held_out) for kind in HELD_OUT_DUPLICATES]
    kinds += [("exact_duplicate", signed.sources), ("near_duplicate", signed.sources)]
    return (None, *(f"{kind}: {name}" for kind, names in kinds for name in names))


def _set_codes(
    codes: ReasonCodes,
    repeats: DocumentIndices,
    firsts: DocumentIndices,
    signed: _SignedDocuments,
    config: DedupConfig,
    *,
    is_near: bool,
) -> None:
    """Give documents the code of why they are duplicates.

    A document that has a code already keeps the lower of the two.

    Args:
        codes: of all documents; changed in place.
        repeats: documents with a value that an earlier document has.
        firsts: for each of them the first document with that value.
        signed: the documents and their sources.
        config: a kind of duplicate that it turns off is dropped only where it repeats held-out text.
        is_near: the value is a band, not a text hash.
    """
    n_sources, n_held_out = len(signed.sources), signed.n_held_out
    source = signed.source_of(firsts)
    is_of_held_out = (source < n_held_out) & (repeats >= signed.first_training_document)
    if not (config.minhash if is_near else config.exact):
        repeats, source = repeats[is_of_held_out], source[is_of_held_out]
        is_of_held_out = np.ones(len(repeats), np.bool_)
    # The order of `_reasons`: exact and near of each held-out source, then exact and near of each source.
    offset = np.where(is_of_held_out, n_held_out if is_near else 0, 2 * n_held_out + (n_sources if is_near else 0))
    code = 1 + offset + source
    current = codes[repeats]
    codes[repeats] = np.where(current == 0, code, np.minimum(current, code))


def _open_signed_documents(
    files: Sequence[Path], sources: Sequence[str], config: DedupConfig, n_held_out: int
) -> _SignedDocuments:
    """Read the headers of the signature files and check them. Arguments and errors are those of `find_duplicates`."""
    names = tuple(dict.fromkeys(sources))
    source_of_file = [names.index(source) for source in sources]
    if source_of_file != sorted(source_of_file):
        raise ValueError(f"the files of a source must be consecutive, got {', '.join(sources)}")
    opened: list[_SignatureFile] = []
    n_documents = 0
    n_rows = 1 + config.bands if config.minhash or n_held_out else None
    for path in files:
        opened.append(_open_signature_file(path, n_documents, n_rows))
        n_documents += opened[-1].documents
    starts = np.array([opened[source_of_file.index(source)].first for source in range(len(names))], np.int64)
    return _SignedDocuments(tuple(opened), names, starts, n_documents, n_held_out)


def _open_signature_file(path: Path, first: int, n_rows: int | None) -> _SignatureFile:
    """Read the header of a signature file; DataError if the file is damaged or does not have `n_rows` rows."""
    try:
        with path.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            data = stream.tell()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a signature file ({error}); remove it and prepare again") from error
    if dtype != np.uint64 or len(shape) != 2 or n_rows not in (None, shape[0]):
        raise DataError(f"{path}: has shape {shape}, not {n_rows or 1} rows of hashes; remove it and prepare again")
    size, expected = path.stat().st_size, data + 8 * shape[0] * shape[1]
    if size != expected:
        raise DataError(f"{path}: has {size} bytes, not {expected}: it is truncated; remove it and prepare again")
    return _SignatureFile(path, first, shape[1], data)


def _read_value_range(
    files: Sequence[_SignatureFile], row: int, range_index: int, n_ranges: int, block: int
) -> Iterator[tuple[Hashes, DocumentIndices]]:
    """Yield (values, their documents) of one row, for the values in one of `n_ranges` equal ranges of [1, 2^64).

    Reads `block` documents at a time.
    """
    lowest, highest = (
        np.uint64(max(1, -(-(range_index << 64) // n_ranges))),
        np.uint64(-(-((range_index + 1) << 64) // n_ranges) - 1),
    )
    for file in files:
        for start in range(0, file.documents, block):
            count, offset = min(block, file.documents - start), file.data + 8 * (row * file.documents + start)
            values = np.fromfile(file.path, np.uint64, count, offset=offset)
            in_range = np.flatnonzero((values >= lowest) & (values <= highest))
            yield values[in_range], in_range + (file.first + start)


def _find_repeats(
    entries: Iterable[tuple[Hashes, DocumentIndices]], max_entries: int
) -> Iterator[tuple[DocumentIndices, DocumentIndices]]:
    """Yield (documents with a value that an earlier document has, the first document with that value).

    Args:
        entries: (values, their documents) in the order of the documents.
        max_entries: entries to hold in memory. When it is reached, only the first entry of each value is kept, so a
            value that a billion documents share takes no more memory than any other.
    """
    values, documents, size = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
    for more_values, more_documents in entries:
        if size + len(more_values) > max_entries:
            yield _keep_first_of_each(values, documents)
            size = len(values[0])
        values.append(more_values)
        documents.append(more_documents)
        size += len(more_values)
    yield _keep_first_of_each(values, documents)


def _keep_first_of_each(
    values: list[Hashes], documents: list[DocumentIndices]
) -> tuple[DocumentIndices, DocumentIndices]:
    """Reduce each list to one array, of the first entry of each value, and return what `_find_repeats` yields.

    Every array is freed as soon as it is not needed: BYTES_PER_ENTRY counts on it.
    """
    value, document = np.concatenate(values), np.concatenate(documents)
    values.clear()
    documents.clear()
    order = np.argsort(value, kind="stable")
    value = value[order]
    document = document[order]
    del order
    is_first = np.ones(len(value), np.bool_)
    np.not_equal(value[1:], value[:-1], out=is_first[1:])
    first, repeat = np.flatnonzero(is_first), np.flatnonzero(~is_first)
    firsts_of_repeats = document[first[np.searchsorted(first, repeat) - 1]]
    values.append(value[first])
    documents.append(document[first])
    return document[repeat], firsts_of_repeats
