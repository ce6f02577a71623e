"""Import of tokenized sources: their tokens are read once and stay where they are. Only `.idx` files are written.

`token_files.py` finds the documents of a file. Files must be local, because training maps them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.addresses import redacting_errors
from data_pipeline.atomic import write_synced
from data_pipeline.errors import DataError
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import MANIFEST, SPLITS, Shard, SourceManifest, TokenDtype, load_manifest
from data_pipeline.storage.shard_writer import describe_shard
from data_pipeline.storage.shards import encode_index, open_split
from data_pipeline.storage.token_files import TokenFile, list_token_files, open_token_file, token_paths
from data_pipeline.storage.verify import count_missing_eot, largest_id
from data_pipeline.text.files import describe_files
from data_pipeline.text.walk import glob_root
from data_pipeline.tokenizing.coverage import UNKNOWN_TOKENS
from data_pipeline.tokenizing.tokenizer import Tokenizer
from data_pipeline.workers import Progress, ProgressCallback


def import_tokenized(
    source: SourceConfig,
    name: str,
    tokenizer: Tokenizer,
    work: Path,
    validation_fraction: float,
    progress: ProgressCallback = lambda _: None,
    *,
    is_held_out: bool = False,
    trusted_paths: Sequence[Path] | None = None,
) -> dict[str, SourceManifest]:
    """Import a tokenized source: write `.idx` files to `work/<split>/`, return its entry in the manifest of each split.

    Every token is read once: for the checksums, to check that it is in the vocabulary, and to see whether documents end
    with the end-of-text token. Empty documents are counted as dropped. The last whole documents of the last file or
    files are held out, up to `validation_fraction` of the tokens, but at least one document unless the fraction is 0 or
    there is only one document.

    A `prepared` source keeps its validation split and its counts, whatever `validation_fraction` is. Its tokens are not
    read; its checksums are taken over. Its sources become one source. If `paths` names the folder of one split, all its
    documents are for training.

    Args:
        source: of kind `prepared`, `megatron`, `datatrove` or `olmo`.
        name: name of the source. Its shards are called `<name>-<number>`.
        tokenizer: the tokenizer that the tokens must have been made with.
        work: the working folder, which becomes the prepared data.
        validation_fraction: fraction of the tokens to hold out.
        progress: called for every MiB that was read.
        is_held_out: hold out the whole source, including both splits of a `prepared` one. Overrides
            `validation_fraction`.
        trusted_paths: for a `prepared` source, as in `shards.open_split`.

    Raises:
        DataError: a file is missing, damaged or of another kind, or its tokens were made with another tokenizer.
    """
    parts = {split: _SplitPart(name, work / split) for split in SPLITS}
    if is_held_out:  # training documents go to the validation split too
        parts["train"], validation_fraction = parts["validation"], 0.0
    if source.kind == "prepared":
        for split, folder in _prepared_splits(source):
            _import_split(parts[split], folder, tokenizer, trusted_paths)
    else:
        files = [open_token_file(source, Path(file.path), tokenizer.eot_id) for file in list_token_files(source)]
        _import_files(parts, files, tokenizer, validation_fraction, progress)
    if not parts["train"].shards:
        raise DataError(
            f"data.{'validation' if is_held_out else 'sources'}: {name} ({', '.join(source.paths)}) holds no tokens; "
            "leave it out"
        )
    return {
        split: part.manifest()
        for split, part in parts.items()
        if part.shards and not (is_held_out and split == "train")
    }


def collect_trusted_paths(config: PrepareConfig) -> list[Path]:
    """Return the paths outside of a prepared data set that may hold its tokens: those that the user's settings name."""
    named: list[str] = []
    for i, source in enumerate(config.all_sources):
        with redacting_errors(source.paths, config.sources_setting(i)):
            named += () if source.is_text else token_paths(source)
    return [*config.external, *(Path(glob_root(name) if set(name) & set("*?[") else name) for name in named)]


def describe_tokenized_source(source: SourceConfig, trusted_paths: Sequence[Path] | None = None) -> str:
    """Describe the current files of a tokenized source, for the recipe.

    For a `prepared` source, these are the fingerprints of its manifests. For others, the number of files, their bytes,
    and a hash of their names and sizes.
    """
    if source.kind != "prepared":
        return describe_files(list_token_files(source))
    return "prepared data " + ", ".join(
        open_split(folder, trusted_paths).manifest.fingerprint() for _, folder in _prepared_splits(source)
    )


@dataclass
class _SplitPart:
    """What one split gets of the source, filled while the source is imported."""

    name: str
    folder: Path
    shards: list[Shard] = field(default_factory=list)
    dtypes: dict[TokenDtype, Path] = field(default_factory=dict)
    """The first file of each type."""
    ends_with_eot: bool = True
    text_bytes: list[int | None] = field(default_factory=list)
    """One entry for each prepared source."""
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    marked: Counter[str] = field(default_factory=Counter)
    unknown_tokens: int = 0
    lost_characters: int = 0

    def write_index(self, number: int, index: bytes) -> str:
        """Write the `.idx` of shard `number`; return the name of the shard."""
        name = f"{self.name}-{number:05d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_synced(self.folder / f"{name}.idx", index)
        return name

    def manifest(self) -> SourceManifest:
        """Build the manifest entry. Raises DataError if the files have different types."""
        if len(self.dtypes) > 1:
            files = " and ".join(f"{dtype} in {file}" for dtype, file in self.dtypes.items())
            raise DataError(f"data.sources: the tokens of {self.name} are {files}; give each type a source of its own")
        known = [size for size in self.text_bytes if size is not None]
        return SourceManifest(
            name=self.name,
            documents=sum(shard.documents for shard in self.shards),
            tokens=sum(shard.tokens for shard in self.shards),
            text_bytes=sum(known) if known and len(known) == len(self.text_bytes) else None,
            dtype=next(iter(self.dtypes)),
            ends_with_eot=self.ends_with_eot,
            dropped=dict(self.dropped),
            repaired=dict(self.repaired),
            marked=dict(self.marked),
            unknown_tokens=self.unknown_tokens,
            lost_characters=self.lost_characters,
            shards=tuple(self.shards),
        )


def _prepared_splits(source: SourceConfig) -> list[tuple[str, Path]]:
    """Return (split to import into, folder of the split to import) for each split that a `prepared` source names."""
    found: list[tuple[str, Path]] = []
    for given in token_paths(source):
        path = Path(given).expanduser().absolute()
        if (path / MANIFEST).is_file():
            found.append(("train", path))
        else:
            found += [(split, path / split) for split in load_manifest(path / "train").splits]
    return found


def _import_split(part: _SplitPart, folder: Path, tokenizer: Tokenizer, trusted_paths: Sequence[Path] | None) -> None:
    """Import all sources of a prepared split."""
    manifest = open_split(folder, trusted_paths).manifest
    if manifest.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{folder / MANIFEST}: a manifest of another tokenizer: {manifest.tokenizer}, where data.tokenizer is "
            f"{tokenizer.fingerprint}; set data.tokenizer to {folder.parent / 'tokenizer.json'}, or prepare that text "
            "again"
        )
    for source in manifest.sources:
        part.dtypes.setdefault(source.dtype, folder)
        part.ends_with_eot &= source.ends_with_eot
        part.text_bytes.append(source.text_bytes)
        part.dropped.update(source.dropped)
        part.repaired.update(source.repaired)
        part.marked.update(source.marked)
        part.unknown_tokens += source.unknown_tokens
        part.lost_characters += source.lost_characters
        for shard in source.shards:
            index = (folder / f"{shard.name}.idx").read_bytes()
            if xxhash.xxh3_128_hexdigest(index) != shard.idx_xxh3_128:
                raise DataError(
                    f"{folder / shard.name}.idx is damaged: it does not match its checksum; restore it, or prepare it "
                    "again"
                )
            name = part.write_index(len(part.shards), index)
            tokens = shard.external_bin or str(folder / f"{shard.name}.bin")
            part.shards.append(shard.model_copy(update={"name": name, "external_bin": tokens}))


def _import_files(
    parts: dict[str, _SplitPart],
    files: Sequence[TokenFile],
    tokenizer: Tokenizer,
    validation_fraction: float,
    progress: ProgressCallback,
) -> None:
    """Import the files of another tool. The last file comes first: documents are held out from the end, and so the
    document ends of only one file are in memory at a time."""
    held_out = parts["validation"].shards
    quota = int(validation_fraction * sum(file.n_tokens for file in files))
    for number, file in reversed(list(enumerate(files))):
        all_ends = file.read_ends()
        ends = all_ends[np.diff(all_ends, prepend=0) > 0]
        parts["train"].dropped += Counter(empty=len(all_ends) - len(ends))
        if not len(ends):
            continue
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        kept = int(np.searchsorted(starts, file.n_tokens - quota)) if quota else len(ends)
        is_only_document = len(ends) == 1 and all(other is file or not other.n_tokens for other in files)
        if kept == len(ends) and validation_fraction and not held_out and not is_only_document:
            kept -= 1
        quota = max(0, quota - file.n_tokens)
        for split, low, high in (("train", 0, kept), ("validation", kept, len(ends))):
            if low < high:
                _import_documents(parts[split], number, file, ends[low:high], int(starts[low]), tokenizer, progress)
    for part in {id(part): part for part in parts.values()}.values():  # both splits of held-out text are one part
        part.shards.reverse()


def _import_documents(
    part: _SplitPart,
    number: int,
    file: TokenFile,
    ends: NDArray[np.int64],
    start: int,
    tokenizer: Tokenizer,
    progress: ProgressCallback,
) -> None:
    """Add a shard with consecutive documents of a file: the tokens from `start` to the last of `ends`."""
    itemsize = file.dtype.itemsize
    lengths = np.diff(ends, prepend=start)
    if lengths.max() > np.iinfo(np.int32).max:
        raise DataError(
            f"{file.path}: a document of {lengths.max()} tokens is more than a .idx can hold; is it really one?"
        )
    bin_start = file.start + start * itemsize
    ids = np.memmap(file.path, file.dtype, "r", bin_start, (int(ends[-1]) - start,))
    position, n_missing_eot, with_unknown = 0, 0, set[int]()
    unknown_id = _unknown_id(tokenizer)

    def check_block(read: int) -> None:
        """Check the block that was just hashed and is still in the cache. `read` bytes are hashed so far."""
        nonlocal position, n_missing_eot
        block = ids[position : read // itemsize]
        if largest_id(block) >= tokenizer.vocab_size:
            wrong = block[(block < 0) | (block >= tokenizer.vocab_size)][0]
            raise DataError(
                f"{file.path}: token {wrong} is not in the vocabulary of {tokenizer.vocab_size} of data.tokenizer; "
                f"these tokens were made with another one, or are not {file.dtype.name}"
            )
        n_missing_eot += count_missing_eot(block, start + position, ends, tokenizer.eot_id)
        if unknown_id is not None:
            hits = np.flatnonzero(block == unknown_id)
            part.unknown_tokens += len(hits)
            with_unknown.update(np.unique(np.searchsorted(ends, hits + start + position, side="right")).tolist())
        progress(Progress(read=block.nbytes, tokens=len(block)))
        position += len(block)

    dtype: TokenDtype = "uint16" if itemsize == 2 else "int32"
    index = encode_index(lengths.astype(np.int32), dtype)
    name = part.write_index(number, index)
    raw = ids.view(np.uint8).data
    shard = describe_shard(
        name,
        raw,
        index,
        tokens=len(ids),
        documents=len(ends),
        external_bin=file.path,
        bin_start=bin_start,
        progress=check_block,
    )
    progress(Progress(documents=len(ends)))
    part.shards.append(shard)
    part.dtypes.setdefault(dtype, file.path)
    part.ends_with_eot &= n_missing_eot == 0
    part.marked += Counter({UNKNOWN_TOKENS: len(with_unknown)})


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that stands for text that the tokenizer cannot encode, or None if there is no such id or it is
    end-of-text."""
    coverage = tokenizer.coverage
    return None if coverage.is_complete or coverage.unknown_id == tokenizer.eot_id else coverage.unknown_id
