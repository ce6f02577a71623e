"""Stages 5 and 6: training steps of the real engine, as `pretrain train` builds it, on one GPU: tokens/s, MFU, memory, a profile.

bf16, compiled, fused AdamW, fp32 masters, random tokens. Packed rows hold documents of 500 tokens on average (exponentially distributed,
as real ones nearly are). MFU counts by the convention of `pretrain.estimate.flops`, which does not subtract masked work: packed documents
can only look better by it. Sizes begin at what surely fits; a case that runs out of memory is a row that says so.

    python -m benchmarks.gpu.training --suite base|variants|presets [--rows FILE] [--steps 5] [--profile DIR]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import matmul_peak, synchronize
from benchmarks.gpu.stage import MEAN_DOCUMENT, StageContext, loss_in_chunks
from data_pipeline.reading.packing import NO_LABEL, Batch
from parallel.engine import Engine, Microbatch
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.estimate.flops import flops_per_token, parameter_count
from pretrain.estimate.hardware import find_accelerator
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import resolve_run
from pretrain.train.batching import split_microbatches, to_host

WARM_UP = 2
"""Steps before the timed ones: the first compiles, the second fills the allocator's cache."""

PROFILED = 3
"""Steps that the profiler records, once the timed ones are over."""


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
    """Rows of logits at a time in the loss; None as in training."""
    model: tuple[str, ...] = ()
    """More `key=value` words."""
    compiled: bool = True
    profiled: bool = False


SUITES: dict[str, tuple[Case, ...]] = {
    "base": (
        Case("16k tokens", rows=4),
        Case("32k tokens", profiled=True),
        Case("32k tokens, one document a row", packed=False),
    ),
    "variants": (
        Case("4 x 16k tokens", rows=4, accumulate=4),
        Case("4 x 32k tokens", accumulate=4),
        Case("32k tokens, loss in chunks of 1,024", chunk_rows=1024),
        Case("32k tokens, loss in chunks of 4,096", chunk_rows=4096),
        Case("32k tokens, recompute=full", model=("train.recompute=full",)),
        Case(
            "32k tokens, SDPA without document masks",
            packed=False,
            attention="sdpa",
            model=("model.document_mask=false",),
        ),
    ),
    "presets": (
        Case("125m", preset="125m", vocabulary=50_304, seq_len=2048, rows=16),
        Case("125m, 64k tokens", preset="125m", vocabulary=50_304, seq_len=2048, rows=32),
        Case("350m", preset="350m", vocabulary=50_304, seq_len=2048, rows=16),
        Case("350m, 64k tokens", preset="350m", vocabulary=50_304, seq_len=2048, rows=32),
        Case("1b, sequences of 2,048", seq_len=2048, rows=16),
    ),
}
"""Vocabularies: GPT-2's rounded up to 64 for the small presets, as trained by many; Llama 3's for 1B."""

TINY = ("model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128")


def shrink(case: Case) -> Case:
    """The same case in a size for a CPU, without the compiler, which would take most of the time."""
    chunk_rows = None if case.chunk_rows is None else 64
    return replace(
        case,
        preset=None,
        vocabulary=512,
        seq_len=64,
        rows=2,
        chunk_rows=chunk_rows,
        model=TINY + case.model,
        compiled=False,
    )


def config_of(case: Case, device: torch.device) -> RunConfig:
    """A resolved config with `accumulate` microbatches of `rows` sequences a step."""
    words = [
        *([] if case.preset is None else [f"model.preset={case.preset}"]),
        f"model.vocab_size={case.vocabulary}",
        f"data.seq_len={case.seq_len}",
        f"train.batch_size={case.rows * case.accumulate}",
        f"train.micro_batch_size={case.rows}",
        *(f"train.device={device.type}", "train.precision=bf16", f"train.compile={str(case.compiled).lower()}"),
        f"train.attention={case.attention}",
        *case.model,
    ]
    return resolve_run(load(None, words).config, tokenizer_size=case.vocabulary).config


def microbatches_of(config: RunConfig, case: Case, seed: int) -> list[Microbatch]:
    """A step's microbatches of random tokens, on the device; the last token of each document has no label."""
    random = np.random.default_rng(seed)
    shape = config.train.batch_size, config.data.seq_len
    starts = random.random(shape) < (1 / MEAN_DOCUMENT if case.packed else 0)
    starts[:, 0] = True
    ids = random.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    ends = np.roll(starts, -1, axis=1)
    batch = Batch(
        ids, np.where(ends, NO_LABEL, np.roll(ids, -1, axis=1)).astype(np.int32), starts.cumsum(1, dtype=np.int32)
    )
    device = torch.device(config.train.device)
    return list(split_microbatches(to_host(batch, device), config.train.micro_batch_size, device))


def timed_steps(
    engine: Engine, config: RunConfig, case: Case, steps: int, report: Callable[[str, float], None]
) -> float:
    """Median seconds of a step, each on other documents. `report` hears of the first step and of the slowest later one."""
    device, seconds = torch.device(config.train.device), []
    for step in range(WARM_UP + steps):
        given = microbatches_of(config, case, step)
        if step == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        began = time.perf_counter()
        engine.train_step(given, 1.0)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    report("first_step_s", seconds[0])
    report("slowest_later_step_s", max(seconds[WARM_UP:]))  # far above the median: something compiled again
    return median(seconds[WARM_UP:])


def profile_steps(engine: Engine, config: RunConfig, case: Case, folder: Path) -> None:
    """Record a few steps: `trace.json.gz` for chrome://tracing or Perfetto, and `kernels.txt`, the kernels by time."""
    given = [microbatches_of(config, case, 100 + step) for step in range(PROFILED)]
    device = torch.device(config.train.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        for each in given:
            engine.train_step(each, 1.0)
        synchronize(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)
    (folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")
    recorded.export_chrome_trace(str(folder / "trace.json.gz"))


class Engines:
    """The engine of the case before, for cases that differ only in the batch: drawing a billion initial weights takes seconds."""

    def __init__(self) -> None:
        self._key: object = None
        self._engine: Engine | None = None

    def of(self, case: Case, config: RunConfig) -> Engine:
        """That engine if it fits, else a new one; the old one's memory is given back first."""
        key = (case.preset, case.vocabulary, case.seq_len, case.attention, case.compiled, case.model)
        if self._engine is None or key != self._key:
            self.forget()
            self._key, self._engine = key, build_engine(config)
        return self._engine

    def forget(self) -> None:
        """Give its memory back."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(stage: StageContext, case: Case, engines: Engines, peak: float, steps: int, folder: Path) -> None:
    """The row of one case, and its profile if it asks for one."""
    config = config_of(case, stage.device)
    tokens = config.train.micro_batch_size * config.data.seq_len
    with loss_in_chunks(None if case.chunk_rows is None else tokens // case.chunk_rows):
        try:
            engine = engines.of(case, config)
            times: dict[str, float] = {}
            seconds = timed_steps(engine, config, case, steps, times.__setitem__)
            stage.row(case=f"{case.preset}: {case.label}", **speed(config, seconds, peak), **times)
            if case.profiled:
                profile_steps(engine, config, case, folder)
        except torch.OutOfMemoryError as error:
            stage.row(case=f"{case.preset}: {case.label}", error=f"out of memory: {str(error).splitlines()[0][:150]}")
            engines.forget()


def speed(config: RunConfig, seconds: float, peak: float) -> dict[str, object]:
    """What a step of so many seconds means."""
    cuda = config.train.device == "cuda"
    accelerator = find_accelerator(torch.cuda.get_device_name()) if cuda else None
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
        "peak_memory_GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] if cuda else None,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--steps", type=int, default=5, help=f"steps timed, after {WARM_UP} for warming up")
    parser.add_argument(
        "--profile", type=Path, help="folder for the trace and the kernel table (default: that of --rows)"
    )


def main() -> None:
    stage = StageContext(__doc__, add_options)
    options = stage.options
    folder = options.profile or (options.rows.parent if options.rows else Path())
    peak = matmul_peak(stage.device, torch.bfloat16, repeats=5)
    stage.row(what="matmul peak", TFLOPs=peak / 1e12)
    engines = Engines()
    for case in SUITES[options.suite]:
        measure(
            stage, shrink(case) if stage.small else case, engines, peak, 2 if stage.small else options.steps, folder
        )


if __name__ == "__main__":
    main()
