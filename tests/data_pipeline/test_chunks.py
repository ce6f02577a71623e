import gzip
import itertools
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig
from data_pipeline.text import blocks
from data_pipeline.text.chunks import Chunk, read_chunk, split_into_chunks
from data_pipeline.text.files import list_files
from data_pipeline.text.sources import Document

UNSPLIT = 1 << 40


def source_of(kind: str, *paths: object, **settings: object) -> SourceConfig:
    return SourceConfig.model_validate({"kind": kind, "paths": [str(path) for path in paths], **settings})


def split_at(source: SourceConfig, text_bytes: int) -> list[Chunk]:
    return split_into_chunks(0, "s", source, list_files(source), text_bytes)


def documents_of(source: SourceConfig, chunks: Sequence[Chunk]) -> list[Document]:
    """Read all documents after pickling the chunks. Checks `bytes_read`, and sets it to 0."""
    documents: list[Document] = []
    for chunk in pickle.loads(pickle.dumps(chunks)):
        found = list(read_chunk(chunk, source))
        reads = [document.bytes_read for document in found]
        assert reads == sorted(reads)
        assert all(0 <= read <= chunk.bytes for read in reads)
        documents += [replace(document, bytes_read=0) for document in found]
    return documents


def check_that_slices_read_the_same(source: SourceConfig, text_bytes: int) -> list[Document]:
    expected, chunks = documents_of(source, split_at(source, UNSPLIT)), split_at(source, text_bytes)
    assert documents_of(source, chunks) == expected
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert sum(chunk.bytes or 0 for chunk in chunks) == sum(file.size for file in list_files(source))
    return expected


def read_jsonl_naively(raw: bytes) -> list[tuple[str, str, object]]:
    """Return (id, text, url) of each line by the simplest code, all bytes at once."""
    documents, offset = [], 0
    for line in raw.split(b"\n"):
        bare = line.removeprefix(b"\xef\xbb\xbf").strip()
        if bare:
            row = json.loads(bare)
            documents.append((f"x.jsonl@{offset}", row["text"], row.get("url")))
        offset += len(line) + 1
    return documents


MARKS = st.sampled_from([b"", b"", b"\xef\xbb\xbf"])
JSON_LINES = st.one_of(
    st.sampled_from([b"", b" ", b"\t"]),
    st.builds(
        lambda text, url, plain: json.dumps(
            {"text": text} | ({"url": url} if url is not None else {}), ensure_ascii=plain
        ).encode(),
        st.text(st.sampled_from('ab\n\r\u2028ü漢🙂\\"'), max_size=40),
        st.sampled_from([None, "http://a", "ü"]),
        st.booleans(),
    ),
)


@given(
    lines=st.lists(st.tuples(MARKS, JSON_LINES, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    ends=st.booleans(),
    text_bytes=st.integers(1, 400),
    block=st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_jsonl_split_at_any_byte_reads_like_the_whole_file(
    lines: list[tuple[bytes, bytes, bytes]], ends: bool, text_bytes: int, block: int
) -> None:
    raw = b"".join(mark + line + end for mark, line, end in lines)
    raw = raw if ends else raw.removesuffix(b"\n")
    fsspec.filesystem("memory").pipe("/slices/x.jsonl", raw)
    source = source_of("jsonl", "memory://slices/x.jsonl", metadata_fields=["url"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK", block)
        found = check_that_slices_read_the_same(source, text_bytes)
    assert [(document.id, document.text, document.metadata["url"]) for document in found] == read_jsonl_naively(raw)


def test_the_check_of_jsonl_slices_detects_slices_that_ignore_line_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/slices/y.jsonl", b'{"text": "a"}\n{"text": "bbb"}\n')
    source = source_of("jsonl", "memory://slices/y.jsonl")
    check_that_slices_read_the_same(source, 20)
    monkeypatch.setattr(blocks, "_next_line_start", lambda stream, start, stop: start)
    with pytest.raises(DataError, match=r"y\.jsonl, byte 15: broken JSON"):
        check_that_slices_read_the_same(source, 20)


URLS = st.none() | st.sampled_from(["u", "漢"])
ROWS = st.lists(st.fixed_dictionaries({"text": st.none() | st.text("ab ü漢", max_size=30), "url": URLS}), max_size=40)
ENDINGS = st.sampled_from(["arrow", "arrows"])
SCHEMA = pa.schema({"text": pa.string(), "url": pa.string()})


@given(rows=ROWS, group=st.integers(1, 50), text_bytes=st.integers(1, 800))
@settings(max_examples=60, deadline=None)
def test_parquet_split_between_row_groups_reads_like_the_whole_file(
    rows: list[dict[str, str | None]], group: int, text_bytes: int
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, row_group_size=group)
    fsspec.filesystem("memory").pipe("/slices/x.parquet", sink.getvalue().to_pybytes())
    source = source_of("parquet", "memory://slices/x.parquet", metadata_fields=["url"])
    found = check_that_slices_read_the_same(source, text_bytes)
    assert [document.id for document in found] == [f"x.parquet:{i}" for i in range(len(rows))]
    assert [(document.text, document.metadata["url"]) for document in found] == [
        (row["text"] or "", row["url"]) for row in rows
    ]
    if text_bytes == 1:
        assert len(split_at(source, text_bytes)) == max(1, -(-len(rows) // group))


@given(rows=ROWS, batch=st.integers(1, 50), text_bytes=st.integers(1, 800), ending=ENDINGS, local=st.booleans())
@settings(max_examples=100, deadline=None)
def test_arrow_split_between_record_batches_reads_like_the_whole_file(
    rows: list[dict[str, str | None]],
    batch: int,
    text_bytes: int,
    ending: str,
    local: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if ending == "arrow" else pa.ipc.new_stream)(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA), batch)
    address = f"{tmp_path_factory.getbasetemp()}/x.{ending}" if local else f"memory://slices/x.{ending}"
    with fsspec.open(address, "wb") as stream:
        stream.write(sink.getvalue().to_pybytes())
    source = source_of("arrow", address, metadata_fields=["url"])
    found = check_that_slices_read_the_same(source, text_bytes)
    assert [document.id for document in found] == [f"x.{ending}:{i}" for i in range(len(rows))]
    assert [(document.text, document.metadata["url"]) for document in found] == [
        (row["text"] or "", row["url"]) for row in rows
    ]


def test_dictionaries_and_compressed_bodies_survive_splitting_an_arrow_file(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {i}" for i in range(100)], "url": pa.array(["a", "b"] * 50).dictionary_encode()})
    for ending, new in (("arrow", pa.ipc.new_file), ("arrows", pa.ipc.new_stream)):
        with new(tmp_path / f"x.{ending}", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table, 7)
    source = source_of("arrow", tmp_path, metadata_fields=["url"])
    assert len(split_at(source, 60)) == 2 * 15
    found = check_that_slices_read_the_same(source, 60)
    assert [document.metadata["url"] for document in found] == ["a", "b"] * 100


def test_small_files_share_a_chunk_and_large_ones_are_split(tmp_path: Path) -> None:
    for i, size in enumerate((40, 40, 40, 250, 100, 100)):
        (tmp_path / f"{i}.jsonl").write_bytes(b"\n" * size)
    (tmp_path / "6.jsonl.gz").write_bytes(bytes(30))  # estimated at 120
    source = source_of("jsonl", tmp_path)
    slices = [
        [(piece.file.name, piece.start, piece.stop, piece.bytes) for piece in chunk.slices]
        for chunk in split_at(source, 100)
    ]
    assert slices == [
        [("0.jsonl", None, None, 40), ("1.jsonl", None, None, 40)],
        [("2.jsonl", None, None, 40)],
        [("3.jsonl", 0, 83, 83)],
        [("3.jsonl", 83, 166, 83)],
        [("3.jsonl", 166, 250, 84)],
        [("4.jsonl", None, None, 100)],
        [("5.jsonl", None, None, 100)],
        [("6.jsonl.gz", None, None, 30)],
    ]
    assert [
        (chunk.name, chunk.source_index, chunk.bytes)
        for chunk in split_into_chunks(3, "web", source, list_files(source), 200)
    ][1:3] == [
        ("web-00001", 3, 125),
        ("web-00002", 3, 125),
    ]


def test_appended_files_change_no_chunk_but_the_last(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text("x" * (i % 7))
    source = source_of("text", tmp_path)
    before = split_at(source, 10)
    for i in range(30, 40):
        (tmp_path / f"{i}.txt").write_text("x" * 9)
    assert split_at(source, 10)[: len(before) - 1] == before[:-1]
    check_that_slices_read_the_same(source, 10)


def test_a_parquet_file_is_split_by_the_bytes_of_its_text_column(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{i:010}" for i in range(4000)], "other": [f"{i:030}" for i in range(4000)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1000)
    source = source_of("parquet", tmp_path)
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    assert group.column(0).total_uncompressed_size < 16_000 < 50_000 < group.total_byte_size
    slices = [[(piece.start, piece.stop, piece.row) for piece in chunk.slices] for chunk in split_at(source, 33_000)]
    assert slices == [[(0, 2, 0)], [(2, 4, 2000)]]


def test_bytes_read_grow_with_every_block_up_to_the_size_of_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 20)
    raw = b'{"text": "12345678"}\n' + b'{"text": "2"}\n' * 3
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl").write_bytes(raw)
    source = source_of("jsonl", tmp_path)
    (chunk,) = split_at(source, UNSPLIT)
    assert [document.bytes_read for document in read_chunk(chunk, source)] == [40, 40, 60, 63, 103, 103, 123, 126]
    assert chunk.bytes == 126
    assert [[document.bytes_read for document in read_chunk(chunk, source)][-1] for chunk in split_at(source, 32)] == [
        31,
        32,
        31,
        32,
    ]


def test_errors_inside_a_split_file_name_the_byte_and_at_its_beginning_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' * 9 + b"oops\n")
    source = source_of("jsonl", tmp_path)
    with pytest.raises(DataError, match=r"x\.jsonl:10: broken JSON \(Expecting value at column 1\)"):
        documents_of(source, split_at(source, UNSPLIT))
    with pytest.raises(DataError, match=r"x\.jsonl, byte 126: broken JSON \(Expecting value at column 1\)"):
        documents_of(source, split_at(source, 70))


def test_a_line_over_many_slices_is_skipped_by_those_in_its_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "%s"}\n{"text": "b"}' % (b"a" * 10_000))
    source = source_of("jsonl", tmp_path)
    read: list[int] = []
    monkeypatch.setattr(blocks, "_BLOCK", 100)
    monkeypatch.setattr(blocks, "read_blocks", counting(blocks.read_blocks, read))
    chunks = split_at(source, 1000)
    assert [len(list(read_chunk(chunk, source))) for chunk in chunks] == [1] + [0] * 9 + [1]
    assert sum(read) < 11_000  # the long line is decompressed once, not once a slice


Blocks = Callable[[BinaryIO, str], Iterator[tuple[int, bytes]]]


def counting(blocks: Blocks, read: list[int]) -> Blocks:
    def count_bytes(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
        for at, block in blocks(stream, name):
            read.append(len(block))
            yield at, block

    return count_bytes


def test_a_dataset_is_one_chunk_for_each_path(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"text": [name]}), tmp_path / name / "x.parquet")
    source = source_of("hf", tmp_path / "one", tmp_path / "two")
    chunks = split_into_chunks(1, "hub", source, [], 1)
    assert [(chunk.name, chunk.slices, chunk.bytes) for chunk in chunks] == [
        ("hub-00000", (), None),
        ("hub-00001", (), None),
    ]
    documents = list(itertools.chain.from_iterable(read_chunk(chunk, source) for chunk in chunks))
    assert [(document.text, document.source, document.bytes_read) for document in documents] == [
        ("one", "hub", 0),
        ("two", "hub", 0),
    ]


def test_a_truncated_parquet_file_is_named_when_it_is_split(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a" * 1000]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read, it may be corrupt"):
        split_at(source_of("parquet", tmp_path), 1)


def test_a_compressed_file_is_one_slice_however_large(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000))
    source = source_of("jsonl", tmp_path)
    (chunk,) = split_at(source, 1)
    assert len(documents_of(source, [chunk])) == 1000
