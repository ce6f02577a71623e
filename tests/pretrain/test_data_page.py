"""The page of a data set: its text, and what a browser draws."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_report_page import browse, charts_in, text_of

from data_pipeline.inspect import (
    DataDescription,
    LengthBin,
    PackedPiece,
    PackedSequence,
    SampleDocument,
    SourceDescription,
)
from data_pipeline.reading.forecast import Forecast, RunSegment, SourceUsage
from data_pipeline.recipe_text import RecipeEntry
from data_pipeline.settings import PrepareConfig
from data_pipeline.storage.manifest import Recipe, SourceManifest, SplitManifest
from data_pipeline.tokenizing.tokenizer import load_tokenizer
from pretrain.report.data_page import data_page

HOSTILE = 'x = "</script><script>console.error(1)</script>" & <b>'
REASONS = {
    "gopher_quality: too short": 200,
    "exact_duplicate: web": 30,
    "near_duplicate: web": 20,
    HOSTILE: 10,
    "near_duplicate: code": 5,
}
"""Four bars: near duplicates of two sources are one reason."""


def make_source(name: str, documents: int, dropped: dict[str, int]) -> SourceManifest:
    return SourceManifest(
        name=name, documents=documents, tokens=100 * documents, text_bytes=325 * documents, dtype="uint16",
        ends_with_eot=True, dropped=dropped, repaired={"invalid Unicode": 3}, marked={}, shards=(),
    )  # fmt: skip


def describe_source(name: str, parts: dict[str, SourceManifest]) -> SourceDescription:
    """Documents of 64 to 1,023 tokens, a sample whose text would be markup, and a packed sequence of it."""
    documents, tokens = (sum(getattr(part, what) for part in parts.values()) for what in ("documents", "tokens"))
    return SourceDescription(
        name,
        parts,
        tuple(LengthBin(64 << k, documents // 4, tokens // 4) for k in range(4)),
        (SampleDocument("train", 3, 1000, 1300, (HOSTILE, "<|endoftext|>"), (" end", None)),),
        PackedSequence(64, (PackedPiece(7, 5, 30, 35, ("a", None)), PackedPiece(8, 0, 20, 900, ("b",))), 14),
    )


@pytest.fixture
def two(tiny_data: Path) -> DataDescription:
    """Sources web and code; only code dropped documents."""
    tokenizer = load_tokenizer(tiny_data)
    recipe = Recipe(settings=PrepareConfig(), trained_tokenizer=True, listings=(), lists="", made_with={})
    splits = {
        split: SplitManifest(
            split=split, splits=("validation", "train"), vocab_size=300, eot_id=0, tokenizer=tokenizer.fingerprint,
            recipe=recipe,
            sources=(make_source("web", size, {}), make_source("code", 2 * size, REASONS if split == "train" else {})),
        )
        for split, size in (("train", 4000), ("validation", 40))
    }  # fmt: skip
    sources = tuple(
        describe_source(name, {split: manifest.sources[i] for split, manifest in splits.items()})
        for i, name in enumerate(("web", "code"))
    )
    entries = {"dedup": (RecipeEntry("minhash", "yes", changed=True), RecipeEntry("bands", "14"))}
    return DataDescription(Path("data/my-text"), tokenizer, "<|endoftext|>", splits, sources, entries)


def make_forecast(epochs: float) -> Forecast:
    stages = [
        RunSegment(start, stop, (SourceUsage("web", stop - start, 64 * (stop - start), epochs / 2, start),))
        for start, stop in ((0, 800), (800, 1000))
    ]
    return Forecast(
        64, "best_fit", RunSegment(0, 1000, (SourceUsage("web", 1000, 63_360, epochs, 1234),)), tuple(stages)
    )


def test_the_tiles_show_tokens_documents_drops_and_fertility(two: DataDescription) -> None:
    page = text_of(data_page(two, None))
    for text in (
        "my-text train + validation",
        "Tokens 1.21M 1.20M train, 12.0k validation",
        "Documents 12.1k 12,120 of 12,385 read",
    ):
        assert text in page
    assert "Dropped 2.1% 265 documents" in page
    assert "Fertility 3.25 bytes of text by token" in page


def test_the_tables_show_every_split_and_source(two: DataDescription) -> None:
    page = text_of(data_page(two, None))
    assert "web 4,000 0 4,000 400,000 33.3% 3.25 0 uint16" in page
    assert "code 8,265 265 8,000 800,000 66.7% 3.25 0 uint16" in page
    assert "all 12,265 265 12,000 1,200,000 100.0% 3.25 0 uint16" in page
    assert "all 120 0 120 12,000 100.0% 3.25 0 uint16" in page
    assert "code web 30 20 code code 0 5" in page  # dropped from, kept in, exact, near
    assert "code repaired: invalid Unicode 6" in page
    assert "dedup minhash yes bands 14" in page
    assert "What a run" not in page


def test_samples_mark_end_of_text_tokens_but_not_text_that_spells_one(two: DataDescription) -> None:
    page = data_page(two, None)
    assert page.count("&lt;|endoftext|&gt; <span") == 0
    assert page.count('<span class="end">&lt;|endoftext|&gt;</span>') == 2 * 2
    assert page.count("&lt;b&gt;&lt;|endoftext|&gt;\n") == 2
    assert "Document 3 of train, tokens 1,000 to 1,299" in page
    assert "document 7, its tokens 5 to 34 of 35" in page
    assert "14 tokens of padding" in page


def test_the_forecast_shows_stages_and_warns_above_four_epochs(two: DataDescription) -> None:
    page = text_of(data_page(two, make_forecast(4.5)))
    assert "1,000 sequences of 64 tokens; 1.00% of the positions are padding (data.packing=best_fit)." in page
    assert (
        "The whole run Source Sequences Tokens Share Epochs Repeated tokens web 1,000 63,360 100.0% 4.50 1,234" in page
    )
    assert (
        "80% to 100% of the run Source Sequences Tokens Share Epochs Repeated tokens web 200 12,800 100.0% 2.25 800"
        in page
    )
    assert "web is read 4.5 times: beyond 4 epochs" in page
    assert "times: beyond" not in text_of(data_page(two, make_forecast(4.0)))


def test_the_page_needs_no_network_and_escapes_its_texts(two: DataDescription) -> None:
    page = data_page(two, make_forecast(1))
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"""(?:src|href)=|@import|url\(""", markup) == []
    assert "</script><script>console.error" not in page
    assert page.count("<script") == 3


# What a browser draws


def count_bars(chart: str) -> list[int]:
    """Number of bars of each trace."""
    return [
        trace.count("<path")
        for trace in re.findall(r'<g class="trace bars"[^>]*>(.*?)</g></g>', chart, flags=re.DOTALL)
    ]


def test_chromium_draws_a_bar_for_each_length_and_reason(two: DataDescription, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(data_page(two, make_forecast(4.5)))
    document, console = browse(file, tmp_path / "profile")
    assert console == []
    charts = charts_in(document)
    assert set(charts) == {"lengths", "drops"}
    assert count_bars(charts["lengths"]) == [4, 4, 4, 4]  # documents and tokens of two sources
    assert count_bars(charts["drops"]) == [4]
    for text in (
        "near duplicate  25 (0.30%)",
        "gopher_quality: too short  200 (2.40%)",
        "&lt;/script&gt;&lt;script&gt;console.error",
    ):
        assert text in charts["drops"].replace("\xa0", " ")


def test_chromium_draws_the_dark_page_without_drops(two: DataDescription, tmp_path: Path) -> None:
    web, code = two.sources
    code = replace(code, splits={name: part.model_copy(update={"dropped": {}}) for name, part in code.splits.items()})
    file = tmp_path / "page.html"
    file.write_text(data_page(replace(two, sources=(web, code)), None))
    document, console = browse(file, tmp_path / "profile", "--blink-settings=preferredColorScheme=0")
    assert console == []
    assert set(charts_in(document)) == {"lengths"}
    assert 'data-drawn="dark"' in document
