"""Settings of the data pipeline. Imports only pydantic, so that reading a config stays fast.

The docstring under a field is its `--help`, its description in the JSON schema, and its documentation.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from data_pipeline.errors import DataError, redact
from data_pipeline.settings_base import AUTO as AUTO
from data_pipeline.settings_base import Address
from data_pipeline.settings_base import OrAuto as OrAuto
from data_pipeline.settings_base import Settings as Settings
from data_pipeline.settings_filters import FilterConfig as FilterConfig
from data_pipeline.settings_filters import FilterName as FilterName
from data_pipeline.settings_mixture import MixtureConfig as MixtureConfig
from data_pipeline.settings_mixture import MixtureStage as MixtureStage

TextKind = Literal["text", "jsonl", "parquet", "arrow", "hf"]
TokenizedKind = Literal["prepared", "megatron", "datatrove", "olmo"]


class SourceConfig(Settings):
    """One source of data: raw text, or tokens made by another tool.

    Its documents are ordered by file, files by name.
    """

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """The source's name in the mixture, in shard names and in counts. `none` uses the last part of its first path,
    without extensions."""

    kind: TextKind | TokenizedKind
    """For text: `text` (each file is a document) and `jsonl` (each line is), both plain, .gz or .zst; `parquet` and
    `arrow` (each row is); `hf` (a Hugging Face dataset). For tokens, which are used in place: `prepared` (the data.path
    of another preparation), `megatron` (.bin and .idx), `datatrove` (.ds and .ds.index), `olmo` (raw arrays)."""

    paths: tuple[Address, ...] = ()
    """Files, folders or globs, local or any fsspec address. They are read in this order, the files of each sorted by
    name. A folder means all files of this kind below it. For `hf`: the dataset's name or folder. Tokens must be local
    files. Write passwords as `${NAME}`, an environment variable; a password in the address itself works, but is never
    written to any file."""

    pattern: str | None = None
    """Which files of a folder to read, as a glob such as `*.py`. `none` reads the usual extensions of the kind. Other
    files are reported."""

    exclude: tuple[str, ...] = ()
    """Files and folders to leave out, as globs of a name or of a path relative to the folder: `site-packages`,
    `test_*.py`, `docs/old/*`."""

    text_field: str = "text"
    """Column or JSON key that holds the text."""

    id_field: str | None = None
    """Column or JSON key that holds the document's id. `none`, or a null in the data, makes the id from file and
    position."""

    metadata_fields: tuple[str, ...] = ()
    """Columns or JSON keys to read along with the text, for filters (`url`) and for the rejected documents. Missing
    ones are null."""

    filters: tuple[FilterName, ...] | None = None
    """Filters for this source. `none` uses `data.filters.apply`; an empty list applies none."""

    split: str = "train"
    """`hf`: the split to read."""

    subset: str | None = None
    """`hf`: the configuration (subset) of the dataset."""

    streaming: bool = True
    """`hf`: stream the dataset instead of downloading it first."""

    dtype: Literal["uint16", "uint32"] = "uint32"
    """`olmo`: type of the raw tokens, which the files do not say."""

    @property
    def is_text(self) -> bool:
        """Whether it is text, which must be tokenized."""
        return self.kind in ("text", "jsonl", "parquet", "arrow", "hf")


def source_names(config: PrepareConfig) -> tuple[str, ...]:
    """Return the name of each of `all_sources`: as configured, or derived from its first path.

    Raises:
        DataError: two sources have the same name.
    """
    names: list[str] = []
    for i, source in enumerate(config.all_sources):
        name = source.name or _name_of(source.paths[0] if source.paths else source.kind)
        if name in names:
            raise DataError(
                f"{config.source_setting(i)} and {config.source_setting(names.index(name))} are both called {name}; "
                f"give each a `name`"
            )
        names.append(name)
    return tuple(names)


def _name_of(path: str) -> str:
    """Derive a source's name from a path: `s3://bucket/web/*.jsonl.zst` -> `web`; `corpus/code.jsonl` -> `code`."""
    path = redact(path)  # a redacted part has `*` and so is skipped like one with a wildcard
    parts = [part for part in PurePosixPath(path.partition("://")[2] or path).parts if not set(part) & set("*?[")]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", parts[-1].split(".")[0] if parts else "").strip("-_")
    return name or "source"


class DedupConfig(Settings):
    """Deduplication within and across sources.

    Of each group of duplicates the first document is kept, in the order of the sources.
    """

    exact: bool = False
    """Drop documents whose text equals an earlier one, ignoring case and white space."""

    minhash: bool = False
    """Drop near-duplicates: MinHash-LSH over word n-grams (A. Broder, 1997)."""

    ngram: int = Field(default=5, gt=0)
    """`minhash`: words in a shingle (n-gram)."""

    bands: int = Field(default=14, gt=0)
    """`minhash`: number of bands. Two documents with an equal band are duplicates."""

    rows: int = Field(default=8, gt=0)
    """`minhash`: hashes in a band. A pair of Jaccard similarity J is found with probability 1 - (1 - J^rows)^bands: by
    default 1% at 0.4, 50% at 0.69, 99% at 0.85."""

    memory_mb: float = Field(default=1024, gt=0, le=1e9)
    """Memory in MB for comparing signatures, plus one byte for each document. Less memory is slower: the signatures are
    read once for every memory_mb * 11,000 documents."""


class DecontaminateConfig(Settings):
    """Decontamination: find training documents that contain parts of evaluation sets."""

    paths: tuple[Address, ...] = ()
    """Evaluation texts: files, folders or globs of .txt and .jsonl (both also .gz or .zst) and .parquet. Every string
    in a jsonl line or parquet row is used. An empty list turns decontamination off."""

    ngram: int = Field(default=13, gt=0)
    """Length of a shared run of words that counts as contamination (arXiv:2005.14165, appendix C); characters instead
    of words in scripts without spaces between words. A shorter evaluation text is compared as a whole if it has at
    least 8 words."""

    action: Literal["drop", "mark"] = "drop"
    """`drop` drops contaminated documents, `mark` keeps and counts them."""


def _default_validation_fraction(settings: dict[str, object]) -> float:  # pydantic passes the fields defined before
    return 0.0 if settings.get("validation") else 0.005


class PrepareConfig(Settings):
    """Settings of `pretrain data prepare`: where the text is, which of it to keep, and how to tokenize it."""

    sources: tuple[SourceConfig, ...] = ()
    """What to prepare. Not used in training."""

    validation: tuple[SourceConfig, ...] = ()
    """Separate held-out sources, like those in data.sources, whose documents are all used for validation. They are
    filtered like other text. Documents of data.sources that are exact or near-duplicates of theirs (see data.dedup) are
    dropped and counted."""

    external: tuple[Path, ...] = ()
    """Files and folders outside the prepared data that its manifest may reference, besides those of `sources`.
    References to anything else are refused, because the manifest of data from someone else could name any file."""

    filters: FilterConfig = FilterConfig()

    dedup: DedupConfig = DedupConfig()

    decontaminate: DecontaminateConfig = DecontaminateConfig()

    tokenizer: OrAuto[Path] = AUTO
    """A `tokenizer.json`, a Hugging Face folder, a tiktoken or SentencePiece model. `auto` uses the one in `data.path`,
    or trains one on the sources if there is none yet."""

    allow_lossy_tokenizer: bool = False
    """Accept a `data.tokenizer` that has neither an unknown token nor all bytes. Characters that it does not know
    vanish, and are counted."""

    tokenizer_kind: Literal["bpe", "unigram"] = "bpe"
    """Kind of tokenizer to train if there is none yet: byte-level BPE, or Unigram (arXiv:1804.10959) over bytes."""

    vocab_size: int = Field(default=32_768, gt=256)
    """Vocabulary size of the tokenizer to train if there is none yet, special tokens included."""

    tokenizer_sample_mb: float = Field(default=200, gt=0, le=1e9)
    """Megabytes of text, sampled uniformly over the documents, to train a new tokenizer on."""

    validation_fraction: float = Field(default_factory=_default_validation_fraction, ge=0, lt=1)
    """Fraction of the documents of data.sources to hold out for validation, chosen by the hash of their id. Unless it
    is 0, at least one document of each source is held out, if the source has several. Of tokens made by other tools,
    the last documents are held out, up to this fraction of the tokens. The default is 0.005, or 0 if data.validation is
    set."""

    shard_tokens: int = Field(default=128_000_000, gt=0)
    """Maximum tokens in a shard (the default is 256 MB of 16-bit tokens). A longer document gets a shard of its own.
    Each worker holds one shard in memory."""

    workers: int | None = Field(default=None, gt=0)
    """Worker processes; `none` uses one for each CPU core. The result does not depend on it."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """`sources`, then `validation`."""
        return (*self.sources, *self.validation)

    def sources_setting(self, index: int) -> str:
        """Return the setting that contains one of `all_sources`: `data.sources` or `data.validation`."""
        return self.source_setting(index).rpartition(".")[0]

    def source_setting(self, index: int) -> str:
        """Return the setting of one of `all_sources`, such as `data.sources.1` or `data.validation.0`."""
        n_sources = len(self.sources)
        return f"data.sources.{index}" if index < n_sources else f"data.validation.{index - n_sources}"
