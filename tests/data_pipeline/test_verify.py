"""Verification of a data set of two sources, one of them read in place. Each test damages something."""

import errno
import io
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel

from data_pipeline.errors import DataError, StorageError
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import (
    BLOCK_BYTES,
    MANIFEST,
    Recipe,
    Shard,
    SourceManifest,
    SplitManifest,
    load_manifest,
)
from data_pipeline.storage.shard_writer import write_shard
from data_pipeline.storage.tokenized import import_tokenized
from data_pipeline.storage.verify import count_missing_eot, largest_id, verify
from data_pipeline.tokenizing.tokenizer import load_tokenizer

VOCABULARY = 1000
OURS = [[5, 6, 0], [7] * (BLOCK_BYTES // 2) + [0], [8, 0]]  # a little more than a MiB
THEIRS = [[9, 10, 0], [11, 0], [12, 13, 14, 0], [15, 0]]


def write_ours(folder: Path, documents: list[list[int]]) -> Shard:
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(ids) for ids in documents], np.int32)
    return write_shard(folder, "ours-00000", np.array(list(itertools.chain(*documents))), lengths, "uint16")


def source_of(shard: Shard, **changes: object) -> SourceManifest:
    whole = {
        "name": "ours",
        "documents": shard.documents,
        "tokens": shard.tokens,
        "text_bytes": 1,
        "dtype": "uint16",
        "shards": (shard,),
    }
    counts = {"ends_with_eot": True, "dropped": {}, "repaired": {}, "marked": {}}
    return SourceManifest.model_validate(whole | counts | changes)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A valid `data.path`."""
    path, theirs = tmp_path / "data", tmp_path / "theirs.ds"
    backend = tokenizers.Tokenizer(WordLevel({"<|endoftext|>": 0, "last": VOCABULARY - 1}, unk_token="last"))
    backend.add_special_tokens(["<|endoftext|>"])
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(path)
    np.array(list(itertools.chain(*THEIRS)), "<u2").tofile(theirs)
    np.cumsum([len(ids) for ids in THEIRS], dtype="<u8").tofile(f"{theirs}.index")
    imported = import_tokenized(SourceConfig(kind="datatrove", paths=(str(theirs),)), "theirs", tokenizer, path, 0.5)
    for split, documents in (("train", OURS), ("validation", [[21, 0], [22, 0]])):
        manifest = SplitManifest(
            split=split,
            splits=("validation", "train"),
            vocab_size=VOCABULARY,
            eot_id=0,
            tokenizer=tokenizer.fingerprint,
            recipe=Recipe(settings=PrepareConfig(), trained_tokenizer=False, listings=(), lists="", made_with={}),
            sources=(source_of(write_ours(path / split, documents)), imported[split]),
        )
        (path / split / MANIFEST).write_bytes(manifest.to_bytes())
    return path


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 0x80
    file.write_bytes(raw)


def rewrite(folder: Path, change: Callable[[SplitManifest], SplitManifest]) -> None:
    (folder / MANIFEST).write_bytes(change(load_manifest(folder)).to_bytes())


def test_valid_data_has_no_problems_and_every_byte_is_read(data: Path) -> None:
    reported: list[int] = []
    report = verify(data, reported.append)
    files = [*data.rglob("*.bin"), *data.rglob("*.idx"), data.parent / "theirs.ds"]
    assert report.problems == ()
    assert (report.splits, report.shards) == (("train", "validation"), 4)
    assert report.bytes_read == reported[-1] == sum(file.stat().st_size for file in files)
    assert reported == sorted(reported)
    assert max(np.diff(reported)) == BLOCK_BYTES
    assert verify(data / "train").shards == 2


def test_all_problems_are_reported_at_once(data: Path) -> None:
    flip(data / "train/ours-00000.bin", BLOCK_BYTES + 1)
    flip(data / "train/ours-00000.idx", 40)
    flip(data.parent / "theirs.ds", 2)
    (data / "validation/ours-00000.bin").unlink()
    flip(data / "tokenizer.json", 0)
    found = verify(data).problems
    for start in (
        f"{data}/train/ours-00000.bin: block 1 of 2 does not match its checksum",
        f"{data}/train/ours-00000.idx: does not match its checksum",
        f"{data.parent}/theirs.ds: block 0 of 1 does not match its checksum",
        f"{data}/validation/ours-00000.bin: cannot be read: No such file or directory",
    ):
        assert sum(problem.startswith(start) for problem in found) == 1, start
    assert sum("tokenizer.json" in problem for problem in found) == 2  # once per split
    assert len(found) == 7  # the flipped bits also made ids that are too large


def test_truncated_longer_and_grown_files_are_distinguished(data: Path) -> None:
    ours, theirs = data / "validation/ours-00000.bin", data.parent / "theirs.ds"
    whole = ours.read_bytes()
    ours.write_bytes(whole + b"\x00\x00")
    theirs.write_bytes(theirs.read_bytes() + b"\x00\x00")  # bytes behind tokens that are read in place do not matter
    assert verify(data).problems == (f"{ours}: 10 bytes of tokens where the manifest says 8",)
    ours.write_bytes(whole[:-2])
    assert f"{ours}: 6 bytes of tokens where the manifest says 8" in verify(data).problems


def test_counts_that_do_not_add_up_are_reported_by_source(data: Path) -> None:
    def one_more(manifest: SplitManifest) -> SplitManifest:
        ours, theirs = manifest.sources
        changed = theirs.model_copy(update={"tokens": theirs.tokens + 1, "documents": theirs.documents + 1})
        return manifest.model_copy(update={"sources": (ours, changed)})

    rewrite(data / "train", one_more)
    assert [problem.removeprefix(f"{data}/train/") for problem in verify(data).problems] == [
        "manifest.json: theirs has 10 tokens in all, but its shards list 9",
        "manifest.json: theirs has 4 documents in all, but its shards list 3",
    ]


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (OURS, {}, None),
        ([[5, 6], [0, 7, 0]], {}, "ours-00000.idx: 1 documents do not end with the end-of-text token 0"),
        ([[5, 6], [0, 7, 0]], {"ends_with_eot": False}, None),
        (
            [[5, VOCABULARY, 0]],
            {},
            f"ours-00000.bin: block 0 holds token {VOCABULARY}, the vocabulary has {VOCABULARY}",
        ),
        ([[5, 0], [], [6, 0]], {}, "ours-00000.idx: does not describe 3 documents of 4 tokens in all"),
    ],
)
def test_complete_files_with_wrong_contents_are_found(
    data: Path, documents: list[list[int]], changes: dict[str, object], message: str | None
) -> None:
    source = source_of(write_ours(data / "train", documents), **changes)
    rewrite(data / "train", lambda manifest: manifest.model_copy(update={"sources": (source,)}))
    assert verify(data).problems == (() if message is None else (f"{data}/train/{message}",))


def test_an_index_of_other_documents_is_found_though_its_checksum_is_right(data: Path) -> None:
    shard = load_manifest(data / "validation").sources[0].shards[0].model_copy(update={"documents": 1})
    rewrite(data / "validation", lambda manifest: manifest.model_copy(update={"sources": (source_of(shard),)}))
    assert verify(data).problems == (
        f"{data}/validation/ours-00000.idx: does not describe 1 documents of 4 tokens in all",
    )


def test_a_broken_manifest_a_missing_split_and_no_data(data: Path, tmp_path: Path) -> None:
    whole = (data / "validation" / MANIFEST).read_bytes()
    (data / "validation" / MANIFEST).write_bytes(whole[:-9])
    (problem,) = verify(data).problems
    assert problem.startswith(f"{data}/validation/manifest.json is damaged")
    shutil.rmtree(data / "validation")
    assert verify(data).problems == (f"{data}/validation is missing; it was made together with {data}/train",)
    with pytest.raises(DataError, match="holds no prepared data"):
        verify(tmp_path / "nowhere")


def test_the_largest_id_counts_negative_ones_as_too_large() -> None:
    assert largest_id(np.array([3, 7, 5], np.uint16)) == 7
    assert largest_id(np.array([3, -1], np.int32)) == 2**32 - 1
    assert largest_id(np.array([], np.int32)) == -1


def test_documents_without_end_of_text_are_counted_the_same_in_pieces() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 500).astype(np.uint16)
    ends = np.sort(rng.choice(np.arange(1, 501), 90, replace=False)).astype(np.int64)
    expected = sum(int(tokens[end - 1]) != 0 for end in ends)
    assert 0 < expected < 90
    for step in (1, 7, 64, 500):
        assert sum(count_missing_eot(tokens[at : at + step], at, ends, 0) for at in range(0, 500, step)) == expected


def test_a_file_that_cannot_be_read_now_is_not_a_problem_of_the_data(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = io.open

    def fail(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith("/train/ours-00000.bin"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(io, "open", fail)
    with pytest.raises(
        StorageError,
        match=r"train/ours-00000\.bin cannot be read \(Input/output error\); nothing is known to be damaged",
    ):
        verify(data)
