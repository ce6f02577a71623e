"""`pretrain data inspect` on the terminal: the data, the forecast of a run, wrong input."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.inspect import (
    DataDescription,
    LengthBin,
    PackedPiece,
    PackedSequence,
    SampleDocument,
    SourceDescription,
)
from data_pipeline.reading.forecast import Forecast, RunSegment, SourceUsage
from data_pipeline.reading.loader import Loader
from data_pipeline.recipe_text import RecipeEntry
from data_pipeline.settings import PrepareConfig
from data_pipeline.storage.manifest import Recipe, SourceManifest, SplitManifest
from data_pipeline.storage.prepared import open_prepared
from data_pipeline.tokenizing.tokenizer import load_tokenizer
from pretrain.cli.data.description import print_description

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py
RUN = ("data.seq_len=32", "train.batch_size=4", "train.steps=500")


def cells(out: str, name: str) -> list[list[str]]:
    """The cells of the rows that begin with a name, without commas."""
    return [line.replace(",", "").split() for line in out.splitlines() if line.split()[:1] == [name]]


def test_it_counts_documents_tokens_and_lengths(pretrain: Pretrain, tiny_data: Path) -> None:
    answer = pretrain("data", "inspect", tiny_data, "--samples", "2")
    assert (answer.code, answer.err) == (0, "")
    prepared = open_prepared(tiny_data)
    rows = cells(answer.out, prepared.splits["train"].sources[0].name)[:2]
    for row, manifest in zip(rows, prepared.splits.values(), strict=True):
        assert row[1:6] == [str(manifest.documents), "0", str(manifest.documents), str(manifest.tokens), "100.0%"]
    shares = [
        float(share) for share in re.findall(r"^ *[\d,]+ to [\d,]+ .* (\d+\.\d)% +\d+\.\d%$", answer.out, re.MULTILINE)
    ]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert answer.out.count("▌<|endoftext|>▐") >= 3
    assert "how documents meet in a sequence of 64 tokens" in answer.out
    assert "A run with" not in answer.out


def test_settings_show_what_that_run_reads_of_the_data(pretrain: Pretrain, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("data: {path: nowhere, seq_len: 32}\ntrain: {batch_size: 4, steps: 7}\n")
    answers = [
        pretrain("data", "inspect", tiny_data, *args) for args in (RUN, (tmp_path / "my.yaml", "train.steps=500"))
    ]
    assert answers[0].out == answers[1].out
    loader, samples = Loader(tiny_data / "train", seq_len=32, seed=1), 500 * 4
    (epochs,) = loader.epochs(samples).values()
    tokens = round(epochs * loader.n_tokens)
    row = cells(answers[0].out, loader.sources[0].source.name)[2]
    assert row[1:] == [str(samples), str(tokens), "100.0%", f"{epochs:.2f}", str(tokens - loader.n_tokens)]
    assert (
        f"{1 - tokens / (samples * 32):.2%} of the positions are padding (data.packing=concatenate)" in answers[0].out
    )
    assert "times: beyond" not in answers[0].out


def test_each_stage_has_rows_and_many_epochs_a_warning(pretrain: Pretrain, tiny_data: Path) -> None:
    name = open_prepared(tiny_data).splits["train"].sources[0].name
    stage = f"data.mixture.stages=[{{from: 80%, weights: {{{name}: 1}}}}]"
    out = pretrain("data", "inspect", tiny_data, *RUN, stage, "train.steps=5000").out
    run, first, second = cells(out, name)[2:5]
    assert [int(row[1]) for row in (run, first, second)] == [20_000, 16_000, 4_000]
    assert int(run[2]) == int(first[2]) + int(second[2])
    assert second[2] == second[5]  # all of it was read before
    assert "0% to 80% of the run" in out
    assert re.search(rf"{name} is read \d+\.\d times: beyond 4 epochs, .*arXiv:2305\.16264", out)


def test_sequence_lengths_and_packing_are_those_of_the_run(pretrain: Pretrain, tiny_data: Path) -> None:
    grown = pretrain("data", "inspect", tiny_data, *RUN, "data.seq_len_schedule=[{from: 50%, seq_len: 64}]")
    assert (grown.code, grown.err) == (0, "")
    assert "2,000 sequences of 32 tokens" in grown.out
    assert "(data.packing=best_fit)" in pretrain("data", "inspect", tiny_data, *RUN, "data.packing=best_fit").out


def test_html_writes_the_page_and_prints_its_path(pretrain: Pretrain, tiny_data: Path, tmp_path: Path) -> None:
    answer = pretrain("data", "inspect", tiny_data, *RUN, "--html", tmp_path / "page.html")
    assert (answer.code, answer.out, answer.err) == (0, f"{tmp_path / 'page.html'}\n", "")
    assert "What a run with these settings reads" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["data.mixture.weight.code=2"], "data.mixture.weight is not a setting; did you mean data.mixture.weights?"),
        (
            ["data.mixture.weights.nothing=2"],
            "data.mixture.weights names nothing, but the data does not hold it; its sources are ",
        ),
        (["data.mixture.max_epochs=2", "data.seq_len=32"], "times, more than data.mixture.max_epochs=2"),
        (["data.seq_len=100000"], "data.seq_len=100000 is longer than the data"),
        (
            ["data.seq_len_schedule=[{from: 50%, seq_len: 48}]", "data.seq_len=32"],
            "data.seq_len_schedule.0.seq_len=48 is not a multiple of the 32",
        ),
        (["data.window=48", "data.seq_len=32"], "data.window=48 is not a multiple of the longest sequence"),
        (["nosuch"], "nosuch: no such file, and no preset of that name"),
        (
            ["--html", "nowhere/page.html"],
            "--html: nowhere/page.html cannot be written: No such file or directory; name another file",
        ),
        (["--html", "."], "--html: . is a folder; name a file"),
    ],
)
def test_wrong_input_is_one_line(
    pretrain: Pretrain, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = pretrain("data", "inspect", tiny_data, *args)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert message in answer.err
    assert list(tmp_path.iterdir()) == []


# With several sources of long names


def manifest_of(name: str, documents: int, dropped: dict[str, int]) -> SourceManifest:
    marks = {"shares text with evaluation sets": 12}
    return SourceManifest(
        name=name, documents=documents, tokens=1000 * documents, text_bytes=None, dtype="uint16", ends_with_eot=True,
        dropped=dropped, repaired={}, marked=marks, shards=(),
    )  # fmt: skip


@pytest.fixture
def large(tiny_data: Path) -> DataDescription:
    """Four sources of a hundred million documents each, with texts and reasons that look like markup."""
    tokenizer = load_tokenizer(tiny_data)
    reasons = {
        "gopher_repetition: duplicated_10_n_grams": 9_999_999,
        "[bold]c4[/]: [/red]": 31,
        "near_duplicate: common-crawl-0": 77,
        "exact_duplicate: common-crawl-0": 1_234_567,
    }
    parts = [manifest_of(f"common-crawl-{i}", 100_000_000, reasons) for i in range(4)]
    text = ("[red]a text[/] that spells <|endoftext|>", None)
    recipe = Recipe(settings=PrepareConfig(), trained_tokenizer=True, listings=(), lists="", made_with={})
    manifest = SplitManifest(
        split="train",
        splits=("train",),
        vocab_size=300,
        eot_id=0,
        tokenizer=tokenizer.fingerprint,
        recipe=recipe,
        sources=tuple(parts),
    )
    sources = tuple(
        SourceDescription(
            part.name,
            {"train": part},
            tuple(LengthBin(1 << k, part.documents // 12, part.tokens // 12) for k in range(5, 17)),
            (SampleDocument("train", 3, 100, 200, text, text),),
            PackedSequence(64, (PackedPiece(7, 5, 30, 35, text), PackedPiece(8, 0, 20, 900, text[:1])), 14),
        )
        for part in parts
    )
    return DataDescription(
        tiny_data,
        tokenizer,
        "<|endoftext|>",
        {"train": manifest},
        sources,
        {"shards": (RecipeEntry("shard_tokens", "[b]5[/b]", True),)},
    )


def render_text(description: DataDescription, forecast: Forecast | None, width: int) -> str:
    out = io.StringIO()
    print_description(description, forecast, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [90, 120, 200])
def test_nothing_is_cut_off(large: DataDescription, width: int) -> None:
    readings = tuple(SourceUsage(source.name, 10**10, 10**13, 2.5, 10**12) for source in large.sources)
    out = render_text(large, Forecast(2048, "concatenate", RunSegment(0, 4 * 10**10, readings), ()), width)
    assert "…" not in out
    tables = [line for line in out.splitlines() if re.search(r"\d%|uint16", line)]
    assert max(map(len, tables)) <= width
    assert out.count("100,000,000,000") == 4
    assert out.count("10,000,000,000,000") == 4
    for count in ("9,999,999", "1,234,567", "gopher_repetition: duplicated_10_n_grams"):
        assert (
            out.count(f" {count} ") == 4 if count != "1,234,567" else out.count(count) == 8
        )  # and in the table of duplicates


def test_bars_are_on_one_axis(large: DataDescription) -> None:
    out = render_text(large, None, 200)
    rows = [line for line in out.splitlines() if re.match(r"  [a-z\[].*%", line)]
    bars = [line.count("█") for line in rows if "kept" not in line]
    assert bars == [24, 3, 0, 0] * 4  # of 9,999,999 documents, 1,234,567, and a few


def test_texts_of_the_data_are_neither_markup_nor_marks(large: DataDescription) -> None:
    out = render_text(large, None, 120)
    assert "  [bold]c4[/]: [/red] " in out
    assert out.count("[red]a text[/] that spells <|endoftext|>▌<|endoftext|>▐\n") == 3 * 4
    assert "document 7, its tokens 5 to 34 of 35\n" in out
    assert "14 tokens of padding\n" in out
    assert "shard_tokens: [b]5[/b]" in out
