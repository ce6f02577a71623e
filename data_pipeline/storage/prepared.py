"""A prepared data set as a whole: `train/`, `validation/` and `tokenizer.json` appear together or not at all.

They are written to `<path>/.prepare.tmp` and renamed one after the other, `train/` last: where there is a `train/`, all of it
is there. The next preparation goes on from what a killed one left.
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
"""Folders of the working folder that hold a file for every chunk that was cleaned, and tokenized."""

_TEMPORARY = ".prepare.tmp"
_LOCK = ".prepare.lock"
_COMMIT = "commit"
"""A record in the working folder: what is being renamed out of it."""


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set."""

    path: Path
    tokenizer: Tokenizer
    splits: dict[str, SplitManifest]
    """`train`, and `validation` unless validation_fraction is 0."""
    notes: tuple[str, ...] = ()
    """What whoever prepared it should know, a line each."""


def open_prepared(path: Path, notes: tuple[str, ...] = (), trusted_paths: Sequence[Path] | None = None) -> PreparedData:
    """Open a prepared data set: manifests, file sizes and the tokenizer are checked, no token is read. `trusted_paths` as in `open_split`.

    Raises:
        DataError: part of it is missing, cut off, or does not belong to the rest.
    """
    train = open_split(path / "train", trusted_paths).manifest
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != train.tokenizer:
        raise DataError(
            f"{path / 'tokenizer.json'} is not the tokenizer that made {path / 'train'}; restore it from a copy, or prepare the data "
            f"again in another data.path"
        )
    splits = {"train": train}
    if "validation" in train.splits:
        splits["validation"] = open_split(path / "validation", trusted_paths).manifest
        if splits["validation"].recipe != train.recipe:
            raise DataError(
                f"{path}: train/ and validation/ were not made together; restore them from a copy, or prepare the data again in another "
                f"data.path"
            )
    return PreparedData(path, tokenizer, splits, notes)


def check_same_settings(path: Path, recipe: Recipe, tokenizer: Path | None) -> None:
    """Compare the settings of now with those that `path` was prepared with.

    Raises:
        DataError: they differ; it lists every difference.
    """
    manifest = load_manifest(path / "train")
    there, now = _settings(manifest.recipe), _settings(recipe)
    if tokenizer is not None:
        there["data.tokenizer"], now["data.tokenizer"] = manifest.tokenizer, load_tokenizer(tokenizer).fingerprint
    if tokenizer is not None or not manifest.recipe.trained_tokenizer:  # then these decide nothing
        for name in ("data.vocab_size", "data.tokenizer_sample_mb", "data.tokenizer_kind"):
            there.pop(name, None)
            now.pop(name, None)
    differences = [
        f"{name} was {there.get(name)} and is {now.get(name)}"
        for name in dict.fromkeys([*there, *now])
        if there.get(name) != now.get(name)
    ]
    if differences:
        raise DataError(
            f"data.path={path} was prepared with other settings: {'; '.join(differences)}. "
            f"Set another data.path, or delete {path} to prepare it again"
        )


def _settings(recipe: Recipe) -> dict[str, object]:
    """The settings in a recipe, by their dotted names, and what they pointed to."""
    named: dict[str, object] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}", inner)
        else:
            named[prefix] = value

    tree = recipe.settings.model_dump(mode="json")
    for i, source in enumerate((*tree.pop("sources"), *tree.pop("validation"))):
        walk(recipe.settings.source_setting(i), source)
    walk("data", tree)
    named |= {f"what {recipe.settings.source_setting(i)} holds": listing for i, listing in enumerate(recipe.listings)}
    named["what the files of data.filters and data.decontaminate hold"] = recipe.lists
    return named


@contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """The folder inside `path` to write to, with what earlier attempts left in it: whoever uses it checks each piece by its key.

    `commit` deletes it. Until then it stays if it holds finished pieces, for the next attempt to go on from; otherwise nothing is
    left, not even `path` if it was made for this.

    Raises:
        DataError: `path` cannot be written to, something else is in the way, or another process is preparing it.
    """
    work = path / _TEMPORARY
    try:
        with _locked(path):
            _take_back(path, work)
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
            f"data.path={path} cannot be prepared: {error}; mend it and run the command again, it goes on from what is finished"
        ) from error


def remove_leftovers(path: Path) -> None:
    """Delete what a preparation left behind that was killed after its last rename."""
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


def _take_back(path: Path, work: Path) -> None:
    """Undo what a commit did that was killed half way; refuse to touch anything else."""
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
    """Load the tokenizer at `given`, and write it to `work` as a `tokenizer.json` if `path` does not hold it yet.

    Raises:
        DataError: it cannot be used, or `path` holds another one; or it loses text, unless `allow_lossy`.
    """
    tokenizer = load_tokenizer(given)
    check_coverage(tokenizer.coverage, str(given), allow_lossy)
    own = path / "tokenizer.json"
    if not own.is_file():
        write_synced(work / "tokenizer.json", tokenizer.to_json().encode())
        return tokenizer
    if load_tokenizer(own).fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer={given} is not the tokenizer in data.path={path}; set another data.path, or data.tokenizer={own}"
        )
    (work / "tokenizer.json").unlink(missing_ok=True)  # an earlier attempt may have trained one
    return tokenizer


def commit(work: Path, path: Path, manifests: Sequence[SplitManifest], rejects: Collection[str]) -> None:
    """Write the manifests, delete what belongs to none of them, rename all into `path`, `train/` last, and delete the working folder.

    Args:
        work: the working folder.
        path: where the data goes.
        manifests: of the splits.
        rejects: names of the files of rejects.
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
    """Delete the files of earlier attempts. What is no file is not ours."""
    for file in folder.iterdir():
        if file.name not in names and not file.is_dir():
            file.unlink()
