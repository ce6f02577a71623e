"""A prepared data set: `train/`, `validation/` and `tokenizer.json`, which appear together or not at all.

They are written to `<path>/.prepare.tmp` and renamed one after the other, `train/` last: if `train/` exists, the data
set is complete. A preparation continues from what a killed one left in `.prepare.tmp`.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.atomic import read_checksummed, sync_folder, write_checksummed, write_synced
from data_pipeline.cleaning.rejects import REJECTS
from data_pipeline.errors import DataError
from data_pipeline.locks import FileLock, LockHeldError
from data_pipeline.storage.manifest import MANIFEST, SPLITS, Recipe, SplitManifest, load_manifest
from data_pipeline.storage.shards import open_split
from data_pipeline.tokenizing.coverage import check_coverage
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer

VERDICTS_FOLDER, RESULTS_FOLDER = "judged", "done"
"""Folders of the working folder: a file for each chunk that was cleaned, and for each that was tokenized."""

_TEMPORARY = ".prepare.tmp"
_LOCK = ".prepare.lock"
_COMMIT = "commit"
"""File in the working folder with the names of what a commit renames out of it."""


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set."""

    path: Path
    tokenizer: Tokenizer
    splits: dict[str, SplitManifest]
    """`train`, and `validation` unless nothing is held out."""
    notes: tuple[str, ...] = ()
    """What the user who prepared it should know, one line each."""


def open_prepared(path: Path, notes: tuple[str, ...] = (), trusted_paths: Sequence[Path] | None = None) -> PreparedData:
    """Open a prepared data set. Checks the manifests, the file sizes and the tokenizer, but reads no tokens.

    Args:
        path: `data.path`.
        notes: passed on in the result.
        trusted_paths: as in `open_split`.

    Raises:
        DataError: a part is missing, truncated, or was not made together with the others.
    """
    train = open_split(path / "train", trusted_paths).manifest
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != train.tokenizer:
        raise DataError(
            f"{path / 'tokenizer.json'} is not the tokenizer that made {path / 'train'}; restore it from a copy, or "
            "prepare the data again in another data.path"
        )
    splits = {"train": train}
    if "validation" in train.splits:
        splits["validation"] = open_split(path / "validation", trusted_paths).manifest
        if splits["validation"].recipe != train.recipe:
            raise DataError(
                f"{path}: train/ and validation/ were not made together; restore them from a copy, or prepare the data "
                "again in another data.path"
            )
    return PreparedData(path, tokenizer, splits, notes)


def check_same_settings(path: Path, recipe: Recipe, tokenizer: Path | None) -> None:
    """Compare the current settings with those that `path` was prepared with.

    Args:
        path: `data.path`, which holds prepared data.
        recipe: the current settings and what they refer to.
        tokenizer: the given tokenizer; None if it is trained.

    Raises:
        DataError: they differ. The message lists every difference.
    """
    manifest = load_manifest(path / "train")
    before, now = _flatten_settings(manifest.recipe), _flatten_settings(recipe)
    if tokenizer is not None:
        before["data.tokenizer"], now["data.tokenizer"] = manifest.tokenizer, load_tokenizer(tokenizer).fingerprint
    if tokenizer is not None or not manifest.recipe.trained_tokenizer:
        # No tokenizer was trained, so the settings of the training do not matter.
        for name in ("data.vocab_size", "data.tokenizer_sample_mb", "data.tokenizer_kind"):
            before.pop(name, None)
            now.pop(name, None)
    differences = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise DataError(
            f"data.path={path} was prepared with other settings: {'; '.join(differences)}. "
            f"Set another data.path, or delete {path} to prepare it again"
        )


def _flatten_settings(recipe: Recipe) -> dict[str, object]:
    """Return the settings in a recipe by their dotted names, and descriptions of the files that they refer to."""
    flat: dict[str, object] = {}

    def flatten(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                flatten(f"{prefix}.{name}", inner)
        else:
            flat[prefix] = value

    tree = recipe.settings.model_dump(mode="json")
    for i, source in enumerate((*tree.pop("sources"), *tree.pop("validation"))):
        flatten(recipe.settings.source_setting(i), source)
    flatten("data", tree)
    flat |= {f"what {recipe.settings.source_setting(i)} holds": listing for i, listing in enumerate(recipe.listings)}
    flat["what the files of data.filters and data.decontaminate hold"] = recipe.lists
    return flat


@contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """Lock `path`, and yield the folder inside of it to write to.

    The folder holds what earlier attempts finished; the caller checks each piece by its key. `commit` deletes the
    folder. If the block ends without a commit, the folder stays if it holds finished pieces. Otherwise it is deleted,
    and `path` too if it is empty.

    Raises:
        DataError: `path` cannot be written, it holds something else, or another process is preparing it.
    """
    work = path / _TEMPORARY
    try:
        with _locked(path):
            _undo_partial_commit(path, work)
            try:
                for folder in (VERDICTS_FOLDER, RESULTS_FOLDER, *SPLITS):
                    (work / folder).mkdir(parents=True, exist_ok=True)
                yield work
            finally:
                if not any(file for folder in (VERDICTS_FOLDER, *SPLITS) for file in (work / folder).glob("*")):
                    shutil.rmtree(work, ignore_errors=True)
    except LockHeldError:
        raise DataError(
            f"data.path={path} is being prepared by another process; wait for it, or set another data.path"
        ) from None
    except OSError as error:
        raise DataError(
            f"data.path={path} cannot be prepared: {error}; fix it and run the command again, it continues from what "
            "is finished"
        ) from error


def remove_leftovers(path: Path) -> None:
    """Delete the working folder of a preparation that was killed after its last rename."""
    if (path / _TEMPORARY).exists():
        with suppress(OSError, LockHeldError), _locked(path):
            shutil.rmtree(path / _TEMPORARY)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock `path` for this process. The folder is made if it is missing, and deleted if it is empty in the end.

    Raises:
        DataError: `path` is a file.
        LockHeldError: another process holds the lock.
    """
    if path.exists() and not path.is_dir():
        raise DataError(f"data.path={path} is a file; set data.path to a folder, which is made if it is not there")
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock.acquire(path / _LOCK, blocking=False)
    try:
        yield
    finally:
        lock.release(delete=True)
        with suppress(OSError):  # not empty: the data is there
            path.rmdir()


def _undo_partial_commit(path: Path, work: Path) -> None:
    """Undo the renames of a commit that was killed half way. Raises DataError if anything else is in the way."""
    if (path / "train" / MANIFEST).is_file():  # it was not there before the lock was taken
        raise DataError(f"data.path={path} was prepared by another process meanwhile; run the command again")
    for name in (read_checksummed(work / _COMMIT) or b"").decode().split():
        if (path / name).exists() and not (work / name).exists():
            (path / name).rename(work / name)
    (work / _COMMIT).unlink(missing_ok=True)
    for folder in (path / name for name in (*SPLITS, REJECTS)):
        if folder.exists():
            raise DataError(f"{folder} is in the way; move it, or set another data.path")


def install_tokenizer(path: Path, given: Path, work: Path, allow_lossy: bool) -> Tokenizer:
    """Load the tokenizer at `given`, and write it to `work/tokenizer.json` if `path` does not hold a tokenizer yet.

    Raises:
        DataError: the tokenizer cannot be used, `path` holds a different one, or it cannot encode all text and
            `allow_lossy` is false.
    """
    tokenizer = load_tokenizer(given)
    check_coverage(tokenizer.coverage, str(given), allow_lossy)
    own = path / "tokenizer.json"
    if not own.is_file():
        write_synced(work / "tokenizer.json", tokenizer.to_json().encode())
        return tokenizer
    if load_tokenizer(own).fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer={given} is not the tokenizer in data.path={path}; set another data.path, or "
            f"data.tokenizer={own}"
        )
    (work / "tokenizer.json").unlink(missing_ok=True)  # of an earlier attempt that trained one
    return tokenizer


def commit(work: Path, path: Path, manifests: Sequence[SplitManifest], rejects: Collection[str]) -> None:
    """Write the manifests, delete files that they do not list, and rename the rest from the working folder into `path`.

    Args:
        work: the working folder.
        path: `data.path`.
        manifests: one for each split.
        rejects: names of the files with dropped documents.
    """
    for manifest in manifests:
        folder = work / manifest.split
        shards = (shard.name for source in manifest.sources for shard in source.shards)
        _keep_only(folder, {f"{name}{ending}" for name in shards for ending in (".bin", ".idx")})
        write_synced(folder / MANIFEST, manifest.to_bytes())
        sync_folder(folder)
    if rejects:
        _keep_only(work / REJECTS, rejects)
        sync_folder(work / REJECTS)
    splits = [split for split in SPLITS if split in {manifest.split for manifest in manifests}]
    names = [name for name in ("tokenizer.json", *((REJECTS,) if rejects else ()), *splits) if (work / name).exists()]
    write_checksummed(work / _COMMIT, " ".join(names).encode())
    sync_folder(work)
    for name in names:
        (work / name).replace(path / name)
        sync_folder(path)
    shutil.rmtree(work)


def _keep_only(folder: Path, names: Collection[str]) -> None:
    """Delete all files but these. Folders are kept, because the preparation did not make them."""
    for file in folder.iterdir():
        if file.name not in names and not file.is_dir():
            file.unlink()
