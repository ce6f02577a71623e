"""Raw text in: what a document is, and how text files and jsonl become documents. `columnar.py` reads parquet and arrow, `hf_datasets.py`
data sets of Hugging Face.

A document's id, text and metadata depend on the settings and the files alone, never on where a file was cut into parts.
Knows files; knows no tokens. zstandard is imported where it is used.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from data_pipeline.errors import DataError, one_line
from data_pipeline.text.files import is_library_error
from data_pipeline.text.formats import (
    GZIP,
    HEAD_BYTES,
    ZSTD,
    FileFormat,
    detect_binary_format,
    detect_encoding,
    detect_format,
)

if TYPE_CHECKING:
    from data_pipeline.settings import SourceConfig
    from data_pipeline.text.files import FileSlice, SourceFile

_BLOCK = 1 << 20
_PACKED_BLOCK = 1 << 17  # it may unpack to many times its size
_BOM = b"\xef\xbb\xbf"
_MEND = "mend the line, or leave the file out with `exclude`"
_SURROGATES = re.compile("[\ud800-\udfff]")

MAX_UNDECODED = 0.02
"""Largest share of a document's characters that may be lost in decoding, or be NUL. A single one does not count."""

UNDECODED = "undecodable"
NULS = "NUL characters"
DEFECTS = (UNDECODED, NULS)
"""Reasons for which a document is dropped because it is no text."""


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
    had_invalid_unicode: bool
    """The raw text was not valid Unicode: what could not be decoded became U+FFFD."""
    bytes_read: int
    """Bytes of the chunk's files read so far, compressed size; 0 for `hf`. For a progress display."""
    defect: str | None = None
    """One of DEFECTS, where so much of it could not be decoded that it is no text; whoever drops it counts it under this reason."""


def read_text(part: FileSlice, source: SourceConfig, origin: str, before: int) -> Iterator[Document]:
    """Yield the one document of a text file. Arguments and errors of all readers are those of `chunks.read_chunk`.

    Args:
        part: what to read.
        source: its settings.
        origin: the source's name.
        before: bytes of the chunk's parts before this one.
    """
    del source  # a text file has no fields
    file = part.file
    with explain_read_errors(file.path), file.fs.open(file.path, "rb") as stream:
        text, lost = decode_file(stream.read(), file)
    yield make_document(file.name, text, origin, {}, lost, before + part.bytes)


def decode_file(raw: bytes, file: SourceFile) -> tuple[str, int]:
    """(text, characters of it that could not be decoded) of a text file, decompressed and in the encoding of its byte-order mark.

    Raises:
        DataError: it holds something else than text.
    """
    raw = _unpacked(raw, file)
    encoding, mark = detect_encoding(raw)
    return decode_bytes(raw[mark:], encoding)


def _unpacked(raw: bytes, file: SourceFile) -> bytes:
    """The bytes of a text file, decompressed if they are compressed, whatever its name says. DataError if they are no text."""
    found, packed = detect_binary_format(raw[:HEAD_BYTES]), False
    if found in (GZIP, ZSTD):
        raw = b"".join(block for _, block in _blocks(io.BytesIO(raw), "x.gz" if found == GZIP else "x.zst"))
        found, packed = detect_binary_format(raw[:HEAD_BYTES]), True
        if found in (GZIP, ZSTD):
            raise DataError(f"{file.path} is compressed twice, the second time by {found.name}; unpack it once")
    if found is not None and detect_encoding(raw) == ("utf-8", 0):
        raise DataError(
            f"{file.path} is {found.name}{', compressed' if packed else ''}, not text; {_leaving_out(found)}"
        )
    if raw and not packed and is_compressed(file.file_name):
        raise DataError(
            f"{file.path} is not compressed, although it is named {PurePosixPath(file.file_name).suffix}; rename it"
        )
    return raw


def read_jsonl(part: FileSlice, source: SourceConfig, origin: str, before: int) -> Iterator[Document]:
    """Yield a document for each line that begins in this part and is not empty."""
    file, start, number, offset = part.file, part.start or 0, 0, 0

    def where() -> str:
        return f"{file.path}, byte {offset}" if start else f"{file.path}:{number}"

    with explain_read_errors(file.path, file, source.kind), file.fs.open(file.path, "rb") as stream:
        for offset, line, read in read_lines(stream, file.file_name, start, part.stop):
            number += 1
            line = line.removeprefix(_BOM)
            if not line or line.isspace():
                continue
            raw, lost = decode_bytes(line)
            row = _parse(raw, where, file)
            name, text, metadata = extract_fields(row, where, source)
            yield make_document(name or f"{file.name}@{offset}", text, origin, metadata, lost, before + read - start)


@contextmanager
def explain_read_errors(what: str, file: SourceFile | None = None, kind: str = "") -> Iterator[None]:
    """Turn whatever a reader raises on a missing, unreadable or corrupt file into one line that names it.

    Args:
        what: what is read.
        file: whose first bytes tell whether it is in another format than `kind`.
        kind: of the source.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"data.sources: {what} does not exist; restore it, or correct `paths`") from None
    except MemoryError:
        raise DataError(
            f"{what}: reading it takes more memory than there is; lower data.workers, or split the file"
        ) from None
    except (
        Exception
    ) as error:  # zlib, pyarrow and every driver of fsspec raise kinds of their own, see is_library_error
        if not (isinstance(error, OSError | EOFError | ValueError) or is_library_error(error)):
            raise
        found = None if file is None else detect_other_format(file, kind)
        if found is not None:
            raise DataError(f"{what}: cannot be read, it is {found.name}: {found.remedy}") from error
        detail = one_line(error)
        way_out = "restore it, or leave it out with `exclude`"
        raise DataError(f"{what}: cannot be read, it may be corrupt or out of reach ({detail}); {way_out}") from error


def detect_other_format(file: SourceFile, kind: str) -> FileFormat | None:
    """What a file that could not be read holds instead; None where its first bytes do not tell."""
    try:
        with file.fs.open(file.path, "rb") as stream:
            head = stream.read(HEAD_BYTES)
        found = detect_format(head)
        named = _packing(file.file_name)
        if kind == "jsonl" and named is not None and found == named:
            with file.fs.open(file.path, "rb") as stream:
                found = detect_format(next(_blocks(stream, file.file_name), (0, b""))[1][:HEAD_BYTES])
            if found in (GZIP, ZSTD):
                return FileFormat(f"compressed twice, the second time by {found.name}", "unpack it once")
        elif kind == "jsonl" and named is not None and head and (found is None or found.kind == kind):
            return FileFormat(f"not {named.name}, although its name says so", "rename it")
    except Exception:  # whatever a driver or a decompressor raises: the error that is to be explained says it
        return None
    if found in (GZIP, ZSTD) and kind != "jsonl":
        return found._replace(remedy="unpack it")  # columns are compressed inside their file
    return None if found is None or found.kind == kind else found


def _leaving_out(found: FileFormat) -> str:
    return found.remedy if "exclude" in found.remedy else f"{found.remedy}, or leave it out with `exclude`"


def _packing(name: str) -> FileFormat | None:
    """How a file of this name is compressed."""
    return GZIP if name.lower().endswith(".gz") else ZSTD if name.lower().endswith(".zst") else None


def is_compressed(name: str) -> bool:
    """Whether a file of this name is compressed as a whole, so that it can be read from its beginning only."""
    return _packing(name) is not None


def read_lines(stream: BinaryIO, name: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes, int]]:
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
    packing = _packing(name)
    if packing == GZIP:
        with gzip.GzipFile(fileobj=stream) as unzipped:
            while block := unzipped.read(_BLOCK):
                yield stream.tell(), block
    elif packing == ZSTD:
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


def _parse(line: str, where: Callable[[], str], file: SourceFile) -> dict[str, Any]:  # Any: JSON holds anything
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"broken JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        problem = f"broken JSON ({error})"
    else:
        if isinstance(row, dict):
            return row
        problem = f"every line must be a JSON object, this one is a {type(row).__name__}"
    found = detect_other_format(file, "jsonl")
    raise DataError(f"{where()}: {problem}; {f'the file is {found.name}: {found.remedy}' if found else _MEND}")


def columns_to_read(there: Iterable[str], where: str, source: SourceConfig) -> list[str]:
    """The columns to read, of those that are there; metadata may be absent.

    Raises:
        DataError: the text or the id is not there.
    """
    there = list(there)
    needed = {"text_field": source.text_field} | ({"id_field": source.id_field} if source.id_field else {})
    for setting, column in needed.items():
        if column not in there:
            raise DataError(f"{where}: {setting}={column} is not there; it has: {_few(there)}. Set {setting}")
    wanted = list(dict.fromkeys([*needed.values(), *(column for column in source.metadata_fields if column in there)]))
    for column in wanted:
        if (times := there.count(column)) > 1:
            setting = next((setting for setting, needs in needed.items() if needs == column), "metadata_fields")
            raise DataError(
                f"{where}: {times} columns are called {column}; set {setting} to another, or write the file with one of them"
            )
    return wanted


def _few(names: list[str]) -> str:
    """A file may have thousands of columns, and a name thousands of characters."""
    few = ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in names[:20])
    return f"{few} and {len(names) - 20} more" if len(names) > 20 else few or "nothing"


def extract_fields(
    row: Mapping[str, Any], where: Callable[[], str], source: SourceConfig
) -> tuple[str | None, str, dict[str, object]]:  # Any: JSON holds anything
    """(id or None, text, metadata) of a row of named values."""
    try:
        text = row[source.text_field]
        identity = row[source.id_field] if source.id_field else None
    except KeyError:
        columns_to_read(row, where(), source)
        raise
    if not isinstance(text, str | None):
        raise DataError(
            f"{where()}: {source.text_field} is a {type(text).__name__}, not text; set text_field to another, or mend it"
        )
    metadata = {field: row.get(field) for field in source.metadata_fields}
    return None if identity is None else str(identity), text or "", metadata


def decode_bytes(raw: bytes, encoding: str = "utf-8") -> tuple[str, int]:
    """(text, how many of its characters are U+FFFD in place of bytes that could not be decoded)."""
    try:
        return raw.decode(encoding), 0
    except UnicodeDecodeError:
        text = raw.decode(encoding, "replace")
        return text, len(text) - len(raw.decode(encoding, "ignore"))


def make_document(name: str, text: str, origin: str, metadata: Mapping[str, object], lost: int, read: int) -> Document:
    """The document, its bytes counted, and valid Unicode: JSON may spell half a surrogate pair, which no tokenizer takes.

    `lost` counts the characters that could not be decoded, perhaps of the metadata.
    """
    repaired = lost > 0
    if text.isascii():
        return Document(name, text, origin, metadata, len(text), repaired, read, _defect(text, 0))
    lost = min(lost, text.count("\ufffd")) if lost else 0
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError:
        text, halves = _SURROGATES.subn("\ufffd", text)
        n_bytes, repaired, lost = len(text.encode()), True, lost + halves
    return Document(name, text, origin, metadata, n_bytes, repaired, read, _defect(text, lost))


def _defect(text: str, lost: int) -> str | None:
    """Why it is no text. Bytes of UTF-16 taken for UTF-8 are NULs by half, where they are Latin, and else mostly undecodable."""
    most = max(1.0, MAX_UNDECODED * len(text))
    if "\0" in text and text.count("\0") > most:  # the first question is quick, and nearly always answered by no
        return NULS
    return UNDECODED if lost > most else None
