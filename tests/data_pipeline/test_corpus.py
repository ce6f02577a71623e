"""The keys of a corpus's chunks cover everything that decides them, and a tokenizer's sample is drawn evenly from
them.
"""

import json
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attempts import contents, finished, interrupt, prepare_here, write_jsonl

from data_pipeline.corpus import Corpus, find_corpus
from data_pipeline.errors import DataError
from data_pipeline.prepare import build_tokenizer
from data_pipeline.settings import PrepareConfig, SourceConfig, TextKind, TokenizedKind
from data_pipeline.text import files as text_files
from data_pipeline.text.chunks import Chunk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources of ten files of 1 kB; the third file of each is forty times as large."""
    for source in ("news", "web"):
        (tmp_path / source).mkdir()
        for i in range(10):
            write(tmp_path / source / f"{i}.jsonl", 400 if i == 2 else 10, f"{source} {i}")
    return tmp_path


def write(file: Path, documents: int, name: str) -> None:
    file.write_text("".join(json.dumps({"text": f"{name} number {i} {'word ' * 15}"}) + "\n" for i in range(documents)))


def corpus(folder: Path, source: dict[str, Any] | None = None, **settings: Any) -> Corpus:
    sources = tuple(
        SourceConfig(kind="jsonl", paths=(str(folder / name),), **(source or {})) for name in ("news", "web")
    )
    return find_corpus(PrepareConfig(**({"sources": sources, "shard_tokens": 1000} | settings)))


def keys(found: Corpus) -> dict[str, str]:
    return {chunk.name: found.chunk_key(chunk, "") for chunk in found.chunks}


def test_every_file_is_in_some_chunk_of_its_source_in_order(folder: Path) -> None:
    found = corpus(folder)
    assert len(found.chunks) > 30
    assert [chunk.name for chunk in found.chunks] == sorted(chunk.name for chunk in found.chunks)
    for index, source in enumerate(("news", "web")):
        pieces = [piece for chunk in found.chunks if chunk.source_index == index for piece in chunk.slices]
        assert list(dict.fromkeys(piece.file.name for piece in pieces)) == [f"{i}.jsonl" for i in range(10)]
        assert sum(piece.bytes for piece in pieces) == sum(file.stat().st_size for file in (folder / source).iterdir())


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
def test_a_key_does_not_change_with_other_settings(folder: Path, settings: dict[str, Any]) -> None:
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


def touched(file: Path, content: bytes | None = None) -> None:
    """Rewrite a file, with a modification time one second later."""
    later = file.stat().st_mtime_ns + 10**9
    file.write_bytes(file.read_bytes() if content is None else content)
    os.utime(file, ns=(later, later))


def test_rewriting_a_file_at_the_same_size_changes_the_keys_of_its_chunks_but_not_the_recipe(
    folder: Path,
) -> None:
    before = corpus(folder)
    assert keys(corpus(folder)) == keys(before)
    touched(folder / "news" / "2.jsonl")
    after = corpus(folder)
    changed = {name for name, key in keys(after).items() if keys(before)[name] != key}
    assert changed == {
        chunk.name for chunk in after.chunks if any(piece.file.path.endswith("news/2.jsonl") for piece in chunk.slices)
    }
    assert 1 < len(changed) < len(after.chunks) / 2
    assert after.recipe(trained_tokenizer=True) == before.recipe(trained_tokenizer=True)


def test_a_key_changes_with_the_name_from_which_document_ids_are_made(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "x.jsonl", 10, "x")

    def key(given: Path) -> str:
        found = find_corpus(PrepareConfig(sources=(SourceConfig(name="s", kind="jsonl", paths=(str(given),)),)))
        return found.chunk_key(found.chunks[0], "")

    assert key(tmp_path / "a") == key(tmp_path / "a" / "x.jsonl")  # x.jsonl
    assert key(tmp_path) != key(tmp_path / "a")  # a/x.jsonl


def test_a_key_changes_with_the_files_of_a_dataset(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.jsonl", 10, "x")

    def both() -> dict[str, str]:
        source = SourceConfig(name="s", kind="hf", paths=(str(tmp_path / "one"), str(tmp_path / "other")))
        return keys(find_corpus(PrepareConfig(sources=(source,))))

    before = both()
    assert both() == before
    touched(tmp_path / "other" / "x.jsonl")
    assert [both()[name] == key for name, key in before.items()] == [True, False]


@pytest.mark.parametrize("knows_version", [True, False], ids=["version known", "version hidden"])
def test_a_file_edited_at_the_same_size_between_two_attempts_is_read_again(
    tmp_path: Path, knows_version: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl = tmp_path / "words.jsonl"
    write_jsonl(jsonl, 100)
    plain: dict[str, Any] = {"filters": {}, "dedup": {}}
    prepare_here(tmp_path / "other", jsonl, **plain)
    settings = plain | {"tokenizer": tmp_path / "other" / "tokenizer.json"}
    if not knows_version:
        monkeypatch.setattr(text_files, "_VERSION_KEYS", ())
    interrupt(tmp_path / "data", jsonl, "tokenizing", **settings)
    assert len(finished(tmp_path / "data")) > 0
    touched(jsonl, jsonl.read_bytes().replace(b"ba", b"de"))
    prepare_here(tmp_path / "data", jsonl, **settings)
    prepare_here(tmp_path / "fresh", jsonl, **settings)
    # Without versions of files, old and new text are mixed.
    assert (contents(tmp_path / "data") == contents(tmp_path / "fresh")) == knows_version


def test_a_result_is_made_with_the_packages_that_its_sources_need(folder: Path) -> None:
    def made_with(*kinds: TextKind) -> list[str]:
        pq.write_table(pa.table({"text": ["a"]}), folder / "x.parquet")
        (folder / "x.txt").write_text("a")
        sources = tuple(SourceConfig(name=kind, kind=kind, paths=(str(folder),)) for kind in kinds)
        return list(find_corpus(PrepareConfig(sources=sources)).made_with)

    always = ["python", "tokenizers", "gigatoken"]
    assert made_with("text", "jsonl") == always
    assert made_with("text", "parquet") == [*always, "pyarrow"]
    assert made_with("hf", "parquet") == [*always, "pyarrow", "datasets"]
    found = corpus(folder).made_with
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert found["gigatoken"] == version("gigatoken")


@pytest.mark.parametrize("kind", [*get_args(TextKind), *get_args(TokenizedKind)])
def test_a_source_without_paths_is_refused_whatever_its_kind(kind: TextKind | TokenizedKind) -> None:
    with pytest.raises(DataError, match=rf"data\.sources: my of kind {kind} has no paths; name its files"):
        find_corpus(PrepareConfig(sources=(SourceConfig(name="my", kind=kind),)))


def names(chunks: list[Chunk]) -> list[str]:
    return [chunk.name for chunk in chunks]


def test_a_small_sample_is_drawn_from_the_same_fraction_of_every_source(folder: Path) -> None:
    found = corpus(folder)
    assert found.sample_chunks() == list(found.chunks)  # 200 MB
    size = sum(chunk.bytes or 0 for chunk in found.chunks)
    few = corpus(folder, tokenizer_sample_mb=size / 8 / 4 / 1e6)  # a quarter of the chunks hold eight times the sample
    drawn = few.sample_chunks()
    of_source = Counter(chunk.source for chunk in found.chunks)
    assert Counter(chunk.source for chunk in drawn) == {name: -(-count // 4) for name, count in of_source.items()}
    assert (
        names(drawn)
        == sorted(names(drawn))
        == names(corpus(folder, tokenizer_sample_mb=size / 8 / 4 / 1e6).sample_chunks())
    )
    assert names(drawn) != names(list(few.chunks[: len(drawn)]))
    assert set(names(drawn)) < set(names(corpus(folder, tokenizer_sample_mb=size / 8 / 2 / 1e6).sample_chunks()))


def test_a_tokenizer_from_a_small_sample_is_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    config = corpus(folder, vocab_size=280, tokenizer_sample_mb=0.002).config
    read: list[int] = []
    for number in (1, 2):
        build_tokenizer(
            tmp_path / str(number) / "tokenizer.json", config, progress=lambda progress: read.append(progress.read)
        )
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()
    found = find_corpus(config)
    drawn = sum(chunk.bytes or 0 for chunk in found.sample_chunks())
    assert max(read) == drawn < sum(chunk.bytes or 0 for chunk in found.chunks) / 3


def test_files_that_another_source_reads_are_not_reported_as_skipped(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.json"):
        (tmp_path / name).write_text('{"text": "a"}')
    text, lines = (SourceConfig(name=kind, kind=kind, paths=(str(tmp_path),)) for kind in ("text", "jsonl"))
    assert find_corpus(PrepareConfig(sources=(text,))).passed_over == (
        "2 files (1 .json, 1 .jsonl), b.jsonl and c.json",
    )
    assert find_corpus(PrepareConfig(sources=(text, lines))).passed_over == ("1 file (1 .json), c.json",) * 2
    assert (
        find_corpus(PrepareConfig(sources=(text, lines))).recipe(trained_tokenizer=True).passed_over
        == ("1 file (1 .json), c.json",) * 2
    )
