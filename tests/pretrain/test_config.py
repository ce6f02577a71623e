"""The tree of settings: layers, where each value comes from, what is understood and refused, and the round trip to the
disk."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from data_pipeline.settings import Settings
from pretrain.config import AUTO, RunConfig, flatten, is_prepare_key, on_resume, walk
from pretrain.config.loading import load, load_args, presets, validate
from pretrain.config.model import WEIGHT_SETTINGS
from pretrain.config.saved import dump, read_config
from pretrain.errors import UserError

CONFIGS = Path(configs.__file__).parent


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_arguments_win_over_the_file_over_the_preset_over_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "my.yaml", "model: {preset: tiny, d_ff: 100}\ntrain: {steps: 7, batch_size: 3}\n")
    loaded = load(file, ["train.steps=9", "model.n_layers=5"])
    config = loaded.config
    assert (config.train.steps, config.model.n_layers) == (9, 5)  # arguments
    assert (config.train.batch_size, config.model.d_ff) == (3, 100)  # file
    assert (config.model.d_model, config.model.tie_embeddings) == (64, True)  # preset
    assert (config.optim.lr, config.model.norm_eps) == (3e-4, 1e-5)  # defaults
    assert loaded.origin == {
        "model.n_heads": "preset tiny",
        "model.n_kv_heads": "preset tiny",
        "model.max_seq_len": "preset tiny",
        "model.tie_embeddings": "preset tiny",
        "model.d_model": "preset tiny",
        "model.d_ff": str(file),
        "model.preset": str(file),
        "train.batch_size": str(file),
        "model.n_layers": "command line",
        "train.steps": "command line",
    }


def test_a_preset_named_by_an_argument_wins_over_the_one_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "my.yaml", "model: {preset: tiny}")
    assert load(file, ["model.preset=1b"]).config.model.d_model == 2048
    assert load(file).config.model.d_model == 64


def test_later_arguments_win_and_the_first_may_be_a_config() -> None:
    assert load_args(["train.steps=1", "train.steps=2"]).config.train.steps == 2
    assert load_args(["demo", "train.steps=2"]).config.data.vocab_size == 4096
    assert load_args([]).config == RunConfig()


def test_a_file_of_your_own_may_be_a_model_preset(tmp_path: Path) -> None:
    file = write(tmp_path / "shape.yaml", "n_layers: 3")
    assert load(None, [f"model.preset={file}"]).config.model.n_layers == 3


@pytest.mark.parametrize("text", ["", "train:", "# train:\n#   steps: 5", "train:\n  # steps: 5\n", "train: {}"])
def test_an_empty_section_sets_nothing(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path / "my.yaml", text), ["train.batch_size=5"]).config.train.steps == 1000


@pytest.mark.parametrize(
    ("arg", "key", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("train.steps=10_000", "train.steps", 10_000),
        ("log.wandb=off", "log.wandb", "off"),
        ("train.compile=off", "train.compile", False),
        ("train.compile=true", "train.compile", True),
        ("optim.max_grad_norm=null", "optim.max_grad_norm", None),
        ("optim.betas=[0.8, 0.99]", "optim.betas", [0.8, 0.99]),
        ("log.samples=['a = b', 'no']", "log.samples", ["a = b", "no"]),
        ("log.samples=[no, off]", "log.samples", ["no", "off"]),
        ("run.dir=runs/a=b", "run.dir", "runs/a=b"),
        ("model.rope={kind: yarn, factor: 4}", "model.rope.factor", 4.0),
        ("model.rope.kind=llama3", "model.rope.kind", "llama3"),
    ],
)
def test_values_mean_what_they_say(arg: str, key: str, value: object) -> None:
    assert flatten(load(None, [arg]).config)[key] == value


OLD_NAMES = {
    "data.growth=[{from: 50%, seq_len: 4096}]": "data.seq_len_schedule",
    "optim.clip=2.5": "optim.max_grad_norm",
    "checkpoint.on_loss=go_back": "checkpoint.on_invalid",
}


@pytest.mark.parametrize(("arg", "new"), OLD_NAMES.items())
def test_a_renamed_setting_loads_by_its_old_name(tmp_path: Path, arg: str, new: str) -> None:
    old, value = arg.split("=", 1)
    section, name = old.split(".")
    file = write(tmp_path / "my.yaml", f"{section}:\n  {name}: {value}\n")
    expected = flatten(load(None, [f"{new}={value}"]).config)
    assert expected[new] != flatten(RunConfig())[new]
    assert flatten(load(None, [arg]).config) == flatten(load(file).config) == expected
    assert load(file).origin == {new: str(file)}
    assert f"  {new.split('.')[1]}:" in dump(load(file).config)
    assert old not in dict(walk())


@pytest.mark.parametrize("arg", OLD_NAMES)
def test_a_dotted_key_in_a_file_is_a_setting_like_any_other(tmp_path: Path, arg: str) -> None:
    old, value = arg.split("=", 1)
    new = OLD_NAMES[arg]
    file = write(tmp_path / "dotted.yaml", f"{old}: {value}\ntrain.steps: 7\n")
    assert load(file).config == load(None, [arg, "train.steps=7"]).config
    assert load(file).origin == {new: str(file), "train.steps": str(file)}
    default = json.dumps(flatten(RunConfig())[new])
    for argument in (f"{old}={default}", f"{new}={default}"):
        assert flatten(load(file, [argument]).config)[new] == flatten(RunConfig())[new]


def test_a_part_of_an_optional_section_can_be_set_over_a_saved_config(tmp_path: Path) -> None:
    """A run's config.yaml says `profile: null`."""
    file = write(tmp_path / "config.yaml", dump(RunConfig()))
    profile = load(file, ["train.profile.from=5", "train.profile.steps=2"]).config.train.profile
    assert profile is not None
    assert (profile.start, profile.steps) == (5, 2)


@pytest.mark.parametrize("arg", OLD_NAMES)
def test_a_later_layer_overrides_a_renamed_setting_by_either_name(tmp_path: Path, arg: str) -> None:
    old, value = arg.split("=", 1)
    new = OLD_NAMES[arg]
    section, name = old.split(".")
    default = json.dumps(flatten(RunConfig())[new])
    by_old = write(tmp_path / "old.yaml", f"{section}:\n  {name}: {value}\n")
    by_new = write(tmp_path / "new.yaml", f"{section}:\n  {new.split('.')[1]}: {value}\n")
    assert load(by_old, [f"{new}={default}"]).config == load(by_new, [f"{old}={default}"]).config == RunConfig()


@pytest.mark.parametrize("arg", OLD_NAMES)
def test_a_setting_under_both_names_is_refused_in_one_line(tmp_path: Path, arg: str) -> None:
    old, value = arg.split("=", 1)
    new = OLD_NAMES[arg]
    answer = f"{old} is the old name of {new}, and both are set; remove {old}"
    section, name = old.split(".")
    file = write(tmp_path / "my.yaml", f"{section}:\n  {name}: {value}\n  {new.split('.')[1]}: {value}\n")
    for arguments in ((None, [arg, f"{new}={value}"]), (file,)):
        with pytest.raises(UserError) as refusal:
            load(*arguments)
        assert str(refusal.value) == answer
    with pytest.raises(UserError, match=re.escape(f"cannot be read as the settings of a run ({answer})")):
        read_config(file)


@pytest.mark.parametrize(
    ("arg", "answer"),
    [
        ("train.stesp=1", "train.stesp is not a setting; did you mean train.steps?"),
        ("steps=1", "steps is not a setting; did you mean train.steps?"),
        ("optim.seed=1", "optim.seed is not a setting; did you mean run.seed?"),
        ("log.every=1", "log.every is not a setting; did you mean eval.every or checkpoint.every?"),
        ("rope.kind=yarn", "rope is not a setting; did you mean model.rope?"),
        ("optimizer.lr=1", "optimizer is not a setting; did you mean optim?"),
        ("model.rop.theta=1", "model.rop is not a setting; did you mean model.rope?"),
        (
            "data.sources=[{kind: text, file: x}]",
            "data.sources.0.file is not a setting; did you mean data.sources.0.filters?",
        ),
        ("eval.qqqqqq=1", "eval.qqqqqq is not a setting; known are eval.batches, eval.every"),
        (
            "qqqqqq=1",
            "qqqqqq is not a setting; known are checkpoint, data, eval, log, model, optim, parallel, run, train",
        ),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest_known_one(arg: str, answer: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(None, [arg])
    assert str(refusal.value) == answer


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (["train.steps=1.5"], "train.steps=1.5: input should be a valid integer, got a number with a fractional part"),
        (["train.precision=fp8"], "train.precision='fp8': input should be 'bf16' or 'fp32'"),
        (["data.path=5"], "data.path=5: should be a path; quote it twice where it looks like a number, as in '\"5\"'"),
        (["log.samples=abc"], "log.samples='abc': should be a list, such as [a, b]"),
        (
            ["train.steps=0", "optim.lr=x"],
            "optim.lr='x': input should be a valid number, unable to parse string as a number (and 1 more)",
        ),
        (
            ["model.d_model=100", "model.n_heads=12", "model.n_kv_heads=4"],
            "model.d_model=100 is not divisible by model.n_heads=12; set model.head_dim",
        ),
        (["model.head_dim=7"], "model.head_dim=7 is odd; RoPE rotates pairs, use an even width"),
        (
            ["model.head_dim=2", "model.rope.kind=ntk"],
            "model.head_dim=2 is a single pair, which model.rope.kind=ntk cannot stretch; use at",
        ),
        (
            ["model.head_dim=2", "model.rope.kind=dynamic_ntk"],
            "model.head_dim=2 is a single pair, which model.rope.kind=dynamic_ntk",
        ),
        (["model.rope.low_freq_factor=0"], "model.rope.low_freq_factor=0: input should be greater than 0"),
        (
            ["model.rope.high_freq_factor=1"],
            "model.rope.high_freq_factor=1.0 must be greater than model.rope.low_freq_factor=1.0; swap them or change "
            "one",
        ),
        (["model.rope.beta_slow=40"], "model.rope.beta_fast=32.0 must be greater than model.rope.beta_slow=40.0; swap"),
    ],
)
def test_wrong_values_are_refused_with_key_and_value(args: list[str], answer: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(None, args)
    assert str(refusal.value).startswith(answer)
    assert "\n" not in str(refusal.value)


def test_auto_is_a_value_of_the_fields_that_say_so_and_of_no_other() -> None:
    autos = {key for key, value in flatten(RunConfig()).items() if value == AUTO}
    assert autos == {
        "model.vocab_size",
        "data.tokenizer",
        "optim.warmup",
        "optim.decay",
        *(f"train.{name}" for name in ("micro_batch_size", "device", "precision", "compile", "attention")),
        *(f"parallel.{name}" for name in ("shard", "zero", "sequence", "stages_per_rank")),
    }
    for key, field in walk():
        if key in autos:
            assert "auto" in (field.description or "")
    with pytest.raises(UserError, match=r"train\.steps='auto'"):
        load(None, ["train.steps=auto"])


def test_auto_head_dim_is_the_width_over_the_heads_whatever_the_preset() -> None:
    assert load(None, ["model.d_model=96", "model.n_heads=6", "model.n_kv_heads=2"]).config.model.head_dim == 16
    assert load(None, ["model.preset=tiny", "model.n_heads=8"]).config.model.head_dim == 8


def test_a_config_written_to_the_disk_reads_back_equal(tmp_path: Path) -> None:
    samples, sources = (
        "log.samples=['no', '1', \"x\\n y: [z]\"]",
        "data.sources=[{kind: jsonl, paths: ['é.jsonl', '5']}]",
    )
    config = load("demo", ["log.wandb=off", "run.dir=a b", samples, sources]).config
    file = write(tmp_path / "config.yaml", dump(config))
    again = load(file)
    assert again.config == config
    assert dump(again.config) == dump(config)
    assert set(again.origin) == set(flatten(config))  # in full: a later default changes nothing
    assert yaml.safe_load(file.read_text()) == config.model_dump(mode="json")


def test_every_setting_says_whether_it_may_differ_on_resume() -> None:
    """A new setting needs a decision: it fails here until it is in one of the three lists, or in a section that is."""
    keys = {key for key, _ in walk()}
    may = {
        *("run.dir", "model.preset", "model.max_seq_len", "model.moe.bias_update_rate"),
        *(f"data.{name}" for name in ("path", "seq_len_schedule", "window", "on_damage")),
        *(key for key in keys if is_prepare_key(key) or key.startswith("data.mixture.")),
        *(f"train.{name}" for name in ("batch_size", "micro_batch_size", "device", "compile", "attention")),
        *(f"train.{name}" for name in ("recompute", "recompute_every", "recompute_keep", "profile")),
        *(key for key in keys if key.startswith(("parallel.", "eval.", "checkpoint.", "log."))),
    }
    ahead = {
        *(f"optim.{name}" for name in ("lr", "schedule", "warmup", "decay", "decay_shape", "min_lr_ratio")),
        *(f"train.{name}" for name in ("steps", "batch_ramp_steps", "batch_ramp_start")),
    }
    never = {
        *(f"run.{name}" for name in ("seed", "init_from", "init_mode", "ancestry")),
        *(f"model.{name}" for name in WEIGHT_SETTINGS),
        *(f"model.{name}" for name in ("norm_eps", "sliding_window", "document_mask", "init_std")),
        *(key for key in keys if key.startswith(("model.rope.", "model.moe.")) and key != "model.moe.bias_update_rate"),
        *("data.seq_len", "data.packing"),
        *(f"optim.{name}" for name in ("kind", "betas", "eps", "weight_decay", "muon_momentum", "max_grad_norm")),
        *("train.z_loss", "train.precision"),
    }
    assert {"data.sources", "data.tokenizer", "data.filters.apply", "data.validation_fraction"} <= may
    found = on_resume()
    assert {key for key, rule in found.items() if rule == "may"} == may
    assert {key for key, rule in found.items() if rule == "ahead"} == ahead
    assert {key for key, rule in found.items() if rule == "never"} == never
    assert may | ahead | never == keys


def test_every_field_of_the_model_is_one_that_weights_are_made_for_or_not() -> None:
    others = {"preset", "max_seq_len", "norm_eps", "sliding_window", "document_mask", "init_std"}
    balancing = {"aux_loss", "aux_loss_scope", "router_z_loss", "bias_update_rate"}
    others |= {
        f"moe.{name}" for name in balancing | {"input_jitter", "expert_dropout", "capacity_factor", "drop_policy"}
    }
    keys = {key.removeprefix("model.") for key, _ in walk() if key.startswith("model.")}
    keys -= {key for key in keys if key.startswith("rope.")}
    assert set(WEIGHT_SETTINGS) | others == keys
    assert not set(WEIGHT_SETTINGS) & others


def test_a_loaded_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.steps = 5


def test_every_setting_has_its_sentence() -> None:
    keys = [key for key, _ in walk()]
    assert len(keys) == len(set(keys)) == len(flatten(RunConfig()))
    for key, field in walk():
        assert field.description, key
        assert field.description.rstrip().endswith((".", "`")), key

    def sections(kind: type[Settings]) -> list[type[Settings]]:
        inner = [
            f.annotation
            for f in kind.model_fields.values()
            if isinstance(f.annotation, type) and issubclass(f.annotation, Settings)
        ]
        return [kind, *(s for i in inner for s in sections(i))]

    assert all((section.__doc__ or "").strip().endswith(".") for section in sections(RunConfig))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
UNDERSTOOD = {
    "$ref",
    "$defs",
    "anyOf",
    "const",
    "enum",
    "type",
    "properties",
    "additionalProperties",
    "items",
    "prefixItems",
}
UNDERSTOOD |= {"required", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
UNDERSTOOD |= {"title", "description", "default", "format", "pattern"}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a JSON schema accepts a value: the part of the standard that our schema uses, so that no package is
    needed for it."""
    assert schema.keys() <= UNDERSTOOD, schema.keys() - UNDERSTOOD
    if "$ref" in schema and not fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "anyOf" in schema and not any(fits(value, option, root) for option in schema["anyOf"]):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if "type" in schema and (
        not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean")
    ):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        inside = all(name in known and fits(item, known[name], root) for name, item in value.items())
        return inside and set(schema.get("required", ())) <= value.keys()
    if isinstance(value, list):
        each = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        return len(each) == len(value) and all(fits(item, one, root) for item, one in zip(value, each, strict=True))
    if isinstance(value, int | float):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        above, below = schema.get("exclusiveMinimum", value - 1), schema.get("exclusiveMaximum", value + 1)
        return bool(low <= value <= high and above < value < below)
    return True


def test_the_schema_accepts_every_config_we_ship_and_the_whole_tree(schema: dict[str, Any]) -> None:
    for name in presets():
        assert fits(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), schema, schema), name
    for name in presets("configs.models"):
        assert fits(
            yaml.safe_load((CONFIGS / "models" / f"{name}.yaml").read_text()), schema["$defs"]["ModelConfig"], schema
        ), name
    assert fits(json.loads(RunConfig().model_dump_json()), schema, schema)
    assert all(kind["additionalProperties"] is False for kind in (schema, *schema["$defs"].values()))


@pytest.mark.parametrize(
    "tree",
    [
        {"train": {"stepz": 1}},
        {"train": {"steps": "x"}},
        {"train": 5},
        {"optim": {"kind": "unknown"}},
        {"optim": {"betas": [0.9]}},
        {"model": {"n_layers": 0}},
        {"data": {"sources": [{"paths": ["x"]}]}},
    ],
)
def test_the_schema_refuses_what_loading_refuses(tree: dict[str, Any], schema: dict[str, Any]) -> None:
    assert not fits(tree, schema, schema)
    with pytest.raises(UserError):
        validate(tree)


def test_the_schema_holds_each_sentence(schema: dict[str, Any]) -> None:
    for key, field in walk():
        node = schema
        for part in key.split("."):
            node = node["properties"][part]
            node = node | schema["$defs"][node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else node
        assert node["description"] == field.description


def test_every_preset_loads() -> None:
    assert presets() == ["demo", "mixture"]
    assert load("demo").config.model.preset == "demo"
    for name in presets("configs.models"):
        loaded = load(None, [f"model.preset={name}"])
        shape = yaml.safe_load((CONFIGS / "models" / f"{name}.yaml").read_text())
        given = {k: v for k, v in shape.items() if k not in ("rope", "moe")}
        given |= {f"moe.{k}": v for k, v in shape.get("moe", {}).items()}
        assert {key: flatten(loaded.config)[f"model.{key}"] for key in given} == given
        assert loaded.origin["model.n_layers"] == f"preset {name}"
