"""Filters with the user's lists of domains, words and lines."""

from pathlib import Path

import pytest
from filtering import GOOD, doc, filter_config
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.filters import (
    build_filter,
    check_filters,
    lists_hash,
)
from data_pipeline.errors import DataError
from data_pipeline.settings import FilterConfig, PrepareConfig, SourceConfig


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


def test_the_url_filter_needs_sources_with_its_metadata_field() -> None:
    filters = filter_config(apply=["url"], url={"words": ["pills"], "field": "link"})
    source = SourceConfig(kind="jsonl", paths=("web",), metadata_fields=("link",))
    check_filters(PrepareConfig(sources=(source,), filters=filters))
    for other in (source.model_copy(update={"metadata_fields": ("url",)}), source.model_copy(update={"kind": "text"})):
        with pytest.raises(
            DataError, match=r"data\.sources\.1: the filter url reads link, which is not in its metadata_fields"
        ):
            check_filters(PrepareConfig(sources=(source, other), filters=filters))


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
