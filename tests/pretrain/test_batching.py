"""Data ranks share every batch out: together they read its rows, each once and in order, and all give equally many."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flash import flash_on_a_cpu

from data_pipeline.reading.loader import Loader
from data_pipeline.reading.packing import NO_LABEL, Batch
from parallel.layout import Layout
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.optim.schedule import batch_size_at, samples_before
from pretrain.setup.batch_schedule import BatchSchedule
from pretrain.setup.engine import build_engine, forward_step
from pretrain.train.batching import DataShard, pad_batch, split_microbatches, to_host
from pretrain.train.loop import TrainLoop
from pretrain.train.rank_info import RankInfo

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("n_rows", [1, 2, 7, 8, 64, 65])
def test_every_row_is_read_by_one_rank_and_all_give_equally_many(n_rows: int, ranks: int) -> None:
    shares = [DataShard(rank, ranks) for rank in range(ranks)]
    assert [row for share in shares for row in share.rows(n_rows)] == list(range(n_rows))
    assert {len(share.rows(n_rows)) for share in shares} <= {n_rows // ranks, -(-n_rows // ranks)}
    most = -(-n_rows // ranks)
    (given,) = {share.padded_rows(n_rows, 3) for share in shares}
    assert given % 3 == 0
    assert most <= given < most + 3  # less than one microbatch more


def test_every_rank_has_the_same_number_of_full_microbatches() -> None:
    assert [DataShard(0, 2).padded_rows(n_rows, 4) for n_rows in (1, 8, 9, 16, 18)] == [4, 4, 8, 8, 12]


def test_a_batch_that_is_not_filled_up_is_not_cut(tiny_data: Path) -> None:
    batch = to_host(Loader(tiny_data / "train", seq_len=32, seed=0).batch(0, 4), CPU)
    assert [len(part.input_ids) for part in split_microbatches(batch, 2, CPU)] == [2, 2]
    with pytest.raises(ValueError, match="a batch of 4 rows does not divide into microbatches of 3"):
        list(split_microbatches(batch, 3, CPU))


def test_one_process_reads_every_row_without_padding() -> None:
    assert (DataShard().rows(9), DataShard().padded_rows(9, 3)) == (range(9), 9)


def test_padding_rows_have_no_targets_and_valid_positions(tiny_data: Path) -> None:
    loader = Loader(tiny_data / "train", seq_len=32, seed=0)
    for count in (0, 2, 6):
        batch = loader.batch(10, count)
        filled = pad_batch(batch, 6)
        assert (
            filled.input_ids.shape
            == filled.labels.shape
            == filled.document_ids.shape
            == filled.positions.shape
            == (6, 32)
        )
        assert np.array_equal(filled.input_ids[:count], batch.input_ids)
        assert (filled.labels[count:] == NO_LABEL).all()
        assert np.array_equal(filled.positions[:count], batch.positions)
        assert (filled.positions[count:] == np.arange(32)).all()
        parts = list(split_microbatches(to_host(filled, CPU), 3, CPU))
        assert [len(part.input_ids) for part in parts] == [3, 3]
        assert sum(part.n_targets for part in parts) == np.count_nonzero(batch.labels != NO_LABEL)


MODEL = (
    *(
        "model.n_layers=2",
        "model.d_model=32",
        "model.n_heads=4",
        "model.n_kv_heads=2",
        "model.d_ff=64",
        "model.vocab_size=300",
    ),
    *("train.device=cpu", "train.compile=false", "train.z_loss=1e-3", "optim.warmup=0", "optim.decay=1"),
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "blocked", "varlen"])
def test_padding_rows_add_exactly_nothing(attention: str, precision: str, tiny_data: Path) -> None:
    config = load(None, [*MODEL, f"train.attention={attention}", f"train.precision={precision}"]).config
    engine, batch = build_engine(config), Loader(tiny_data / "train", seq_len=32, seed=0).batch(0, 2)
    whole, empty = split_microbatches(to_host(pad_batch(batch, 4), CPU), 2, CPU)
    with flash_on_a_cpu():
        for microbatch, adds in ((empty, False), (whole, True)):
            engine.model.zero_grad()
            sums = forward_step(engine.model, None, microbatch, z_loss=config.train.z_loss)
            assert not isinstance(sums, torch.Tensor)
            sums.total.backward()
            gradients = [master.grad for master in engine.master_weights.values() if master.grad is not None]
            assert len(gradients) == len(engine.master_weights)
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert any(gradient.any() for gradient in gradients) == adds
            assert bool(sums.total) == bool(sums.cross_entropy) == bool(sums.z_loss) == adds


def read(config: RunConfig, layout: Layout, rank: int, step: int) -> Batch:
    """What the loop of a rank reads of a step; nothing else of the loop is there."""
    batches = BatchSchedule.from_config(config.data, config.train)
    loader = Loader(
        config.data.path / "train", seq_len=config.data.seq_len, seed=config.run.seed, window=batches.window
    )
    nothing: Any = None
    place = RankInfo(World(rank, layout.world_size), layout)
    return TrainLoop(config, batches, nothing, loader, None, Path(), nothing, nothing, nothing, place, nothing)._read(
        step
    )


@pytest.mark.parametrize(
    ("layout", "args"),
    [
        (Layout(shard=2), ()),
        (Layout(shard=3, replicate=2), ("train.batch_size=6",)),
        (Layout(shard=4), ("train.batch_size=8", "train.batch_ramp_steps=6", "train.batch_ramp_start=1")),
        (Layout(shard=2, tensor=2, context=2), ("train.batch_size=6",)),
        (Layout(shard=2, pipeline=2), ("train.batch_size=8", "train.batch_ramp_steps=6", "train.batch_ramp_start=3")),
        (
            Layout(shard=2),
            ("train.batch_size=8", "data.seq_len_schedule=[{from: 32, seq_len: 64}]", "train.micro_batch_size=4"),
        ),
    ],
    ids=["even", "replicas", "ramp", "same rows", "pipeline", "seq_len_schedule"],
)
def test_the_ranks_together_read_the_global_batch_of_every_step(
    layout: Layout, args: tuple[str, ...], tiny_args: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = load(None, tiny_args(tmp_path, "train.steps=8", "train.micro_batch_size=2", *args)).config
    schedule = BatchSchedule.from_config(config.data, config.train)
    whole = Loader(config.data.path / "train", seq_len=32, seed=config.run.seed, window=schedule.window)
    for step in range(1, 9):
        first = samples_before(step, config.train)
        expected = whole.batch(first, batch_size_at(step, config.train), schedule.seq_len_at(first))
        batches = [read(config, layout, rank, step) for rank in range(layout.world_size)]
        assert len({batch.input_ids.shape for batch in batches}) == 1
        by_data_rank = {layout.data_rank(rank): batch for rank, batch in enumerate(batches)}
        for rank, batch in enumerate(batches):
            assert np.array_equal(batch.labels, by_data_rank[layout.data_rank(rank)].labels)
        rows = [row for rank in range(layout.data) for row in by_data_rank[rank].labels if (row != NO_LABEL).any()]
        assert np.array_equal(rows, expected.labels)
        assert len(batches[0].labels) % max(1, config.train.micro_batch_size * 32 // batches[0].labels.shape[1]) == 0
