"""TensorBoard files are read back; Weights & Biases runs for real, offline."""

import math
from pathlib import Path

import pytest
from step_records import step_record

from pretrain.config import RunConfig
from pretrain.runs.schema import RoutingStatistics, SourceLoss, ValidationRecord
from pretrain.tracking.loggers import open_loggers, scalars


def config(tmp_path: Path, **log: object) -> RunConfig:
    return RunConfig.model_validate({"run": {"dir": str(tmp_path)}, "log": log})


def train(settings: RunConfig, path: Path, steps: range, loss: float, resume_step: int = 0) -> None:
    for logger in open_loggers(settings, path, resume_step):
        for step in steps:
            logger.log(step_record(step, loss))
        logger.log(ValidationRecord(step=steps[-1], val_loss=loss + 1, val_tokens=9, time=0))
        logger.close()


def test_there_are_no_loggers_by_default(tmp_path: Path) -> None:
    assert open_loggers(config(tmp_path), tmp_path, 0) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(tmp_path, tensorboard=True)
    train(settings, tmp_path, range(1, 7), 3.0)
    train(settings, tmp_path, range(5, 8), 2.0, resume_step=4)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss")] == [
        (s, 3.0 if s < 5 else 2.0) for s in range(1, 8)
    ]
    assert [(point.step, point.value) for point in board.Scalars("validation/loss")] == [(7, 3.0)]
    assert "speed/mfu" not in board.Tags()["scalars"]


def test_of_several_sources_each_has_a_curve_and_a_single_one_has_none() -> None:
    losses = {"web": SourceLoss(loss=0.0, tokens=9), "code": SourceLoss(loss=2.0, tokens=1)}
    whole = {"validation/loss": 0.2, "validation/perplexity": pytest.approx(1.2214, rel=1e-4)}
    record = ValidationRecord(step=1, val_loss=0.2, val_tokens=10, by_source=losses, time=0)
    assert scalars(record) == whole | {
        "val_loss/web": 0.0,
        "val_loss/code": 2.0,
        "val_perplexity/web": 1.0,
        "val_perplexity/code": pytest.approx(7.38906, rel=1e-5),
    }
    assert scalars(record.model_copy(update={"by_source": {"web": losses["web"]}})) == whole


def test_experts_have_a_few_curves_whatever_their_number() -> None:
    layers = tuple(range(94))
    routing = RoutingStatistics(
        layers=layers, load_max=(1.0,) * 93 + (4.76,), dead=(0,) * 93 + (5,), entropy=(0.5,) * 94, dropped=(0.25,) * 94
    )
    record = step_record(1, routing=routing).model_copy(update={"aux_loss": 0.94, "router_z_loss": 0.1})
    new = {name: value for name, value in scalars(record).items() if name not in scalars(step_record(1))}
    assert new == {
        "train/aux_loss": 0.94,
        "train/router_z_loss": 0.1,
        "experts/load_max": 4.76,
        "experts/load_max_mean": pytest.approx(1.04),
        "experts/entropy": 0.5,
        "experts/dead": 5,
        "experts/dropped": 0.25,
    }


def test_a_source_has_a_curve_of_how_specialised_its_experts_are() -> None:
    counts = {0: (4, 4), 1: (8, 0)}
    losses = {"web": SourceLoss(loss=0.0, tokens=8, expert_counts=counts), "code": SourceLoss(loss=2.0, tokens=8)}
    record = ValidationRecord(step=1, val_loss=1.0, val_tokens=16, by_source=losses, time=0)
    new = {name: value for name, value in scalars(record).items() if name.startswith("specialisation")}
    assert new == {"specialisation/web": pytest.approx(math.log(2) / 2)}


@pytest.mark.timeout(120)
def test_wandb_offline_keeps_one_run_over_two_attempts(tmp_path: Path) -> None:
    settings = config(tmp_path, wandb="offline")
    train(settings, tmp_path, range(1, 4), 3.0)
    train(settings, tmp_path, range(4, 6), 2.0, resume_step=3)
    run_id = (tmp_path / "wandb-id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2
    for file in files:
        written = file.read_bytes()
        assert all(name in written for name in (b"train/loss", b"validation/loss", b"speed/tokens_per_s"))
