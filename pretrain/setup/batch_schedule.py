"""Which samples each step reads, and in sequences of what length: pure functions of the step, like the learning rate.

A sample is a sequence of `data.seq_len` tokens. Data positions count samples, also where sequences have grown longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

from data_pipeline.reading.mixture import resolve_start_sample
from parallel.layout import Layout
from pretrain.config import DataConfig, TrainConfig
from pretrain.optim.schedule import batch_size_at, samples_before
from pretrain.setup.constraints import Violation, enforce


@dataclass(frozen=True)
class SeqLenStage:
    """Sequences have this length from that sample on."""

    first_sample: int
    seq_len: int
    start: str | int = field(default=0, compare=False)
    """`from`, as the settings give it."""


@dataclass(frozen=True)
class StepBatch:
    """The global batch of one step."""

    first_sample: int
    """Samples that the steps before have read."""

    n_rows: int
    """Sequences in the batch."""

    seq_len: int
    """Tokens in each sequence."""

    samples_per_row: int
    """Samples that make one sequence: 1, and more where sequences have grown."""


@dataclass(frozen=True)
class BatchSchedule:
    """The batches of a run, step by step."""

    train: TrainConfig
    """Batch size and its ramp, steps, microbatches."""

    stages: tuple[SeqLenStage, ...]
    """Sequence lengths; the first stage begins at sample 0."""

    window: int
    """Tokens in a window, the unit in which text is shuffled."""

    sample_offset: int = 0
    """Samples that the run has read beyond those that batches of the current size would have read. Other than 0 after
    the batch size has changed on resume."""

    @classmethod
    def from_config(cls, data: DataConfig, train: TrainConfig) -> BatchSchedule:
        """The schedule of these settings; `train.micro_batch_size` may still be `auto`."""
        total = samples_before(train.steps + 1, train)
        later = [
            SeqLenStage(
                resolve_start_sample(stage.start, total, f"data.seq_len_schedule.{i}"), stage.seq_len, stage.start
            )
            for i, stage in enumerate(data.seq_len_schedule)
        ]
        stages = (SeqLenStage(0, data.seq_len), *later)
        return cls(train, stages, data.window or max(stage.seq_len for stage in stages))

    def after(self, step: int, samples: int) -> BatchSchedule:
        """The schedule of a run that has read `samples` samples in its first `step` steps.

        Raises:
            UserError: the stages to come do not fit the batches to come.
        """
        schedule = replace(self, sample_offset=samples - samples_before(step + 1, self.train))
        check_seq_lens(schedule, step)
        return schedule

    @property
    def seq_len(self) -> int:
        """Tokens in a sample."""
        return self.stages[0].seq_len

    @property
    def longest_seq_len(self) -> int:
        """Tokens in the longest sequences of the run."""
        return max(stage.seq_len for stage in self.stages)

    @property
    def total_samples(self) -> int:
        """Samples that the whole run reads."""
        return self.samples_before(self.train.steps + 1)

    def samples_before(self, step: int) -> int:
        """Samples that all steps before `step` read: where the data of `step` begins."""
        return samples_before(step, self.train) + self.sample_offset

    def seq_len_at(self, sample: int) -> int:
        """Tokens in a sequence of the step that begins with `sample`."""
        return [stage.seq_len for stage in self.stages if sample >= stage.first_sample][-1]

    def stages_before(self, samples: int) -> list[SeqLenStage]:
        """The stages that begin within the first `samples` samples."""
        return [stage for stage in self.stages if stage.first_sample < max(1, samples)]

    def batch(self, step: int) -> StepBatch:
        """The global batch of `step`. Its number of tokens does not depend on the sequence length."""
        first = self.samples_before(step)
        seq_len = self.seq_len_at(first)
        samples_per_row = seq_len // self.seq_len
        return StepBatch(first, batch_size_at(step, self.train) // samples_per_row, seq_len, samples_per_row)

    def micro_batch_size(self, seq_len: int) -> int:
        """Sequences of `seq_len` tokens in a microbatch: as many tokens as in `train.micro_batch_size` samples, at
        least one."""
        return max(1, self.train.micro_batch_size * self.seq_len // seq_len)

    def microbatch_counts(self, layout: Layout) -> dict[str, int]:
        """Microbatches of a step on each data rank, for each kind of step: "" is a full batch of the first stage."""

        def count(samples: int, seq_len: int) -> int:
            rows = -(-samples * self.seq_len // seq_len)
            return layout.n_microbatches(rows, self.micro_batch_size(seq_len))

        train, stages = self.train, self.stages[1:]
        ramp = sorted({batch_size_at(step, train) for step in range(1, train.batch_ramp_steps + 1)})
        return (
            {"": count(train.batch_size, self.seq_len)}
            | {
                f"in sequences of data.seq_len_schedule: seq_len={s.seq_len}": count(train.batch_size, s.seq_len)
                for s in stages
            }
            | {f"in the batch ramp, at {samples} sequences": count(samples, self.seq_len) for samples in ramp}
        )


def check_seq_lens(schedule: BatchSchedule, step: int = 0) -> None:
    """Refuse stages that do not rise, or do not fit into each other, the window, or the batches after `step` steps.

    Raises:
        UserError: with the setting to change.
    """
    enforce((stages_rise, stages_cut_batches, window_holds_stages, batch_holds_window), schedule, step)


def stages_rise(schedule: BatchSchedule, step: int) -> Violation | None:
    """Stages are in order, and the sequences of each are a multiple as long as those before."""
    for i, (before, stage) in enumerate(pairwise(schedule.stages)):
        if stage.first_sample < before.first_sample:
            return Violation(
                f"data.seq_len_schedule.{i}.from={stage.start} lies before the stage in front of it",
                "put the stages in order",
            )
        if stage.seq_len % before.seq_len:
            return Violation(
                f"data.seq_len_schedule.{i}.seq_len={stage.seq_len} is not a multiple of "
                f"the {before.seq_len} before it",
                f"use {before.seq_len * 2}, for example",
            )
    return None


def stages_cut_batches(schedule: BatchSchedule, step: int) -> Violation | None:
    """From the beginning of a stage on, every batch is whole sequences of its length."""
    train = schedule.train
    for i, stage in enumerate(schedule.stages[1:]):
        factor = stage.seq_len // schedule.seq_len
        steps = range(step + 1, train.steps + 1)
        first = next((s for s in steps if schedule.samples_before(s) >= stage.first_sample), None)
        if first is None:  # the stage begins after the run
            continue
        if first <= train.batch_ramp_steps:
            return Violation(
                f"data.seq_len_schedule.{i}.from={stage.start} lies in the batch ramp "
                f"of {train.batch_ramp_steps} steps",
                "let sequences grow after it",
            )
        begin = schedule.samples_before(first)
        if train.batch_size % factor or begin % factor:
            return Violation(
                f"data.seq_len_schedule.{i}: a batch of train.batch_size={train.batch_size} sequences of "
                f"data.seq_len={schedule.seq_len}, "
                f"after {begin} of them, cannot be cut into sequences {factor} times as long",
                f"use multiples of {factor}",
            )
    return None


def window_holds_stages(schedule: BatchSchedule, step: int) -> Violation | None:
    """A window is whole sequences of every stage."""
    longest = schedule.longest_seq_len
    if schedule.window % longest == 0:
        return None
    return Violation(
        f"data.window={schedule.window} is not a multiple of the longest sequence, {longest}",
        f"use {longest}, for example",
    )


def batch_holds_window(schedule: BatchSchedule, step: int) -> Violation | None:
    """A batch is at least a window: a smaller one could be the padding at the end of a source and nothing else."""
    samples, smallest = schedule.window // schedule.seq_len, batch_size_at(1, schedule.train)
    if smallest >= samples:
        return None
    return Violation(
        f"a batch of {smallest} sequences of data.seq_len={schedule.seq_len} is less than a window of "
        f"{schedule.window} tokens",
        f"raise train.batch_size (and train.batch_ramp_start) to {samples}, or lower data.window or "
        f"data.seq_len_schedule",
    )
