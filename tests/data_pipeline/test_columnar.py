"""Any parquet file, Arrow file or dataset that a library can write gives documents or a one-line error."""

import datetime
import decimal
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig
from data_pipeline.text import columnar
from data_pipeline.text.chunks import read_chunk, split_into_chunks
from data_pipeline.text.files import list_files
from data_pipeline.text.sources import Document, explain_read_errors

TEXTS = pa.array(["one", "zwei", None])
ENDINGS = ["parquet", "arrow", "arrows"]


def read(path: Path, chunk: int = 1 << 30, **more: object) -> list[Document]:
    kind = {".parquet": "parquet", ".arrow": "arrow", ".arrows": "arrow"}.get(path.suffix, "hf")
    source = SourceConfig.model_validate({"kind": kind, "paths": [str(path)], **more})
    return [
        document
        for chunk in split_into_chunks(0, "s", source, list_files(source), chunk)
        for document in read_chunk(chunk, source)
    ]


def texts(path: Path, **more: object) -> list[str]:
    """Return the texts of a file, after checking that reading it in as many slices as possible gives the same."""
    documents = [document.text for document in read(path, **more)]
    assert [document.text for document in read(path, chunk=1, **more)] == documents
    return documents


def failure(path: Path, **more: object) -> str:
    """Return the one-line error of reading a file, after checking that it is the same in slices."""
    lines = []
    for chunk in (1 << 30, 1):
        with pytest.raises(DataError) as error:
            read(path, chunk=chunk, **more)
        lines.append(str(error.value))
    assert lines[0] == lines[1]
    assert lines[0].isprintable()
    return lines[0].removeprefix(f"{path}: ")


def write(table: pa.Table, folder: Path, ending: str) -> Path:
    path = folder / f"x.{ending}"
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with (pa.ipc.new_file if ending == "arrow" else pa.ipc.new_stream)(str(path), table.schema) as writer:
            writer.write_table(table, 2)
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_duplicated_column_is_an_error_only_if_it_is_read(tmp_path: Path, ending: str) -> None:
    twice = pa.Table.from_arrays([TEXTS, TEXTS, pa.array([1, 2, 3])], names=["text", "text", "n"])
    path = write(twice, tmp_path, ending)
    message = "2 columns are called text; set {} to another, or write the file with one of them"
    assert failure(path) == message.format("text_field")
    other = write(pa.Table.from_arrays([TEXTS, TEXTS, TEXTS], names=["text", "more", "more"]), tmp_path, ending)
    assert texts(other) == ["one", "zwei", ""]
    assert failure(other, id_field="more") == message.format("id_field").replace("text;", "more;")
    assert failure(other, metadata_fields=["more"]) == message.format("metadata_fields").replace("text;", "more;")


STRINGS = {
    "null": pa.nulls(3),
    "dictionary of large strings": pa.array(["one", "zwei", None], pa.large_string()).dictionary_encode(),
    "extension of strings": pa.ExtensionArray.from_storage(pa.json_(), TEXTS),
    "binary view": TEXTS.cast(pa.string_view()).cast(pa.binary_view()),
    "run-end encoded": pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3], pa.int32()), TEXTS),
}


@pytest.mark.parametrize(
    ("name", "ending"),
    # Parquet has no run-end encoding.
    [(name, ending) for name in STRINGS for ending in ENDINGS if (name, ending) != ("run-end encoded", "parquet")],
)
def test_strings_are_read_in_every_arrow_encoding(tmp_path: Path, name: str, ending: str) -> None:
    path = write(pa.table({"text": STRINGS[name]}), tmp_path, ending)
    assert texts(path) == (["", "", ""] if name == "null" else ["one", "zwei", ""])


COLUMNS = {
    "struct<a: string>": pa.array([{"a": "x"}] * 3),
    "list<": pa.array([["x"]] * 3),
    "map<string, string": pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string())),
    "fixed_size_binary[4]": pa.array([b"abcd"] * 3, pa.binary(4)),
    "decimal128(2, 1)": pa.array([decimal.Decimal("1.1")] * 3),
    "timestamp[us]": pa.array([datetime.datetime(2026, 1, 1)] * 3),
    "extension<arrow.uuid>": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16] * 3, pa.binary(16))),
    "bool": pa.array([True] * 3),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_that_holds_no_strings_is_named_with_its_type(tmp_path: Path, kind: str, ending: str) -> None:
    path = write(pa.table({"text": COLUMNS[kind], "a.b": TEXTS}), tmp_path, ending)
    line = failure(path)
    assert line.startswith(f"column text holds {kind}")
    assert line.endswith(", not text; set text_field to a column of strings")
    assert texts(path, text_field="a.b") == [
        "one",
        "zwei",
        "",
    ]  # a dot in a column's name does not make it a nested path
    assert failure(path, text_field="text.a") == "text_field=text.a does not exist; it has: text, a.b. Set text_field"


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_without_rows_hold_no_documents_whatever_their_columns(tmp_path: Path, ending: str) -> None:
    for table in (
        pa.table({"text": pa.array([], pa.string())}),
        pa.table({}),
        pa.table({"other": pa.array([], pa.int64())}),
    ):
        assert texts(write(table, tmp_path, ending)) == []
    pd.DataFrame().to_parquet(tmp_path / "pandas.parquet")
    assert texts(tmp_path / "pandas.parquet") == []
    pd.DataFrame({"text": ["a", "b"]}, index=["p", "q"]).to_parquet(tmp_path / "pandas.parquet")
    assert [document.id for document in read(tmp_path / "pandas.parquet", id_field="__index_level_0__")] == ["p", "q"]


@pytest.mark.parametrize("ending", ["arrow", "arrows"])
def test_values_that_python_cannot_represent_are_reported_with_their_column(tmp_path: Path, ending: str) -> None:
    columns = {
        "date": pa.array([2**31 - 1] * 3, pa.date32()),
        "time": pa.array([2**62] * 3, pa.timestamp("s")),
        "duration": pa.array([2**62] * 3, pa.duration("s")),
    }
    path = write(pa.table({"text": TEXTS} | columns), tmp_path, ending)
    assert texts(path) == ["one", "zwei", ""]
    for name, column in columns.items():
        line = failure(path, metadata_fields=[name])
        assert line.startswith(f"column {name} of type {column.type} has a value that cannot be read (")
        assert line.endswith("); leave it out of metadata_fields and id_field")


def test_column_names_in_errors_are_one_line_of_limited_length(tmp_path: Path) -> None:
    path = write(
        pa.table({"a\nb": ["x"]} | {"c" * 10_000: ["x"]} | {f"d{i}": ["x"] for i in range(500)}), tmp_path, "parquet"
    )
    line = failure(path)
    assert line.startswith(f"text_field=text does not exist; it has: a\\nb, {'c' * 57}..., d0, d1, ")
    assert line.endswith(", d17 and 482 more. Set text_field")


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_every_codec_and_version_that_pyarrow_writes_is_read(tmp_path: Path, codec: str) -> None:
    for version in ("1.0", "2.6"):
        pq.write_table(
            pa.table({"text": TEXTS}),
            tmp_path / "x.parquet",
            compression=codec,
            version=version,
            data_page_version="2.0",
        )
        assert texts(tmp_path / "x.parquet") == ["one", "zwei", ""]
    if codec in ("zstd", "lz4"):
        feather.write_feather(pa.table({"text": TEXTS}), tmp_path / "x.arrow", compression=codec)
        assert texts(tmp_path / "x.arrow") == ["one", "zwei", ""]


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "raw", "line"),
    [
        ("x.arrow", parquet_bytes(), "cannot be read, it is a parquet file: set kind: parquet for it"),
        ("x.parquet", b'{"text": "a"}\n', "cannot be read, it is JSON lines: set kind: jsonl for it"),
        ("x.parquet", b"\x1f\x8b\x08" + bytes(40), "cannot be read, it is gzip: unpack it"),
        (
            "x.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 3\n",
            "cannot be read, it is a Git LFS pointer: ",
        ),
        ("x.parquet", b"PARE" + bytes(40) + b"PARE", "cannot be read, it is an encrypted parquet file: decrypt it"),
        (
            "x.arrow",
            b"FEA1" + bytes(40) + b"FEA1",
            "cannot be read, it is a Feather file of version 1: write it anew as parquet",
        ),
        ("x.parquet", b"", "cannot be read, it may be corrupt or unreachable (Parquet file size is 0 bytes)"),
        (
            "x.parquet",
            parquet_bytes()[:-3],
            "cannot be read, it may be corrupt or unreachable (Parquet magic bytes not found in footer",
        ),
    ],
)
def test_a_file_of_another_format_is_recognized_by_its_first_bytes(
    tmp_path: Path, name: str, raw: bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    assert failure(tmp_path / name).startswith(line)


def intact_files() -> dict[str, bytes]:
    table = pa.table({"text": [f"text {i} ü" for i in range(40)], "d": pa.array(["a", "b"] * 20).dictionary_encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=20)
    files = {"x.parquet": sink.getvalue()}
    for name, new in (("x.arrow", pa.ipc.new_file), ("x.arrows", pa.ipc.new_stream)):
        buffer = pa.BufferOutputStream()
        with new(buffer, table.schema) as writer:
            writer.write_table(table, 20)
        files[name] = buffer.getvalue().to_pybytes()
    return files


INTACT = intact_files()


@given(
    name=st.sampled_from(sorted(INTACT)),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_a_damaged_file_gives_documents_or_a_one_line_error(
    name: str, places: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(INTACT[name])
    for place, value in places:
        raw[int(place * (len(raw) - 1))] = value
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(raw)
    for chunk in (1, 1 << 30):
        try:
            documents = read(path, chunk=chunk, metadata_fields=["d"])
        except DataError as error:
            line = str(error)
        else:
            line = ""
            assert all(document.source == "s" for document in documents)
        assert line == "" or line.isprintable()


def test_a_builtin_error_is_blamed_on_the_file_only_if_a_library_raised_it() -> None:
    table = pa.Table.from_arrays([TEXTS, TEXTS], names=["a", "a"])
    with (
        pytest.raises(
            DataError,
            match=r"x: cannot be read, it may be corrupt or unreachable \('Field \"a\" exists 2 times in schema'\)",
        ),
        explain_read_errors("x"),
    ):
        table.column("a")
    with pytest.raises(KeyError), explain_read_errors("x"):
        {}["a"]
    with pytest.raises(DataError, match="x: reading it takes more memory than there is"), explain_read_errors("x"):
        bytearray(1 << 62)


DATASET = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})


def saved(folder: Path, change: Callable[[Path], object]) -> Path:
    DATASET.save_to_disk(folder)
    change(folder)
    return folder


def with_features(features: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "dataset_info.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"features": features}))

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda folder: (folder / "dataset_info.json").unlink(),
            "neither a `Dataset` directory nor a `DatasetDict` directory",
        ),
        (lambda folder: (folder / "state.json").write_text("{"), "Expecting property name enclosed in double quotes"),
        (lambda folder: (folder / "state.json").write_text("[]"), "list indices must be integers"),
        (with_features({"text": {"_type": "NewThing"}}), "Feature type 'NewThing' not found"),
        (with_features({"text": "x"}), "'str' object has no attribute"),
        (lambda folder: next(folder.glob("*.arrow")).unlink(), "No such file or directory"),
        (lambda folder: next(folder.glob("*.arrow")).write_bytes(b"\xff\xff\xff\xff cut"), ""),
    ],
)
def test_a_saved_dataset_with_a_missing_or_unknown_part_is_a_one_line_error(
    tmp_path: Path, change: Callable[[Path], object], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "saved", change)
    capfd.readouterr()
    message = failure(path)
    assert message.startswith(f"data.sources: cannot open dataset {path} (subset=None, split=train): ")
    assert line in message
    assert message.endswith("; check `paths`, `subset`, `split` and the connection")
    assert capfd.readouterr().err == ""


def test_missing_splits_and_odd_columns_are_reported_or_ignored(tmp_path: Path) -> None:
    assert [
        document.text
        for document in read(saved(tmp_path / "no state", lambda folder: (folder / "state.json").unlink()))
    ] == ["a", "b"]
    datasets.DatasetDict(train=DATASET, test=DATASET).save_to_disk(tmp_path / "dict")
    assert [document.text for document in read(tmp_path / "dict", split="test")] == ["a", "b"]
    assert failure(tmp_path / "dict", split="dev").endswith("it has the splits train, test; set `split` to one of them")
    shutil.rmtree(tmp_path / "dict" / "train")
    assert "cannot open dataset" in failure(tmp_path / "dict")
    (tmp_path / "twice").mkdir()
    pq.write_table(pa.Table.from_arrays([TEXTS, TEXTS], names=["text", "text"]), tmp_path / "twice" / "x.parquet")
    for streaming in (True, False):
        assert "Multiple matches for FieldRef.Name(text)" in failure(tmp_path / "twice", streaming=streaming)


def test_the_check_of_duplicated_columns_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without our check, a second column of the same name gives pyarrow's own error."""
    path = write(pa.Table.from_arrays([TEXTS, TEXTS], names=["text", "text"]), tmp_path, "arrow")
    monkeypatch.setattr(columnar, "_check_columns", lambda schema, path, source: ["text"])
    with pytest.raises(
        DataError,
        match=r"cannot be read, it may be corrupt or unreachable \('Field \"text\" exists 2 times in schema'\)",
    ):
        read(path)


@pytest.mark.parametrize("ending", ["arrow", "arrows"])  # pyarrow does not write such a dictionary to parquet
@pytest.mark.parametrize("offsets", [pa.binary(), pa.large_binary()])
def test_a_bad_byte_in_a_dictionary_marks_the_document_as_in_plain_strings(
    tmp_path: Path, ending: str, offsets: pa.DataType
) -> None:
    raw = pa.array([b"one", b"zw\xffei ist eine Zahl " * 9, b"never used \xff"], offsets)
    words = raw.view(pa.string() if offsets == pa.binary() else pa.large_string())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0, 1]), words)
    plain = read(write(pa.table({"text": words.take(column.indices)}), tmp_path, ending))
    encoded = read(write(pa.table({"text": column}), tmp_path, ending))
    assert [replace(document, bytes_read=0) for document in encoded] == [
        replace(document, bytes_read=0) for document in plain
    ]
    assert [document.had_invalid_unicode for document in encoded] == [False, True, False, False, True]


def test_a_dictionary_is_not_decoded_as_a_whole_for_every_few_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 4999] * 500), pa.array([f"text {i}" for i in range(5000)]))
    path, seen, raw_of = write(pa.table({"text": column}), tmp_path, "arrow"), 0, columnar._column_bytes

    def counting(values: pa.Array) -> list[bytes | None]:
        nonlocal seen
        seen += len(values)
        return raw_of(values)

    monkeypatch.setattr(columnar, "_column_bytes", counting)
    assert [document.text for document in read(path)] == ["text 0", "text 4999"] * 500
    assert seen <= 2 * 1000  # the rows, and the dictionary entries that they use


def test_an_index_outside_of_its_dictionary_is_reported() -> None:
    for index in (-1, 2):
        damaged = pa.DictionaryArray.from_arrays(pa.array([0, index]), pa.array(["a", "b"]), safe=False)
        with pytest.raises(pa.ArrowInvalid, match=f"index {index} is outside of a dictionary of 2 values"):
            columnar._column_bytes(damaged)
