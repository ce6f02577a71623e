"""A mixture of experts saved on one layout resumes on others with the same losses, weights, moments and biases."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from workers import WorkerPool

from benchmarks.parity.compare import make_batch, make_config, microbatches_of_rank
from parallel.layout import Layout
from pretrain.checkpoint.directory import checkpoint_path
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import TrainState
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.state_dict import flatten_state_dict
from pretrain.setup.engine import build_engine

SETTINGS = (
    *("model.architecture=moe", "model.moe.n_experts=8", "model.moe.top_k=2", "model.moe.d_ff=32"),
    *("model.moe.n_shared_experts=1", "model.moe.n_dense_layers=1", "model.moe.expert_bias=true"),
    *("model.moe.bias_update_rate=0.01", "model.moe.score_function=sigmoid", "model.moe.router_z_loss=1e-3"),
)
MUON = ("optim.kind=muon",)
HALF, END = 3, 6
Curve = tuple[list[float], list[float]]
"""Losses and gradient norms."""

ALONE = Layout()
EXPERT_4 = Layout(shard=4, expert=4)
EXPERT_2 = Layout(shard=4, expert=2)
PIPELINE = Layout(pipeline=2, shard=2, expert=2)
FOLDED = Layout(shard=2, tensor=2, sequence=True, expert=4, zero=2)


def train(folder: Path, layout: Layout, first: int, end: int, settings: Sequence[str]) -> Curve:
    """The losses and norms of steps [first, end). Begins with the checkpoint of `first`, ends with that of `end`."""
    in_group = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if in_group else 0
    group = torch.distributed.group.WORLD if in_group else None
    engine = build_engine(make_config([*SETTINGS, *settings]), layout, rank)
    if first:
        load_checkpoint(checkpoint_path(folder, first), engine.state(), group)
        engine.sync_compute_weights()
    steps = [
        engine.train_step(microbatches_of_rank(make_batch(step), layout.data_rank(rank), layout.data, 2), 1.0)
        for step in range(first, end)
    ]
    state = TrainState(step=end, samples=end, config={}, dataset="", order="", layout={}, rng={})
    save_checkpoint(folder, engine.state(), state, group)
    return [step.loss for step in steps], [step.grad_norm for step in steps]


def state_at(folder: Path, step: int, settings: Sequence[str]) -> dict[str, Tensor]:
    """Everything that a checkpoint holds."""
    engine = build_engine(make_config([*SETTINGS, *settings]))
    load_checkpoint(checkpoint_path(folder, step), engine.state())
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in flatten_state_dict(engine.state()).items()
    }


def relative(x: Tensor, wanted: Tensor) -> float:
    return float((x - wanted).double().norm() / wanted.double().norm().clamp(min=1e-12))


def run(workers: WorkerPool, folder: Path, layout: Layout, first: int, end: int, settings: Sequence[str]) -> Curve:
    if layout.world_size == 1:
        return train(folder, layout, first, end, settings)
    return workers.run(train, layout.world_size, folder, layout, first, end, settings, timeout=120)[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], tuple[Path, Curve]]:
    """The folder and the curve of a run of one process, by its settings."""

    @cache
    def train_alone(settings: tuple[str, ...]) -> tuple[Path, Curve]:
        folder = tmp_path_factory.mktemp("alone")
        return folder, train(folder, ALONE, 0, END, settings)

    return train_alone


PAIRS = [
    (EXPERT_4, EXPERT_2, ()),
    (EXPERT_4, ALONE, ()),
    (EXPERT_4, PIPELINE, ()),
    (PIPELINE, EXPERT_4, ()),
    (ALONE, FOLDED, ()),
    (FOLDED, PIPELINE, MUON),
]


@pytest.mark.parametrize(("saved", "resumed", "settings"), PAIRS, ids=str)
def test_a_run_goes_on_on_another_layout_as_if_undisturbed(
    saved: Layout,
    resumed: Layout,
    settings: tuple[str, ...],
    undisturbed: Callable[[tuple[str, ...]], tuple[Path, Curve]],
    workers: WorkerPool,
    tmp_path: Path,
) -> None:
    alone, (losses, norms) = undisturbed(settings)
    first = run(workers, tmp_path, saved, 0, HALF, settings)
    second = run(workers, tmp_path, resumed, HALF, END, settings)
    tolerance = 2e-3 if settings == MUON else 1e-5  # Muon orthogonalizes in bf16
    assert first[0] + second[0] == pytest.approx(losses, rel=tolerance)
    assert first[1] + second[1] == pytest.approx(norms, rel=tolerance * 10)
    ours, wanted = (state_at(folder, END, settings) for folder in (tmp_path, alone))
    assert ours.keys() == wanted.keys()
    biases = [name for name in wanted if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert all(wanted[name].any() for name in biases)
    if settings != MUON:
        assert all(torch.equal(ours[name], wanted[name]) for name in biases)
        assert max(relative(ours[name], wanted[name]) for name in wanted) < 1e-3


def test_forgotten_biases_are_detected(undisturbed: Callable[[tuple[str, ...]], tuple[Path, Curve]]) -> None:
    """Negative control: a run that resumes without its biases has another end."""
    folder, _ = undisturbed(())
    engine = build_engine(make_config(SETTINGS))
    load_checkpoint(checkpoint_path(folder, END), engine.state())
    batch = microbatches_of_rank(make_batch(END), 0, 1, 2)
    kept = engine.eval_step(batch).loss_sum
    for name, tensor in flatten_state_dict(engine.state()).items():
        if name.endswith("e_score_correction_bias"):
            tensor.zero_()
    assert abs(engine.eval_step(batch).loss_sum / kept - 1) > 1e-5
