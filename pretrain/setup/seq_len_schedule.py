"""Sequences that grow during a run: how long they are at a sample. A pure function of the config, like the schedules."""

from __future__ import annotations

from data_pipeline.reading.mixture import resolve_start_sample
from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.optim.schedule import batch_size_at, samples_before


def longest_seq_len(config: RunConfig) -> int:
    """The longest sequence that the run ever trains on."""
    return max([config.data.seq_len, *(stage.seq_len for stage in config.data.growth)])


def window_of(config: RunConfig) -> int:
    """Tokens in a window, the unit in which text is shuffled."""
    return config.data.window or longest_seq_len(config)


def seq_len_at(sample: int, config: RunConfig) -> int:
    """Tokens in a sequence of the step that begins with that sample. A batch of as many tokens holds fewer of the longer ones."""
    return [seq_len for start, seq_len in _stages(config) if sample >= start][-1]


def stages_before(samples: int, config: RunConfig) -> list[tuple[int, int]]:
    """(first sample, seq_len) of each stage that begins within the first `samples` samples."""
    return [(start, seq_len) for start, seq_len in _stages(config) if start < max(1, samples)]


def check_growth(config: RunConfig, step: int = 0, ahead: int = 0) -> None:
    """Refuse stages that do not rise or do not fit into each other, the window, or the batches.

    Args:
        config: of the run.
        step: steps done.
        ahead: samples that the run has read more than its batches of now would have: a batch size may change on resume.

    Raises:
        UserError: with the setting to change.
    """
    data, before = config.data, (0, config.data.seq_len)
    for i, (start, seq_len) in enumerate(_stages(config)[1:]):
        setting = f"data.growth.{i}"
        if start < before[0]:
            raise UserError(
                f"{setting}.from={data.growth[i].start} lies before the stage in front of it; put the stages in order"
            )
        if seq_len % before[1]:
            raise UserError(
                f"{setting}.seq_len={seq_len} is not a multiple of the {before[1]} before it; use {before[1] * 2}, for example"
            )
        _check_batches(config, setting, start, seq_len // data.seq_len, step, ahead)
        before = start, seq_len
    if data.window is not None and data.window % before[1]:
        raise UserError(
            f"data.window={data.window} is not a multiple of the longest sequence, {before[1]}; use {before[1]}, for example"
        )
    parts, smallest = window_of(config) // data.seq_len, batch_size_at(1, config.train)
    if smallest < parts:  # it could be the padding at the end of a source, and nothing else
        raise UserError(
            f"a batch of {smallest} sequences of data.seq_len={data.seq_len} is less than a window of {window_of(config)} tokens; "
            f"raise train.batch_size (and train.batch_ramp_start) to {parts}, or lower data.window or data.growth"
        )


def _check_batches(config: RunConfig, setting: str, start: int, factor: int, step: int, ahead: int) -> None:
    """From `start` on every batch, and where it begins, must be whole sequences of `factor` samples."""
    train = config.train
    first = next((s for s in range(step + 1, train.steps + 1) if samples_before(s, train) + ahead >= start), None)
    if first is None:  # the stage begins after the run
        return
    if first <= train.batch_ramp_steps:
        raise UserError(
            f"{setting}.from={start} lies in the batch ramp of {train.batch_ramp_steps} steps; let sequences grow after it"
        )
    begin = samples_before(first, train) + ahead
    if train.batch_size % factor or begin % factor:
        raise UserError(
            f"{setting}: a batch of train.batch_size={train.batch_size} sequences of data.seq_len={config.data.seq_len}, after "
            f"{begin} of them, cannot be cut into sequences {factor} times as long; use multiples of {factor}"
        )


def _stages(config: RunConfig) -> list[tuple[int, int]]:
    """(first sample, seq_len) of each stage."""
    total = samples_before(config.train.steps + 1, config.train)
    later = [
        (resolve_start_sample(stage.start, total, f"data.growth.{i}"), stage.seq_len)
        for i, stage in enumerate(config.data.growth)
    ]
    return [(0, config.data.seq_len), *later]
