"""A YAML file and `key=value` arguments -> a RunConfig, with the origin of every value.

Layers, each winning over the one before: the defaults, the model of `run.init_from`, the model preset, the file, the
arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.settings import AUTO
from data_pipeline.settings_base import NONE_WORDS
from pretrain.config.error_messages import SECTIONS, describe_error
from pretrain.config.model import MoeConfig
from pretrain.config.renamed import rename_settings
from pretrain.config.run import RunSettings
from pretrain.config.saved import read_parent_model
from pretrain.config.tree import RunConfig, flatten
from pretrain.errors import UserError

Tree = dict[str, Any]  # YAML, before pydantic has seen it


class _Loader(yaml.SafeLoader):
    """YAML as people read it, close to YAML 1.2: `off`, `no` and `on` are text, so that `log.wandb=off` works.

    `2026-01-31`, `12:30` and `007` are text too, not a date, 750 and an octal number.
    """


_SCALARS = {  # tag: (pattern, first characters); text such as 1e-3 or 010 becomes a number if its field takes numbers
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|[-+]?\.[0-9][0-9_]*([eE][-+][0-9]+)?|"
        r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
"""Our own patterns in place of PyYAML's."""

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {*_SCALARS, "tag:yaml.org,2002:timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list(_first))


@dataclass(frozen=True)
class Loaded:
    """A validated config, and where each setting that is not a default comes from, by its dotted key."""

    config: RunConfig
    origin: Mapping[str, str]


def load(source: str | Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a config.

    Args:
        source: a YAML file, the name of a preset in `configs/` (without .yaml), or None for the defaults.
        overrides: arguments such as `train.steps=100`; the value is YAML.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, value out of range, missing or unreadable file.
    """
    file_tree = {} if source is None else _rename(_read_yaml(_find(str(source), "configs")))
    argument_tree = parse_arguments(overrides)
    preset = _get("model", "preset", argument_tree, file_tree)
    preset_tree: Tree = {} if preset is None else {"model": _read_yaml(_find(str(preset), "configs.models"))}
    parent = _get("run", "init_from", argument_tree, file_tree)
    run_dir = _get("run", "dir", argument_tree, file_tree) or RunSettings().dir
    parent_tree = read_parent_model(None if parent is None else str(parent), Path(str(run_dir)))
    layers = [
        ("run.init_from", parent_tree),
        (f"preset {preset}", preset_tree),
        (str(source), file_tree),
        ("command line", argument_tree),
    ]
    merged: Tree = {}
    origin: dict[str, str] = {}
    for name, tree in layers:
        for key, value in _leaves(tree):
            if value is None and key in SECTIONS:  # `train:` with nothing, or only comments, below it
                continue
            if value == AUTO and origin.get(key) == "run.init_from":  # that run has decided it
                continue
            _put(merged, key, value)
            origin[key] = name
    config = validate(merged)
    _refuse_unread(config, {key for key, name in origin.items() if name in (str(source), "command line")})
    return Loaded(config, origin)


def parse_arguments(arguments: Sequence[str]) -> Tree:
    """`key=value` arguments as a tree. UserError if one is not of that form."""
    tree: Tree = {}
    for argument in arguments:
        _put(tree, *_split(argument))
    return _rename(tree)


def load_args(args: Sequence[str]) -> Loaded:
    """Read the arguments of a command: an optional config first, then `key=value` arguments."""
    if args and "=" not in args[0]:
        return load(args[0], args[1:])
    return load(None, args)


def validate(tree: Tree) -> RunConfig:
    """The typed config of a plain tree; UserError in one line otherwise."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(describe_error(error)) from None


def presets(package: str = "configs") -> list[str]:
    """Names that `load` and `model.preset` find without a path."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in resources.files(package).iterdir() if entry.name.endswith(".yaml")
    )


def _refuse_unread(config: RunConfig, keys: set[str]) -> None:
    """Raise UserError for a setting that the user gave and that has no effect here."""
    values, section = flatten(config), "model.moe."
    for name, field in MoeConfig.model_fields.items():
        needed, value = config.model.moe.unread_without(name), values[section + name]
        # A width may be that of a saved config.yaml, where `auto` is resolved for dense models too.
        if needed and section + name in keys and value != field.default and name != "d_ff":
            raise UserError(
                f"{section}{name}={yaml.safe_dump(value).split()[0]} has no effect without {needed}; set that too, or "
                f"leave {section}{name} out"
            )


def _find(name: str, package: str) -> Path:
    """The file of that path, or the preset of that name in a package of YAML files."""
    path = Path(name)
    if path.is_file():
        return path
    known = presets(package)
    if name in known:
        return Path(str(resources.files(package) / f"{name}.yaml"))
    raise UserError(f"{name}: no such file, and no preset of that name; presets are {', '.join(known)}")


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or 5,000 digits
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}; a config is a tree of sections such as `train:`")
    return tree


def _rename(tree: Tree) -> Tree:
    """Give each setting of a layer its new name, so that a later layer overrides it by either name.

    YAML files may also use dotted keys (`optim.lr: 1`), which become sections first.
    """
    nested: Tree = {}
    for key, value in _leaves(tree):
        _put(nested, key, value)
    try:
        return rename_settings(nested)
    except ValueError as error:
        raise UserError(str(error)) from None


def _split(argument: str) -> tuple[str, object]:
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise UserError(f"`{argument}` is not of the form key=value, such as train.steps=100")
    try:
        return key, yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError):
        raise UserError(f"{key}: `{text}` is not a YAML value; quote it") from None


def _put(tree: Tree, key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:  # also an optional section that a config.yaml sets to null
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"{key}: `{section}` is a value, not a section")
    tree[last] = value


def _get(section: str, key: str, *trees: Tree) -> object:
    """The value of `section.key` in the first tree that sets it, if only to none; None where none does."""
    sections = (tree.get(section) for tree in trees)
    value = next((inner[key] for inner in sections if isinstance(inner, dict) and key in inner), None)
    return None if value in NONE_WORDS else value


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value
