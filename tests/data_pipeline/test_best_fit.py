import errno
import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.reading import best_fit
from data_pipeline.reading.best_fit import BestFitPlan, best_fit_decreasing, plan_best_fit
from data_pipeline.reading.loader import Loader
from data_pipeline.reading.packing import NO_LABEL
from data_pipeline.storage.manifest import BLOCK_BYTES
from data_pipeline.storage.shards import OpenedSplit, open_split

WriteSplit = Callable[..., OpenedSplit]
Draw = Callable[..., list[list[int]]]


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Return the free rooms after textbook best-fit decreasing."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        best = min(fitting, key=lambda i: rooms[i], default=None)
        if best is None:
            rooms.append(capacity - length)
        else:
            rooms[best] -= length
    return sorted(rooms)


def realistic(n: int) -> NDArray[np.int32]:
    """Draw document lengths similar to web text: a median of about 600 tokens and a long tail."""
    return (np.random.default_rng(0).lognormal(np.log(600), 1.0, n)).astype(np.int32) + 2


def test_packing_by_hand(write_split: WriteSplit) -> None:
    documents = [[1, 2, 0], [3, 4, 5, 0], [6, 0], [7, 8, 9, 10, 11, 12, 13, 0], [14, 0], [15, 16, 0]]
    loader = Loader(write_split({"a": documents}).folder, seq_len=5, seed=0, packing="best_fit")
    batch = loader.sequential("a", 0, 9)
    no = NO_LABEL
    assert batch.input_ids.tolist() == [
        [1, 2, 0, 6, 0],
        [3, 4, 5, 0, 0],
        [7, 8, 9, 10, 11],
        [12, 13, 0, 14, 0],
        [15, 16, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [
        [2, 0, 6, 0, no],
        [4, 5, 0, no, no],
        [8, 9, 10, 11, 12],
        [13, 0, 14, 0, no],
        [16, 0, no, no, no],
    ]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0] * 5, [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.positions.tolist() == [
        [0, 1, 2, 0, 1],
        [0, 1, 2, 3, 0],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 0, 1],
        [0, 1, 2, 0, 1],
    ]
    assert loader.packing_efficiency == 22 / 25


def test_the_end_of_a_document_does_not_predict_the_middle_of_another(write_split: WriteSplit) -> None:
    folder = write_split({"a": [[1, 0], [2, 3, 4, 5, 6, 0]]}).folder
    batch = Loader(folder, seq_len=4, seed=0, packing="best_fit").sequential("a", 0, 9)
    assert batch.input_ids.tolist() == [[1, 0, 6, 0], [2, 3, 4, 5]]
    assert batch.labels.tolist() == [[0, NO_LABEL, 0, NO_LABEL], [3, 4, 5, 6]]
    plain = Loader(folder, seq_len=8, seed=0).sequential("a", 0, 1)
    assert plain.labels[0, 1] == 2  # where the document begins there, it does


@settings(max_examples=150, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_it_is_best_fit_decreasing(capacity: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = best_fit_decreasing(np.array(lengths, np.int32), capacity)
    used = np.bincount(bins, lengths).astype(int)
    assert sorted((capacity - used).tolist()) == one_by_one(lengths, capacity)


@settings(max_examples=100, deadline=None)
@given(seq_len=st.integers(1, 30), lengths=st.lists(st.integers(0, 100), max_size=50))
def test_a_plan_holds_every_token_once_and_cuts_no_document_that_fits(seq_len: int, lengths: list[int]) -> None:
    starts, pieces = plan_best_fit(np.array(lengths, np.int32), seq_len)
    assert starts[-1] == len(pieces)
    tokens = [token for start, length, *_ in pieces.tolist() for token in range(start, start + length)]
    assert sorted(tokens) == list(range(sum(lengths)))
    start = 0
    cuts = {start: (length, begins, ends) for start, length, begins, ends, _ in pieces.tolist()}
    for length in lengths:
        whole, rest = divmod(length, seq_len)
        parts = [seq_len] * whole + [rest] * (rest > 0)
        for i, part in enumerate(parts):
            assert cuts.pop(start + i * seq_len) == (part, i == 0, i == len(parts) - 1)
        start += length
    assert not cuts
    for low, high in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert 0 < pieces["length"][low:high].sum() <= seq_len
        assert (np.diff(pieces["start"][low:high]) > 0).all()
    firsts = pieces["start"][starts[:-1]]
    assert (np.diff(firsts) > 0).all()


@pytest.mark.parametrize("seq_len", [1024, 2048, 8192])
def test_sequences_are_filled_to_99_percent_but_not_if_packed_in_order(seq_len: int) -> None:
    lengths = realistic(50_000)
    starts, pieces = plan_best_fit(lengths, seq_len)
    fill = lengths.sum() / ((len(starts) - 1) * seq_len)
    assert fill > 0.999
    rows, room = 1, seq_len
    for length in pieces["length"][np.argsort(pieces["start"])].tolist():
        rows, room = (rows, room - length) if length <= room else (rows + 1, seq_len - length)
    assert lengths.sum() / (rows * seq_len) < 0.95


def test_an_epoch_is_every_token_once_with_labels_from_its_own_document(write_split: WriteSplit) -> None:
    numbers = iter(range(1, 10**6))
    lengths = np.random.default_rng(1).integers(1, 60, 300).tolist()
    # Every token is its own position in the stream.
    documents = [[next(numbers) for _ in range(length)] for length in lengths]
    sources = {"a": documents[:200], "b": documents[200:]}
    loader = Loader(
        write_split(sources, vocab_size=70_000, shard_tokens=100).folder, seq_len=32, seed=2, packing="best_fit"
    )
    batch = loader.batch(0, loader.n_sequences)
    ids = batch.input_ids[batch.input_ids > 0]
    assert sorted(ids.tolist()) == list(range(1, sum(lengths) + 1))
    first = {document[0] for document in documents}
    last = {document[-1] for document in documents}
    for row, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        for column, (token, label) in enumerate(zip(row, labels, strict=True)):
            after = row[column + 1] if column + 1 < len(row) else 0
            if token == 0 or (token in last and after not in first):
                assert label == NO_LABEL
            else:
                assert label == (after if token in last else token + 1)
    assert loader.epochs(2 * loader.n_sequences) == {"a": 2, "b": 2}


def test_a_plan_is_reused_and_made_again_if_it_is_damaged_or_of_other_data(
    write_split: WriteSplit, random_documents: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_split({"a": random_documents(2500, 20)}, shard_tokens=10**9)
    shards = split.sources[0]
    plans_made: list[int] = []

    def counted(lengths: NDArray[np.int32], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
        plans_made.append(seq_len)
        return plan_best_fit(lengths, seq_len)

    monkeypatch.setattr(best_fit, "plan_best_fit", counted)
    first = BestFitPlan(shards, 64)
    n, sequences = first.n_sequences, [first.pieces(i) for i in range(first.n_sequences)]
    assert plans_made == [64]
    whole = first.file.read_bytes()
    assert len(whole) > 40_000
    assert first.file.parent == split.folder
    assert [BestFitPlan(shards, 64).pieces(i) for i in range(n)] == sequences
    assert plans_made == [64]
    for damaged in (
        whole[:-1],
        b"",
        whole[:10],
        b"x" + whole[1:],
        whole[:26] + b"\xff" + whole[27:],
        whole[:9] + b"\xff" + whole[10:],
    ):
        plans_made.clear()
        first.file.write_bytes(damaged)
        assert [BestFitPlan(shards, 64).pieces(i) for i in range(n)] == sequences
        assert plans_made == [64]
        assert first.file.read_bytes() == whole
    body = bytearray(whole)
    body[-5] ^= 1
    first.file.write_bytes(body)
    opened = BestFitPlan(shards, 64)
    assert plans_made == [64]  # the body is not read when it is opened
    assert [opened.pieces(i) for i in range(n)] == sequences
    assert plans_made == [64, 64]
    assert BestFitPlan(shards, 32).file != first.file
    assert [file.suffix for file in split.folder.iterdir() if "best_fit" in file.name] == [".plan", ".plan"]


def test_a_plan_for_other_documents_has_another_name(write_split: WriteSplit) -> None:
    one = write_split({"a": [[1, 0], [2, 2, 0]]}, name="train").sources[0]
    two = write_split({"a": [[1, 1, 0], [2, 0]]}, name="validation").sources[0]
    assert BestFitPlan(one, 8).file.name != BestFitPlan(two, 8).file.name


def test_a_full_disk_is_reported_and_leaves_no_files(write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_split({"a": [[1, 0], [2, 2, 0]]}).folder
    before = sorted(folder.iterdir())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError, match=r"a-best_fit-4-.*\.plan cannot be written \(No space left.*data\.packing=concatenate"
    ):
        Loader(folder, seq_len=4, seed=0, packing="best_fit")
    assert sorted(folder.iterdir()) == before


def test_a_read_only_folder_is_an_error_unless_it_has_a_plan(
    write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_split({"a": [[1, 0], [2, 2, 0]]}).folder
    unpatched = Path.open

    def read_only(file: Path, mode: str = "r") -> IO[Any]:
        if "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system")
        return unpatched(file, mode)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", read_only)
        with pytest.raises(
            DataError,
            match=r"\.plan cannot be written \(Read-only file system\); run once where the folder can be written",
        ):
            Loader(folder, seq_len=4, seed=0, packing="best_fit")
    Loader(folder, seq_len=4, seed=0, packing="best_fit")
    monkeypatch.setattr(Path, "open", read_only)
    assert Loader(folder, seq_len=4, seed=0, packing="best_fit").sequential("a", 0, 9).input_ids.shape == (2, 4)


@pytest.mark.parametrize(("locks", "plans_made"), [(True, 1), (False, 4)])
def test_of_several_processes_one_makes_the_plan(
    write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch, locks: bool, plans_made: int
) -> None:
    shards = write_split({"a": [[1, 0], [2, 2, 0]] * 20}, shard_tokens=10**9).sources[0]
    fork = multiprocessing.get_context("fork")
    start, making = fork.Barrier(4), fork.Value("i", 0)

    def slow(lengths: NDArray[np.int32], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
        with making.get_lock():
            making.value += 1
        time.sleep(0.5)
        return plan_best_fit(lengths, seq_len)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def rank() -> None:
        start.wait()
        assert BestFitPlan(shards, 8).pieces(0)

    monkeypatch.setattr(best_fit, "plan_best_fit", slow)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    ranks = [fork.Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * 4
    assert making.value == plans_made
    assert sorted(file.suffix for file in shards.folder.iterdir()) == [".bin", ".idx", ".json", ".plan"]


def test_a_plan_of_many_blocks_reads_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for rest in (0, 1, 7):
        n = BLOCK_BYTES // 8 + rest - 1
        starts, pieces = np.arange(n + 1, dtype=np.int64), np.zeros(2 * n, best_fit._PIECE)
        pieces["start"] = rng.integers(0, 1 << 40, len(pieces))
        best_fit._write_plan(file := tmp_path / "x.plan", starts, pieces)
        raw, body = file.read_bytes(), starts.tobytes() + pieces.tobytes()
        checksums = [
            xxhash.xxh3_64_intdigest(body[low : low + BLOCK_BYTES]) for low in range(0, len(body), BLOCK_BYTES)
        ]
        assert raw[-len(body) :] == body
        assert raw[32 : -len(body)] == np.array(checksums, "<u8").tobytes()


def test_rows_of_damaged_tokens_are_padding_if_damage_is_skipped(write_split: WriteSplit) -> None:
    documents = [[i % 999 + 1] * 4095 + [0] for i in range(300)]
    folder = write_split({"a": documents}, shard_tokens=10**9).folder
    whole = Loader(folder, seq_len=4096, seed=0, packing="best_fit").batch(0, 300)
    raw = bytearray((folder / "a-00000.bin").read_bytes())
    raw[BLOCK_BYTES] ^= 1
    (folder / "a-00000.bin").write_bytes(raw)
    with pytest.raises(DataError, match=r"a-00000\.bin is damaged: block 1 of 3"):
        Loader(folder, seq_len=4096, seed=0, packing="best_fit").batch(0, 300)
    batch = Loader(folder, seq_len=4096, seed=0, packing="best_fit", on_damage="skip").batch(0, 300)
    lost = (batch.labels == NO_LABEL).all(axis=1)
    assert int(lost.sum()) == len(batch.damaged) == BLOCK_BYTES // 2 // 4096
    assert np.array_equal(batch.input_ids[~lost], whole.input_ids[~lost])
    assert not batch.input_ids[lost].any()
    assert not batch.document_ids[lost].any()


def test_it_packs_for_one_length_only(write_split: WriteSplit) -> None:
    folder = write_split({"a": [[1, 0]] * 40}).folder
    with pytest.raises(
        DataError, match=r"data\.packing=best_fit packs for one length, and the run uses 8 to 16 tokens"
    ):
        Loader(folder, seq_len=8, seed=0, window=16, packing="best_fit")
    assert open_split(folder).manifest.tokens == 80
