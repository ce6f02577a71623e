"""Every setting of the tree, wherever it stands: numbers are finite, `none` is null, text is text."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml

from data_pipeline.settings import MixtureStage, Settings, SourceConfig
from pretrain.config import RunConfig, SeqLenStageConfig, flatten
from pretrain.config.loading import load
from pretrain.config.saved import dump
from pretrain.errors import UserError

NEEDED: dict[type[Settings], dict[str, object]] = {
    SourceConfig: {"kind": "text"},
    SeqLenStageConfig: {"from": "50%", "seq_len": 4096},
    MixtureStage: {"from": "50%", "weights": {}},
}
"""What a section of a list must say besides the field at hand."""

EXAMPLES: dict[object, object] = {int: 1, float: 0.5, str: "a"}


def arms(annotation: Any) -> tuple[Any, ...]:
    """The types that a field takes, without marks."""
    if get_origin(annotation) is Annotated:
        return arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(arm for part in get_args(annotation) for arm in arms(part))
    return (annotation,)


def places(wanted: object, annotation: Any, value: object) -> Iterator[object]:
    """The plain trees for a field that hold `value` at one place where the field takes something of the type
    `wanted`."""
    for arm in arms(annotation):
        parts = get_args(arm)
        if arm == wanted:
            yield value
        elif get_origin(arm) is tuple and parts[-1] is Ellipsis:
            yield from ([tree] for tree in places(wanted, parts[0], value))
        elif get_origin(arm) is tuple:
            others = [EXAMPLES[arms(part)[0]] for part in parts]
            for i, part in enumerate(parts):
                yield from ([*others[:i], tree, *others[i + 1 :]] for tree in places(wanted, part, value))
        elif get_origin(arm) is dict:
            yield from ({"name": tree} for tree in places(wanted, parts[1], value))
        elif isinstance(arm, type) and issubclass(arm, Settings):
            yield from (tree for _, tree in trees(wanted, arm, value))


def trees(wanted: object, section: type[Settings], value: object) -> Iterator[tuple[str, dict[str, object]]]:
    """(name of the field, plain tree of the section) for every such place in a section and below it."""
    for name, field in section.model_fields.items():
        for tree in places(wanted, Annotated[(field.annotation, None)], value):
            yield name, {**NEEDED.get(section, {}), field.alias or name: tree}


def spelled(tree: object) -> str:
    return yaml.safe_dump(tree, default_flow_style=True, width=10_000)


SHOWN = {
    ".inf": "inf",
    "-.inf": "-inf",
    ".nan": "nan",
    "inf": "inf",
    "-Infinity": "-Infinity",
    "NaN": "NaN",
    "1e999": "1e999",
}
"""What is not finite, and how the refusal shows it."""

FLOATS = [spelled(tree) for _, tree in trees(float, RunConfig, "VALUE")]
OPTIONALS = [spelled(tree) for _, tree in trees(types.NoneType, RunConfig, "VALUE")]


def test_the_walks_find_all_there_is() -> None:
    """The numbers change with the tree; that they count something does not."""
    assert len(FLOATS) == len(set(FLOATS)) >= 40
    assert len(OPTIONALS) == len(set(OPTIONALS)) >= 15
    for known in (
        "{optim: {lr: VALUE}}",
        "{optim: {decay: VALUE}}",
        "{optim: {betas: [0.5, VALUE]}}",
        "{optim: {max_grad_norm: VALUE}}",
    ):
        assert known + "\n" in FLOATS
    assert "{data: {mixture: {stages: [{from: 50%, weights: {name: VALUE}}]}}}\n" in FLOATS
    assert "{data: {filters: {gopher_repetition: {top_n_grams: [[1, VALUE]]}}}}\n" in FLOATS
    for known in (
        "{optim: {max_grad_norm: VALUE}}",
        "{model: {preset: VALUE}}",
        "{data: {sources: [{filters: VALUE, kind: text}]}}",
    ):
        assert known + "\n" in OPTIONALS


@pytest.mark.parametrize("text", FLOATS, ids=str.strip)
def test_every_number_is_finite(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for value in SHOWN:
        path.write_text(text.replace("VALUE", value))
        with pytest.raises(
            UserError, match=rf"^[a-z][a-z_.0-9]*='?{SHOWN[value]}'?: input should be a finite number$"
        ) as refusal:
            load(path)
        assert "\n" not in str(refusal.value)


def at(tree: Any, text: str) -> object:
    """What a loaded tree holds where the text says VALUE."""
    said = yaml.safe_load(text)
    while said != "VALUE":
        if isinstance(said, list):
            ((i, said),) = ((i, inner) for i, inner in enumerate(said) if "VALUE" in str(inner))
            tree = tree[i]
        else:
            ((key, said),) = ((key, inner) for key, inner in said.items() if "VALUE" in str(inner))
            tree = tree[key] if isinstance(tree, dict) else getattr(tree, key)
    return tree


@pytest.mark.parametrize("text", OPTIONALS, ids=str.strip)
def test_none_is_null_for_every_setting_that_takes_null(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for value in ("none", "None", "NONE", "null", "Null", "~", "'none'", ""):
        path.write_text(text.replace("VALUE", value))
        assert at(load(path).config, text) is None
    section = yaml.safe_load(text)
    key, node = "", section
    while isinstance(node, dict) and len(node) == 1:  # down to the list or the field, as on a command line
        ((name, node),) = node.items()
        key = f"{key}.{name}".lstrip(".")
    for value in ("none", "None", "null", ""):
        assert (
            at(
                load(
                    None, [f"{key}={spelled(node).strip().removesuffix('...').strip()}".replace("VALUE", value)]
                ).config,
                text,
            )
            is None
        )


def test_none_stays_text_for_choices_and_for_settings_that_must_be_text() -> None:
    choices = [tree for _, tree in trees(Literal["none", "full", "selective"], RunConfig, "none")]
    assert choices == [{"train": {"recompute": "none"}}]
    assert load(None, ["train.recompute=none"]).config.train.recompute == "none"
    assert load(None, ["log.samples=[none]"]).config.log.samples == ("none",)
    with pytest.raises(UserError, match=r"optim\.lr='none': input should be a valid number"):
        load(None, ["optim.lr=none"])


def test_a_preset_that_is_none_takes_back_the_one_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {preset: tiny}")
    assert load(path).config.model.d_model == 64
    for arg in ("none", "null"):
        assert load(path, [f"model.preset={arg}"]).config.model.d_model == 768


@pytest.mark.parametrize(
    ("arg", "answer"),
    [
        ("optim.lr=1e30", "optim.lr='1e30': input should be less than or equal to 1000"),
        ("optim.lr=-3e-4", "optim.lr='-3e-4': input should be greater than 0"),
        ("optim.lr=0", "optim.lr=0: input should be greater than 0"),
        ("optim.betas=[1.0, 0.95]", "optim.betas=1.0: input should be less than 1"),
        ("optim.betas=[0.9, -0.1]", "optim.betas=-0.1: input should be greater than or equal to 0"),
        ("optim.eps=1e6", "optim.eps='1e6': input should be less than or equal to 1"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1: input should be greater than or equal to 0"),
        ("optim.decay=1.5", "optim.decay=1.5: input should be less than or equal to 1"),
        ("optim.max_grad_norm=0", "optim.max_grad_norm=0: input should be greater than 0"),
        ("train.z_loss=1e30", "train.z_loss='1e30': input should be less than or equal to 10"),
        ("train.micro_batch_size=0", "train.micro_batch_size=0: input should be greater than 0"),
        ("model.vocab_size=-5", "model.vocab_size=-5: input should be greater than 0"),
        ("model.head_dim=0", "model.head_dim=0: input should be greater than 0"),
        ("model.init_std=1e30", "model.init_std='1e30': input should be less than or equal to 100"),
        ("model.norm_eps=2.0", "model.norm_eps=2.0: input should be less than or equal to 1"),
        ("model.rope.theta=1.0", "model.rope.theta=1.0: input should be greater than 1"),
        ("model.rope.theta=1e30", "model.rope.theta='1e30': input should be less than or equal to 1000000000000"),
        (
            "run.seed=18446744073709551616",
            "run.seed=18446744073709551616: input should be less than 18446744073709551616",
        ),
        ("data.dedup.memory_mb=1e30", "data.dedup.memory_mb='1e30': input should be less than or equal to 1000000000"),
        ("train.steps=true", "train.steps=True: is a boolean, which this setting does not accept"),
        ("optim.lr=true", "optim.lr=True: is a boolean, which this setting does not accept"),
        ("train.steps=" + "9" * 5000, "train.steps: `999"),
        ("train.device=mps", "train.device='mps': input should be 'cpu' or 'cuda'"),
        ("train.device=cuda:99", "train.device='cuda:99': input should be 'cpu' or 'cuda'"),
        (
            "log.wandb_project=5",
            "log.wandb_project=5: should be text; quote it twice where it looks like a number, as in '\"5\"'",
        ),
        ("log.samples=[1.5]", "log.samples=1.5: should be text; quote it twice where it looks like a number"),
    ],
)
def test_senseless_values_are_refused_with_their_bound(arg: str, answer: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(None, [arg])
    assert str(refusal.value).startswith(answer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        ("optim.lr=1", 1.0),  # where somebody wants to see a run diverge
        ("optim.lr=0.02", 0.02),
        ("optim.betas=[0, 0.9999]", [0.0, 0.9999]),
        ("optim.eps=1", 1.0),
        ("optim.decay=0", 0.0),
        ("optim.max_grad_norm=1e30", 1e30),  # as good as none, and said by many
        ("model.rope.theta=5e8", 5e8),
        ("run.seed=-1", -1),
        ("run.seed=0xff", 255),
        ("train.steps=010", 10),
        ("train.steps=1_000", 1000),
        ("data.mixture.weights={a: 1e17}", {"a": 1e17}),
        ("data.mixture.max_epochs=1e6", 1e6),
        ("run.dir=2026-01-31", "2026-01-31"),  # a date, 750 and 7 to YAML 1.1
        ("run.dir=12:30", "12:30"),
        ("run.dir=007", "007"),
        ("run.dir=.", "."),
        ("run.dir=1e3", "1e3"),
        ("log.wandb_project='\"5\"'", "5"),
    ],
)
def test_unusual_values_are_accepted_as_written(arg: str, value: object) -> None:
    assert flatten(load(None, [arg.replace("'\"5\"'", '"5"')]).config)[arg.partition("=")[0]] == value


def test_the_config_of_a_run_reads_back_as_it_was(tmp_path: Path) -> None:
    config = load(
        None,
        [
            "run.dir=2026-01-31",
            "log.wandb_project=007",
            "optim.max_grad_norm=none",
            "optim.eps=1e-12",
            "data.path=12:30",
        ],
    ).config
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path).config == config
    assert math.isfinite(config.optim.eps)
