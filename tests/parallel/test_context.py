"""Context parallelism against one process: both methods, every kernel, the full model, and negative controls."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from flash import reference_varlen
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from workers import WorkerPool

from parallel import collectives, context
from parallel.context import apply_context_parallel, chunks_per_row, local_tokens, shard_sequence
from parallel.engine import LocalTokens, Microbatch
from parallel.errors import LayoutError
from parallel.layout import Layout
from pretrain.config import ModelConfig
from pretrain.model import kernels
from pretrain.model.architectures.llama import Llama
from pretrain.model.attention import attention, context_parallel_mask, document_mask
from pretrain.model.init import init_weights

B, R, K = 2, 32, 8
LENGTHS = ((5, 1, 13, 3, 10), (32,))
METHODS = ["gather", "ulysses"]
SLOW = 180.0
"""Seconds that a case may take on a busy machine: compiling is slow."""


def packed_rows(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """(document ids, positions) of rows packed from documents of these lengths."""
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    return torch.stack(ids), torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def config_of(ranks: int, window: int | None = None, **more: object) -> ModelConfig:
    """Two query heads per key/value head, and enough key/value heads for Ulysses."""
    G = max(2, ranks)
    shape = {
        "vocab_size": 96,
        "n_layers": 2,
        "d_model": 32,
        "d_ff": 64,
        "n_heads": 2 * G,
        "n_kv_heads": G,
        "head_dim": K,
    }
    return ModelConfig.model_validate(shape | {"sliding_window": window} | more)


def heads(config: ModelConfig) -> list[Tensor]:
    """q, k, v of full rows, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    H, G = config.n_heads, config.n_kv_heads
    return [torch.randn(B, R, n, K, generator=generator) for n in (H, G, G, H)]


def local_rows(method: str) -> tuple[LocalTokens, DeviceMesh]:
    ranks = dist.get_world_size()
    return local_tokens(R, Layout(context=ranks, context_method=method), dist.get_rank()), init_device_mesh(
        "cpu", (ranks,), mesh_dim_names=("context",)
    )


class AttentionModule(nn.Module):
    """A module with an attention function, for `apply_context_parallel`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_function = attention


def run_attention_rank(
    method: str, kernel: str, window: int | None, masked: bool = True
) -> tuple[LocalTokens, list[Tensor]]:
    """The output of one rank, and the gradients of q, k and v."""
    config, (tokens, mesh) = config_of(dist.get_world_size(), window), local_rows(method)
    kernels._varlen_attn = reference_varlen  # the real one runs on GPUs only
    model = nn.ModuleList([AttentionModule()])
    apply_context_parallel(model, mesh, method)
    documents, positions = packed_rows()
    documents = documents if masked else torch.zeros_like(documents)
    q, k, v, grad = (torch.cat([x[:, a:b] for a, b in tokens.ranges], 1).requires_grad_() for x in heads(config))
    out = model[0].attention_function(
        q, k, v, context_parallel_mask(documents, positions, kernel, config, tokens.ranges, tokens.full_rows)
    )
    return tokens, [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def run_attention_single_process(config: ModelConfig) -> list[Tensor]:
    """The same for full rows in one process, in fp64."""
    q, k, v, grad = (x.double().requires_grad_() for x in heads(config))
    out = attention(q, k, v, document_mask(*packed_rows(), "sdpa", config))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def relative(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected.double()).norm() / expected.double().norm())


def errors(results: list[tuple[LocalTokens, list[Tensor]]], config: ModelConfig) -> list[float]:
    """Relative errors of the output and of the gradients of q, k, v, put together from all ranks."""
    expected = run_attention_single_process(config)
    found = [torch.full_like(x, torch.nan) for x in expected]
    for tokens, tensors in results:
        columns = torch.cat([torch.arange(*span) for span in tokens.ranges])
        for full, part in zip(found, tensors, strict=True):
            full[:, columns] = part.double()
    return [relative(x, y) for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize("window", [None, 3, 20], ids=["no window", "a window within a chunk", "a window over chunks"])
@pytest.mark.parametrize("kernel", ["sdpa", "blocked", "varlen"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_attention_over_packed_documents_matches_one_process(
    method: str, ranks: int, kernel: str, window: int | None, workers: WorkerPool
) -> None:
    assert max(errors(workers.run(run_attention_rank, ranks, method, kernel, window), config_of(ranks, window))) < 1e-6


def with_broken(module: object, name: str, broken: object, *args: object) -> tuple[LocalTokens, list[Tensor]]:
    original = getattr(module, name)
    setattr(module, name, broken)
    try:
        return run_attention_rank(*args)
    finally:
        setattr(module, name, original)


def chunks_in_wrong_order() -> tuple[LocalTokens, list[Tensor]]:
    return with_broken(context, "in_row_order", lambda parts, **_: torch.cat(parts, 2), "gather", "sdpa", None)


def no_reduction() -> tuple[LocalTokens, list[Tensor]]:
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _, size, dim = ctx.arguments  # type: ignore[attr-defined]  # set by forward
        return grad.chunk(size, dim)[dist.get_rank()], None, None, None

    return with_broken(collectives._AllGather, "backward", staticmethod(backward), "gather", "sdpa", None)


def heads_in_wrong_order() -> tuple[LocalTokens, list[Tensor]]:
    def all_to_all(x: Tensor, group: dist.ProcessGroup, split_dim: int, concat_dim: int) -> Tensor:
        return collectives.all_to_all(
            x.flip(2) if split_dim == 2 and x.shape[2] == 2 else x, group, split_dim, concat_dim
        )

    return with_broken(context, "all_to_all", all_to_all, "ulysses", "sdpa", None)


BROKEN: dict[str, Callable[[], tuple[LocalTokens, list[Tensor]]]] = {
    "documents ignored, gather": partial(run_attention_rank, "gather", "sdpa", None, masked=False),
    "documents ignored, ulysses": partial(run_attention_rank, "ulysses", "sdpa", None, masked=False),
    "chunks in wrong order": chunks_in_wrong_order,
    "heads in wrong order": heads_in_wrong_order,
}


def run_broken(name: str) -> tuple[LocalTokens, list[Tensor]]:
    return BROKEN[name]()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_attention_is_detected(name: str, workers: WorkerPool) -> None:
    assert min(errors(workers.run(run_broken, 2, name), config_of(2))) > 1e-3


def test_a_missing_reduction_shows_in_the_gradients_of_keys_and_values_only(workers: WorkerPool) -> None:
    out, q, k, v = errors(workers.run(no_reduction, 2), config_of(2))
    assert max(out, q) < 1e-6
    assert min(k, v) > 1e-3


def microbatch(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> Microbatch:
    ids = torch.randint(96, (B, R + 1), generator=torch.Generator().manual_seed(1))
    documents, positions = packed_rows(lengths)
    labels = ids[:, 1:].clone()
    labels[:, 20:24] = -100
    return Microbatch(ids[:, :-1], labels, positions, documents, n_targets=B * (R - 4))


def loss_and_gradients(model: Llama, batch: Microbatch) -> tuple[float, dict[str, Tensor]]:
    tokens = batch.local_tokens
    if tokens is None:
        mask = model.document_mask(batch.document_ids, batch.positions)
    else:
        mask = model.context_parallel_mask(batch.document_ids, batch.positions, tokens.ranges, tokens.full_rows)
    total = model.loss(batch.input_ids, batch.labels, mask, z_loss=0.01).total / batch.n_targets
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def model_of(config: ModelConfig, kernel: str) -> Llama:
    model = Llama(config, kernel)
    init_weights(model, 0)
    return model


def run_model_rank(method: str, config: ModelConfig, kernel: str, how: str) -> tuple[float, dict[str, Tensor]]:
    """One rank's share of the loss and of each gradient."""
    tokens, mesh = local_rows(method)
    model = model_of(config, kernel)
    apply_context_parallel(model, mesh, method)
    if how == "recomputed":
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return loss_and_gradients(model, shard_sequence(microbatch(), tokens))


def assert_sum_is(parts: list[tuple[float, dict[str, Tensor]]], loss: float, gradients: dict[str, Tensor]) -> None:
    """Losses and gradients are sums over the ranks."""
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert relative(torch.stack([part[name] for _, part in parts]).sum(0), gradient) < 1e-5, name


@pytest.mark.parametrize(
    ("method", "ranks", "kernel", "how", "more"),
    [
        ("gather", 4, "sdpa", "eager", {"rope": {"kind": "dynamic_ntk", "factor": 4, "original_max_seq_len": 8}}),
        ("ulysses", 4, "sdpa", "eager", {"rope": {"kind": "dynamic_ntk", "factor": 4, "original_max_seq_len": 8}}),
        ("ulysses", 2, "blocked", "eager", {"qk_norm": True, "sliding_window": 11}),
        ("gather", 2, "sdpa", "recomputed", {"sliding_window": 11}),
        ("ulysses", 2, "sdpa", "recomputed", {"document_mask": False}),
        ("gather", 2, "blocked", "eager", {"document_mask": False}),
    ],
)
def test_loss_and_gradients_of_the_model_match_one_process(
    method: str, ranks: int, kernel: str, how: str, more: dict[str, object], workers: WorkerPool
) -> None:
    config = config_of(ranks, **more)
    alone = model_of(config, kernel)
    loss, gradients = loss_and_gradients(alone, microbatch())
    assert len(gradients) == len(list(alone.parameters()))
    results = workers.run(run_model_rank, ranks, method, config, kernel, how, timeout=SLOW)
    assert_sum_is(results, loss, gradients)


BATCHES = (LENGTHS, ((32,), (32,)), ((7, 25), (31, 1)))
"""Several documents in one row, in no row, in both rows."""


def run_compiled_rank(method: str) -> tuple[int, list[tuple[float, dict[str, Tensor]]]]:
    """The number of graphs of the compiled blocks, and one rank's share of the losses and gradients."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds to import

    tokens, mesh = local_rows(method)
    model = model_of(config_of(2), "blocked")
    apply_context_parallel(model, mesh, method)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    found = []
    for lengths in BATCHES:
        found.append(loss_and_gradients(model, shard_sequence(microbatch(lengths), tokens)))
        model.zero_grad()
    return counter.frame_count, found


@pytest.mark.parametrize("method", METHODS)
def test_one_compiled_graph_serves_batches_of_any_documents(method: str, workers: WorkerPool) -> None:
    results = workers.run(run_compiled_rank, 2, method, timeout=SLOW)
    assert [graphs for graphs, _ in results] == [1, 1]
    for lengths, *parts in zip(BATCHES, *(found for _, found in results), strict=True):
        loss, gradients = loss_and_gradients(model_of(config_of(2), "blocked"), microbatch(lengths))
        assert_sum_is(parts, loss, gradients)


def test_gather_balances_causal_work_and_ulysses_keeps_tokens_consecutive() -> None:
    gathers = [local_tokens(64, Layout(context=4), rank) for rank in range(4)]
    assert [tokens.ranges for tokens in gathers[:2]] == [((0, 8), (56, 64)), ((8, 16), (48, 56))]
    assert {sum(sum(range(first, end)) for first, end in tokens.ranges) for tokens in gathers} == {sum(range(64)) // 4}
    exchanges = [local_tokens(64, Layout(context=4, context_method="ulysses"), rank) for rank in range(4)]
    assert [tokens.ranges for tokens in exchanges] == [((0, 16),), ((16, 32),), ((32, 48),), ((48, 64),)]
    assert (gathers[0].full_rows, exchanges[0].full_rows) == (False, True)


def test_one_rank_holds_full_rows() -> None:
    assert local_tokens(7, Layout(), 0) == LocalTokens(((0, 7),), full_rows=True)
    assert chunks_per_row(Layout()) == 1


@pytest.mark.parametrize(
    ("method", "seq_len", "way_out"),
    [("gather", 36, "multiple of 8 .* try 40"), ("ulysses", 38, "multiple of 4 .* try 40")],
)
def test_an_indivisible_row_is_refused_with_the_next_length_that_works(method: str, seq_len: int, way_out: str) -> None:
    with pytest.raises(LayoutError, match=f"data.seq_len={seq_len} .*{way_out}"):
        local_tokens(seq_len, Layout(context=4, context_method=method), 0)


def test_a_sharded_microbatch_keeps_full_rows_for_the_mask_and_all_targets() -> None:
    full = microbatch()
    sharded = shard_sequence(full, local_tokens(R, Layout(context=4), 1))
    columns = [*range(4, 8), *range(24, 28)]
    assert torch.equal(sharded.input_ids, full.input_ids[:, columns])
    assert torch.equal(sharded.labels, full.labels[:, columns])
    assert (sharded.positions.shape, sharded.document_ids.shape, sharded.n_targets) == ((B, R), (B, R), full.n_targets)


def too_many_ranks() -> str:
    config, (tokens, mesh) = config_of(1), local_rows("ulysses")
    model = AttentionModule()
    apply_context_parallel(model, mesh, "ulysses")
    q, k, v, _ = heads(config)
    with pytest.raises(ValueError, match="ulysses") as raised:
        model.attention_function(q, k, v, context_parallel_mask(*packed_rows(), "sdpa", config, tokens.ranges, True))
    return str(raised.value)


def test_ulysses_on_more_ranks_than_key_value_heads_says_what_to_do(workers: WorkerPool) -> None:
    for message in workers.run(too_many_ranks, 4):
        assert "parallel.context=4 does not divide the 2" in message
        assert "use parallel.context_method=gather" in message
