"""Stage 1: versions, the GPU, its matmul peak's denominator, and whether ranks of this machine reach each other by gloo and NCCL."""

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


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The driver's version and the GPU's clocks and power limit, as nvidia-smi says them."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory,power.limit,memory.total"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=10
    )
    return done.stdout.strip() or done.stderr.strip()


def group_of_one(device: torch.device) -> float:
    """Seconds to start the group that a training process starts, and to add up a number in it."""
    began = time.monotonic()
    with process_group(World.from_environment(), device.type, even_if_alone=True):
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        assert total.item() == 1
    return time.monotonic() - began


def two_gloo_ranks() -> float:
    """Seconds in which two processes meet over TCP and add up a number. Forked: they need not import torch again."""
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    return time.monotonic() - began


def main() -> None:
    stage = StageContext(__doc__)
    stage.row(
        what="gloo, two processes over loopback", seconds=two_gloo_ranks()
    )  # first: forking is not safe once CUDA is in use
    versions = {name.replace("-", "_"): version_of(name) for name in PACKAGES}
    stage.row(
        what="software",
        **describe_machine(),
        **versions,
        compiler=shutil.which("g++"),
        driver=driver(),
        kernel=platform.release(),
    )
    if stage.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        known = find_accelerator(torch.cuda.get_device_name())
        stage.row(
            what="GPU",
            name=torch.cuda.get_device_name(),
            capability=".".join(map(str, torch.cuda.get_device_capability())),
            memory_GiB=properties.total_memory / 2**30,
            multiprocessors=properties.multi_processor_count,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            nccl=".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]  # untyped in torch
            flash_attn_package=flash_attn_version(),
            published_bf16_TFLOPs=None if known is None else known.bf16_flops / 1e12,
        )
    stage.row(
        what=f"group of one, {'NCCL' if stage.device.type == 'cuda' else 'gloo'}", seconds=group_of_one(stage.device)
    )


if __name__ == "__main__":
    main()
