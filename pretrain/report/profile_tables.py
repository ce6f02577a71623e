"""The profile in the report of a run: the operators with the most self time, on the CPU and on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import StorageError
from pretrain.errors import UserError
from pretrain.report.render import Table
from pretrain.runs.profile import OperatorTime, ProfileSummary, read_profile
from pretrain.runs.schema import Event

TOP_OPERATORS = 15


@dataclass(frozen=True)
class ProfileTables:
    """The latest profile of a run."""

    summary: ProfileSummary
    tables: dict[str, Table]
    """By device."""

    @property
    def note(self) -> str:
        """Return what was profiled, and where the trace is."""
        summary = self.summary
        return (
            f"Steps {summary.first_step:,} to {summary.last_step:,} of rank 0; times are per step. All operators are "
            f"in {summary.table}. Open the trace {summary.trace} in https://ui.perfetto.dev or chrome://tracing."
        )


def latest_profile(run_dir: Path, events: Sequence[Event]) -> ProfileTables | None:
    """Return the tables of the last profile that `events` record; None if there is none or its summary was deleted."""
    path = next((event.profile for event in reversed(events) if event.profile), None)
    if path is None:
        return None
    try:
        summary = read_profile(run_dir / path)
    except (UserError, StorageError):  # deleted, or on a disk that does not answer: the rest of the report is there
        return None
    n_steps = summary.last_step - summary.first_step + 1
    tables = {"CPU": _table(summary.operators, n_steps, lambda time: time.self_cpu_us, lambda time: time.cpu_us)}
    if any(time.self_cuda_us for time in summary.operators):
        tables["GPU"] = _table(summary.operators, n_steps, lambda time: time.self_cuda_us, lambda time: time.cuda_us)
    return ProfileTables(summary, tables)


def _table(
    operators: Sequence[OperatorTime],
    n_steps: int,
    self_time: Callable[[OperatorTime], float],
    total_time: Callable[[OperatorTime], float],
) -> Table:
    total = sum(map(self_time, operators)) or 1.0
    top = sorted(operators, key=self_time, reverse=True)[:TOP_OPERATORS]
    rows = [
        (
            time.name,
            f"{time.calls / n_steps:,.1f}",
            f"{self_time(time) / n_steps / 1000:,.3f}",
            f"{self_time(time) / total:.1%}",
            f"{total_time(time) / n_steps / 1000:,.3f}",
        )
        for time in top
    ]
    return Table(("Operator", "Calls", "Self time (ms)", "Share of self time", "With callees (ms)"), rows)
