"""Documents with too many undecodable bytes are dropped as not text, and counted."""

import contextlib
import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from format_examples import OTHER_FORMATS, read
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.prepared import PreparedData
from data_pipeline.text.sources import DEFECTS, NULS, UNDECODED, decode_bytes


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
