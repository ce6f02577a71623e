import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.manifest import BLOCK_BYTES, MANIFEST, load_manifest
from data_pipeline.shards import ShardSet, ShardWriter, token_dtype

WriteSplit = Callable[..., ShardSet]
Draw = Callable[..., list[list[int]]]


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.write_bytes(raw)


def test_the_pair_is_megatrons_byte_for_byte(write_split: WriteSplit) -> None:
    shards = write_split([[5, 6, 0], [7, 0]], vocab_size=65_499)
    stem = shards.folder / "shard-00000"
    assert stem.with_suffix(".bin").read_bytes() == struct.pack("<5H", 5, 6, 0, 7, 0)
    assert stem.with_suffix(".idx").read_bytes() == b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack(
        "<2i", 3, 2
    ) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)


def test_a_large_vocabulary_takes_four_bytes(write_split: WriteSplit) -> None:
    assert (token_dtype(65_499), token_dtype(65_500)) == ("uint16", "int32")
    shards = write_split([[70_000, 0]], vocab_size=128_256)
    assert (shards.folder / "shard-00000.bin").read_bytes() == struct.pack("<2i", 70_000, 0)
    assert (shards.folder / "shard-00000.idx").read_bytes()[17] == 4
    assert shards.tokens(0, 2).tolist() == [70_000, 0]


def test_the_stream_reads_back_across_shards(write_split: WriteSplit, random_documents: Draw) -> None:
    documents = random_documents(200, 40)
    shards = write_split(documents, shard_tokens=300)
    stream = list(itertools.chain(*documents))
    starts = [0, *itertools.accumulate(map(len, documents))]
    assert len(shards.manifest.shards) > 5
    assert all(shard.tokens <= 300 for shard in shards.manifest.shards)
    assert shards.tokens(0, shards.n_tokens).tolist() == stream
    rng = np.random.default_rng(0)
    for low, high in np.sort(rng.integers(0, len(stream) + 1, (300, 2)), axis=1).tolist():
        assert shards.tokens(low, high).tolist() == stream[low:high]
        assert shards.document_starts(low, high).tolist() == [s for s in starts[:-1] if low <= s < high]
    assert [shards.document_span(i) for i in range(200)] == list(itertools.pairwise(starts))
    assert np.concatenate(list(shards.document_lengths())).tolist() == [len(ids) for ids in documents]


def test_a_document_longer_than_a_shard_is_kept_whole_in_its_own(write_split: WriteSplit) -> None:
    shards = write_split([[1, 0], [2] * 99 + [0], [3, 0]], shard_tokens=50)
    assert [shard.tokens for shard in shards.manifest.shards] == [2, 100, 2]


def test_one_flipped_bit_is_found_when_its_block_is_first_read_and_named(write_split: WriteSplit) -> None:
    documents = [[i % 1000] * 4095 + [0] for i in range(400)]  # 3.1 MiB
    shards = write_split(documents, shard_tokens=10**9)
    flip(shards.folder / "shard-00000.bin", BLOCK_BYTES + 12_345)
    shards = ShardSet.open(shards.folder)
    half = BLOCK_BYTES // 2  # tokens in a block
    assert shards.tokens(0, half).size == half
    assert shards.tokens(2 * half, shards.n_tokens).size == shards.n_tokens - 2 * half
    for low, high in ((half, half + 1), (half - 1, half + 1), (0, shards.n_tokens)):
        with pytest.raises(DataError, match=r"train/shard-00000\.bin is damaged: block 1 of 4"):
            shards.tokens(low, high)


def test_a_block_is_hashed_once(write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_split([[1] * 10 + [0]] * 20)
    shards.tokens(0, shards.n_tokens)
    monkeypatch.setattr("data_pipeline.shards.xxhash", None)
    assert shards.tokens(0, shards.n_tokens).size == 220


def test_a_damaged_index_a_cut_or_missing_file_and_a_broken_manifest_are_named(write_split: WriteSplit) -> None:
    folder = write_split([[1, 2, 0], [3, 0]]).folder
    flip(folder / "shard-00000.idx", 40)
    with pytest.raises(DataError, match=r"shard-00000\.idx is damaged"):
        ShardSet.open(folder).document_starts(0, 5)
    whole = (folder / "shard-00000.bin").read_bytes()
    (folder / "shard-00000.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"shard-00000\.bin has 9 bytes where the manifest says 10"):
        ShardSet.open(folder)
    (folder / "shard-00000.bin").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.bin is missing"):
        ShardSet.open(folder)
    (folder / MANIFEST).write_text('{"format": "pretrain-shards-1"')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        ShardSet.open(folder)


def test_shards_without_a_manifest_are_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train", "uint16", 100)
    writer.add(np.array([1, 0], np.uint16))
    writer.finish()
    with pytest.raises(DataError, match=r"holds no prepared data.*pretrain data prepare"):
        ShardSet.open(tmp_path / "train")


def test_the_manifest_reads_back_as_it_was_written(write_split: WriteSplit) -> None:
    shards = write_split([[1, 2, 0], [3, 0]])
    again = load_manifest(shards.folder)
    assert again == shards.manifest
    assert again.fingerprint() == shards.manifest.fingerprint()
    assert again.to_bytes() == (shards.folder / MANIFEST).read_bytes()
    assert again.model_copy(update={"tokens": 6}).fingerprint() != again.fingerprint()
