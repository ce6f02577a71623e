"""Attention: every kernel against softmax written out, packed documents, windows, and the kernels' calling conventions."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model import kernels
from pretrain.model.attention import DocumentMask, attention, continuation_mask, document_mask

B, S, H, G, K = 2, 24, 4, 2, 16
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 1 + [2] * 16, [5] * 12 + [6] * 12])
ONE_DOCUMENT = torch.zeros(B, S, dtype=torch.long)


def positions_of(documents: Tensor) -> Tensor:
    """Positions that begin again with every document."""
    index = torch.arange(documents.shape[1]).expand_as(documents)
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(new, index, 0).cummax(1).values


def config(window: int | None = None, *, document_mask: bool = True) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, d_model=H * K, n_heads=H, n_kv_heads=G, head_dim=K, sliding_window=window, document_mask=document_mask
    )


def heads(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, H, K), (B, S, G, K), (B, S, G, K))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def written_out(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int | None) -> Tensor:
    """One softmax a query, in fp64, over exactly the keys it may see."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(B):
        for i in range(S):
            seen = [j for j in range(i + 1) if documents[b, j] == documents[b, i] and (window is None or i - j < window)]
            for h in range(H):
                keys, values = k[b, seen, h // (H // G)].double(), v[b, seen, h // (H // G)].double()
                out[b, i, h] = torch.softmax(keys @ q[b, i, h].double() / K**0.5, 0) @ values
    return out


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What the documentation of torch.nn.attention.varlen promises, on any device."""
    outs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        assert end - start <= min(max_q, max_k)
        repeat = query.shape[1] // key.shape[1]
        keys, values = (x[start:end].repeat_interleave(repeat, 1) for x in (key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) if window_size[0] < 0 else (distance >= 0) & (distance <= window_size[0])
        assert window_size[1] == 0
        scores = torch.einsum("qhk,thk->hqt", query[start:end], keys) / query.shape[-1] ** 0.5
        outs.append(torch.einsum("hqt,thk->qhk", scores.masked_fill(~seen, float("-inf")).softmax(-1), values))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 1, 5, S])
@pytest.mark.parametrize("documents", [ONE_DOCUMENT, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("kernel", ["sdpa", "blocked", "varlen"])
def test_every_kernel_equals_softmax_written_out(
    kernel: str, documents: Tensor, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_varlen_attn", reference_varlen)  # the real one runs on GPUs only
    q, k, v = heads()
    out = attention(q, k, v, document_mask(documents, positions_of(documents), kernel, config(window)))
    expected = written_out(q, k, v, documents, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("documents", "window"),
    [(ONE_DOCUMENT, None), (DOCUMENTS, 4), (torch.full_like(DOCUMENTS, 3), 5)],
    ids=["mask ignored", "other window", "other documents"],
)
def test_a_wrong_mask_is_seen(documents: Tensor, window: int | None) -> None:
    q, k, v = heads()
    out = attention(q, k, v, document_mask(documents, positions_of(documents), "sdpa", config(window)))
    assert (out.double() - written_out(q, k, v, DOCUMENTS, 5)).abs().max() > 0.1


def test_a_wrong_order_of_heads_is_seen() -> None:
    q, k, v = heads()
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config())
    swapped = attention(q, k.flip(2), v.flip(2), mask)
    assert (swapped - attention(q, k, v, mask)).abs().max() > 0.1


def test_one_document_a_row_needs_no_mask() -> None:
    mask = document_mask(ONE_DOCUMENT, positions_of(ONE_DOCUMENT), "sdpa", config())
    assert mask.allowed_B1ST is None
    assert document_mask(ONE_DOCUMENT, positions_of(ONE_DOCUMENT), "sdpa", config(S)).allowed_B1ST is None


def test_without_document_mask_rows_are_plainly_causal_from_position_0() -> None:
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config(document_mask=False))
    assert mask.allowed_B1ST is None
    assert torch.equal(mask.positions_BS, torch.arange(S).expand(B, S))


def test_documents_end_where_the_next_begins_and_at_the_end_of_a_row() -> None:
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "varlen", config())
    assert mask.document_ends_N is not None
    assert mask.document_ends_N.dtype == torch.int32
    assert mask.document_ends_N.tolist() == [0, 7, 8, 24, 36, 48]
    assert mask.longest == 16
    across_rows = document_mask(ONE_DOCUMENT, positions_of(ONE_DOCUMENT), "varlen", config())
    assert across_rows.document_ends_N is not None
    assert (across_rows.document_ends_N.tolist(), across_rows.longest) == ([0, 24, 48], 32)


def test_dynamic_ntk_knows_the_length_of_each_tokens_document() -> None:
    dynamic = ModelConfig.model_validate(config().model_dump() | {"rope": {"kind": "dynamic_ntk", "factor": 2}})
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", dynamic)
    assert mask.lengths_BS is not None
    assert mask.lengths_BS[0].tolist() == [7] * 7 + [1] + [16] * 16


def test_a_mask_moves_as_a_whole() -> None:
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config(5)).to("meta")
    assert mask.allowed_B1ST is not None
    assert (mask.positions_BS.device.type, mask.allowed_B1ST.device.type, mask.window) == ("meta", "meta", 5)


@pytest.mark.parametrize("window", [None, 5])
def test_a_continuation_sees_what_the_whole_row_would(window: int | None) -> None:
    q, k, v = heads()
    whole = attention(q, k, v, document_mask(ONE_DOCUMENT, positions_of(ONE_DOCUMENT), "sdpa", config(window)))
    for start, count in ((0, 9), (9, 1), (10, S - 10)):
        mask = continuation_mask(start, count, S, config(window), "cpu")
        out = attention(q[:, start : start + count], k[:, : start + count], v[:, : start + count], mask)
        torch.testing.assert_close(out, whole[:, start : start + count], rtol=1e-5, atol=1e-6)


def test_the_installed_varlen_attn_takes_our_arguments() -> None:
    q = torch.empty(B * S, H, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.empty(B * S, G, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    for window in (None, 5):
        out = kernels.varlen(q, k, k, ends, 32, window)
        assert out.shape == q.shape
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k))] == [q.shape, k.shape]


@pytest.mark.parametrize(("version", "module"), [(2, "flash_attn"), (3, "flash_attn_interface"), (4, "flash_attn.cute")])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attn_is_called_by_the_convention_of_its_version(
    version: int, module: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        window_size: tuple[int | None, int | None],
    ) -> Tensor | tuple[Tensor, None]:
        unlimited = None if version == 4 else -1
        assert causal
        assert window_size == ((unlimited, unlimited) if window is None else (window - 1, 0))
        left = -1 if window is None else window - 1
        out = reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(left, 0))
        return (out, None) if version == 4 else out

    package = ModuleType(module)
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]  # a stand-in for the package
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, package)
    monkeypatch.setattr(kernels, "flash_attn_version", lambda _index: version)
    kernels._flash_attn_function.cache_clear()
    q, k, v = heads()
    out = attention(q, k, v, document_mask(DOCUMENTS, positions_of(DOCUMENTS), "flash_attn", config(window)))
    kernels._flash_attn_function.cache_clear()
    torch.testing.assert_close(out.double(), written_out(q, k, v, DOCUMENTS, window), rtol=1e-5, atol=1e-5)


def test_flash_attn_without_the_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flash_attn_version", lambda _index: None)
    q, k, v = heads()
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "flash_attn", config())
    with pytest.raises(ValueError, match="attention=varlen"):
        attention(q, k, v, mask)


def on_gpu(generation: int, flash: int | None) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (generation, 0))
        monkeypatch.setattr(kernels, "_importable", lambda version: version == flash)
        kernels.flash_attn_version.cache_clear()

    return patch


@pytest.mark.parametrize(
    ("generation", "flash", "precision", "head_dim", "expected"),
    [
        (9, 3, "bf16", 64, "flash_attn"),
        (9, 2, "bf16", 64, "varlen"),
        (9, None, "bf16", 64, "varlen"),
        (10, 4, "bf16", 128, "flash_attn"),
        (10, 3, "bf16", 128, "varlen"),
        (8, None, "fp32", 64, "sdpa"),
        (8, None, "bf16", 12, "sdpa"),
        (7, 2, "bf16", 64, "sdpa"),
    ],
)
def test_the_fastest_kernel_that_runs_is_chosen(
    generation: int, flash: int | None, precision: str, head_dim: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(generation, flash)(monkeypatch)
    name, reason = kernels.choose_backend("cuda", precision=precision, compiled=True, head_dim=head_dim)
    kernels.flash_attn_version.cache_clear()
    assert name == expected
    assert reason


def test_on_a_cpu_blocks_are_chosen_where_they_are_compiled() -> None:
    assert kernels.choose_backend("cpu", precision="bf16", compiled=True, head_dim=64)[0] == "blocked"
    assert kernels.choose_backend("cpu", precision="bf16", compiled=False, head_dim=64)[0] == "sdpa"


def test_a_mask_names_its_kernel() -> None:
    assert isinstance(document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config()), DocumentMask)
    assert document_mask(DOCUMENTS, positions_of(DOCUMENTS), "blocked", config()).document_BS is not None
