"""A config -> a trained model: opens and checks everything before anything is written, goes on from the newest checkpoint, trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from data_pipeline.reading.loader import Loader
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer
from parallel.engines.torch import TorchEngine
from pretrain.checkpoint import directory, rng, store
from pretrain.checkpoint.record import read_manifest
from pretrain.config import AUTO, RunConfig
from pretrain.errors import UserError
from pretrain.hardware import find_accelerator
from pretrain.model.flops import flops_per_token, parameter_count
from pretrain.model.transformer import Transformer
from pretrain.optim.schedule import samples_before
from pretrain.report.page import write_report
from pretrain.report.records import read_config, read_events
from pretrain.report.words import amount, duration
from pretrain.train.build import build_engine
from pretrain.train.display import Display
from pretrain.train.growth import check_growth, window_of
from pretrain.train.loggers import Logger, open_loggers
from pretrain.train.loop import RANK, Books, Loop, Outcome
from pretrain.train.metrics import Meter, RecordFile, mfu_statement, truncate_after
from pretrain.train.resolve import resolve
from pretrain.train.rundir import RunDirectory
from pretrain.train.sample import Sampling, check_prompt, continue_text, keep_tokenizer
from pretrain.train.stop import stop_on_signals

BEFORE_ANY_STEP = -1
"""The validation before the first step is a record of step 0."""


def train(config: RunConfig, console: Console, observers: Sequence[Logger] = ()) -> Outcome:
    """Train `config` in its run directory, from its newest whole checkpoint if there is one.

    Args:
        config: as loaded; `auto` is resolved here.
        console: where decisions and progress are shown.
        observers: hear of every step and validation, beside the loggers that the config asks for.

    Raises:
        UserError, DataError: an input is wrong; nothing was changed.
        Diverged: a loss stopped being finite.
    """
    began = time.monotonic()
    tokenizer = open_tokenizer(config)
    config, decisions = resolve(config, tokenizer_size=tokenizer.vocab_size, previous=_previous(config.run.dir))
    train_data, validation = open_data(config)
    _check_tokenizer(config, tokenizer, train_data)
    for decision in decisions:
        console.print(Text.assemble((f"{decision.key} = ", "dim"), str(decision.value), (f" ({decision.reason})", "dim")), soft_wrap=True)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        run_dir = stack.enter_context(RunDirectory.open(config))
        engine = build_engine(config)
        step, ahead, skipped = restore(run_dir, engine, train_data, config)
        run_dir.settle(config)
        keep_tokenizer(config.data.tokenizer, run_dir.path)
        stack.callback(write_report, run_dir.path)  # whatever becomes of the attempt
        if step == config.train.steps and _is_finished(run_dir):
            text = f"run.dir={run_dir.path} is finished, all {step} steps of it: nothing to do; to train anew, set another run.dir"
            console.print(Text(text), soft_wrap=True)
            return Outcome.FINISHED
        loggers = [*open_loggers(config, run_dir.path, step), *observers]
        for logger in loggers:
            stack.callback(logger.close)
        meter, statement = _meter(config, step, ahead)
        books = Books(
            stack.enter_context(RecordFile(run_dir.metrics)),
            stack.enter_context(RecordFile(run_dir.events)),
            stack.enter_context(Display(config.train.steps, console=console, mfu_statement=statement)),
            run_dir.attempt,
            loggers,
        )
        for path, problem in skipped:
            books.event("skip_checkpoint", f"{path.name}: {problem}", directory.step_of(path))
        _tell_start(books, config, step, train_data, statement)
        outcome = Loop(config, engine, train_data, validation, run_dir, books, meter, stop, ahead).run(step)
        if outcome is Outcome.FINISHED:
            _tell_end(books, config, engine, tokenizer, time.monotonic() - began)
    return outcome


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that the config names; DataError or UserError where the data was never prepared."""
    if config.data.tokenizer != AUTO:
        return load_tokenizer(config.data.tokenizer)
    file = config.data.path / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"data.path={config.data.path} holds no prepared data; run `pretrain data prepare` with this config first")
    return load_tokenizer(file)


def open_data(config: RunConfig) -> tuple[Loader, Loader | None]:
    """The training data, and the held-out documents if some were held out."""
    data, seed = config.data, config.run.seed
    train_data = Loader(
        data.path / "train",
        seq_len=data.seq_len,
        seed=seed,
        mixture=data.mixture,
        packing=data.packing,
        longest=window_of(config),
        total_samples=samples_before(config.train.steps + 1, config.train),
        on_damage=data.on_damage,
    )
    if "validation" not in train_data.manifest.splits:
        return train_data, None
    return train_data, Loader(data.path / "validation", seq_len=data.seq_len, seed=seed, on_damage=data.on_damage)


def _check_tokenizer(config: RunConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """UserError where the data was made with another tokenizer, or a prompt of `log.samples` is too long to be continued."""
    if tokenizer.fingerprint != data.manifest.tokenizer:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} ({tokenizer.fingerprint}) is not the tokenizer that made data.path={config.data.path} "
            f"({data.manifest.tokenizer}); set data.tokenizer=auto, or prepare the data with it in another data.path"
        )
    for prompt in config.log.samples:
        check_prompt(f"log.samples: {prompt!r}", len(tokenizer.encode(prompt)), config.model.max_seq_len)


def restore(run_dir: RunDirectory, engine: TorchEngine, data: Loader, config: RunConfig) -> tuple[int, int, list[tuple[Path, str]]]:
    """Load the newest whole checkpoint. What came after it is undone: later records are cut, later (damaged) checkpoints set aside.

    Returns:
        The steps done, 0 without a checkpoint; the samples that they read more than batches of today's size would have; and each newer
        checkpoint that was passed over, with its first problem.

    Raises:
        UserError: there are checkpoints but none is whole, or the data is not the data of the run.
    """
    skipped: list[tuple[Path, str]] = []
    path = directory.newest(run_dir.checkpoints, on_problem=lambda path, problems: skipped.append((path, problems[0])))
    if path is None:
        truncate_after(run_dir.metrics, BEFORE_ANY_STEP)
        return 0, 0, skipped
    manifest = read_manifest(path)
    if manifest.dataset != data.fingerprint:
        raise UserError(
            f"{path} was trained on other data (manifest {manifest.dataset}) than data.path holds now ({data.fingerprint}); "
            f"put the data back, or start in another run.dir"
        )
    if manifest.order != data.past(manifest.samples):
        raise UserError(
            f"{path} read its first {manifest.samples} sequences in another order than run.seed, data.mixture, data.growth and data.window "
            f"give now; put them back (a stage may be appended from there on), or start in another run.dir"
        )
    ahead = manifest.samples - samples_before(manifest.step + 1, config.train)
    check_growth(config, manifest.step, ahead)
    store.load(path, engine.state())
    engine.loaded()
    rng.restore(manifest.rng[RANK])
    truncate_after(run_dir.metrics, manifest.step)
    for damaged, _ in skipped:  # among the newest ones, `directory.retain` would keep them and delete those that are saved from now on
        damaged.rename(directory.partial_path(run_dir.checkpoints, directory.step_of(damaged), f"damaged-{run_dir.attempt}"))
    return manifest.step, ahead, skipped


def _is_finished(run_dir: RunDirectory) -> bool:
    """Whether the run has told its end; one that was killed between its last checkpoint and that has not."""
    return any(event.kind == "finish" for event in read_events(run_dir.events))


def _previous(run_dir: Path) -> RunConfig | None:
    """The config of the run that is there already; its decisions hold on resume."""
    file = run_dir / "config.yaml"
    return read_config(file) if file.is_file() else None


def _meter(config: RunConfig, step: int, ahead: int) -> tuple[Meter, str]:
    """The clock of the run, and one sentence on what its MFU means."""
    name = torch.cuda.get_device_name() if config.train.device == "cuda" else "the CPU"
    accelerator = find_accelerator(name) if config.train.precision == "bf16" else None
    flops = flops_per_token(config.model, config.data.seq_len)
    meter = Meter(
        total_tokens=(samples_before(config.train.steps + 1, config.train) + ahead) * config.data.seq_len,
        tokens_done=(samples_before(step + 1, config.train) + ahead) * config.data.seq_len,
        peak_flops=None if accelerator is None else accelerator.bf16_flops,
    )
    return meter, mfu_statement(flops, name, accelerator)


def _tell_start(books: Books, config: RunConfig, step: int, data: Loader, statement: str) -> None:
    parameters = parameter_count(config.model)
    samples = samples_before(config.train.steps + 1, config.train)
    begin = f"{amount(parameters)} parameters on {amount(samples * config.data.seq_len)} tokens of {config.data.path}"
    text = f"step {step} of {config.train.steps}, from the newest checkpoint" if step else f"{begin}: {_epochs(data, samples)}"
    device = torch.cuda.get_device_name() if config.train.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    books.event("resume" if step else "start", text, step, parameters=parameters, device=device, mfu_statement=statement)


def _epochs(data: Loader, samples: int) -> str:
    """How often the run reads each source, and what that repeats."""
    told = []
    for name, epochs in data.epochs(samples).items():
        repeated = f", {1 - 1 / epochs:.0%} of it seen before" if epochs > 1 else ""
        told.append(f"{name} {epochs:.2g} epochs{repeated}")
    return "; ".join(told)


def _tell_end(books: Books, config: RunConfig, engine: TorchEngine, tokenizer: Tokenizer, seconds: float) -> None:
    """Continue the sample prompts with the trained weights, and close the run."""
    assert isinstance(engine.model, Transformer)
    for prompt in config.log.samples:
        text = "".join(continue_text(engine.model, tokenizer, prompt, Sampling(seed=config.run.seed)))
        books.event("sample", text, config.train.steps, prompt=prompt)
    books.event("finish", f"{config.train.steps} steps; this attempt took {duration(seconds)}", config.train.steps)
