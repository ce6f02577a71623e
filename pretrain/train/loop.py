"""The training loop: batch, step, record, validate, save. Knows an engine, not which; a loader, not its files."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from data_pipeline.reading.loader import Loader, prefetch
from parallel.engine import Engine, StepResult
from pretrain.checkpoint import directory, rng, store
from pretrain.checkpoint.record import Record
from pretrain.config import RunConfig
from pretrain.errors import Diverged, UserError
from pretrain.model.flops import flops_per_token
from pretrain.optim.schedule import batch_size_at, lr_scale, samples_before
from pretrain.report.records import Event, StepRecord, ValidationRecord
from pretrain.train.display import Display
from pretrain.train.feed import HostBatch, microbatches, to_host
from pretrain.train.growth import seq_len_at
from pretrain.train.loggers import Logger
from pretrain.train.metrics import Meter, RecordFile
from pretrain.train.rundir import RunDirectory
from pretrain.train.stop import StopRequest

RANK = "data=0"
"""Logical position of the one process there is, under which its random state is kept."""


class Outcome(enum.Enum):
    """How an attempt ended: all steps done, or stopped on request with everything saved."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass
class Books:
    """Everyone who hears of the run: the two record files, the display, the loggers."""

    metrics: RecordFile
    events: RecordFile
    display: Display
    attempt: int
    loggers: Sequence[Logger] = field(default=())

    def event(self, kind: str, text: str, step: int | None = None, **more: str | int | None) -> None:
        """Tell that something happened."""
        event = Event.model_validate({"time": time.time(), "kind": kind, "text": text, "step": step, **more})
        self.events.append(event)
        self.display.event(event)

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Pass a record to the file and the loggers; the display is told by the loop, which knows the pace."""
        self.metrics.append(record)
        for logger in self.loggers:
            logger.log(record)


@dataclass
class Loop:
    """One attempt at a run. `run(step)` goes on after that many steps."""

    config: RunConfig
    engine: Engine
    train: Loader
    validation: Loader | None
    run_dir: RunDirectory
    books: Books
    meter: Meter
    stop: StopRequest
    ahead: int = 0
    """Samples that the run has read more than batches of today's size would have; see `train.batch_size`."""
    _told: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.config.train.device)

    def run(self, step: int) -> Outcome:
        """Train from `step` steps done to `train.steps`, or until somebody asks to stop."""
        steps = self.config.train.steps
        if step == 0:
            self._validate(step)
        for batch in self._batches(step):
            step += 1
            self._train(step, batch)
            stopping = bool(self.stop) and step < steps
            if step % self.config.eval.every == 0 or step == steps:
                self._validate(step)
            if step % self.config.checkpoint.every == 0 or step == steps or stopping:
                self._save(step)
            if stopping:
                self.books.event("stop", f"{self.stop.name} received; the same command goes on from here", step)
                return Outcome.STOPPED
        return Outcome.FINISHED

    def _batches(self, step: int) -> Iterator[HostBatch]:
        """The global batches after `step`, each read while the one before is trained on."""
        train = self.config.train
        steps = range(step + 1, train.steps + 1)
        slices = ((self._samples_before(s), batch_size_at(s, train)) for s in steps)
        requests = ((first, count, seq_len_at(first, self.config)) for first, count in slices)
        return prefetch(self.train.batch, requests, lambda batch: to_host(batch, self.device))

    def _train(self, step: int, batch: HostBatch) -> None:
        config, seq_len = self.config, batch.input_ids.shape[1]
        self._tell_damaged(batch, step)
        if not batch.n_targets.any():
            raise UserError(f"every sequence of the batch of step {step} is damaged, so data.on_damage=skip has nothing left to train on")
        scale = lr_scale(step, config.train.steps, config.optim)
        result = self.engine.train_step(list(microbatches(batch, self._micro_batch(seq_len), self.device)), scale)
        samples = self._samples_before(step + 1)
        speed = self.meter.step(batch.input_ids.numel(), flops_per_token(config.model, seq_len))
        record = StepRecord(
            step=step,
            samples=samples,
            tokens=samples * config.data.seq_len,
            loss=result.loss,
            z_loss=result.z_loss if config.train.z_loss else None,
            lr=scale * config.optim.lr,
            grad_norm=result.grad_norm,
            tokens_per_s=speed.tokens_per_s,
            step_s=speed.step_s,
            mfu=speed.mfu,
            time=time.time(),
            attempt=self.books.attempt,
        )
        self.books.log(record)
        self.books.display.step(record, self.meter.pace())
        if not result.is_finite:
            self._diverged(step, result)

    def _samples_before(self, step: int) -> int:
        """Where the data of a step begins."""
        return samples_before(step, self.config.train) + self.ahead

    def _tell_damaged(self, batch: HostBatch, step: int) -> None:
        """Each damaged place once: validation meets it every time."""
        for message in batch.damaged:
            if message not in self._told:
                self._told.add(message)
                self.books.event("skip_data", message, step)

    def _micro_batch(self, seq_len: int) -> int:
        """Sequences in a microbatch: `train.micro_batch_size` of `data.seq_len` tokens, or as many tokens in longer ones, at least one."""
        return max(1, self.config.train.micro_batch_size * self.config.data.seq_len // seq_len)

    def _diverged(self, step: int, result: StepResult) -> None:
        text = f"loss {result.loss} and gradient norm {result.grad_norm} at step {step}"
        self.books.event("stop", text, step)
        optim = self.config.optim
        raise Diverged(
            f"{text}: the run diverged, and this step was not taken. In another run.dir, lower optim.lr={optim.lr}, lengthen "
            f"optim.warmup={optim.warmup} or set train.z_loss=1e-4"
        )

    def _validate(self, step: int) -> None:
        """Mean loss over the first batches of the held-out split, the same ones each time."""
        if self.validation is None:
            return
        config = self.config
        size, n_sequences = config.train.micro_batch_size, min(config.eval.batches * config.train.batch_size, self.validation.n_sequences)
        total, targets = 0.0, 0
        with self.meter.paused():
            for first in range(0, n_sequences, size):
                rows = to_host(self.validation.sequential(first, min(size, n_sequences - first)), self.device)
                self._tell_damaged(rows, step)
                for microbatch in microbatches(rows, size, self.device):
                    loss, n_targets = self.engine.eval_step(microbatch)
                    total, targets = total + loss, targets + n_targets
            if not targets:
                raise UserError(
                    f"{config.data.path / 'validation'} holds no token to predict that is not damaged; prepare more, or restore it"
                )
            record = ValidationRecord(step=step, val_loss=total / targets, val_tokens=targets, time=time.time())
            self.books.log(record)
            self.books.display.validation(record)

    def _save(self, step: int) -> None:
        config = self.config
        with self.meter.paused():
            began = time.perf_counter()
            record = Record(
                step=step,
                samples=self._samples_before(step + 1),
                config=config.model_dump(mode="json"),
                dataset=self.train.fingerprint,
                order=self.train.past(self._samples_before(step + 1)),
                layout={"data": 1},
                rng={RANK: rng.capture()},
            )
            path = store.save(self.run_dir.checkpoints, self.engine.state(), record)
            directory.retain(self.run_dir.checkpoints, config.checkpoint.keep)
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            self.books.event("save", f"{path.name}, {size:.0f} MB in {time.perf_counter() - began:.1f} s", step)
