"""`pretrain train --dry-run`: what a rank of any layout holds and sends, measured on tensors without memory, is what
the formulas say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.estimate.communication import estimate_traffic
from pretrain.estimate.rank_memory import estimate_rank_memory
from pretrain.setup.dry_run import Measured, measure, shorten_step
from pretrain.setup.resolve import resolve_for_cluster

TINY = (
    "model.n_layers=4",
    "model.d_model=64",
    "model.n_heads=8",
    "model.n_kv_heads=4",
    "model.d_ff=128",
    "model.vocab_size=512",
)
Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py
SHORT = ("data.seq_len=64", "model.max_seq_len=64", "train.micro_batch_size=1")


def dry(world_size: int, rank: int, *args: str) -> tuple[RunConfig, Layout, Measured]:
    resolved = resolve_for_cluster(load(None, list(args)).config, world_size)
    layout = resolved.layout
    config = shorten_step(resolved.config, layout)
    return config, layout, measure(config, layout, rank)


LAYOUTS = {
    "one process": (1, ()),
    "zero 1": (4, ("parallel.zero=1",)),
    "zero 2": (4, ("parallel.zero=2", "parallel.replicate=2")),
    "zero 3": (4, ("parallel.zero=3",)),
    "neighbours": (8, ("parallel.zero=3", "parallel.reshard_to=2", "parallel.tensor=2")),
    "tensor": (4, ("parallel.tensor=2",)),
    "context": (4, ("parallel.context=2",)),
    "pipeline": (8, ("parallel.pipeline=2", "parallel.tensor=2")),
    "all": (
        64,
        ("parallel.pipeline=2", "parallel.replicate=2", "parallel.shard=4", "parallel.context=2", "parallel.tensor=2"),
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_parameter_and_optimizer_bytes_are_those_of_the_formula(case: str) -> None:
    world_size, args = LAYOUTS[case]
    rank = world_size - 1
    config, layout, measured = dry(world_size, rank, *TINY, *SHORT, "train.batch_size=64", *args)
    held = estimate_rank_memory(config, layout, rank)
    assert measured.peak_by_kind["parameters"] == pytest.approx(held.master_bytes, rel=1e-3)
    assert measured.peak_by_kind["optimizer state"] == pytest.approx(
        held.optimizer_bytes, rel=1e-2
    )  # and a step counter a tensor
    assert measured.peak_by_kind["gradients"] == pytest.approx(held.gradient_bytes, rel=1e-3)


@pytest.mark.parametrize("case", [case for case in LAYOUTS if case != "one process"])
def test_parameters_move_as_the_formula_says(case: str) -> None:
    world_size, args = LAYOUTS[case]
    config, layout, measured = dry(world_size, 0, *TINY, *SHORT, "train.batch_size=64", *args)
    formula = estimate_traffic(config, layout, 0)["fsdp"]
    sent = next(moved for axis, moved in measured.sent.items() if axis == "fsdp")
    assert sent["all-gather"] == pytest.approx(formula["all-gather"], rel=1e-2)
    assert sent["reduce-scatter"] == pytest.approx(formula["reduce-scatter"], rel=1e-2)


def test_another_layout_holds_other_bytes() -> None:
    config, layout, measured = dry(4, 0, *TINY, *SHORT, "parallel.zero=3")
    _, other, _ = dry(8, 0, *TINY, *SHORT, "parallel.zero=3")
    assert measured.peak_by_kind["parameters"] > 1.9 * estimate_rank_memory(config, other, 0).master_bytes
    assert layout.shard == 4


def test_7b_on_64_ranks_prints_what_the_peak_rank_holds(
    pretrain: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = (
        "model.preset=mistral-7b",
        "data.seq_len=4096",
        "parallel.tensor=8",
        "train.batch_size=8",
        "train.micro_batch_size=1",
    )
    answer = pretrain("train", *args, "--dry-run", "--world-size", 64)
    assert answer.code == 0, answer.err
    assert "shard=8 tensor=8: rank 0 of 64" in answer.out
    rows = {line.split("  ")[0]: line for line in answer.out.splitlines()}
    assert rows["parameters"].split()[-1] == rows["optimizer state"].split()[-1] == "+0.00%"
    assert not list(tmp_path.iterdir())  # no run directory, no file


def test_a_rank_of_2048_holds_what_the_formula_says_of_405b_with_a_layer_a_stage() -> None:
    args = ("parallel.shard=8", "parallel.tensor=8", "parallel.pipeline=16", "parallel.context=2", "model.n_layers=16")
    config, layout, measured = dry(
        2048,
        1000,
        "model.preset=llama3-405b",
        "data.seq_len=8192",
        "train.batch_size=128",
        "train.micro_batch_size=1",
        *args,
    )
    held, sent = estimate_rank_memory(config, layout, 1000), estimate_traffic(config, layout, 1000)
    assert measured.peak_by_kind["parameters"] == pytest.approx(held.master_bytes, rel=1e-3)
    assert measured.peak_by_kind["optimizer state"] == pytest.approx(held.optimizer_bytes, rel=1e-3)
    assert measured.peak_by_kind["gradients"] == pytest.approx(held.gradient_bytes, rel=1e-3)
    assert {axis: measured.sent[axis] for axis in sent} == {
        axis: pytest.approx(moved, rel=1e-3) for axis, moved in sent.items()
    }


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--world-size", "8", "--dry-run", "--rank", "8"), "--rank=8 is not one of 8 ranks; use 0 to 7"),
        (
            ("--world-size", "8"),
            "--world-size and --rank only go with --dry-run; a run takes its processes from torchrun",
        ),
        (("--world-size", "8", "--dry-run", "parallel.shard=3"), "parallel.shard=3"),
    ],
)
def test_impossible_requests_end_in_one_line_and_code_2(args: tuple[str, ...], says: str, pretrain: Pretrain) -> None:
    answer = pretrain("train", *TINY, *SHORT, "train.batch_size=8", *args)
    assert answer.code == 2
    assert says in answer.err
    assert len(answer.err.strip().splitlines()) == 1
