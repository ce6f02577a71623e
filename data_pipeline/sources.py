"""Raw text in: files, folders and data sets become one ordered stream of documents.

The order and every document's id depend on the settings and the files alone, never on the machine.
Knows files; knows no tokens. The heavy readers (pyarrow, datasets, zstandard) are imported where they are used.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.files import SourceFile, list_files

if TYPE_CHECKING:
    import datasets

    from data_pipeline.settings import SourceConfig

_CHUNK = 1 << 20
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One document."""

    id: str
    """The value of `id_field`; where there is none, for `text` the file's path below the folder given, `jsonl` path:line,
    `parquet` path:row, `hf` split:row."""
    text: str
    n_bytes: int
    """UTF-8 bytes of the text."""
    repaired: bool
    """The raw text was not valid Unicode: what could not be decoded became U+FFFD."""
    read: int
    """Bytes of the source's files read so far, compressed size; 0 for `hf`. For a progress display."""


def read_documents(source: SourceConfig, files: Sequence[SourceFile] | None = None) -> Iterator[Document]:
    """Yield every document of `source`, in an order that is the same on every machine.

    Bytes that are not UTF-8 are replaced by U+FFFD and the document is marked `repaired`: one bad byte neither stops a long
    preparation nor passes unnoticed. A null or empty text is yielded as well; whoever drops it counts it. `files` is what
    `list_files(source)` gave, if it was called before.

    Raises:
        DataError: a file is missing, unreadable or corrupt, or a document lacks the text field.
    """
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for file in list_files(source) if files is None else files:
        yield from readers[source.kind](file, source)
    if source.kind == "hf":
        for name in source.paths:
            yield from _read_hf(name, source)


def _read_text(file: SourceFile, source: SourceConfig) -> Iterator[Document]:
    del source  # a text file has no fields
    with _reading(file.path), file.fs.open(file.path, "rb") as stream:
        raw = stream.read()
    text, repaired = _decode(raw.removeprefix(b"\xef\xbb\xbf"))
    yield _document(file.name, text, repaired, file.start + file.size)


def _read_jsonl(file: SourceFile, source: SourceConfig) -> Iterator[Document]:
    with _reading(file.path), file.fs.open(file.path, "rb") as stream:
        for number, line in enumerate(_lines(_decompressed(stream, file.name)), start=1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            text, repaired = _decode(line.removeprefix(b"\xef\xbb\xbf"))
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: broken JSON ({error.msg} at column {error.colno})") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: every line must be a JSON object, this one is a {type(row).__name__}")
            name, content = _fields(row, where, source)
            yield _document(name or f"{file.name}:{number}", content, repaired, file.start + stream.tell())


def _read_parquet(file: SourceFile, source: SourceConfig) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with _reading(file.path, pyarrow.ArrowException), file.fs.open(file.path, "rb") as stream:
        table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
        columns = _columns(table.schema_arrow.names, file.path, source)
        kind = table.schema_arrow.field(source.text_field).type
        if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
            raise DataError(f"{file.path}: column {source.text_field} holds {kind}, not text; set text_field to a column of strings")
        row, n_rows = 0, table.metadata.num_rows
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            # As bytes: Arrow does not check that its strings are UTF-8, and as_py() raises on the first that is not.
            texts = batch.column(source.text_field).cast(pyarrow.large_binary())
            names = batch.column(source.id_field) if source.id_field else None
            for i, raw in enumerate(texts):
                text, repaired = _decode(raw.as_py() or b"")
                name = _name(None if names is None else names[i].as_py()) or f"{file.name}:{row}"
                row += 1
                yield _document(name, text, repaired, file.start + file.size * row // n_rows)


def _read_hf(name: str, source: SourceConfig) -> Iterator[Document]:
    rows = _open_hf(name, source)
    if rows.column_names is not None:  # a stream may not know its columns; then each row tells
        rows = rows.select_columns(_columns(rows.column_names, name, source))
    number = 0
    with _reading(f"{name} (split {source.split})"):
        for number, row in enumerate(rows):
            identity, text = _fields(row, f"{name}, row {number} of split {source.split}", source)
            yield _document(identity or f"{source.split}:{number}", text, False, 0)


def _open_hf(name: str, source: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a Hugging Face data set: a name on the hub, a folder of files, or a folder that `save_to_disk` wrote."""
    import datasets

    try:
        if any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name, name=source.subset, split=source.split, streaming=source.streaming)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        detail = " ".join(str(error).split())
        raise DataError(f"data.sources: cannot open data set {name} (subset={source.subset}, split={source.split}): {detail}") from error


@contextmanager
def _reading(what: str, *more: type[Exception]) -> Iterator[None]:
    """Turn whatever a reader raises on a missing, unreadable or corrupt file into one line that names it."""
    kinds: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error, *more)
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"data.sources: {what} does not exist") from None
    except kinds as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what}: cannot be read, it may be corrupt ({detail}); restore it, or leave it out with `exclude`") from error


def _decompressed(stream: BinaryIO, name: str) -> Iterator[bytes]:
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=stream) as unzipped:
            yield from iter(lambda: unzipped.read(_CHUNK), b"")
    elif name.endswith(".zst"):
        yield from _zstd_chunks(stream)
    else:
        yield from iter(lambda: stream.read(_CHUNK), b"")


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Decompress frame after frame: zstandard's own reader ends after the first, and takes a truncated file for a short one."""
    import zstandard

    frame = None
    for raw in iter(lambda: stream.read(_CHUNK), b""):
        while raw:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            raw = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame is cut off")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _columns(there: Iterable[str], where: str, source: SourceConfig) -> list[str]:
    """The columns to read; DataError if the data does not have them."""
    there = list(there)
    wanted = {"text_field": source.text_field} | ({"id_field": source.id_field} if source.id_field else {})
    for setting, column in wanted.items():
        if column not in there:
            raise DataError(f"{where}: {setting}={column} is not there; it has: {', '.join(there) or 'nothing'}. Set {setting}")
    return list(wanted.values())


def _fields(row: Mapping[str, Any], where: str, source: SourceConfig) -> tuple[str | None, str]:  # Any: JSON holds anything
    """(id or None, text) of a row of named values."""
    _columns(row, where, source)
    text = row[source.text_field]
    if not isinstance(text, str | None):
        raise DataError(f"{where}: {source.text_field} is a {type(text).__name__}, not text; set text_field")
    return _name(row[source.id_field] if source.id_field else None), text or ""


def _name(value: object) -> str | None:
    """A document's id as a text; None where it is null, so that no two documents are called `None`."""
    return None if value is None else str(value)


def _decode(raw: bytes) -> tuple[str, bool]:
    """(text, repaired)."""
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), True


def _document(name: str, text: str, repaired: bool, read: int) -> Document:
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError:  # JSON may spell half a surrogate pair, which no tokenizer takes
        text = _SURROGATES.sub("\ufffd", text)
        n_bytes, repaired = len(text.encode()), True
    return Document(name, text, n_bytes, repaired, read)
