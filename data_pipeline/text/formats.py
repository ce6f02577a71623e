"""Detect a file's format from its first bytes, and say what to do if it is not the one that its source expects."""

from __future__ import annotations

import codecs
from typing import NamedTuple

HEAD_BYTES = 512
"""First bytes needed to detect the format. The signature of a tar archive is at byte 257."""


class FileFormat(NamedTuple):
    """A format that was detected."""

    name: str
    """Completes the sentence `FILE is ...`."""
    remedy: str
    """What the user can do about it."""
    kind: str = ""
    """The kind of source that reads it; empty if none does."""


_UNPACK = "unpack it, or pack it again with gzip or zstd, which are read"
_ARCHIVE = "unpack it and name the folder in `paths`"
_EXPORT = "export its text to jsonl or parquet, or leave it out with `exclude`"
_LEAVE_OUT = "leave it out with `exclude`"

GZIP = FileFormat("gzip", "name it .gz")
ZSTD = FileFormat("zstd", "name it .zst")
_PARQUET = FileFormat("a parquet file", "set kind: parquet for it", "parquet")
_ARROW = FileFormat("an Arrow file", "set kind: arrow for it", "arrow")
_ENCRYPTED = FileFormat("an encrypted parquet file", "decrypt it, encrypted files cannot be read")
_FEATHER = FileFormat(
    "a Feather file of version 1", "write it anew as parquet, or as Feather of version 2 for kind: arrow"
)
_ZIP = FileFormat("a zip archive (docx, xlsx, epub, jar and npz files are zip archives, too)", _ARCHIVE)
_LFS = FileFormat("a Git LFS pointer", "fetch the file that it stands for with `git lfs pull`")

_FORMATS: tuple[tuple[int, bytes, FileFormat], ...] = (
    (0, b"\x1f\x8b\x08", GZIP),
    (0, b"\x28\xb5\x2f\xfd", ZSTD),
    *((0, bytes([0x50 + i]) + b"\x2a\x4d\x18", ZSTD) for i in range(16)),  # begins with a skippable frame
    (4, b"1AY&SY", FileFormat("bzip2", _UNPACK)),
    (4, b"\x17\x72\x45\x38\x50\x90", FileFormat("bzip2", _UNPACK)),  # of an empty file
    (0, b"\xfd7zXZ\x00", FileFormat("xz", _UNPACK)),
    (0, b"\x5d\x00\x00", FileFormat("lzma", _UNPACK)),
    (0, b"LZIP", FileFormat("lzip", _UNPACK)),
    (0, b"\x04\x22\x4d\x18", FileFormat("lz4", _UNPACK)),
    (0, b"\xff\x06\x00\x00sNaPpY", FileFormat("snappy", _UNPACK)),
    (0, b"\x1f\x9d", FileFormat("compress (.Z)", _UNPACK)),
    (0, b"PK\x03\x04", _ZIP),
    (0, b"PK\x05\x06", _ZIP),
    (0, b"7z\xbc\xaf\x27\x1c", FileFormat("a 7z archive", _ARCHIVE)),
    (0, b"Rar!\x1a\x07", FileFormat("a rar archive", _ARCHIVE)),
    (257, b"ustar", FileFormat("a tar archive", _ARCHIVE)),
    (0, b"!<arch>\n", FileFormat("an ar archive", _ARCHIVE)),
    (0, b"%PDF-", FileFormat("a PDF document", "extract its text, or leave it out with `exclude`")),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", FileFormat("an old Microsoft Office document", _EXPORT)),
    (0, b"\x89PNG\r\n\x1a\n", FileFormat("a PNG image", _LEAVE_OUT)),
    (0, b"\xff\xd8\xff", FileFormat("a JPEG image", _LEAVE_OUT)),
    (0, b"GIF87a", FileFormat("a GIF image", _LEAVE_OUT)),
    (0, b"GIF89a", FileFormat("a GIF image", _LEAVE_OUT)),
    (8, b"WEBP", FileFormat("a WebP image", _LEAVE_OUT)),
    (0, b"II*\x00", FileFormat("a TIFF image", _LEAVE_OUT)),
    (0, b"MM\x00*", FileFormat("a TIFF image", _LEAVE_OUT)),
    (8, b"WAVE", FileFormat("a WAV audio file", _LEAVE_OUT)),
    *((0, b"ID3" + bytes([version]), FileFormat("an MP3 audio file", _LEAVE_OUT)) for version in (2, 3, 4)),
    (0, b"fLaC", FileFormat("a FLAC audio file", _LEAVE_OUT)),
    (0, b"OggS", FileFormat("an Ogg audio or video file", _LEAVE_OUT)),
    (4, b"ftyp", FileFormat("an MP4 video", _LEAVE_OUT)),
    (0, b"\x1a\x45\xdf\xa3", FileFormat("a Matroska or WebM video", _LEAVE_OUT)),
    (0, b"PAR1", _PARQUET),
    (0, b"PARE", _ENCRYPTED),
    (0, b"ARROW1", _ARROW),
    (0, b"\xff\xff\xff\xff", _ARROW),
    (0, b"FEA1", _FEATHER),
    (0, b"Obj\x01", FileFormat("an Avro file", _EXPORT)),
    (0, b"ORC", FileFormat("an ORC file", _EXPORT)),
    (0, b"SQLite format 3\x00", FileFormat("an SQLite database", _EXPORT)),
    (0, b"\x89HDF\r\n\x1a\n", FileFormat("an HDF5 file", _EXPORT)),
    (0, b"\x93NUMPY", FileFormat("a NumPy array", "leave it out with `exclude`; if it holds tokens, see kind: olmo")),
    *((0, bytes([0x80, protocol]), FileFormat("a pickle", _EXPORT)) for protocol in range(2, 6)),
    (0, b"GGUF", FileFormat("a GGUF model", _LEAVE_OUT)),
    (0, b"MMIDIDX\x00", FileFormat("a Megatron index", "set kind: megatron for it")),
    (0, b"\x7fELF", FileFormat("an ELF program", _LEAVE_OUT)),
    (0, b"\x00asm", FileFormat("a WebAssembly program", _LEAVE_OUT)),
    *((0, magic, FileFormat("a macOS program", _LEAVE_OUT)) for magic in (b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe")),
    (0, b"\xca\xfe\xba\xbe", FileFormat("a Java class or macOS program", _LEAVE_OUT)),
    (0, b"version https://git-lfs.github.com/spec/", _LFS),
)
"""(offset, signature at that offset, format). The first match decides."""

_SHORT_SIGNATURES = {b"BM": FileFormat("a BMP image", _LEAVE_OUT), b"MZ": FileFormat("a Windows program", _LEAVE_OUT)}
"""Signatures so short that they count only if NULs follow soon."""

_UNAMBIGUOUS = (b"%PDF-", b"1AY&SY", b"!<arch>\n", b"version https://git-lfs.github.com/spec/")
"""Printable signatures with which no text begins. Other printable ones, such as `ORC`, count only if the head has
control characters, because a text may begin with them."""

_BOMS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is a prefix of it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL = bytes(sorted(set(range(32)) - set(b"\t\n\v\f\r\x1b"))) + b"\x7f"


def detect_encoding(raw: bytes) -> tuple[str, int]:
    """Return (encoding, length of its byte-order mark in bytes); ("utf-8", 0) without a mark."""
    return next(((encoding, len(bom)) for bom, encoding in _BOMS if raw.startswith(bom)), ("utf-8", 0))


def detect_binary_format(head: bytes) -> FileFormat | None:
    """Return the binary format that a file's first HEAD_BYTES show, or None if they show none."""
    has_control = len(head.translate(None, _CONTROL)) < len(head)
    for offset, signature, found in _FORMATS:
        if head.startswith(signature, offset) and (has_control or signature in _UNAMBIGUOUS or not signature.isascii()):
            return found
    if b"\0" in head[2:16] and head[:2] in _SHORT_SIGNATURES:
        return _SHORT_SIGNATURES[head[:2]]
    if head[8:10] == b'{"' and head[4:8] == bytes(4):
        return FileFormat("a safetensors file", _LEAVE_OUT)
    return None


def detect_format(head: bytes) -> FileFormat | None:
    """Return the format that a file's first HEAD_BYTES show: a binary one, or text in a form other than jsonl.

    None if nothing is recognized.
    """
    found = detect_binary_format(head)
    if found is not None:
        return found
    encoding, _ = detect_encoding(head)
    if encoding != "utf-8":
        family = encoding[:6].upper()
        return FileFormat(family, f"convert it to UTF-8 (iconv -f {family} -t UTF-8)")
    if head and not head.strip(b"\0"):
        return FileFormat("nothing but NUL bytes, as a crash leaves them", "restore it, or leave it out with `exclude`")
    if head.count(b"\0") > len(head) // 4:
        return FileFormat(
            "perhaps UTF-16 without a byte-order mark", "convert it to UTF-8 (iconv -f UTF-16LE -t UTF-8)"
        )
    bare = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if bare.startswith(b"["):
        return FileFormat("a JSON array", "one object a line is needed (jq -c '.[]' FILE writes that)")
    first, _, more = bare.partition(b"\n")
    if first.strip() == b"{" and more:
        return FileFormat("JSON over several lines", "one object a line is needed (jq -c . FILE writes that)")
    if bare[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return FileFormat("HTML or XML", _EXPORT)
    if bare.startswith(b'{"'):
        return FileFormat("JSON lines", "set kind: jsonl for it", "jsonl")
    return None
