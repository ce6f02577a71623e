"""Peak memory and time of the loss alone: our chunked loss beside one that holds all logits.

Each loss runs in a fresh process. The peak is measured from the moment the inputs exist: by the allocator on CUDA, by
the resident set on Linux CPUs. It is reported with and without the gradients of the two inputs, which every loss has to
return.

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
    """Start a new peak measurement, and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    return read_status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else read_status_bytes("VmHWM")


def read_status_bytes(field: str) -> int:
    """Return a size from /proc/self/status, which counts in kB of 1024 bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_loss(kind: str, V: int, S: int, D: int) -> tuple[int, float]:
    """Return (peak bytes beside the inputs, seconds) of forward and backward.

    Hidden states [S, D] and weight [V, D] are bf16.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    hidden = torch.randn(S, D, device=device).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(V, D, device=device)).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (S,), device=device)
    loss = LOSSES[kind]
    loss(hidden[:8], weight[:8], labels[:8] % 8).backward()  # loads libraries before the measurement
    hidden.grad = weight.grad = None
    synchronize(device)
    before, start = reset_peak(device), time.perf_counter()
    loss(hidden, weight, labels).backward()
    synchronize(device)
    return peak_bytes(device) - before, time.perf_counter() - start


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--only", choices=tuple(LOSSES), help="measure one of the two in this process")
    args = parser.parse_args()
    V, S, D = args.vocabulary, args.sequence, args.width
    if not torch.cuda.is_available() and not STATUS.exists():
        print(f"No measurement: without CUDA the peak memory comes from {STATUS}, which this system does not have.")
        return
    if args.only:
        print(*measure_loss(args.only, V, S, D))
        return
    logits_bytes = 2 * 4 * S * V  # fp32 logits and their gradient
    gradient_bytes = 2 * (V + S) * D
    rows: list[dict[str, object]] = []
    for kind in LOSSES:
        sizes = [f"--{name}={value}" for name, value in (("vocabulary", V), ("sequence", S), ("width", D))]
        command = [sys.executable, "-m", "benchmarks.loss", f"--only={kind}", *sizes]
        peak, seconds = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        rows.append(
            {
                "loss": kind,
                "peak_MB": int(peak) / 1e6,
                "fraction": (int(peak) - gradient_bytes) / logits_bytes,
                "fraction_with_gradients": int(peak) / logits_bytes,
                "seconds": float(seconds),
            }
        )
    sizes_text = f"V={V:,}, S={S:,}, B=1, D={D:,}, bf16"
    title = f"Loss over {sizes_text}; fp32 logits + gradient are {logits_bytes / 1e6:,.0f} MB"
    print_table(title, rows, args.json)


if __name__ == "__main__":
    main()
