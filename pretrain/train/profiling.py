"""Profile the steps of `train.profile` with torch.profiler. Writes a trace and a table into the run directory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, schedule

from data_pipeline.atomic import write_atomic
from data_pipeline.errors import one_line
from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.runs.profile import OperatorTime, ProfileSummary
from pretrain.tracking.recorder import RunRecorder

FOLDER = "profile"
TABLE_ROWS = 100
STEP_MARK = "ProfilerStep"
"""Prefix of the annotation with which torch.profiler marks a step."""


def check_profile(config: RunConfig) -> None:
    """Raise UserError if `train.profile` starts after the last step."""
    window = config.train.profile
    if window is not None and window.start > config.train.steps:
        raise UserError(
            f"train.profile.from={window.start} is after the last step, train.steps={config.train.steps}: "
            "use an earlier step, or leave train.profile out"
        )


class StepProfiler:
    """Profiles a window of steps of this process, as a context. Call `begin_step` and `end_step` around each step.

    A profiler that fails does not end the run: it records an event and stays off.
    """

    def __init__(self, config: RunConfig, run_dir: Path, recorder: RunRecorder, *, is_enabled: bool) -> None:
        """Prepare; the profiler starts with the step before the window.

        Args:
            config: `train.profile` is the window; None profiles nothing.
            run_dir: gets a folder `profile/`.
            recorder: records the events `profile` and `profile_failed`.
            is_enabled: whether this rank profiles.
        """
        window = config.train.profile if is_enabled else None
        self._window = range(0) if window is None else range(window.start, window.start + window.steps)
        self._last_step = min(self._window.stop - 1, config.train.steps)
        self._activities = [ProfilerActivity.CPU]
        if config.train.device == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._run_dir = run_dir
        self._recorder = recorder
        self._profile: profile | None = None
        self._profiled: list[int] = []

    def begin_step(self, step: int) -> None:
        """Start the profiler if `step` is the warm-up step or, in a run resumed within the window, a later one."""
        if self._window and self._profile is None and step > self._last_step:  # the run resumed after the window
            text = f"train.profile: steps {self._window.start} to {self._last_step} are done; nothing is profiled"
            self._recorder.event("notice", text, step)
            self._window = range(0)
        if self._profile is None and self._window and self._window.start - 1 <= step <= self._last_step:
            self._run_safely(step, lambda: self._start(step))

    def end_step(self, step: int) -> None:
        """End a step; after the last one, write the results."""
        if self._profile is None:
            return
        if step in self._window:
            self._profiled.append(step)
        self._run_safely(step, self._profile.step)
        if step == self._last_step:
            self._close()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the results so far if the run was stopped within the window; discard them if it raised an error."""
        if error is None:
            self._close()
        else:
            self._discard()

    def _close(self) -> None:
        """Stop the profiler if it is running, and write the results of the steps so far."""
        active, steps = self._profile, self._profiled
        if active is None:
            return
        self._profile, self._window = None, range(0)
        self._run_safely(steps[-1] if steps else None, lambda: self._finish(active, steps))

    def _start(self, step: int) -> None:
        n_warmup = int(step not in self._window)
        first = max(step, self._window.start)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*won't be using warmup")  # a run resumed within the window
            window = schedule(wait=0, warmup=n_warmup, active=self._last_step - first + 1, repeat=1)
        self._profile = profile(activities=self._activities, schedule=window, acc_events=True)
        self._profile.start()

    def _finish(self, active: profile, steps: list[int]) -> None:
        active.stop()
        if steps:
            summary_path = self._write(active, steps[0], steps[-1])
            text = f"steps {steps[0]} to {steps[-1]}: Chrome trace, table and summary of operators in {FOLDER}/"
            self._recorder.event("profile", text, steps[-1], profile=summary_path)

    def _write(self, active: profile, first: int, last: int) -> str:
        """Write trace, table and summary; return the path of the summary relative to the run directory."""
        folder, name = self._run_dir / FOLDER, f"step-{first:08d}-{last:08d}"
        folder.mkdir(exist_ok=True)
        trace, table, summary_file = (folder / f"{name}.{end}" for end in ("trace.json.gz", "txt", "json"))
        partial = folder / f".{trace.name}"  # torch compresses the trace if its name ends with .gz
        try:
            active.export_chrome_trace(str(partial))
            partial.replace(trace)
        finally:
            partial.unlink(missing_ok=True)
        operators = active.key_averages()
        sort_by = "self_cuda_time_total" if ProfilerActivity.CUDA in self._activities else "self_cpu_time_total"
        text = operators.table(sort_by=sort_by, row_limit=TABLE_ROWS, max_name_column_width=80)
        write_atomic(table, text.encode())
        trace_path, table_path, summary_path = (str(f.relative_to(self._run_dir)) for f in (trace, table, summary_file))
        summary = ProfileSummary(
            first_step=first, last_step=last, trace=trace_path, table=table_path, operators=_operator_times(operators)
        )
        write_atomic(summary_file, summary.model_dump_json(indent=1).encode())
        return summary_path

    def _run_safely(self, step: int | None, action: Callable[[], None]) -> None:
        """Run `action`. If it raises, switch the profiler off and record an event."""
        try:
            action()
        except Exception as error:  # an error of the profiler or of the disk: the run does not need the profile
            self._discard()
            text = (
                f"the steps are not profiled: {type(error).__name__}: {one_line(error)}; the run continues without it"
            )
            self._recorder.event("profile_failed", text, step)

    def _discard(self) -> None:
        active, self._profile, self._window = self._profile, None, range(0)
        if active is not None:
            with suppress(Exception):
                active.stop()


def _operator_times(operators: EventList) -> list[OperatorTime]:
    times = [
        OperatorTime(
            name=operator.key,
            calls=operator.count,
            self_cpu_us=operator.self_cpu_time_total,
            cpu_us=operator.cpu_time_total,
            self_cuda_us=operator.self_device_time_total,
            cuda_us=operator.device_time_total,
        )
        for operator in operators
        if not operator.key.startswith(STEP_MARK)
    ]
    return sorted(times, key=lambda time: (time.self_cuda_us, time.self_cpu_us), reverse=True)
