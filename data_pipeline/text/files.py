"""List the files of a source, local or at any fsspec address, in an order that is the same on every machine."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.addresses import expand_variables, redacting_errors, restore_spelling
from data_pipeline.errors import DataError, escape_unprintable, one_line, redact
from data_pipeline.text.walk import (
    BROKEN_LINK,
    FileInfo,
    find_glob,
    glob_root,
    is_excluded,
    relative_path,
    resolve_folder,
    walk,
)

if TYPE_CHECKING:
    from data_pipeline.settings import SourceConfig

DEFAULT_PATTERNS = {
    "text": ("*.txt", "*.md", "*.txt.gz", "*.md.gz", "*.txt.zst", "*.md.zst"),
    "jsonl": ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst"),
    "parquet": ("*.parquet",),
    "arrow": ("*.arrow", "*.arrows"),
}
"""Globs of the files of a folder that are read if `pattern` is not set."""

_BOOKKEEPING = ("_SUCCESS",)
"""Marker files that other tools write beside their data. Like hidden files, they are skipped without a note."""

_MAX_NAMES = 5
"""File names listed in a note."""

_VERSION_KEYS = (
    *("ETag", "etag", "blob_id", "generation", "md5Hash", "md5", "Content-MD5", "CRC"),
    *("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created"),
)
"""Keys under which file systems report something that changes with a file's contents, the most reliable first."""

_HUB_SECONDS = 10.0

_FILE_LIBRARIES = ("pyarrow", "datasets", "fsspec")
"""Packages that raise builtin exceptions about the files or addresses given to them."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    fs: fsspec.AbstractFileSystem
    path: str
    name: str
    """Path relative to the configured folder, or the file's own name if a file was configured. Unique in its source."""
    size: int
    """Size in bytes as stored; 0 if the file system does not know."""
    version: str
    """Modification time, ETag or checksum, whichever the file system has; else empty. Reveals a change that keeps the
    size."""

    @property
    def file_name(self) -> str:
        """The file's own name, whose extension implies its compression."""
        return file_name(self.path)


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Consecutive documents of one file. A line belongs to the slice that holds its first byte."""

    file: SourceFile
    start: int | None
    """First byte (plain jsonl), row group (parquet) or record batch (arrow). `start` and `stop` are None for the whole
    file."""
    stop: int | None
    """One past the last of them."""
    row: int
    """Parquet and arrow: rows of the file before the slice."""
    bytes: int
    """Estimated bytes of the slice. Those of all slices of a file add up to the file's size."""


@dataclass(frozen=True)
class SourceListing:
    """The files that the paths of a source lead to."""

    files: list[SourceFile]
    """Files to read, in reading order."""
    skipped: list[str]
    """Paths of the other visible files in its folders, except those that `exclude` matches."""


def list_files(source: SourceConfig) -> list[SourceFile]:
    """Return the files of a source, see `list_source`."""
    return list_source(source).files


def list_source(source: SourceConfig) -> SourceListing:
    """List the files of a source in the order of `paths`; those of one folder or glob are sorted by name.

    Empty for `hf`.

    Links to files and folders are followed, except to a folder above the link. Names are unique: if a file has the name
    of a file of an earlier entry of `paths`, it is prefixed with as much of its path as makes it unique (`x.txt`, then
    `b/x.txt`). So appending an entry to `paths` never changes the names of earlier files.

    Raises:
        DataError: an entry of `paths` does not exist or matches no file, two entries lead to the same file, or a link
            is broken.
    """
    files: list[SourceFile] = []
    if source.kind == "hf":
        duplicate = next((given for i, given in enumerate(source.paths) if given in source.paths[:i]), None)
        if duplicate is not None:
            raise DataError(f"data.sources: `paths` names the dataset {duplicate} twice; name it once")
        return SourceListing(files, [])
    skipped: list[str] = []
    entry_of_file: dict[tuple[fsspec.AbstractFileSystem, str, str], int] = {}
    names: set[str] = set()
    cached_resolve_folder = cache(resolve_folder)
    for number, given in enumerate(source.paths):
        with redacting_errors([given]):
            fs, found, others = _list_entry(given, source)
        skipped += others
        for short_name, (path, info) in sorted(found.items()):
            folder, _, file_name_only = path.rpartition("/")
            first = entry_of_file.setdefault((fs, cached_resolve_folder(fs, folder), file_name_only), number)
            if first != number:
                raise DataError(
                    f"data.sources: {path} is given twice, by {source.paths[first]} and by {given} of `paths`; "
                    f"every file is read once, so entries must not overlap"
                )
            name = _unique_name(short_name, restore_spelling(path, given), redact(given), names)
            names.add(name)
            files.append(SourceFile(fs, path, name, int(info["size"] or 0), _version(info)))
    return SourceListing(files, sorted(set(skipped) - {file.path for file in files}))


def dataset_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each dataset that makes its documents' ids unique.

    It is empty for the first one, then the shortest end of the dataset's path that no earlier one has.
    """
    names: list[str] = []
    for given in paths:
        names.append(_unique_name("", given.rstrip("/"), given, set(names)))
    return names


def dataset_version(name: str) -> str:
    """Return a version of a Hugging Face dataset: its commit on the hub, or a hash of its local files.

    Returns an empty string if the version is unknown: without a connection, when the local cache is read, or if the
    dataset does not exist, which opening it reports. `${NAME}` is expanded. Data that the dataset's files only point to
    is not covered.
    """
    name = expand_variables(name)
    if Path(name).exists():
        fs = LocalFileSystem()
        try:
            found = walk(fs, str(Path(name).absolute()), ()) if Path(name).is_dir() else {name: fs.info(name)}
        except OSError as error:
            raise DataError(
                f"data.sources: cannot read {error.filename}: {error.strerror}; check who may read it"
            ) from error
        return xxhash.xxh3_64_hexdigest(
            repr([(path, info["size"], _version(info)) for path, info in sorted(found.items())]).encode()
        )
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(name, timeout=_HUB_SECONDS).sha or ""
    except Exception as error:  # its HTTP client raises kinds of its own
        if not (isinstance(error, OSError | ValueError) or is_library_error(error)):
            raise
        return ""


def is_library_error(error: Exception) -> bool:
    """Return whether an exception comes from a library and so is about its input, not a bug of ours.

    That is an exception of a library's own type, such as those of botocore, aiohttp and httpx that fsspec's drivers let
    through, or a builtin one raised inside a library that reads files, such as a KeyError in pyarrow. They have no
    common base class, so callers have to catch `Exception` and raise again if this is False.
    """
    if type(error).__module__.partition(".")[0] not in ("builtins", "data_pipeline"):
        return True
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    module = "" if innermost is None else str(innermost.tb_frame.f_globals.get("__name__"))
    return not isinstance(error, DataError) and module.partition(".")[0] in _FILE_LIBRARIES


def describe_files(files: Sequence[SourceFile]) -> str:
    """Describe a source's files for the manifest: count, bytes, and a hash of their names and sizes."""
    lines = "".join(f"{file.name}\t{file.size}\n" for file in files).encode("utf-8", "surrogatepass")
    return f"{len(files)} files, {sum(file.size for file in files)} bytes, {xxhash.xxh3_64_hexdigest(lines)}"


def file_patterns(source: SourceConfig) -> tuple[str, ...]:
    """Return globs of the files of a folder that are read."""
    return (source.pattern,) if source.pattern else DEFAULT_PATTERNS[source.kind]


def summarize_paths(paths: Sequence[str]) -> str:
    """Summarize files by count, extensions and a few names.

    For example: `6 files (4 .json, 1 .JSONL, 1 .ndjson), such as b.json, c.JSONL, d.ndjson, e.json and f.json`.
    """
    extensions = Counter(map(_extension, paths)).most_common()
    counts = [f"{count:,} {name}" for name, count in sorted(extensions[:5], key=lambda item: (-item[1], item[0]))]
    counts += [f"{sum(count for _, count in extensions[5:]):,} others"] if len(extensions) > 5 else []
    names = [escape_unprintable(file_name(redact(path))) for path in paths[:_MAX_NAMES]]
    listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    such_as = "such as " if len(paths) > _MAX_NAMES else ""
    return f"{len(paths):,} file{'s' * (len(paths) > 1)} ({', '.join(counts)}), {such_as}{listed}"


def file_name(path: str) -> str:
    """Return the last component of a path; of a URL without its query."""
    return (path.partition("?")[0] if "://" in path else path).rsplit("/", 1)[-1]


def _extension(path: str) -> str:
    """Return the extension with that of the compression: `.json.gz` of `x.json.gz`."""
    suffixes = PurePosixPath(file_name(redact(path))).suffixes[-2:]
    has_compression = len(suffixes) == 2 and suffixes[1].lower() in (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")
    return escape_unprintable("".join(suffixes if has_compression else suffixes[-1:])) or "without an ending"


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden or a marker file, by its path relative to the configured folder."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or parts[-1] in _BOOKKEEPING


def _list_entry(
    given: str, source: SourceConfig
) -> tuple[fsspec.AbstractFileSystem, dict[str, tuple[str, FileInfo]], list[str]]:
    """List one entry of `paths`.

    Returns:
        Its file system; its files as {name relative to the folder: (path, information on it)}; the paths of the skipped
        files.
    """
    wanted: tuple[str, ...] = ("*",)
    try:
        fs, path = fsspec.core.url_to_fs(expand_variables(given))
        if fs.isdir(path):
            root, found = path, walk(fs, path, source.exclude)
            wanted = file_patterns(source)
        elif any(sign in path for sign in "*?[") and not fs.exists(path):
            root, found = glob_root(path), find_glob(fs, path, source.exclude)
        else:
            root, found = str(PurePosixPath(path).parent), {path: fs.info(path)}
    except FileNotFoundError:
        raise DataError(f"data.sources: {given} does not exist; correct `paths`") from None
    except ImportError as error:
        raise DataError(f"data.sources: cannot read {given}: {error}{_install_hint(str(error))}") from error
    except Exception as error:  # a driver lets through what its HTTP client raises, see `is_library_error`
        if not (isinstance(error, OSError | ValueError) or is_library_error(error)):
            raise
        detail = one_line(error)
        raise DataError(
            f"data.sources: cannot read {given}: {detail}; check `paths`, the connection and who may read it"
        ) from error
    files: dict[str, tuple[str, FileInfo]] = {}
    others: list[str] = []
    for file, info in sorted(found.items()):
        name = relative_path(root, file)
        if (spelled := restore_spelling(file, given)) != file:
            name = "/".join(spelled.split("/")[-1 - name.count("/") :])
        if is_excluded(name, source.exclude):
            continue
        if info["type"] == BROKEN_LINK and _matches(name, wanted) and not is_hidden(name):
            raise DataError(
                f"data.sources: {file} is a broken link; restore its target, or leave it out with `exclude`"
            )
        if info["type"] == "file" and _matches(name, wanted):
            files[_numbered(name, files)] = (file, info)
        elif not is_hidden(name):
            others.append(file)
    if not files:
        what = f"no file below {given} matches {', '.join(wanted)}" if wanted != ("*",) else f"no file matches {given}"
        excluded = f" (exclude: {', '.join(source.exclude)})" if source.exclude else ""
        contents = f"; it holds {summarize_paths(sorted(others))}" if others else ""
        raise DataError(
            f"data.sources: {what}{excluded}{contents}; correct `paths`"
            + (", or set `pattern`" if wanted != ("*",) else "")
        )
    return fs, files, others


def _version(info: FileInfo) -> str:
    """Return something that changes with a file's contents, if the file system reports it; else an empty string."""
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")


def _unique_name(name: str, path: str, given: str, names: set[str]) -> str:
    """Return `name`, or the shortest longer end of its path that is not among `names`."""
    if name not in names:
        return name
    parts = path.split("/")
    tails = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
    unique_tail = next((tail for tail in tails if len(tail) > len(name) and tail not in names), f"{given}/{name}")
    return _numbered(unique_tail, names)


def _numbered(name: str, names: Container[str]) -> str:
    """Return `name`, with a number if it is among `names`: without their secrets, two addresses may be equal."""
    candidates = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if candidate not in names)


def _install_hint(message: str) -> str:
    """Return the pip command for the packages that fsspec's message on a missing driver names."""
    packages = re.findall(r'"([\w-]+)"', message) or re.findall(r"nstall ([\w-]+) (?:to|for)", message)
    return f"; pip install {' '.join(packages)}" if packages else ""


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], glob) for glob in globs)
