"""The training loop: batch, step, record, validate, save. Knows an engine, not which; a loader, not its files.

Every process of a run goes through the same loop, and does by itself what needs no other: what is read differs, and who keeps the recorder.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_pipeline.held_out import allocate_validation_sequences
from data_pipeline.reading.loader import Loader, prefetch
from data_pipeline.reading.packing import Batch
from parallel.engine import Engine, StepResult
from pretrain.checkpoint import directory, rng
from pretrain.checkpoint.manifest import TrainState
from pretrain.checkpoint.object_collectives import all_gather_object
from pretrain.checkpoint.prune import prune
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.errors import Diverged, UserError
from pretrain.estimate.flops import flops_per_token
from pretrain.optim.schedule import lr_scale
from pretrain.runs.schema import SourceLoss, StepRecord, ValidationRecord
from pretrain.runs.throughput import ThroughputMeter
from pretrain.setup.batch_schedule import BatchSchedule
from pretrain.signals import Activity, StopRequest
from pretrain.tracking.recorder import RunRecorder
from pretrain.train.batching import HostBatch, pad_batch, split_microbatches, to_host
from pretrain.train.disk_space import save_failed
from pretrain.train.rank_info import RankInfo


class Outcome(enum.Enum):
    """How an attempt ended: all steps done, or stopped on request with everything saved."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass
class TrainLoop:
    """One attempt at a run. `run(step)` goes on after that many steps."""

    config: RunConfig
    batches: BatchSchedule
    engine: Engine
    train: Loader
    validation: Loader | None
    checkpoints: Path
    recorder: RunRecorder
    meter: ThroughputMeter
    stop: StopRequest
    rank_info: RankInfo
    _told: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.config.train.device)

    def run(self, step: int, *, validate_first: bool) -> Outcome:
        """Train from `step` steps done to `train.steps`, or until somebody asks to stop.

        validate_first: whether to validate before the first step, as a run does that does not resume.
        """
        steps = self.config.train.steps
        if validate_first:
            self._validate(step)
        for batch in self._batches(step):
            step += 1
            self.stop.step_begins()
            asked = self._train(step, batch)
            if step % self.config.eval.every == 0 or step == steps:
                self._validate(step)
                asked = asked or self._any_rank_asked()
            if step % self.config.checkpoint.every == 0 or step == steps or asked:
                self._save(step)
                asked = asked or self._any_rank_asked()
            if asked and step < steps:
                self.recorder.event("stop", f"{self.stop.name} received; the same command goes on from here", step)
                return Outcome.STOPPED
        return Outcome.FINISHED

    def _batches(self, step: int) -> Iterator[HostBatch]:
        """What this process reads of the batches after `step`, each while the one before is trained on."""
        steps = ((s,) for s in range(step + 1, self.config.train.steps + 1))
        return prefetch(self._read, steps, lambda batch: to_host(batch, self.device))

    def _read(self, step: int) -> Batch:
        """Its rows of the global batch of a step, filled up to as many as every data rank gives."""
        planned, share = self.batches.batch(step), self.rank_info.data_shard
        mine, per_row = share.rows(planned.n_rows), planned.samples_per_row
        batch = self.train.batch(planned.first_sample + mine.start * per_row, len(mine) * per_row, planned.seq_len)
        return pad_batch(batch, share.padded_rows(planned.n_rows, self.batches.micro_batch_size(planned.seq_len)))

    def _train(self, step: int, batch: HostBatch) -> bool:
        """One step; whether any rank was asked to stop: one that is alone may have been after its passes."""
        config, seq_len = self.config, batch.input_ids.shape[1]
        if not self._agree_on_damage(batch, step):
            raise UserError(
                f"every sequence of the batch of step {step} is damaged, so data.on_damage=skip has nothing left to train on"
            )
        scale = lr_scale(step, config.train.steps, config.optim)
        mine = list(split_microbatches(batch, self.batches.micro_batch_size(seq_len), self.device))
        result = self.engine.train_step(mine, scale, stop_requested=lambda: bool(self.stop))
        samples = self.batches.samples_before(step + 1)
        tokens = (samples - self.batches.samples_before(step)) * config.data.seq_len
        speed = self.meter.step(tokens, flops_per_token(config.model, seq_len))
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
            attempt=self.recorder.attempt,
        )
        self.recorder.log(record)
        self.recorder.display.step(record, self.meter.average())
        if not result.is_finite:
            self._diverged(step, result)
        return result.stop_requested if self.rank_info.world.size > 1 else bool(self.stop)

    def _any_rank_asked(self) -> bool:
        """Whether any rank was asked to stop by now, as after a validation or a save, which may take long: nothing more is begun then."""
        return any(all_gather_object(bool(self.stop), self.rank_info.group))

    def _agree_on_damage(self, batch: HostBatch, step: int) -> bool:
        """Tell each damaged place once, as validation meets it every time; whether any process has something left to train on."""
        if self.config.data.on_damage == "stop":
            return True
        reports = all_gather_object((batch.damaged, bool(batch.n_targets.any())), self.rank_info.group)
        for message in (message for damaged, _ in reports for message in damaged):
            if message not in self._told:
                self._told.add(message)
                self.recorder.event("skip_data", message, step)
        return any(has_targets for _, has_targets in reports)

    def _diverged(self, step: int, result: StepResult) -> None:
        text = f"loss {result.loss} and gradient norm {result.grad_norm} at step {step}"
        self.recorder.event("stop", text, step)
        optim, saved = self.config.optim, directory.committed_steps(self.checkpoints)
        branch = (
            f"; run.init_from={self.config.run.dir} run.init_mode=full begins it at step {saved[0]}" if saved else ""
        )
        raise Diverged(
            f"{text}: the run diverged, and this step was not taken. In another run.dir, lower optim.lr={optim.lr}, "
            f"lengthen optim.warmup={optim.warmup} or set train.z_loss=1e-4{branch}"
        )

    def _validate(self, step: int) -> None:
        """Mean loss over held-out sequences of every source, the same ones each time, and over those of each source."""
        if self.validation is None:
            return
        config = self.config
        budget = config.eval.batches * config.train.batch_size
        with self.meter.paused(), self.stop.during(Activity.VALIDATION):
            sums = {
                name: self._loss_of(self.validation, name, n_sequences, step)
                for name, n_sequences in allocate_validation_sequences(self.validation.sizes, budget).items()
            }
            targets = sum(n_targets for _, n_targets in sums.values())
            if not targets:
                raise UserError(
                    f"{config.data.path / 'validation'} holds no token to predict that is not damaged; prepare more, or restore it"
                )
            record = ValidationRecord(
                step=step,
                val_loss=sum(loss for loss, _ in sums.values()) / targets,
                val_tokens=targets,
                by_source={name: SourceLoss(loss=loss / n, tokens=n) for name, (loss, n) in sums.items() if n},
                time=time.time(),
            )
            self.recorder.log(record)
            self.recorder.display.validation(record)

    def _loss_of(self, validation: Loader, source: str, n_sequences: int, step: int) -> tuple[float, int]:
        """(sum of the cross-entropy in nats, tokens predicted) over the first held-out sequences of a source, a batch at a time."""
        size, batch_size, share = (
            self.config.train.micro_batch_size,
            self.config.train.batch_size,
            self.rank_info.data_shard,
        )
        total, targets = 0.0, 0
        for first in range(0, n_sequences, batch_size):
            n_rows = min(batch_size, n_sequences - first)
            mine = share.rows(n_rows)
            batch = validation.sequential(source, first + mine.start, len(mine))
            rows = to_host(pad_batch(batch, share.padded_rows(n_rows, size)), self.device)
            self._agree_on_damage(rows, step)
            loss, n_targets = self.engine.eval_step(list(split_microbatches(rows, size, self.device)))
            total, targets = total + loss, targets + n_targets
        return total, targets

    def _save(self, step: int) -> None:
        config, rank_info = self.config, self.rank_info
        with self.meter.paused(), self.stop.during(Activity.SAVE):
            began = time.perf_counter()
            states = all_gather_object((rank_info.coordinates, rng.capture()), rank_info.group)
            record = TrainState(
                step=step,
                samples=self.batches.samples_before(step + 1),
                config=config.model_dump(mode="json"),
                dataset=self.train.fingerprint,
                tokenizer=self.train.manifest.tokenizer,
                order=self.train.order_fingerprint(self.batches.samples_before(step + 1)),
                layout=rank_info.axis_sizes,
                rng=dict(states),
            )
            target = directory.checkpoint_path(self.checkpoints, step)
            try:
                path = save_checkpoint(self.checkpoints, self.engine.state(), record, rank_info.group)
            except OSError as error:
                raise save_failed(config, target, error) from error
            for problem in prune(self.checkpoints, config.checkpoint.keep, rank_info.group):
                text = f"damaged checkpoints are kept, as {path.name} does not verify: {problem}"
                self.recorder.event("notice", text, step)
            if rank_info.world.is_main:
                size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
                self.recorder.event("save", f"{path.name}, {size:.0f} MB in {time.perf_counter() - began:.1f} s", step)
