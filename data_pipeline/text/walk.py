"""Looking through the folders of any file system: links are followed, what may not be read is an error, and globs do as folders do."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

FileInfo = dict[str, Any]  # Any: every file system adds entries of its own; `name`, `type` and `size` are always there

BROKEN_LINK = "nowhere"
"""The `type` of a link that leads nowhere."""


def walk(
    fs: fsspec.AbstractFileSystem, root: str, exclude: tuple[str, ...], leads: Callable[[str], bool] = lambda _: True
) -> dict[str, FileInfo]:
    """{path: what the file system knows of it} of all below `root` that is no folder.

    fsspec's own walk neither follows links nor tells of a folder below that it may not read.

    Args:
        fs: where.
        root: a folder.
        exclude: files and folders to pass over.
        leads: whether to look into a folder.
    """
    found: dict[str, FileInfo] = {}
    folders: list[tuple[str, tuple[str, ...]]] = [(root, (resolve_folder(fs, root),))]
    while folders:
        folder, above = folders.pop()
        for listed in fs.ls(folder, detail=True):
            path = listed["name"].rstrip("/")
            if path == folder.rstrip("/") or is_excluded(relative_path(root, path), exclude):
                continue
            info = _followed(fs, path, listed)
            if info["type"] != "directory":
                found[path] = info
            elif (
                leads(path) and (real := resolve_folder(fs, path)) not in above
            ):  # a link to a folder above would lead round for ever
                folders.append((path, (*above, real)))
    return found


def find_glob(fs: fsspec.AbstractFileSystem, glob: str, exclude: tuple[str, ...]) -> dict[str, FileInfo]:
    """What a glob matches. Its wildcards match linked folders as well, where a file system is local.

    fsspec's own glob leaves out a folder that may not be read, without a word. It is used all the same where paths are whole addresses
    (HTTP), and for object stores: they list all that lies below a prefix in one answer, and have no folders that could be closed.
    """
    if "http" in fs.protocol or _lists_flat(fs):
        return {path: _followed(fs, path, info) for path, info in fs.glob(glob, detail=True).items()}
    parts = glob.split("/")

    def leads(folder: str) -> bool:
        depth = folder.count("/") + 1
        return "**" in parts[:depth] or (depth < len(parts) and _match("/".join(parts[:depth]), folder))

    return {path: info for path, info in walk(fs, glob_root(glob), exclude, leads).items() if _match(glob, path)}


def _lists_flat(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether it finds files in a way of its own, not folder by folder: s3fs, gcsfs, adlfs and the one of huggingface_hub."""
    own = type(fs).find is not fsspec.AbstractFileSystem.find
    return own or (isinstance(fs, AsyncFileSystem) and type(fs)._find is not AsyncFileSystem._find)


def _match(glob: str, path: str) -> bool:
    return re.match(glob_translate(glob), path) is not None  # re keeps what it compiled


def _followed(fs: fsspec.AbstractFileSystem, path: str, listed: FileInfo) -> FileInfo:
    """What is known of a listed path; of a link, what it leads to: listings tell only that it is neither file nor folder."""
    if listed["type"] in ("file", "directory"):
        return listed
    try:
        info: FileInfo = fs.info(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
            return {**listed, "type": BROKEN_LINK}
        raise
    return info


def resolve_folder(fs: fsspec.AbstractFileSystem, folder: str) -> str:
    """A folder's path without links; only a local file system tells."""
    return os.path.realpath(folder or "/") if isinstance(fs, LocalFileSystem) else folder


def relative_path(root: str, path: str) -> str:
    """A path without the folder it lies in."""
    return path.removeprefix(root.rstrip("/") + "/")


def glob_root(glob: str) -> str:
    """The folder in front of a glob's first wildcard."""
    parts = PurePosixPath(glob).parts
    wild = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return str(PurePosixPath(*parts[:wild])) if wild else ""


def is_excluded(name: str, globs: tuple[str, ...]) -> bool:
    """Whether a glob matches the name of the file or of a folder above it, or the path down to one of them."""
    if not globs:
        return False
    parts = name.split("/")
    candidates = {*parts, *("/".join(parts[: i + 1]) for i in range(len(parts)))}
    return any(fnmatch.fnmatchcase(candidate, glob) for candidate in candidates for glob in globs)
