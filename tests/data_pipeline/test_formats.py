"""Text and jsonl files that are compressed, in another encoding, or not text at all."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.prepared import PreparedData
from data_pipeline.text.chunks import read_chunk, split_into_chunks
from data_pipeline.text.files import list_files
from data_pipeline.text.formats import HEAD_BYTES, detect_binary_format
from data_pipeline.text.sources import DEFECTS, NULS, UNDECODED, Document, decode_bytes

TEXT = "Grüße aus Köln, 日本語 and naïve text.\r\n" * 40
LINES = "".join(json.dumps({"text": f"{i} {TEXT}"}, ensure_ascii=False) + "\n" for i in range(3))
SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"abcde"


def read(kind: str, *paths: object, chunk: int = 1 << 30, **more: object) -> list[Document]:
    source = SourceConfig.model_validate({"kind": kind, "paths": [str(path) for path in paths], **more})
    return [
        document
        for chunk in split_into_chunks(0, "s", source, list_files(source), chunk)
        for document in read_chunk(chunk, source)
    ]


def zstd(text: str) -> bytes:
    return zstandard.compress(text.encode())


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("x.txt", TEXT.encode()),
        ("x.txt", TEXT.encode("utf-8-sig")),
        ("x.txt", TEXT.encode("utf-16")),
        ("x.txt", codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")),
        ("x.txt", TEXT.encode("utf-32")),
        ("x.txt", codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be")),
        ("x.txt.gz", gzip.compress(TEXT.encode())),
        ("x.md.gz", gzip.compress(TEXT[:99].encode()) + gzip.compress(TEXT[99:].encode())),
        ("x.txt.gz", gzip.compress(TEXT.encode("utf-16"))),
        ("x.txt.zst", zstd(TEXT)),
        ("x.md.zst", SKIPPABLE + zstd(TEXT[:99]) + SKIPPABLE + zstd(TEXT[99:]) + SKIPPABLE),
        ("x.txt", gzip.compress(TEXT.encode())),
        ("x.txt", zstd(TEXT)),
    ],
)
@pytest.mark.parametrize("place", ["folder", "memory"])
def test_text_is_read_compressed_or_not_in_any_encoding_with_a_byte_order_mark(
    tmp_path: Path, name: str, raw: bytes, place: str
) -> None:
    folder = f"memory://{tmp_path}" if place == "memory" else str(tmp_path)
    with fsspec.open(f"{folder}/{name}", "wb") as stream:
        stream.write(raw)
    for chunk in (1, 1 << 30):  # none of these files can be split
        (document,) = read("text", folder, chunk=chunk)
        assert (document.text, document.id, document.had_invalid_unicode, document.defect) == (TEXT, name, False, None)
        assert document.n_bytes == len(TEXT.encode())
        assert document.bytes_read == len(raw)


@pytest.mark.parametrize("raw", [b"", b"\xef\xbb\xbf", b"\xff\xfe", gzip.compress(b"")])
@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
def test_a_file_without_text_is_an_empty_document(tmp_path: Path, name: str, raw: bytes) -> None:
    if name == "x.txt.gz" and raw[:1] in (b"\xef", b"\xff"):
        raw = gzip.compress(raw)
    (tmp_path / name).write_bytes(raw)
    assert [(document.text, document.defect) for document in read("text", tmp_path)] == [("", None)]


TABLE = pa.table({"text": ["a" * 100] * 3})


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    sink = io.BytesIO()
    write(sink)
    return sink.getvalue()


def zipped(sink: io.BytesIO) -> None:
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", "x")


def tarred(sink: io.BytesIO) -> None:
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


def arrow(new: Callable[..., pa.ipc.RecordBatchStreamWriter]) -> bytes:
    sink = pa.BufferOutputStream()
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


def database(sink: io.BytesIO) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (x)")
    sink.write(connection.serialize())


OTHER_FORMATS = {
    "bzip2": bz2.compress(b"a"),
    "xz": lzma.compress(b"a"),
    "lzma": lzma.compress(b"a", lzma.FORMAT_ALONE),
    "a zip archive": written(zipped),
    "a tar archive": written(tarred),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\4",
    "a rar archive": b"Rar!\x1a\x07\x01\0",
    "a PDF document": b"%PDF-1.4\n1 0 obj\n",
    "an old Microsoft Office document": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0",
    "a PNG image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a JPEG image": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    "a GIF image": b"GIF89a\x01\0\x01\0",
    "a WebP image": b"RIFF\x24\0\0\0WEBPVP8 ",
    "a parquet file": written(lambda sink: pq.write_table(TABLE, sink)),
    "an Arrow file": arrow(pa.ipc.new_file),
    "an Arrow file ": arrow(pa.ipc.new_stream),
    "an Avro file": b"Obj\x01\x04\x16avro.schema",
    "an ORC file": written(lambda sink: orc.write_table(TABLE, sink)),
    "an SQLite database": written(database),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n\0",
    "a NumPy array": written(lambda sink: np.save(sink, np.arange(3))),
    "a pickle": pickle.dumps({"a": 1}, 2),
    "a pickle ": pickle.dumps({"a": 1}),
    "a safetensors file": struct.pack("<Q", 20) + b'{"__metadata__":{}}',
    "an ELF program": b"\x7fELF\2\1\1\0",
    "a Windows program": b"MZ\x90\0\3\0",
    "a BMP image": b"BM\x46\0\0\0\0\0\0\0\x36",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n",
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_file_that_is_not_text_is_refused_with_its_name_and_a_remedy(tmp_path: Path, name: str) -> None:
    for file, raw in (("x.txt", OTHER_FORMATS[name]), ("x.txt.gz", gzip.compress(OTHER_FORMATS[name]))):
        (tmp_path / file).write_bytes(raw)
        with pytest.raises(DataError, match=rf"{file} is {name.strip()}.*, not text; .*exclude") as error:
            read("text", tmp_path / file)
        assert str(error.value).isprintable()
    (tmp_path / "x.jsonl").write_bytes(OTHER_FORMATS[name])
    with pytest.raises(DataError, match=rf"x\.jsonl:1: .*; the file is {name.strip()}[^;]*: .") as error:
        read("jsonl", tmp_path / "x.jsonl")
    assert "fix the line" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "BMW is not a bitmap",
        "MZ",
        "GIF89a is a format",
        "ORC",
        "ID3 tags",
        "PAR1",
        "PK",
        "RIFF and WEBP",
        "ustar" * 60,
        "x" * 600,
    ],
)
def test_text_that_begins_like_another_format_is_text(text: str) -> None:
    controls = (
        [f"{text} a stray\x08control character".encode()]
        if len(text) > 2 and text.split()[0] in ("BMW", "MZ", "ID3")
        else []
    )
    for raw in (text.encode(), f"{text} für".encode("latin-1"), f"{text} für".encode(), *controls):
        assert detect_binary_format(raw[:HEAD_BYTES]) is None


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("x.txt.gz", b"plain", r"x\.txt\.gz is not compressed, although it is named \.gz; rename it"),
        ("x.txt.zst", b"plain", r"x\.txt\.zst is not compressed, although it is named \.zst; rename it"),
        (
            "x.txt.gz",
            gzip.compress(TEXT.encode())[:-9],
            r"x\.txt\.gz: cannot be read, it may be corrupt .*\(Compressed file ended",
        ),
        (
            "x.txt.zst",
            zstd(TEXT)[:-9],
            r"x\.txt\.zst: cannot be read, it may be corrupt .*\(the last zstd frame is cut off\)",
        ),
        (
            "x.txt.gz",
            gzip.compress(gzip.compress(b"a")),
            r"x\.txt\.gz is compressed twice, the second time by gzip; unpack it once",
        ),
    ],
)
def test_compressed_text_that_is_truncated_or_misnamed_is_a_one_line_error(
    tmp_path: Path, name: str, raw: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read("text", tmp_path)


@pytest.mark.parametrize(
    ("name", "raw", "advice"),
    [
        ("x.jsonl", gzip.compress(LINES.encode()), "the file is gzip: name it .gz"),
        ("x.jsonl", zstd(LINES), "the file is zstd: name it .zst"),
        ("x.jsonl.gz", zstd(LINES), "it is zstd: name it .zst"),
        (
            "x.jsonl.gz",
            gzip.compress(gzip.compress(LINES.encode())),
            "is compressed twice, the second time by gzip: unpack it once",
        ),
        (
            "x.jsonl.zst",
            zstandard.compress(gzip.compress(LINES.encode())),
            "is compressed twice, the second time by gzip: unpack it once",
        ),
        ("x.jsonl.gz", LINES.encode(), "it is not gzip, although its name says so: rename it"),
        ("x.jsonl.zst", LINES.encode(), "it is not zstd, although its name says so: rename it"),
        ("x.jsonl", LINES.encode("utf-16"), "the file is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"),
        ("x.jsonl", LINES.encode("utf-32"), "the file is UTF-32: convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)"),
        ("x.jsonl.gz", gzip.compress(LINES.encode("utf-16")), "the file is UTF-16: convert it to UTF-8"),
        (
            "x.jsonl",
            b'{"text": "a"}'.decode().encode("utf-16-le"),
            "the file is perhaps UTF-16 without a byte-order mark: convert it",
        ),
        ("x.jsonl", json.dumps([{"text": "a"}] * 9).encode(), "the file is a JSON array: one object a line is needed"),
        (
            "x.jsonl",
            json.dumps([{"text": "a"}] * 9, indent=1).encode(),
            "the file is a JSON array: one object a line is needed",
        ),
        (
            "x.jsonl",
            json.dumps({"text": "a"}, indent=1).encode(),
            "the file is JSON over several lines: one object a line is needed",
        ),
        ("x.jsonl.zst", zstd(json.dumps([{"text": "a"}])), "the file is a JSON array: one object a line is needed"),
        ("x.jsonl", b"<!DOCTYPE html>\n<html>\n", "the file is HTML or XML"),
        ("x.jsonl", bytes(4096), "the file is nothing but NUL bytes, as a crash leaves them"),
        ("x.jsonl", LINES.encode() + bytes(99), "fix the line"),
        ("x.jsonl", b"text,url\na,b\n", "fix the line"),
    ],
)
def test_the_advice_on_broken_jsonl_follows_the_first_bytes(tmp_path: Path, name: str, raw: bytes, advice: str) -> None:
    (tmp_path / name).write_bytes(raw)
    for chunk in (1 << 30, 64):  # a plain file is split, and any slice may be read first
        with pytest.raises(DataError) as error:
            read("jsonl", tmp_path, chunk=chunk)
        assert advice in str(error.value)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("raw", [LINES.encode("utf-16"), json.dumps([{"text": TEXT}] * 3, indent=1).encode()])
def test_any_slice_of_a_file_gives_the_advice_of_its_first_bytes(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(raw)
    source = SourceConfig(kind="jsonl", paths=(str(tmp_path),))
    *_, second, _ = (chunk for chunk in split_into_chunks(0, "s", source, list_files(source), len(raw) // 3))
    with pytest.raises(
        DataError,
        match=r"x\.jsonl, byte \d+: broken JSON .*; the file is (UTF-16: convert it|a JSON array: one object)",
    ):
        list(read_chunk(second, source))


@pytest.mark.parametrize(
    ("raw", "defect", "repaired"),
    [
        (b"word " * 60 + b"\xff", None, True),
        (b"caf\xe9", None, True),  # a single bad byte is allowed, however short the text
        (b"word " * 20 + b"\xff\xff", None, True),  # 2 of 102
        (b"word " * 19 + b"\xff\xff", UNDECODED, True),  # 2 of 97
        ("Größe, Äpfel, übermüdet".encode("latin-1"), UNDECODED, True),
        ("日本語のテキスト".encode("shift-jis"), UNDECODED, True),
        ("中文文本".encode("gb18030"), UNDECODED, True),
        ("中文文本".encode("utf-16-le"), UNDECODED, True),
        (b"plain text".decode().encode("utf-16-le"), NULS, False),
        (b"plain text".decode().encode("utf-32-le"), NULS, False),
        (bytes(1000), NULS, False),
        (b"word " * 60 + b"\0", None, False),
        ("a replacement: \ufffd\ufffd\ufffd".encode(), None, False),
        (b"\xff\xfe" + "ab\ud800\ud800\ud800".encode("utf-16-le", "surrogatepass"), UNDECODED, True),
        (b"\xff\xfe" + "odd length".encode("utf-16-le") + b"x", None, True),
    ],
)
def test_a_document_that_lost_more_than_2_percent_in_decoding_is_not_text(
    tmp_path: Path, raw: bytes, defect: str | None, repaired: bool
) -> None:
    (tmp_path / "x.txt").write_bytes(raw)
    (document,) = read("text", tmp_path)
    assert (document.defect, document.had_invalid_unicode) == (defect, repaired)


def test_defects_of_rows_depend_only_on_their_text(tmp_path: Path) -> None:
    lines = [
        '{"text": "Größe Äpfel", "url": "a"}'.encode("latin-1"),
        '{"text": "fine", "url": "ÄÖÜäöü"}'.encode("latin-1"),
        b'{"text": "\\ud800\\ud800", "url": "a"}',
        b'{"text": "fine", "url": "\\ud800\\ud800"}',
        b'{"text": "a\\u0000\\u0000", "url": "a"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    pq.write_table(
        pa.table({"text": pa.array(["Größe Äpfel".encode("latin-1"), b"fine", None])}), tmp_path / "x.parquet"
    )
    defects = [document.defect for document in read("jsonl", tmp_path, metadata_fields=["url"])]
    assert defects == [UNDECODED, None, UNDECODED, None, NULS]
    assert [document.defect for document in read("parquet", tmp_path)] == [UNDECODED, None, None]


@given(
    st.lists(
        st.sampled_from([b"a", "ü".encode(), "漢".encode(), "\ufffd".encode(), b"\xff", b"\xe9", b"\xe6\xbc"]),
        max_size=30,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_characters_that_decoding_lost_are_counted_exactly(pieces: list[bytes]) -> None:
    raw = b"".join(pieces)
    text, lost = decode_bytes(raw)
    assert lost == text.count("\ufffd") - raw.count("\ufffd".encode())
    assert text == raw.decode(errors="replace")


@given(
    head=st.sampled_from(
        [*OTHER_FORMATS.values(), b"", b"\xff\xfe", b"\xef\xbb\xbf", gzip.compress(b"a"), zstandard.compress(b"a")]
    ),
    end=st.binary(),
)
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_one_document_or_a_one_line_error(head: bytes, end: bytes) -> None:
    fsspec.filesystem("memory").pipe("/any/x.txt", head + end)
    with contextlib.suppress(DataError):  # any other exception fails the test
        (document,) = read("text", "memory://any/x.txt")
        assert document.n_bytes == len(document.text.encode())


def prepare_source(tmp_path: Path, source: SourceConfig, *, keep_rejects: bool = False) -> PreparedData:
    config = PrepareConfig(sources=(source,), vocab_size=300, validation_fraction=0, workers=1)
    return prepare(tmp_path / "data", config, keep_rejects=keep_rejects)


def test_documents_that_are_not_text_are_dropped_counted_and_reported(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(5):
        (raw / f"{i}.txt").write_text(f"good text number {i}")
    (raw / "latin.txt").write_bytes("Größe, Äpfel, übermüdet".encode("latin-1"))
    (raw / "jis.txt").write_bytes("日本語のテキスト".encode("shift-jis"))
    (raw / "utf16.txt").write_bytes("no mark".encode("utf-16-le"))
    (raw / "marked.txt").write_bytes("a good one as well".encode("utf-16"))
    (raw / "empty.txt").write_bytes(b"")
    prepared = prepare_source(tmp_path, SourceConfig(kind="text", paths=(str(raw),)), keep_rejects=True)
    (source,) = prepared.splits["train"].sources
    assert (source.documents, source.dropped) == (6, {"empty": 1, UNDECODED: 2, NULS: 1})
    assert source.repaired == {}
    (note,) = (note for note in prepared.notes if "no text" in note)
    assert note.startswith(
        "raw: 3 documents dropped as no text, because more than 2% of the characters could not be decoded or are NUL; "
    )
    assert "iconv -f LATIN1 -t UTF-8" in note
    (rejects,) = (tmp_path / "data" / "rejects").iterdir()
    rows = [
        json.loads(line)
        for line in zstandard.ZstdDecompressor().stream_reader(rejects.read_bytes()).read().splitlines()
    ]
    assert {row["id"] for row in rows if row["reason"] in DEFECTS} == {"latin.txt", "jis.txt", "utf16.txt"}


def test_with_filters_documents_that_are_not_text_are_dropped_for_the_same_reasons(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "' + b"\xe9" * 40 + b'"}\n{"text": "long enough to be kept"}\n')
    prepared = prepare_source(
        tmp_path, SourceConfig(kind="jsonl", paths=(str(tmp_path / "x.jsonl"),), filters=("length",))
    )
    (source,) = prepared.splits["train"].sources
    assert (source.documents, source.dropped) == (1, {UNDECODED: 1})


def test_preparing_a_file_that_is_not_text_exits_with_2_and_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main

    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("text")
    (tmp_path / "raw" / "b.txt").write_bytes(OTHER_FORMATS["a PNG image"])
    (tmp_path / "p.yaml").write_text(
        f"data: {{path: {tmp_path}/data, workers: 1, sources: [{{kind: text, paths: [{tmp_path}/raw]}}]}}"
    )
    monkeypatch.setattr("sys.argv", ["pretrain", "data", "prepare", str(tmp_path / "p.yaml")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert (
        capfd.readouterr().err == f"error: {tmp_path}/raw/b.txt is a PNG image, not text; leave it out with `exclude`\n"
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("tokenizer", ["trained", "existing"])
def test_if_nothing_is_left_the_reasons_and_the_remedy_are_reported(tmp_path: Path, tokenizer: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text("some text to train a tokenizer on")
    prepare(
        tmp_path / "first",
        PrepareConfig(sources=(SourceConfig(kind="text", paths=(str(raw),)),), vocab_size=300, validation_fraction=0),
    )
    (raw / "a.txt").write_bytes("Größe Äpfel".encode("latin-1"))
    (raw / "b.txt").write_bytes(b"")
    settings = {"tokenizer": tmp_path / "first" / "tokenizer.json"} if tokenizer == "existing" else {"vocab_size": 300}
    config = PrepareConfig(
        sources=(SourceConfig(kind="text", paths=(str(raw),)),), validation_fraction=0, workers=1, **settings
    )
    message = (
        r"hold no text to .* \(documents read: 1 empty, 1 undecodable\): text .*raw; "
        r"convert it to UTF-8 if it is text \(iconv -f LATIN1"
    )
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "data", config)
