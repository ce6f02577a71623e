"""Megatron reads our files, and we read Megatron's files, which are recorded in fixtures/megatron."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel

from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig
from data_pipeline.storage.shard_writer import write_shard
from data_pipeline.storage.shards import ShardSet, encode_index, token_dtype
from data_pipeline.storage.tokenized import import_tokenized
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures/megatron"
LENGTHS = (5, 1, 64, 17, 2, 33, 128, 9)
BOTH = pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", 1000), ("int32", 128_256)])


def recorded_documents(vocab_size: int) -> list[list[int]]:
    """Return the documents of the fixtures, as described in fixtures/megatron/README.md."""
    return [
        [(7919 * i + 104_729 * k) % (vocab_size - 1) + 1 for k in range(n - 1)] + [0] for i, n in enumerate(LENGTHS)
    ]


def make_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Make a tokenizer that only has an end-of-text token and a highest id. It is never used to encode."""
    backend = tokenizers.Tokenizer(WordLevel({"<|endoftext|>": 0, "last": vocab_size - 1}, unk_token="last"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def write_ours(folder: Path, documents: list[list[int]], vocab_size: int) -> Path:
    """Write a shard; return the path of its files without extension."""
    lengths = np.array([len(ids) for ids in documents], np.int32)
    write_shard(folder, "ours-00000", np.array(list(itertools.chain(*documents))), lengths, token_dtype(vocab_size))
    return folder / "ours-00000"


@BOTH
def test_our_shard_has_the_bytes_that_megatrons_builder_writes(tmp_path: Path, dtype: str, vocab_size: int) -> None:
    ours = write_ours(tmp_path, recorded_documents(vocab_size), vocab_size)
    for ending in (".bin", ".idx"):
        assert ours.with_suffix(ending).read_bytes() == (FIXTURES / f"single-{dtype}{ending}").read_bytes()
    other = write_ours(tmp_path, recorded_documents(vocab_size)[::-1], vocab_size)
    assert other.with_suffix(".idx").read_bytes() != (FIXTURES / f"single-{dtype}.idx").read_bytes()


@BOTH
@pytest.mark.parametrize("kind", ["single", "several"])
@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_megatrons_files_read_back_document_by_document(
    tmp_path: Path, dtype: str, vocab_size: int, kind: str, ending: str
) -> None:
    source = SourceConfig(kind="megatron", paths=(f"{FIXTURES}/{kind}-{dtype}{ending}",))
    part = import_tokenized(source, "theirs", make_tokenizer(tmp_path, vocab_size), tmp_path, 0.0)["train"]
    shards = ShardSet(tmp_path / "train", part)
    documents = [shards.tokens(*shards.document_span(i)).tolist() for i in range(shards.n_documents)]
    assert documents == recorded_documents(vocab_size)
    assert part.ends_with_eot
    assert part.dtype == dtype
    # Our index has one entry for a document of several sequences, and none for empty documents, so both files give the
    # same.
    assert (tmp_path / "train/theirs-00000.idx").read_bytes() == (FIXTURES / f"single-{dtype}.idx").read_bytes()
    assert part.dropped == ({"empty": 2} if kind == "several" else {})


def test_a_folder_is_read_in_the_order_of_its_names_and_a_glob_may_name_either_file(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write_ours(tmp_path / name, [[ord(name), 0]], 1000)
    tokenizer = make_tokenizer(tmp_path, 1000)
    for path in (tmp_path, f"{tmp_path}/*/ours-*", f"{tmp_path}/*/*.idx"):
        part = import_tokenized(
            SourceConfig(kind="megatron", paths=(str(path),)), "x", tokenizer, tmp_path / "work", 0.0
        )["train"]
        assert ShardSet(tmp_path / "work/train", part).tokens(0, 4).tolist() == [97, 0, 98, 0]


def test_a_negative_id_is_reported(tmp_path: Path) -> None:
    ours = write_ours(tmp_path, [[5, -1, 0]], 128_256)
    with pytest.raises(DataError, match=r"ours-00000\.bin: token -1 is not in the vocabulary of 128256"):
        import_tokenized(
            SourceConfig(kind="megatron", paths=(str(ours),)), "x", make_tokenizer(tmp_path, 128_256), tmp_path, 0.0
        )


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"MMIDIDX\x01", r"ours-00000\.idx is not a Megatron index of version 1"),
        (9, struct.pack("<Q", 2), r"ours-00000\.idx is not a Megatron index of version 1"),
        (17, b"\x05", r"ours-00000\.idx: its tokens are int64; only uint16 and int32"),
        (17, b"\x09", r"ours-00000\.idx: its tokens are code 9; only uint16 and int32"),
        (17, b"\x04", r"ours-00000\.idx: its sequences do not fill the 10 bytes"),
        (
            18,
            struct.pack("<Q", 3),
            r"ours-00000\.idx: 82 bytes, where 3 sequences and 3 document entries of text take 94",
        ),
        (34, struct.pack("<i", 4), r"ours-00000\.idx: its sequences do not fill the 10 bytes"),
        (42, struct.pack("<q", 2), r"ours-00000\.idx: its sequences do not fill the 10 bytes"),
        (58, struct.pack("<q", 1), r"ours-00000\.idx: its documents do not divide its 2 sequences"),
        (74, struct.pack("<q", 1), r"ours-00000\.idx: its documents do not divide its 2 sequences"),
    ],
)
def test_an_index_that_does_not_describe_the_whole_file_is_refused(
    tmp_path: Path, at: int, value: bytes, message: str
) -> None:
    ours = write_ours(tmp_path, [[5, 6, 0], [7, 0]], 1000)
    source, tokenizer = SourceConfig(kind="megatron", paths=(str(ours),)), make_tokenizer(tmp_path, 1000)
    assert import_tokenized(source, "x", tokenizer, tmp_path, 0.0)["train"].documents == 2
    raw = bytearray(ours.with_suffix(".idx").read_bytes())
    raw[at : at + len(value)] = value
    ours.with_suffix(".idx").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        import_tokenized(source, "x", tokenizer, tmp_path, 0.0)


def test_a_bin_of_another_size_and_negative_lengths_are_refused(tmp_path: Path) -> None:
    ours = write_ours(tmp_path, [[5, 6, 0], [7, 0]], 1000)
    source, tokenizer = SourceConfig(kind="megatron", paths=(str(ours),)), make_tokenizer(tmp_path, 1000)
    content = ours.with_suffix(".bin").read_bytes()
    for changed in (content[:-2], content + content):
        ours.with_suffix(".bin").write_bytes(changed)
        with pytest.raises(DataError, match=rf"ours-00000\.idx: its sequences do not fill the {len(changed)} bytes"):
            import_tokenized(source, "x", tokenizer, tmp_path, 0.0)
    ours.with_suffix(".bin").write_bytes(content)
    ours.with_suffix(".idx").write_bytes(encode_index(np.array([7, -2], np.int32), "uint16"))
    with pytest.raises(DataError, match=r"ours-00000\.idx: its sequences do not fill the 10 bytes"):
        import_tokenized(source, "x", tokenizer, tmp_path, 0.0)


def test_a_bin_without_an_index_is_reported(tmp_path: Path) -> None:
    ours = write_ours(tmp_path, [[5, 0]], 1000)
    ours.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"cannot read .*ours-00000\.idx: No such file"):
        import_tokenized(
            SourceConfig(kind="megatron", paths=(str(ours),)), "x", make_tokenizer(tmp_path, 1000), tmp_path, 0.0
        )


@BOTH
def test_megatrons_indexed_dataset_reads_our_shards(tmp_path: Path, dtype: str, vocab_size: int) -> None:
    """Runs only if megatron-core is installed. Otherwise the recorded files show the same."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = recorded_documents(vocab_size)
    theirs = megatron.IndexedDataset(str(write_ours(tmp_path, documents, vocab_size)))
    assert theirs.index.dtype is getattr(np, dtype)
    assert theirs.sequence_lengths.tolist() == list(LENGTHS)
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.get(6, offset=100, length=20).tolist() == documents[6][100:120]
