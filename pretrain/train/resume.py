"""A run goes on from its newest whole checkpoint, on whatever layout, and what came after that is undone. One that
has none yet begins from the checkpoint of another run that `run.init_from` names, or from its initial weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import StorageError
from data_pipeline.reading.loader import Loader
from data_pipeline.tokenizing.tokenizer import Tokenizer
from parallel.engine import Engine
from pretrain.checkpoint import directory, rng
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import Manifest, read_manifest
from pretrain.checkpoint.object_collectives import on_rank_zero
from pretrain.checkpoint.prune import delete_unfinished, prune
from pretrain.config import RunConfig
from pretrain.config.loading import validate
from pretrain.errors import UserError
from pretrain.runs.directory import RunDirectory
from pretrain.runs.jsonl import backup_records, read_events, truncate_after
from pretrain.setup.batch_schedule import BatchSchedule
from pretrain.train.disk_space import check_writable
from pretrain.train.init_from import InitCheckpoint, check_init_checkpoint, find_init_checkpoint, load_init_checkpoint
from pretrain.train.rank_info import RankInfo
from pretrain.train.resume_checks import check_records
from pretrain.train.schedule_change import check_schedule

BEFORE_ANY_STEP = -1
"""The validation before the first step is a record of step 0."""


@dataclass(frozen=True)
class ResumeState:
    """Where an attempt begins."""

    batches: BatchSchedule
    """Which samples the steps to come read."""
    step: int = 0
    """Steps done."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Each newer checkpoint that was passed over, with its first problem."""
    resumed: bool = False
    """Whether it goes on from a checkpoint of this run."""
    parent: InitCheckpoint | None = None
    """The checkpoint of another run that this one begins from; None where it resumes."""
    notices: tuple[str, ...] = ()
    """What else the user should know of what was found."""
    finished: bool = False
    """Whether the run has told its end, and nothing is left to do."""


def restore(
    run_dir: RunDirectory,
    engine: Engine,
    data: Loader,
    config: RunConfig,
    batches: BatchSchedule,
    tokenizer: Tokenizer,
    rank_info: RankInfo,
) -> ResumeState:
    """Load the newest whole checkpoint; every process of the run calls it. Later records are cut, later (damaged)
    checkpoints set aside.

    Raises:
        UserError: the run has lost checkpoints, and `checkpoint.on_invalid` does not accept that; or data or schedule are
            not those of the steps taken; or the checkpoint of another run that `run.init_from` names does not fit;
            or no checkpoint can be written. Nothing was changed then, but for remains of unfinished checkpoints.
        StorageError: something cannot be read now, or the records cannot be written.
    """
    skipped: list[tuple[Path, str]] = []
    none_whole = ""
    go_back = config.checkpoint.on_invalid == "go_back"
    try:
        path = directory.latest_valid(
            run_dir.checkpoints, lambda path, problems: skipped.append((path, problems[0])), rank_info.group
        )
    except directory.NoValidCheckpoint as error:
        path, none_whole = None, str(error.args[0])
    manifest = None if path is None else read_manifest(path)
    findings = on_rank_zero(
        rank_info.group, lambda: check_records(run_dir.path, path, manifest, none_whole, go_back=go_back)
    )
    if path is not None and manifest is not None:
        resume_state = _resume(path, manifest, run_dir, engine, data, config, batches, rank_info)
    elif config.run.init_from is not None:
        resume_state = _begin_from_parent(engine, data, config, batches, tokenizer, rank_info)
    else:
        resume_state = ResumeState(batches)
    finished = resume_state.step == config.train.steps and on_rank_zero(
        rank_info.group, lambda: is_finished(run_dir.events, resume_state.step)
    )
    on_rank_zero(rank_info.group, lambda: _ready_to_save(run_dir.checkpoints, finished=finished))
    if rank_info.world.is_main:
        try:
            if findings.lost:
                backup_records(run_dir.metrics, run_dir.attempt)
            truncate_after(run_dir.metrics, resume_state.step if path else BEFORE_ANY_STEP)
            for (
                damaged,
                _,
            ) in skipped:  # `directory.retain` would count them as the newest, and delete what is saved now
                directory.mark_damaged(damaged)
        except OSError as error:
            raise StorageError(
                f"run.dir={run_dir.path} cannot be written ({error}); mend that, and start again"
            ) from error
    prune(run_dir.checkpoints, config.checkpoint.keep, rank_info.group)  # a smaller `keep` makes room for the next
    return replace(resume_state, skipped=tuple(skipped), notices=findings.notices, finished=finished)


def _ready_to_save(checkpoints: Path, *, finished: bool) -> None:
    """Delete what crashes left, which no other process can be writing: this one holds the lock. UserError where no
    checkpoint can be written; a finished run saves none."""
    delete_unfinished(checkpoints)
    if not finished:
        check_writable(checkpoints)


def _resume(
    path: Path,
    manifest: Manifest,
    run_dir: RunDirectory,
    engine: Engine,
    data: Loader,
    config: RunConfig,
    batches: BatchSchedule,
    rank_info: RankInfo,
) -> ResumeState:
    """Fill the engine from a checkpoint of this run."""
    kept = on_rank_zero(rank_info.group, lambda: directory.committed_steps(run_dir.checkpoints))
    check_schedule(run_dir.path, validate(manifest.config), config, manifest.step, manifest.samples, kept)
    _check_data(path, manifest, data)
    batches = batches.after(manifest.step, manifest.samples)
    load_checkpoint(path, engine.state(), rank_info.group)
    engine.sync_compute_weights()
    _restore_rng(manifest, rank_info)
    return ResumeState(batches, manifest.step, resumed=True)


def _begin_from_parent(
    engine: Engine, data: Loader, config: RunConfig, batches: BatchSchedule, tokenizer: Tokenizer, rank_info: RankInfo
) -> ResumeState:
    """Fill the engine from another run's checkpoint. The first rank says which: that run may be saving others."""
    parent = on_rank_zero(rank_info.group, lambda: find_init_checkpoint(config))
    check_init_checkpoint(parent, config, tokenizer, data)
    manifest, mode = parent.manifest, config.run.init_mode
    step = 0
    if mode == "full":
        step, batches = manifest.step, batches.after(manifest.step, manifest.samples)
        _restore_rng(manifest, rank_info)
    load_init_checkpoint(parent, engine, mode, rank_info.group)
    return ResumeState(batches, step, parent=parent)


def _restore_rng(manifest: Manifest, rank_info: RankInfo) -> None:
    """Nothing that trains draws from these generators: a rank that was not there may begin with any state."""
    rng.restore(manifest.rng.get(rank_info.coordinates) or next(iter(manifest.rng.values())))


def is_finished(events: Path, step: int) -> bool:
    """Whether the run has told its end after `step` steps, and nothing since; one that was killed between its last
    checkpoint and that has not, and one that was made longer has told an earlier end."""
    told = [event for event in read_events(events) if event.kind in {"start", "resume", "finish"}]
    return bool(told) and told[-1].kind == "finish" and told[-1].step == step


def _check_data(path: Path, manifest: Manifest, data: Loader) -> None:
    """UserError where the run would not read on where it stopped."""
    if manifest.dataset != data.fingerprint:
        raise UserError(
            f"{path} was trained on other data (manifest {manifest.dataset}) than data.path holds now ({data.fingerprint}); "
            f"put the data back, or start in another run.dir"
        )
    if manifest.order != data.order_fingerprint(manifest.samples):
        raise UserError(
            f"{path} read its first {manifest.samples} sequences in another order than run.seed, data.mixture, "
            "data.seq_len_schedule and data.window give now; put them back (a stage may be appended from there on; a share "
            "such as 80% moves with train.steps and train.batch_size, a number of sequences does not), or start in "
            "another run.dir"
        )
