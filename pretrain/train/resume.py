"""Resume a run from its latest valid checkpoint, on any layout, and drop the records of later steps. A run without
checkpoints starts from the checkpoint of another run (`run.init_from`), or from its initial weights."""

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
from pretrain.setup.named_checkpoint import NamedCheckpoint
from pretrain.train.disk_space import check_writable
from pretrain.train.init_from import check_init_checkpoint, find_init_checkpoint, load_init_checkpoint
from pretrain.train.rank_info import RankInfo
from pretrain.train.resume_checks import check_records
from pretrain.train.schedule_change import check_schedule

BEFORE_ANY_STEP = -1
"""The validation before the first step is a record of step 0."""


@dataclass(frozen=True)
class ResumeState:
    """Where an attempt starts."""

    batches: BatchSchedule
    """The samples that the remaining steps read."""
    step: int = 0
    """Steps done."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Each newer checkpoint that is not valid, with its first problem."""
    resumed: bool = False
    """Whether it resumes from a checkpoint of this run."""
    parent: NamedCheckpoint | None = None
    """The checkpoint of another run that this one starts from; None if it resumes."""
    notices: tuple[str, ...] = ()
    """Other findings that the user should know about."""
    finished: bool = False
    """Whether events.jsonl records the end of the run, so that nothing is left to do."""


def restore(
    run_dir: RunDirectory,
    engine: Engine,
    data: Loader,
    config: RunConfig,
    batches: BatchSchedule,
    tokenizer: Tokenizer,
    rank_info: RankInfo,
) -> ResumeState:
    """Load the latest valid checkpoint. Drop later records, and rename later (damaged) checkpoints.

    Every process of the run calls it.

    Raises:
        UserError: the run has lost checkpoints, and `checkpoint.on_invalid` does not accept that; or data or schedule
            are not those of the steps taken; or the checkpoint of `run.init_from` does not fit; or no checkpoint can be
            written. Nothing was changed then, except that unfinished checkpoints were deleted.
        StorageError: something cannot be read now, or the records cannot be written.
    """
    skipped: list[tuple[Path, str]] = []
    no_valid = ""
    go_back = config.checkpoint.on_invalid == "go_back"
    try:
        path = directory.latest_valid(
            run_dir.checkpoints, lambda path, problems: skipped.append((path, problems[0])), rank_info.group
        )
    except directory.NoValidCheckpoint as error:
        path, no_valid = None, str(error.args[0])
    manifest = None if path is None else read_manifest(path)
    findings = on_rank_zero(
        rank_info.group, lambda: check_records(run_dir.path, path, manifest, no_valid, go_back=go_back)
    )
    if path is not None and manifest is not None:
        resume_state = _resume(path, manifest, run_dir, engine, data, config, batches, rank_info)
    elif config.run.init_from is not None:
        resume_state = _start_from_checkpoint(engine, data, config, batches, tokenizer, rank_info)
    else:
        resume_state = ResumeState(batches)
    finished = resume_state.step == config.train.steps and on_rank_zero(
        rank_info.group, lambda: is_finished(run_dir.events, resume_state.step)
    )
    on_rank_zero(rank_info.group, lambda: _prepare_to_save(run_dir.checkpoints, finished=finished))
    if rank_info.world.is_main:
        try:
            if findings.lost:
                backup_records(run_dir.metrics, run_dir.attempt)
            truncate_after(run_dir.metrics, resume_state.step if path else BEFORE_ANY_STEP)
            # `prune` would count damaged checkpoints as the newest, and delete valid ones that are saved now.
            for damaged, _ in skipped:
                directory.mark_damaged(damaged)
        except OSError as error:
            raise StorageError(
                f"run.dir={run_dir.path} cannot be written ({error}); make it writable, and start again"
            ) from error
    prune(run_dir.checkpoints, config.checkpoint.keep, rank_info.group)  # a smaller `keep` makes room for the next
    return replace(resume_state, skipped=tuple(skipped), notices=findings.notices, finished=finished)


def _prepare_to_save(checkpoints: Path, *, finished: bool) -> None:
    """Delete what crashes left behind: no other process can be writing it, because this one holds the lock.

    Raises:
        UserError: no checkpoint can be written and the run is not finished.
    """
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
    """Load a checkpoint of this run into the engine."""
    if manifest.conversion is not None:
        raise UserError(
            f"run.dir={run_dir.path} holds converted weights, which no run has trained: choose another run.dir, and "
            f"start from them with run.init_from={run_dir.path}"
        )
    kept = on_rank_zero(rank_info.group, lambda: directory.committed_steps(run_dir.checkpoints))
    check_schedule(run_dir.path, validate(manifest.config), config, manifest.step, manifest.samples, kept)
    _check_data(path, manifest, data)
    batches = batches.after(manifest.step, manifest.samples)
    load_checkpoint(path, engine.state(), rank_info.group)
    engine.sync_compute_weights()
    _restore_rng(manifest, rank_info)
    return ResumeState(batches, manifest.step, resumed=True)


def _start_from_checkpoint(
    engine: Engine, data: Loader, config: RunConfig, batches: BatchSchedule, tokenizer: Tokenizer, rank_info: RankInfo
) -> ResumeState:
    """Load another run's checkpoint into the engine. Rank 0 selects it, because that run may be saving new ones."""
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
    """Restore random states.

    Training draws nothing from them, so a rank that did not exist may start with any state.
    """
    rng.restore(manifest.rng.get(rank_info.coordinates) or next(iter(manifest.rng.values())))


def is_finished(events: Path, step: int) -> bool:
    """Return whether the last start or end in events.jsonl is an end after `step` steps.

    It is not if the run was killed between its last checkpoint and that event, or if train.steps was raised since.
    """
    starts_and_ends = [event for event in read_events(events) if event.kind in {"start", "resume", "finish"}]
    last = starts_and_ends[-1] if starts_and_ends else None
    return last is not None and last.kind == "finish" and last.step == step


def _check_data(path: Path, manifest: Manifest, data: Loader) -> None:
    """Raise UserError if the data or its order differs from the checkpoint's."""
    if manifest.dataset != data.fingerprint:
        raise UserError(
            f"{path} was trained on other data (manifest {manifest.dataset}) than data.path holds now "
            f"({data.fingerprint}); put the data back, or start in another run.dir"
        )
    if manifest.order != data.order_fingerprint(manifest.samples):
        raise UserError(
            f"{path} read its first {manifest.samples} sequences in another order than run.seed, data.mixture, "
            "data.seq_len_schedule and data.window give now; put them back (a stage may be appended from there on; a "
            "share such as 80% moves with train.steps and train.batch_size, a number of sequences does not), or start "
            "in another run.dir"
        )
