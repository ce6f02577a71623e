"""Gopher's, C4's and FineWeb's rules as datatrove implements them, made safe for any text.

Three things are added. A text without words is dropped before datatrove divides by their number. A text of more than
MAX_CHARACTERS is dropped, because splitting it into words takes about 60 bytes a character. And what has no white space for long is
broken up before it is split, because spaCy's time is quadratic in the length of a run of punctuation (80 s for 30,000 brackets).
"""

from __future__ import annotations

import functools
import re

from datatrove.data import Document as TheirDocument
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
"""Longer texts are dropped: 600 MB of memory. A long novel has 3 million."""

_UNBROKEN = 200
_BREAKS = re.compile(rf"((?:[^\w\s]|_){{{_UNBROKEN}}})(?:[^\w\s]|_)|(\S{{1000}})\S")
"""Where runs are broken up: 200 characters of punctuation, 1,000 of any kind. Rulers and addresses are shorter."""

logger.disable("datatrove")  # its own log only: the reasons are our counts


class _Words(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
    """The words and sentences of datatrove's splitter for a language, in time linear in the text and memory for one text."""

    def __init__(self, language: str) -> None:
        super().__init__(language)
        self._splitter = load_word_tokenizer(language)
        self._splitter.word_tokenize("a")  # loads it: what it needs may be missing

    def word_tokenize(self, text: str) -> list[str]:
        split_into_parts.cache_clear()  # it keeps the words of five texts; the rules ask for those of one, again and again
        words: list[str] = self._splitter.word_tokenize(_tame(text))
        return words

    def sent_tokenize(self, text: str) -> list[str]:
        sentences: list[str] = self._splitter.sent_tokenize(_tame(text))
        return sentences

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = self._splitter.span_tokenize(_tame(text))
        return spans


def datatrove_filter(name: FilterName, config: FilterConfig) -> DocumentFilter:
    """The judge of `gopher_quality`, `gopher_repetition`, `c4` or `fineweb`. Reasons: datatrove's, `no words`, `too long`, `nothing left`.

    `c4` edits: lines that it removes are gone from the verdict's text, and those that it keeps are trimmed and without `[1]`.

    Raises:
        DataError: there are no rules for the language, or what they need is missing.
    """
    language = config.language_of_rules
    if (
        name == "gopher_quality"
        and language != "en"
        and config.gopher_quality.stop_words is None
        and config.gopher_quality.min_stop_words
    ):
        raise DataError(
            f"data.filters.gopher_quality.stop_words are English and language_of_rules={language}; set stop_words, or min_stop_words=0"
        )
    words = _words(language)
    rules: BaseFilter
    match name:
        case "gopher_quality":
            rules = GopherQualityFilter(**config.gopher_quality.model_dump(), language=words)
        case "gopher_repetition":
            rules = GopherRepetitionFilter(**config.gopher_repetition.model_dump(), language=words)
        case "c4":
            rules = C4QualityFilter(**config.c4.model_dump(), language=words)
        case "fineweb":
            rules = FineWebQualityFilter(**config.fineweb.model_dump(), language=words)
        case _:
            raise ValueError(f"{name} is not a filter of datatrove")

    def judge(document: Document) -> FilterResult:
        text = document.text
        if len(text) > MAX_CHARACTERS:
            return FilterResult(text, "too long")
        if all(character in PUNCTUATION_SET or character.isspace() for character in text):
            return FilterResult(text, "no words")
        theirs = TheirDocument(text=text, id=document.id)
        keeps, reason = get_filter_result(rules.filter(theirs))
        if not keeps:
            return FilterResult(text, reason)
        if not theirs.text.strip():
            return FilterResult(text, "nothing left")
        return FilterResult(theirs.text, repairs=() if theirs.text == text else ("lines removed or trimmed",))

    return judge


@functools.lru_cache(maxsize=1)
def _words(language: str) -> _Words:
    """One for all filters: they share the words of a text."""
    try:
        return _Words(language)
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # a language may need a package of its own; the message names it
        raise DataError(f"data.filters.language_of_rules={language}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise DataError(
            f"data.filters.language_of_rules={language} is no language that datatrove splits; set a code such as en"
        ) from error


def _tame(text: str) -> str:
    """The text in the same length, with white space in runs that have none for long, and without the one word that breaks spaCy."""
    text = text.replace("IS_ALPHA", "is_alpha")  # spaCy 3.8.18 raises at the second text of a process that has it
    if max(map(len, text.split()), default=0) <= _UNBROKEN:
        return text
    return _BREAKS.sub(r"\1\2 ", text)
