import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import DataError
from data_pipeline.files import list_files
from data_pipeline.settings import SourceConfig
from data_pipeline.sources import Document, read_documents

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "three\nlines"}]


def read(kind: str, *paths: object, **settings: object) -> list[Document]:
    return list(read_documents(SourceConfig.model_validate({"kind": kind, "paths": [str(path) for path in paths], **settings})))


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_folder_of_text_is_read_in_sorted_order_whatever_the_order_of_creation(tmp_path: Path) -> None:
    for name in ("z.txt", "a.md", "sub/m.txt", "sub.txt", "skipped.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in read("text", tmp_path)] == ["a.md", "sub.txt", "sub/m.txt", "z.txt"]
    assert [document.id for document in read("text", tmp_path, pattern="*.py")] == ["skipped.py"]
    assert [document.id for document in read("text", tmp_path / "z.txt", tmp_path / "a.md")] == ["z.txt", "a.md"]
    assert [document.id for document in read("text", tmp_path / "**" / "*.txt")] == ["sub.txt", "sub/m.txt", "z.txt"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["site-packages"], ["a.txt", "lib/tests/bad.txt", "lib/x.txt"]),
        (["lib/tests"], ["a.txt", "lib/site-packages/b.txt", "lib/x.txt"]),
        (["lib/*"], ["a.txt"]),
        (["?.txt"], ["lib/tests/bad.txt"]),
    ],
)
def test_exclude_leaves_out_files_and_folders_by_name_or_path(tmp_path: Path, exclude: list[str], left: list[str]) -> None:
    for name in ("a.txt", "lib/x.txt", "lib/site-packages/b.txt", "lib/tests/bad.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in read("text", tmp_path, exclude=exclude)] == left


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl_reads_the_same_plain_and_compressed(tmp_path: Path, ending: str) -> None:
    raw = jsonl(ROWS)
    packed = {"jsonl": raw, "jsonl.gz": gzip.compress(raw), "jsonl.zst": zstandard.compress(raw)}[ending]
    (tmp_path / f"x.{ending}").write_bytes(packed)
    documents = read("jsonl", tmp_path)
    assert [document.text for document in documents] == ["one", "zwei ü", "three\nlines"]
    assert [document.id for document in documents] == [f"x.{ending}:{line}" for line in (1, 2, 3)]
    assert [document.n_bytes for document in documents] == [3, 7, 11]


def test_all_frames_of_a_zst_file_are_read_and_a_cut_one_is_an_error(tmp_path: Path) -> None:
    whole = zstandard.compress(jsonl(ROWS)) + zstandard.compress(jsonl(ROWS[:2]))
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(whole)
    assert len(read("jsonl", file)) == 5
    file.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"x\.jsonl\.zst.*cut off"):
        read("jsonl", file)


def test_a_cut_gz_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS))[:-12])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz.*corrupt"):
        read("jsonl", tmp_path)


def test_long_lines_cross_the_read_buffer_intact(tmp_path: Path) -> None:
    rows = [{"text": "x" * (1 << 20)}, {"text": "y" * 3_000_000}, {"text": "z"}]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows).rstrip())
    assert [document.text for document in read("jsonl", tmp_path)] == [row["text"] for row in rows]


def test_parquet_and_a_local_data_set_give_the_same_documents_as_jsonl(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "hub" / "x.parquet", row_group_size=2)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    texts = [document.text for document in read("jsonl", tmp_path / "x.jsonl")]
    assert [document.text for document in read("parquet", tmp_path / "hub")] == texts
    assert [document.text for document in read("hf", tmp_path / "hub")] == texts
    assert [document.text for document in read("hf", tmp_path / "saved")] == texts
    assert [document.id for document in read("parquet", tmp_path / "hub")] == ["x.parquet:0", "x.parquet:1", "x.parquet:2"]
    assert [document.id for document in read("hf", tmp_path / "hub")] == ["train:0", "train:1", "train:2"]


def test_id_field_names_the_documents(tmp_path: Path) -> None:
    rows = [{"text": "x", "key": 7}, {"text": "y", "key": 8}]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for kind in ("jsonl", "parquet"):
        assert [document.id for document in read(kind, tmp_path, id_field="key")] == ["7", "8"]


def test_a_document_whose_id_is_null_is_numbered_by_file_and_position(tmp_path: Path) -> None:
    rows = [{"text": "x", "key": "a"}, {"text": "y", "key": None}, {"text": "z", "key": None}]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / "x.parquet")
    assert [document.id for document in read("jsonl", tmp_path, id_field="key")] == ["a", "x.jsonl:2", "x.jsonl:3"]
    assert [document.id for document in read("parquet", tmp_path, id_field="key")] == ["a", "hub/x.parquet:1", "hub/x.parquet:2"]
    assert [document.id for document in read("hf", tmp_path / "hub", id_field="key")] == ["a", "train:1", "train:2"]


def test_bytes_that_are_not_unicode_are_replaced_and_marked(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfok\r\n")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "half a pair: \\ud800"}\n{"text": "a replacement: \\ufffd"}\n')
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9", None]).cast(pa.binary())}), tmp_path / "x.parquet")
    found = {document.id: (document.text, document.repaired) for kind in ("text", "jsonl", "parquet") for document in read(kind, tmp_path)}
    assert found == {
        "latin.txt": ("caf\ufffd", True),
        "bom.txt": ("ok\r\n", False),
        "x.jsonl:1": ("half a pair: \ufffd", True),
        "x.jsonl:2": ("a replacement: \ufffd", False),
        "x.parquet:0": ("caf\ufffd", True),
        "x.parquet:1": ("", False),
    }


def test_any_fsspec_address_is_read() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe({"/books/b.txt": b"second", "/books/a.txt": b"first"})
    assert [document.text for document in read("text", "memory://books")] == ["first", "second"]


def test_read_counts_the_bytes_of_the_files_up_to_their_sum(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345")
    (tmp_path / "b.txt").write_text("123")
    source = SourceConfig(kind="text", paths=(str(tmp_path),))
    assert [document.read for document in read_documents(source)] == [5, 8]
    assert sum(file.size for file in list_files(source)) == 8


def corrupt_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["some text"] * 5000}), folder / "bad.parquet", compression="none", use_dictionary=False)
    raw = bytearray((folder / "bad.parquet").read_bytes())
    raw[: len(raw) // 2] = bytes(len(raw) // 2)
    (folder / "bad.parquet").write_bytes(raw)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("text", {}, r"no file below .* matches \*\.txt, \*\.md"),
        ("jsonl", {"x.jsonl": b'{"text": "a"}\n{"text": \n'}, r"x\.jsonl:2: broken JSON"),
        ("jsonl", {"x.jsonl": b'{"content": "a", "url": "b"}\n'}, r"x\.jsonl:1: text_field=text is not there; it has: content, url"),
        ("jsonl", {"x.jsonl": b'["a"]\n'}, r"x\.jsonl:1: every line must be a JSON object, this one is a list"),
        ("jsonl", {"x.jsonl": b'{"text": 3}\n'}, r"x\.jsonl:1: text is a int, not text"),
        ("parquet", {"x.parquet": b"PAR1 not really"}, r"x\.parquet: cannot be read, it may be corrupt"),
    ],
)
def test_bad_input_is_one_line_that_names_file_and_values(tmp_path: Path, kind: str, content: dict[str, bytes], message: str) -> None:
    for name, raw in content.items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read(kind, tmp_path)
    assert "\n" not in str(error.value)


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path: Path) -> None:
    corrupt_parquet(tmp_path)
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        read("parquet", tmp_path)


def test_a_missing_column_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: text_field=text is not there; it has: content, n"):
        read("parquet", tmp_path)
    with pytest.raises(DataError, match=r"text_field=text is not there; it has: content, n"):
        read("hf", tmp_path)
    with pytest.raises(DataError, match=r"column n holds int64, not text"):
        read("parquet", tmp_path, text_field="n")


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_missing_path_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"data\.sources: .*/nowhere does not exist"):
        read(kind, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no file matches .*/no\*where"):
        read(kind, tmp_path / "no*where")


def test_an_unknown_protocol_or_split_and_empty_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read nope://x"):
        read("text", "nope://x")
    with pytest.raises(DataError, match="has no paths"):
        read("text")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"cannot open data set .*split=test"):
        read("hf", tmp_path, split="test")


def test_the_pipeline_imports_neither_torch_nor_the_heavy_readers() -> None:
    code = "import data_pipeline.tokenize, data_pipeline.loader, data_pipeline.inspect, data_pipeline.verify, sys; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not modules & {"torch", "pyarrow", "datasets"}
    assert "tokenizers" in modules  # the list is a real one
