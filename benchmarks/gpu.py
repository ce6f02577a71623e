"""Training of the 125M, 350M and 1B presets on one GPU: tokens/s, MFU, fraction of the measured matmul peak, peak memory.

The real engine as `pretrain train` builds it (bf16, compiled, fused AdamW, fp32 masters), one microbatch a step, random tokens. The
microbatch is the largest power of two that fits into memory, up to 65,536 tokens. Each model is measured on rows of one document and
on packed rows, whose documents are 500 tokens long on average (exponentially distributed, as real ones nearly are). MFU counts by the
convention of `pretrain.model.flops`, which does not subtract masked work: packed documents can only look better by it.

    python -m benchmarks.gpu [--json FILE] [--preset 125m ...] [--attention sdpa] [--steps 10]
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import matmul_peak, parser, report, synchronize
from parallel.engine import Microbatch
from parallel.engines.torch import TorchEngine
from pretrain.config import RunConfig
from pretrain.config_loading import load
from pretrain.hardware import find_accelerator
from pretrain.model.flops import flops_per_token, parameter_count
from pretrain.train.build import build_engine
from pretrain.train.resolve import resolve

CUDA = torch.device("cuda")
CASES = (("125m", 50_304, 2048), ("350m", 50_304, 2048), ("1b", 128_256, 2048), ("1b", 128_256, 4096))
"""(preset, vocabulary, sequence length): GPT-2's vocabulary rounded up to 64 for the first two, as trained by many; Llama 3's for 1B."""

LARGEST_MICROBATCH = 65_536
"""Tokens; more keep a GPU no busier."""

MEAN_DOCUMENT = 500
WARM_UP = 5
"""Steps that compile, and again when the number of documents changes, and fill the allocator's cache."""


def config_of(preset: str, vocabulary: int, seq_len: int, rows: int, attention: str) -> RunConfig:
    """A resolved config with one microbatch of `rows` sequences a step."""
    words = [
        f"model.preset={preset}",
        f"model.vocab_size={vocabulary}",
        f"data.seq_len={seq_len}",
        *(f"train.batch_size={rows}", f"train.micro_batch_size={rows}"),
        *("train.device=cuda", "train.precision=bf16", "train.compile=true", f"train.attention={attention}"),
    ]
    return resolve(load(None, words).config, tokenizer_size=vocabulary, previous=None)[0]


def one_document_a_row(rows: int, seq_len: int, _: np.random.Generator) -> NDArray[np.int32]:
    """Document ids [rows, seq_len]."""
    return np.zeros((rows, seq_len), np.int32)


def packed(rows: int, seq_len: int, random: np.random.Generator) -> NDArray[np.int32]:
    """The same, of documents that follow one another through all rows, cut where a row ends."""
    starts = random.random((rows, seq_len)) < 1 / MEAN_DOCUMENT
    return starts.cumsum(1, dtype=np.int32)


DOCUMENTS: dict[str, Callable[[int, int, np.random.Generator], NDArray[np.int32]]] = {"one a row": one_document_a_row, "packed": packed}


def microbatch_of(config: RunConfig, document_ids: NDArray[np.int32], random: np.random.Generator) -> Microbatch:
    """Random tokens in these documents, on the device; the last token of each document has no label."""
    columns = np.arange(document_ids.shape[1], dtype=np.int32)
    starts = np.diff(document_ids, axis=1, prepend=-1) > 0
    positions = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    ids = random.integers(config.model.vocab_size, size=document_ids.shape)
    labels = np.where(np.roll(starts, -1, axis=1), -100, np.roll(ids, -1, axis=1))
    return Microbatch(
        input_ids=torch.from_numpy(ids).to(CUDA),
        labels=torch.from_numpy(labels).to(CUDA),
        positions=torch.from_numpy(positions),
        document_ids=torch.from_numpy(document_ids),
        n_targets=int((labels >= 0).sum()),
    )


def timed_steps(engine: TorchEngine, config: RunConfig, documents: str, steps: int) -> tuple[float, float]:
    """(median seconds of a step, peak memory in GiB), each step on other documents.

    OutOfMemoryError also where it fits only by giving memory back to the driver again and again, which is slow.
    """
    random = np.random.default_rng(0)
    shape = config.train.batch_size, config.data.seq_len
    seconds, retries = [], 0
    for step in range(WARM_UP + steps):
        microbatch = microbatch_of(config, DOCUMENTS[documents](*shape, random), random)
        if step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
        synchronize(CUDA)
        began = time.perf_counter()
        engine.train_step([microbatch], 1.0)
        synchronize(CUDA)
        seconds.append(time.perf_counter() - began)
    if torch.cuda.memory_stats()["num_alloc_retries"] > retries:
        raise torch.OutOfMemoryError("the allocator had to give memory back and ask for it again")
    return median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated() / 2**30


def measure(config: RunConfig, steps: int, peak: float) -> list[dict[str, object]]:
    """A row for each kind of documents."""
    engine = build_engine(config)
    accelerator = find_accelerator(torch.cuda.get_device_name())
    rows: list[dict[str, object]] = []
    for documents in DOCUMENTS:
        seconds, gib = timed_steps(engine, config, documents, steps)
        tokens_per_s = config.train.batch_size * config.data.seq_len / seconds
        flops = tokens_per_s * flops_per_token(config.model, config.data.seq_len)
        rows.append(
            {
                "model": config.model.preset,
                "parameters_M": parameter_count(config.model) / 1e6,
                "seq_len": config.data.seq_len,
                "micro_batch": config.train.batch_size,
                "documents": documents,
                "attention": config.train.attention,
                "tokens_per_s": tokens_per_s,
                "ms_per_step": seconds * 1e3,
                "mfu": None if accelerator is None else flops / accelerator.bf16_flops,
                "fraction_of_matmul_peak": flops / peak,
                "peak_memory_GiB": gib,
            }
        )
        print(rows[-1], flush=True)  # at once: the next one may run out of time
    return rows


def largest_that_fits(preset: str, vocabulary: int, seq_len: int, attention: str, steps: int, peak: float) -> list[dict[str, object]]:
    """The rows of the largest microbatch that does not run out of memory; none if even one sequence does."""
    size = LARGEST_MICROBATCH // seq_len
    while size:
        try:
            return measure(config_of(preset, vocabulary, seq_len, size, attention), steps, peak)
        except torch.OutOfMemoryError:
            print(f"{preset}, {seq_len} tokens: {size} sequences are too many for the memory", flush=True)
        finally:
            torch.compiler.reset()  # the graphs of another size are of no use, and hold tensors
        gc.collect()
        torch.cuda.empty_cache()
        size //= 2
    return []


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--preset", nargs="+", choices=sorted({case[0] for case in CASES}), help="measure these only")
    arguments.add_argument("--attention", default="auto", help="kernel of train.attention; auto is the fastest that is there")
    arguments.add_argument("--steps", type=int, default=10, help=f"steps timed, after {WARM_UP} for warming up")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no CUDA GPU here; nothing was measured")
        return
    peak = matmul_peak(CUDA, torch.bfloat16)
    rows: list[dict[str, object]] = []
    for preset, vocabulary, seq_len in CASES:
        if options.preset is None or preset in options.preset:
            rows += largest_that_fits(preset, vocabulary, seq_len, options.attention, options.steps, peak)
            gc.collect()
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    accelerator = find_accelerator(name)
    denominator = "unknown, so no MFU" if accelerator is None else f"{accelerator.bf16_flops / 1e12:,.0f} TFLOP/s ({accelerator.source})"
    title = f"Training on one {name}, bf16, compiled; matmul peak measured {peak / 1e12:,.0f} TFLOP/s, published {denominator}"
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
