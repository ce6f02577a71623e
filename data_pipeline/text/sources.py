"""Raw text in: what a document is, and how text files, jsonl and data sets become documents. `columnar.py` reads parquet and arrow.

A document's id, text and metadata depend on the settings and the files alone, never on where a file was cut into parts.
Knows files; knows no tokens. The heavy readers (datasets, zstandard) are imported where they are used.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.text.files import data_set_names, from_library

if TYPE_CHECKING:
    import datasets

    from data_pipeline.settings import SourceConfig
    from data_pipeline.text.files import Part

_BLOCK = 1 << 20
_PACKED_BLOCK = 1 << 17  # it may unpack to many times its size
_BOM = b"\xef\xbb\xbf"
_MEND = "mend the line, or leave the file out with `exclude`"
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """One document."""

    id: str
    """The value of `id_field`; where there is none, for `text` the file's path below the folder given, `jsonl` path@byte (where the
    line begins in the unpacked file), `parquet` and `arrow` path:row, `hf` split:row, for the second and later
    of its paths name/split:row."""
    text: str
    source: str
    """The source's name."""
    metadata: Mapping[str, object]
    """The values of `metadata_fields`; None for what the document does not have."""
    n_bytes: int
    """UTF-8 bytes of the text."""
    repaired: bool
    """The raw text was not valid Unicode: what could not be decoded became U+FFFD."""
    read: int
    """Bytes of the chunk's files read so far, compressed size; 0 for `hf`. For a progress display."""


def read_text(part: Part, source: SourceConfig, origin: str, before: int) -> Iterator[Document]:
    """Yield the one document of a text file. Arguments and errors of all readers are those of `chunks.read_chunk`.

    Args:
        part: what to read.
        source: its settings.
        origin: the source's name.
        before: bytes of the chunk's parts before this one.
    """
    del source  # a text file has no fields
    file = part.file
    with reading(file.path), file.fs.open(file.path, "rb") as stream:
        raw = stream.read()
    text, repaired = decode(raw.removeprefix(_BOM))
    yield document(file.name, text, origin, {}, repaired, before + part.bytes)


def read_jsonl(part: Part, source: SourceConfig, origin: str, before: int) -> Iterator[Document]:
    """Yield a document for each line that begins in this part and is not empty."""
    file, start, number, offset = part.file, part.start or 0, 0, 0

    def where() -> str:
        return f"{file.path}, byte {offset}" if start else f"{file.path}:{number}"

    with reading(file.path), file.fs.open(file.path, "rb") as stream:
        for offset, line, read in _lines(stream, file.name, start, part.stop):
            number += 1
            line = line.removeprefix(_BOM)
            if not line or line.isspace():
                continue
            raw, repaired = decode(line)
            row = _parse(raw, where)
            name, text, metadata = _fields(row, where, source)
            yield document(name or f"{file.name}@{offset}", text, origin, metadata, repaired, before + read - start)


def read_hf(name: str, source: SourceConfig, origin: str) -> Iterator[Document]:
    """Yield the documents of one split of a Hugging Face data set."""
    rows, number = _open_hf(name, source), 0
    first, *more = data_set_names(source.paths)
    prefix = dict(zip(source.paths, (first, *(f"{end}/" for end in more)), strict=True))[name]
    if rows.column_names is not None:  # a stream may not know its columns; then each row tells
        rows = rows.select_columns(wanted_columns(rows.column_names, name, source))

    def where() -> str:
        return f"{name}, row {number} of split {source.split}"

    with reading(f"{name} (split {source.split})"):
        for number, row in enumerate(rows):
            identity, text, metadata = _fields(row, where, source)
            yield document(identity or f"{prefix}{source.split}:{number}", text, origin, metadata, False, 0)


def _open_hf(name: str, source: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a Hugging Face data set: a name on the hub, a folder of files, or a folder that `save_to_disk` wrote."""
    import datasets

    try:
        if any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name, name=source.subset, split=source.split, streaming=source.streaming)
    except Exception as error:  # of datasets, and whatever its HTTP client raises
        if not (isinstance(error, OSError | ValueError | KeyError) or from_library(error)):
            raise
        detail = " ".join(str(error).split()) or type(error).__name__
        what = f"data set {name} (subset={source.subset}, split={source.split})"
        raise DataError(f"data.sources: cannot open {what}: {detail}; check `paths`, `subset`, `split` and the connection") from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a reader raises on a missing, unreadable or corrupt file into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"data.sources: {what} does not exist; restore it, or correct `paths`") from None
    except Exception as error:  # zlib, pyarrow and every driver of fsspec raise kinds of their own, see from_library
        if not (isinstance(error, OSError | EOFError | ValueError) or from_library(error)):
            raise
        detail = " ".join(str(error).split()) or type(error).__name__
        way_out = "restore it, or leave it out with `exclude`"
        raise DataError(f"{what}: cannot be read, it may be corrupt or out of reach ({detail}); {way_out}") from error


def is_packed(name: str) -> bool:
    """Whether a file of this name is compressed as a whole, so that it can be read from its beginning only."""
    return name.endswith((".gz", ".zst"))


def _lines(stream: BinaryIO, name: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes, int]]:
    """Yield (offset, line, bytes of the file read so far) of each line that begins at a byte in [start, stop) of the unpacked file.

    The work is linear in the bytes, however long a line is: its pieces are joined once.
    """
    end = sys.maxsize if stop is None else stop
    offset = 0
    if start:
        offset = _first_line(stream, start, end)
        if offset >= end:
            return
        stream.seek(offset)
    pieces: list[bytes] = []
    for at, block in _blocks(stream, name):
        piece, *lines = block.split(b"\n")
        pieces.append(piece)
        if not lines:
            continue
        read, rest = min(at, end), lines.pop()
        for line in (b"".join(pieces), *lines):
            if offset >= end:
                return
            yield offset, line, read
            offset += len(line) + 1
        pieces = [rest]
    if offset < end:
        yield offset, b"".join(pieces), min(stream.tell(), end)


def _first_line(stream: BinaryIO, start: int, stop: int) -> int:
    """Where the first line begins that begins at `start` or later; `stop` if that is not before `stop`."""
    position = start - 1  # a line feed there ends the previous line
    stream.seek(position)
    while position < stop and (block := stream.read(_BLOCK)):
        if (found := block.find(b"\n")) >= 0:
            return min(position + found + 1, stop)
        position += len(block)
    return stop


def _blocks(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield (bytes of the file read so far, some unpacked bytes) to the end of the file."""
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=stream) as unzipped:
            while block := unzipped.read(_BLOCK):
                yield stream.tell(), block
    elif name.endswith(".zst"):
        for block in _zstd_blocks(stream):
            yield stream.tell(), block
    else:
        while block := stream.read(_BLOCK):
            yield stream.tell(), block


def _zstd_blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Decompress frame after frame: zstandard's own reader ends after the first, and takes a truncated file for a short one."""
    import zstandard

    frame = None
    while raw := stream.read(_PACKED_BLOCK):
        while raw:
            # The window is as large as `zstd --long=31` makes it; without a word zstandard refuses more than 128 MiB.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            raw = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last zstd frame is cut off")


def _parse(line: str, where: Callable[[], str]) -> dict[str, Any]:  # Any: JSON holds anything
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where()}: broken JSON ({error.msg} at column {error.colno}); {_MEND}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{where()}: broken JSON ({error}); {_MEND}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where()}: every line must be a JSON object, this one is a {type(row).__name__}; {_MEND}")
    return row


def wanted_columns(there: Iterable[str], where: str, source: SourceConfig) -> list[str]:
    """The columns to read, of those that are there; metadata may be absent.

    Raises:
        DataError: the text or the id is not there.
    """
    there = list(there)
    needed = {"text_field": source.text_field} | ({"id_field": source.id_field} if source.id_field else {})
    for setting, column in needed.items():
        if column not in there:
            raise DataError(f"{where}: {setting}={column} is not there; it has: {', '.join(there) or 'nothing'}. Set {setting}")
    return list(dict.fromkeys([*needed.values(), *(column for column in source.metadata_fields if column in there)]))


def _fields(
    row: Mapping[str, Any], where: Callable[[], str], source: SourceConfig
) -> tuple[str | None, str, dict[str, object]]:  # Any: JSON holds anything
    """(id or None, text, metadata) of a row of named values."""
    try:
        text = row[source.text_field]
        identity = row[source.id_field] if source.id_field else None
    except KeyError:
        wanted_columns(row, where(), source)
        raise
    if not isinstance(text, str | None):
        raise DataError(f"{where()}: {source.text_field} is a {type(text).__name__}, not text; set text_field to another, or mend it")
    metadata = {field: row.get(field) for field in source.metadata_fields}
    return None if identity is None else str(identity), text or "", metadata


def decode(raw: bytes) -> tuple[str, bool]:
    """(text, whether bytes that are not UTF-8 were replaced by U+FFFD)."""
    try:
        return raw.decode(), False
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), True


def document(name: str, text: str, origin: str, metadata: Mapping[str, object], repaired: bool, read: int) -> Document:
    """The document, its bytes counted, and valid Unicode: JSON may spell half a surrogate pair, which no tokenizer takes."""
    if text.isascii():
        return Document(name, text, origin, metadata, len(text), repaired, read)
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError:
        text = _SURROGATES.sub("\ufffd", text)
        n_bytes, repaired = len(text.encode()), True
    return Document(name, text, origin, metadata, n_bytes, repaired, read)
