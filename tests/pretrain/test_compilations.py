"""torch.compile makes one set of graphs for each sequence length, and none after the first step of that length.

The graphs are counted and then run uncompiled, because generating code takes a minute.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from flash import flash_on_a_cpu, reference_varlen
from rich.console import Console
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.backends.debugging import aot_eager  # by its name, "aot_eager", it could not be counted
from workers import WorkerPool

from data_pipeline.reading.packing import Batch
from parallel.layout import Layout
from pretrain.config.loading import load
from pretrain.model import kernels
from pretrain.runs.schema import StepRecord, ValidationRecord
from pretrain.setup.engine import build_engine
from pretrain.train import loop
from pretrain.train.batching import DataShard, pad_batch, split_microbatches, to_host
from pretrain.train.loop import Outcome

CPU = torch.device("cpu")

RunTiny = Callable[..., Outcome]

GROWING = "data.seq_len_schedule=[{from: 20, seq_len: 64}]"


@dataclass
class Compiled:
    """A compiler that counts its graphs, and a logger that notes the count after each step and validation.

    If sizes are variable, the pass that makes the backward graph may still specialize them, so it runs here too.
    """

    graphs: int = 0
    with_variable_sizes: int = 0
    reported: list[tuple[str, int, int]] = field(default_factory=list)
    """(step or validation, step, graphs so far)."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        self.graphs += 1
        self.with_variable_sizes += any(isinstance(given, torch.SymInt) for given in inputs)
        compiled: Callable[..., object] = aot_eager(graph, inputs) if self.with_variable_sizes else graph.forward
        return compiled

    def log(self, record: StepRecord | ValidationRecord) -> None:
        kind = "step" if isinstance(record, StepRecord) else "validation"
        self.reported.append((kind, record.step, self.graphs))

    def close(self) -> None:
        pass

    @property
    def compiled_at(self) -> list[tuple[str, int]]:
        """Where the count rose."""
        before = [0, *(graphs for *_, graphs in self.reported)]
        return [
            (kind, step) for (kind, step, graphs), last in zip(self.reported, before, strict=False) if graphs > last
        ]


def count_with(counts: Compiled, patch: pytest.MonkeyPatch) -> None:
    compile = torch.compile
    patch.setattr(torch, "compile", lambda *given, **more: compile(*given, **more, backend=counts))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    counts = Compiled()
    count_with(counts, monkeypatch)
    torch.compiler.reset()
    yield counts
    torch.compiler.reset()


def run(run_tiny: RunTiny, path: Path, compiled: Compiled, *args: str) -> None:
    more = ("train.compile=true", "train.steps=8", "eval.every=4", "log.samples=[the loop]", "model.n_layers=3", *args)
    run_tiny(path, *more, observers=[compiled], console=Console(file=io.StringIO()))


UNEVEN = (
    "train.batch_size=8",
    "train.micro_batch_size=4",
    "train.batch_ramp_steps=3",
    "train.batch_ramp_start=2",
    "eval.batches=100",
)
"""A ramp of 2, 4, 6 and then 8 sequences, and validation to the odd end of the held-out documents."""


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
def test_nothing_is_compiled_after_the_first_step_of_each_length(
    attention: str, tmp_path: Path, run_tiny: RunTiny, compiled: Compiled
) -> None:
    run(run_tiny, tmp_path, compiled, *UNEVEN, GROWING, f"train.attention={attention}")
    assert compiled.compiled_at == [("validation", 0), ("step", 1), ("step", 5)]
    assert (
        compiled.graphs == 7
    )  # softmax, and a block and the norm: without gradients, with them, and for the other length
    assert compiled.with_variable_sizes == 0


def test_as_many_lengths_as_a_run_has_are_compiled() -> None:
    """The compiler's own limit is 8 graphs of a block, after which it would run it uncompiled."""
    stages = [{"from": f"{stage}%", "seq_len": 32 * 2**stage} for stage in range(1, 9)]
    with dynamo.patch(recompile_limit=8):
        build_engine(load(None, [*MODEL, f"data.seq_len_schedule={json.dumps(stages)}"]).config)
        assert dynamo.recompile_limit == 10  # nine lengths, and evaluation


def test_a_smaller_microbatch_would_be_compiled_once_more(
    tmp_path: Path, run_tiny: RunTiny, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataShard, "padded_rows", lambda self, n_rows, micro_batch: -(-n_rows // self.ranks))
    monkeypatch.setattr(
        loop,
        "split_microbatches",
        lambda batch, size, device: split_microbatches(batch, gcd(len(batch.input_ids), size), device),
    )
    run(run_tiny, tmp_path, compiled, *UNEVEN, "optim.warmup=0", "train.steps=3", "model.n_layers=1")
    assert compiled.compiled_at == [("validation", 0), ("step", 1), ("step", 2)]  # of 2, then of 4 sequences


MODEL = (
    *(
        "model.n_layers=2",
        "model.d_model=32",
        "model.n_heads=4",
        "model.n_kv_heads=2",
        "model.d_ff=64",
        "model.vocab_size=64",
    ),
    *("model.qk_norm=true", "train.steps=9", "train.device=cpu", "train.precision=fp32", "train.compile=true"),
    *("optim.warmup=0", "optim.lr=1e-3", "optim.decay=1"),
)
SEQ_LEN = 96


def batch_of(seed: int, documents: int, rows: int = 2) -> Batch:
    """Rows of as many documents each, cut at random."""
    random = np.random.default_rng(seed)
    ids = random.integers(64, size=(rows, SEQ_LEN + 1), dtype=np.int32)
    document_ids = np.zeros((rows, SEQ_LEN), np.int32)
    for row in document_ids:
        row[random.choice(np.arange(1, SEQ_LEN), documents - 1, replace=False)] = 1
    return Batch(ids[:, :-1], ids[:, 1:], document_ids.cumsum(1, dtype=np.int32))


DOCUMENTS = (5, 1, 2, 40, 3, 60, 7, 1)


def varlen_losses(*args: str, documents: Sequence[int] = DOCUMENTS) -> list[tuple[float, float]]:
    """Training and validation loss of steps on rows of so many documents, with PyTorch's own attention operators."""
    engine = build_engine(load(None, [*MODEL, *args]).config)
    losses = []
    with flash_on_a_cpu():
        for seed, count in enumerate(documents):
            given = list(split_microbatches(to_host(batch_of(seed, count), CPU), 2, CPU))
            losses.append((engine.train_step(given, 1.0).loss, engine.eval_step(given)[0]))
    return losses


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_varlen_attention_is_compiled_once_for_any_number_of_documents(recompute: str, compiled: Compiled) -> None:
    losses = varlen_losses("train.attention=varlen", f"train.recompute={recompute}")
    assert compiled.graphs == 5  # softmax, and a block and the norm with gradients and without: all of the first batch
    eager = varlen_losses("train.attention=sdpa", "train.compile=false")
    assert losses == [pytest.approx(pair, rel=1e-5) for pair in eager]


def test_flash_attn_is_not_compiled_again_for_other_documents(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler leaves it out: blocks are compiled in pieces, none of which may depend on the documents."""

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **documents: Any) -> Tensor:
        assert causal
        return reference_varlen(q, k, v, *list(documents.values())[:4], window_size=(-1, 0))

    monkeypatch.setattr(kernels, "flash_attn_version", lambda _index: 2)
    monkeypatch.setattr(kernels, "_flash_attn_function", lambda _version: flash_attn_varlen_func)
    losses = varlen_losses("train.attention=flash_attn", documents=DOCUMENTS[:1])
    graphs = compiled.graphs
    torch.compiler.reset()
    assert varlen_losses("train.attention=flash_attn", documents=DOCUMENTS[:4])[:1] == losses
    assert compiled.graphs == 2 * graphs


def test_without_marks_other_documents_are_other_graphs(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.model.kernels.Documents.mark_dynamic", lambda self: self)
    varlen_losses("train.attention=varlen", documents=DOCUMENTS[:2])
    assert compiled.graphs == 7  # the block once more, with gradients and without


def graphs_of_a_rank(layout: Layout, args: tuple[str, ...]) -> list[int]:
    """Graphs compiled on this rank after each step and validation. Data ranks get unequal numbers of rows."""
    counts, rank = Compiled(), dist.get_rank()
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch, flash_on_a_cpu():
        count_with(counts, patch)
        engine = build_engine(load(None, [*MODEL, *args]).config, layout, rank)
        share, graphs = DataShard(layout.data_rank(rank), layout.data), []
        for seed, (rows, documents) in enumerate(((8, 5), (5, 40), (9, 1))):
            whole = batch_of(seed, documents, rows)
            mine = slice(share.rows(rows).start, share.rows(rows).stop)
            batch = Batch(whole.input_ids[mine], whole.labels[mine], whole.document_ids[mine])
            given = list(split_microbatches(to_host(pad_batch(batch, share.padded_rows(rows, 2)), CPU), 2, CPU))
            engine.train_step(given, 1.0)
            engine.eval_step(given)
            graphs.append(counts.graphs)
    return graphs


@pytest.mark.parametrize(
    ("layout", "args"),
    [
        (Layout(shard=2, zero=2), ("train.attention=varlen", "train.recompute=full", "train.recompute_every=2")),
        (Layout(pipeline=2, schedule="zbv", stages_per_rank=2), ("train.attention=blocked", "model.n_layers=4")),
        (Layout(tensor=2, sequence=True), ("train.attention=varlen",)),
        (Layout(context=2), ("train.attention=varlen",)),
        (Layout(context=2, context_method="ulysses"), ("train.attention=sdpa",)),
    ],
    ids=str,
)
def test_no_layout_compiles_after_its_first_step_and_validation(
    layout: Layout, args: tuple[str, ...], workers: WorkerPool
) -> None:
    for graphs in workers.run(graphs_of_a_rank, 2, layout, args, timeout=240):
        assert graphs[0] > 0
        assert set(graphs) == {graphs[0]}
