"""Text and jsonl files that are compressed, in another encoding, or not text at all."""

import codecs
import gzip
import json
import struct
from pathlib import Path

import fsspec
import pytest
import zstandard
from format_examples import OTHER_FORMATS, read

from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig
from data_pipeline.text.chunks import read_chunk, split_into_chunks
from data_pipeline.text.files import list_files
from data_pipeline.text.formats import HEAD_BYTES, detect_binary_format

TEXT = "Grüße aus Köln, 日本語 and naïve text.\r\n" * 40


LINES = "".join(json.dumps({"text": f"{i} {TEXT}"}, ensure_ascii=False) + "\n" for i in range(3))


SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"abcde"


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
