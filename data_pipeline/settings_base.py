"""What every section of settings is made of, and how their values are read. Pydantic only, as `data_pipeline.settings`."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from data_pipeline.errors import redact

T = TypeVar("T")
AUTO: Any = "auto"  # Any: it stands in for a value of every type until it is resolved

if TYPE_CHECKING:
    OrAuto = Annotated[T, "auto"]
else:
    OrAuto = Literal["auto"] | T
"""A field that may say `auto`. Type checkers see T: whoever resolves it leaves none behind."""


NONE_WORDS = ("none", "None", "NONE")
"""What people write for YAML's null."""


class Settings(BaseModel):
    """Unknown keys are errors, values are checked, numbers are finite, a loaded tree does not change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_none(cls, value: object, info: ValidationInfo) -> object:
        """Read `none` as null where a field takes null. `train.recompute=none` stays a word: that field does not."""
        takes_null = info.field_name is not None and NoneType in get_args(cls.model_fields[info.field_name].annotation)
        return None if takes_null and isinstance(value, str) and value in NONE_WORDS else value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `train.steps=true`: pydantic would read 1."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name is not None else None
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("truth_value", "is a truth value, which this setting does not take")
        return value


Address = Annotated[str, PlainSerializer(redact, return_type=str)]
"""Of files. It is written without its secrets: into config.yaml, manifests, reports, loggers and keys alike."""
