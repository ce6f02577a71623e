"""Tokens that are there already are adopted where they are: no token is copied, only read once, and a `.idx` of ours written.

Which documents a file holds is told by `token_files.py`. Knows local files only: training maps the tokens into memory.
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
    """The parts that a tokenized source has in each split; the `.idx` files are written to `work/<split>/`.

    Every token is read once, for the checksums, to see that the tokenizer has it, and to see whether documents end with the
    end-of-text token. Documents without a token are counted as dropped. Held out are the last whole documents of the source's last
    file or files, up to `validation_fraction` of its tokens: one at least, unless that is 0 or there is only one.

    A `prepared` source keeps its own validation split and its counts, whatever `validation_fraction` is, and its checksums are
    taken over unread; its several sources become one. Where one split's folder is named, its documents are all for training.

    Args:
        source: of kind `prepared`, `megatron`, `datatrove` or `olmo`.
        name: of the source; its shards are called `<name>-<number>`.
        tokenizer: what the tokens must have been made with.
        work: the folder that becomes the prepared data.
        validation_fraction: share of the tokens to hold out.
        progress: is told what was read, a MiB at a time.
        is_held_out: all of it is held-out text, both splits of a `prepared` source too; `validation_fraction` does not count then.
        trusted_paths: of a `prepared` source, as in `shards.open_split`.

    Raises:
        DataError: a file is missing, damaged or not of this kind, or its tokens were made with another tokenizer.
    """
    parts = {split: _Part(name, work / split) for split in SPLITS}
    if is_held_out:  # documents that would be for training go there too
        parts["train"], validation_fraction = parts["validation"], 0.0
    if source.kind == "prepared":
        for split, folder in _prepared_splits(source):
            _adopt_split(parts[split], folder, tokenizer, trusted_paths)
    else:
        files = [open_token_file(source, Path(file.path), tokenizer.eot_id) for file in list_token_files(source)]
        _adopt_files(parts, files, tokenizer, validation_fraction, progress)
    if not parts["train"].shards:
        raise DataError(
            f"data.{'validation' if is_held_out else 'sources'}: {name} ({', '.join(source.paths)}) holds no tokens; leave it out"
        )
    return {
        split: part.manifest()
        for split, part in parts.items()
        if part.shards and not (is_held_out and split == "train")
    }


def collect_trusted_paths(config: PrepareConfig) -> list[Path]:
    """Where prepared data may have tokens read that lie outside of it: what the user's own settings name."""
    named: list[str] = []
    for i, source in enumerate(config.all_sources):
        with redacting_errors(source.paths, config.sources_setting(i)):
            named += () if source.is_text else token_paths(source)
    return [*config.external, *(Path(glob_root(name) if set(name) & set("*?[") else name) for name in named)]


def describe_tokenized_source(source: SourceConfig, trusted_paths: Sequence[Path] | None = None) -> str:
    """What a tokenized source holds now, for the recipe: the manifests' fingerprints, or count, bytes and a hash of names and sizes."""
    if source.kind != "prepared":
        return describe_files(list_token_files(source))
    return "prepared data " + ", ".join(
        open_split(folder, trusted_paths).manifest.fingerprint() for _, folder in _prepared_splits(source)
    )


@dataclass
class _Part:
    """One split's part of the source, as it grows."""

    name: str
    folder: Path
    shards: list[Shard] = field(default_factory=list)
    dtypes: dict[TokenDtype, Path] = field(default_factory=dict)
    """The first file of each."""
    ends_with_eot: bool = True
    text_bytes: list[int | None] = field(default_factory=list)
    """Of each prepared source."""
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    marked: Counter[str] = field(default_factory=Counter)
    unknown_tokens: int = 0
    lost_characters: int = 0

    def write_index(self, number: int, index: bytes) -> str:
        """Name of the shard whose `.idx` this is."""
        name = f"{self.name}-{number:05d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_synced(self.folder / f"{name}.idx", index)
        return name

    def manifest(self) -> SourceManifest:
        """DataError if its files differ in dtype."""
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
    """(our split, folder of a split of theirs)."""
    found: list[tuple[str, Path]] = []
    for given in token_paths(source):
        path = Path(given).expanduser().absolute()
        if (path / MANIFEST).is_file():
            found.append(("train", path))
        else:
            found += [(split, path / split) for split in load_manifest(path / "train").splits]
    return found


def _adopt_split(part: _Part, folder: Path, tokenizer: Tokenizer, trusted_paths: Sequence[Path] | None) -> None:
    """Take over all sources of a prepared split."""
    manifest = open_split(folder, trusted_paths).manifest
    if manifest.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{folder / MANIFEST}: a manifest of another tokenizer: {manifest.tokenizer}, where data.tokenizer is "
            f"{tokenizer.fingerprint}; set data.tokenizer to {folder.parent / 'tokenizer.json'}, or prepare that text again"
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
                    f"{folder / shard.name}.idx is damaged: it does not match its checksum; restore it, or prepare it again"
                )
            name = part.write_index(len(part.shards), index)
            tokens = shard.external_bin or str(folder / f"{shard.name}.bin")
            part.shards.append(shard.model_copy(update={"name": name, "external_bin": tokens}))


def _adopt_files(
    parts: dict[str, _Part],
    files: Sequence[TokenFile],
    tokenizer: Tokenizer,
    validation_fraction: float,
    progress: ProgressCallback,
) -> None:
    """Adopt files of other tools, the last one first: it is the one to hold out from, so one file's documents are in memory at a time."""
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
                _adopt_documents(parts[split], number, file, ends[low:high], int(starts[low]), tokenizer, progress)
    for part in {id(part): part for part in parts.values()}.values():  # held-out text has one for both splits
        part.shards.reverse()


def _adopt_documents(
    part: _Part,
    number: int,
    file: TokenFile,
    ends: NDArray[np.int64],
    start: int,
    tokenizer: Tokenizer,
    progress: ProgressCallback,
) -> None:
    """Make consecutive documents of a file, the tokens from `start` to the last of `ends`, a shard."""
    itemsize = file.stored.itemsize
    lengths = np.diff(ends, prepend=start)
    if lengths.max() > np.iinfo(np.int32).max:
        raise DataError(
            f"{file.path}: a document of {lengths.max()} tokens is more than a .idx can hold; is it really one?"
        )
    bin_start = file.start + start * itemsize
    ids = np.memmap(file.path, file.stored, "r", bin_start, (int(ends[-1]) - start,))
    at, without_end, with_unknown = 0, 0, set[int]()
    unknown_id = _unknown_id(tokenizer)

    def look(read: int) -> None:
        """At the block that was hashed just now and is still in the cache; `read` bytes are hashed in all."""
        nonlocal at, without_end
        block = ids[at : read // itemsize]
        if largest_id(block) >= tokenizer.vocab_size:
            wrong = block[(block < 0) | (block >= tokenizer.vocab_size)][0]
            raise DataError(
                f"{file.path}: token {wrong} is not in the vocabulary of {tokenizer.vocab_size} of data.tokenizer; "
                f"these tokens were made with another one, or are not {file.stored.name}"
            )
        without_end += count_missing_eot(block, start + at, ends, tokenizer.eot_id)
        if unknown_id is not None:
            hits = np.flatnonzero(block == unknown_id)
            part.unknown_tokens += len(hits)
            with_unknown.update(np.unique(np.searchsorted(ends, hits + start + at, side="right")).tolist())
        progress(Progress(read=block.nbytes, tokens=len(block)))
        at += len(block)

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
        progress=look,
    )
    progress(Progress(documents=len(ends)))
    part.shards.append(shard)
    part.dtypes.setdefault(dtype, file.path)
    part.ends_with_eot &= without_end == 0
    part.marked += Counter({UNKNOWN_TOKENS: len(with_unknown)})


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id by which tokens that are there already tell of text that the tokenizer did not know, if they do."""
    coverage = tokenizer.coverage
    return None if coverage.is_complete or coverage.unknown_id == tokenizer.eot_id else coverage.unknown_id
