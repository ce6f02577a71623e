"""Filters: every rule drops a planted document for its reason and keeps a good one, and every threshold is in force."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.filters import EDITS, build_judge, check_filters, filter_versions, lists_hash
from data_pipeline.settings import FilterConfig, FilterName, PrepareConfig, SourceConfig
from data_pipeline.sources import Document

THEIRS: tuple[FilterName, ...] = ("gopher_quality", "gopher_repetition", "c4", "fineweb")

GOOD = """The harbour of the town was built by monks in the ninth century, when the river still reached its walls.
Merchants from the north came with amber and furs, and sailed home with salt, wine and heavy cloth.
A flood in 1362 moved the river bed two miles to the east, so that ships could no longer be unloaded there!
Would anybody have believed that the quiet meadow beside the church had once been full of masts and shouting sailors?
Only the names of a few narrow streets remember them, and the carved fish above an old door that tourists like to photograph.
Today a small museum shows what was found in the mud: "coins, combs, dice and a leather shoe that fits a child of seven."
"""


def doc(text: str, **metadata: object) -> Document:
    return Document(id="d7", text=text, source="web", metadata=metadata, n_bytes=len(text.encode()), repaired=False, read=0)


def config_of(**filters: Any) -> FilterConfig:
    return FilterConfig.model_validate(filters)


def reason_of(name: FilterName, text: str, **own: Any) -> str | None:
    return build_judge(config_of(**{name: own}), [name])(doc(text)).reason


def numbered(n: int, line: str = "Line number {} tells of its own matter to you and that of others.") -> str:
    return "\n".join(line.format(chr(ord("a") + i % 26) * (2 + i // 26)) for i in range(n))


PLANTED: list[tuple[FilterName, dict[str, Any], str, str]] = [
    ("length", {"min_characters": 10}, "too few", "too short"),
    ("length", {"max_characters": 1000}, GOOD * 2, "too long"),
    ("language", {}, "Der Hafen der Stadt wurde im neunten Jahrhundert von Mönchen gebaut, als der Fluss ihre Mauern noch erreichte.", "de"),
    ("language", {}, "0 1 2 3 4 5 6 7 8 9", "unsure"),
    ("gopher_quality", {}, "There is not much to be said of the matter.", "gopher_short_doc"),
    ("gopher_quality", {"max_doc_words": 200}, GOOD * 2, "gopher_long_doc"),
    ("gopher_quality", {}, "a be to of " * 30, "gopher_below_avg_threshold"),
    ("gopher_quality", {}, "the incomprehensibilities that " + "notwithstanding " * 60, "gopher_above_avg_threshold"),
    ("gopher_quality", {}, GOOD + " #" * 20, "gopher_too_many_hashes"),
    ("gopher_quality", {}, GOOD.replace(",", "..."), None or "gopher_too_many_ellipsis"),
    ("gopher_quality", {}, "\n".join("- " + line for line in numbered(20).split("\n")), "gopher_too_many_bullets"),
    ("gopher_quality", {}, "\n".join(line[:-1] + "…" for line in numbered(20).split("\n")), "gopher_too_many_end_ellipsis"),
    ("gopher_quality", {}, GOOD + " 12 34 56" * 20, "gopher_below_alpha_threshold"),
    ("gopher_quality", {}, "wine salt cloth amber masts ships river walls " * 10, "gopher_enough_stop_words"),
    ("gopher_quality", {"min_doc_words": 0}, " \n", "no words"),
    ("gopher_quality", {"min_doc_words": 0}, "--- *** ---", "no words"),
    ("gopher_repetition", {}, "\n\n".join([GOOD, "Share this.", "Share this.", "Share this."]), "dup_para_frac"),
    ("gopher_repetition", {"dup_para_frac": 0.5}, f"{GOOD}\n\n{GOOD}\n\n{numbered(3)}", "dup_para_char_frac"),
    ("gopher_repetition", {}, GOOD + "Share this.\n" * 6, "dup_line_frac"),
    ("gopher_repetition", {}, f"{GOOD}{'Share this page with your friends and family, if you like it. ' * 4}\n" * 1
     + numbered(6) + "\n" + "x y z " * 60 + "\n" + "x y z " * 60, "dup_line_char_frac"),
    ("gopher_repetition", {}, "good wine " * 40, "top_2_gram"),
    ("gopher_repetition", {"top_n_grams": ()}, GOOD + " in the year of the flood" * 12, "duplicated_5_n_grams"),
    ("c4", {}, GOOD + "Lorem ipsum dolor sit amet.", "lorem_ipsum"),
    ("c4", {}, GOOD + "In C a block begins with a { on its line.", "curly_bracket"),
    ("c4", {}, "Home\nContact\nThere is only a single sentence here.", "too_few_sentences"),
    ("c4", {"min_num_sentences": -1}, "Home\nContact", "nothing left"),
    ("fineweb", {}, numbered(20).replace(".", ""), "line_punct_ratio"),
    ("fineweb", {}, numbered(20, "It is {}."), "short_line_ratio"),
    ("fineweb", {}, GOOD + GOOD[: GOOD.index("\n")], "char_dup_ratio"),
    ("fineweb", {"short_line_thr": 1.0}, numbered(20, "It was {}."), "list_ratio"),
]


@pytest.mark.parametrize(("name", "own", "text", "why"), PLANTED, ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "")
def test_a_planted_document_is_dropped_for_its_reason_and_a_good_one_is_kept(name: FilterName, own: dict[str, Any], text: str, why: str) -> None:
    assert reason_of(name, text, **own) == f"{name}: {why}"
    assert reason_of(name, GOOD, **own) is None


def test_all_filters_together_keep_a_good_document_as_it_is() -> None:
    verdict = build_judge(FilterConfig(), ["length", "language", *THEIRS])(doc(GOOD.strip()))
    assert (verdict.reason, verdict.text, verdict.repairs) == (None, GOOD.strip(), ())
