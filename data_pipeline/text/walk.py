"""List the files below a folder or that match a glob, on any fsspec file system.

Links are followed, and a folder without read permission is an error.
"""

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

FileInfo = dict[str, Any]  # Any: every file system adds keys of its own to `name`, `type` and `size`

BROKEN_LINK = "nowhere"
"""The `type` of a link whose target does not exist."""


def walk(
    fs: fsspec.AbstractFileSystem,
    root: str,
    exclude: tuple[str, ...],
    should_enter: Callable[[str], bool] = lambda _: True,
) -> dict[str, FileInfo]:
    """Return everything below a folder that is not a folder, by path, with the file system's information on it.

    fsspec's own `walk` does not follow links and silently skips folders that it may not read.

    Args:
        fs: the file system.
        root: a folder.
        exclude: globs of files and folders to skip.
        should_enter: returns whether to look into a folder.
    """
    found: dict[str, FileInfo] = {}
    # Each folder with the real paths of itself and its parents.
    folders: list[tuple[str, tuple[str, ...]]] = [(root, (resolve_folder(fs, root),))]
    while folders:
        folder, ancestors = folders.pop()
        for listed in fs.ls(folder, detail=True):
            path = listed["name"].rstrip("/")
            if path == folder.rstrip("/") or is_excluded(relative_path(root, path), exclude):
                continue
            info = _follow_link(fs, path, listed)
            if info["type"] != "directory":
                found[path] = info
            # A link to a parent folder would never end.
            elif should_enter(path) and (real := resolve_folder(fs, path)) not in ancestors:
                folders.append((path, (*ancestors, real)))
    return found


def find_glob(fs: fsspec.AbstractFileSystem, glob: str, exclude: tuple[str, ...]) -> dict[str, FileInfo]:
    """Return everything that a glob matches, by path. On a local file system the wildcards also match links to folders.

    fsspec's own `glob` silently skips folders that it may not read. It is still used over HTTP, where paths are whole
    addresses, and for object stores, which list everything below a prefix in one answer and have no folder permissions.
    """
    if "http" in fs.protocol or _lists_flat(fs):
        return {path: _follow_link(fs, path, info) for path, info in fs.glob(glob, detail=True).items()}
    parts = glob.split("/")

    def may_contain_matches(folder: str) -> bool:
        depth = folder.count("/") + 1
        return "**" in parts[:depth] or (depth < len(parts) and _match("/".join(parts[:depth]), folder))

    found = walk(fs, glob_root(glob), exclude, may_contain_matches)
    return {path: info for path, info in found.items() if _match(glob, path)}


def _lists_flat(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether it lists everything below a prefix at once, as s3fs, gcsfs, adlfs and huggingface_hub do."""
    overrides_find = type(fs).find is not fsspec.AbstractFileSystem.find
    return overrides_find or (isinstance(fs, AsyncFileSystem) and type(fs)._find is not AsyncFileSystem._find)


def _match(glob: str, path: str) -> bool:
    return re.match(glob_translate(glob), path) is not None  # `re` caches compiled patterns


def _follow_link(fs: fsspec.AbstractFileSystem, path: str, listed: FileInfo) -> FileInfo:
    """Return the information on a listed path; for a link that on its target, which the listing does not have."""
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
    """Return a folder's path with links resolved, on a local file system; on others the path as it is."""
    return os.path.realpath(folder or "/") if isinstance(fs, LocalFileSystem) else folder


def relative_path(root: str, path: str) -> str:
    """Return a path relative to a folder above it."""
    return path.removeprefix(root.rstrip("/") + "/")


def glob_root(glob: str) -> str:
    """Return the folder before a glob's first wildcard."""
    parts = PurePosixPath(glob).parts
    first_wildcard = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return str(PurePosixPath(*parts[:first_wildcard])) if first_wildcard else ""


def is_excluded(name: str, globs: tuple[str, ...]) -> bool:
    """Return whether a glob matches the name or the path of a file or of a folder above it."""
    if not globs:
        return False
    parts = name.split("/")
    candidates = {*parts, *("/".join(parts[: i + 1]) for i in range(len(parts)))}
    return any(fnmatch.fnmatchcase(candidate, glob) for candidate in candidates for glob in globs)
