"""What there is to prepare: the sources' files, their chunks, and the keys that identify finished work."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash
from pydantic import BaseModel

from data_pipeline.addresses import redacting_errors
from data_pipeline.cleaning.decontaminate import evaluation_hash
from data_pipeline.cleaning.filters import check_filters, filter_versions, lists_hash
from data_pipeline.errors import DataError, redact
from data_pipeline.settings import AUTO, DedupConfig, PrepareConfig, SourceConfig, source_names
from data_pipeline.storage.manifest import Recipe
from data_pipeline.storage.tokenized import collect_trusted_paths, describe_tokenized_source
from data_pipeline.text.chunks import Chunk, split_into_chunks
from data_pipeline.text.files import (
    SourceFile,
    SourceListing,
    dataset_names,
    dataset_version,
    describe_files,
    list_source,
    summarize_paths,
)
from data_pipeline.tokenizing.tokenizer import document_hash

_CHUNK_BYTES_PER_TOKEN = 3
"""A chunk has this many bytes of text per token of a shard. Text has 3 to 5, so most chunks fill one shard."""

_READER_VERSION = 2
"""Version of the code of readers and filters, a part of every chunk's key. Increase it when that code gives another
result for the same file and settings: `prepare` then does the finished chunks of an interrupted preparation again."""

_SAMPLE_EXCESS = 8
"""The tokenizer's sample is drawn from chunks with this many times as much text as the sample needs."""


@dataclass(frozen=True)
class Corpus:
    """The sources and their files. The sources of `data.validation` come after those of `data.sources`.

    The files are listed once, because listing a folder of a million files takes time.
    """

    config: PrepareConfig
    names: tuple[str, ...]
    files: tuple[tuple[SourceFile, ...], ...]
    """The files of each source. Empty for `hf` and for tokenized sources."""
    listings: tuple[str | None, ...]
    """A description of each source's files; None for `hf`."""
    passed_over: tuple[str | None, ...]
    """For each source, a description of the files in its folders that no source reads; None if there are none."""
    lists: str
    """Hash of the files that filters and decontamination read."""
    made_with: dict[str, str]
    """Versions of Python and of the packages that influence the result."""

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All text, in the order of the sources. Reads the metadata of large parquet and Arrow files."""
        text_bytes = _CHUNK_BYTES_PER_TOKEN * self.config.shard_tokens
        sources = zip(self.names, self.config.all_sources, self.files, strict=True)
        return tuple(
            chunk
            for index, (name, source, files) in enumerate(sources)
            if source.is_text
            for chunk in split_into_chunks(index, name, source, files, text_bytes, self.config.sources_setting(index))
        )

    def source(self, chunk: Chunk) -> SourceConfig:
        """Return the settings of a chunk's source."""
        return self.config.all_sources[chunk.source_index]

    def is_held_out(self, index: int) -> bool:
        """Return whether a source is one of `data.validation`."""
        return index >= len(self.config.sources)

    def recipe(self, *, trained_tokenizer: bool) -> Recipe:
        """Return the recipe for the manifests. Settings that do not influence the result have their defaults."""
        config = self.config
        settings = {name: getattr(config, name) for name in PrepareConfig.model_fields}
        dedup = config.dedup.model_copy(update={"memory_mb": DedupConfig().memory_mb})
        return Recipe(
            settings=PrepareConfig(
                **(
                    settings
                    | {
                        "workers": None,
                        "tokenizer": AUTO,
                        "dedup": dedup,
                        "allow_lossy_tokenizer": False,
                        "external": (),
                    }
                )
            ),
            trained_tokenizer=trained_tokenizer,
            listings=self.listings,
            passed_over=self.passed_over if any(self.passed_over) else (),
            lists=self.lists,
            made_with=self.made_with,
        )

    def chunk_key(self, chunk: Chunk, settings_hash: str) -> str:
        """Hash everything that the documents of a chunk depend on, and `settings_hash`.

        Unlike the recipe, the key changes if a file is written again, as far as the file system shows it. The recipe
        stays the same, because equal files give equal bytes.
        """
        slices = [
            (redact(part.file.path), part.file.name, part.file.size, part.file.version, part.start, part.stop)
            for part in chunk.slices
        ]
        contents = slices or self._datasets[chunk.source_index][chunk.number]
        return hash_json(chunk.name, contents, self._settings_hashes[chunk.source_index], settings_hash)

    @cached_property
    def _datasets(self) -> list[list[tuple[str, str, str]]]:
        """(path, name, version) of each data set of each `hf` source. Sends requests to the hub, so only used when
        there is work to do."""
        of_sources = [source.paths if source.kind == "hf" else () for source in self.config.all_sources]
        found: list[list[tuple[str, str, str]]] = []
        for index, paths in enumerate(of_sources):
            with redacting_errors(paths, self.config.sources_setting(index)):
                found.append(
                    [
                        (path, name, dataset_version(path))
                        for path, name in zip(paths, dataset_names(paths), strict=True)
                    ]
                )
        return found

    @cached_property
    def _settings_hashes(self) -> list[str]:
        """For each source, the hash of its settings, without those that only determine which files it has."""
        shared = hash_json(_READER_VERSION, self.config.filters.model_dump(mode="json"), self.lists, self.made_with)
        return [
            hash_json(shared, source.model_dump(mode="json", exclude={"name", "paths", "pattern", "exclude"}))
            for source in self.config.all_sources
        ]

    def sample_chunks(self) -> list[Chunk]:
        """Return the chunks to draw the tokenizer's sample from: the same fraction of each source, selected by hash."""
        needed_bytes = _SAMPLE_EXCESS * self.config.tokenizer_sample_mb * 1e6
        chunks = [chunk for chunk in self.chunks if not self.is_held_out(chunk.source_index)]
        fraction = min(1.0, needed_bytes / max(1, sum(chunk.bytes or 0 for chunk in chunks)))
        by_source: dict[int, list[str]] = {}
        for chunk in chunks:
            by_source.setdefault(chunk.source_index, []).append(chunk.name)
        selected = {
            name
            for names in by_source.values()
            for name in sorted(names, key=lambda name: document_hash(name, salt=2))[: math.ceil(fraction * len(names))]
        }
        return [chunk for chunk in chunks if chunk.name in selected]

    def __str__(self) -> str:
        """Return the kinds and paths of the sources."""
        return "; ".join(f"{source.kind} {_shorten(source.paths)}" for source in self.config.sources)


def find_corpus(config: PrepareConfig) -> Corpus:
    """List the files of the sources, and check what can be checked before any text is read.

    Raises:
        DataError: there are no sources, a source has no paths or does not exist, or a filter cannot run.
    """
    if not config.sources:
        raise DataError(
            "data.sources is empty; name the text to prepare, e.g. `sources: [{kind: text, paths: [my/folder]}]`"
        )
    names = source_names(config)
    for i, (name, source) in enumerate(zip(names, config.all_sources, strict=True)):
        if not source.paths:
            raise DataError(
                f"{config.sources_setting(i)}: {name} of kind {source.kind} has no paths; name its files, folders or "
                "globs"
            )
    check_filters(config)
    listed = []
    for i, source in enumerate(config.all_sources):
        with redacting_errors(source.paths, config.sources_setting(i)):
            listed.append(list_source(source) if source.is_text else SourceListing([], []))
    files = tuple(tuple(found.files) for found in listed)
    trusted_paths = collect_trusted_paths(config)
    return Corpus(
        config=config,
        names=names,
        files=files,
        listings=tuple(_listing(config, i, found, trusted_paths) for i, found in enumerate(files)),
        passed_over=_passed_over(listed),
        lists=f"{lists_hash(config.filters)} {evaluation_hash(config.decontaminate)}",
        made_with=_made_with(config),
    )


def _passed_over(listed: Sequence[SourceListing]) -> tuple[str | None, ...]:
    """For each source, describe the files that it skips and that no other source reads; None if there are none."""
    read = {file.path for found in listed for file in found.files}
    left = [[path for path in found.skipped if path not in read] for found in listed]
    return tuple(summarize_paths(paths) if paths else None for paths in left)


def total_bytes(chunks: Iterable[Chunk]) -> int | None:
    """Return the bytes of the files to read; None if a source does not know its size."""
    sizes = [chunk.bytes for chunk in chunks]
    return None if None in sizes else sum(size or 0 for size in sizes)


def hash_json(*things: object) -> str:
    """Hash settings and other values that can be written as JSON."""
    plain = [thing.model_dump(mode="json") if isinstance(thing, BaseModel) else thing for thing in things]
    return xxhash.xxh3_128_hexdigest(json.dumps(plain).encode())


def _made_with(config: PrepareConfig) -> dict[str, str]:
    """Return the versions of Python (major.minor) and of the installed packages that influence the result."""
    kinds = {source.kind for source in config.all_sources}
    packages = ["tokenizers", "gigatoken"]
    packages += ["pyarrow"] if kinds & {"parquet", "arrow"} else []
    packages += ["datasets"] if "hf" in kinds else []
    made_with = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            made_with[package] = version(package)
    return made_with | filter_versions(config)


def _listing(
    config: PrepareConfig, index: int, files: tuple[SourceFile, ...], trusted_paths: Sequence[Path]
) -> str | None:
    source = config.all_sources[index]
    if not source.is_text:
        with redacting_errors(source.paths, config.sources_setting(index)):
            return describe_tokenized_source(source, trusted_paths)
    return None if source.kind == "hf" else describe_files(files)


def _shorten(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
