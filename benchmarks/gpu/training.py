"""Stages 5 and 6: training steps of the engine that `pretrain train` builds: tokens/s, MFU, memory, a profile.

bf16, compiled, fused AdamW, fp32 master weights, random tokens. Packed rows hold documents of 500 tokens on average
(exponentially distributed, as real ones nearly are). MFU is counted as in `pretrain.estimate.flops`, which does not
subtract masked attention: packed documents can only look better by it. The first cases surely fit; a case that runs out
of memory becomes a row that says so.

    python -m benchmarks.gpu.training --suite base|variants|presets|experts [--rows FILE] [--steps 5] [--profile DIR]
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import matmul_peak, synchronize, time_calls
from benchmarks.gpu.stage import MEAN_DOCUMENT_TOKENS, StageContext, override_loss_chunks
from data_pipeline.reading.packing import NO_LABEL, Batch
from parallel.engine import Engine, Microbatch
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.estimate.flops import flops_per_token, parameter_count
from pretrain.estimate.hardware import find_accelerator
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import resolve_run
from pretrain.train.batching import split_microbatches, to_host

WARM_UP_STEPS = 2
"""Steps before the timed ones: the first compiles, the second fills the cache of the allocator."""

PROFILED_STEPS = 3
"""Steps that the profiler records after the timed ones."""


@dataclass(frozen=True)
class Case:
    """One measured configuration."""

    label: str
    preset: str | None = "1b"
    vocabulary: int = 128_256
    seq_len: int = 4096
    rows: int = 8
    """Sequences of a microbatch."""
    accumulate: int = 1
    """Microbatches of a step."""
    packed: bool = True
    attention: str = "auto"
    chunk_rows: int | None = None
    """Rows of logits in a chunk of the loss; None as in training."""
    settings: tuple[str, ...] = ()
    """More settings as `key=value`."""
    compiled: bool = True
    with_profile: bool = False


FOUR_LAYERS = ("model.n_layers=4",)
"""With 64 experts, 16 layers of the 1B model would not fit on one GPU."""


def experts(n_experts: int, top_k: int) -> tuple[str, ...]:
    """Settings of a mixture of experts whose active FLOPs are those of the dense 1B model's MLP of width 8192."""
    sizes = f"model.moe.n_experts={n_experts}", f"model.moe.top_k={top_k}", f"model.moe.d_ff={8192 // top_k}"
    return (*FOUR_LAYERS, "model.architecture=moe", *sizes)


SUITES: dict[str, tuple[Case, ...]] = {
    "base": (
        Case("16k tokens", rows=4),
        Case("32k tokens", with_profile=True),
        Case("32k tokens, one document a row", packed=False),
    ),
    "variants": (
        Case("4 x 16k tokens", rows=4, accumulate=4),
        Case("4 x 32k tokens", accumulate=4),
        Case("32k tokens, loss in chunks of 1,024", chunk_rows=1024),
        Case("32k tokens, loss in chunks of 4,096", chunk_rows=4096),
        Case("32k tokens, recompute=full", settings=("train.recompute=full",)),
        Case(
            "32k tokens, SDPA without document masks",
            packed=False,
            attention="sdpa",
            settings=("model.document_mask=false",),
        ),
    ),
    "presets": (
        Case("125m", preset="125m", vocabulary=50_304, seq_len=2048, rows=16),
        Case("125m, 64k tokens", preset="125m", vocabulary=50_304, seq_len=2048, rows=32),
        Case("350m", preset="350m", vocabulary=50_304, seq_len=2048, rows=16),
        Case("350m, 64k tokens", preset="350m", vocabulary=50_304, seq_len=2048, rows=32),
        Case("1b, sequences of 2,048", seq_len=2048, rows=16),
    ),
    "experts": (
        Case("4 layers, dense", rows=4, settings=FOUR_LAYERS),
        Case("4 layers, 8 experts, top 2", rows=4, settings=experts(8, 2)),
        Case("4 layers, 64 experts, top 8", rows=4, settings=experts(64, 8), with_profile=True),
    ),
}
"""The vocabulary is GPT-2's, rounded up to a multiple of 64, for the small presets, and Llama 3's for 1B."""

TINY = ("model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128")


def shrink(case: Case) -> Case:
    """Return the case in a size for a CPU, not compiled: compiling would take most of the time."""
    chunk_rows = None if case.chunk_rows is None else 64
    return replace(
        case,
        preset=None,
        vocabulary=512,
        seq_len=64,
        rows=2,
        chunk_rows=chunk_rows,
        settings=case.settings + TINY,
        compiled=False,
    )


def make_config(case: Case, device: torch.device) -> RunConfig:
    """Return the resolved config: `accumulate` microbatches of `rows` sequences in a step."""
    settings = [
        *([] if case.preset is None else [f"model.preset={case.preset}"]),
        f"model.vocab_size={case.vocabulary}",
        f"data.seq_len={case.seq_len}",
        f"train.batch_size={case.rows * case.accumulate}",
        f"train.micro_batch_size={case.rows}",
        *(f"train.device={device.type}", "train.precision=bf16", f"train.compile={str(case.compiled).lower()}"),
        f"train.attention={case.attention}",
        *case.settings,
    ]
    return resolve_run(load(None, settings).config, tokenizer_size=case.vocabulary).config


def random_microbatches(config: RunConfig, case: Case, seed: int) -> list[Microbatch]:
    """Return the microbatches of a step on the device: random tokens, no label at the end of a document."""
    random = np.random.default_rng(seed)
    shape = config.train.batch_size, config.data.seq_len
    starts = random.random(shape) < (1 / MEAN_DOCUMENT_TOKENS if case.packed else 0)
    starts[:, 0] = True
    ids = random.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    ends = np.roll(starts, -1, axis=1)
    batch = Batch(
        ids, np.where(ends, NO_LABEL, np.roll(ids, -1, axis=1)).astype(np.int32), starts.cumsum(1, dtype=np.int32)
    )
    device = torch.device(config.train.device)
    return list(split_microbatches(to_host(batch, device), config.train.micro_batch_size, device))


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the steps of a case."""

    median: float
    first: float
    """Of the first step, which compiles."""
    slowest_later: float
    """Far above the median if something compiled again."""


def time_steps(engine: Engine, config: RunConfig, case: Case, steps: int) -> StepTimes:
    """Time `steps` steps after the warm-up, each on other documents."""
    device = torch.device(config.train.device)
    seconds: list[float] = []
    for step in range(WARM_UP_STEPS + steps):
        microbatches = random_microbatches(config, case, step)
        if step == WARM_UP_STEPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds += time_calls(partial(engine.train_step, microbatches, 1.0), device, 1)
    timed = seconds[WARM_UP_STEPS:]
    return StepTimes(median(timed), seconds[0], max(timed))


def profile_steps(engine: Engine, config: RunConfig, case: Case, folder: Path, prefix: str) -> None:
    """Record a few steps.

    Writes `trace.json.gz` for chrome://tracing or Perfetto, and `kernels.txt`, the kernels by time.
    `prefix` comes before both names.
    """
    batches = [random_microbatches(config, case, 100 + step) for step in range(PROFILED_STEPS)]
    device = torch.device(config.train.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for microbatches in batches:
            engine.train_step(microbatches, 1.0)
        synchronize(device)
    sort_key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=sort_key, row_limit=60, max_name_column_width=90)
    (folder / f"{prefix}kernels.txt").write_text(table + "\n", encoding="utf-8")
    profiler.export_chrome_trace(str(folder / f"{prefix}trace.json.gz"))


class EngineCache:
    """Keeps the last engine for cases that differ only in the batch: a billion initial weights take seconds."""

    def __init__(self) -> None:
        self._key: object = None
        self._engine: Engine | None = None

    def get(self, case: Case, config: RunConfig) -> Engine:
        """Return the kept engine if it fits the case. Otherwise free it and build a new one."""
        key = (case.preset, case.vocabulary, case.seq_len, case.attention, case.compiled, case.settings)
        if self._engine is None or key != self._key:
            self.clear()
            self._key, self._engine = key, build_engine(config)
        return self._engine

    def clear(self) -> None:
        """Free the engine's memory."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_case(
    stage: StageContext, case: Case, engines: EngineCache, peak: float, steps: int, folder: Path, prefix: str
) -> None:
    """Measure one case and add its row. Write a profile to `folder` if the case has one."""
    config = make_config(case, stage.device)
    tokens = config.train.micro_batch_size * config.data.seq_len
    name = f"{case.preset}: {case.label}"
    with override_loss_chunks(None if case.chunk_rows is None else tokens // case.chunk_rows):
        try:
            engine = engines.get(case, config)
            times = time_steps(engine, config, case, steps)
            extremes = {"first_step_s": times.first, "slowest_later_step_s": times.slowest_later}
            stage.add_row(case=name, **throughput(config, times.median, peak), **extremes)
            if case.with_profile:
                profile_steps(engine, config, case, folder, prefix)
        except torch.OutOfMemoryError as error:
            stage.add_row(case=name, error=f"out of memory: {str(error).splitlines()[0][:150]}")
            engines.clear()


def throughput(config: RunConfig, seconds: float, peak: float) -> dict[str, object]:
    """Return the row of a case from the seconds of a step and the FLOP/s of the matmul peak."""
    is_cuda = config.train.device == "cuda"
    accelerator = find_accelerator(torch.cuda.get_device_name()) if is_cuda else None
    tokens_per_s = config.train.batch_size * config.data.seq_len / seconds
    flops = tokens_per_s * flops_per_token(config.model, config.data.seq_len)
    return {
        "parameters_M": parameter_count(config.model) / 1e6,
        "seq_len": config.data.seq_len,
        "micro_batch": config.train.micro_batch_size,
        "batch": config.train.batch_size,
        "attention": config.train.attention,
        "tokens_per_s": tokens_per_s,
        "ms_per_step": seconds * 1e3,
        "mfu": None if accelerator is None else flops / accelerator.bf16_flops,
        "of_matmul_peak": flops / peak,
        "peak_memory_GiB": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] if is_cuda else None,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--steps", type=int, default=5, help=f"timed steps, after {WARM_UP_STEPS} to warm up")
    parser.add_argument("--profile", type=Path, help="folder of the trace and kernel table (default: that of --rows)")


def main() -> None:
    stage = StageContext(__doc__, add_options)
    args = stage.args
    folder = args.profile or (args.rows.parent if args.rows else Path())
    peak = matmul_peak(stage.device, torch.bfloat16, repeats=5)
    stage.add_row(what="matmul peak", TFLOPs=peak / 1e12)
    engines = EngineCache()
    prefix = "" if args.suite == "base" else f"{args.suite}-"
    steps = 2 if stage.small else args.steps
    for case in SUITES[args.suite]:
        run_case(stage, shrink(case) if stage.small else case, engines, peak, steps, folder, prefix)


if __name__ == "__main__":
    main()
