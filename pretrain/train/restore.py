"""A run goes on from its newest whole checkpoint, on whatever layout, and what came after that is undone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.reading.loader import Loader
from parallel.engine import Engine
from pretrain.checkpoint import directory, rng, store
from pretrain.checkpoint.record import Manifest, read_manifest
from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.optim.schedule import samples_before
from pretrain.report.records import read_events
from pretrain.train.growth import check_growth
from pretrain.train.metrics import truncate_after
from pretrain.train.place import Place
from pretrain.train.rundir import RunDirectory

BEFORE_ANY_STEP = -1
"""The validation before the first step is a record of step 0."""


@dataclass(frozen=True)
class Beginning:
    """Where an attempt begins."""

    step: int = 0
    """Steps done."""
    ahead: int = 0
    """Samples that they read more than batches of today's size would have."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Each newer checkpoint that was passed over, with its first problem."""


def restore(run_dir: RunDirectory, engine: Engine, data: Loader, config: RunConfig, place: Place) -> Beginning:
    """Load the newest whole checkpoint; every process of the run calls it. Later records are cut, later (damaged) checkpoints set aside.

    Raises:
        UserError: there are checkpoints but none is whole, or the data is not the data of the run.
    """
    skipped: list[tuple[Path, str]] = []
    path = directory.newest(run_dir.checkpoints, lambda path, problems: skipped.append((path, problems[0])), place.group)
    if path is None:
        truncate_after(run_dir.metrics, BEFORE_ANY_STEP)
        return Beginning()
    manifest = read_manifest(path)
    _check_data(path, manifest, data)
    ahead = manifest.samples - samples_before(manifest.step + 1, config.train)
    check_growth(config, manifest.step, ahead)
    store.load(path, engine.state(), place.group)
    engine.loaded()
    # Nothing that trains draws from these generators: a rank that was not there may begin with any state.
    rng.restore(manifest.rng.get(place.position) or next(iter(manifest.rng.values())))
    truncate_after(run_dir.metrics, manifest.step)
    if place.world.is_main:
        for damaged, _ in skipped:  # among the newest ones, `directory.retain` would keep them and delete those that are saved from now on
            damaged.rename(directory.partial_path(run_dir.checkpoints, directory.step_of(damaged), f"damaged-{run_dir.attempt}"))
    return Beginning(manifest.step, ahead, tuple(skipped))


def is_finished(run_dir: RunDirectory) -> bool:
    """Whether the run has told its end; one that was killed between its last checkpoint and that has not."""
    return any(event.kind == "finish" for event in read_events(run_dir.events))


def _check_data(path: Path, manifest: Manifest, data: Loader) -> None:
    """UserError where the run would not read on where it stopped."""
    if manifest.dataset != data.fingerprint:
        raise UserError(
            f"{path} was trained on other data (manifest {manifest.dataset}) than data.path holds now ({data.fingerprint}); "
            f"put the data back, or start in another run.dir"
        )
    if manifest.order != data.past(manifest.samples):
        raise UserError(
            f"{path} read its first {manifest.samples} sequences in another order than run.seed, data.mixture, data.growth and data.window "
            f"give now; put them back (a stage may be appended from there on), or start in another run.dir"
        )
