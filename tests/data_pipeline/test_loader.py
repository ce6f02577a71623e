import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loader import Loader, prefetch
from data_pipeline.manifest import BLOCK_BYTES
from data_pipeline.packing import NO_LABEL, Batch
from data_pipeline.shards import ShardSet

WriteSplit = Callable[..., ShardSet]
Draw = Callable[..., list[list[int]]]
FIELDS = ("input_ids", "labels", "positions", "document_ids")


def same(one: Batch, two: Batch) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in FIELDS)


def rows(*batches: Batch) -> Batch:
    return Batch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in FIELDS))


def test_packing_by_hand(write_split: WriteSplit) -> None:
    loader = Loader(write_split([[1, 2, 0], [3, 4, 5, 6, 0], [7, 0]]).folder, seq_len=4, seed=0)
    batch = loader.sequential(0, 9)
    no = NO_LABEL
    assert batch.input_ids.tolist() == [[1, 2, 0, 3], [4, 5, 6, 0], [7, 0, 0, 0]]
    assert batch.labels.tolist() == [[2, 0, 3, 4], [5, 6, 0, 7], [0, no, no, no]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert [getattr(batch, name).dtype for name in FIELDS] == [np.int64, np.int64, np.int32, np.int32]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 33, 200])
def test_packing_equals_a_plain_reading_of_the_documents(write_split: WriteSplit, random_documents: Draw, seq_len: int) -> None:
    documents = random_documents(120, 40)
    loader = Loader(write_split(documents, shard_tokens=300).folder, seq_len, seed=0)
    batch = loader.sequential(0, loader.n_sequences)
    owner = [i for i, ids in enumerate(documents) for _ in ids]
    stream = list(itertools.chain(*documents))
    n_rows = -(-len(stream) // seq_len)
    assert batch.input_ids.shape == (n_rows, seq_len)
    assert batch.input_ids.ravel()[: len(stream)].tolist() == stream
    assert batch.labels.ravel().tolist() == stream[1:] + [NO_LABEL] * (n_rows * seq_len - len(stream) + 1)
    owner += [len(documents)] * (n_rows * seq_len - len(stream))
    for row in range(n_rows):
        owners = owner[row * seq_len : (row + 1) * seq_len]
        assert batch.document_ids[row].tolist() == [owner - owners[0] for owner in owners]
        assert batch.positions[row].tolist() == [place - owners.index(owner) for place, owner in enumerate(owners)]


def test_an_epoch_is_every_token_exactly_once(write_split: WriteSplit) -> None:
    rng = np.random.default_rng(0)
    numbers = iter(rng.permutation(5000).tolist())
    documents = [list(itertools.islice(numbers, size)) for size in [7] * 100 + [100] * 43]
    shards = write_split(documents, vocab_size=70_000, shard_tokens=777)
    loader = Loader(shards.folder, seq_len=32, seed=3)
    batch = loader.batch(0, loader.n_sequences)
    padding = loader.n_sequences * 32 - 5000
    assert padding > 0
    counts = Counter(batch.input_ids.ravel().tolist())
    counts[0] -= padding
    assert set(counts.values()) == {1}
    assert len(counts) == 5000


def test_a_batch_is_the_slices_of_its_ranks_whatever_their_number(write_split: WriteSplit, random_documents: Draw) -> None:
    folder = write_split(random_documents(300, 60), shard_tokens=500).folder
    whole = Loader(folder, 16, seed=5).batch(40, 24)
    for ranks in (2, 3, 8):
        share = 24 // ranks
        assert same(rows(*(Loader(folder, 16, seed=5).batch(40 + rank * share, share) for rank in range(ranks))), whole)
    assert not same(Loader(folder, 16, seed=6).batch(40, 24), whole)
    assert not same(Loader(folder, 16, seed=5).batch(41, 24), whole)


def test_epochs_hold_the_same_rows_in_another_order_and_a_batch_may_span_two(write_split: WriteSplit, random_documents: Draw) -> None:
    loader = Loader(write_split(random_documents(100, 60)).folder, 16, seed=5)
    n = loader.n_sequences
    first, second = loader.batch(0, n), loader.batch(n, n)
    assert not same(first, second)
    assert sorted(map(tuple, first.input_ids.tolist())) == sorted(map(tuple, second.input_ids.tolist()))
    assert same(loader.batch(n - 3, 7), rows(loader.batch(n - 3, 3), loader.batch(n, 4)))
    assert loader.batch(0, 3 * n + 1).input_ids.shape == (3 * n + 1, 16)


def test_sequential_is_unshuffled_and_ends_with_the_split(write_split: WriteSplit, random_documents: Draw) -> None:
    loader = Loader(write_split(random_documents(50, 60)).folder, 16, seed=5)
    n = loader.n_sequences
    assert same(rows(loader.sequential(0, 5), loader.sequential(5, n)), loader.sequential(0, n))
    assert loader.sequential(n, 4).input_ids.shape == (0, 16)


def test_prefetch_yields_what_batch_does_and_raises_in_the_caller(write_split: WriteSplit) -> None:
    shards = write_split([[i % 999] * 4095 + [0] for i in range(300)], shard_tokens=10**9)
    loader = Loader(shards.folder, 1024, seed=1)
    slices = [(first, 4) for first in range(0, 60, 4)]
    for (first, count), batch in zip(slices, prefetch(loader, iter(slices)), strict=True):
        assert same(batch, loader.batch(first, count))
    endless = prefetch(loader, ((first, 2) for first in itertools.count(0, 2)))
    assert same(next(endless), loader.batch(0, 2))
    endless.close()
    file = shards.folder / "shard-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[2 * BLOCK_BYTES] ^= 4
    file.write_bytes(raw)
    loader = Loader(shards.folder, 1024, seed=1)
    with pytest.raises(DataError, match="block 2"):
        list(prefetch(loader, [(0, loader.n_sequences)]))


def test_training_on_less_than_one_sequence_is_refused_and_validating_is_padded(write_split: WriteSplit) -> None:
    documents = [[1, 2, 0], [3, 0]]
    with pytest.raises(DataError, match=r"data\.seq_len=6 is longer than the data: .*train holds 5 tokens; lower data\.seq_len"):
        Loader(write_split(documents).folder, seq_len=6, seed=0)
    held_out = Loader(write_split(documents, name="validation").folder, seq_len=8, seed=0)
    assert held_out.sequential(0, 1).document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert held_out.fingerprint == held_out.shards.manifest.fingerprint()
