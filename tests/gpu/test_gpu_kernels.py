"""Attention kernels and the loss on a CUDA GPU, against fp32 on the CPU and fp64: values, gradients, memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model.attention import attention, context_parallel_mask, document_mask
from pretrain.model.kernels import choose_backend, flash_attn_version
from pretrain.model.loss import SoftmaxGradient, linear_cross_entropy, softmax_gradient_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none here"),
]

CUDA = torch.device("cuda")
B, S, K = 3, 320, 64
KERNELS = ["sdpa", "varlen", "flash_attn"]


def needs(kernel: str) -> None:
    if kernel == "flash_attn" and flash_attn_version() is None:
        pytest.skip("the flash-attn package is not installed, or not for this GPU")


def relative(x: Tensor, wanted: Tensor) -> float:
    """Error as a fraction of the norm, in fp64."""
    x, wanted = x.detach().cpu().double(), wanted.detach().cpu().double()
    return float((x - wanted).norm() / wanted.norm())


def packed_rows(lengths: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """(document ids, positions) of rows packed from documents of these lengths."""
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    positions = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    return torch.stack(ids).int(), torch.stack(positions).int()


PACKED = packed_rows(((100, 1, 219), (320,), (7, 64, 128, 121)))


def heads(G: int, H: int = 4) -> list[Tensor]:
    """q, k, v and the gradient of the output. bf16 represents the numbers exactly, so only the kernels differ."""
    generator = torch.Generator().manual_seed(G)
    return [torch.randn(B, S, n, K, generator=generator).bfloat16().float() for n in (H, G, G, H)]


WHOLE = ((0, S),)
"""All tokens of a row."""


def tokens_of(ranges: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat([torch.arange(first, end) for first, end in ranges])


def run(
    kernel: str,
    tensors: list[Tensor],
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    ranges: tuple[tuple[int, int], ...] = WHOLE,
) -> list[Tensor]:
    """The output for the queries of the ranges, and the gradients of q, k and v."""
    config = ModelConfig(n_heads=4, n_kv_heads=tensors[1].shape[2], head_dim=K, sliding_window=window)
    mask = context_parallel_mask(*PACKED, kernel, config, ranges, full_rows=ranges == WHOLE).to(device)
    q, k, v, grad = tensors
    q, k, v, grad = (
        x.to(device, dtype, copy=True).requires_grad_()
        for x in (q[:, tokens_of(ranges)], k, v, grad[:, tokens_of(ranges)])
    )
    out = attention(q, k, v, mask)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_attention_over_packed_documents_matches_fp32_on_the_cpu(kernel: str, G: int, window: int | None) -> None:
    needs(kernel)
    tensors = heads(G)
    out, *gradients = run(kernel, tensors, window, CUDA, torch.bfloat16)
    wanted_out, *wanted = run("sdpa", tensors, window, torch.device("cpu"), torch.float32)
    assert (
        relative(out, wanted_out) < 1e-2
    )  # bf16 keeps 8 bits: probabilities and results are each rounded by up to 0.4%
    for ours, reference in zip(gradients, wanted, strict=True):
        assert relative(ours, reference) < 2e-2  # through the rounded output as well


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    "ranges", [((40, 80), (240, 280)), ((0, 1), (150, 200), (319, 320))], ids=["a chunk and its mirror", "uneven"]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_of_some_ranges_attend_as_in_the_full_row(
    kernel: str, ranges: tuple[tuple[int, int], ...], window: int | None
) -> None:
    needs(kernel)
    q, k, v, grad = heads(2)
    here = tokens_of(ranges)
    torch.empty(2**26, dtype=torch.bfloat16, device=CUDA).fill_(
        torch.nan
    )  # a kernel that leaves gradients unwritten returns this memory
    found = run(kernel, [q, k, v, grad], window, CUDA, torch.bfloat16, ranges)
    elsewhere = torch.ones(S, dtype=torch.bool).index_fill(0, here, False)
    out, grad_q, *others = run(
        "sdpa", [q, k, v, grad.masked_fill(elsewhere[:, None, None], 0)], window, torch.device("cpu"), torch.float32
    )
    for ours, reference in zip(found, (out[:, here], grad_q[:, here], *others), strict=True):
        assert relative(ours, reference) < 2e-2  # as above


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("G", [4, 2])
def test_fp32_attention_matches_the_cpu_to_1e4(G: int, window: int | None) -> None:
    tensors = heads(G)
    wanted = run("sdpa", tensors, window, torch.device("cpu"), torch.float32)
    for ours, reference in zip(run("sdpa", tensors, window, CUDA, torch.float32), wanted, strict=True):
        assert relative(ours, reference) < 1e-4  # TF32 would be 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_window_off_by_one_is_detected(kernel: str) -> None:
    needs(kernel)
    tensors = heads(2)
    wanted = run("sdpa", tensors, 6, torch.device("cpu"), torch.float32)
    assert relative(run(kernel, tensors, 6, CUDA, torch.bfloat16)[0], wanted[0]) < 1e-2
    assert relative(run(kernel, tensors, 7, CUDA, torch.bfloat16)[0], wanted[0]) > 1e-1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_packed_document_attends_as_if_alone(kernel: str) -> None:
    needs(kernel)
    config = ModelConfig(n_heads=4, n_kv_heads=2, head_dim=K)
    ids, positions = packed_rows(((100, 1, 219),))
    q, k, v = (x[:1].to(CUDA, torch.bfloat16) for x in heads(2)[:3])
    packed = attention(q, k, v, document_mask(ids, positions, kernel, config).to(CUDA))
    unmasked = attention(q, k, v, document_mask(torch.zeros_like(ids), positions, kernel, config).to(CUDA))
    last = slice(101, 320)
    one = document_mask(ids[:, last], positions[:, last], kernel, config).to(CUDA)
    alone = attention(q[:, last].contiguous(), k[:, last].contiguous(), v[:, last].contiguous(), one)
    assert relative(packed[:, last], alone) < 1e-2
    assert relative(unmasked[:, last], alone) > 1e-1


def test_bf16_uses_a_kernel_without_masked_work() -> None:
    kernel, reason = choose_backend("cuda", precision="bf16", compiled=True, head_dim=64)
    if torch.cuda.get_device_capability()[0] >= 8:
        assert kernel in ("varlen", "flash_attn"), reason
    assert choose_backend("cuda", precision="fp32", compiled=True, head_dim=64)[0] == "sdpa"


T, D, V = 4096, 2048, 128_256
MATERIALISED = 2 * 4 * T * V
"""Bytes of fp32 logits and their gradient."""

SOFTMAX: dict[str, Callable[[], SoftmaxGradient]] = {
    "eager": lambda: softmax_gradient_,
    "compiled": lambda: torch.compile(softmax_gradient_),
}
SOFTMAX_PARAMETERS = ["eager", pytest.param("compiled", marks=pytest.mark.compiles)]


def problem(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device=CUDA).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator, device=CUDA) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=CUDA)
    labels[::7] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softmax", SOFTMAX_PARAMETERS)
def test_the_chunked_loss_and_its_gradients_match_fp64(softmax: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(2000, 96, 50_304, dtype)  # several chunks, the last one smaller
    sums = linear_cross_entropy(hidden, weight, labels, 1e-4, SOFTMAX[softmax]())
    gradients = torch.autograd.grad(sums.total / 10, (hidden, weight))
    hidden_64, weight_64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden_64 @ weight_64.T
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
    z_loss = 1e-4 * logits.logsumexp(-1)[labels != -100].square().sum()
    wanted = torch.autograd.grad((cross_entropy + z_loss) / 10, (hidden_64, weight_64))
    value, gradient = (1e-5, 1e-5) if dtype == torch.float32 else (1e-3, 1e-2)
    assert relative(sums.cross_entropy, cross_entropy) < value
    assert relative(sums.z_loss, z_loss) < value
    assert relative(gradients[0], wanted[0]) < gradient
    assert relative(gradients[1], wanted[1]) < gradient


def peak_above_inputs(step: Callable[[], object]) -> int:
    """Peak bytes of the second call above those before it. The first call compiles and makes workspaces."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("softmax", SOFTMAX_PARAMETERS)
def test_the_loss_peaks_below_15_percent_of_materialised_logits_and_gradient(softmax: str) -> None:
    hidden, weight, labels = problem(T, D, V, torch.bfloat16)
    function = SOFTMAX[softmax]()
    peak = peak_above_inputs(
        lambda: torch.autograd.grad(
            linear_cross_entropy(hidden, weight, labels, 1e-4, function).total, (hidden, weight)
        )
    )
    gradients = 2 * (T + V) * D  # the result itself: every loss has to return it
    assert gradients < peak < 0.15 * MATERIALISED
    assert peak - gradients < 0.03 * MATERIALISED


def test_materialised_logits_peak_as_calculated() -> None:
    hidden, weight, labels = problem(T, D, V, torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 4 * MATERIALISED:
        pytest.skip(f"needs {4 * MATERIALISED / 2**30:.0f} GiB of free GPU memory")
    peak = peak_above_inputs(
        lambda: torch.autograd.grad(
            F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum"), (hidden, weight)
        )
    )
    assert peak > MATERIALISED
