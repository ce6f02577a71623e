"""Configs as runs and checkpoints keep them: `config.yaml`, and the model of the run that `run.init_from` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.errors import StorageError, unreadable_error
from pretrain.checked_json import MANIFEST, read_checked_json
from pretrain.config.error_messages import describe_error
from pretrain.config.tree import RunConfig
from pretrain.errors import UserError

CONFIG_FILE = "config.yaml"

LAST_SECTION = "log"
"""A `config.yaml` holds all sections in one order. If this one is missing, the end of the file is missing."""


def dump(config: RunConfig) -> str:
    """The whole config as YAML, in the order of `RunConfig`."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text


def read_config(path: Path) -> RunConfig:
    """Read a `config.yaml`.

    Raises:
        UserError: it is missing, cut short, or holds no settings of a run.
        StorageError: it cannot be read now.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and "run" in tree and LAST_SECTION not in tree:
            raise UserError(
                f"{path} is cut short: it ends before its last section, {LAST_SECTION}. Restore it (the manifest.json "
                f"of each checkpoint holds the same settings under `config`), or choose another run.dir"
            )
        return RunConfig.model_validate(tree)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run directory: it holds no {path.name}") from None
    except ValidationError as error:
        raise UserError(
            f"{path} cannot be read as the settings of a run ({describe_error(error)}); restore it, or choose another "
            f"run.dir"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML; restore it, or choose another run.dir") from error
    except OSError as error:
        raise unreadable_error(path, error, "read") from error


def split_init_from(text: str) -> tuple[Path, int | None]:
    """`RUN@STEP` -> (RUN, STEP), and `RUN` -> (RUN, None). What follows the last @ is a step if it is a number."""
    run, at, step = text.rpartition("@")
    return (Path(run), int(step)) if at and step.isascii() and step.isdigit() else (Path(text), None)


def read_parent_model(init_from: str | None, run_dir: Path) -> dict[str, Any]:
    """The `model` section of the run that `run.init_from` names, as a tree of settings; empty if it names none.

    A run that exists already has its own copy, and `run.init_from` need not be set again: the other run may be gone by
    the time that this one resumes.

    Raises:
        UserError, StorageError: there is no such run or checkpoint, or it cannot be read.
    """
    try:
        own = read_config_if_present(run_dir)
    except (UserError, StorageError, OSError):
        if init_from is not None:
            raise
        own = None  # `pretrain train` reports it; other commands do not need that run
    if own is not None and own.run.init_from is not None:
        return {"model": own.model.model_dump(mode="json")}
    if init_from is None:
        return {}
    parent, _ = split_init_from(init_from)
    if (parent / MANIFEST).is_file():
        return {"model": _model_of_checkpoint(parent / MANIFEST)}
    theirs = read_config_if_present(parent)
    if theirs is None:
        raise UserError(
            f"run.init_from={init_from}: {parent} is neither a run directory with a config.yaml nor the folder of a "
            "checkpoint; write RUN or RUN@STEP, such as runs/default@1000"
        )
    return {"model": theirs.model.model_dump(mode="json")}


def read_config_if_present(run_dir: Path) -> RunConfig | None:
    """The config.yaml of a run directory; None if there is none. Raises as `read_config`."""
    file = run_dir / CONFIG_FILE
    return read_config(file) if file.is_file() else None


def _model_of_checkpoint(manifest: Path) -> object:
    """The `model` section in the manifest of a checkpoint."""
    try:
        config = read_checked_json(manifest).get("config")
    except FileNotFoundError:  # deleted since `read_parent_model` saw it
        raise UserError(f"{manifest} does not exist any more; name another checkpoint in run.init_from") from None
    if not isinstance(config, Mapping) or "model" not in config:
        raise UserError(f"{manifest} is not the manifest of a checkpoint: it holds no settings of a model")
    model: object = config["model"]
    return model
