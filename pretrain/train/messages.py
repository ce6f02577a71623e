"""What a run says before its first step and after its last: lines on the console, and events."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.text import Text

from data_pipeline.held_out import held_out_warnings
from data_pipeline.reading.loader import Loader
from pretrain.checkpoint.directory import checkpoint_step
from pretrain.config import RunConfig
from pretrain.console import format_count, format_duration
from pretrain.estimate.flops import count_parameters, describe_parameters
from pretrain.runs.directory import RunDirectory
from pretrain.setup.resolve import ResolvedRun
from pretrain.tracking.recorder import RunRecorder
from pretrain.train.init_from import describe_init_checkpoint
from pretrain.train.rank_info import RankInfo
from pretrain.train.resume import ResumeState


def print_log_line(console: Console, line: Text) -> None:
    """Print one log line. A terminal wraps it between words."""
    console.print(line, soft_wrap=not console.is_terminal)


def print_decisions(console: Console, resolved: ResolvedRun) -> None:
    """Print the values of `auto` with their reasons, and notes on the layout."""
    for decision in resolved.reported_decisions:
        print_log_line(console, decision.as_text())
    for note in resolved.notes:
        print_log_line(console, Text.assemble(("note: ", "dim"), note))
    if resolved.pipeline:
        print_log_line(console, Text.assemble(("pipeline: ", "dim"), resolved.pipeline))


def print_held_out_warnings(console: Console, config: RunConfig, data: Loader, validation: Loader | None) -> None:
    """Warn of sources with too little held-out text."""
    splits = {loader.manifest.split: loader.manifest for loader in (data, validation) if loader is not None}
    for warning in held_out_warnings(splits, config.data.seq_len):
        print_log_line(console, Text(f"warning: {warning}", style="yellow"))


def print_finished(console: Console, run_dir: RunDirectory, step: int) -> None:
    """Say that the run has nothing left to do."""
    text = (
        f"run.dir={run_dir.path} is finished: all {step} steps are done. To train longer, raise train.steps; "
        f"or start another run.dir with run.init_from={run_dir.path}"
    )
    print_log_line(console, Text(text))


def record_start(
    recorder: RunRecorder,
    config: RunConfig,
    resume_state: ResumeState,
    data: Loader,
    rank_info: RankInfo,
    *,
    mfu_statement: str,
    disk_warning: str,
) -> None:
    """Record skipped checkpoints and notices, then the start of the attempt: model, data and device."""
    step, counts = resume_state.step, count_parameters(config.model)
    for path, problem in resume_state.skipped:
        recorder.event("skip_checkpoint", f"{path.name}: {problem}", checkpoint_step(path))
    for notice in (*resume_state.notices, *filter(None, [disk_warning])):
        recorder.event("notice", notice, step)
    recorder.event(
        "resume" if resume_state.resumed else "start",
        _describe_start(config, resume_state, data),
        step,
        parameters=counts.total,
        active_parameters=counts.active,
        device=_describe_devices(config, rank_info),
        mfu_statement=mfu_statement,
    )


def record_finish(recorder: RunRecorder, steps: int, seconds: float) -> None:
    """Record that all `steps` are done; the attempt took `seconds`."""
    recorder.event("finish", f"{steps} steps; this attempt took {format_duration(seconds)}", steps)


def _describe_start(config: RunConfig, resume_state: ResumeState, data: Loader) -> str:
    if resume_state.resumed:
        text = f"step {resume_state.step} of {config.train.steps}, from the latest checkpoint"
    else:
        samples = resume_state.batches.total_samples
        n_tokens = format_count(samples * config.data.seq_len)
        model = f"{describe_parameters(config.model)} on {n_tokens} tokens of {config.data.path}"
        text = f"{model}: {_describe_epochs(data, samples)}"
    if resume_state.parent is not None:
        text = f"{text}; {describe_init_checkpoint(resume_state.parent, config)}"
    return text


def _describe_devices(config: RunConfig, rank_info: RankInfo) -> str:
    cpu = f"CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if config.train.device == "cuda" else cpu
    if rank_info.world.size == 1:
        return device
    return f"{rank_info.world.size} processes ({rank_info.layout}), each on {device}"


def _describe_epochs(data: Loader, samples: int) -> str:
    """Say how often the run reads each source, and how much of that is repetition."""
    sources = []
    for name, epochs in data.epochs(samples).items():
        repeated = f", {1 - 1 / epochs:.0%} of it seen before" if epochs > 1 else ""
        sources.append(f"{name} {epochs:.2g} epochs{repeated}")
    return "; ".join(sources)
