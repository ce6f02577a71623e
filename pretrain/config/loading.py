"""A YAML file plus `key=value` words -> a RunConfig, with the origin of every value. Reads files; imports no torch.

Layers, each winning over the one before: the defaults in `config.py`, the model of `run.init_from`, the model preset,
the file, the words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.errors import StorageError
from data_pipeline.settings import AUTO, SourceConfig
from data_pipeline.settings_base import NONE_WORDS
from pretrain.checkpoint.manifest import MANIFEST, read_manifest
from pretrain.config import RunConfig, RunSettings, walk
from pretrain.config.saved import read_config
from pretrain.errors import UserError

Tree = dict[str, Any]  # YAML, before pydantic has seen it

_SECTIONS = {key.rpartition(".")[0] for key, _ in walk()}
_PLAINER = {
    "path_type": "should be a path; quote it twice where it looks like a number, as in '\"5\"'",
    "model_type": "is a section; set what is in it, such as train.steps=100",
    "tuple_type": "should be a list, such as [a, b]",
    "string_type": "should be text; quote it twice where it looks like a number, as in '\"5\"'",
}
"""Complaints of pydantic that speak of Python, in the user's words."""


class _Loader(yaml.SafeLoader):
    """YAML as people read it, much as YAML 1.2 has it: `off`, `no` and `on` are words, not truth values, so that `log.wandb=off`
    says what it says; `2026-01-31`, `12:30` and `007` are text, not a date, 750 and octal."""


_OWN = {  # of PyYAML's; what is text here and belongs into a field that takes numbers, such as 1e-3 or 010, is read there
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|[-+]?\.[0-9][0-9_]*([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {*_OWN, "tag:yaml.org,2002:timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _OWN.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list(_first))


@dataclass(frozen=True)
class Loaded:
    """A validated config, and for each dotted key that was set the place that set it."""

    config: RunConfig
    origin: Mapping[str, str]


def load(source: str | Path | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read a config.

    Args:
        source: a YAML file, the name of a preset in `configs/` (without .yaml), or None for the defaults.
        overrides: words such as `train.steps=100`; the value is YAML.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, value out of range, missing or unreadable file.
    """
    file_tree = {} if source is None else _read_yaml(_find(str(source), "configs"))
    word_tree: Tree = {}
    for word in overrides:
        _put(word_tree, *_split(word))
    preset = _get("model", "preset", word_tree, file_tree)
    preset_tree: Tree = {} if preset is None else {"model": _read_yaml(_find(str(preset), "configs.models"))}
    parent = _get("run", "init_from", word_tree, file_tree)
    run_dir = _get("run", "dir", word_tree, file_tree) or RunSettings().dir
    parent_tree = _model_of_parent(None if parent is None else str(parent), Path(str(run_dir)))
    layers = [
        ("run.init_from", parent_tree),
        (f"preset {preset}", preset_tree),
        (str(source), file_tree),
        ("command line", word_tree),
    ]
    merged: Tree = {}
    origin: dict[str, str] = {}
    for name, tree in layers:
        for key, value in _leaves(tree):
            if value is None and key in _SECTIONS:  # `train:` with nothing, or only comments, below it
                continue
            if value == AUTO and origin.get(key) == "run.init_from":  # that run has decided it
                continue
            _put(merged, key, value)
            origin[key] = name
    return Loaded(validate(merged), origin)


def load_words(words: Sequence[str]) -> Loaded:
    """Read a command line: an optional config first, then `key=value` words."""
    if words and "=" not in words[0]:
        return load(words[0], words[1:])
    return load(None, words)


def validate(tree: Tree) -> RunConfig:
    """The typed config of a plain tree; UserError in one line otherwise."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def dump(config: RunConfig) -> str:
    """The whole config as YAML, in the order of `config.py`."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text


def presets(package: str = "configs") -> list[str]:
    """Names that `load` and `model.preset` find without a path."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in resources.files(package).iterdir() if entry.name.endswith(".yaml")
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
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # of bytes that are no UTF-8, of numbers of 5,000 digits
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}; a config is a tree of sections such as `train:`")
    return tree


def _split(word: str) -> tuple[str, object]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"`{word}` is not of the form key=value, such as train.steps=100")
    try:
        return key, yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError):
        raise UserError(f"{key}: `{text}` is not a YAML value; quote it") from None


def _put(tree: Tree, key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(f"{key}: `{section}` is a value, not a section")
    tree[last] = value


def _get(section: str, key: str, *trees: Tree) -> object:
    """The value of `section.key` in the first tree that sets it, if only to none; None where none does."""
    sections = (tree.get(section) for tree in trees)
    value = next((inner[key] for inner in sections if isinstance(inner, dict) and key in inner), None)
    return None if value in NONE_WORDS else value


def split_init_from(text: str) -> tuple[Path, int | None]:
    """`RUN@STEP` -> (RUN, STEP), and `RUN` -> (RUN, None). What follows a last @ is a step if it is a number."""
    run, at, step = text.rpartition("@")
    return (Path(run), int(step)) if at and step.isascii() and step.isdigit() else (Path(text), None)


def _model_of_parent(init_from: str | None, run_dir: Path) -> Tree:
    """The model of the run that `run.init_from` names, as a tree of settings; empty where the run began from none.

    A run that is there already has its own copy, and `run.init_from` need not be set again: the other run may be gone
    by the time that this one resumes.
    """
    try:
        own = _config_of_run(run_dir)
    except (UserError, StorageError, OSError):
        if init_from is not None:
            raise
        own = None  # `pretrain train` tells it; other commands do not need that run
    if own is not None and own.run.init_from is not None:
        return _model_tree(own)
    if init_from is None:
        return {}
    parent, _ = split_init_from(init_from)
    if (parent / MANIFEST).is_file():
        return {"model": read_manifest(parent).config["model"]}
    theirs = _config_of_run(parent)
    if theirs is None:
        raise UserError(
            f"run.init_from={init_from}: {parent} is neither a run directory with a config.yaml nor the folder of a "
            "checkpoint; write RUN or RUN@STEP, such as runs/default@1000"
        )
    return _model_tree(theirs)


def _config_of_run(run_dir: Path) -> RunConfig | None:
    """What the config.yaml of a run directory says; None where there is none."""
    file = run_dir / "config.yaml"
    return read_config(file) if file.is_file() else None


def _model_tree(config: RunConfig) -> Tree:
    return {"model": config.model.model_dump(mode="json")}


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _one_line(error: ValidationError) -> str:
    """The first complaint, in the user's words; how many others there are."""
    complaints: dict[str, str] = {}
    told = [
        item for item in error.errors() if item["type"] != "default_factory_not_called"
    ]  # follows from another error
    for item in sorted(told, key=lambda item: item["type"] != "extra_forbidden"):  # a typo explains what is missing
        key = _key(item["loc"])
        if item["type"] == "extra_forbidden":
            complaints[key] = f"{key} is not a setting; {_did_you_mean(key)}"
        elif item["type"] == "value_error":
            complaints[key] = item["msg"].removeprefix("Value error, ")
        else:
            message = _PLAINER.get(item["type"], item["msg"])
            complaints[key] = f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"
    first, *others = complaints.values()
    return first + (f" (and {len(others)} more)" if others else "")


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key that a complaint is about.

    `key.literal['auto']` and `key.int` are two complaints about one key: pydantic names the type that it tried behind the key.
    """
    parts = [str(part) for part in location if "[" not in str(part)]
    return ".".join(parts[:-1] if ".".join(parts[:-1]) in dict(walk()) else parts)


def _did_you_mean(key: str) -> str:
    source = re.match(r"data\.(sources|validation)\.\d+\.", key)
    keys = [source[0] + name for name in SourceConfig.model_fields] if source else [known for known, _ in walk()]
    names = [*keys, *sorted(_SECTIONS)]
    elsewhere = [
        known for known in names if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]  # right, in the wrong section
    near = elsewhere or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    section = key.rpartition(".")[0]
    siblings = sorted(
        {known.split(".")[0] for known in keys} if not section else {k for k in keys if k.startswith(f"{section}.")}
    )
    return f"known are {', '.join(siblings)}" if siblings else "`pretrain config show` lists all"
