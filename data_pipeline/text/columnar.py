"""Read parquet and Arrow files: each row is a document. pyarrow is imported only where it is used."""

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
"""Rows converted to Python objects at a time."""

BlockSizes = list[tuple[int, int]]
"""(rows, bytes of text) of each row group or record batch of a file, between which the file can be split."""


def read_parquet(piece: FileSlice, source: SourceConfig, source_name: str, bytes_before: int) -> Iterator[Document]:
    """Yield a document for each row of the slice's row groups. Arguments as in `sources.read_text`."""
    import pyarrow
    import pyarrow.parquet

    path, done = piece.file.path, 0
    with explain_read_errors(path, piece.file, source.kind), piece.file.fs.open(path, "rb") as stream:
        table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
        if not table.metadata.num_rows:  # pandas writes an empty table without columns
            return
        columns = _check_columns(table.schema_arrow, path, source)
        groups = range(table.num_row_groups)[piece.start : piece.stop]
        rows = sum(table.metadata.row_group(group).num_rows for group in groups)
        for batch in table.iter_batches(_ROWS, list(groups), columns, use_threads=False):
            done += batch.num_rows
            first = piece.row + done - batch.num_rows
            bytes_read = bytes_before + piece.bytes * done // rows
            yield from _rows_to_documents(batch, piece.file, first, source, source_name, bytes_read)


def read_arrow(piece: FileSlice, source: SourceConfig, source_name: str, bytes_before: int) -> Iterator[Document]:
    """Yield a document for each row of the slice's record batches. Arguments as in `sources.read_text`."""
    path, row = piece.file.path, piece.row
    with explain_read_errors(path, piece.file, source.kind), _open_file(piece.file) as stream:
        for number, batch in enumerate(_iter_batches(stream, piece.start, piece.stop), start=1):
            if not batch.num_rows:
                continue
            columns = _check_columns(batch.schema, path, source)
            # Without `stop` the number of batches is unknown, but the position in the file says how much was read.
            n_batches = piece.stop - (piece.start or 0) if piece.stop else 0
            bytes_read = piece.bytes * number // n_batches if n_batches else min(stream.tell(), piece.bytes)
            for start in range(0, batch.num_rows, _ROWS):
                rows = batch.select(columns).slice(start, _ROWS)
                yield from _rows_to_documents(
                    rows, piece.file, row + start, source, source_name, bytes_before + bytes_read
                )
            row += batch.num_rows


def row_groups(file: SourceFile, source: SourceConfig) -> BlockSizes:
    """Return the sizes of the row groups of a parquet file, from its footer."""
    import pyarrow
    import pyarrow.parquet

    with explain_read_errors(file.path, file, source.kind), file.fs.open(file.path, "rb") as stream:
        metadata = pyarrow.parquet.read_metadata(stream)
        texts = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path == source.text_field]
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [(group.num_rows, sum(group.column(i).total_uncompressed_size for i in texts)) for group in groups]


def record_batches(file: SourceFile, source: SourceConfig) -> BlockSizes:
    """Return the sizes of the record batches of an Arrow file; nothing for a remote one, so as not to download it."""
    if not isinstance(file.fs, LocalFileSystem):
        return []
    with explain_read_errors(file.path, file, source.kind), _open_file(file) as stream:
        return [
            (
                batch.num_rows,
                batch.column(source.text_field).nbytes if batch.schema.names.count(source.text_field) == 1 else 0,
            )
            for batch in _iter_batches(stream, None, None)
        ]


@contextmanager
def _open_file(file: SourceFile) -> Iterator[BinaryIO]:
    """Open the file. A local one is memory-mapped, so that skipped batches cost nothing."""
    import pyarrow

    with (
        pyarrow.memory_map(file.path)
        if isinstance(file.fs, LocalFileSystem)
        else file.fs.open(file.path, "rb") as stream
    ):
        yield stream


def _iter_batches(stream: BinaryIO, start: int | None, stop: int | None) -> Iterator[pyarrow.RecordBatch]:
    """Yield the record batches of an Arrow file, in the file format or the streaming format that `datasets` writes."""
    import pyarrow

    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        table = pyarrow.ipc.open_file(stream)
        for i in range(table.num_record_batches)[start:stop]:
            yield table.get_batch(i)
    else:
        yield from itertools.islice(pyarrow.ipc.open_stream(stream), start, stop)


def _rows_to_documents(
    batch: pyarrow.RecordBatch, file: SourceFile, first: int, source: SourceConfig, source_name: str, bytes_read: int
) -> Iterator[Document]:
    """Yield the rows of a small batch as documents. Its first row is row `first` of the file."""
    columns = set(batch.schema.names)
    texts = _column_bytes(batch.column(source.text_field))
    ids = _column_values(batch, source.id_field, file.path) if source.id_field else itertools.repeat(None)
    metadata = {field: _column_values(batch, field, file.path) for field in source.metadata_fields if field in columns}
    absent = dict.fromkeys(source.metadata_fields)
    for i, (raw, row_id) in enumerate(zip(texts, ids, strict=False)):
        text, lost = decode_bytes(raw or b"")
        values = absent | {field: column[i] for field, column in metadata.items()}
        document_id = f"{file.name}:{first + i}" if row_id is None else str(row_id)
        yield make_document(document_id, text, source_name, values, lost, bytes_read)


def _check_columns(schema: pyarrow.Schema, path: str, source: SourceConfig) -> list[str]:
    """Return the columns to read; DataError if the text column is missing or does not hold text."""
    columns = columns_to_read(schema.names, path, source)
    kind = schema.field(source.text_field).type
    if not _is_text(kind):
        raise DataError(
            f"{path}: column {source.text_field} holds {kind}, not text; set text_field to a column of strings"
        )
    return columns


def _is_text(kind: pyarrow.DataType) -> bool:
    """Return whether a column of this type holds strings or bytes, in any encoding, or only nulls.

    Writers give the type `null` to a column without any value.
    """
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pyarrow.types.is_dictionary(kind) or pyarrow.types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    return str(kind) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def _column_bytes(column: pyarrow.Array) -> list[bytes | None]:
    """Return the raw bytes of a column of texts.

    Bytes, because Arrow does not check that its strings are UTF-8 when it reads them, and raises at the first one that
    is not.
    """
    import pyarrow
    import pyarrow.compute

    column.validate()  # a damaged Arrow file may claim more values than it has bytes for
    if isinstance(column, pyarrow.ExtensionArray):
        return _column_bytes(column.storage)
    if pyarrow.types.is_dictionary(column.type):
        return _dictionary_bytes(column)
    if pyarrow.types.is_run_end_encoded(column.type):
        return _column_bytes(pyarrow.compute.run_end_decode(column))
    raw = column.cast(pyarrow.large_binary())
    raw.validate(full=True)  # nothing else notices wrong offsets in a damaged Arrow file
    values: list[bytes | None] = raw.to_pylist()
    return values


def _dictionary_bytes(column: pyarrow.DictionaryArray) -> list[bytes | None]:
    """Return the raw bytes of a dictionary-encoded column.

    Decodes only the entries in use, because many small batches may share a large dictionary.
    """
    import pyarrow

    dictionary, found = column.dictionary, dict[int, bytes | None]()
    indices: list[int | None] = column.indices.to_pylist()
    for index in {index for index in indices if index is not None}:
        if not 0 <= index < len(dictionary):
            raise pyarrow.ArrowInvalid(f"index {index} is outside of a dictionary of {len(dictionary)} values")
        (found[index],) = _column_bytes(dictionary.slice(index, 1))
    return [None if index is None else found[index] for index in indices]


def _column_values(batch: pyarrow.RecordBatch, name: str, path: str) -> list[object]:
    """Return any column as Python values.

    DataError if Python cannot represent a value, such as a date in the year 10,000.
    """
    import pyarrow

    column = batch.column(name)
    if _is_text(column.type):
        return [None if raw is None else decode_bytes(raw)[0] for raw in _column_bytes(column)]
    try:
        values: list[object] = column.to_pylist()
    except (ArithmeticError, ValueError, KeyError, NotImplementedError, pyarrow.ArrowException) as error:
        detail = one_line(error)
        raise DataError(
            f"{path}: column {name} of type {column.type} has a value that cannot be read ({detail}); leave it out of "
            f"metadata_fields and id_field"
        ) from error
    return values
