"""What a run writes down, one JSON object a line: the types of those lines, and how to read them back.

Both files only grow, so a crash can tear no more than the last line: a line without its newline was never written.
Numbers that are not finite are written as null, which every JSON reader takes, and are read back as NaN.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, computed_field

from data_pipeline.errors import unreadable_error
from pretrain.config import RunConfig
from pretrain.errors import UserError


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _null_is_nan(value: object) -> object:
    return math.nan if value is None else value


LAST_SECTION = "log"
"""Of a `config.yaml`, which always holds all sections in one order: where this one is missing, the end of the file is."""

Number = Annotated[float, BeforeValidator(_null_is_nan)]


class Record(BaseModel):
    """A line of a run's files. Keys it does not know are passed over: a newer version may have written them."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")

    def line(self) -> str:
        """The record as one line of JSON, its newline included. Fields that are None are left out."""
        return self.model_dump_json(exclude_none=True) + "\n"


class StepRecord(Record):
    """One optimizer step, in `metrics.jsonl`."""

    step: int
    """Steps done, this one included."""
    samples: int
    """Sequences consumed since the start of the run."""
    tokens: int
    """Tokens consumed since the start of the run."""
    loss: Number
    """Mean cross-entropy of this step's tokens, in nats."""
    z_loss: Number | None = None
    """Mean log(Z)^2 times its weight; absent where it is off."""
    lr: Number
    grad_norm: Number
    """Global norm before clipping."""
    tokens_per_s: Number
    step_s: Number
    """Seconds this step took, without evaluation and saving."""
    mfu: Number | None = None
    """Fraction of the devices' peak; absent where the peak is not known."""
    time: float
    """Unix time at the end of the step."""
    attempt: int
    """1 for the first start, one more with each resume."""


class SourceLoss(Record):
    """The part of a validation that is one source's."""

    loss: Number
    """Mean cross-entropy in nats."""
    tokens: int
    """Tokens predicted."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)


class ValidationRecord(Record):
    """One validation after `step` steps, in `metrics.jsonl`."""

    step: int
    val_loss: Number
    """Mean cross-entropy in nats over all tokens predicted, whatever their source."""
    val_tokens: int
    """Tokens predicted."""
    by_source: dict[str, SourceLoss] = {}
    """The same for each source: the mean of these losses, weighted by their tokens, is `val_loss`. Empty in files of older versions."""
    time: float

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property (python/mypy#14461); pydantic asks for this order
    @property
    def val_perplexity(self) -> float:
        """exp(val_loss)."""
        return _exp(self.val_loss)


class Event(Record):
    """Something that happened, in `events.jsonl`: start, resume, settings, save, skip_checkpoint, skip_data, notice, stop,
    finish, sample, output_lost, logger_failed."""

    time: float
    """Unix time."""
    step: int | None = None
    """Steps done when it happened; absent where none is known yet."""
    kind: str
    text: str
    """One sentence for people; for a sample, what the model wrote."""
    prompt: str | None = None
    """sample: what the model was given."""
    parameters: int | None = None
    """start, resume: trainable parameters of the model."""
    device: str | None = None
    """start, resume: what it runs on."""
    mfu_statement: str | None = None
    """start, resume: what the MFU counts and divides by, or why there is none."""


@dataclass(frozen=True)
class Metrics:
    """All of a `metrics.jsonl`, in order of the steps, each step once: what was written last holds."""

    steps: list[StepRecord]
    validations: list[ValidationRecord]


R = TypeVar("R", bound=Record)


def read_metrics(path: Path) -> Metrics:
    """Read a `metrics.jsonl`; empty where there is none yet. UserError names a line that is no record."""
    steps: dict[int, StepRecord] = {}
    validations: dict[int, ValidationRecord] = {}
    for number, line in enumerate(whole_lines(path), 1):
        if '"val_loss"' in line:
            validation = _parse(ValidationRecord, line, path, number)
            validations[validation.step] = validation
        else:
            step = _parse(StepRecord, line, path, number)
            steps[step.step] = step
    return Metrics([steps[k] for k in sorted(steps)], [validations[k] for k in sorted(validations)])


def read_config(path: Path) -> RunConfig:
    """Read a `config.yaml`. UserError where it is missing, cut short or holds no settings, StorageError where it cannot be read now."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and "run" in tree and LAST_SECTION not in tree:
            raise UserError(
                f"{path} is cut short: it ends before its last section, {LAST_SECTION}. Restore it (the manifest.json of each "
                f"checkpoint holds the same settings under `config`), or choose another run.dir"
            )
        return RunConfig.model_validate(tree)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run directory: it holds no {path.name}") from None
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise UserError(
            f"{path} cannot be read as the settings of a run ({reason}); restore it, or choose another run.dir"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML; restore it, or choose another run.dir") from error
    except OSError as error:
        raise unreadable_error(path, error, "read") from error


def read_events(path: Path) -> list[Event]:
    """Read an `events.jsonl` in the order of writing; empty where there is none yet. UserError names a line that is no record."""
    return [_parse(Event, line, path, number) for number, line in enumerate(whole_lines(path), 1)]


def step_of_line(line: str, path: Path, number: int) -> int:
    """The `step` of a line, whatever else it holds. UserError names a line that has none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _no_record(path, number) from error


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that got their newline; what follows the last newline is a write cut short. Empty where there is no file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable_error(path, error, "read") from error


def _parse(kind: type[R], line: str, path: Path, number: int) -> R:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise _no_record(path, number) from error


def _no_record(path: Path, number: int) -> UserError:
    return UserError(f"{path}: line {number} is not a record of a run; restore the file or delete that line")
