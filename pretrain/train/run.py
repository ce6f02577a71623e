"""The story of a run: open and check everything, then restore the latest checkpoint, train, save, report.

Nothing is written before everything has been checked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from data_pipeline.reading.loader import Loader
from data_pipeline.tokenizing.tokenizer import Tokenizer
from parallel.world import World, process_group
from pretrain.checkpoint import directory
from pretrain.config import RunConfig
from pretrain.config.saved import read_config_if_present
from pretrain.estimate.flops import flops_per_token
from pretrain.estimate.hardware import find_accelerator
from pretrain.inference.sample import SamplingOptions, continue_text, load_trained_model
from pretrain.report.run_page import write_report
from pretrain.runs.directory import RunDirectory, save_tokenizer
from pretrain.runs.throughput import ThroughputMeter, mfu_statement
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import ResolvedRun, resolve_run
from pretrain.signals import stop_on_signals
from pretrain.streams import error_text, tolerant_console
from pretrain.tracking.display import Display
from pretrain.tracking.loggers import Logger, open_loggers
from pretrain.tracking.recorder import SILENT_CONSOLE, RunRecorder, open_recorder
from pretrain.train import messages
from pretrain.train.disk_space import check_disk_space
from pretrain.train.init_from import add_ancestry, check_init_checkpoint, find_init_checkpoint, pin_init_from
from pretrain.train.inputs import check_ranks_agree, check_tokenizer, open_data, open_tokenizer
from pretrain.train.loop import Outcome, TrainLoop
from pretrain.train.profiling import StepProfiler, check_profile
from pretrain.train.rank_info import RankInfo
from pretrain.train.resume import ResumeState, is_finished, restore


def train(config: RunConfig, console: Console, observers: Sequence[Logger] = ()) -> Outcome:
    """Train in `config.run.dir`, starting from its latest valid checkpoint. Every process of the run calls it.

    Args:
        config: as loaded; `auto` is resolved here.
        console: shows decisions and progress.
        observers: receive every step and validation, in addition to the loggers of the config.

    Raises:
        UserError, DataError: an input is wrong; nothing was changed.
        Diverged: a loss stopped being finite.
    """
    start_time = time.monotonic()
    world = World.from_environment()
    console = console if world.is_main else SILENT_CONSOLE
    inputs = _open_inputs(config, world)
    config, rank_info, data, validation = inputs.resolved.config, inputs.rank_info, inputs.data, inputs.validation
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(tolerant_console(console))
        messages.print_decisions(console, inputs.resolved)
        messages.print_held_out_warnings(console, config, data, validation)
        stop = stack.enter_context(stop_on_signals(verbose=world.is_main))
        run_dir = stack.enter_context(_open_run_directory(config, world))
        with process_group(world, config.train.device, even_if_alone=rank_info.layout.offload):
            check_ranks_agree(config, data, validation, rank_info)
            engine = build_engine(config, rank_info.layout, world.rank)
            resume_state = restore(run_dir, engine, data, config, inputs.resolved.batches, inputs.tokenizer, rank_info)
            config = config if resume_state.parent is None else add_ancestry(config, resume_state.parent)
            if world.is_main:
                run_dir.write_config(config)
                save_tokenizer(config.data.tokenizer, run_dir.path)
                # A report is written however the attempt ends.
                stack.push(lambda kind, error, trace: _write_report(run_dir.path, console, error))
            if resume_state.finished:
                messages.print_finished(console, run_dir, resume_state.step)
                return Outcome.FINISHED
            meter, mfu = _throughput_meter(config, resume_state, world.size)
            display = Display(config.train.steps, console=console, mfu_statement=mfu, stop=stop)
            loggers = [*open_loggers(config, run_dir.path, resume_state.step), *observers] if world.is_main else []
            recorder = stack.enter_context(open_recorder(run_dir, display, loggers, output))
            messages.record_start(
                recorder, config, resume_state, data, rank_info, mfu_statement=mfu, disk_warning=inputs.disk_warning
            )
            profiler = stack.enter_context(StepProfiler(config, run_dir.path, recorder, is_enabled=world.is_main))
            batches, folder = resume_state.batches, run_dir.checkpoints
            loop = TrainLoop(
                config, batches, engine, data, validation, folder, recorder, meter, stop, rank_info, profiler
            )
            outcome = loop.run(resume_state.step, validate_first=not resume_state.resumed)
            del loop, engine  # free their memory for the samples
        if outcome is Outcome.FINISHED and world.is_main:
            _record_samples(recorder, config, run_dir, inputs.tokenizer)
            messages.record_finish(recorder, config.train.steps, time.monotonic() - start_time)
    return outcome


@dataclass(frozen=True)
class _Inputs:
    """What a run reads and decides before it writes anything."""

    resolved: ResolvedRun
    tokenizer: Tokenizer
    data: Loader
    validation: Loader | None
    rank_info: RankInfo
    disk_warning: str


def _open_inputs(config: RunConfig, world: World) -> _Inputs:
    """Open and check the inputs. Raises UserError or DataError if one is wrong."""
    tokenizer = open_tokenizer(config)
    previous = read_config_if_present(config.run.dir)
    config = pin_init_from(config, previous)
    resolved = resolve_run(config, tokenizer_size=tokenizer.vocab_size, world_size=world.size, previous=previous)
    config = resolved.config
    disk_warning = _check_disk_space(config) if world.is_main else ""
    data, validation = open_data(config.data, config.run.seed, resolved.batches)
    check_tokenizer(config, tokenizer, data)
    check_profile(config)
    _check_init_from(config, tokenizer, data)
    return _Inputs(resolved, tokenizer, data, validation, RankInfo(world, resolved.layout), disk_warning)


def _check_disk_space(config: RunConfig) -> str:
    """Return the warning of `check_disk_space`. A finished run needs no space."""
    return "" if is_finished(config.run.dir / "events.jsonl", config.train.steps) else check_disk_space(config)


def _check_init_from(config: RunConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """Raise UserError if the checkpoint of `run.init_from` does not fit, before the run directory is created.

    `restore` checks again, because the other run may go on in the meantime.
    """
    if config.run.init_from is not None and not directory.committed_steps(config.run.dir / "checkpoints"):
        check_init_checkpoint(find_init_checkpoint(config), config, tokenizer, data)


def _open_run_directory(config: RunConfig, world: World) -> RunDirectory:
    return RunDirectory.open(config) if world.is_main else RunDirectory.for_worker_rank(config)


def _throughput_meter(config: RunConfig, resume_state: ResumeState, n_devices: int) -> tuple[ThroughputMeter, str]:
    """Return the meter of the run, and one sentence on what its MFU means."""
    name = torch.cuda.get_device_name() if config.train.device == "cuda" else "the CPU"
    accelerator = find_accelerator(name) if config.train.precision == "bf16" else None
    flops = flops_per_token(config.model, config.data.seq_len)
    meter = ThroughputMeter(
        total_tokens=resume_state.batches.total_samples * config.data.seq_len,
        tokens_done=resume_state.batches.samples_before(resume_state.step + 1) * config.data.seq_len,
        peak_flops=None if accelerator is None else accelerator.bf16_flops * n_devices,
    )
    return meter, mfu_statement(flops, name, accelerator, n_devices)


def _record_samples(recorder: RunRecorder, config: RunConfig, run_dir: RunDirectory, tokenizer: Tokenizer) -> None:
    """Continue the prompts of `log.samples`. The last checkpoint holds the unsharded weights, whatever the layout."""
    if not config.log.samples:
        return
    path = directory.checkpoint_path(run_dir.checkpoints, config.train.steps)
    model = load_trained_model(path, config, torch.device(config.train.device))
    for prompt in config.log.samples:
        text = "".join(continue_text(model, tokenizer, prompt, SamplingOptions(seed=config.run.seed)))
        recorder.event("sample", text, config.train.steps, prompt=prompt)


def _write_report(run_dir: Path, console: Console, error: BaseException | None) -> None:
    """Write report.html at the end of an attempt that may have raised `error`.

    A failing report does not change the outcome.
    """
    try:
        report = write_report(run_dir)
    except (Exception, KeyboardInterrupt) as failure:
        if error is None:
            reason = error_text(failure) if isinstance(failure, Exception) else "interrupted"
            line = (
                f"{run_dir / 'report.html'} was not written ({reason}); nothing else is missing: "
                f"`pretrain report {run_dir}` tries again"
            )
            Console(stderr=True, soft_wrap=True).print(
                Text.assemble(("warning:", "bold yellow"), " ", line), highlight=False
            )
    else:
        if error is None:
            messages.print_log_line(console, Text.assemble(("report: ", "dim"), str(report)))
