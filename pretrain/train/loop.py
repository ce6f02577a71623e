"""The training loop: read a batch, step, record, validate, save. It knows only the interfaces of engine and loader.

Every process of a run executes the same loop. Each data rank reads its own rows, and only rank 0 writes records.
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
from parallel.engine import Engine, EvalResult, StepResult
from pretrain.checkpoint import directory, rng
from pretrain.checkpoint.manifest import TrainState
from pretrain.checkpoint.object_collectives import all_gather_object
from pretrain.checkpoint.prune import prune
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.errors import Diverged, UserError
from pretrain.estimate.flops import flops_per_token
from pretrain.optim.schedule import lr_scale
from pretrain.runs.routing import StepRouting, expert_counts, step_routing
from pretrain.runs.schema import SourceLoss, StepRecord, ValidationRecord
from pretrain.runs.throughput import ThroughputMeter
from pretrain.setup.batch_schedule import BatchSchedule
from pretrain.signals import Activity, StopRequest
from pretrain.tracking.recorder import RunRecorder
from pretrain.train.batching import HostBatch, pad_batch, split_microbatches, to_host
from pretrain.train.disk_space import save_failed
from pretrain.train.profiling import StepProfiler
from pretrain.train.rank_info import RankInfo


class Outcome(enum.Enum):
    """How an attempt ended: all steps done, or stopped on request with everything saved."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass
class TrainLoop:
    """One attempt at a run; `run(step)` continues after `step` steps."""

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
    profiler: StepProfiler
    _reported_damage: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.config.train.device)

    def run(self, step: int, *, validate_first: bool) -> Outcome:
        """Train from `step` steps done to `train.steps`, or until a stop is requested.

        Args:
            step: steps done.
            validate_first: validate before the first step; a resumed run does not.
        """
        steps = self.config.train.steps
        if validate_first:
            self._validate(step)
        for batch in self._batches(step):
            step += 1
            self.stop.begin_step()
            with self.meter.paused():
                self.profiler.begin_step(step)
            stop_requested = self._train_step(step, batch)
            with self.meter.paused():
                self.profiler.end_step(step)
            if step % self.config.eval.every == 0 or step == steps:
                self._validate(step)
                stop_requested = stop_requested or self._is_stop_requested_anywhere()
            if step % self.config.checkpoint.every == 0 or step == steps or stop_requested:
                self._save(step)
                stop_requested = stop_requested or self._is_stop_requested_anywhere()
            if stop_requested and step < steps:
                self.recorder.event("stop", f"{self.stop.name} received; the same command resumes from here", step)
                return Outcome.STOPPED
        return Outcome.FINISHED

    def _batches(self, step: int) -> Iterator[HostBatch]:
        """Yield this rank's rows of the batches after `step`, each prefetched during the step before."""
        steps = ((s,) for s in range(step + 1, self.config.train.steps + 1))
        return prefetch(self._read, steps, lambda batch: to_host(batch, self.device))

    def _read(self, step: int) -> Batch:
        """Read this rank's rows of the global batch of `step`, padded to the same number on every data rank."""
        planned, shard = self.batches.batch(step), self.rank_info.data_shard
        rows, per_row = shard.rows(planned.n_rows), planned.samples_per_row
        batch = self.train.batch(planned.first_sample + rows.start * per_row, len(rows) * per_row, planned.seq_len)
        return pad_batch(batch, shard.padded_rows(planned.n_rows, self.batches.micro_batch_size(planned.seq_len)))

    def _train_step(self, step: int, batch: HostBatch) -> bool:
        """Take one step and record it.

        Returns whether any rank was asked to stop. A single process also sees a request that came after its passes.
        """
        config, seq_len = self.config, batch.input_ids.shape[1]
        if not self._report_damage(batch, step):
            raise UserError(
                f"every sequence of the batch of step {step} is damaged, so data.on_damage=skip has nothing left to "
                "train on"
            )
        scale = lr_scale(step, config.train.steps, config.optim)
        microbatches = list(split_microbatches(batch, self.batches.micro_batch_size(seq_len), self.device))
        result = self.engine.train_step(microbatches, scale, stop_requested=lambda: bool(self.stop))
        samples = self.batches.samples_before(step + 1)
        tokens = (samples - self.batches.samples_before(step)) * config.data.seq_len
        throughput = self.meter.step(tokens, flops_per_token(config.model, seq_len))
        moe, routing = config.model.moe, StepRouting()
        if result.routing is not None:
            routing = step_routing(result.routing.numpy(), result.n_tokens, moe)
        record = StepRecord(
            step=step,
            samples=samples,
            tokens=samples * config.data.seq_len,
            loss=result.loss,
            z_loss=result.z_loss if config.train.z_loss else None,
            aux_loss=routing.aux_loss,
            router_z_loss=routing.router_z_loss,
            lr=scale * config.optim.lr,
            grad_norm=result.grad_norm,
            tokens_per_s=throughput.tokens_per_s,
            step_s=throughput.step_s,
            mfu=throughput.mfu,
            time=time.time(),
            attempt=self.recorder.attempt,
            routing=routing.statistics,
        )
        self.recorder.log(record)
        self.recorder.display.step(record, self.meter.average())
        if not result.is_finite:
            self._raise_diverged(step, result)
        return result.stop_requested if self.rank_info.world.size > 1 else bool(self.stop)

    def _is_stop_requested_anywhere(self) -> bool:
        """Return whether any rank was asked to stop. Called after a validation or a save, which may take long."""
        return any(all_gather_object(bool(self.stop), self.rank_info.group))

    def _report_damage(self, batch: HostBatch, step: int) -> bool:
        """Record damaged sequences, each once: validation reads the same ones every time.

        Returns whether any rank has a target left in this batch.
        """
        if self.config.data.on_damage == "stop":
            return True
        reports = all_gather_object((batch.damaged, bool(batch.n_targets.any())), self.rank_info.group)
        for message in (message for damaged, _ in reports for message in damaged):
            if message not in self._reported_damage:
                self._reported_damage.add(message)
                self.recorder.event("skip_data", message, step)
        return any(has_targets for _, has_targets in reports)

    def _raise_diverged(self, step: int, result: StepResult) -> None:
        text = f"loss {result.loss} and gradient norm {result.grad_norm} at step {step}"
        self.recorder.event("stop", text, step)
        optim, saved = self.config.optim, directory.committed_steps(self.checkpoints)
        branch = (
            f"; run.init_from={self.config.run.dir} run.init_mode=full starts it at step {saved[0]}" if saved else ""
        )
        raise Diverged(
            f"{text}: the run diverged, and this step was not taken. In another run.dir, lower optim.lr={optim.lr}, "
            f"lengthen optim.warmup={optim.warmup} or set train.z_loss=1e-4{branch}"
        )

    def _validate(self, step: int) -> None:
        """Record the mean loss over held-out sequences, of all sources and of each.

        The sequences are the same each time.
        """
        if self.validation is None:
            return
        config = self.config
        budget = config.eval.batches * config.train.batch_size
        with self.meter.paused(), self.stop.during(Activity.VALIDATION):
            sums = {
                name: self._source_loss(self.validation, name, n_sequences, step)
                for name, n_sequences in allocate_validation_sequences(self.validation.sizes, budget).items()
            }
            targets = sum(each.n_targets for each in sums.values())
            if not targets:
                raise UserError(
                    f"{config.data.path / 'validation'} holds no undamaged token to predict; prepare more data, or "
                    "restore it"
                )
            record = ValidationRecord(
                step=step,
                val_loss=sum(each.loss_sum for each in sums.values()) / targets,
                val_tokens=targets,
                by_source={name: self._source_record(each) for name, each in sums.items() if each.n_targets},
                time=time.time(),
            )
            self.recorder.log(record)
            self.recorder.display.validation(record)

    def _source_loss(self, validation: Loader, source: str, n_sequences: int, step: int) -> EvalResult:
        """Evaluate the first `n_sequences` of a source."""
        train, shard = self.config.train, self.rank_info.data_shard
        size, batch_size = train.micro_batch_size, train.batch_size
        total, targets = 0.0, 0
        routing: torch.Tensor | None = None
        for first in range(0, n_sequences, batch_size):
            n_rows = min(batch_size, n_sequences - first)
            rows = shard.rows(n_rows)
            batch = validation.sequential(source, first + rows.start, len(rows))
            host_batch = to_host(pad_batch(batch, shard.padded_rows(n_rows, size)), self.device)
            self._report_damage(host_batch, step)
            result = self.engine.eval_step(list(split_microbatches(host_batch, size, self.device)))
            total, targets = total + result.loss_sum, targets + result.n_targets
            if result.routing is not None:
                routing = result.routing if routing is None else routing + result.routing
        return EvalResult(total, targets, routing)

    def _source_record(self, result: EvalResult) -> SourceLoss:
        counts = None if result.routing is None else expert_counts(result.routing.numpy(), self.config.model.moe)
        return SourceLoss(loss=result.loss_sum / result.n_targets, tokens=result.n_targets, expert_counts=counts)

    def _save(self, step: int) -> None:
        config, rank_info = self.config, self.rank_info
        with self.meter.paused(), self.stop.during(Activity.SAVE):
            start = time.perf_counter()
            states = all_gather_object((rank_info.coordinates, rng.capture()), rank_info.group)
            train_state = TrainState(
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
                path = save_checkpoint(self.checkpoints, self.engine.state(), train_state, rank_info.group)
            except OSError as error:
                raise save_failed(config, target, error) from error
            for problem in prune(self.checkpoints, config.checkpoint.keep, rank_info.group):
                text = f"damaged checkpoints are kept because {path.name} does not verify: {problem}"
                self.recorder.event("notice", text, step)
            if rank_info.world.is_main:
                size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
                self.recorder.event("save", f"{path.name}, {size:.0f} MB in {time.perf_counter() - start:.1f} s", step)
