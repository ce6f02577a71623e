"""Stage 3: the kernels of the 1B model's step, one by one, in bf16 on random numbers.

A large square matmul (the machine's peak), the matmuls of a block forward and backward at 32,768 rows, a copy (the
memory bandwidth), attention forward and backward with each kernel, and the chunked loss at several chunk sizes. Each
row has its share of the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import matmul_peak
from benchmarks.gpu.stage import MEAN_DOCUMENT_TOKENS, StageContext, median_seconds, override_loss_chunks
from pretrain.config import ModelConfig
from pretrain.model import loss
from pretrain.model.attention import attention, document_mask


@dataclass(frozen=True)
class Sizes:
    """Sizes of the kernels. The defaults are those of the 1B preset."""

    rows: int = 32_768
    seq_len: int = 4096
    width: int = 2048
    hidden: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128_256
    copied: int = 2**30
    """bf16 elements of the copy."""
    chunks: tuple[int, ...] = (256, 1024, 4096)
    """Rows of logits in a chunk of the loss."""


SMALL = Sizes(
    rows=256, seq_len=128, width=64, hidden=128, heads=4, kv_heads=2, vocabulary=512, copied=2**16, chunks=(32, 128)
)
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, S, H, K], k and v [B, S, G, K] -> [B, S, H, K]."""


def random_bf16(stage: StageContext, *shape: int) -> Tensor:
    return torch.randn(shape, device=stage.device).bfloat16()


def matmul_cases(stage: StageContext, sizes: Sizes, peak: float) -> None:
    """Time y = x W' for each weight of a block, and the two matmuls of its backward pass."""
    kv_width = sizes.kv_heads * (sizes.width // sizes.heads)
    weights = {
        "q_proj, o_proj": (sizes.width, sizes.width),
        "k_proj, v_proj": (sizes.width, kv_width),
        "gate_proj, up_proj": (sizes.width, sizes.hidden),
        "down_proj": (sizes.hidden, sizes.width),
    }
    for name, (n_in, n_out) in weights.items():
        x, weight, grad = (
            random_bf16(stage, sizes.rows, n_in),
            random_bf16(stage, n_out, n_in),
            random_bf16(stage, sizes.rows, n_out),
        )
        passes = {
            "forward": partial(torch.mm, x, weight.T),
            "dgrad": partial(torch.mm, grad, weight),
            "wgrad": partial(torch.mm, grad.T, x),
        }
        for direction, matmul in passes.items():
            seconds = median_seconds(matmul, stage.device)
            rate = 2 * sizes.rows * n_in * n_out / seconds
            stage.add_row(
                what=f"product {name}, {direction}", ms=seconds * 1e3, TFLOPs=rate / 1e12, of_peak=rate / peak
            )


def attention_cases(stage: StageContext, sizes: Sizes, peak: float) -> None:
    """Time forward and backward of every attention kernel, at the preset's head width and twice that."""
    for head_dim in (sizes.width // sizes.heads, 2 * sizes.width // sizes.heads):
        H, G = sizes.width // head_dim, max(1, sizes.kv_heads * sizes.width // sizes.heads // head_dim)
        B, S = sizes.rows // sizes.seq_len, sizes.seq_len
        q, k, v = (random_bf16(stage, B, S, n, head_dim).requires_grad_() for n in (H, G, G))
        grad = random_bf16(stage, B, S, H, head_dim)
        # Forward: two matmuls over half of the S x S scores. Backward: five.
        flops = (2 + 5) * 2 * B * H * S * S * head_dim / 2
        for name, forward in attention_kernels(
            stage, ModelConfig(n_heads=H, n_kv_heads=G, head_dim=head_dim), B, S
        ).items():
            label = f"attention {name}, head width {head_dim}"
            try:
                seconds = median_seconds(partial(forward_backward, forward, q, k, v, grad), stage.device)
            except (RuntimeError, ValueError) as error:  # a kernel that does not run here becomes a row
                stage.add_row(what=label, error=str(error).splitlines()[0][:200])
                continue
            is_packed = "packed" in name  # most scores are not computed, so the FLOPs are unknown
            rates = {} if is_packed else {"TFLOPs": flops / seconds / 1e12, "of_peak": flops / seconds / peak}
            stage.add_row(what=label, ms=seconds * 1e3, **rates)


def attention_kernels(stage: StageContext, config: ModelConfig, B: int, S: int) -> dict[str, Forward]:
    """Return every kernel by name: ours with one document in a row and with packed rows, PyTorch's without a mask."""
    cuda = stage.device.type == "cuda"
    positions = torch.arange(S, dtype=torch.int32).expand(B, S)
    rows = {
        "one document a row": torch.zeros(B, S, dtype=torch.int32),
        "packed": (torch.rand(B, S) < 1 / MEAN_DOCUMENT_TOKENS).cumsum(1).int(),
    }
    kernels: dict[str, Forward] = {}
    for kernel in ("varlen", "flash_attn") if cuda else ("sdpa",):
        for name, document_ids in rows.items():
            mask = document_mask(document_ids, positions, kernel, config).to(stage.device)
            kernels[f"{kernel}, {name}"] = partial(attention, mask=mask)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if cuda else (SDPBackend.MATH,):
        kernels[f"SDPA {backend.name}"] = partial(sdpa, backend=backend)
    return kernels


def forward_backward(forward: Forward, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> object:
    return torch.autograd.grad(forward(q, k, v), (q, k, v), grad)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend) -> Tensor:
    """Return causal attention by one of PyTorch's backends, with the shapes of ours: [B, S, H, K]."""
    with sdpa_kernel([backend]):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def loss_cases(stage: StageContext, sizes: Sizes, peak: float) -> None:
    """Time the output layer with its loss, forward and backward, at each chunk size and at that of training."""
    hidden = random_bf16(stage, sizes.rows, sizes.width).requires_grad_()
    weight = (
        (torch.randn(sizes.vocabulary, sizes.width, device=stage.device) / sizes.width**0.5).bfloat16().requires_grad_()
    )
    labels = torch.randint(sizes.vocabulary, (sizes.rows,), device=stage.device)
    softmax = torch.compile(loss.softmax_gradient_, disable=stage.small)

    def step() -> object:
        return torch.autograd.grad(
            loss.linear_cross_entropy(hidden, weight, labels, 0.0, softmax).total, (hidden, weight)
        )

    for rows in (None, *sizes.chunks):
        with override_loss_chunks(None if rows is None else sizes.rows // rows):
            chunk_rows = sizes.rows // loss._chunks(sizes.rows * sizes.vocabulary, stage.device)
            seconds, gib = median_seconds(step, stage.device, repeats=5, warm_up=2), peak_gib(step, stage.device)
        rate = 3 * 2 * sizes.rows * sizes.width * sizes.vocabulary / seconds
        name = f"loss, {chunk_rows} rows a chunk{' (as trained)' if rows is None else ''}"
        stage.add_row(what=name, ms=seconds * 1e3, TFLOPs=rate / 1e12, of_peak=rate / peak, peak_GiB=gib)


def peak_gib(step: Callable[[], object], device: torch.device) -> float | None:
    """Return the most GiB that a call allocates; None on a CPU, whose allocator does not count."""
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_case(stage: StageContext, sizes: Sizes) -> None:
    """Measure the memory bandwidth with a large copy on the device."""
    source = random_bf16(stage, sizes.copied)
    target = torch.empty_like(source)
    seconds = median_seconds(partial(target.copy_, source), stage.device)
    stage.add_row(what="copy", ms=seconds * 1e3, GBs_read_and_written=2 * source.nbytes / seconds / 1e9)


def main() -> None:
    stage = StageContext(__doc__)
    sizes = SMALL if stage.small else Sizes()
    torch.manual_seed(0)
    peak = matmul_peak(stage.device, torch.bfloat16)
    stage.add_row(what="matmul peak", TFLOPs=peak / 1e12)
    copy_case(stage, sizes)
    matmul_cases(stage, sizes, peak)
    attention_cases(stage, sizes, peak)
    loss_cases(stage, sizes, peak)


if __name__ == "__main__":
    main()
