import itertools
from collections.abc import Callable

import numpy as np
import pytest

from data_pipeline.reading import packing
from data_pipeline.reading.loader import Loader
from data_pipeline.reading.packing import NO_LABEL, number_documents, read_concatenated
from data_pipeline.storage.shards import OpenedSplit

WriteSplit = Callable[..., OpenedSplit]
Draw = Callable[..., list[list[int]]]


def test_packing_by_hand(write_split: WriteSplit) -> None:
    loader = Loader(write_split({"a": [[1, 2, 0], [3, 4, 5, 6, 0], [7, 0]]}).folder, seq_len=4, seed=0)
    batch = loader.sequential("a", 0, 9)
    no = NO_LABEL
    assert batch.input_ids.tolist() == [[1, 2, 0, 3], [4, 5, 6, 0], [7, 0, 0, 0]]
    assert batch.labels.tolist() == [[2, 0, 3, 4], [5, 6, 0, 7], [0, no, no, no]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert {array.dtype for array in (batch.input_ids, batch.labels, batch.positions, batch.document_ids)} == {
        np.dtype(np.int32)
    }
    assert batch.damaged == ()


def test_the_row_drawn_in_the_docstring(write_split: WriteSplit) -> None:
    documents = np.split(np.arange(30), [12, 15, 17])
    (source,) = write_split({"a": [ids.tolist() for ids in documents]}, shard_tokens=15).sources
    batch = read_concatenated([source], [(0, 10)], 8, 0, skip=False)
    drawing = dict(line.split(maxsplit=1) for line in packing.__doc__.splitlines() if line.startswith("    "))
    for name in ("input_ids", "labels", "document_ids", "positions"):
        assert getattr(batch, name)[0].tolist() == [int(word) for word in drawing[name].split()[:8]]
    assert source.files[0].shard.tokens == 15


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 33, 200, 5000])
def test_packing_equals_a_plain_reading_of_the_documents(
    write_split: WriteSplit, random_documents: Draw, seq_len: int, vocab_size: int
) -> None:
    long = random_documents(3, 9000, seed=1)  # longer than a cell of the lookup table
    documents = [*random_documents(120, 40), *long]
    folder = write_split({"a": documents}, vocab_size=vocab_size, shard_tokens=300).folder
    loader = Loader(folder, seq_len=seq_len, seed=0)
    batch = loader.sequential("a", 0, loader.n_sequences)
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
        first = {owner: column for column, owner in reversed(list(enumerate(owners)))}
        assert batch.positions[row].tolist() == [column - first[owner] for column, owner in enumerate(owners)]


def test_inputs_and_labels_are_one_array_where_nothing_is_padded(
    write_split: WriteSplit, random_documents: Draw
) -> None:
    sources = write_split({"a": random_documents(50, 40)}).sources
    unpadded = read_concatenated(sources, [(0, 0), (0, 16)], 16, 0, skip=False)
    assert unpadded.input_ids.base is unpadded.labels.base is not None
    padded = read_concatenated(sources, [(0, 0), (0, sources[0].n_tokens - 3)], 16, 0, skip=False)
    assert np.array_equal(padded.labels[0], unpadded.labels[0])
    assert padded.labels[1, 2:].tolist() == [NO_LABEL] * 14
    assert padded.document_ids[1].tolist().count(padded.document_ids[1, -1]) >= 13


def test_a_row_behind_the_end_is_padding_and_no_rows_give_an_empty_batch(write_split: WriteSplit) -> None:
    sources = write_split({"a": [[1, 2, 0]]}).sources
    behind = read_concatenated(sources, [(0, 4)], 4, 9, skip=False)
    assert behind.input_ids.tolist() == [[9] * 4]
    assert behind.labels.tolist() == [[NO_LABEL] * 4]
    assert behind.document_ids.tolist() == [[0] * 4]
    assert behind.positions.tolist() == [[0, 1, 2, 3]]
    nothing = read_concatenated(sources, [], 4, 9, skip=False)
    assert [a.shape for a in (nothing.input_ids, nothing.labels, nothing.document_ids, nothing.positions)] == [
        (0, 4)
    ] * 4


def test_documents_are_numbered_by_their_starts_in_any_order_and_with_duplicates() -> None:
    once = number_documents(np.array([2, 3, 9]), 3, 4)
    assert once.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert np.array_equal(number_documents(np.array([9, 2, 0, 2, 3, 8, 12, 4]), 3, 4), once)
    assert not np.array_equal(number_documents(np.array([2, 3, 10]), 3, 4), once)


def test_a_document_without_tokens_is_not_counted(write_split: WriteSplit) -> None:
    loader = Loader(write_split({"a": [[1, 0], [], [2, 0], [], [3, 0]]}).folder, seq_len=6, seed=0)
    assert loader.sequential("a", 0, 1).document_ids.tolist() == [[0, 0, 1, 1, 2, 2]]
