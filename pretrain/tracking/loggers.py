"""TensorBoard and Weights & Biases behind one small interface.

Both are imported only where the settings ask for them.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from data_pipeline.atomic import write_atomic
from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.runs.routing import kl_to_uniform
from pretrain.runs.schema import RoutingStatistics, SourceLoss, StepRecord, ValidationRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

WANDB_ID_FILE = "wandb-id"


class Logger(Protocol):
    """Receives every step and validation."""

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Log one record."""

    def close(self) -> None:
        """Flush and close."""


def open_loggers(config: RunConfig, run_dir: Path, resume_step: int) -> list[Logger]:
    """Open the loggers that `config.log` enables.

    Args:
        config: the settings of the run.
        run_dir: gets their files.
        resume_step: steps done before this attempt. It replaces what an earlier attempt logged for later steps.
    """
    loggers: list[Logger] = []
    if config.log.tensorboard:
        loggers.append(TensorBoardLogger(run_dir / "tensorboard", resume_step))
    if config.log.wandb != "off":
        loggers.append(WandbLogger(config, run_dir, config.log.wandb))
    return loggers


def scalars(record: StepRecord | ValidationRecord) -> dict[str, float]:
    """The numbers worth a curve, by the names both services show: `train/loss`, `validation/loss`, of sources
    `val_loss/<source>`, of experts `experts/load_max`."""
    if isinstance(record, ValidationRecord):
        overall = {"validation/loss": record.val_loss, "validation/perplexity": record.val_perplexity}
        several = record.by_source if len(record.by_source) > 1 else {}
        losses = {f"val_loss/{name}": source.loss for name, source in several.items()}
        perplexities = {f"val_perplexity/{name}": source.perplexity for name, source in several.items()}
        return overall | losses | perplexities | _specialisation(several)
    values = {
        "train/loss": record.loss,
        "train/z_loss": record.z_loss,
        "train/aux_loss": record.aux_loss,
        "train/router_z_loss": record.router_z_loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/tokens": record.tokens,
        "speed/tokens_per_s": record.tokens_per_s,
        "speed/step_s": record.step_s,
        "speed/mfu": record.mfu,
    }
    routing = {} if record.routing is None else _routing(record.routing)
    return {name: value for name, value in values.items() if value is not None} | routing


def _routing(routing: RoutingStatistics) -> dict[str, float]:
    """The worst layer's load, and means over the layers. Curves for each of 94 layers would slow every step."""
    values = {
        "experts/load_max": max(routing.load_max),
        "experts/load_max_mean": statistics.fmean(routing.load_max),
        "experts/entropy": statistics.fmean(routing.entropy),
        "experts/dead": sum(routing.dead),
    }
    return values if routing.dropped is None else values | {"experts/dropped": statistics.fmean(routing.dropped)}


def _specialisation(sources: Mapping[str, SourceLoss]) -> dict[str, float]:
    """For each source the KL divergence of its experts' load from an even one, mean over the layers."""
    counts = {name: source.expert_counts for name, source in sources.items() if source.expert_counts}
    return {
        f"specialisation/{name}": float(kl_to_uniform(list(by_layer.values())).mean())
        for name, by_layer in counts.items()
    }


class TensorBoardLogger:
    """Event files in `folder`; TensorBoard itself drops the steps after `resume_step` that an earlier attempt wrote."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Write each number of the record at its step."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step, walltime=record.time)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbLogger:
    """One Weights & Biases run per run directory: every attempt uses the id in the file `wandb-id`."""

    def __init__(self, config: RunConfig, run_dir: Path, mode: Literal["offline", "online"]) -> None:
        """Open the run. UserError if Weights & Biases refuses it (no account, no network)."""
        import wandb

        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                name=run_dir.name,
                id=_wandb_id(run_dir),
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )
        except wandb.errors.Error as error:
            raise UserError(f"log.wandb={mode}: {error}; `wandb login` first, or set log.wandb=offline") from error
        # wandb's own step cannot go back after a resume; a named axis can.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: StepRecord | ValidationRecord) -> None:
        """Log the numbers of the record at its step."""
        self._run.log({"step": record.step, **scalars(record)})

    def close(self) -> None:
        """Finish the upload or the offline file, and wait for it."""
        import wandb

        self._run.finish()
        # wandb 0.31: when a process reuses a run id, finish() can return before the last records are on disk.
        # Ending the service waits for them.
        wandb.teardown()


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        write_atomic(path, secrets.token_hex(4).encode())
    return path.read_text(encoding="utf-8").strip()
