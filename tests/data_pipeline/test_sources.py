import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig
from data_pipeline.text import blocks
from data_pipeline.text.chunks import read_chunk, split_into_chunks
from data_pipeline.text.files import list_files
from data_pipeline.text.sources import Document

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "three\nlines"}]
MISPLACED = b'{"text": "a"}\n{"text": \n'


def read(kind: str, *paths: object, **settings: object) -> list[Document]:
    source = SourceConfig.model_validate({"kind": kind, "paths": [str(path) for path in paths], **settings})
    return [
        document
        for chunk in split_into_chunks(0, "here", source, list_files(source), 1 << 30)
        for document in read_chunk(chunk, source)
    ]


def texts(kind: str, *paths: object, **settings: object) -> list[str]:
    return [document.text for document in read(kind, *paths, **settings)]


def ids(kind: str, *paths: object, **settings: object) -> list[str]:
    return [document.id for document in read(kind, *paths, **settings)]


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def arrow(table: pa.Table, ending: str, max_rows: int | None = None) -> bytes:
    """Write a table in the file format (`arrow`) or the streaming format (`arrows`)."""
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if ending == "arrow" else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_rows)
    return sink.getvalue().to_pybytes()


def test_a_folder_of_text_is_read_in_sorted_order_whatever_the_order_of_creation(tmp_path: Path) -> None:
    for name in ("z.txt", "a.md", "sub/m.txt", "sub.txt", "skipped.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert ids("text", tmp_path) == ["a.md", "sub.txt", "sub/m.txt", "z.txt"]
    assert ids("text", tmp_path, pattern="*.py") == ["skipped.py"]
    assert ids("text", tmp_path / "z.txt", tmp_path / "a.md") == ["z.txt", "a.md"]
    assert ids("text", tmp_path / "**" / "*.txt") == ["sub.txt", "sub/m.txt", "z.txt"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["site-packages"], ["a.txt", "lib/tests/bad.txt", "lib/x.txt"]),
        (["lib/tests"], ["a.txt", "lib/site-packages/b.txt", "lib/x.txt"]),
        (["lib/*"], ["a.txt"]),
        (["?.txt"], ["lib/tests/bad.txt"]),
    ],
)
def test_exclude_leaves_out_files_and_folders_by_name_or_path(
    tmp_path: Path, exclude: list[str], left: list[str]
) -> None:
    for name in ("a.txt", "lib/x.txt", "lib/site-packages/b.txt", "lib/tests/bad.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert ids("text", tmp_path, exclude=exclude) == left


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl_reads_the_same_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    raw = jsonl(ROWS)
    packed = {"jsonl": raw, "jsonl.gz": gzip.compress(raw), "jsonl.zst": zstandard.compress(raw)}[ending]
    (tmp_path / f"x.{ending}").write_bytes(packed)
    documents = read("jsonl", tmp_path)
    assert [document.text for document in documents] == ["one", "zwei ü", "three\nlines"]
    assert [document.id for document in documents] == [f"x.{ending}@{byte}" for byte in (0, 16, 40)]
    assert [raw[byte : byte + 9] for byte in (0, 16, 40)] == [b'{"text": '] * 3
    assert [document.n_bytes for document in documents] == [3, 7, 11]
    assert {document.source for document in documents} == {"here"}


@pytest.mark.parametrize(
    ("ending", "compress", "message"),
    [("gz", gzip.compress, "corrupt"), ("zst", zstandard.compress, "the last zstd frame is cut off")],
)
def test_all_members_of_a_compressed_file_are_read_and_a_truncated_one_is_an_error(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], message: str
) -> None:
    compressed = compress(jsonl(ROWS)) + compress(jsonl(ROWS[:2]))
    file = tmp_path / f"x.jsonl.{ending}"
    file.write_bytes(compressed)
    assert len(read("jsonl", file)) == 5
    file.write_bytes(compressed[:-9])
    with pytest.raises(DataError, match=rf"x\.jsonl\.{ending}: cannot be read.*{message}"):
        read("jsonl", file)


def test_a_zst_file_with_a_long_window_is_read(tmp_path: Path) -> None:
    small = {"hash_log": 6, "chain_log": 6, "search_log": 1, "strategy": zstandard.STRATEGY_FAST}
    packer = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=28, **small)
    ).compressobj()
    raw = packer.compress(jsonl(ROWS)) + packer.flush()
    assert zstandard.get_frame_parameters(raw).window_size > 1 << 27  # by default zstandard refuses such a window
    (tmp_path / "x.jsonl.zst").write_bytes(raw)
    assert len(texts("jsonl", tmp_path)) == 3


def test_long_lines_cross_the_read_buffer_intact(tmp_path: Path) -> None:
    rows = [{"text": "x" * (1 << 20)}, {"text": "y" * 3_000_000}, {"text": "z"}]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows).rstrip())
    assert texts("jsonl", tmp_path) == [row["text"] for row in rows]


@pytest.mark.timeout(20)  # joining the line at each of its 16,384 blocks would copy 512 GB, which takes minutes
def test_the_work_for_a_line_of_64_mb_is_linear_in_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 4096)
    size = 64 << 20
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "' + b"x" * size + b'"}\n{"text": "y"}')
    tracemalloc.start()
    lengths = [document.n_bytes for document in read("jsonl", tmp_path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [size, 1]
    assert peak < 5 * size  # its blocks, the line, its characters, the text


def test_all_kinds_give_the_same_documents(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    (tmp_path / "x.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub" / "x.parquet", row_group_size=2)
    for ending in ("arrow", "arrows"):
        (tmp_path / f"x.{ending}").write_bytes(arrow(table, ending, max_rows=2))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    expected = [row["text"] for row in ROWS]
    assert texts("jsonl", tmp_path / "x.jsonl") == expected
    assert texts("parquet", tmp_path / "hub") == expected
    assert texts("arrow", tmp_path / "x.arrow") == expected
    assert texts("arrow", tmp_path / "x.arrows") == expected
    assert texts("arrow", tmp_path / "saved") == expected  # the files in the cache of `datasets` look like these
    for streaming in (True, False):
        assert texts("hf", tmp_path / "hub", streaming=streaming) == expected
    assert texts("hf", tmp_path / "saved") == expected
    assert ids("parquet", tmp_path / "hub") == ["x.parquet:0", "x.parquet:1", "x.parquet:2"]
    assert ids("arrow", tmp_path / "x.arrow", tmp_path / "x.arrows") == [
        f"x.{end}:{i}" for end in ("arrow", "arrows") for i in range(3)
    ]
    assert ids("hf", tmp_path / "hub") == ["train:0", "train:1", "train:2"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_arrow_type_of_texts_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    plain = pa.array(["ü", None, "b" * 20, "ü"])
    column = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    (tmp_path / "x.arrow").write_bytes(arrow(pa.table({"text": column, "key": column}), "arrow"))
    documents = read("arrow", tmp_path, id_field="key", metadata_fields=["key"])
    assert [document.text for document in documents] == ["ü", "", "b" * 20, "ü"]
    assert [document.id for document in documents] == ["ü", "x.arrow:1", "b" * 20, "ü"]
    assert [document.metadata["key"] for document in documents] == plain.to_pylist()


ROWS_WITH_KEYS = [{"text": "x", "key": "a"}, {"text": "y", "key": None}, {"text": "z", "key": "7"}]


def written(folder: Path, rows: list[dict[str, object]]) -> dict[str, Path]:
    """Write the rows as a file of each kind that has rows, {kind: path}. For `hf` it is a folder of parquet."""
    table = pa.Table.from_pylist(rows)
    (folder / "hub").mkdir()
    (folder / "x.jsonl").write_bytes(jsonl(rows))
    (folder / "x.arrow").write_bytes(arrow(table, "arrow"))
    pq.write_table(table, folder / "hub" / "x.parquet")
    return {
        "jsonl": folder / "x.jsonl",
        "arrow": folder / "x.arrow",
        "parquet": folder / "hub" / "x.parquet",
        "hf": folder / "hub",
    }


def test_id_field_gives_the_ids_and_a_null_id_becomes_file_and_position(tmp_path: Path) -> None:
    unnamed = {"jsonl": "x.jsonl@26", "arrow": "x.arrow:1", "parquet": "x.parquet:1", "hf": "train:1"}
    for kind, path in written(tmp_path, ROWS_WITH_KEYS).items():
        assert ids(kind, path, id_field="key") == ["a", unnamed[kind], "7"]


def test_metadata_is_read_and_absent_fields_are_none(tmp_path: Path) -> None:
    rows = [
        {"text": "x", "url": "http://a", "n": 1, "more": {"k": [2]}},
        {"text": "y", "url": None, "n": 2, "more": None},
    ]
    expected = [{"url": row["url"], "n": row["n"], "more": row["more"], "nowhere": None} for row in rows]
    for kind, path in written(tmp_path, rows).items():
        for streaming in (True, False):
            documents = read(kind, path, metadata_fields=["url", "n", "more", "nowhere"], streaming=streaming)
            assert [document.metadata for document in documents] == expected, kind
        assert [document.metadata for document in read(kind, path)] == [{}, {}], kind


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "hf"])
def test_a_metadata_field_may_be_the_text_or_the_id(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, ROWS_WITH_KEYS)[kind]
    documents = read(kind, path, id_field="key", metadata_fields=["key", "text"])
    assert [document.metadata for document in documents] == [
        {"key": row["key"], "text": row["text"]} for row in ROWS_WITH_KEYS
    ]


def test_only_the_needed_columns_are_read_from_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": ["t"] * 2000, "url": ["u"] * 2000, "other": ["o" * 500] * 2000})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    place = pq.read_metadata(tmp_path / "x.parquet").row_group(0).column(2)
    raw = bytearray((tmp_path / "x.parquet").read_bytes())
    raw[place.data_page_offset : place.data_page_offset + place.total_compressed_size] = bytes(
        place.total_compressed_size
    )
    (tmp_path / "x.parquet").write_bytes(raw)
    assert [document.metadata for document in read("parquet", tmp_path, metadata_fields=["url"])] == [
        {"url": "u"}
    ] * 2000
    with pytest.raises(DataError, match="cannot be read"):  # shows that its column is damaged
        read("parquet", tmp_path, metadata_fields=["other"])


def test_bytes_that_are_not_unicode_are_replaced_and_marked(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfok\r\n")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "half a pair: \\ud800"}\n{"text": "a replacement: \\ufffd"}\n')
    damaged = pa.table({"text": pa.array([b"caf\xe9", None]).cast(pa.binary()), "url": pa.array([b"\xff", None])})
    pq.write_table(damaged, tmp_path / "x.parquet")
    unchecked = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9"))
    (tmp_path / "x.arrow").write_bytes(arrow(pa.table({"text": unchecked}), "arrow"))
    documents = [
        document
        for kind in ("text", "jsonl", "parquet", "arrow")
        for document in read(kind, tmp_path, metadata_fields=["url"])
    ]
    assert {document.id: (document.text, document.had_invalid_unicode) for document in documents} == {
        "latin.txt": ("caf\ufffd", True),
        "bom.txt": ("ok\r\n", False),
        "x.jsonl@0": ("half a pair: \ufffd", True),
        "x.jsonl@32": ("a replacement: \ufffd", False),
        "x.parquet:0": ("caf\ufffd", True),
        "x.parquet:1": ("", False),
        "x.arrow:0": ("caf\ufffd", True),
    }
    assert [document.metadata["url"] for document in read("parquet", tmp_path, metadata_fields=["url"])] == [
        "\ufffd",
        None,
    ]


def test_any_fsspec_address_is_read_and_globs_are_sorted() -> None:
    table = pa.Table.from_pylist(ROWS)
    parquet = pa.BufferOutputStream()
    pq.write_table(table, parquet)
    files = {
        "/books/b.txt": b"second",
        "/books/a.txt": b"first",
        "/rows/b/x.jsonl.zst": zstandard.compress(jsonl(ROWS)),
        "/rows/a/x.jsonl.gz": gzip.compress(jsonl(ROWS[:1])),
        "/rows/x.jsonl": jsonl(ROWS[1:]),
        "/rows/x.parquet": parquet.getvalue().to_pybytes(),
        "/rows/x.arrow": arrow(table, "arrow"),
        "/rows/x.arrows": arrow(table, "arrows"),
    }
    fsspec.filesystem("memory").pipe(files)
    expected = [row["text"] for row in ROWS]
    assert texts("text", "memory://books") == ["first", "second"]
    assert texts("text", "memory://books/*.txt") == ["first", "second"]
    assert texts("jsonl", "memory://rows/*/*.jsonl.*") == expected[:1] + expected
    assert ids("jsonl", "memory://rows") == [
        "a/x.jsonl.gz@0",
        "b/x.jsonl.zst@0",
        "b/x.jsonl.zst@16",
        "b/x.jsonl.zst@40",
        "x.jsonl@0",
        "x.jsonl@24",
    ]
    assert texts("parquet", "memory://rows") == expected
    assert texts("arrow", "memory://rows") == expected * 2


def corrupt_parquet(folder: Path) -> None:
    pq.write_table(
        pa.table({"text": ["some text"] * 5000}), folder / "bad.parquet", compression="none", use_dictionary=False
    )
    raw = bytearray((folder / "bad.parquet").read_bytes())
    raw[: len(raw) // 2] = bytes(len(raw) // 2)
    (folder / "bad.parquet").write_bytes(raw)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("text", {}, r"no file below .* matches \*\.txt, \*\.md"),
        ("arrow", {}, r"no file below .* matches \*\.arrow, \*\.arrows"),
        ("jsonl", {"x.jsonl": MISPLACED}, r"x\.jsonl:2: broken JSON \(Expecting value at column \d+\)"),
        ("jsonl", {"x.jsonl.gz": gzip.compress(b"\n\n" + MISPLACED)}, r"x\.jsonl\.gz:4: broken JSON"),
        ("jsonl", {"x.jsonl": b'{"text": "a", "n": ' + b"[" * 100_000}, r"x\.jsonl:1: broken JSON \(.*recursion"),
        ("jsonl", {"x.jsonl": b'{"text": "a", "n": ' + b"1" * 5_000 + b"}"}, r"x\.jsonl:1: broken JSON \(.*digits"),
        (
            "jsonl",
            {"x.jsonl": b'{"content": "a", "url": "b"}\n'},
            r"x\.jsonl:1: text_field=text does not exist; it has: content, url",
        ),
        ("jsonl", {"x.jsonl": b'["a"]\n'}, r"x\.jsonl:1: every line must be a JSON object, this one is a list"),
        ("jsonl", {"x.jsonl": b'{"text": 3}\n'}, r"x\.jsonl:1: text is a int, not text"),
        ("parquet", {"x.parquet": b"PAR1 not really"}, r"x\.parquet: cannot be read, it may be corrupt"),
        ("arrow", {"x.arrow": b"ARROW1 not really"}, r"x\.arrow: cannot be read, it may be corrupt"),
        ("arrow", {"x.arrow": b"not at all"}, r"x\.arrow: cannot be read, it may be corrupt"),
        ("arrow", {"x.arrow": b""}, r"x\.arrow: cannot be read, it may be corrupt"),
        (
            "arrow",
            {"x.arrows": arrow(pa.table({"text": ["a" * 1000]}), "arrows")[:-200]},
            r"x\.arrows: cannot be read, it may be corrupt",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_file_and_values(
    tmp_path: Path, kind: str, content: dict[str, bytes], message: str
) -> None:
    for name, raw in content.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read(kind, tmp_path)
    assert "\n" not in str(error.value)


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    corrupt_parquet(tmp_path)
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        read("parquet", tmp_path)


def test_an_arrow_file_whose_offsets_point_outside_its_bytes_is_named(tmp_path: Path) -> None:
    raw = arrow(pa.table({"text": ["ab", "cd"]}), "arrow")
    offsets = b"\0\0\0\0\2\0\0\0\4\0\0\0"
    assert raw.count(offsets) == 1
    (tmp_path / "x.arrow").write_bytes(raw.replace(offsets, b"\0\0\0\0\xff\xff\xff\x7f\4\0\0\0"))
    with pytest.raises(DataError, match=r"x\.arrow: cannot be read"):
        read("arrow", tmp_path)


def test_a_missing_column_is_reported_with_the_available_ones(tmp_path: Path) -> None:
    table = pa.table({"content": ["a"], "n": [1]})
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub" / "x.parquet")
    (tmp_path / "x.arrow").write_bytes(arrow(table, "arrow"))
    for kind in ("parquet", "arrow"):
        with pytest.raises(DataError, match=rf"x\.{kind}: text_field=text does not exist; it has: content, n"):
            read(kind, tmp_path)
        with pytest.raises(DataError, match=rf"x\.{kind}: id_field=key does not exist; it has: content, n"):
            read(kind, tmp_path, text_field="content", id_field="key")
        with pytest.raises(DataError, match=r"column n holds int64, not text"):
            read(kind, tmp_path, text_field="n")
    with pytest.raises(DataError, match=r"text_field=text does not exist; it has: content, n"):
        read("hf", tmp_path / "hub")


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "arrow"])
def test_a_missing_path_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"data\.sources: .*/nowhere does not exist"):
        read(kind, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file matches .*/no\*where"):
        read(kind, tmp_path / "no*where")


def test_an_unknown_protocol_or_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read nope://x"):
        read("text", "nope://x")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"cannot open dataset .*split=test"):
        read("hf", tmp_path, split="test")


def test_reading_imports_neither_torch_nor_the_heavy_readers() -> None:
    code = "import data_pipeline.text.chunks, sys; print(*sys.modules)"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not modules & {"torch", "pyarrow", "datasets"}
    assert "data_pipeline.text.columnar" in modules  # shows that the list is complete
