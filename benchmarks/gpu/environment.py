"""Stage 1: versions, the GPU with its published peak, and whether local processes reach each other by gloo and NCCL."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.common import describe_machine
from benchmarks.gpu.stage import StageContext
from parallel.world import World, process_group
from pretrain.estimate.hardware import find_accelerator
from pretrain.model.kernels import flash_attn_version

PACKAGES = (
    "triton",
    "transformers",
    "flash-attn",
    "flash-attn-3",
    "torchao",
    "transformer-engine",
    "megatron-core",
    "deepspeed",
    "deep-ep",
)


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def query_driver() -> str | None:
    """Return nvidia-smi's line of driver version, clocks, power limit and memory; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit,memory.total"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=10
    )
    return done.stdout.strip() or done.stderr.strip()


def time_group_of_one(device: torch.device) -> float:
    """Return the seconds to start a process group as training does, and to all-reduce a number."""
    start = time.monotonic()
    with process_group(World.from_environment(), device.type, even_if_alone=True):
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        assert total.item() == 1
    return time.monotonic() - start


def time_two_gloo_ranks() -> float:
    """Return the seconds in which two processes meet over TCP and all-reduce a number.

    The second one is a fork, so that it need not import torch again.
    """
    start = time.monotonic()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    child = os.fork()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=child != 0, timeout=timedelta(seconds=10))
    dist.init_process_group("gloo", store=store, rank=0 if child else 1, world_size=2, timeout=timedelta(seconds=10))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    dist.destroy_process_group()
    if child == 0:
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the other rank ended with {status}"
    return time.monotonic() - start


def main() -> None:
    stage = StageContext(__doc__)
    # First of all: forking is not safe once CUDA is in use.
    stage.add_row(what="gloo, two processes over loopback", seconds=time_two_gloo_ranks())
    versions = {name.replace("-", "_"): installed_version(name) for name in PACKAGES}
    stage.add_row(
        what="software",
        **describe_machine(),
        **versions,
        compiler=shutil.which("g++"),
        driver=query_driver(),
        kernel=platform.release(),
    )
    if stage.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        accelerator = find_accelerator(torch.cuda.get_device_name())
        stage.add_row(
            what="GPU",
            name=torch.cuda.get_device_name(),
            capability=".".join(map(str, torch.cuda.get_device_capability())),
            memory_GiB=properties.total_memory / 2**30,
            multiprocessors=properties.multi_processor_count,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            nccl=".".join(map(str, torch.cuda.nccl.version())),
            flash_attn_package=flash_attn_version(),
            published_bf16_TFLOPs=None if accelerator is None else accelerator.bf16_flops / 1e12,
        )
    stage.add_row(
        what=f"group of one, {'NCCL' if stage.device.type == 'cuda' else 'gloo'}",
        seconds=time_group_of_one(stage.device),
    )


if __name__ == "__main__":
    main()
