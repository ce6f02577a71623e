import errno
import hashlib
import itertools
import json
import mmap
import os
import re
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_pipeline.errors import DataError, StorageError
from data_pipeline.reading.loader import Loader
from data_pipeline.storage import mapped
from data_pipeline.storage.manifest import BLOCK_BYTES, MANIFEST, Shard, SourceManifest, SplitManifest, load_manifest
from data_pipeline.storage.mapped import CorruptDataError
from data_pipeline.storage.shard_writer import write_shard
from data_pipeline.storage.shards import OpenedSplit, ShardSet, open_split, token_dtype

WriteSplit = Callable[..., OpenedSplit]
Draw = Callable[..., list[list[int]]]


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.write_bytes(raw)


def starts_in(shards: ShardSet, start: int, stop: int) -> list[int]:
    """Return where documents start in [start, stop) of the stream, computed from `document_starts_near`."""
    found, base = [], start
    for file, low, high in shards.spans(start, stop):
        near = (file.document_starts_near(low, high) // file.itemsize).tolist()
        found += [place - low + base for place in near if low <= place < high]
        base += high - low
    return found


def test_the_pair_has_the_documented_layout(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, "x-00000", np.array([5, 6, 0, 7, 0]), np.array([3, 2], np.int32), "uint16")
    assert (tmp_path / "x-00000.bin").read_bytes() == struct.pack("<5H", 5, 6, 0, 7, 0)
    assert (tmp_path / "x-00000.idx").read_bytes() == b"MMIDIDX\x00\x00" + struct.pack(
        "<QBQQ", 1, 8, 2, 3
    ) + struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (shard.tokens, shard.documents, shard.bin_bytes, shard.idx_bytes) == (5, 2, 10, 82)
    assert (shard.external_bin, shard.bin_start) == (None, 0)


def test_a_large_vocabulary_takes_four_bytes(write_split: WriteSplit) -> None:
    assert (token_dtype(65_499), token_dtype(65_500)) == ("uint16", "int32")
    split = write_split({"web": [[70_000, 0]]}, vocab_size=128_256)
    assert (split.folder / "web-00000.bin").read_bytes() == struct.pack("<2i", 70_000, 0)
    assert (split.folder / "web-00000.idx").read_bytes()[17] == 4
    assert split.sources[0].tokens(0, 2).tolist() == [70_000, 0]


def test_each_source_is_one_stream_across_its_shards(write_split: WriteSplit, random_documents: Draw) -> None:
    given = {"web": random_documents(200, 40), "code": random_documents(50, 100, seed=1)}
    split = write_split(given, shard_tokens=300)
    assert [source.source.name for source in split.sources] == ["web", "code"]
    assert split.manifest.documents == 250
    for shards, documents in zip(split.sources, given.values(), strict=True):
        stream = list(itertools.chain(*documents))
        starts = [0, *itertools.accumulate(map(len, documents))]
        assert len(shards.source.shards) > 5
        assert (shards.n_tokens, shards.n_documents) == (len(stream), len(documents))
        assert shards.tokens(0, shards.n_tokens).tolist() == stream
        rng = np.random.default_rng(0)
        for low, high in np.sort(rng.integers(0, len(stream) + 1, (300, 2)), axis=1).tolist():
            assert shards.tokens(low, high).tolist() == stream[low:high]
            assert starts_in(shards, low, high) == [s for s in starts[:-1] if low <= s < high]
        assert [shards.document_span(i) for i in range(len(documents))] == list(itertools.pairwise(starts))
        assert np.concatenate(list(shards.document_lengths())).tolist() == [len(ids) for ids in documents]


def test_search_and_lookup_table_find_the_same_starts(
    write_split: WriteSplit, random_documents: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shards,) = write_split({"web": random_documents(3000, 40)}, shard_tokens=10**9).sources
    searched = [starts_in(shards, low, low + 100) for low in range(0, 50_000, 100)]
    assert sum(map(len, searched)) > 2000
    monkeypatch.setattr("data_pipeline.storage.shards._SEARCHES_BEFORE_TABLE", 1)
    (reopened,) = open_split(shards.folder).sources
    assert [starts_in(reopened, low, low + 100) for low in range(0, 50_000, 100)] == searched
    monkeypatch.setattr("data_pipeline.storage.shards.bisect", None)
    assert reopened.files[0].document_starts_near(0, 4096).size >= len(searched[0])


def test_positions_outside_of_the_stream_are_an_error(write_split: WriteSplit) -> None:
    (shards,) = write_split({"web": [[1, 2, 0], [3, 0]]}).sources
    assert shards.tokens(5, 5).tolist() == []
    for low, high in ((-1, 2), (0, 6), (3, 2)):
        with pytest.raises(IndexError, match=f"tokens {low} to {high} of 5"):
            shards.tokens(low, high)
    with pytest.raises(IndexError, match="document 2 of 2"):
        shards.document_span(2)


@pytest.mark.parametrize("at", [0, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 9_999])
def test_a_flipped_bit_is_found_when_its_block_is_first_read(write_split: WriteSplit, at: int) -> None:
    documents = [[i % 1000] * 4095 + [0] for i in range(400)]  # 3.1 MiB
    split = write_split({"web": documents}, shard_tokens=10**9)
    flip(split.folder / "web-00000.bin", at)
    (shards,) = open_split(split.folder).sources
    half = BLOCK_BYTES // 2  # tokens in a block
    damaged = at // BLOCK_BYTES
    for block in range(4):
        low, high = block * half, min((block + 1) * half, shards.n_tokens)
        if block != damaged:
            assert shards.tokens(low, high).size == high - low
    first, last = damaged * half, min((damaged + 1) * half, shards.n_tokens)
    for low, high in ((first, first + 1), (last - 1, last), (0, shards.n_tokens), (first, first + 1)):
        with pytest.raises(DataError, match=rf"train/web-00000\.bin is damaged: block {damaged} of 4"):
            shards.tokens(low, high)


def test_a_block_is_hashed_once(write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    (shards,) = write_split({"web": [[1] * 10 + [0]] * 20}).sources
    shards.tokens(0, shards.n_tokens)
    starts = starts_in(shards, 0, shards.n_tokens)
    for module in ("mapped", "shards"):
        monkeypatch.setattr(f"data_pipeline.storage.{module}.xxhash", None)
    monkeypatch.setattr(mapped, "MAX_OPEN_DESCRIPTORS", 1)  # so that files are closed and opened again
    for _ in range(3):
        assert shards.tokens(0, shards.n_tokens).size == 220
        assert starts_in(shards, 0, shards.n_tokens) == starts


@pytest.mark.parametrize("byte", [3, 17, 34, 40, -1])
def test_a_changed_index_is_found_when_it_is_first_read(write_split: WriteSplit, byte: int) -> None:
    folder = write_split({"web": [[1, 2, 0], [3, 0]]}).folder
    flip(folder / "web-00000.idx", byte)
    (shards,) = open_split(folder).sources
    assert shards.tokens(0, 5).tolist() == [1, 2, 0, 3, 0]
    with pytest.raises(DataError, match=r"web-00000\.idx is damaged: it does not match its checksum"):
        shards.files[0].document_starts_near(0, 5)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_file_that_is_missing_or_of_another_size_is_reported_before_anything_is_read(
    write_split: WriteSplit, ending: str
) -> None:
    folder = write_split({"web": [[1, 2, 0], [3, 0]]}).folder
    file = folder / f"web-00000.{ending}"
    content = file.read_bytes()
    for changed in (content[:-1], content + b"\x00"):
        file.write_bytes(changed)
        with pytest.raises(
            DataError, match=rf"web-00000\.{ending} has {len(changed)} bytes where the manifest says {len(content)}"
        ):
            open_split(folder)
    file.unlink()
    with pytest.raises(DataError, match=rf"web-00000\.{ending} is missing"):
        open_split(folder)


def test_a_file_that_shrinks_after_it_was_opened_is_reported(write_split: WriteSplit) -> None:
    split = write_split({"web": [[1, 2, 0], [3, 0]]})
    (split.folder / "web-00000.bin").write_bytes(b"\x01\x00")
    with pytest.raises(CorruptDataError, match=r"web-00000\.bin cannot be read"):
        split.sources[0].tokens(0, 5)


def test_tokens_in_another_file_are_read_from_where_they_begin(tmp_path: Path) -> None:
    ids = np.array([900, 901, 5, 6, 0, 7, 0, 902], "<u2")
    ids.tofile(tmp_path / "theirs.ds")
    own = write_shard(tmp_path, "x-00000", ids[2:7], np.array([3, 2], np.int32), "uint16")
    (tmp_path / "x-00000.bin").unlink()
    shard = own.model_copy(update={"external_bin": str(tmp_path / "theirs.ds"), "bin_start": 4})
    shards = ShardSet(tmp_path, source_of(shard))
    assert shards.tokens(0, 5).tolist() == [5, 6, 0, 7, 0]
    assert starts_in(shards, 0, 5) == [0, 3]
    with pytest.raises(DataError, match=r"theirs\.ds is damaged: block 0 of 1 \(1 MiB from byte 6\)"):
        ShardSet(tmp_path, source_of(shard.model_copy(update={"bin_start": 6}))).tokens(0, 1)
    with pytest.raises(DataError, match=r"theirs\.ds has 16 bytes where the manifest says 18"):
        ShardSet(tmp_path, source_of(shard.model_copy(update={"bin_start": 8})))


@contextmanager
def few_descriptors(spare: int) -> Iterator[None]:
    """Let this process open only `spare` more files in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_many_shards_are_read_with_few_descriptors(
    write_split: WriteSplit, random_documents: Draw, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    folder = write_split({"web": random_documents(400, 40), "code": random_documents(100, 40)}, shard_tokens=30).folder
    settings = {"seq_len": 64, "seed": 0, "packing": packing}
    loader = Loader(folder, **settings)
    assert sum(len(shards.files) for shards in loader.sources) > 250
    expected = loader.batch(0, loader.n_sequences)
    del loader
    monkeypatch.setattr(mapped, "MAX_OPEN_DESCRIPTORS", 16)
    for file in folder.glob("*.plan"):
        file.unlink()
    with few_descriptors(spare=32):
        loader = Loader(folder, **settings, on_damage="skip")
        for batch in (loader.batch(0, loader.n_sequences), loader.batch(0, loader.n_sequences)):
            assert batch.damaged == ()
            for field in ("input_ids", "labels", "document_ids"):
                assert np.array_equal(getattr(batch, field), getattr(expected, field))
        assert sum(shards.tokens(0, shards.n_tokens).size for shards in loader.sources) == loader.n_tokens
        monkeypatch.setattr(mapped, "MAX_OPEN_DESCRIPTORS", 128)
        loader = Loader(folder, **settings, on_damage="skip")
        with pytest.raises(DataError, match="Too many open files") as raised:
            loader.batch(0, loader.n_sequences)
    assert not isinstance(raised.value, CorruptDataError)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_opened_is_not_damaged(
    write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch, number: int, packing: str
) -> None:
    folder = write_split({"web": [[1, 2, 0], [3, 0]] * 10}).folder
    loader = Loader(folder, seq_len=8, seed=0, packing=packing, on_damage="skip")
    unpatched = np.memmap

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(
        DataError, match=rf"cannot be opened \({os.strerror(number)}\); nothing is known to be damaged"
    ) as raised:
        loader.batch(0, 2)
    assert not isinstance(raised.value, CorruptDataError)
    assert "delete" not in str(raised.value)
    monkeypatch.setattr(np, "memmap", unpatched)
    assert loader.batch(0, 2).damaged == ()
    monkeypatch.undo()
    flip(folder / "web-00000.bin", 0)
    assert Loader(folder, seq_len=8, seed=0, packing=packing, on_damage="skip").batch(0, loader.n_sequences).damaged


@pytest.mark.parametrize(
    ("ending", "packing"), [(".bin", "concatenate"), (".idx", "concatenate"), (".bin", "best_fit")]
)
def test_a_file_that_is_truncated_while_in_use_is_an_error_not_a_crash(
    write_split: WriteSplit, random_documents: Draw, ending: str, packing: str
) -> None:
    """Without the check, reading a page of the mapping behind the end of the file ends this process with SIGBUS."""
    folder = write_split({"web": random_documents(3000, 40)}, shard_tokens=10**6).folder
    loader = Loader(folder, seq_len=64, seed=0, packing=packing)
    expected = loader.batch(0, loader.n_sequences)
    file = folder / f"web-00000{ending}"
    content = file.read_bytes()
    assert len(content) > 2 * mmap.PAGESIZE
    os.truncate(file, 100)
    message = f"{file} was cut off to 100 bytes while it was in use, and needs {len(content)}; restore it from a copy"
    with pytest.raises(CorruptDataError, match=re.escape(message)):
        loader.batch(0, loader.n_sequences)
    file.write_bytes(content)
    assert np.array_equal(loader.batch(0, loader.n_sequences).input_ids, expected.input_ids)


def test_a_plan_that_is_truncated_while_in_use_is_made_again(write_split: WriteSplit, random_documents: Draw) -> None:
    folder = write_split({"web": random_documents(3000, 40)}, shard_tokens=10**6).folder
    loader = Loader(folder, seq_len=64, seed=0, packing="best_fit")
    expected = loader.batch(0, loader.n_sequences)
    (plan,) = folder.glob("*.plan")
    os.truncate(plan, 100)
    assert np.array_equal(loader.batch(0, loader.n_sequences).input_ids, expected.input_ids)
    assert plan.stat().st_size > 100


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_disk_that_fails_while_a_block_is_read_is_not_damage(
    write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    folder = write_split({"web": [[1, 2, 0], [3, 0]] * 10}).folder

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    loader = Loader(folder, seq_len=8, seed=0, on_damage="skip")
    monkeypatch.setattr(*((os, "pread") if ending == ".bin" else (hashlib, "file_digest")), fail)
    with pytest.raises(
        StorageError, match=rf"web-00000\{ending} cannot be read \(Input/output error\); nothing is known to be damaged"
    ):
        loader.batch(0, 2)
    monkeypatch.undo()
    assert loader.batch(0, 2).damaged == ()


def test_a_damaged_index_is_hashed_once(write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_split({"web": [[1, 2, 0], [3, 0]]}).folder
    flip(folder / "web-00000.idx", 40)
    (shards,) = open_split(folder).sources
    with pytest.raises(CorruptDataError, match="does not match its checksum"):
        shards.document_span(0)
    monkeypatch.setattr("data_pipeline.storage.shards.map_file", None)
    with pytest.raises(CorruptDataError, match="does not match its checksum"):
        shards.document_span(0)


def test_a_deleted_split_closes_its_files(write_split: WriteSplit) -> None:
    (shards,) = write_split({"web": [[1, 2, 0], [3, 0]] * 40}).sources
    folder, n_files = shards.folder, len(shards.files)
    assert starts_in(shards, 0, shards.n_tokens)
    assert shards.tokens(0, shards.n_tokens).size
    assert Path("/proc/self/maps").read_text().count(str(folder)) == 2 * n_files > 2
    del shards
    assert str(folder) not in Path("/proc/self/maps").read_text()


def source_of(shard: Shard) -> SourceManifest:
    return SourceManifest(
        name="x",
        documents=shard.documents,
        tokens=shard.tokens,
        text_bytes=None,
        dtype="uint16",
        ends_with_eot=True,
        dropped={},
        repaired={},
        marked={},
        shards=(shard,),
    )


def test_shards_without_a_manifest_are_no_data_and_a_broken_manifest_is_reported(write_split: WriteSplit) -> None:
    folder = write_split({"web": [[1, 0]]}).folder
    (folder / MANIFEST).write_text('{"format": "pretrain-shards-1"}')
    with pytest.raises(DataError, match=r"manifest\.json is damaged or of another version \(format: "):
        open_split(folder)
    (folder / MANIFEST).write_text('{"format": "pretrain-shards-2"')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_split(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"holds no prepared data.*pretrain data prepare"):
        open_split(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"holds no prepared data"):
        open_split(folder)


def test_the_manifest_reads_back_as_it_was_written(write_split: WriteSplit) -> None:
    split = write_split({"web": [[1, 2, 0], [3, 0]], "code": [[4, 0]]})
    reopened = load_manifest(split.folder)
    assert reopened == split.manifest
    assert (reopened.documents, reopened.tokens) == (3, 7)
    assert reopened.fingerprint() == split.manifest.fingerprint()
    assert reopened.to_bytes() == (split.folder / MANIFEST).read_bytes()
    assert reopened.model_copy(update={"eot_id": 1}).fingerprint() != reopened.fingerprint()


@pytest.mark.parametrize("change", ["missing", "unknown", "unknown below", "both"])
def test_a_manifest_of_another_version_is_read_and_keeps_the_fingerprint_of_its_bytes(
    write_split: WriteSplit, change: str
) -> None:
    split = write_split({"web": [[1, 2, 0], [3, 0]]})
    file = split.folder / MANIFEST
    tree = json.loads(file.read_bytes())
    settings = tree["recipe"]["settings"]
    settings["sources"] = [{"kind": "jsonl", "paths": ["x.jsonl"]}]
    if change in ("missing", "both"):
        del settings["shard_tokens"], settings["dedup"]["exact"]
    if change in ("unknown", "both"):
        settings["novel"] = {"a": [1]}
    if change in ("unknown below", "both"):
        settings["sources"][0]["novel"] = settings["filters"]["length"]["novel"] = settings["dedup"]["novel"] = 1
    file.write_text(json.dumps(tree))
    read = load_manifest(split.folder)
    assert read.fingerprint() == xxhash.xxh3_128_hexdigest(file.read_bytes()) != split.manifest.fingerprint()
    assert read.recipe.settings.shard_tokens == split.manifest.recipe.settings.shard_tokens
    assert read.recipe.settings.sources[0].paths == ("x.jsonl",)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("recipe.settings", "shard_tokens", "many"),
        ("recipe.settings.dedup", "exact", []),
        ("recipe", "novel", 1),
        ("", "novel", 1),
    ],
)
def test_a_wrong_value_in_a_recipe_and_an_unknown_key_elsewhere_are_errors(
    write_split: WriteSplit, where: str, name: str, value: object
) -> None:
    file = write_split({"web": [[1, 2, 0], [3, 0]]}).folder / MANIFEST
    tree = json.loads(file.read_bytes())
    tree["recipe"]["settings"]["novel"] = 1
    inner = tree
    for step in where.split(".") if where else ():
        inner = inner[step]
    inner[name] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=rf"manifest\.json is damaged or of another version \(.*{name}"):
        load_manifest(file.parent)


def test_a_manifest_made_in_memory_has_the_fingerprint_of_what_it_writes(write_split: WriteSplit) -> None:
    read = write_split({"web": [[1, 2, 0], [3, 0]]}).manifest
    made = SplitManifest.model_validate(read.model_dump())
    assert made.fingerprint() == xxhash.xxh3_128_hexdigest(made.to_bytes()) == read.fingerprint()
