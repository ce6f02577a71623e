"""Parity of every layout with one process: losses, gradients, gradient norms and parameters over five AdamW steps.

Each row trains a small model (grouped-query attention, QK-norm, biases, packed documents, uneven labels) on one layout
of real processes (gloo) and compares it with the same steps on one process from the same seed: the loss of every step,
every parameter's gradient at every step (norm of the difference over the norm), the global gradient norm of every step,
every parameter after the last step. In fp32 they must agree to rounding: loss 1e-5, gradients 1e-4, norm 1e-6,
parameters 1e-5. Mixtures of experts: the number of tokens of each expert must be the same (load), and auxiliary losses,
entropy and dropped tokens agree to 1e-5 (balance); parameters include the routers' biases and the load that they
remember. In bf16, where another order of sums rounds differently, and with Muon, which orthogonalizes in bf16,
losses and norms must agree to 2e-3.

The norm that the single process reports is checked as well: its clipped gradients, summed in fp64, must have the norm
that clipping promises. Sums in fp32 lose more than the tolerance where a tensor is large, so one row has three tensors
of 10.5M elements (`d_ff=10240`).

AdamW's epsilon is Llama 2's 1e-5 (arXiv:2307.09288, section 2.2): with 1e-8 the first steps divide rounding noise by
itself wherever a gradient is smaller than it, and biases start at 0.

    python -m benchmarks.parity [--steps 5] [--only WORD ...] [--json FILE] [--table docs/parity.md]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import make_parser
from benchmarks.parity.cases import TOLERANCES, Case, all_cases
from benchmarks.parity.compare import compare, train_case, train_reference
from tests.workers import CaseFailed, WorkerPool


@dataclass
class CaseResult:
    """The errors of a case. The fields are those of the JSON file."""

    layout: str
    loss_error: float
    gradient_error: float
    norm_error: float
    parameter_error: float
    holds: bool
    seconds: float
    load_error: float | None = None
    """None for models without experts, as `balance_error`."""
    balance_error: float | None = None


def run_case(case: Case, pool: WorkerPool, steps: int) -> CaseResult:
    """Train a case on its layout and on one process, and compare them. A case that crashes has infinite errors."""
    start = time.perf_counter()
    try:
        traces = pool.run(train_case, case.layout.world_size, case, steps, timeout=180)
        errors = compare(traces, train_reference(case.settings, steps))
    except CaseFailed as failure:  # go on: the other rows are worth having
        print(failure, flush=True)
        errors = dict.fromkeys(TOLERANCES, float("inf"))
    holds = all(errors.get(kind, 0) <= tolerance for kind, tolerance in case.tolerances.items())
    return CaseResult(case.name, **errors, holds=holds, seconds=time.perf_counter() - start)


def markdown_table(results: Sequence[CaseResult], steps: int) -> str:
    """Return the text of docs/parity.md."""
    assert __doc__ is not None
    title, _, rest = __doc__.partition("\n\n")
    n_held = sum(result.holds for result in results)
    lines = [
        *(f"# {title}", "", rest.partition("    python")[0].strip(), ""),
        *(f"{n_held} of {len(results)} layouts hold, over {steps} steps, torch {torch.__version__}.", ""),
        *("| layout | loss | gradients | norm | parameters | load | balance | |", "|---|---|---|---|---|---|---|---|"),
    ]
    for result in results:
        errors = [getattr(result, kind) for kind in TOLERANCES]
        cells = " | ".join("" if error is None else f"{error:.1e}" for error in errors)
        lines.append(f"| {result.layout} | {cells} | {'holds' if result.holds else 'FAILS'} |")
    return "\n".join([*lines, "", "Made by `python -m benchmarks.parity --table docs/parity.md`.", ""])


def main() -> int:
    """Run the cases. The exit code is 1 if one does not hold."""
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="AdamW steps of each case")
    parser.add_argument("--only", nargs="+", default=[], help="run the cases whose name contains all of these words")
    parser.add_argument("--table", type=Path, help="write the table to this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    selected = [case for case in all_cases() if all(word in case.name.split() for word in args.only)]
    if not selected:
        parser.error(f"no case has all of the words {' '.join(args.only)}; try pipeline=2 or schedule=zbv")
    results = []
    with WorkerPool() as pool:
        for case in selected:
            result = run_case(case, pool, args.steps)
            results.append(result)
            print(
                f"{'holds' if result.holds else 'FAILS'}  loss {result.loss_error:.1e}  "
                f"gradients {result.gradient_error:.1e}  norm {result.norm_error:.1e}  "
                f"parameters {result.parameter_error:.1e}  "
                + (f"balance {result.balance_error:.1e}  " if result.balance_error is not None else "")
                + f"{result.seconds:5.1f} s  {result.layout}",
                flush=True,
            )
    if args.table:
        args.table.write_text(markdown_table(results, args.steps), encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps([vars(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
