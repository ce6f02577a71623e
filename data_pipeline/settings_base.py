"""The base class of all settings, and how their values are read.

Imports only pydantic, like `data_pipeline.settings`.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from data_pipeline.errors import redact

T = TypeVar("T")
AUTO: Any = "auto"  # Any: a placeholder for a value of any type until it is resolved

if TYPE_CHECKING:
    OrAuto = Annotated[T, "auto"]
else:
    OrAuto = Literal["auto"] | T
"""The type of a field that accepts `auto`. Type checkers see T, because resolving the settings replaces every
`auto`."""


NONE_WORDS = ("none", "None", "NONE")
"""Spellings accepted for YAML's null."""


class Settings(BaseModel):
    """Base class of settings. Unknown keys are errors, numbers must be finite, and instances are frozen."""

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
        """Read `none` as null if the field accepts null.

        It stays a string in others, such as `train.recompute=none`.
        """
        takes_null = info.field_name is not None and NoneType in get_args(cls.model_fields[info.field_name].annotation)
        return None if takes_null and isinstance(value, str) and value in NONE_WORDS else value

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_for_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `train.steps=true`, which pydantic would read as 1."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name is not None else None
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("truth_value", "is a boolean, which this setting does not accept")
        return value


Address = Annotated[str, PlainSerializer(redact, return_type=str)]
"""An address of files. It is serialized without its secrets: in config.yaml, manifests, reports, loggers and keys."""
