"""Filters: every rule drops a planted document for its reason and keeps a good one, and every threshold has an
effect.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
from filtering import DATATROVE_FILTERS, GOOD, ONE_LINE, doc, drop_reason, filter_config, numbered

from data_pipeline.cleaning.filters import (
    EDITING_FILTERS,
    build_filter,
    check_filters,
)
from data_pipeline.errors import DataError
from data_pipeline.settings import FilterConfig, FilterName, PrepareConfig, SourceConfig

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
