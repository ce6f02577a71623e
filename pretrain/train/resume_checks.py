"""What a run's records tell is compared with the checkpoint it would go on from, before anything is changed.

`events.jsonl` tells which steps were saved, `metrics.jsonl` which were trained. Where they show that a checkpoint is gone,
going on would train steps a second time and throw their records away, so that has to be asked for (`checkpoint.on_invalid`).
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
    """What the comparison found, where nothing was refused."""

    lost: str
    """Which checkpoints are lost, in one sentence; empty where none is."""
    notices: tuple[str, ...]
    """What to tell, a line for each thing that was not told before."""


def check_records(
    run_dir: Path, path: Path | None, manifest: Manifest | None, damaged: str = "", *, go_back: bool = False
) -> RecordCheck:
    """Compare the records in `run_dir` with the checkpoint at `path`, from which the run would go on.

    Args:
        run_dir: directory of the run.
        path: of the newest whole checkpoint; None is none.
        manifest: its manifest.
        damaged: why none of the checkpoints there is whole; empty where one is, or there is none.
        go_back: a loss of checkpoints is accepted.

    Raises:
        UserError: a checkpoint is gone and `go_back` is false, or the records are those of another run.
    """
    events, metrics = read_events(run_dir / "events.jsonl"), read_metrics(run_dir / "metrics.jsonl")
    lost = damaged or _what_is_lost(run_dir, events, metrics, manifest)
    step = 0 if manifest is None else manifest.step
    beginning = f"step {step}" if manifest else "its beginning"
    if lost and not go_back:
        raise UserError(
            f"{lost}. {'Restore one of them from a copy' if damaged else 'Put back what is missing (is a disk not mounted?)'}, "
            f"or set another run.dir. To train again from {beginning} here, set {GO_BACK}: it sets the old files and records aside"
        )
    told = []
    if path is not None and manifest is not None:
        _check_samples(run_dir, path, manifest, metrics)
        told += _gaps(events, metrics, step)
        if extra := unlisted_files(path):
            told.append(f"{path.name} holds what its manifest does not list, which is ignored: {_few(extra)}")
    known = {event.text for event in events}
    told = [line for line in told if line not in known]
    if lost:
        told.insert(
            0, f"{lost}. By {GO_BACK} the run goes back to {beginning}; its old records stay beside metrics.jsonl"
        )
    return RecordCheck(lost, tuple(told))


def saved_steps(events: Iterable[Event]) -> set[int]:
    """Steps that were saved and not undone by going back to an earlier one."""
    saved: set[int] = set()
    for event in events:
        step = event.step or 0
        if event.kind == "save":
            saved.add(step)
        elif event.kind in {"start", "resume"}:
            saved = {other for other in saved if other <= step}
    return saved


def _what_is_lost(run_dir: Path, events: Sequence[Event], metrics: Metrics, manifest: Manifest | None) -> str:
    """One sentence on the checkpoints that are gone without a trace; empty where none is."""
    folder, step = run_dir / "checkpoints", 0 if manifest is None else manifest.step
    gone = {saved for saved in saved_steps(events) if saved > step} - steps_on_disk(folder)
    if manifest is not None and gone:
        return f"{folder} has lost the checkpoint of step {max(gone)}, which events.jsonl tells of; its newest whole one is of step {step}"
    place = (
        "is a link to what is not there"
        if folder.is_symlink()
        else "is not there"
        if not folder.exists()
        else "holds no checkpoint"
    )
    if gone:
        return f"{folder} {place}, but events.jsonl tells that step {max(gone)} was saved"
    if manifest is None and metrics.steps and not any(event.kind in {"start", "resume"} for event in events):
        return f"{folder} {place} and events.jsonl tells nothing, but metrics.jsonl has {len(metrics.steps)} steps"
    return ""


def _check_samples(run_dir: Path, path: Path, manifest: Manifest, metrics: Metrics) -> None:
    """UserError where the record of the checkpoint's step says that another part of the data had been read by then."""
    for record in metrics.steps:
        if record.step == manifest.step and record.samples != manifest.samples:
            raise UserError(
                f"{path} had read {manifest.samples} sequences after step {manifest.step}, and by {run_dir / 'metrics.jsonl'} "
                f"it was {record.samples}: one of them is of another run. Put the right one back, or move metrics.jsonl aside "
                f"if it is the wrong one"
            )


def _gaps(events: Sequence[Event], metrics: Metrics, step: int) -> list[str]:
    """What the records leave out of the steps that the checkpoint has."""
    told = []
    starts = [event.step or 0 for event in events if event.kind == "start"]
    there = [record.step for record in metrics.steps if record.step <= step]
    gaps = [(a + 1, b - 1) for a, b in pairwise([min(starts, default=0), *there, step + 1]) if b > a + 1]
    if gaps:
        ranges = _few([f"{a} to {b}" if b > a else str(a) for a, b in gaps])
        told.append(
            f"metrics.jsonl has no records of steps {ranges}: curves have a gap there, nothing is trained twice"
        )
    if not any(event.kind in {"start", "resume"} for event in events):
        told.append(f"events.jsonl does not tell how the run came to step {step}: what it told before is lost")
    return told


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
