"""Every layout beside one process: losses, gradients, their norm and parameters over five AdamW steps from the same seed.

Each row trains a small model (grouped-query attention, QK-norm, biases, packed documents, uneven labels) on one layout of real processes
(gloo), and compares it with the same steps on one process: the loss of every step, every parameter's gradient at every step (norm of the
difference over the norm), the global gradient norm of every step, every parameter after the last step. In fp32 they must agree to
rounding: loss 1e-5, gradients 1e-4, norm 1e-6, parameters 1e-5. In bf16, where another order of sums rounds differently, and with Muon,
which orthogonalises in bf16, losses and norms must agree to 2e-3.

The norm that one process reports is itself held against its gradients, whose squares are added up in fp64: clipped with that norm, they
must have the norm they were clipped to. Sums in fp32 lose more than the tolerance where a tensor is large, so one row has three tensors of
10.5M numbers (`d_ff=10240`).

AdamW's epsilon is Llama 2's 1e-5 (arXiv:2307.09288, section 2.2): with 1e-8 the first steps divide rounding noise by itself wherever a
gradient is smaller than it, and biases start at 0.

    python -m benchmarks.parity [--steps 5] [--only WORD ...] [--json FILE] [--table docs/parity.md]
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.common import parser
from data_pipeline.reading.packing import Batch
from parallel.engine import BuildOptimizer, Microbatch, Optimizer
from parallel.engines.torch.build import build_engine
from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.setup.engine import build_engine_options, build_model_spec
from pretrain.train.batching import microbatches, to_host
from tests.workers import CaseFailed, WorkerPool

CPU = torch.device("cpu")
ROWS, SEQ_LEN, VOCABULARY = 8, 64, 160
CLIP = 1.0
MODEL = (
    *(
        "model.n_layers=4",
        "model.d_model=64",
        "model.n_heads=8",
        "model.n_kv_heads=4",
        "model.head_dim=8",
        "model.d_ff=96",
    ),
    *(f"model.vocab_size={VOCABULARY}", "model.max_seq_len=64", "model.qk_norm=true", "model.qkv_bias=true"),
    *("train.device=cpu", "train.precision=fp32", "train.compile=false", "train.attention=sdpa"),
    *(
        "optim.lr=1e-3",
        "optim.eps=1e-5",
        f"optim.clip={CLIP}",
        "train.z_loss=1e-4",
        f"data.seq_len={SEQ_LEN}",
        f"train.batch_size={ROWS}",
    ),
)
DEEP = ("model.n_layers=8",)
UNEVEN = ("model.n_layers=5",)
TIED = ("model.tie_embeddings=true",)
ODD_SIZES = ("model.d_ff=97", "model.vocab_size=161", "model.n_layers=5")
FEW_HEADS = ("model.n_kv_heads=2",)
WINDOW = ("model.sliding_window=20",)
LARGE = ("model.n_layers=1", "model.d_model=1024", "model.d_ff=10240")
"""Three tensors of 10,485,760 numbers, whose gradients are dense."""
BF16 = ("train.precision=bf16",)
MUON = ("optim.kind=muon",)
TOLERANCES = {"loss_error": 1e-5, "gradient_error": 1e-4, "norm_error": 1e-6, "parameter_error": 1e-5}
BF16_TOLERANCES = {"loss_error": 2e-3, "norm_error": 2e-3}


@dataclass(frozen=True)
class Case:
    """One row: a layout, and what the model and the training differ in from `MODEL`."""

    layout: Layout
    words: tuple[str, ...] = ()
    """Settings that the one process has too."""
    own: tuple[str, ...] = ()
    """Settings that change no number but by rounding: recomputation, kernels, compilation."""
    micro_batch: int = 2
    """Sequences of a microbatch; the one process takes all rows at once."""

    @property
    def name(self) -> str:
        """The layout and what is special about it."""
        layout, plain = self.layout, Layout()
        how = [
            f"{key}={getattr(layout, key)}"
            for key in ("zero", "schedule", "context_method", "reshard_to")
            if _matters(layout, key)
        ]
        how += [key for key in ("sequence", "replicate_kv") if getattr(layout, key)]
        how += [f"stages_per_rank={layout.stages_per_rank}"] if layout.stages_per_rank > plain.stages_per_rank else []
        words = [word.split(".")[-1] for word in (*self.words, *self.own)]
        return " ".join([str(layout), *how, *words, f"micro_batch={self.micro_batch}"])

    @property
    def tolerances(self) -> Mapping[str, float]:
        """What the errors may be. Muon orthogonalises in bf16 whatever the rest is."""
        return BF16_TOLERANCES if self.words in (BF16, MUON) else TOLERANCES


def _matters(layout: Layout, key: str) -> bool:
    axis = {
        "zero": layout.shard,
        "schedule": layout.pipeline,
        "context_method": layout.context,
        "reshard_to": layout.reshard_to or 1,
    }
    return axis[key] > 1


@dataclass
class Course:
    """What five steps were."""

    losses: list[float]
    norms: list[float]
    """Of all gradients, before clipping."""
    gradients: list[dict[str, Tensor]]
    """Of each step, after clipping, whole tensors by canonical name."""
    parameters: dict[str, Tensor]


@dataclass
class Row:
    """What is told of a case."""

    layout: str
    loss_error: float
    gradient_error: float
    norm_error: float
    parameter_error: float
    holds: bool
    seconds: float


def cases() -> list[Case]:
    """Every kind of parallelism alone, every pair of kinds, three at once, and what must compose with them."""
    found = [Case(Layout(replicate=2)), Case(Layout(replicate=4), micro_batch=1)]
    found += [Case(Layout(shard=n, zero=zero), micro_batch=1) for zero in (1, 2, 3) for n in (2, 4)]
    found += [Case(Layout(replicate=2, shard=2, zero=zero), micro_batch=1) for zero in (1, 2, 3)]
    found += [
        Case(Layout(shard=4, reshard_to=2), TIED),
        Case(Layout(shard=4, tensor=2, sequence=True, reshard_to=2), micro_batch=1),
        Case(Layout(shard=4), ODD_SIZES),
        Case(Layout(shard=8), micro_batch=1),
        Case(Layout(shard=2), LARGE, micro_batch=4),
    ]
    found += [Case(Layout(tensor=n)) for n in (2, 4)]
    found += [Case(Layout(tensor=n, sequence=True), TIED if n == 4 else ()) for n in (2, 4)]
    found += [Case(Layout(tensor=4, sequence=True, replicate_kv=True), FEW_HEADS)]
    for schedule in ("gpipe", "1f1b"):
        found += [Case(Layout(pipeline=n, schedule=schedule), UNEVEN if n == 2 else (), micro_batch=1) for n in (2, 4)]
    for schedule in ("interleaved", "interleaved_zero_bubble", "zbv"):
        found += [
            Case(Layout(pipeline=n, schedule=schedule, stages_per_rank=2, zero=2), DEEP, micro_batch=1) for n in (2, 4)
        ]
    found += [
        Case(Layout(pipeline=2, schedule=schedule, stages_per_rank=k, zero=2), TIED, micro_batch=1)
        for schedule, k in (("1f1b", 1), ("zbv", 2))
    ]
    found += [Case(Layout(context=n, context_method=method)) for n in (2, 4) for method in ("gather", "ulysses")]
    found += [Case(Layout(context=2, context_method=method), WINDOW) for method in ("gather", "ulysses")]
    found += [Case(Layout(context=2), own=("train.attention=blocked",))]
    pairs = [
        Layout(shard=2, tensor=2, sequence=True),
        Layout(shard=2, pipeline=2),
        Layout(shard=2, pipeline=2, zero=2),
        Layout(tensor=2, sequence=True, pipeline=2),
        Layout(shard=2, context=2),
        Layout(tensor=2, sequence=True, context=2),
        Layout(tensor=2, context=2, context_method="ulysses"),
        Layout(pipeline=2, context=2),
        Layout(shard=2, tensor=2, sequence=True, pipeline=2),
        Layout(shard=2, tensor=2, pipeline=2, schedule="zbv", stages_per_rank=2),
    ]
    found += [
        Case(layout, TIED if layout.pipeline > 1 and layout.tensor > 1 else (), micro_batch=1) for layout in pairs
    ]
    found += [
        Case(Layout(shard=2), own=("train.recompute=full",)),
        Case(Layout(shard=2, tensor=2, sequence=True), own=("train.recompute=selective",)),
        Case(Layout(tensor=2, context=2), own=("train.recompute=full", "train.recompute_every=2")),
        Case(Layout(pipeline=2, shard=2), TIED, own=("train.recompute=selective",), micro_batch=1),
        Case(
            Layout(pipeline=2, schedule="interleaved", stages_per_rank=2, zero=2),
            own=("train.recompute=full",),
            micro_batch=1,
        ),
        Case(
            Layout(pipeline=2, schedule="zbv", stages_per_rank=2, zero=2), own=("train.recompute=full",), micro_batch=1
        ),
        Case(
            Layout(tensor=2, pipeline=2, schedule="interleaved_zero_bubble", stages_per_rank=2),
            own=("train.recompute=selective",),
            micro_batch=1,
        ),
    ]
    in_bf16 = [
        Layout(shard=2),
        Layout(replicate=2, shard=2, zero=1),
        Layout(tensor=2, sequence=True),
        Layout(pipeline=2),
        Layout(pipeline=2, schedule="zbv", stages_per_rank=2, zero=2),
        Layout(context=2),
        Layout(context=2, context_method="ulysses"),
        Layout(shard=2, tensor=2, sequence=True, pipeline=2),
    ]
    found += [Case(layout, BF16, micro_batch=1) for layout in in_bf16]
    return found + [
        Case(layout, MUON, micro_batch=1)
        for layout in (Layout(shard=2), Layout(tensor=2, sequence=True), Layout(pipeline=2))
    ]


def batch_of(step: int) -> Batch:
    """A global batch of packed documents, different at each step. Rows have between 1 and all of their labels."""
    random = np.random.default_rng(step)
    ids = random.integers(VOCABULARY, size=(ROWS, SEQ_LEN + 1), dtype=np.int32)
    document_ids = (random.random((ROWS, SEQ_LEN)) < 1 / 16).cumsum(1, dtype=np.int32)
    ends = np.diff(document_ids, axis=1, append=-1) != 0
    kept = np.arange(SEQ_LEN) < random.integers(1, SEQ_LEN + 1, size=(ROWS, 1))
    return Batch(ids[:, :-1], np.where(ends | ~kept, -100, ids[:, 1:]).astype(np.int32), document_ids)


def part_of(batch: Batch, data_rank: int, n_data: int, size: int) -> list[Microbatch]:
    """The microbatches of one data rank."""
    rows = slice(data_rank * ROWS // n_data, (data_rank + 1) * ROWS // n_data)
    mine = Batch(batch.input_ids[rows], batch.labels[rows], batch.document_ids[rows])
    return list(microbatches(to_host(mine, CPU), size, CPU))


@dataclass
class Recorder:
    """An optimizer that keeps the gradients it was given."""

    inner: Optimizer
    parameters: Mapping[str, nn.Parameter]
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def set_lr(self, scale: float) -> None:
        """As the inner one."""
        self.inner.set_lr(scale)

    def step(self) -> None:
        """Keep whole gradients; all ranks of a mesh must come here together."""
        self.gradients.append({name: whole(p.grad) for name, p in self.parameters.items() if p.grad is not None})
        self.inner.step()

    def zero_grad(self) -> None:
        """As the inner one."""
        self.inner.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """As the inner one."""
        return self.inner.state()


def whole(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def config_of(words: Iterable[str]) -> RunConfig:
    """Settings of a case."""
    return load(None, [*MODEL, *words]).config


def course(config: RunConfig, layout: Layout, rank: int, micro_batch: int, steps: int) -> Course:
    """Train on this rank."""
    spec, recorders = build_model_spec(config), list[Recorder]()

    def build_recorder(named: Iterable[tuple[str, nn.Parameter]]) -> Recorder:
        parameters = dict(named)
        recorders.append(Recorder(spec.build_optimizer(parameters.items()), parameters))
        return recorders[0]

    build: BuildOptimizer = build_recorder
    engine = build_engine(
        replace(spec, build_optimizer=build), build_engine_options(config), layout=layout, rank=rank, device=CPU
    )
    mine = (part_of(batch_of(step), layout.data_rank(rank), layout.data, micro_batch) for step in range(steps))
    results = [engine.train_step(microbatches, lr_scale=1.0) for microbatches in mine]
    parameters = {name: whole(parameter) for name, parameter in recorders[0].parameters.items()}
    return Course([r.loss for r in results], [r.grad_norm for r in results], recorders[0].gradients, parameters)


@cache
def alone(words: tuple[str, ...], steps: int) -> Course:
    """The same steps on one process, all rows at once."""
    return course(config_of(words), Layout(), rank=0, micro_batch=ROWS, steps=steps)


def on_rank(case: Case, steps: int) -> Course | None:
    """What a worker runs. Of ranks that hold the same layers only the first one answers."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(
        logging.ERROR
    )  # it minds how whole tensors are put together
    rank = torch.distributed.get_rank()
    at = case.layout.coordinates(rank)
    trained = course(config_of([*case.words, *case.own]), case.layout, rank, case.micro_batch, steps)
    return None if any(place for axis, place in at.items() if axis != "pipeline") else trained


def compare(ranks: Sequence[Course | None], reference: Course) -> dict[str, float]:
    """The largest relative error of each kind; a missing parameter is an infinite one."""
    courses = [each for each in ranks if each is not None]
    losses = [abs(a - b) / abs(b) for each in courses for a, b in zip(each.losses, reference.losses, strict=True)]
    gradients = [
        error
        for step, expected in enumerate(reference.gradients)
        for error in _distances([each.gradients[step] for each in courses], expected)
    ]
    norms = [abs(a - b) / b for each in courses for a, b in zip(each.norms, reference.norms, strict=True)]
    norms += [
        abs(exact_norm(gradients) / (norm * min(1, CLIP / (norm + 1e-6))) - 1)  # as `parallel.gradients` clips
        for gradients, norm in zip(reference.gradients, reference.norms, strict=True)
    ]
    parameters = _distances([each.parameters for each in courses], reference.parameters)
    found = {"loss_error": losses, "gradient_error": gradients, "norm_error": norms, "parameter_error": parameters}
    return {kind: max(errors) for kind, errors in found.items()}


def exact_norm(gradients: Mapping[str, Tensor]) -> float:
    """The global norm of whole gradients, added up in fp64."""
    return sum(gradient.double().square().sum().item() for gradient in gradients.values()) ** 0.5


def _distances(stages: Sequence[Mapping[str, Tensor]], expected: Mapping[str, Tensor]) -> list[float]:
    """Of every stage that holds a parameter: a tied one is held by two, which must agree."""
    found = [(name, tensor) for stage in stages for name, tensor in stage.items()]
    if {name for name, _ in found} != expected.keys():
        return [float("inf")]
    return [
        ((tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)).item() for name, tensor in found
    ]


def run(case: Case, pool: WorkerPool, steps: int) -> Row:
    """Train both ways and compare."""
    began = time.perf_counter()
    try:
        errors = compare(pool.run(on_rank, case.layout.world_size, case, steps, timeout=180), alone(case.words, steps))
    except CaseFailed as failure:  # the other rows are worth having
        print(failure, flush=True)
        errors = dict.fromkeys(TOLERANCES, float("inf"))
    holds = all(errors[kind] <= tolerance for kind, tolerance in case.tolerances.items())
    return Row(case.name, **errors, holds=holds, seconds=time.perf_counter() - began)


def table(rows: Sequence[Row], steps: int) -> str:
    """docs/parity.md."""
    assert __doc__ is not None
    title, _, rest = __doc__.partition("\n\n")
    head = [f"# {title}", "", rest.partition("    python")[0].strip(), ""]
    head += [
        f"{sum(row.holds for row in rows)} of {len(rows)} layouts hold, over {steps} steps, torch {torch.__version__}.",
        "",
    ]
    lines = ["| layout | loss | gradients | norm | parameters | |", "|---|---|---|---|---|---|"]
    for row in rows:
        errors = " | ".join(
            f"{error:.1e}" for error in (row.loss_error, row.gradient_error, row.norm_error, row.parameter_error)
        )
        lines.append(f"| {row.layout} | {errors} | {'holds' if row.holds else 'FAILS'} |")
    return "\n".join([*head, *lines, "", "Made by `python -m benchmarks.parity --table docs/parity.md`.", ""])


def main() -> int:
    """Exit code 1 if a row does not hold."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=5, help="AdamW steps of each case")
    arguments.add_argument("--only", nargs="+", default=[], help="cases whose name holds all of these words")
    arguments.add_argument("--table", type=Path, help="write the table to this Markdown file")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in cases() if all(word in case.name.split() for word in options.only)]
    if not chosen:
        arguments.error(
            f"no case has all of the words {' '.join(options.only)}; words are such as pipeline=2 or schedule=zbv"
        )
    rows = []
    with WorkerPool() as pool:
        for case in chosen:
            rows.append(run(case, pool, options.steps))
            row = rows[-1]
            print(
                f"{'holds' if row.holds else 'FAILS'}  loss {row.loss_error:.1e}  gradients {row.gradient_error:.1e}  "
                f"norm {row.norm_error:.1e}  parameters {row.parameter_error:.1e}  {row.seconds:5.1f} s  {row.layout}",
                flush=True,
            )
    if options.table:
        options.table.write_text(table(rows, options.steps), encoding="utf-8")
    if options.json:
        Path(options.json).write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
