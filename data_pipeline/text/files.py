"""Which files a source means, in an order that is the same on every machine. Local paths and any fsspec address."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
import xxhash

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.settings import SourceConfig

FileInfo = dict[str, Any]  # Any: every file system adds entries of its own; `name`, `type` and `size` are always there

FOLDER_PATTERNS = {
    "text": ("*.txt", "*.md"),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst"),
    "parquet": ("*.parquet",),
    "arrow": ("*.arrow", "*.arrows"),
}
"""Which files of a folder are read where `pattern` is not set."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    fs: fsspec.AbstractFileSystem
    path: str
    name: str
    """Path below the folder given; the file's own name where a file was given."""
    size: int
    """Bytes, compressed if the file is; 0 where the file system does not know."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of one file's documents. A line belongs to the part in which its first byte lies."""

    file: SourceFile
    start: int | None
    """First byte of plain jsonl, row group of parquet, record batch of arrow; None and None stand for the whole file."""
    stop: int | None
    """The one after the last."""
    row: int
    """Parquet and arrow: rows of the file before it."""
    bytes: int
    """Its share of the file's bytes; the shares of a file's parts add up to the file's size."""


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source in reading order: as `paths` gives them, those of one folder or glob sorted by name. Empty for `hf`.

    Raises:
        DataError: `paths` is empty, or one of its entries does not exist or matches no file.
    """
    if not source.paths:
        raise DataError(f"data.sources: a source of kind {source.kind} has no paths; name its files, folders or globs")
    files: list[SourceFile] = []
    if source.kind == "hf":
        return files
    for given in source.paths:
        fs, found = _find(given, source)
        files += [SourceFile(fs, found[name][0], name, found[name][1]) for name in sorted(found)]
    return files


def describe_files(files: Sequence[SourceFile]) -> str:
    """What a source's files were when they were read: count, bytes, and a hash of their names and sizes."""
    lines = "".join(f"{file.name}\t{file.size}\n" for file in files).encode("utf-8", "surrogatepass")
    return f"{len(files)} files, {sum(file.size for file in files)} bytes, {xxhash.xxh3_64_hexdigest(lines)}"


def _find(given: str, source: SourceConfig) -> tuple[fsspec.AbstractFileSystem, dict[str, tuple[str, int]]]:
    """What one entry of `paths` stands for: its file system and {name below the folder: (path, bytes)}."""
    wanted: tuple[str, ...] = ("*",)
    try:
        fs, path = fsspec.core.url_to_fs(given)
        if fs.isdir(path):
            root, found = path, _walk(fs, path, source.exclude)
            wanted = (source.pattern,) if source.pattern else FOLDER_PATTERNS[source.kind]
        elif any(sign in path for sign in "*?[") and not fs.exists(path):
            root, found = _fixed_part(path), fs.glob(path, detail=True)
        else:
            root, found = str(PurePosixPath(path).parent), {path: fs.info(path)}
    except FileNotFoundError:
        raise DataError(f"data.sources: {given} does not exist") from None
    except (OSError, ValueError, ImportError) as error:  # no permission or connection, unknown protocol, missing driver
        raise DataError(f"data.sources: cannot read {given}: {error}") from error
    sizes = {}
    for file, info in found.items():
        name = _below(root, file)
        if info["type"] == "file" and _matches(name, wanted) and not _excluded(name, source.exclude):
            sizes[name] = (file, int(info["size"] or 0))
    if not sizes:
        what = f"no file below {given} matches {', '.join(wanted)}" if wanted != ("*",) else f"no file matches {given}"
        raise DataError(f"data.sources: {what}" + (f" (exclude: {', '.join(source.exclude)})" if source.exclude else ""))
    return fs, sizes


def _walk(fs: fsspec.AbstractFileSystem, root: str, exclude: tuple[str, ...]) -> dict[str, FileInfo]:
    """{path: what the file system knows of it} of all files below `root`, without looking into excluded folders."""
    found: dict[str, FileInfo] = {}
    for _, folders, files in fs.walk(root, detail=True, on_error="raise"):
        for name in [name for name, info in folders.items() if _excluded(_below(root, info["name"]), exclude)]:
            del folders[name]  # fsspec goes down only into those that are left
        found |= {info["name"]: info for info in files.values()}
    return found


def _below(root: str, path: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def _fixed_part(glob: str) -> str:
    """The folder in front of a glob's first wildcard."""
    parts = PurePosixPath(glob).parts
    wild = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return str(PurePosixPath(*parts[:wild])) if wild else ""


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], glob) for glob in globs)


def _excluded(name: str, globs: tuple[str, ...]) -> bool:
    """Whether a glob matches the name of the file or of a folder above it, or the path down to one of them."""
    if not globs:
        return False
    parts = name.split("/")
    candidates = {*parts, *("/".join(parts[: i + 1]) for i in range(len(parts)))}
    return any(fnmatch.fnmatchcase(candidate, glob) for candidate in candidates for glob in globs)
