"""Every `auto` becomes a value here, once, with its reason; and what only shows when the settings are seen together is checked.

Knows the machine (which device, which instructions) and the size of the vocabulary; changes nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data_pipeline.tokenizing.tokenizer import load_tokenizer
from pretrain.config import AUTO, RunConfig, flatten, on_resume
from pretrain.config.loading import validate
from pretrain.console import format_count
from pretrain.errors import UserError
from pretrain.estimate.flops import parameter_count
from pretrain.model import kernels
from pretrain.model.kernels import VARIABLE_LENGTH, available_backends, choose_backend
from pretrain.optim import schedule
from pretrain.setup import layout_rules
from pretrain.setup.layout import check_world, compiles
from pretrain.setup.seq_len_schedule import check_growth, longest_seq_len

VOCAB_MULTIPLE = 64
"""Vocabulary sizes are rounded up to this: matrix units want it, and it leaves room for tensor parallelism."""

WARMUP_SHARE = 10
LONGEST_WARMUP = 2000
"""`auto` warm-up: one step in ten, as far as the longest that published runs of any size commonly take."""

COMPILE_WORTH_FLOPS = 2e13
"""On a CPU compiling costs about a minute; a run of more FLOPs than this gets it back."""


@dataclass(frozen=True)
class Decision:
    """A setting that said `auto`, what it became, and why."""

    key: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={self.value} ({self.reason})"


Rule = Callable[[RunConfig], tuple[object, str]]
"""What a setting becomes, and why."""


def resolve(
    config: RunConfig, *, tokenizer_size: int, previous: RunConfig | None, world_size: int = 1
) -> tuple[RunConfig, list[Decision]]:
    """A config without `auto`, and the decisions made.

    Args:
        config: as the user gave it.
        tokenizer_size: tokens of the tokenizer the data was made with.
        previous: the config of the run that is resumed; its decisions hold. Those that change no number are made anew: it may be
            another machine.
        world_size: processes of the run. How a single one divides the work is decided too, and not told: there is nothing to divide.

    Raises:
        UserError: settings that do not go together.
    """
    _check_device(config)  # before a rule asks it what it can do
    before = {} if previous is None else _held(previous, config)
    config, decisions = _apply(_rules(tokenizer_size, world_size), config, before)
    _check(config, tokenizer_size)
    if world_size == 1:
        decisions = [decision for decision in decisions if not decision.key.startswith("parallel.")]
    return config, decisions


def plan(config: RunConfig, world_size: int) -> tuple[RunConfig, list[Decision]]:
    """The same for GPUs that are not here, and data that need not be: what to ask of a layout before there is a cluster.

    Raises:
        UserError: settings that do not go together, or a vocabulary that nobody knows yet.
    """
    file, size = config.data.path / "tokenizer.json", config.model.vocab_size
    if size == AUTO and not file.is_file():
        raise UserError(
            f"model.vocab_size=auto is the tokenizer's size, and data.path={config.data.path} holds no prepared data: set model.vocab_size"
        )
    if size == AUTO:
        size = load_tokenizer(file).vocab_size
    elsewhere: dict[str, Rule] = {
        "train.device": lambda _: ("cuda", "assumed"),
        "train.precision": lambda c: ("bf16", "assumed") if c.train.device == "cuda" else _precision(c),
        "train.compile": lambda c: (c.train.device == "cuda" and compiles(c), "assumed"),
        "train.attention": lambda c: ("varlen" if c.train.device == "cuda" else "sdpa", "assumed"),
    }
    config, decisions = _apply(_rules(size, world_size) | elsewhere, config, {})
    _check_numbers(config)
    return config, decisions


def _rules(tokenizer_size: int, world_size: int) -> dict[str, Rule]:
    """Settings that may say `auto`, in the order in which they are decided: later ones look at those before."""
    return {
        "data.tokenizer": lambda c: (str(c.data.path / "tokenizer.json"), "the one the data was made with"),
        "model.vocab_size": lambda c: (
            -(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            f"the tokenizer's {tokenizer_size}, rounded up",
        ),
        "optim.warmup": lambda c: (
            min(c.train.steps // WARMUP_SHARE, LONGEST_WARMUP),
            f"a tenth of the run, {LONGEST_WARMUP:,} steps at most",
        ),
        "optim.decay": lambda c: (
            schedule.WSD_DECAY if c.optim.schedule == "wsd" else 1.0,
            f"the usual for {c.optim.schedule}",
        ),
        "parallel.replicate": partial(layout_rules.replicate_rule, world_size=world_size),
        "parallel.shard": partial(layout_rules.shard_rule, world_size=world_size),
        "parallel.zero": layout_rules.zero_rule,
        "parallel.sequence": layout_rules.sequence_rule,
        "parallel.stages_per_rank": layout_rules.stages_rule,
        "train.device": _device,
        "train.precision": _precision,
        "train.micro_batch_size": partial(_micro_batch, world_size=world_size),
        "train.compile": _compile,
        "train.attention": _attention,
    }


def _apply(
    rules: Mapping[str, Rule], config: RunConfig, before: Mapping[str, object]
) -> tuple[RunConfig, list[Decision]]:
    """Decide what says `auto`, by what was decided `before` or else by its rule."""
    decisions: list[Decision] = []
    for key, rule in rules.items():
        tree = config.model_dump(mode="json")
        section, name = key.split(".")
        if tree[section][name] != AUTO:
            continue
        value, reason = (before[key], "as the run began") if key in before else rule(config)
        tree[section][name] = value
        config = validate(tree)
        decisions.append(Decision(key, value, reason))
    return config, decisions


def _held(previous: RunConfig, config: RunConfig) -> dict[str, object]:
    """The settings that a resumed run takes over where it says `auto`: those that its numbers depend on. The decay
    belongs to a schedule: another one, of a run that is to end otherwise than it began, has its own."""
    rules = on_resume()
    held = {key: value for key, value in flatten(previous).items() if rules[key] != "may"}
    if previous.optim.schedule != config.optim.schedule:
        del held["optim.decay"]
    return held


def _device(config: RunConfig) -> tuple[object, str]:
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    return "cpu", "no GPU is visible"


def _precision(config: RunConfig) -> tuple[object, str]:
    if config.train.device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU multiplies it natively") if fast else ("fp32", "the GPU has no native bf16")
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return ("bf16", "the CPU multiplies it natively") if fast else ("fp32", "the CPU has no native bf16")


def _compile(config: RunConfig) -> tuple[object, str]:
    if not compiles(config):
        return (
            False,
            f"what parallel.schedule={config.parallel.schedule} and train.recompute=selective keep cannot be compiled",
        )
    missing = _missing_compiler(config.train.device)
    if missing is not None:
        return False, missing
    if config.train.device == "cuda":
        return True, "on for GPUs"
    flops = (
        6.0
        * parameter_count(config.model)
        * schedule.samples_before(config.train.steps + 1, config.train)
        * config.data.seq_len
    )
    if flops < COMPILE_WORTH_FLOPS:
        return False, f"{format_count(flops)} FLOPs are too few to repay compiling"
    return True, f"{format_count(flops)} FLOPs repay compiling"


def _missing_compiler(device: str) -> str | None:
    """Why torch.compile could not make code for the device here; None if it can."""
    if device == "cuda":  # Triton builds the host code that launches its kernels; g++ brings gcc along
        found = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "g++"]
        kind = "C compiler"
    else:  # those that torch.compile itself would take
        found = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
        kind = "C++ compiler"
    if not any(shutil.which(name) for name in found):
        return f"there is no {kind} ({' or '.join(found[:2])})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are not installed (package python3-dev)"
    return None


def _attention(config: RunConfig) -> tuple[object, str]:
    train = config.train
    return choose_backend(
        train.device, precision=train.precision, compiled=train.compile, head_dim=config.model.head_dim
    )


def _micro_batch(config: RunConfig, *, world_size: int) -> tuple[object, str]:
    check_world(config, world_size)  # before a size is sought that cannot be
    return layout_rules.micro_batch_rule(config)


def _check(config: RunConfig, tokenizer_size: int) -> None:
    model, data, train = config.model, config.data, config.train
    if tokenizer_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's vocabulary of {tokenizer_size} ({data.tokenizer}); "
            f"set model.vocab_size={-(-tokenizer_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE} or auto"
        )
    _check_numbers(config)
    if train.device == "cuda" and train.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"train.precision=bf16, but {torch.cuda.get_device_name()} cannot compute in bf16; use train.precision=fp32 or auto"
        )
    missing = _missing_compiler(train.device) if train.compile else None
    if missing is not None:
        raise UserError(f"train.compile=true, but {missing}; install it, or use train.compile=false or auto")
    if train.attention in VARIABLE_LENGTH:
        runs = available_backends(
            train.device, precision=train.precision, compiled=train.compile, head_dim=model.head_dim
        )
        if train.attention not in runs:
            raise UserError(
                f"train.attention={train.attention} does not run here with train.device={train.device}, train.precision={train.precision} "
                f"and model.head_dim={model.head_dim}; use {', '.join(runs)} or auto{_package(train.attention, train.device)}"
            )


def _check_device(config: RunConfig) -> None:
    if config.train.device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "" if built else f" (PyTorch {torch.__version__} is built without CUDA)"
        raise UserError(f"train.device=cuda, but PyTorch sees no GPU here; use train.device=cpu or auto{why}")


def _package(attention: str, device: str) -> str:
    missing = attention == "flash_attn" and device == "cuda" and kernels.flash_attn_version() is None
    return " (the flash-attn package is not installed, or not for this GPU and PyTorch)" if missing else ""


def _check_numbers(config: RunConfig) -> None:
    """What holds on any machine."""
    model, data = config.model, config.data
    check_growth(config)
    longest = longest_seq_len(config)
    if longest > model.max_seq_len:
        setting = "data.seq_len" if longest == data.seq_len else "data.growth: seq_len"
        raise UserError(
            f"{setting}={longest} is longer than model.max_seq_len={model.max_seq_len}; lower the first or raise the second"
        )
    schedule.check(config.optim, config.train)
