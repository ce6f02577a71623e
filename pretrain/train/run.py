"""A config -> a trained model: opens and checks everything before anything is written, goes on from the newest checkpoint, trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from data_pipeline.held_out import held_out_warnings
from data_pipeline.reading.loader import Loader
from data_pipeline.storage.tokenized import collect_trusted_paths
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer
from parallel.world import World, process_group
from pretrain.checkpoint import directory
from pretrain.checkpoint.object_collectives import all_gather_object
from pretrain.config import AUTO, DataConfig, RunConfig, flatten
from pretrain.config.saved import read_config
from pretrain.console import format_count, format_duration
from pretrain.errors import UserError
from pretrain.estimate.flops import flops_per_token, parameter_count
from pretrain.estimate.hardware import find_accelerator
from pretrain.inference.sample import SamplingOptions, check_prompt, continue_text, load_trained_model
from pretrain.report.run_page import write_report
from pretrain.runs.directory import RunDirectory, save_tokenizer
from pretrain.runs.throughput import ThroughputMeter, mfu_statement
from pretrain.setup.batch_schedule import BatchSchedule
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import ResolvedRun, resolve_run
from pretrain.signals import stop_on_signals
from pretrain.streams import error_text, tolerant_console
from pretrain.tracking.display import Display
from pretrain.tracking.loggers import Logger, open_loggers
from pretrain.tracking.recorder import SILENT_CONSOLE, RunRecorder, open_recorder
from pretrain.train.disk_space import check_disk_space
from pretrain.train.init_from import (
    add_ancestry,
    check_init_checkpoint,
    describe_init_checkpoint,
    find_init_checkpoint,
    pin_init_from,
)
from pretrain.train.loop import Outcome, TrainLoop
from pretrain.train.rank_info import RankInfo
from pretrain.train.resume import ResumeState, is_finished, restore


def train(config: RunConfig, console: Console, observers: Sequence[Logger] = ()) -> Outcome:
    """Train `config` in its run directory, from its newest whole checkpoint if there is one. Every process of the run calls it.

    Args:
        config: as loaded; `auto` is resolved here.
        console: where decisions and progress are shown.
        observers: hear of every step and validation, beside the loggers that the config asks for.

    Raises:
        UserError, DataError: an input is wrong; nothing was changed.
        Diverged: a loss stopped being finite.
    """
    began = time.monotonic()
    world = World.from_environment()
    console = console if world.is_main else SILENT_CONSOLE
    tokenizer = open_tokenizer(config)
    previous = _previous(config.run.dir)
    resolved = resolve_run(
        pin_init_from(config, previous), tokenizer_size=tokenizer.vocab_size, world_size=world.size, previous=previous
    )
    config, rank_info = resolved.config, RankInfo(world, resolved.layout)
    shortage = _shortage(config) if world.is_main else ""
    train_data, validation = open_data(config.data, config.run.seed, resolved.batches)
    _check_tokenizer(config, tokenizer, train_data)
    _check_parent(config, tokenizer, train_data)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(tolerant_console(console))
        _tell_decisions(console, resolved)
        _warn_of_data(console, config, train_data, validation)
        stop = stack.enter_context(stop_on_signals(verbose=world.is_main))
        run_dir = stack.enter_context(
            RunDirectory.open(config) if world.is_main else RunDirectory.for_worker_rank(config)
        )
        with process_group(world, config.train.device, even_if_alone=rank_info.layout.offload):
            _check_agreement(config, train_data, validation, rank_info)
            engine = build_engine(config, rank_info.layout, world.rank)
            resume_state = restore(run_dir, engine, train_data, config, resolved.batches, tokenizer, rank_info)
            if resume_state.parent is not None:
                config = add_ancestry(config, resume_state.parent)
            if world.is_main:
                run_dir.write_config(config)
                save_tokenizer(config.data.tokenizer, run_dir.path)
                # A report is written however the attempt ends.
                stack.push(lambda kind, error, trace: _report(run_dir.path, console, error))
            if resume_state.finished:
                _tell_finished(console, run_dir, resume_state.step)
                return Outcome.FINISHED
            meter, statement = _meter(config, resume_state, world.size)
            display = Display(config.train.steps, console=console, mfu_statement=statement, stop=stop)
            loggers = [*open_loggers(config, run_dir.path, resume_state.step), *observers] if world.is_main else []
            recorder = stack.enter_context(open_recorder(run_dir, display, loggers, output))
            _tell_start(recorder, config, resume_state, train_data, statement, rank_info, shortage)
            batches, checkpoints = resume_state.batches, run_dir.checkpoints
            loop = TrainLoop(
                config, batches, engine, train_data, validation, checkpoints, recorder, meter, stop, rank_info
            )
            outcome = loop.run(resume_state.step, validate_first=not resume_state.resumed)
            del loop, engine  # the samples need their memory
        if outcome is Outcome.FINISHED and world.is_main:
            _tell_end(recorder, config, run_dir, tokenizer, time.monotonic() - began)
    return outcome


def _tell_decisions(console: Console, resolved: ResolvedRun) -> None:
    """What `auto` became and why, and what else is worth knowing before the first step."""
    for decision in resolved.reported_decisions:
        _say(
            console,
            Text.assemble((f"{decision.key} = ", "dim"), str(decision.value), (f" ({decision.reason})", "dim")),
        )
    for note in resolved.notes:
        _say(console, Text.assemble(("note: ", "dim"), note))
    if resolved.pipeline:
        _say(console, Text.assemble(("pipeline: ", "dim"), resolved.pipeline))


def _warn_of_data(console: Console, config: RunConfig, train_data: Loader, validation: Loader | None) -> None:
    """Of which sources too little is held out."""
    splits = {data.manifest.split: data.manifest for data in (train_data, validation) if data is not None}
    for warning in held_out_warnings(splits, config.data.seq_len):
        _say(console, Text(f"warning: {warning}", style="yellow"))


def _tell_finished(console: Console, run_dir: RunDirectory, step: int) -> None:
    text = (
        f"run.dir={run_dir.path} is finished, all {step} steps of it: nothing to do; to train longer, raise train.steps, "
        f"or begin another run.dir with run.init_from={run_dir.path}"
    )
    _say(console, Text(text))


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the config names; DataError or UserError where the data was never prepared."""
    if config.data.tokenizer != AUTO:
        return load_tokenizer(config.data.tokenizer)
    file = config.data.path / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"data.path={config.data.path} holds no prepared data; run `pretrain data prepare` with this config first"
        )
    return load_tokenizer(file)


def open_data(data: DataConfig, seed: int, batches: BatchSchedule) -> tuple[Loader, Loader | None]:
    """The training data, and the held-out documents if some were held out."""
    trusted = collect_trusted_paths(data)
    train_data = Loader(
        data.path / "train",
        seq_len=data.seq_len,
        seed=seed,
        mixture=data.mixture,
        packing=data.packing,
        window=batches.window,
        total_samples=batches.total_samples,
        on_damage=data.on_damage,
        trusted_paths=trusted,
    )
    if "validation" not in train_data.manifest.splits:
        return train_data, None
    return train_data, Loader(
        data.path / "validation", seq_len=data.seq_len, seed=seed, on_damage=data.on_damage, trusted_paths=trusted
    )


def _check_tokenizer(config: RunConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """UserError where the data was made with another tokenizer, or a prompt of `log.samples` is too long to be continued."""
    if tokenizer.fingerprint != data.manifest.tokenizer:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} ({tokenizer.fingerprint}) is not the tokenizer that made data.path={config.data.path} "
            f"({data.manifest.tokenizer}); set data.tokenizer=auto, or prepare the data with it in another data.path"
        )
    for prompt in config.log.samples:
        check_prompt(f"log.samples: {prompt!r}", len(tokenizer.encode(prompt)), config.model.max_seq_len)


def _check_parent(config: RunConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """UserError where `run.init_from` names a checkpoint that does not fit: told before the run directory is made.

    `restore` looks again, as the other run may go on meanwhile.
    """
    if config.run.init_from is not None and not directory.committed_steps(config.run.dir / "checkpoints"):
        check_init_checkpoint(find_init_checkpoint(config), config, tokenizer, data)


def _check_agreement(config: RunConfig, data: Loader, validation: Loader | None, rank_info: RankInfo) -> None:
    """UserError where a process decided otherwise than the main one, or reads other data: each looks at its own machine."""
    held_out = "none" if validation is None else validation.fingerprint
    mine = flatten(config) | {"the data in data.path": data.fingerprint, "its held-out part": held_out}
    for rank, theirs in enumerate(all_gather_object(mine, rank_info.group)):
        others = [key for key in mine if theirs[key] != mine[key]]
        if others:
            key = others[0]
            raise UserError(
                f"rank {rank_info.world.rank} has {key}={mine[key]}, and rank {rank} has {theirs[key]}: give all processes the same command "
                f"and the same files, and set what says auto where their machines differ"
            )


def _shortage(config: RunConfig) -> str:
    """What `check_room` warns of. A finished run needs no room."""
    return "" if is_finished(config.run.dir / "events.jsonl", config.train.steps) else check_disk_space(config)


def _say(console: Console, line: Text) -> None:
    """One line of a log; on a terminal broken between words."""
    console.print(line, soft_wrap=not console.is_terminal)


def _report(run_dir: Path, console: Console, error: BaseException | None) -> None:
    """Write report.html at the end of an attempt, which may have ended with `error`. A report that fails changes nothing of that."""
    try:
        report = write_report(run_dir)
    except (Exception, KeyboardInterrupt) as failure:
        if error is None:
            what = " ".join((error_text(failure) if isinstance(failure, Exception) else "interrupted").splitlines())
            line = f"{run_dir / 'report.html'} was not written ({what}); nothing else is missing: `pretrain report {run_dir}` tries again"
            Console(stderr=True, soft_wrap=True).print(
                Text.assemble(("warning:", "bold yellow"), " ", line), highlight=False
            )
    else:
        if error is None:
            _say(console, Text.assemble(("report: ", "dim"), str(report)))


def _previous(run_dir: Path) -> RunConfig | None:
    """The config of the run that is there already; its decisions hold on resume."""
    file = run_dir / "config.yaml"
    return read_config(file) if file.is_file() else None


def _meter(config: RunConfig, resume_state: ResumeState, devices: int) -> tuple[ThroughputMeter, str]:
    """The clock of the run, and one sentence on what its MFU means."""
    name = torch.cuda.get_device_name() if config.train.device == "cuda" else "the CPU"
    accelerator = find_accelerator(name) if config.train.precision == "bf16" else None
    flops = flops_per_token(config.model, config.data.seq_len)
    meter = ThroughputMeter(
        total_tokens=resume_state.batches.total_samples * config.data.seq_len,
        tokens_done=resume_state.batches.samples_before(resume_state.step + 1) * config.data.seq_len,
        peak_flops=None if accelerator is None else accelerator.bf16_flops * devices,
    )
    return meter, mfu_statement(flops, name, accelerator, devices)


def _tell_start(
    recorder: RunRecorder,
    config: RunConfig,
    resume_state: ResumeState,
    data: Loader,
    statement: str,
    rank_info: RankInfo,
    shortage: str,
) -> None:
    """What was passed over, what is short, what is trained on what, and on which machines."""
    for path, problem in resume_state.skipped:
        recorder.event("skip_checkpoint", f"{path.name}: {problem}", directory.checkpoint_step(path))
    for notice in (*resume_state.notices, *filter(None, [shortage])):
        recorder.event("notice", notice, resume_state.step)
    parameters, step = parameter_count(config.model), resume_state.step
    samples = resume_state.batches.total_samples
    begin = f"{format_count(parameters)} parameters on {format_count(samples * config.data.seq_len)} tokens of {config.data.path}"
    text = f"{begin}: {_epochs(data, samples)}"
    if resume_state.resumed:
        text = f"step {step} of {config.train.steps}, from the newest checkpoint"
    if resume_state.parent is not None:
        text = f"{text}; {describe_init_checkpoint(resume_state.parent, config)}"
    device = (
        torch.cuda.get_device_name() if config.train.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    if rank_info.world.size > 1:
        device = f"{rank_info.world.size} processes ({rank_info.layout}), each on {device}"
    recorder.event(
        "resume" if resume_state.resumed else "start",
        text,
        step,
        parameters=parameters,
        device=device,
        mfu_statement=statement,
    )


def _epochs(data: Loader, samples: int) -> str:
    """How often the run reads each source, and what that repeats."""
    told = []
    for name, epochs in data.epochs(samples).items():
        repeated = f", {1 - 1 / epochs:.0%} of it seen before" if epochs > 1 else ""
        told.append(f"{name} {epochs:.2g} epochs{repeated}")
    return "; ".join(told)


def _tell_end(
    recorder: RunRecorder, config: RunConfig, run_dir: RunDirectory, tokenizer: Tokenizer, seconds: float
) -> None:
    """Continue the sample prompts with the weights of the last checkpoint, which has them whole, and close the run."""
    if config.log.samples:
        path = directory.checkpoint_path(run_dir.checkpoints, config.train.steps)
        model = load_trained_model(path, config, torch.device(config.train.device))
        for prompt in config.log.samples:
            text = "".join(continue_text(model, tokenizer, prompt, SamplingOptions(seed=config.run.seed)))
            recorder.event("sample", text, config.train.steps, prompt=prompt)
    recorder.event(
        "finish", f"{config.train.steps} steps; this attempt took {format_duration(seconds)}", config.train.steps
    )
