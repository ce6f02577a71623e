"""The summary of a profile: time per operator, as JSON beside the trace."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import unreadable_error
from pretrain.errors import UserError


class OperatorTime(BaseModel):
    """Time of all calls of an operator or GPU kernel, in microseconds."""

    model_config = ConfigDict(frozen=True)

    name: str
    calls: int
    self_cpu_us: float
    """Without the operators that it calls."""
    cpu_us: float
    self_cuda_us: float
    """GPU time of the kernels that it launches itself; 0 without a GPU."""
    cuda_us: float


class ProfileSummary(BaseModel):
    """A profile of consecutive steps on rank 0."""

    model_config = ConfigDict(frozen=True)

    first_step: int
    last_step: int
    trace: str
    """Path of the Chrome trace, relative to the run directory."""
    table: str
    """Path of the operator table as text, relative to the run directory."""
    operators: list[OperatorTime]
    """Sorted by self time on the GPU, then on the CPU."""


def read_profile(path: Path) -> ProfileSummary:
    """Read a profile summary.

    Raises:
        UserError: it is missing or damaged.
        StorageError: it cannot be read now.
    """
    try:
        return ProfileSummary.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValidationError as error:
        raise UserError(f"{path} is not a profile summary; delete it, or profile again") from error
    except OSError as error:
        raise unreadable_error(path, error, "read") from error
