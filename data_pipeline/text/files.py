"""Which files a source means, in an order that is the same on every machine. Local paths and any fsspec address."""

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
"""Which files of a folder are read where `pattern` is not set."""

_BOOKKEEPING = ("_SUCCESS",)
"""Names of files that other tools leave beside their data, like hidden ones (`.DS_Store`): nobody expects them to be read."""

_FEW = 5
"""Names of files that a note spells out."""

_VERSION_KEYS = (
    *("ETag", "etag", "blob_id", "generation", "md5Hash", "md5", "Content-MD5", "CRC"),
    *("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created"),
)
"""What file systems call what tells a file's contents, the surest first. Every one has a name of its own for it."""

_HUB_SECONDS = 10.0

_READERS = ("pyarrow", "datasets", "fsspec")
"""Packages whose exceptions of builtin kinds are about the files or addresses that they are given."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    fs: fsspec.AbstractFileSystem
    path: str
    name: str
    """Path below the folder given; the file's own name where a file was given. Unique in its source."""
    size: int
    """Bytes, compressed if the file is; 0 where the file system does not know."""
    version: str
    """What changes when the file is written anew at the same size: time, ETag or checksum, as the file system has it; else empty."""

    @property
    def file_name(self) -> str:
        """Its own name, whose ending tells how it is packed."""
        return file_name(self.path)


@dataclass(frozen=True, slots=True)
class FileSlice:
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


@dataclass(frozen=True)
class SourceListing:
    """What lies where a source points."""

    files: list[SourceFile]
    """Its files in reading order."""
    skipped: list[str]
    """Paths of the files in its folders that match no pattern of its kind and no `exclude`, but for hidden ones."""


def list_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source, see `list_source`."""
    return list_source(source).files


def list_source(source: SourceConfig) -> SourceListing:
    """The files of a source in reading order: as `paths` gives them, those of one folder or glob sorted by name. Empty for `hf`.

    Links are followed, to files and to folders, but not back to a folder that they lie in. Where a name below a later entry of `paths`
    is that of an earlier file, it gets as much of the path in front as makes it another: `x.txt`, then `b/x.txt`. So an entry that is
    appended to `paths` changes no name of those before it.

    Raises:
        DataError: an entry of `paths` does not exist or matches no file, two of them mean one file, or a link points nowhere.
    """
    files: list[SourceFile] = []
    if source.kind == "hf":
        twice = next((given for i, given in enumerate(source.paths) if given in source.paths[:i]), None)
        if twice is not None:
            raise DataError(
                f"data.sources: the data set {twice} is given twice by `paths`; every one is read once, so name it once"
            )
        return SourceListing(files, [])
    passed_over: list[str] = []
    entries: dict[tuple[fsspec.AbstractFileSystem, str, str], int] = {}
    names: set[str] = set()
    real = cache(resolve_folder)
    for number, given in enumerate(source.paths):
        with redacting_errors([given]):
            fs, found, others = _find(given, source)
        passed_over += others
        for short, (path, info) in sorted(found.items()):
            folder, _, last = path.rpartition("/")
            first = entries.setdefault((fs, real(fs, folder), last), number)
            if first != number:
                raise DataError(
                    f"data.sources: {path} is given twice, by {source.paths[first]} and by {given} of `paths`; "
                    f"every file is read once, so let them not overlap"
                )
            name = _unused(short, restore_spelling(path, given), redact(given), names)
            names.add(name)
            files.append(SourceFile(fs, path, name, int(info["size"] or 0), _version(info)))
    return SourceListing(files, sorted(set(passed_over) - {file.path for file in files}))


def dataset_names(paths: Sequence[str]) -> list[str]:
    """What tells the documents of several data sets apart: nothing for the first, then the shortest end of a name that is no other's."""
    names: list[str] = []
    for given in paths:
        names.append(_unused("", given.rstrip("/"), given, set(names)))
    return names


def dataset_version(name: str) -> str:
    """What tells whether a Hugging Face data set is still the same: the commit on the hub, or for files a hash of what lies there.

    Empty where nobody can tell: without a connection (what is read then is the copy on this machine), or where there is no such data
    set, which whoever opens it says. `${NAME}` is filled in. Data that a data set's own files only point to is not looked at.
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
    except Exception as error:  # whatever its HTTP client raises
        if not (isinstance(error, OSError | ValueError) or is_library_error(error)):
            raise
        return ""


def is_library_error(error: Exception) -> bool:
    """Whether an exception is a library's: of a kind of its own, as those of botocore, aiohttp and httpx that fsspec's drivers let
    through, or raised inside one that reads files, as a KeyError of pyarrow.

    They have nothing in common, so who calls a driver has to catch `Exception`; another KeyError or TypeError would be a mistake of ours.
    """
    if type(error).__module__.partition(".")[0] not in ("builtins", "data_pipeline"):
        return True
    raised = error.__traceback__
    while raised is not None and raised.tb_next is not None:
        raised = raised.tb_next
    where = "" if raised is None else str(raised.tb_frame.f_globals.get("__name__"))
    return not isinstance(error, DataError) and where.partition(".")[0] in _READERS


def describe_files(files: Sequence[SourceFile]) -> str:
    """What a source's files were when they were read: count, bytes, and a hash of their names and sizes."""
    lines = "".join(f"{file.name}\t{file.size}\n" for file in files).encode("utf-8", "surrogatepass")
    return f"{len(files)} files, {sum(file.size for file in files)} bytes, {xxhash.xxh3_64_hexdigest(lines)}"


def file_patterns(source: SourceConfig) -> tuple[str, ...]:
    """Globs of the names of the files of a folder that are read."""
    return (source.pattern,) if source.pattern else DEFAULT_PATTERNS[source.kind]


def summarize_paths(paths: Sequence[str]) -> str:
    """Count, endings and the names of a few files: `4 files (2 .json, 1 .JSONL, 1 .ndjson), such as b.json, c.JSONL and d.ndjson`."""
    endings = Counter(map(_ending, paths)).most_common()
    kinds = [f"{count:,} {ending}" for ending, count in sorted(endings[:5], key=lambda item: (-item[1], item[0]))]
    kinds += [f"{sum(count for _, count in endings[5:]):,} others"] if len(endings) > 5 else []
    names = [escape_unprintable(file_name(redact(path))) for path in paths[:_FEW]]
    few = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return f"{len(paths):,} file{'s' * (len(paths) > 1)} ({', '.join(kinds)}), {'such as ' * (len(paths) > _FEW)}{few}"


def file_name(path: str) -> str:
    """The name behind the last `/`; of an address, as HTTP has for a path, without what stands behind `?`."""
    return (path.partition("?")[0] if "://" in path else path).rsplit("/", 1)[-1]


def _ending(path: str) -> str:
    """`.json.gz` of `x.json.gz`."""
    suffixes = PurePosixPath(file_name(redact(path))).suffixes[-2:]
    packed = len(suffixes) == 2 and suffixes[1].lower() in (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")
    return escape_unprintable("".join(suffixes if packed else suffixes[-1:])) or "without an ending"


def is_hidden(name: str) -> bool:
    """Whether nobody expects a file to be read, by its path below the folder given."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or parts[-1] in _BOOKKEEPING


def _find(
    given: str, source: SourceConfig
) -> tuple[fsspec.AbstractFileSystem, dict[str, tuple[str, FileInfo]], list[str]]:
    """What one entry of `paths` stands for: its file system, {name below the folder: (path, what is known of it)}, and the paths of the
    files that are passed over.
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
        raise DataError(f"data.sources: cannot read {given}: {error}{_installing(str(error))}") from error
    except Exception as error:  # a driver raises what its HTTP client does, see is_library_error
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
        if (told := restore_spelling(file, given)) != file:
            name = "/".join(told.split("/")[-1 - name.count("/") :])
        if is_excluded(name, source.exclude):
            continue
        if info["type"] == BROKEN_LINK and _matches(name, wanted) and not is_hidden(name):
            raise DataError(
                f"data.sources: {file} is a link that leads nowhere; restore what it points to, or leave it out with `exclude`"
            )
        if info["type"] == "file" and _matches(name, wanted):
            files[_another(name, files)] = (file, info)
        elif not is_hidden(name):
            others.append(file)
    if not files:
        what = f"no file below {given} matches {', '.join(wanted)}" if wanted != ("*",) else f"no file matches {given}"
        excluded = f" (exclude: {', '.join(source.exclude)})" if source.exclude else ""
        there = f"; it holds {summarize_paths(sorted(others))}" if others else ""
        raise DataError(
            f"data.sources: {what}{excluded}{there}; correct `paths`"
            + (", or set `pattern`" if wanted != ("*",) else "")
        )
    return fs, files, others


def _version(info: FileInfo) -> str:
    """What changes with a file's contents, as far as the file system tells; empty where it does not."""
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")


def _unused(name: str, path: str, given: str, names: set[str]) -> str:
    """`name`, or the shortest longer end of its path that is not among `names`."""
    if name not in names:
        return name
    parts = path.split("/")
    tails = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return _another(
        next((tail for tail in tails if len(tail) > len(name) and tail not in names), f"{given}/{name}"), names
    )


def _another(name: str, names: Container[str]) -> str:
    """`name`, with a number behind it where it is among `names`: without their secrets, two addresses may be one."""
    numbered = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
    return next(each for each in numbered if each not in names)


def _installing(message: str) -> str:
    """The way out of fsspec's message on a driver that is not installed."""
    packages = re.findall(r'"([\w-]+)"', message) or re.findall(r"nstall ([\w-]+) (?:to|for)", message)
    return f"; pip install {' '.join(packages)}" if packages else ""


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], glob) for glob in globs)
