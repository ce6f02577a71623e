"""What a mixture of experts learns, and what keeps its load even: small models on the text of `pretrain demo`.

The dense model and the mixture (8 experts, 2 for each token, each half as wide as the dense MLP) multiply each token by
equally many MLP weights. They read the same tokens in the same order, with the same learning rate. They are compared
for three seeds, which change initial values and data order. Then the mixture trains with each other balancing method,
and with none.

The mixture's two weights add up to 1, so each expert's output is halved; `routed_scaling_factor=2` undoes that, and the
layer begins with outputs as large as the dense MLP's.

Load is the number of tokens of the busiest expert over the mean of all experts, counted over the global batch: the mean
over layers and over the last tenth of the steps. With 8 experts and 2 choices it lies between 1 and 4.

Finished cases are kept in `--out`: the same command continues after the last one. Several processes may share the work
with `--only`.

    python -m benchmarks.moe_quality [--json FILE] [--plot FILE] [--out FOLDER] [--steps 400] [--only WORD]
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console

from benchmarks.common import make_parser, print_table
from benchmarks.moe_quality_plot import draw
from data_pipeline.prepare import prepare
from data_pipeline.reading.loader import Loader
from parallel.engine import Engine
from pretrain.cli.demo_steps import demo_config
from pretrain.config import RunConfig
from pretrain.config.loading import validate
from pretrain.estimate.flops import parameter_count
from pretrain.optim.schedule import lr_scale
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import ResolvedRun, resolve_run
from pretrain.train.batching import split_microbatches, to_host
from pretrain.train.inputs import open_data, open_tokenizer

SEEDS = (0, 1, 2)
N_EXPERTS, TOP_K, DENSE_D_FF = 8, 2, 256
MODEL = {
    "n_layers": 4,
    "d_model": 64,
    "n_heads": 2,
    "n_kv_heads": 1,
    "d_ff": DENSE_D_FF,
    "max_seq_len": 256,
    "tie_embeddings": True,
}
COMPUTE = {"precision": "fp32", "compile": False, "attention": "sdpa"}
VALIDATION_SEQUENCES = 256
"""Held-out sequences that every model is validated on."""
VOCABULARY = 1024

BALANCE = {
    "global batch": {"aux_loss_scope": "global_batch"},
    "sequence": {"aux_loss_scope": "sequence"},
    "microbatch": {"aux_loss_scope": "microbatch"},
    "bias": {"aux_loss": 0.0, "expert_bias": True},
    "none": {"aux_loss": 0.0},
}
"""{balancing method: settings of `model.moe`}."""


@dataclass(frozen=True)
class Case:
    """One training run."""

    seed: int
    balance: str | None
    """A method of BALANCE; None is the dense model."""

    @property
    def name(self) -> str:
        """For the table and the file of the result."""
        return f"{'dense' if self.balance is None else self.balance}, seed {self.seed}"


COMPARED = (None, "global batch")
CASES = (
    *(Case(SEEDS[0], balance) for balance in (None, *BALANCE)),
    *(Case(seed, balance) for seed in SEEDS[1:] for balance in COMPARED),
)


@dataclass(frozen=True)
class Result:
    """What a case measured."""

    val_loss: float
    """In nats per token."""
    parameters: int
    active: int
    """Parameters that multiply a token."""
    tokens: int
    seconds: float
    loads: list[list[float]]
    """[steps][layers]; empty for the dense model."""

    @property
    def layer_loads(self) -> list[float]:
        """Load of each layer, mean over the last tenth of the steps."""
        last = self.loads[-max(len(self.loads) // 10, 1) :]
        return [mean(layer) for layer in zip(*last, strict=True)]


def make_config(case: Case, data: Path, steps: int) -> RunConfig:
    """Return the settings of a case."""
    moe = {"n_experts": N_EXPERTS, "top_k": TOP_K, "d_ff": DENSE_D_FF // TOP_K, "routed_scaling_factor": TOP_K}
    experts = {} if case.balance is None else {"architecture": "moe", "moe": moe | BALANCE[case.balance]}
    return validate(
        {
            "run": {"seed": case.seed},
            "data": {"path": str(data), "seq_len": 256},
            "model": MODEL | experts,
            "optim": {"lr": 3e-3, "schedule": "cosine", "warmup": steps // 10},
            "train": {"steps": steps, "batch_size": 8, "micro_batch_size": 4, **COMPUTE},
        }
    )


def run_case(case: Case, data: Path, steps: int, console: Console) -> Result:
    """Train one model and validate it."""
    config = make_config(case, data, steps)
    resolved = resolve_run(config, tokenizer_size=open_tokenizer(config).vocab_size)
    config = resolved.config
    train, validation = open_data(config.data, config.run.seed, resolved.batches)
    assert validation is not None
    engine, loads = build_engine(config), list[list[float]]()
    start = time.monotonic()
    for step in range(1, steps + 1):
        loss, load = train_step(engine, resolved, train, step)
        loads += [load] if load else []
        if step % 50 == 0:
            seconds = time.monotonic() - start
            shown = f", load {mean(load):.2f}" if load else ""
            console.print(f"{case.name}: step {step} of {steps}, loss {loss:.3f}{shown}, {seconds:.0f} s")
    val_loss = validation_loss(engine, resolved, validation)
    total = parameter_count(config.model)
    idle = sum(config.model.moe.has_experts(i) for i in range(config.model.n_layers)) * (
        (N_EXPERTS - TOP_K) * 3 * config.model.d_model * (DENSE_D_FF // TOP_K)
    )
    tokens = steps * config.train.batch_size * config.data.seq_len
    return Result(val_loss, total, total - idle, tokens, time.monotonic() - start, loads)


def train_step(engine: Engine, resolved: ResolvedRun, train: Loader, step: int) -> tuple[float, list[float]]:
    """Take a step. Returns its loss and the load of each layer."""
    config, planned = resolved.config, resolved.batches.batch(step)
    device = torch.device(config.train.device)
    batch = to_host(train.batch(planned.first_sample, planned.n_rows, planned.seq_len), device)
    microbatches = list(split_microbatches(batch, resolved.batches.micro_batch_size(planned.seq_len), device))
    result = engine.train_step(microbatches, lr_scale(step, config.train.steps, config.optim))
    if result.routing is None:
        return result.loss, []
    counts_LE = result.routing[:, :N_EXPERTS]
    return result.loss, (counts_LE.max(1).values / counts_LE.mean(1)).tolist()


def validation_loss(engine: Engine, resolved: ResolvedRun, validation: Loader) -> float:
    """Return the mean cross-entropy over the first held-out sequences."""
    config, (source,) = resolved.config, validation.sizes
    device, size = torch.device(config.train.device), config.train.batch_size
    loss_sum, n_targets = 0.0, 0
    for first in range(0, VALIDATION_SEQUENCES, size):
        batch = to_host(validation.sequential(source, first, size), device)
        result = engine.eval_step(list(split_microbatches(batch, size, device)))
        loss_sum, n_targets = loss_sum + result.loss_sum, n_targets + result.n_targets
    return loss_sum / n_targets


def table_row(case: Case, result: Result) -> dict[str, object]:
    """Return the row of a case."""
    return {
        "case": case.name,
        "val_loss": round(result.val_loss, 4),
        "load": round(mean(result.layer_loads), 3) if result.loads else None,
        "load_by_layer": " ".join(f"{load:.2f}" for load in result.layer_loads),
        "parameters": result.parameters,
        "active": result.active,
        "tokens": result.tokens,
        "seconds": round(result.seconds),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw load and losses as SVG")
    parser.add_argument("--out", type=Path, default=Path("runs/moe-quality"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", default="", metavar="WORD", help="run the cases with this in their name")
    args = parser.parse_args()
    console = Console()
    data = demo_config(args.out).data.model_copy(update={"vocab_size": VOCABULARY})
    prepare(data.path, data)
    results: dict[Case, Result] = {}
    for case in CASES:
        file = args.out / f"{args.steps} steps, {case.name}.json"
        if not file.is_file() and args.only in case.name:
            file.write_text(json.dumps(asdict(run_case(case, data.path, args.steps, console))), encoding="utf-8")
        if file.is_file():
            results[case] = Result(**json.loads(file.read_text(encoding="utf-8")))
    title = f"Mixture of {N_EXPERTS} experts, {TOP_K} of a token, beside the dense model of equal active parameters"
    print_table(title, [table_row(case, result) for case, result in results.items()], args.json)
    if args.plot is not None:
        loads = {
            str(case.balance): [mean(layers) for layers in r.loads]
            for case, r in results.items()
            if r.loads and case.seed == SEEDS[0]
        }
        losses = {
            (case.seed, case.balance is not None): r.val_loss for case, r in results.items() if case.balance in COMPARED
        }
        args.plot.write_text(draw(loads, losses), encoding="utf-8")


if __name__ == "__main__":
    main()
