"""The chunks of a corpus: their keys tell what decides them, and a tokenizer's sample is drawn evenly from them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus import Corpus, find
from data_pipeline.prepare import build_tokenizer
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.text.chunks import Chunk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten files of a kB in each of two sources; a source's third file is forty times as large."""
    for source in ("news", "web"):
        (tmp_path / source).mkdir()
        for i in range(10):
            write(tmp_path / source / f"{i}.jsonl", 400 if i == 2 else 10, f"{source} {i}")
    return tmp_path


def write(file: Path, documents: int, name: str) -> None:
    file.write_text("".join(json.dumps({"text": f"{name} number {i} {'word ' * 15}"}) + "\n" for i in range(documents)))


def corpus(folder: Path, source: dict[str, Any] | None = None, **settings: Any) -> Corpus:
    sources = tuple(SourceConfig(kind="jsonl", paths=(str(folder / name),), **(source or {})) for name in ("news", "web"))
    return find(PrepareConfig(**({"sources": sources, "shard_tokens": 1000} | settings)))


def keys(found: Corpus) -> dict[str, str]:
    return {chunk.name: found.key(chunk, "") for chunk in found.chunks}


def test_every_file_is_in_a_chunk_of_its_source_in_order(folder: Path) -> None:
    found = corpus(folder)
    assert len(found.chunks) > 30
    assert [chunk.name for chunk in found.chunks] == sorted(chunk.name for chunk in found.chunks)
    for index, source in enumerate(("news", "web")):
        parts = [part for chunk in found.chunks if chunk.index == index for part in chunk.parts]
        assert list(dict.fromkeys(part.file.name for part in parts)) == [f"{i}.jsonl" for i in range(10)]
        assert sum(part.bytes for part in parts) == sum(file.stat().st_size for file in (folder / source).iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"source": {"text_field": "body"}},
        {"source": {"id_field": "text"}},
        {"source": {"filters": ("length",)}},
        {"filters": {"length": {"min_characters": 3}}},
    ],
    ids=str,
)
def test_a_key_changes_with_what_decides_the_chunk(folder: Path, settings: dict[str, Any]) -> None:
    before, after = keys(corpus(folder)), keys(corpus(folder, **settings))
    assert list(before) == list(after)
    assert not set(before.values()) & set(after.values())


@pytest.mark.parametrize(
    "settings",
    [{"workers": 3}, {"vocab_size": 500}, {"source": {"exclude": ("no such file",)}}, {"dedup": {"memory_mb": 5}}],
    ids=str,
)
def test_and_with_nothing_else(folder: Path, settings: dict[str, Any]) -> None:
    assert keys(corpus(folder, **settings)) == keys(corpus(folder))


def test_files_that_are_added_leave_the_other_chunks_as_they_were(folder: Path) -> None:
    before = keys(corpus(folder))
    write(folder / "news" / "a new one.jsonl", 10, "new")
    after = keys(corpus(folder))
    last = max(name for name in before if name.startswith("news"))
    assert {name for name, key in before.items() if after[name] != key} <= {last}
    assert len(set(after.values()) - set(before.values())) == 1
    write(folder / "news" / "0.jsonl", 11, "changed")
    assert keys(corpus(folder))["news-00000"] != before["news-00000"]


def names(chunks: list[Chunk]) -> list[str]:
    return [chunk.name for chunk in chunks]


def test_a_small_sample_is_drawn_from_the_same_share_of_every_source(folder: Path) -> None:
    found = corpus(folder)
    assert found.sampled() == list(found.chunks)  # 200 MB
    size = sum(chunk.bytes or 0 for chunk in found.chunks)
    few = corpus(folder, tokenizer_sample_mb=size / 8 / 4 / 1e6)  # a quarter of the chunks hold eight times that
    drawn = few.sampled()
    of_source = Counter(chunk.source for chunk in found.chunks)
    assert Counter(chunk.source for chunk in drawn) == {name: -(-count // 4) for name, count in of_source.items()}
    assert names(drawn) == sorted(names(drawn)) == names(corpus(folder, tokenizer_sample_mb=size / 8 / 4 / 1e6).sampled())
    assert names(drawn) != names(list(few.chunks[: len(drawn)]))
    assert set(names(drawn)) < set(names(corpus(folder, tokenizer_sample_mb=size / 8 / 2 / 1e6).sampled()))


def test_a_tokenizer_from_a_small_sample_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    config = corpus(folder, vocab_size=280, tokenizer_sample_mb=0.002).config
    read: list[int] = []
    for number in (1, 2):
        build_tokenizer(tmp_path / str(number) / "tokenizer.json", config, progress=lambda progress: read.append(progress.read))
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()
    found = find(config)
    drawn = sum(chunk.bytes or 0 for chunk in found.sampled())
    assert max(read) == drawn < sum(chunk.bytes or 0 for chunk in found.chunks) / 3
