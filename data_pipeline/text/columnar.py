"""Parquet and Arrow files: their rows as documents, and where they can be cut. pyarrow is imported where it is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from data_pipeline.errors import DataError, one_line
from data_pipeline.text.sources import Document, columns_to_read, decode_bytes, explain_read_errors, make_document

if TYPE_CHECKING:
    import pyarrow

    from data_pipeline.settings import SourceConfig
    from data_pipeline.text.files import FileSlice, SourceFile

_ROWS = 256
"""Rows that become Python objects at a time."""

Blocks = list[tuple[int, int]]
"""(rows, bytes of text) of each row group or record batch of a file."""


def read_parquet(part: FileSlice, source: SourceConfig, origin: str, before: int) -> Iterator[Document]:
    """Yield a document for each row of these row groups. Arguments as in `sources.read_text`."""
    import pyarrow
    import pyarrow.parquet

    path, done = part.file.path, 0
    with explain_read_errors(path, part.file, source.kind), part.file.fs.open(path, "rb") as stream:
        table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
        if not table.metadata.num_rows:  # pandas writes no column of an empty table
            return
        columns = _check_columns(table.schema_arrow, path, source)
        groups = range(table.num_row_groups)[part.start : part.stop]
        rows = sum(table.metadata.row_group(group).num_rows for group in groups)
        for batch in table.iter_batches(_ROWS, list(groups), columns, use_threads=False):
            done += batch.num_rows
            first = part.row + done - batch.num_rows
            yield from _documents(batch, part.file, first, source, origin, before + part.bytes * done // rows)


def read_arrow(part: FileSlice, source: SourceConfig, origin: str, before: int) -> Iterator[Document]:
    """Yield a document for each row of these record batches. Arguments as in `sources.read_text`."""

    path, row = part.file.path, part.row
    with explain_read_errors(path, part.file, source.kind), _opened(part.file) as stream:
        for number, batch in enumerate(_batches(stream, part.start, part.stop), start=1):
            if not batch.num_rows:
                continue
            columns = _check_columns(batch.schema, path, source)
            # Nobody knows how many batches a stream has, but its position tells how much of the file was read.
            read = (
                part.bytes * number // (part.stop - (part.start or 0)) if part.stop else min(stream.tell(), part.bytes)
            )
            for start in range(0, batch.num_rows, _ROWS):
                rows = batch.select(columns).slice(start, _ROWS)
                yield from _documents(rows, part.file, row + start, source, origin, before + read)
            row += batch.num_rows


def row_groups(file: SourceFile, source: SourceConfig) -> Blocks:
    """The row groups of a parquet file, from its footer."""
    import pyarrow
    import pyarrow.parquet

    with explain_read_errors(file.path, file, source.kind), file.fs.open(file.path, "rb") as stream:
        metadata = pyarrow.parquet.read_metadata(stream)
        texts = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == source.text_field]
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [(group.num_rows, sum(group.column(i).total_uncompressed_size for i in texts)) for group in groups]


def record_batches(file: SourceFile, source: SourceConfig) -> Blocks:
    """The record batches of a local Arrow file; of one elsewhere all rows are one, since only reading it would tell."""

    if not isinstance(file.fs, LocalFileSystem):
        return []
    with explain_read_errors(file.path, file, source.kind), _opened(file) as stream:
        return [
            (
                batch.num_rows,
                batch.column(source.text_field).nbytes if batch.schema.names.count(source.text_field) == 1 else 0,
            )
            for batch in _batches(stream, None, None)
        ]


@contextmanager
def _opened(file: SourceFile) -> Iterator[BinaryIO]:
    """The file's bytes; those of a local one are mapped, so that what is passed over costs nothing."""
    import pyarrow

    with (
        pyarrow.memory_map(file.path)
        if isinstance(file.fs, LocalFileSystem)
        else file.fs.open(file.path, "rb") as stream
    ):
        yield stream


def _batches(stream: BinaryIO, start: int | None, stop: int | None) -> Iterator[pyarrow.RecordBatch]:
    """Record batches of an Arrow file of either format: with a footer, or as a stream, as `datasets` writes them."""
    import pyarrow

    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        table = pyarrow.ipc.open_file(stream)
        for i in range(table.num_record_batches)[start:stop]:
            yield table.get_batch(i)
    else:
        yield from itertools.islice(pyarrow.ipc.open_stream(stream), start, stop)


def _documents(
    batch: pyarrow.RecordBatch, file: SourceFile, first: int, source: SourceConfig, origin: str, read: int
) -> Iterator[Document]:
    """The rows of a small batch, of which the first is row `first` of the file."""
    there = set(batch.schema.names)
    texts = _raw(batch.column(source.text_field))
    names = _values(batch, source.id_field, file.path) if source.id_field else itertools.repeat(None)
    metadata = {field: _values(batch, field, file.path) for field in source.metadata_fields if field in there}
    absent = dict.fromkeys(source.metadata_fields)
    for i, (raw, name) in enumerate(zip(texts, names, strict=False)):
        text, lost = decode_bytes(raw or b"")
        values = absent | {field: column[i] for field, column in metadata.items()}
        yield make_document(f"{file.name}:{first + i}" if name is None else str(name), text, origin, values, lost, read)


def _check_columns(schema: pyarrow.Schema, path: str, source: SourceConfig) -> list[str]:
    """The columns to read; DataError if the text is not there or is none."""
    columns = columns_to_read(schema.names, path, source)
    kind = schema.field(source.text_field).type
    if not _is_text(kind):
        raise DataError(
            f"{path}: column {source.text_field} holds {kind}, not text; set text_field to a column of strings"
        )
    return columns


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether it holds strings or bytes, perhaps encoded, or nothing at all: writers make type `null` of a column without a value."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    return str(kind) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def _raw(column: pyarrow.Array) -> list[bytes | None]:
    """The bytes of a column of texts: Arrow does not check that its strings are UTF-8, and raises on the first that is not."""
    import pyarrow
    import pyarrow.compute

    column.validate()  # a damaged Arrow file may tell of more values than it has bytes for
    if isinstance(column, pyarrow.ExtensionArray):
        return _raw(column.storage)
    if pyarrow.types.is_dictionary(column.type):
        return _looked_up(column)
    if pyarrow.types.is_run_end_encoded(column.type):
        return _raw(pyarrow.compute.run_end_decode(column))
    raw = column.cast(pyarrow.large_binary())
    raw.validate(full=True)  # nothing else notices that the offsets in a damaged Arrow file point anywhere
    values: list[bytes | None] = raw.to_pylist()
    return values


def _looked_up(column: pyarrow.DictionaryArray) -> list[bytes | None]:
    """The bytes of a column with a dictionary. Only the entries in use are looked at: a large dictionary belongs to many small batches."""
    import pyarrow

    dictionary, found = column.dictionary, dict[int, bytes | None]()
    indices: list[int | None] = column.indices.to_pylist()
    for index in {index for index in indices if index is not None}:
        if not 0 <= index < len(dictionary):
            raise pyarrow.ArrowInvalid(f"index {index} is outside of a dictionary of {len(dictionary)} values")
        (found[index],) = _raw(dictionary.slice(index, 1))
    return [None if index is None else found[index] for index in indices]


def _values(batch: pyarrow.RecordBatch, name: str, path: str) -> list[object]:
    """Any column as Python values. DataError where Python has no such value, as a date of the year 10,000."""
    import pyarrow

    column = batch.column(name)
    if _is_text(column.type):
        return [None if raw is None else decode_bytes(raw)[0] for raw in _raw(column)]
    try:
        values: list[object] = column.to_pylist()
    except (ArithmeticError, ValueError, KeyError, NotImplementedError, pyarrow.ArrowException) as error:
        detail = one_line(error)
        raise DataError(
            f"{path}: column {name} of type {column.type} has a value that cannot be read ({detail}); leave it out of metadata_fields "
            f"and id_field"
        ) from error
    return values
