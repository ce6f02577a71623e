"""Token files that other tools wrote: finding the files of a source, their lengths, and where their documents end.

All formats are little-endian:

- Megatron: `x.bin` and `x.idx`, described in `shards.py`. A document may have several sequences.
- datatrove: `x.ds`, raw tokens, and `x.ds.index`, the u64 end of each document in tokens. The sizes of both files tell
  whether a token has 2 or 4 bytes.
- OLMo: `x.npy`, raw tokens in spite of the extension; files with a NumPy header are read too. `x.csv.gz` has a line
  `start,end,...` for each document. Without it, each document ends with the end-of-text token.
"""

from __future__ import annotations

import csv
import fnmatch
import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.addresses import expand_variables, redacting_errors
from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig
from data_pipeline.storage.manifest import BLOCK_BYTES
from data_pipeline.text.files import SourceFile, list_files

_PATTERNS = {"megatron": "*.bin", "datatrove": "*.ds", "olmo": "*.npy"}
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "<i4", 5: "int64", 6: "float64", 7: "float32", 8: "<u2"}
_NUMPY_MAGIC = b"\x93NUMPY"

Ends = NDArray[np.int64]


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens."""

    path: Path
    start: int
    """Byte at which the tokens begin."""
    dtype: np.dtype[np.integer]
    n_tokens: int
    read_ends: Callable[[], Ends]
    """Returns where each document ends, in tokens, the last at `n_tokens`. Includes empty documents."""


def list_token_files(source: SourceConfig) -> list[SourceFile]:
    """List the token files of a source. In folders and globs, these are the files that match `pattern`, by default the
    kind's extension.

    Raises:
        DataError: a path is not local or does not exist, or no file matches.
    """
    for given, path in zip(source.paths, token_paths(source), strict=True):
        if "://" in path:
            raise DataError(
                f"data.sources: {given} is not a local file; tokens are read in place, so copy them to a disk first"
            )
    pattern = source.pattern or _PATTERNS[source.kind]
    with redacting_errors(source.paths):
        listed = list_files(source.model_copy(update={"paths": token_paths(source), "pattern": pattern}))
    files = [file for file in listed if fnmatch.fnmatchcase(Path(file.path).name, pattern)]
    if not files:
        raise DataError(
            f"data.sources: no file of {', '.join(source.paths)} matches {pattern}; set `pattern` if they are called "
            "otherwise"
        )
    return files


def token_paths(source: SourceConfig) -> tuple[str, ...]:
    """Return the files, folders and globs that the `paths` of a tokenized source stand for, with `${NAME}` replaced."""
    paths = tuple(expand_variables(given).removeprefix("file://") for given in source.paths)
    return tuple(map(_megatron_bin, paths)) if source.kind == "megatron" else paths


def open_token_file(source: SourceConfig, path: Path, eot_id: int) -> TokenFile:
    """Inspect one file without reading its tokens.

    Raises:
        DataError: it cannot be read, its parts do not fit together, or its tokens have neither 2 nor 4 bytes.
    """
    try:
        path.open("rb").close()
        if source.kind == "megatron":
            return _open_megatron(path)
        if source.kind == "datatrove":
            return _open_datatrove(path)
        return _open_olmo(path, np.dtype(source.dtype), eot_id)
    except OSError as error:
        raise DataError(f"data.sources: cannot read {error.filename}: {error.strerror}") from None


def _megatron_bin(given: str) -> str:
    """Return the `.bin` for a given prefix, `.idx` or `.bin`, or a glob of these. Folders are returned unchanged."""
    return given if Path(given).expanduser().is_dir() else given.removesuffix(".idx").removesuffix(".bin") + ".bin"


def _open_megatron(path: Path) -> TokenFile:
    index = path.with_suffix(".idx")
    with index.open("rb") as stream:
        head = stream.read(_MEGATRON_HEADER.size)
    magic, version, code, sequences, entries = _MEGATRON_HEADER.unpack(head.ljust(_MEGATRON_HEADER.size))
    if (magic, version) != (b"MMIDIDX\x00\x00", 1):
        raise DataError(f"{index} is not a Megatron index of version 1")
    name = _MEGATRON_DTYPES.get(code, f"code {code}")
    if name not in ("<u2", "<i4"):
        raise DataError(
            f"{index}: its tokens are {name}; only uint16 and int32 can be read in place, so write them as one of these"
        )
    size, expected = index.stat().st_size, len(head) + 12 * sequences + 8 * entries
    if size != expected or not entries:
        raise DataError(
            f"{index}: {size} bytes, where {sequences} sequences and {entries} document entries of text take {expected}"
        )
    dtype = np.dtype(name)
    n_bytes = path.stat().st_size
    ends = partial(_megatron_ends, index, sequences, entries, dtype.itemsize, n_bytes)
    return TokenFile(path, 0, dtype, n_bytes // dtype.itemsize, ends)


def _megatron_ends(index: Path, sequences: int, entries: int, itemsize: int, n_bytes: int) -> Ends:
    raw = np.memmap(index, np.uint8, "r", _MEGATRON_HEADER.size)
    lengths = np.frombuffer(raw, "<i4", sequences)
    pointers = np.frombuffer(raw, "<i8", sequences, 4 * sequences)
    documents = np.frombuffer(raw, "<i8", entries, 12 * sequences)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or (pointers != ends[:-1] * itemsize).any() or ends[-1] * itemsize != n_bytes:
        raise DataError(
            f"{index}: its sequences do not fill the {n_bytes} bytes of the .bin one after the other; write the pair "
            "anew"
        )
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise DataError(f"{index}: its documents do not divide its {sequences} sequences; write the pair anew")
    document_ends: Ends = ends[documents[1:]]
    return document_ends


def _open_datatrove(path: Path) -> TokenFile:
    index = Path(f"{path}.index")
    n_bytes, index_bytes = path.stat().st_size, index.stat().st_size
    with index.open("rb") as stream:
        stream.seek(max(0, index_bytes - 8))
        n_tokens = int.from_bytes(stream.read(), "little")
    itemsize = n_bytes // n_tokens if n_tokens else 2
    if index_bytes % 8 or itemsize not in (2, 4) or itemsize * n_tokens != n_bytes:
        raise DataError(
            f"{index}: {n_tokens} tokens by its last entry, but {path.name} has {n_bytes} bytes, not 2 or 4 for each"
        )
    return TokenFile(path, 0, np.dtype(f"<u{itemsize}"), n_tokens, partial(_datatrove_ends, index))


def _datatrove_ends(index: Path) -> Ends:
    ends = np.fromfile(index, "<u8").astype(np.int64)
    if (np.diff(ends, prepend=0) < 0).any():
        raise DataError(f"{index}: a document ends before it begins; write the file anew")
    return ends


def _open_olmo(path: Path, dtype: np.dtype[np.integer], eot_id: int) -> TokenFile:
    with path.open("rb") as stream:
        has_header = stream.read(len(_NUMPY_MAGIC)) == _NUMPY_MAGIC
    n_bytes, start = path.stat().st_size, 0
    if has_header:
        try:
            array = np.load(path, mmap_mode="r")
        except ValueError as error:
            raise DataError(f"{path}: a NumPy file that cannot be mapped: {error}") from None
        start, dtype = array.offset, array.dtype
        n_bytes = array.nbytes
        if array.ndim != 1 or dtype.str not in ("<u2", "<u4", "<i4"):
            raise DataError(
                f"{path}: an array of {dtype} in {array.ndim} dimensions; tokens are one of uint16, uint32 or int32 "
                "in one"
            )
    if n_bytes % dtype.itemsize:
        raise DataError(
            f"{path}: {n_bytes} bytes are not a whole number of {dtype}; set dtype of this source, or restore the file"
        )
    n_tokens = n_bytes // dtype.itemsize
    metadata = path.with_suffix(".csv.gz")
    if metadata.is_file():
        return TokenFile(path, start, dtype, n_tokens, partial(_olmo_ends, metadata, n_tokens))
    return TokenFile(path, start, dtype, n_tokens, partial(_scanned_ends, path, start, dtype, n_tokens, eot_id))


def _olmo_ends(metadata: Path, n_tokens: int) -> Ends:
    ends = [0]
    try:
        with gzip.open(metadata, "rt", newline="") as stream:
            for row in csv.reader(stream):
                if int(row[0]) != ends[-1] or int(row[1]) < ends[-1]:
                    raise ValueError(f"a document from {row[0]} to {row[1]} follows one that ends at {ends[-1]}")
                ends.append(int(row[1]))
        if ends[-1] != n_tokens:
            raise ValueError(
                f"its last document ends at {ends[-1]}, but there are {n_tokens} tokens; is dtype of this source right?"
            )
    except (OSError, EOFError, ValueError, IndexError, zlib.error, csv.Error) as error:
        raise DataError(
            f"{metadata}: {error}; restore it, or move it away to have documents found by the end-of-text token"
        ) from None
    return np.array(ends[1:], np.int64)


def _scanned_ends(path: Path, start: int, dtype: np.dtype[np.integer], n_tokens: int, eot_id: int) -> Ends:
    """Find the documents by their end-of-text tokens. Tokens after the last one form a document too."""
    if not n_tokens:
        return np.empty(0, np.int64)
    ids, step = np.memmap(path, dtype, "r", start, (n_tokens,)), BLOCK_BYTES // dtype.itemsize
    ends = np.concatenate([np.flatnonzero(ids[at : at + step] == eot_id) + at + 1 for at in range(0, n_tokens, step)])
    if not len(ends):
        raise DataError(
            f"{path}: none of its {n_tokens} tokens is {eot_id}, the end-of-text token of data.tokenizer, and there is "
            "no .csv.gz with its documents; set data.tokenizer to the one that made it, or dtype of this source "
            f"({dtype})"
        )
    return ends if ends[-1] == n_tokens else np.append(ends, n_tokens)
