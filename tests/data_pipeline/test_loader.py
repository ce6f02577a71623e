import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.reading.loader import Loader, prefetch
from data_pipeline.reading.mixture import BLOCK
from data_pipeline.reading.packing import NO_LABEL, Batch
from data_pipeline.settings import MixtureConfig, MixtureStage
from data_pipeline.storage.manifest import BLOCK_BYTES
from data_pipeline.storage.shards import OpenedSplit

WriteSplit = Callable[..., OpenedSplit]
Draw = Callable[..., list[list[int]]]
FIELDS = ("input_ids", "labels", "positions", "document_ids")


def same(one: Batch, two: Batch) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in FIELDS)


def rows(*batches: Batch) -> Batch:
    return Batch(
        *(
            np.concatenate([getattr(batch, name) for batch in batches])
            for name in ("input_ids", "labels", "document_ids")
        )
    )


def part(batch: Batch, first: int, count: int) -> Batch:
    return Batch(*(getattr(batch, name)[first : first + count] for name in ("input_ids", "labels", "document_ids")))


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 4
    file.write_bytes(raw)


@pytest.fixture
def three(write_split: WriteSplit, random_documents: Draw) -> Path:
    """A split of three sources of about 6,000, 3,000 and 600 tokens."""
    sizes = {"web": 200, "code": 100, "books": 20}
    return write_split({name: random_documents(n, 60, seed=n) for name, n in sizes.items()}, shard_tokens=500).folder


def test_an_epoch_is_every_token_of_every_source_exactly_once(write_split: WriteSplit) -> None:
    numbers = iter(np.random.default_rng(0).permutation(5000).tolist())
    documents = [list(itertools.islice(numbers, size)) for size in [7] * 100 + [100] * 43]
    sources = {"web": documents[:90], "code": documents[90:140], "books": documents[140:]}
    loader = Loader(write_split(sources, vocab_size=70_000, shard_tokens=777).folder, seq_len=32, seed=3)
    for epoch in range(3):
        batch = loader.batch(epoch * loader.n_sequences, loader.n_sequences)
        padding = loader.n_sequences * 32 - 5000
        assert 0 < padding < 3 * 32
        counts = Counter(batch.input_ids.ravel().tolist())
        counts[0] -= padding
        assert set(counts.values()) == {1}
        assert len(counts) == 5000
    assert loader.packing_efficiency == 5000 / (loader.n_sequences * 32)
    assert loader.epochs(2 * loader.n_sequences) == {"web": 2, "code": 2, "books": 2}


def test_the_stream_is_the_same_on_one_then_three_then_two_ranks_with_other_accumulation(three: Path) -> None:
    expected = Loader(three, seq_len=16, seed=5).batch(0, 6 * 24)
    read, g = [], 0
    for ranks, accumulation, steps in ((1, 4, 2), (3, 2, 2), (2, 12, 2)):
        loaders = [Loader(three, seq_len=16, seed=5) for _ in range(ranks)]  # new processes know only g
        micro = 24 // (ranks * accumulation)
        for _ in range(steps):
            for rank, part in itertools.product(range(ranks), range(accumulation)):
                read.append(loaders[rank].batch(g + (rank * accumulation + part) * micro, micro))
            g += 24
    assert same(rows(*read), expected)
    assert not same(Loader(three, seq_len=16, seed=6).batch(0, 6 * 24), expected)
    assert not same(Loader(three, seq_len=16, seed=5).batch(1, 6 * 24), expected)


def test_epochs_hold_the_same_rows_in_another_order_and_a_batch_may_span_two(three: Path) -> None:
    loader = Loader(three, seq_len=16, seed=5)
    n = loader.n_sequences
    first, second = loader.batch(0, n), loader.batch(n, n)
    assert not same(first, second)
    assert sorted(map(tuple, first.input_ids.tolist())) == sorted(map(tuple, second.input_ids.tolist()))
    assert same(loader.batch(n - 3, 7), rows(loader.batch(n - 3, 3), loader.batch(n, 4)))
    assert loader.batch(0, 3 * n + 1).input_ids.shape == (3 * n + 1, 16)


def test_longer_sequences_hold_the_same_tokens_as_shorter_ones(three: Path) -> None:
    loader = Loader(three, seq_len=8, seed=5, window=32)
    assert loader.n_sequences % 4 == 0
    n = 2 * loader.n_sequences
    short = loader.batch(0, n)
    for together in (2, 4):
        long = loader.batch(0, n, seq_len=8 * together)
        assert long.input_ids.shape == (n // together, 8 * together)
        assert long.input_ids.ravel().tolist() == short.input_ids.ravel().tolist()
        assert long.labels.ravel().tolist() == short.labels.ravel().tolist()
        assert same(loader.batch(20, 8, seq_len=8 * together), part(long, 20 // together, 8 // together))
    assert same(loader.batch(0, n, seq_len=32), Loader(three, seq_len=32, seed=5).batch(0, n // 4))
    for first, count, seq_len in ((1, 4, 16), (0, 3, 16), (0, 6, 24), (0, 8, 64), (0, 8, 12)):
        with pytest.raises(ValueError, match="are not rows of"):
            loader.batch(first, count, seq_len)


def test_samples_behind_the_end_of_a_source_are_padding_but_not_damaged(write_split: WriteSplit) -> None:
    sources = {"a": [[1] * 41 + [0]], "b": [[2] * 64]}
    loader = Loader(write_split(sources).folder, seq_len=8, seed=5, window=32, on_damage="skip")
    n = loader.n_sequences
    assert n == 16
    batch = loader.batch(0, n)
    empty = (batch.labels == NO_LABEL).all(axis=1)
    assert int(empty.sum()) == 2
    assert batch.damaged == ()
    assert not batch.input_ids[empty].any()
    assert not batch.document_ids[empty].any()
    assert loader.packing_efficiency == 106 / (n * 8)


@pytest.mark.parametrize(("longest", "packing"), [(8, "concatenate"), (32, "concatenate"), (8, "best_fit")])
def test_order_returns_what_batch_reads(write_split: WriteSplit, longest: int, packing: Any) -> None:
    sources = {
        name: [[1000 * k + 8 * i + j for j in range(8)] for i in range(40)] for k, name in enumerate(("a", "b", "c"))
    }
    folder = write_split(sources, vocab_size=5000).folder
    loader = Loader(folder, seq_len=8, seed=5, window=longest, packing=packing)
    for first, count in ((0, loader.n_sequences), (7, 30), (3 * loader.n_sequences - 5, 9)):
        read = loader.batch(first, count).input_ids[:, 0].tolist()
        assert [1000 * source + 8 * sample for source, sample in zip(*loader.order(first, count), strict=True)] == read


def test_sequential_reads_every_sequence_of_a_source_once_and_in_order(write_split: WriteSplit) -> None:
    sources = {"web": [[1] * 40] * 4, "code": [[2] * 40] * 2, "books": [[3] * 24, [4] * 16], "none": []}
    loader = Loader(write_split(sources, name="validation").folder, seq_len=8, seed=5)
    assert loader.sizes == {"web": 20, "code": 10, "books": 5, "none": 0}
    for name, ids in {"web": [1] * 20, "code": [2] * 10, "books": [3, 3, 3, 4, 4], "none": []}.items():
        expected = loader.sequential(name, 0, 99)
        assert expected.input_ids[:, 0].tolist() == ids
        assert same(rows(loader.sequential(name, 0, 3), loader.sequential(name, 3, 99)), expected)
        assert loader.sequential(name, len(ids), 4).input_ids.shape == (0, 8)
    assert loader.sequential("books", 2, 2).input_ids[:, 0].tolist() == [3, 4]
    wider = Loader(loader.sources[0].folder, seq_len=8, seed=6, window=24)
    assert wider.sizes == {"web": 21, "code": 12, "books": 6, "none": 0}  # windows of 24 tokens, the last padded
    assert (wider.sequential("books", 5, 1).labels == NO_LABEL).all()


def test_prefetch_yields_transformed_batches_and_raises_in_the_caller(write_split: WriteSplit) -> None:
    split = write_split({"a": [[i % 999] * 4095 + [0] for i in range(300)]}, shard_tokens=10**9)
    loader = Loader(split.folder, seq_len=1024, seed=1)
    requests = [(first, 4) for first in range(0, 60, 4)]
    ahead = prefetch(loader.batch, iter(requests), lambda batch: (len(batch.input_ids), batch))
    for (first, count), (n, batch) in zip(requests, ahead, strict=True):
        assert n == count
        assert same(batch, loader.batch(first, count))
    endless = prefetch(loader.batch, ((first, 2) for first in itertools.count(0, 2)), lambda batch: batch)
    assert same(next(endless), loader.batch(0, 2))
    endless.close()
    flip(split.folder / "a-00000.bin", 2 * BLOCK_BYTES)
    loader = Loader(split.folder, seq_len=1024, seed=1)
    ahead = prefetch(partial(loader.sequential, "a"), [(0, 8), (1024, 8), (8, 8)], lambda batch: batch)
    assert same(next(ahead), loader.sequential("a", 0, 8))
    with pytest.raises(DataError, match="block 2 of 3"):
        next(ahead)


def test_damage_stops_the_run_or_turns_its_rows_into_padding(write_split: WriteSplit) -> None:
    sources = {"a": [[i % 999 + 1] * 4095 + [0] for i in range(300)], "b": [[7] * 4095 + [0]] * 300}
    folder = write_split(sources, shard_tokens=10**9).folder
    good = Loader(folder, seq_len=1024, seed=1)
    n = good.n_sequences
    expected = good.batch(0, n)
    flip(folder / "a-00000.bin", BLOCK_BYTES + 99)
    with pytest.raises(DataError, match=r"train/a-00000\.bin is damaged: block 1 of 3"):
        Loader(folder, seq_len=1024, seed=1).batch(0, n)
    batch = Loader(folder, seq_len=1024, seed=1, on_damage="skip").batch(0, n)
    lost = (batch.labels == NO_LABEL).all(axis=1)
    per_block = BLOCK_BYTES // 2 // 1024
    assert int(lost.sum()) == len(batch.damaged) == per_block + 1  # the last label of one more row lies in the block
    assert all("a-00000.bin is damaged: block 1 of 3" in message for message in batch.damaged)
    assert not batch.input_ids[lost].any()
    assert not batch.document_ids[lost].any()
    for name in FIELDS:
        assert np.array_equal(getattr(batch, name)[~lost], getattr(expected, name)[~lost])
    flip(folder / "a-00000.idx", 60)
    batch = Loader(folder, seq_len=1024, seed=1, on_damage="skip").batch(0, n)
    assert len(batch.damaged) == n // 2
    assert any("a-00000.idx is damaged" in message for message in batch.damaged)
    assert good.batch(0, n).damaged == ()


def test_less_than_one_window_is_refused_for_training_and_padded_for_validation(write_split: WriteSplit) -> None:
    documents = {"a": [[1, 2, 0]], "b": [[3, 0]]}
    folder = write_split(documents).folder
    with pytest.raises(
        DataError, match=r"data\.seq_len=6 is longer than the data: .*train holds 5 tokens; lower data\.seq_len"
    ):
        Loader(folder, seq_len=6, seed=0)
    with pytest.raises(DataError, match=r"data\.seq_len=8 is longer"):
        Loader(folder, seq_len=4, seed=0, window=8)
    with pytest.raises(DataError, match=r"6, is not a multiple of data\.seq_len=4"):
        Loader(folder, seq_len=4, seed=0, window=6)
    held_out = Loader(write_split(documents, name="validation").folder, seq_len=8, seed=0)
    assert held_out.sequential("a", 0, 9).document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert held_out.sequential("b", 0, 9).document_ids.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    assert held_out.fingerprint == held_out.manifest.fingerprint()


def test_a_mixture_has_its_exact_proportions_at_block_boundaries(write_split: WriteSplit) -> None:
    documents = {"web": [[1] * 64] * 5, "code": [[2] * 64] * 3, "books": [[3] * 64]}
    config = MixtureConfig(
        by="tokens", weights={"web": 1, "books": 3}, stages=(MixtureStage(start="50%", weights={"code": 1}),)
    )
    loader = Loader(write_split(documents).folder, seq_len=16, seed=5, mixture=config, total_samples=2 * BLOCK)
    assert loader.epochs(BLOCK) == {"web": BLOCK / 4 / 20, "code": 0, "books": BLOCK * 3 / 4 / 4}
    assert Counter(loader.batch(0, BLOCK).input_ids[:, 0].tolist()) == {1: BLOCK // 4, 3: BLOCK * 3 // 4}
    assert set(loader.batch(BLOCK, BLOCK).input_ids.ravel().tolist()) == {2}
    assert loader.epochs(2 * BLOCK)["code"] == BLOCK / 12


def test_the_order_fingerprint_identifies_the_samples_and_ignores_later_stages(three: Path) -> None:
    def past(samples: int, **settings: Any) -> str:
        return Loader(three, **({"seq_len": 8, "seed": 5} | settings)).order_fingerprint(samples)

    later = MixtureConfig(stages=(MixtureStage(start=100, weights={"web": 1}),))
    assert past(100) == past(100) == past(100, mixture=later)
    assert past(101) != past(101, mixture=later)
    changed = [
        {"seed": 6},
        {"seq_len": 16},
        {"window": 16},
        {"packing": "best_fit"},
        {"mixture": MixtureConfig(weights={"web": 1})},
    ]
    assert len({past(100), *(past(100, **settings) for settings in changed)}) == 1 + len(changed)


def test_opening_maps_no_token_file(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("a file is mapped")

    monkeypatch.setattr(np, "memmap", refuse)
    loader = Loader(three, seq_len=16, seed=5)
    assert loader.order_fingerprint(10**9)
    with pytest.raises(DataError, match="a file is mapped"):
        loader.batch(0, 1)
