"""The rules of Gopher, C4 and FineWeb as datatrove implements them, made safe for any text.

Three safeguards are added. A text without words is dropped before datatrove divides by their number. A text of more
than MAX_CHARACTERS is dropped, because splitting it into words takes about 60 bytes a character. Long runs without
white space are broken up before the text is split, because spaCy's time is quadratic in the length of a run of
punctuation (80 s for 30,000 brackets).
"""

from __future__ import annotations

import functools
import re

from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.utils.text import PUNCTUATION_SET, split_into_parts
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer
from loguru import logger

from data_pipeline.cleaning.filters.result import DocumentFilter, FilterResult
from data_pipeline.errors import DataError
from data_pipeline.settings import FilterConfig, FilterName
from data_pipeline.text.sources import Document

MAX_CHARACTERS = 10_000_000
"""Longer texts are dropped: this many take 600 MB of memory. A long novel has 3 million."""

_MAX_PUNCTUATION_RUN = 200
_LONG_RUN = re.compile(rf"((?:[^\w\s]|_){{{_MAX_PUNCTUATION_RUN}}})(?:[^\w\s]|_)|(\S{{1000}})\S")
"""Where runs are broken up: after 200 characters of punctuation, or 1,000 of any kind. Ruler lines and addresses are
shorter."""

logger.disable("datatrove")  # we count and report the reasons ourselves


class _SafeWordTokenizer(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
    """datatrove's splitter of words and sentences, in linear time and with one text's words in memory at a time."""

    def __init__(self, language: str) -> None:
        super().__init__(language)
        self._splitter = load_word_tokenizer(language)
        self._splitter.word_tokenize("a")  # loads it now, so that a missing package is noticed here

    def word_tokenize(self, text: str) -> list[str]:
        split_into_parts.cache_clear()  # the cache keeps five texts; the rules need only the current one
        words: list[str] = self._splitter.word_tokenize(_break_long_runs(text))
        return words

    def sent_tokenize(self, text: str) -> list[str]:
        sentences: list[str] = self._splitter.sent_tokenize(_break_long_runs(text))
        return sentences

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = self._splitter.span_tokenize(_break_long_runs(text))
        return spans


def datatrove_filter(name: FilterName, config: FilterConfig) -> DocumentFilter:
    """Build `gopher_quality`, `gopher_repetition`, `c4` or `fineweb`.

    Reasons: datatrove's, `no words`, `too long`, `nothing left`.

    `c4` edits: the result's text lacks the lines that it removes, and the lines that it keeps are trimmed and without
    `[1]`.

    Raises:
        DataError: there are no rules for the language, or a package that they need is missing.
    """
    language = config.language_of_rules
    if (
        name == "gopher_quality"
        and language != "en"
        and config.gopher_quality.stop_words is None
        and config.gopher_quality.min_stop_words
    ):
        raise DataError(
            f"data.filters.gopher_quality.stop_words are English, but language_of_rules={language}; set stop_words, or "
            f"min_stop_words=0"
        )
    word_tokenizer = _word_tokenizer(language)
    rules: BaseFilter
    match name:
        case "gopher_quality":
            rules = GopherQualityFilter(**config.gopher_quality.model_dump(), language=word_tokenizer)
        case "gopher_repetition":
            rules = GopherRepetitionFilter(**config.gopher_repetition.model_dump(), language=word_tokenizer)
        case "c4":
            rules = C4QualityFilter(**config.c4.model_dump(), language=word_tokenizer)
        case "fineweb":
            rules = FineWebQualityFilter(**config.fineweb.model_dump(), language=word_tokenizer)
        case _:
            raise ValueError(f"{name} is not a filter of datatrove")

    def apply(document: Document) -> FilterResult:
        text = document.text
        if len(text) > MAX_CHARACTERS:
            return FilterResult(text, "too long")
        if all(character in PUNCTUATION_SET or character.isspace() for character in text):
            return FilterResult(text, "no words")
        datatrove_document = DatatroveDocument(text=text, id=document.id)
        keeps, reason = get_filter_result(rules.filter(datatrove_document))
        if not keeps:
            return FilterResult(text, reason)
        if not datatrove_document.text.strip():
            return FilterResult(text, "nothing left")
        return FilterResult(
            datatrove_document.text, repairs=() if datatrove_document.text == text else ("lines removed or trimmed",)
        )

    return apply


@functools.lru_cache(maxsize=1)
def _word_tokenizer(language: str) -> _SafeWordTokenizer:
    """Load the splitter once for all filters, which share the words of a text."""
    try:
        return _SafeWordTokenizer(language)
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # a language may need a package of its own, which the message names
        raise DataError(f"data.filters.language_of_rules={language}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise DataError(
            f"data.filters.language_of_rules={language} is not a language that datatrove can split; set a code "
            f"such as en"
        ) from error


def _break_long_runs(text: str) -> str:
    """Put white space into long runs without any, and replace the one word on which spaCy fails. The length stays."""
    text = text.replace("IS_ALPHA", "is_alpha")  # spaCy 3.8.18 raises at the second text with it
    if max(map(len, text.split()), default=0) <= _MAX_PUNCTUATION_RUN:
        return text
    return _LONG_RUN.sub(r"\1\2 ", text)
