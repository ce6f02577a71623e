"""What settings depend on that is not a setting: the devices, compilers, kernels and memory of a machine.

`THIS_MACHINE` looks at the one that it runs on, each time anew. `GPU_CLUSTER` assumes GPUs that are not here.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.config import RunConfig
from pretrain.console import format_count
from pretrain.estimate.flops import count_parameters
from pretrain.model import kernels
from pretrain.model.kernels import VARIABLE_LENGTH, available_backends, choose_backend
from pretrain.optim import schedule
from pretrain.setup.constraints import Violation
from pretrain.setup.layout_constraints import compile_conflict

COMPILE_WORTH_FLOPS = 2e13
"""On a CPU compiling costs about a minute; a run of more FLOPs than this gains more than that."""

Rule = Callable[[RunConfig], tuple[object, str]]
"""What a setting that says `auto` becomes, and why."""


@dataclass(frozen=True)
class Machine:
    """How settings are decided on a machine, and what it refuses."""

    device: Rule
    """Decides `train.device=auto`. The rules run after the layout is decided, in the order of these four fields."""

    precision: Rule
    compile: Rule
    attention: Rule

    device_constraints: tuple[Callable[[RunConfig], Violation | None], ...] = ()
    """Checked before any rule queries the device."""

    constraints: tuple[Callable[[RunConfig], Violation | None], ...] = ()
    """Checked once all settings are resolved."""

    device_bytes: Callable[[str], int | None] = lambda device: None
    """Memory of one device of that kind (`cpu`, `cuda`); None where it is not known, or is the host's."""

    host_bytes: Callable[[], int | None] = lambda: None
    """Memory of the host; None where it is not known."""


def device_rule(config: RunConfig) -> tuple[object, str]:
    """`train.device=auto`: a GPU if there is one."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    return "cpu", "no GPU is visible"


def precision_rule(config: RunConfig) -> tuple[object, str]:
    """`train.precision=auto`: bf16 where the hardware multiplies it."""
    if config.train.device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU multiplies it natively") if native else ("fp32", "the GPU has no native bf16")
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return ("bf16", "the CPU multiplies it natively") if native else ("fp32", "the CPU has no native bf16")


def compile_rule(config: RunConfig) -> tuple[object, str]:
    """`train.compile=auto`: where it is possible and the run is long enough."""
    conflict = compile_conflict(config)
    if conflict is not None:
        return False, f"it does not go with {conflict}"
    missing = missing_compiler(config.train.device)
    if missing is not None:
        return False, missing
    if config.train.device == "cuda":
        return True, "on for GPUs"
    samples = schedule.samples_before(config.train.steps + 1, config.train)
    flops = 6.0 * count_parameters(config.model).active * samples * config.data.seq_len
    if flops < COMPILE_WORTH_FLOPS:
        return False, f"{format_count(flops)} FLOPs are too few to repay compiling"
    return True, f"{format_count(flops)} FLOPs repay compiling"


def attention_rule(config: RunConfig) -> tuple[object, str]:
    """`train.attention=auto`: the fastest kernel that runs here."""
    train = config.train
    return choose_backend(
        train.device, precision=train.precision, compiled=train.compile, head_dim=config.model.head_dim
    )


def missing_compiler(device: str) -> str | None:
    """Why torch.compile cannot generate code for `device` on this machine; None if it can."""
    if device == "cuda":  # Triton builds the host code that launches its kernels; g++ brings gcc along
        candidates = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "g++"]
        kind = "C compiler"
    else:  # the compilers that torch.compile itself looks for
        candidates = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
        kind = "C++ compiler"
    if not any(shutil.which(name) for name in candidates):
        return f"there is no {kind} ({' or '.join(candidates[:2])})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are not installed (package python3-dev)"
    return None


def device_exists(config: RunConfig) -> Violation | None:
    """`train.device=cuda` needs a GPU that PyTorch sees."""
    if config.train.device != "cuda" or torch.cuda.is_available():
        return None
    built_for_gpus = torch.version.cuda or torch.version.hip
    why = "" if built_for_gpus else f" (PyTorch {torch.__version__} is built without CUDA)"
    return Violation("train.device=cuda, but PyTorch sees no GPU here", f"use train.device=cpu or auto{why}")


def bf16_runs(config: RunConfig) -> Violation | None:
    """A GPU can compute in bf16, if only by emulation."""
    train = config.train
    if train.device != "cuda" or train.precision != "bf16" or torch.cuda.is_bf16_supported():
        return None
    return Violation(
        f"train.precision=bf16, but {torch.cuda.get_device_name()} cannot compute in bf16",
        "use train.precision=fp32 or auto",
    )


def compiler_exists(config: RunConfig) -> Violation | None:
    """torch.compile finds what it needs."""
    missing = missing_compiler(config.train.device) if config.train.compile else None
    if missing is None:
        return None
    return Violation(f"train.compile=true, but {missing}", "install it, or use train.compile=false or auto")


def attention_runs(config: RunConfig) -> Violation | None:
    """The attention kernel runs on this device, in this precision and for heads of this width."""
    train, head_dim = config.train, config.model.head_dim
    if train.attention not in VARIABLE_LENGTH:
        return None
    runs = available_backends(train.device, precision=train.precision, compiled=train.compile, head_dim=head_dim)
    if train.attention in runs:
        return None
    needs_package = train.attention == "flash_attn" and train.device == "cuda" and kernels.flash_attn_version() is None
    why = " (the flash-attn package is not installed, or not for this GPU and PyTorch)" if needs_package else ""
    return Violation(
        f"train.attention={train.attention} does not run here with train.device={train.device}, "
        f"train.precision={train.precision} and model.head_dim={head_dim}",
        f"use {', '.join(runs)} or auto{why}",
    )


def device_bytes(device: str) -> int | None:
    """Memory of one device; None where it is not known, or is the host's."""
    if device != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def host_bytes() -> int | None:
    """Memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


THIS_MACHINE = Machine(
    device=device_rule,
    precision=precision_rule,
    compile=compile_rule,
    attention=attention_rule,
    device_constraints=(device_exists,),
    constraints=(bf16_runs, compiler_exists, attention_runs),
    device_bytes=device_bytes,
    host_bytes=host_bytes,
)

GPU_CLUSTER = Machine(
    device=lambda config: ("cuda", "assumed"),
    precision=lambda config: ("bf16", "assumed") if config.train.device == "cuda" else precision_rule(config),
    compile=lambda config: (config.train.device == "cuda" and compile_conflict(config) is None, "assumed"),
    attention=lambda config: ("varlen" if config.train.device == "cuda" else "sdpa", "assumed"),
)
