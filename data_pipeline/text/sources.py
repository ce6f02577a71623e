"""Documents, and reading them from text files and jsonl.

`columnar.py` reads parquet and Arrow files, `hf_datasets.py` Hugging Face datasets.

A document's id, text and metadata depend only on the settings and the files, never on where a file is split into
slices.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import DataError, one_line
from data_pipeline.text.blocks import compression_of, is_compressed, read_blocks, read_lines
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

_BOM = b"\xef\xbb\xbf"
_FIX_LINE = "fix the line, or leave the file out with `exclude`"
_SURROGATES = re.compile("[\ud800-\udfff]")

MAX_UNDECODED = 0.02
"""Largest fraction of a document's characters that may be undecodable, or NUL. A single such character is always
allowed."""

UNDECODED = "undecodable"
NULS = "NUL characters"
DEFECTS = (UNDECODED, NULS)
"""Reasons for dropping a document because it is not text."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document."""

    id: str
    """The value of `id_field`. Without one, with paths relative to the configured folder: `text` path; `jsonl`
    path@byte, the line's offset in the decompressed file; `parquet` and `arrow` path:row; `hf` split:row, and
    name/split:row for the second and later of its paths."""
    text: str
    source: str
    """The source's name."""
    metadata: Mapping[str, object]
    """The values of `metadata_fields`; None for fields that the document lacks."""
    n_bytes: int
    """UTF-8 bytes of the text."""
    had_invalid_unicode: bool
    """The raw text was not valid Unicode; what could not be decoded became U+FFFD."""
    bytes_read: int
    """Bytes of the chunk's files read so far, compressed size, for progress; 0 for `hf`."""
    defect: str | None = None
    """One of DEFECTS, if so much of it could not be decoded that it is not text. It is dropped for this reason."""


def read_text(piece: FileSlice, source: SourceConfig, source_name: str, bytes_before: int) -> Iterator[Document]:
    """Yield the one document of a text file. All readers have these arguments, and the errors of `chunks.read_chunk`.

    Args:
        piece: what to read.
        source: its settings.
        source_name: its name.
        bytes_before: bytes of the chunk's slices before this one.
    """
    del source  # a text file has no fields
    file = piece.file
    with explain_read_errors(file.path), file.fs.open(file.path, "rb") as stream:
        text, lost = decode_file(stream.read(), file)
    yield make_document(file.name, text, source_name, {}, lost, bytes_before + piece.bytes)


def decode_file(raw: bytes, file: SourceFile) -> tuple[str, int]:
    """Decompress and decode a text file, in the encoding of its byte-order mark.

    Returns:
        The text, and how many of its characters could not be decoded.

    Raises:
        DataError: the file is not text.
    """
    raw = _decompress(raw, file)
    encoding, mark = detect_encoding(raw)
    return decode_bytes(raw[mark:], encoding)


def _decompress(raw: bytes, file: SourceFile) -> bytes:
    """Decompress a text file if it is compressed, whatever its name is. DataError if the result is not text."""
    found, was_compressed = detect_binary_format(raw[:HEAD_BYTES]), False
    if found in (GZIP, ZSTD):
        raw = b"".join(block for _, block in read_blocks(io.BytesIO(raw), "x.gz" if found == GZIP else "x.zst"))
        found, was_compressed = detect_binary_format(raw[:HEAD_BYTES]), True
        if found in (GZIP, ZSTD):
            raise DataError(f"{file.path} is compressed twice, the second time by {found.name}; unpack it once")
    if found is not None and detect_encoding(raw) == ("utf-8", 0):
        raise DataError(
            f"{file.path} is {found.name}{', compressed' if was_compressed else ''}, not text; "
            f"{_remedy_or_exclude(found)}"
        )
    if raw and not was_compressed and is_compressed(file.file_name):
        raise DataError(
            f"{file.path} is not compressed, although it is named {PurePosixPath(file.file_name).suffix}; rename it"
        )
    return raw


def read_jsonl(piece: FileSlice, source: SourceConfig, source_name: str, bytes_before: int) -> Iterator[Document]:
    """Yield a document for each non-empty line that begins in this slice. Arguments as in `read_text`."""
    file, start, number, offset = piece.file, piece.start or 0, 0, 0

    def where() -> str:
        return f"{file.path}, byte {offset}" if start else f"{file.path}:{number}"

    with explain_read_errors(file.path, file, source.kind), file.fs.open(file.path, "rb") as stream:
        for offset, line, bytes_read in read_lines(stream, file.file_name, start, piece.stop):
            number += 1
            line = line.removeprefix(_BOM)
            if not line or line.isspace():
                continue
            raw, lost = decode_bytes(line)
            row = _parse_line(raw, where, file)
            row_id, text, metadata = extract_fields(row, where, source)
            document_id, bytes_read = row_id or f"{file.name}@{offset}", bytes_before + bytes_read - start
            yield make_document(document_id, text, source_name, metadata, lost, bytes_read)


@contextmanager
def explain_read_errors(what: str, file: SourceFile | None = None, kind: str = "") -> Iterator[None]:
    """Turn any exception of a reader on a missing, unreadable or corrupt file into a DataError that names the file.

    Args:
        what: what is read, for the error.
        file: the file; its first bytes are checked for a format other than `kind`.
        kind: the source's kind.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"data.sources: {what} does not exist; restore it, or correct `paths`") from None
    except MemoryError:
        raise DataError(
            f"{what}: reading it takes more memory than there is; lower data.workers, or split the file"
        ) from None
    except Exception as error:  # zlib, pyarrow and fsspec's drivers raise their own, see `is_library_error`
        if not (isinstance(error, OSError | EOFError | ValueError) or is_library_error(error)):
            raise
        found = None if file is None else detect_other_format(file, kind)
        if found is not None:
            raise DataError(f"{what}: cannot be read, it is {found.name}: {found.remedy}") from error
        detail = one_line(error)
        remedy = "restore it, or leave it out with `exclude`"
        raise DataError(f"{what}: cannot be read, it may be corrupt or unreachable ({detail}); {remedy}") from error


def detect_other_format(file: SourceFile, kind: str) -> FileFormat | None:
    """Return the format of a file that could not be read as `kind`, or None if its first bytes do not reveal it."""
    try:
        with file.fs.open(file.path, "rb") as stream:
            head = stream.read(HEAD_BYTES)
        found = detect_format(head)
        by_name = compression_of(file.file_name)
        if kind == "jsonl" and by_name is not None and found == by_name:
            with file.fs.open(file.path, "rb") as stream:
                found = detect_format(next(read_blocks(stream, file.file_name), (0, b""))[1][:HEAD_BYTES])
            if found in (GZIP, ZSTD):
                return FileFormat(f"compressed twice, the second time by {found.name}", "unpack it once")
        elif kind == "jsonl" and by_name is not None and head and (found is None or found.kind == kind):
            return FileFormat(f"not {by_name.name}, although its name says so", "rename it")
    except Exception:  # of any driver or decompressor; the caller reports the error that it already has
        return None
    if found in (GZIP, ZSTD) and kind != "jsonl":
        return found._replace(remedy="unpack it")  # these formats compress their columns, not the file as a whole
    return None if found is None or found.kind == kind else found


def _remedy_or_exclude(found: FileFormat) -> str:
    return found.remedy if "exclude" in found.remedy else f"{found.remedy}, or leave it out with `exclude`"


def _parse_line(line: str, where: Callable[[], str], file: SourceFile) -> dict[str, Any]:  # Any: JSON holds anything
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"broken JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # thousands of digits in a number, thousands of nested brackets
        problem = f"broken JSON ({error})"
    else:
        if isinstance(row, dict):
            return row
        problem = f"every line must be a JSON object, this one is a {type(row).__name__}"
    found = detect_other_format(file, "jsonl")
    raise DataError(f"{where()}: {problem}; {f'the file is {found.name}: {found.remedy}' if found else _FIX_LINE}")


def columns_to_read(available: Iterable[str], where: str, source: SourceConfig) -> list[str]:
    """Return which of the available columns to read. Metadata columns may be absent.

    Raises:
        DataError: the text or the id column is missing, or a column to read exists twice.
    """
    available = list(available)
    required = {"text_field": source.text_field} | ({"id_field": source.id_field} if source.id_field else {})
    for setting, column in required.items():
        if column not in available:
            has = _shorten(available)
            raise DataError(f"{where}: {setting}={column} does not exist; it has: {has}. Set {setting}")
    metadata = [column for column in source.metadata_fields if column in available]
    to_read = list(dict.fromkeys([*required.values(), *metadata]))
    for column in to_read:
        if (times := available.count(column)) > 1:
            setting = next(
                (setting for setting, required_by in required.items() if required_by == column), "metadata_fields"
            )
            raise DataError(
                f"{where}: {times} columns are called {column}; set {setting} to another, or write the file with one "
                f"of them"
            )
    return to_read


def _shorten(names: list[str]) -> str:
    """Join column names for an error. A file may have thousands of columns, and a name thousands of characters."""
    few = ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in names[:20])
    return f"{few} and {len(names) - 20} more" if len(names) > 20 else few or "nothing"


def extract_fields(
    row: Mapping[str, Any], where: Callable[[], str], source: SourceConfig
) -> tuple[str | None, str, dict[str, object]]:  # Any: JSON holds anything
    """Return (id or None, text, metadata) of a row."""
    try:
        text = row[source.text_field]
        row_id = row[source.id_field] if source.id_field else None
    except KeyError:
        columns_to_read(row, where(), source)
        raise
    if not isinstance(text, str | None):
        raise DataError(
            f"{where()}: {source.text_field} is a {type(text).__name__}, not text; set text_field to another, or fix it"
        )
    metadata = {field: row.get(field) for field in source.metadata_fields}
    return None if row_id is None else str(row_id), text or "", metadata


def decode_bytes(raw: bytes, encoding: str = "utf-8") -> tuple[str, int]:
    """Return (text, how many of its characters are U+FFFD that replace undecodable bytes)."""
    try:
        return raw.decode(encoding), 0
    except UnicodeDecodeError:
        text = raw.decode(encoding, "replace")
        return text, len(text) - len(raw.decode(encoding, "ignore"))


def make_document(
    document_id: str, text: str, source: str, metadata: Mapping[str, object], lost: int, bytes_read: int
) -> Document:
    """Make a document whose text is valid Unicode.

    JSON may spell half of a surrogate pair, which no tokenizer accepts: it becomes U+FFFD.

    Args:
        document_id: as in `Document`; so are `text`, `source`, `metadata` and `bytes_read`.
        lost: characters that could not be decoded, in the text or in the metadata.
    """
    had_invalid_unicode = lost > 0
    if text.isascii():
        defect = _find_defect(text, 0)
        return Document(document_id, text, source, metadata, len(text), had_invalid_unicode, bytes_read, defect)
    lost = min(lost, text.count("\ufffd")) if lost else 0
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError:
        text, n_surrogates = _SURROGATES.subn("\ufffd", text)
        n_bytes, had_invalid_unicode, lost = len(text.encode()), True, lost + n_surrogates
    defect = _find_defect(text, lost)
    return Document(document_id, text, source, metadata, n_bytes, had_invalid_unicode, bytes_read, defect)


def _find_defect(text: str, lost: int) -> str | None:
    """Return why this is not text, or None.

    UTF-16 read as UTF-8 is half NUL characters if its letters are Latin, and mostly undecodable otherwise.
    """
    limit = max(1.0, MAX_UNDECODED * len(text))
    if "\0" in text and text.count("\0") > limit:  # `in` is fast, and nearly always False
        return NULS
    return UNDECODED if lost > limit else None
