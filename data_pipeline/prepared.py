"""A prepared data set as a whole: `train/`, `validation/` and `tokenizer.json` appear together or not at all.

They are written to `<path>/.prepare.tmp` and renamed one after the other, `train/` last: where there is a `train/`, all of it
is there. What a killed preparation left is deleted by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from data_pipeline.durable import sync_folder, write_synced
from data_pipeline.errors import DataError
from data_pipeline.manifest import MANIFEST, Manifest, Recipe, load_manifest
from data_pipeline.shards import ShardSet
from data_pipeline.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("validation", "train")
"""In the order in which they are committed."""

_TEMPORARY = ".prepare.tmp"
_LOCK = ".prepare.lock"


@dataclass(frozen=True)
class Prepared:
    """A prepared data set."""

    path: Path
    tokenizer: Tokenizer
    splits: dict[str, Manifest]
    """`train`, and `validation` unless validation_fraction is 0."""
    already: bool
    """It was there before, made with these very settings; nothing was done."""


def open_prepared(path: Path, already: bool = True) -> Prepared:
    """Open a prepared data set: manifests, file sizes and the tokenizer are checked, no token is read.

    Raises:
        DataError: part of it is missing, cut off, or does not belong to the rest.
    """
    train = ShardSet.open(path / "train").manifest
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != train.tokenizer:
        raise DataError(
            f"{path / 'tokenizer.json'} is not the tokenizer that made {path / 'train'}; restore it, or delete {path} and prepare again"
        )
    splits = {"train": train}
    if train.recipe.validation_fraction > 0:
        splits["validation"] = ShardSet.open(path / "validation").manifest
        if splits["validation"].recipe != train.recipe:
            raise DataError(f"{path}: train/ and validation/ were not made together; delete {path} and prepare again")
    return Prepared(path, tokenizer, splits, already)


def check_same_settings(path: Path, recipe: Recipe, tokenizer: Path | None) -> None:
    """Compare the settings of now with those that `path` was prepared with.

    Raises:
        DataError: they differ; it lists every difference.
    """
    manifest = load_manifest(path / "train")
    there, now = _settings(manifest.recipe), _settings(recipe)
    if tokenizer is not None:
        there["data.tokenizer"], now["data.tokenizer"] = manifest.tokenizer, load_tokenizer(tokenizer).fingerprint
    if tokenizer is not None or manifest.recipe.trained_tokenizer is None:  # then these two decide nothing
        for name in ("data.vocab_size", "data.tokenizer_sample_mb"):
            there.pop(name, None)
            now.pop(name, None)
    differences = [
        f"{name} was {there.get(name)} and is {now.get(name)}" for name in dict.fromkeys([*there, *now]) if there.get(name) != now.get(name)
    ]
    if differences:
        raise DataError(
            f"data.path={path} was prepared with other settings: {'; '.join(differences)}. "
            f"Set another data.path, or delete {path} to prepare it again"
        )


def _settings(recipe: Recipe) -> dict[str, object]:
    """The settings in a recipe, by their dotted names."""
    named: dict[str, object] = {"data.validation_fraction": recipe.validation_fraction, "data.shard_tokens": recipe.shard_tokens}
    if recipe.trained_tokenizer:
        named["data.vocab_size"] = recipe.trained_tokenizer.vocab_size
        named["data.tokenizer_sample_mb"] = recipe.trained_tokenizer.sample_mb
    for i, (source, listing) in enumerate(zip(recipe.sources, recipe.listings, strict=True)):
        named |= {f"data.sources.{i}.{name}": value for name, value in source.model_dump().items()}
        named[f"what data.sources.{i} holds"] = listing
    return named


@contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """An empty folder inside `path` to write to, which is gone at the end, with `path` itself if nothing was put there.

    Raises:
        DataError: `path` cannot be written to, something else is in the way, or another process is preparing it.
    """
    work = path / _TEMPORARY
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / _LOCK).open("w") as lock:
            if not _locked(lock, path / _LOCK):
                raise DataError(f"data.path={path} is being prepared by another process; wait for it, or set another data.path")
            try:
                _clear_leftovers(path, work)
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
                (path / _LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # not empty: the data is there
                    path.rmdir()
    except OSError as error:
        raise DataError(f"data.path={path} cannot be written to: {error}") from error


def _locked(lock: TextIO, file: Path) -> bool:
    """Take the lock. False if another process has it, or had it until now: the file it deleted then locks nobody else out."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _clear_leftovers(path: Path, work: Path) -> None:
    """Delete what a killed preparation left; refuse to touch anything else."""
    if (path / "train" / MANIFEST).is_file():  # it was not there before the lock was taken
        raise DataError(f"data.path={path} was prepared by another process meanwhile; run the command again")
    if work.exists():
        with suppress(DataError):  # killed earlier, before both manifests were there
            killed_in_commit = load_manifest(work / "train").recipe.trained_tokenizer and not (work / "tokenizer.json").exists()
            if killed_in_commit:  # its tokenizer is out already, and would pass for one that the user put there
                (path / "tokenizer.json").unlink(missing_ok=True)
        shutil.rmtree(work)
    for name in SPLITS:
        folder = path / name
        if (folder / MANIFEST).is_file():  # committed before its `train/` could be
            shutil.rmtree(folder)
        elif folder.exists():
            raise DataError(f"{folder} is in the way and was not made by `pretrain data prepare`; move it, or set another data.path")


def bring_tokenizer(path: Path, given: Path, work: Path) -> Tokenizer:
    """Load the tokenizer at `given`, and copy it to `work` if `path` does not hold it yet.

    Raises:
        DataError: it cannot be used, or `path` holds another one.
    """
    tokenizer = load_tokenizer(given)
    own = path / "tokenizer.json"
    if not own.is_file():
        write_synced(work / "tokenizer.json", (given / "tokenizer.json" if given.is_dir() else given).read_bytes())
    elif load_tokenizer(own).fingerprint != tokenizer.fingerprint:
        raise DataError(f"data.tokenizer={given} is not the tokenizer in data.path={path}; delete {own}, or set another data.path")
    return tokenizer


def commit(work: Path, path: Path) -> None:
    """Rename what is in `work` into `path`, `train/` last."""
    if (work / "tokenizer.json").exists():
        (work / "tokenizer.json").replace(path / "tokenizer.json")
    for name in SPLITS:
        if (work / name).exists():
            sync_folder(work / name)
            (work / name).rename(path / name)
            sync_folder(path)
