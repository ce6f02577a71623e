"""What pydantic says about a config, in one line and in the user's words."""

from __future__ import annotations

import difflib
import re
from types import NoneType
from typing import get_args

from pydantic import ValidationError

from data_pipeline.settings import Settings, SourceConfig
from pretrain.config.tree import walk

SECTIONS = {key.rpartition(".")[0] for key, _ in walk()}
"""Keys that hold other keys: `data`, `data.mixture`, ..."""

OPTIONAL_SECTIONS = {
    key: [f"{key}.{setting.alias or name}" for name, setting in section.model_fields.items()]
    for key, field in walk()
    for section in get_args(field.annotation)
    if NoneType in get_args(field.annotation) and isinstance(section, type) and issubclass(section, Settings)
}
"""Sections that may be none, such as `train.profile`, with the keys in them."""

PLAIN_MESSAGES = {
    "path_type": "should be a path; quote it twice where it looks like a number, as in '\"5\"'",
    "model_type": "is a section; set what is in it, such as train.steps=100",
    "tuple_type": "should be a list, such as [a, b]",
    "string_type": "should be text; quote it twice where it looks like a number, as in '\"5\"'",
}
"""Messages for the error types of which pydantic speaks in terms of Python."""


def describe_error(error: ValidationError) -> str:
    """The first error in one line, and how many others there are."""
    messages: dict[str, str] = {}
    # A default that another error prevented is not an error of its own. Unknown keys come first: a typo explains what
    # is missing.
    errors = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
    for item in sorted(errors, key=lambda item: item["type"] != "extra_forbidden"):
        key = _key(item["loc"])
        if item["type"] == "extra_forbidden":
            messages[key] = f"{key} is not a setting; {_did_you_mean(key)}"
        elif item["type"] == "value_error":
            messages[key] = item["msg"].removeprefix("Value error, ")
        else:
            message = PLAIN_MESSAGES.get(item["type"], item["msg"])
            messages[key] = f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"
    first, *others = messages.values()
    return first + (f" (and {len(others)} more)" if others else "")


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key that an error is about.

    pydantic reports `key.literal['auto']` and `key.int` for one key: the types that it tried.
    """
    parts = [str(part) for part in location if "[" not in str(part)]
    parent = ".".join(parts[:-1])
    is_type = parent in dict(walk()) and parent not in OPTIONAL_SECTIONS
    return parent if is_type else ".".join(parts)


def _did_you_mean(key: str) -> str:
    """The nearest known key, or those of the section."""
    source = re.match(r"data\.(sources|validation)\.\d+\.", key)
    keys = [source[0] + name for name in SourceConfig.model_fields] if source else [known for known, _ in walk()]
    keys += [name for section, names in OPTIONAL_SECTIONS.items() if key.startswith(f"{section}.") for name in names]
    names = [*keys, *sorted(SECTIONS)]
    in_other_section = [known for known in names if known.rpartition(".")[2] == key.rpartition(".")[2]]
    near = in_other_section or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    section = key.rpartition(".")[0]
    siblings = sorted(
        {known.split(".")[0] for known in keys} if not section else {k for k in keys if k.startswith(f"{section}.")}
    )
    return f"known are {', '.join(siblings)}" if siblings else "`pretrain config show` lists all"
