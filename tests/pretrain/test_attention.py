"""Attention: every kernel against softmax written out, packed documents, windows, and the kernels' calling
conventions."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from flash import reference_varlen
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model import kernels
from pretrain.model.attention import (
    DocumentMask,
    QuerySpan,
    attention,
    context_parallel_mask,
    continuation_mask,
    document_mask,
)

B, S, H, G, K = 2, 24, 4, 2, 16
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 1 + [2] * 16, [5] * 12 + [6] * 12])
ONE_DOCUMENT = torch.zeros(B, S, dtype=torch.long)
RANGES = {
    "a chunk and its mirror": ((6, 12), (12, 18)),
    "first and last": ((0, 6), (18, 24)),
    "uneven": ((5, 6), (7, 20), (23, 24)),
}
"""Tokens of a row that a rank may hold under context parallelism."""


def positions_of(documents: Tensor) -> Tensor:
    """Positions that begin again with every document."""
    index = torch.arange(documents.shape[1]).expand_as(documents)
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(new, index, 0).cummax(1).values


def config(window: int | None = None, *, document_mask: bool = True) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        d_model=H * K,
        n_heads=H,
        n_kv_heads=G,
        head_dim=K,
        sliding_window=window,
        document_mask=document_mask,
    )


def heads(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, S, H, K), (B, S, G, K), (B, S, G, K))
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    return q, k, v


def reference_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, window: int | None) -> Tensor:
    """One softmax a query, in fp64, over exactly the keys it may see."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(B):
        for i in range(S):
            seen = [
                j for j in range(i + 1) if documents[b, j] == documents[b, i] and (window is None or i - j < window)
            ]
            for h in range(H):
                keys, values = k[b, seen, h // (H // G)].double(), v[b, seen, h // (H // G)].double()
                out[b, i, h] = torch.softmax(keys @ q[b, i, h].double() / K**0.5, 0) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 5, S])
@pytest.mark.parametrize("documents", [ONE_DOCUMENT, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("kernel", ["sdpa", "blocked", "varlen"])
def test_every_kernel_equals_softmax_written_out(
    kernel: str, documents: Tensor, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_varlen_attn", reference_varlen)  # the real one runs on GPUs only
    q, k, v = heads()
    out = attention(q, k, v, document_mask(documents, positions_of(documents), kernel, config(window)))
    expected = reference_attention(q, k, v, documents, window)
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
    assert (out.double() - reference_attention(q, k, v, DOCUMENTS, 5)).abs().max() > 0.1


def test_a_wrong_order_of_heads_is_seen() -> None:
    q, k, v = heads()
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config())
    swapped = attention(q, k.flip(2), v.flip(2), mask)
    assert (swapped - attention(q, k, v, mask)).abs().max() > 0.1


def test_one_document_a_row_needs_no_mask() -> None:
    mask = document_mask(ONE_DOCUMENT, positions_of(ONE_DOCUMENT), "sdpa", config())
    assert mask.spans == (QuerySpan(0, 0, S),)
    assert document_mask(ONE_DOCUMENT, positions_of(ONE_DOCUMENT), "sdpa", config(S)).spans == (QuerySpan(0, 0, S),)


def test_without_document_mask_rows_are_plainly_causal_from_position_0() -> None:
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config(document_mask=False))
    assert mask.spans == (QuerySpan(0, 0, S),)
    assert torch.equal(mask.positions_BS, torch.arange(S).expand(B, S))


def test_documents_end_where_the_next_begins_and_at_the_end_of_a_row() -> None:
    documents = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "varlen", config()).spans[0].documents
    assert documents is not None
    assert documents.query_ends_N.dtype == documents.key_ends_N.dtype == torch.int32
    assert documents.query_ends_N.tolist() == documents.key_ends_N.tolist() == [0, 7, 8, 24, 36, 48]
    assert documents.longest.shape == (16, 16, 0)
    across_rows = document_mask(ONE_DOCUMENT, positions_of(ONE_DOCUMENT), "varlen", config()).spans[0].documents
    assert across_rows is not None
    assert (across_rows.query_ends_N.tolist(), across_rows.longest.shape) == ([0, 24, 48], (32, 32, 0))


def test_dynamic_ntk_knows_the_length_of_each_tokens_document() -> None:
    dynamic = ModelConfig.model_validate(config().model_dump() | {"rope": {"kind": "dynamic_ntk", "factor": 2}})
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", dynamic)
    assert mask.lengths_BS is not None
    assert mask.lengths_BS[0].tolist() == [7] * 7 + [1] + [16] * 16


def test_a_mask_moves_as_a_whole() -> None:
    mask = document_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config(5)).to("meta")
    assert mask.spans[0].allowed_B1ST is not None
    assert (mask.positions_BS.device.type, mask.spans[0].allowed_B1ST.device.type, mask.window) == ("meta", "meta", 5)


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
        out = kernels.varlen(q, k, k, kernels.Documents.of(ends, ends, 32, 32), window)
        assert out.shape == q.shape
        assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k))] == [q.shape, k.shape]


@pytest.mark.parametrize(
    ("version", "module"), [(2, "flash_attn"), (3, "flash_attn_interface"), (4, "flash_attn.cute")]
)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("ranges", [((0, S),), *RANGES.values()], ids=["whole rows", *RANGES])
def test_flash_attn_is_called_by_the_convention_of_its_version(
    version: int, module: str, window: int | None, ranges: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
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
    here = torch.cat([torch.arange(*span) for span in ranges])
    mask = context_parallel_mask(
        DOCUMENTS, positions_of(DOCUMENTS), "flash_attn", config(window), ranges, full_rows=len(here) == S
    )
    out = attention(q[:, here], k, v, mask)
    kernels._flash_attn_function.cache_clear()
    torch.testing.assert_close(
        out.double(), reference_attention(q, k, v, DOCUMENTS, window)[:, here], rtol=1e-5, atol=1e-5
    )


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
    assert document_mask(DOCUMENTS, positions_of(DOCUMENTS), "blocked", config()).spans[0].document_BT is not None


@pytest.mark.parametrize("window", [None, 1, 5, 13])
@pytest.mark.parametrize("documents", [ONE_DOCUMENT, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("kernel", ["sdpa", "blocked", "varlen"])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_some_queries_of_a_row_attend_as_they_do_in_the_whole_row(
    ranges: tuple[tuple[int, int], ...],
    kernel: str,
    documents: Tensor,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_varlen_attn", reference_varlen)
    q, k, v = heads()
    here = torch.cat([torch.arange(*span) for span in ranges])
    mask = context_parallel_mask(documents, positions_of(documents), kernel, config(window), ranges, full_rows=False)
    out = attention(q[:, here], k, v, mask)
    expected = reference_attention(q, k, v, documents, window)[:, here]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_long_rows_are_cut_into_blocks_that_end_with_their_own_queries() -> None:
    """Several blocks in a part, the last one smaller, and a window that begins in the block before."""
    long, ranges = 700, ((140, 420), (560, 700))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, long, 2, 8, generator=generator) for _ in range(3))
    documents = torch.arange(long)[None] // 300
    here = torch.cat([torch.arange(*span) for span in ranges])
    for window in (None, 200):
        masks = [
            document_mask(documents, positions_of(documents), "sdpa", config(window)),
            context_parallel_mask(
                documents, positions_of(documents), "blocked", config(window), ranges, full_rows=False
            ),
        ]
        torch.testing.assert_close(
            attention(q[:, here], k, v, masks[1]), attention(q, k, v, masks[0])[:, here], rtol=1e-5, atol=1e-6
        )


def test_keys_before_the_first_document_with_queries_are_a_document_without_them() -> None:
    documents = torch.tensor([[0] * 4 + [1] * 4 + [2] * 8 + [3] * 8, [5] * 24])
    mask = context_parallel_mask(
        documents, positions_of(documents), "varlen", config(), ((10, 20), (0, 3)), full_rows=False
    )
    middle, begin = (part.documents for part in mask.spans)
    assert middle is not None
    assert begin is not None
    assert middle.query_ends_N.tolist() == [
        0,
        0,
        6,
        10,
        20,
    ]  # of the first row: none of 0 and 1, six of 2, four of 3; ten of the second
    assert middle.key_ends_N.tolist() == [0, 8, 16, 20, 40]
    assert middle.longest.shape == (16, 32, 0)
    assert begin.query_ends_N.tolist() == begin.key_ends_N.tolist() == [0, 3, 6]


def test_keys_before_every_window_are_left_out() -> None:
    mask = context_parallel_mask(
        DOCUMENTS, positions_of(DOCUMENTS), "sdpa", config(5), ((2, 4), (18, 24)), full_rows=False
    )
    assert [(part.first_key, part.first, part.end) for part in mask.spans] == [(0, 2, 4), (14, 18, 24)]


@pytest.mark.parametrize("full_rows", [False, True])
def test_positions_and_lengths_are_those_of_the_tokens_that_are_here(full_rows: bool) -> None:
    dynamic = ModelConfig.model_validate(config().model_dump() | {"rope": {"kind": "dynamic_ntk", "factor": 2}})
    mask = context_parallel_mask(DOCUMENTS, positions_of(DOCUMENTS), "sdpa", dynamic, ((4, 8), (16, 18)), full_rows)
    assert mask.lengths_BS is not None
    assert mask.positions_BS[0].tolist() == [4, 5, 6, 0, 8, 9]
    assert mask.lengths_BS[0].tolist() == [7, 7, 7, 1, 16, 16]  # of whole documents, wherever they lie
    assert [(part.first, part.end) for part in mask.spans] == ([(0, 24)] if full_rows else [(4, 8), (16, 18)])
