"""Peak memory and time of the loss alone: ours beside a loss that materialises its logits.

Measured in a fresh process each, from the moment the inputs are there: on CUDA the allocator's peak, on Linux CPUs the peak of the
resident set. It is told with and without the gradients of the two inputs, which every loss has to return.

    python -m benchmarks.loss [--json FILE] [--vocabulary 131072] [--sequence 4096] [--width 2048]
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import make_parser, print_table, synchronize
from pretrain.model.loss import linear_cross_entropy

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "pretrain": lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels).total,
    "materialised": lambda hidden, weight, labels: F.cross_entropy(
        (hidden @ weight.T).float(), labels, reduction="sum"
    ),
}

STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> int:
    """Forget the peak so far; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc(5)
    return _kilobytes("VmRSS") * 1024


def peak(device: torch.device) -> int:
    """Highest bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _kilobytes("VmHWM") * 1024


def _kilobytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def measure(kind: str, V: int, S: int, D: int) -> tuple[int, float]:
    """(peak bytes above the inputs, seconds) of forward and backward over hidden states [S, D] and a weight [V, D] in bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(S, D, device=device).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(V, D, device=device)).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (S,), device=device)
    loss = LOSSES[kind]
    loss(hidden[:8], weight[:8], labels[:8] % 8).backward()  # libraries are loaded before anything is counted
    hidden.grad = weight.grad = None
    synchronize(device)
    before, began = reset_peak(device), time.perf_counter()
    loss(hidden, weight, labels).backward()
    synchronize(device)
    return peak(device) - before, time.perf_counter() - began


def main() -> None:
    arguments = make_parser(__doc__)
    arguments.add_argument("--vocabulary", type=int, default=131_072)
    arguments.add_argument("--sequence", type=int, default=4096)
    arguments.add_argument("--width", type=int, default=2048)
    arguments.add_argument("--only", choices=tuple(LOSSES), help="measure one of the two in this process")
    options = arguments.parse_args()
    V, S, D = options.vocabulary, options.sequence, options.width
    if not torch.cuda.is_available() and not STATUS.exists():
        print(
            f"No measurement: there is neither CUDA nor {STATUS}, and nothing else here tells the peak of the memory."
        )
        return
    if options.only:
        print(*measure(options.only, V, S, D))
        return
    limit = 2 * 4 * S * V
    rows: list[dict[str, object]] = []
    for kind in LOSSES:
        sizes = [f"--{name}={value}" for name, value in (("vocabulary", V), ("sequence", S), ("width", D))]
        command = [sys.executable, "-m", "benchmarks.loss", f"--only={kind}", *sizes]
        size, seconds = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        gradients = 2 * (V + S) * D
        rows.append(
            {
                "loss": kind,
                "peak_MB": int(size) / 1e6,
                "fraction": (int(size) - gradients) / limit,
                "fraction_with_gradients": int(size) / limit,
                "seconds": float(seconds),
            }
        )
    print_table(
        f"Loss over V={V:,}, S={S:,}, B=1, D={D:,}, bf16; fp32 logits + gradient are {limit / 1e6:,.0f} MB",
        rows,
        options.json,
    )


if __name__ == "__main__":
    main()
