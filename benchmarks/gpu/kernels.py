"""Stage 3: what the 1B model's step is made of, kernel by kernel, in bf16 on random numbers.

A large square matrix product (the machine's peak), the products of a block forward and backward at 32,768 rows, a copy (the memory's
peak), attention forward and backward with each kernel, and the chunked loss at several chunk sizes. Each row has its share of the peak.
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
from benchmarks.gpu.stage import MEAN_DOCUMENT, StageContext, loss_in_chunks, seconds_of
from pretrain.config import ModelConfig
from pretrain.model import loss
from pretrain.model.attention import attention, document_mask


@dataclass(frozen=True)
class Sizes:
    """Of the 1B preset, or small ones."""

    rows: int = 32_768
    seq_len: int = 4096
    width: int = 2048
    hidden: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128_256
    copied: int = 2**30
    """bf16 numbers."""
    chunks: tuple[int, ...] = (256, 1024, 4096)
    """Rows of logits at a time."""


SMALL = Sizes(
    rows=256, seq_len=128, width=64, hidden=128, heads=4, kv_heads=2, vocabulary=512, copied=2**16, chunks=(32, 128)
)
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, S, H, K], k and v [B, S, G, K] -> [B, S, H, K]."""


def random(stage: StageContext, *shape: int) -> Tensor:
    return torch.randn(shape, device=stage.device).bfloat16()


def products(stage: StageContext, sizes: Sizes, peak: float) -> None:
    """y = x W' for each weight of a block, and the two products of its backward pass."""
    kv_width = sizes.kv_heads * (sizes.width // sizes.heads)
    weights = {
        "q_proj, o_proj": (sizes.width, sizes.width),
        "k_proj, v_proj": (sizes.width, kv_width),
        "gate_proj, up_proj": (sizes.width, sizes.hidden),
        "down_proj": (sizes.hidden, sizes.width),
    }
    for name, (n_in, n_out) in weights.items():
        x, weight, grad = random(stage, sizes.rows, n_in), random(stage, n_out, n_in), random(stage, sizes.rows, n_out)
        passes = {
            "forward": partial(torch.mm, x, weight.T),
            "dgrad": partial(torch.mm, grad, weight),
            "wgrad": partial(torch.mm, grad.T, x),
        }
        for which, product in passes.items():
            seconds = seconds_of(product, stage.device)
            rate = 2 * sizes.rows * n_in * n_out / seconds
            stage.row(what=f"product {name}, {which}", ms=seconds * 1e3, TFLOPs=rate / 1e12, of_peak=rate / peak)


def attention_cases(stage: StageContext, sizes: Sizes, peak: float) -> None:
    """Forward and backward of every kernel that runs here, at the preset's head width and twice that."""
    for head_dim in (sizes.width // sizes.heads, 2 * sizes.width // sizes.heads):
        H, G = sizes.width // head_dim, max(1, sizes.kv_heads * sizes.width // sizes.heads // head_dim)
        B, S = sizes.rows // sizes.seq_len, sizes.seq_len
        q, k, v = (random(stage, B, S, n, head_dim).requires_grad_() for n in (H, G, G))
        grad = random(stage, B, S, H, head_dim)
        # Forward: two products over half of the S x S scores. Backward: five.
        flops = (2 + 5) * 2 * B * H * S * S * head_dim / 2
        for name, forward in attention_kernels(
            stage, ModelConfig(n_heads=H, n_kv_heads=G, head_dim=head_dim), B, S
        ).items():
            label = f"attention {name}, head width {head_dim}"
            try:
                seconds = seconds_of(partial(forward_backward, forward, q, k, v, grad), stage.device)
            except (RuntimeError, ValueError) as error:  # a kernel that does not run here is a result too
                stage.row(what=label, error=str(error).splitlines()[0][:200])
                continue
            masked = "packed" in name  # most of the scores are not computed: no rate
            rates = {} if masked else {"TFLOPs": flops / seconds / 1e12, "of_peak": flops / seconds / peak}
            stage.row(what=label, ms=seconds * 1e3, **rates)


def attention_kernels(stage: StageContext, config: ModelConfig, B: int, S: int) -> dict[str, Forward]:
    """Every kernel by name, with the mask of one document a row and of packed rows where it takes one."""
    cuda = stage.device.type == "cuda"
    positions = torch.arange(S, dtype=torch.int32).expand(B, S)
    rows = {
        "one document a row": torch.zeros(B, S, dtype=torch.int32),
        "packed": (torch.rand(B, S) < 1 / MEAN_DOCUMENT).cumsum(1).int(),
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
    """Causal attention by one of PyTorch's backends, [B, S, H, K] as ours."""
    with sdpa_kernel([backend]):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def loss_cases(stage: StageContext, sizes: Sizes, peak: float) -> None:
    """The output layer with its loss, forward and backward, at each chunk size, and at the one that training takes."""
    hidden = random(stage, sizes.rows, sizes.width).requires_grad_()
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
        with loss_in_chunks(None if rows is None else sizes.rows // rows):
            used = sizes.rows // loss._chunks(sizes.rows * sizes.vocabulary, stage.device)
            seconds, gib = seconds_of(step, stage.device, repeats=5, warm_up=2), peak_gib(step, stage.device)
        rate = 3 * 2 * sizes.rows * sizes.width * sizes.vocabulary / seconds
        name = f"loss, {used} rows a chunk{' (as trained)' if rows is None else ''}"
        stage.row(what=name, ms=seconds * 1e3, TFLOPs=rate / 1e12, of_peak=rate / peak, peak_GiB=gib)


def peak_gib(step: Callable[[], object], device: torch.device) -> float | None:
    """GiB that a call takes at most beside what was there before; None on a CPU, which does not tell."""
    if device.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_case(stage: StageContext, sizes: Sizes) -> None:
    """Memory bandwidth of a large copy on the device."""
    source = random(stage, sizes.copied)
    target = torch.empty_like(source)
    seconds = seconds_of(partial(target.copy_, source), stage.device)
    stage.row(what="copy", ms=seconds * 1e3, GBs_read_and_written=2 * source.nbytes / seconds / 1e9)


def main() -> None:
    stage = StageContext(__doc__)
    sizes = SMALL if stage.small else Sizes()
    torch.manual_seed(0)
    peak = matmul_peak(stage.device, torch.bfloat16)
    stage.row(what="matmul peak", TFLOPs=peak / 1e12)
    copy_case(stage, sizes)
    products(stage, sizes, peak)
    attention_cases(stage, sizes, peak)
    loss_cases(stage, sizes, peak)


if __name__ == "__main__":
    main()
