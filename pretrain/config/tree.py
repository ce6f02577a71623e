"""The whole tree of settings: its keys, the differences between two, and which settings may change on resume."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import model_validator
from pydantic.fields import FieldInfo

from data_pipeline.settings import PrepareConfig, Settings
from pretrain.config.data import DataConfig
from pretrain.config.model import ModelConfig
from pretrain.config.optim import OptimConfig
from pretrain.config.parallel import ParallelConfig
from pretrain.config.renamed import rename_settings
from pretrain.config.resume import MayChange, MayChangeAhead
from pretrain.config.run import CheckpointConfig, LogConfig, RunSettings
from pretrain.config.train import EvalConfig, TrainConfig

MAX_CHARACTERS = 80
"""Longer values are cut in the description of a difference."""

ABSENT = object()

OnResume = Literal["may", "ahead", "never"]
"""Whether a setting may differ on resume: `may` (MayChange), `ahead` (MayChangeAhead), or `never`."""


class RunConfig(Settings):
    """All settings of a run. `run/config.yaml` holds them in full and reproduces the run."""

    run: RunSettings = RunSettings()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: Annotated[ParallelConfig, MayChange()] = ParallelConfig()
    eval: Annotated[EvalConfig, MayChange()] = EvalConfig()
    checkpoint: Annotated[CheckpointConfig, MayChange()] = CheckpointConfig()
    log: Annotated[LogConfig, MayChange()] = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, tree: object) -> object:
        """Accept the settings of earlier versions."""
        return rename_settings(tree) if isinstance(tree, Mapping) else tree


def walk(model: type[Settings] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of the tree with its dotted key, in the order of the sections."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from walk(field.annotation, f"{key}.")
        else:
            yield key, field


def flatten(settings: Settings) -> dict[str, object]:
    """{"model.n_layers": 12, ...}: every setting by its dotted key, as plain YAML values."""
    tree = settings.model_dump(mode="json")
    flat: dict[str, object] = {}
    for key, _ in walk(type(settings)):
        node: object = tree
        for part in key.split("."):
            assert isinstance(node, dict)
            node = node[part]
        flat[key] = node
    return flat


def is_prepare_key(key: str) -> bool:
    """Whether only `pretrain data prepare` reads a setting; training reads one of them, `data.tokenizer`."""
    section, _, name = key.partition(".")
    return section == "data" and name.split(".")[0] in PrepareConfig.model_fields


def on_resume() -> dict[str, OnResume]:
    """Whether each setting, by its dotted key, may differ on resume.

    A mark on a section holds for everything in it. Settings that prepare data may always differ.
    """

    def classify(model: type[Settings], prefix: str, inherited: bool) -> Iterator[tuple[str, OnResume]]:
        for name, field in model.model_fields.items():
            key = f"{prefix}{name}"
            may = inherited or is_prepare_key(key) or any(isinstance(mark, MayChange) for mark in field.metadata)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from classify(field.annotation, f"{key}.", may)
            elif may:
                yield key, "may"
            else:
                yield key, "ahead" if any(isinstance(mark, MayChangeAhead) for mark in field.metadata) else "never"

    return dict(classify(RunConfig, "", inherited=False))


def differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """{key: "key: 1 in the run, 2 now"} of the settings that differ."""
    flat_before, flat_now = flatten(before), flatten(now)

    def show(flat: dict[str, object], key: str) -> str:
        value = flat.get(key, ABSENT)
        return "not set" if value is ABSENT else textwrap.shorten(str(value), MAX_CHARACTERS, placeholder=" ...")

    return {
        key: f"{key}: {show(flat_before, key)} in the run, {show(flat_now, key)} now"
        for key in flat_before | flat_now
        if flat_before.get(key, ABSENT) != flat_now.get(key, ABSENT)
    }
