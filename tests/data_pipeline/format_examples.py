"""Files in formats other than text, and reading a source in chunks."""

import bz2
import io
import lzma
import pickle
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq

from data_pipeline.settings import SourceConfig
from data_pipeline.text.chunks import read_chunk, split_into_chunks
from data_pipeline.text.files import list_files
from data_pipeline.text.sources import Document


def read(kind: str, *paths: object, chunk: int = 1 << 30, **more: object) -> list[Document]:
    source = SourceConfig.model_validate({"kind": kind, "paths": [str(path) for path in paths], **more})
    return [
        document
        for chunk in split_into_chunks(0, "s", source, list_files(source), chunk)
        for document in read_chunk(chunk, source)
    ]


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
