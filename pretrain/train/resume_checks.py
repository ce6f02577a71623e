"""Compare the records of a run with the checkpoint to resume from, before anything is changed.

`events.jsonl` lists the saved steps, `metrics.jsonl` the trained ones. If they show that a checkpoint is missing,
resuming would train steps again and drop their records, so the user must request it (`checkpoint.on_invalid`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pretrain.checkpoint.directory import steps_on_disk
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.verify import unlisted_files
from pretrain.errors import UserError
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import Event, Metrics

GO_BACK = "checkpoint.on_invalid=go_back"


@dataclass(frozen=True)
class RecordCheck:
    """Findings that do not prevent resuming."""

    lost: str
    """One sentence on lost checkpoints; empty if there are none."""
    notices: tuple[str, ...]
    """Lines for the user, without those that events.jsonl already holds."""


def check_records(
    run_dir: Path, path: Path | None, manifest: Manifest | None, damaged: str = "", *, go_back: bool = False
) -> RecordCheck:
    """Compare the records in `run_dir` with the checkpoint at `path`, the one to resume from.

    Args:
        run_dir: directory of the run.
        path: the latest valid checkpoint, or None.
        manifest: its manifest.
        damaged: why no checkpoint is valid; empty if one is, or if there are no checkpoints.
        go_back: accept the loss of checkpoints.

    Raises:
        UserError: a checkpoint is missing and `go_back` is false, or the records are those of another run.
    """
    events, metrics = read_events(run_dir / "events.jsonl"), read_metrics(run_dir / "metrics.jsonl")
    lost = damaged or _describe_loss(run_dir, events, metrics, manifest)
    step = 0 if manifest is None else manifest.step
    start = f"step {step}" if manifest else "its beginning"
    if lost and not go_back:
        raise UserError(
            f"{lost}. "
            f"{'Restore one of them from a copy' if damaged else 'Put back what is missing (is a disk not mounted?)'}, "
            f"or set another run.dir. To train again from {start} here, set {GO_BACK}: it renames the old files and "
            "keeps copies of the old records"
        )
    notices = []
    if path is not None and manifest is not None:
        _check_samples(run_dir, path, manifest, metrics)
        notices += _gaps(events, metrics, step)
        if extra := unlisted_files(path):
            notices.append(
                f"{path.name} holds files that its manifest does not list; they are ignored: {_format_few(extra)}"
            )
    known = {event.text for event in events}
    notices = [line for line in notices if line not in known]
    if lost:
        notices.insert(
            0, f"{lost}. By {GO_BACK} the run goes back to {start}; its old records stay beside metrics.jsonl"
        )
    return RecordCheck(lost, tuple(notices))


def saved_steps(events: Iterable[Event]) -> set[int]:
    """Return the saved steps that no later start from an earlier step has undone."""
    saved: set[int] = set()
    for event in events:
        step = event.step or 0
        if event.kind == "save":
            saved.add(step)
        elif event.kind in {"start", "resume"}:
            saved = {other for other in saved if other <= step}
    return saved


def _describe_loss(run_dir: Path, events: Sequence[Event], metrics: Metrics, manifest: Manifest | None) -> str:
    """Return one sentence on the checkpoints that are missing; empty if there are none."""
    folder, step = run_dir / "checkpoints", 0 if manifest is None else manifest.step
    missing = {saved for saved in saved_steps(events) if saved > step} - steps_on_disk(folder)
    if manifest is not None and missing:
        return (
            f"{folder} has lost the checkpoint of step {max(missing)}, which events.jsonl records; its latest valid "
            f"one is of step {step}"
        )
    absent = "is a link to a folder that does not exist" if folder.is_symlink() else "does not exist"
    state = "holds no checkpoint" if folder.exists() else absent
    if missing:
        return f"{folder} {state}, but events.jsonl records that step {max(missing)} was saved"
    if manifest is None and metrics.steps and not any(event.kind in {"start", "resume"} for event in events):
        return f"{folder} {state} and events.jsonl records no start, but metrics.jsonl has {len(metrics.steps)} steps"
    return ""


def _check_samples(run_dir: Path, path: Path, manifest: Manifest, metrics: Metrics) -> None:
    """Raise UserError if metrics.jsonl has another data position at the checkpoint's step."""
    for record in metrics.steps:
        if record.step == manifest.step and record.samples != manifest.samples:
            raise UserError(
                f"{path} had read {manifest.samples} sequences after step {manifest.step}, and by "
                f"{run_dir / 'metrics.jsonl'} it was {record.samples}: one of them belongs to another run. Put the "
                "right one back, or move metrics.jsonl aside if it is the wrong one"
            )


def _gaps(events: Sequence[Event], metrics: Metrics, step: int) -> list[str]:
    """Return notices on steps of the checkpoint that have no records."""
    notices = []
    starts = [event.step or 0 for event in events if event.kind == "start"]
    recorded = [record.step for record in metrics.steps if record.step <= step]
    gaps = [(a + 1, b - 1) for a, b in pairwise([min(starts, default=0), *recorded, step + 1]) if b > a + 1]
    if gaps:
        ranges = _format_few([f"{a} to {b}" if b > a else str(a) for a, b in gaps])
        notices.append(
            f"metrics.jsonl has no records of steps {ranges}: curves have a gap there, but no step is trained twice"
        )
    if not any(event.kind in {"start", "resume"} for event in events):
        notices.append(f"events.jsonl does not record how the run reached step {step}: its earlier events are lost")
    return notices


def _format_few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
